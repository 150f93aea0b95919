"""Reads machine code back: what ``cuobjdump`` says of a compiled kernel, and how often each instruction is issued.

The listing is split into basic blocks; dominators give its loops. The loop that holds the matrix instructions is the
reduction, and its trip count follows from their number: a step of the reduction needs a known number of them, so an
unrolled loop and steps that the compiler peeled off are recognised by what they contain.

In a persistent kernel whose tile loop and reduction are flattened into one loop, the code for a tile's first and last
step sits in that same loop, each behind a forward branch. A block that some iterations skip does not dominate the
loop's end; if the loop also stores, such a block counts once a tile instead of once a step.

Waiting is not counted: the second and later polls of a barrier depend on time, not on the code.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Instructions of the tensor cores by architecture: sm_90 (warp groups), sm_80 (warps), sm_100 (one thread).
TENSOR_CORE = re.compile(r"(HGMMA|QGMMA|IGMMA|HMMA|IMMA|QMMA|UTC\w*MMA)\b")
FFMA = re.compile(r"FFMA2?\b")
STORE = re.compile(r"(UTMASTG|STG)\b")
LOCAL = re.compile(r"(LDL|STL)\b")
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\s*$")


@dataclass(frozen=True)
class Instruction:
    """One line of a listing: byte address, guard predicate (or None), opcode with its modifiers, operands."""

    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".", 1)[0]


@dataclass(frozen=True)
class Listing:
    """A kernel's machine code.

    Args:
        instructions: in the order of their addresses.
        registers: per thread.
        stack_bytes: local memory per thread; spilled registers live there.
    """

    instructions: tuple[Instruction, ...]
    registers: int
    stack_bytes: int

    def count(self, pattern: re.Pattern[str] | str) -> int:
        """How many instructions have an opcode that begins with ``pattern``."""
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)


@dataclass(frozen=True)
class IssueCount:
    """Instructions that one warp issues.

    Args:
        step: in one step of the reduction.
        tile: for one output tile besides its steps.
        program: once for a persistent program, whatever the number of its tiles; 0 where a program has one tile.
        trips: steps of the reduction that ``step`` counts; the peeled ones are part of ``tile``.
    """

    step: float
    tile: int
    program: int
    trips: float

    def per_tile(self, tiles_per_program: float) -> float:
        """Instructions for one tile with everything that it shares spread over the program's tiles."""
        return self.step * self.trips + self.tile + self.program / tiles_per_program


@functools.cache
def cuobjdump() -> Path:
    """The disassembler that ships with Triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def disassemble(cubin: bytes) -> Listing:
    """Reads one kernel's binary.

    Raises:
        RuntimeError: ``cuobjdump`` is missing or cannot read it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            text = subprocess.run(
                [cuobjdump(), "-sass", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise RuntimeError(f"{cuobjdump()} failed: {error}; it comes with triton's wheel") from error
    return parse(text)


def parse(text: str) -> Listing:
    """Reads the output of ``cuobjdump -sass -res-usage``."""
    instructions = tuple(
        Instruction(int(address, 16), predicate, opcode, operands)
        for address, predicate, opcode, operands in _LINE.findall(text)
        for predicate in [predicate or None]
    )
    if not instructions:
        raise RuntimeError("the listing holds no instructions")

    def usage(name: str) -> int:
        found = re.search(rf"\b{name}:(\d+)", text)
        return int(found.group(1)) if found else 0

    return Listing(instructions, usage("REG"), usage("STACK"))


@dataclass
class Block:
    """A basic block: its instructions and the indices of the blocks that may follow it."""

    instructions: Sequence[Instruction]
    successors: list[int]

    def has(self, pattern: re.Pattern[str]) -> bool:
        """Whether an opcode begins with ``pattern``."""
        return self.count(pattern) > 0

    def count(self, pattern: re.Pattern[str]) -> int:
        """Instructions whose opcode begins with ``pattern``."""
        return sum(bool(pattern.match(i.opcode)) for i in self.instructions)


def _branch(instruction: Instruction) -> tuple[int | None, bool]:
    """Target address of a branch (or None), and whether control can also fall through."""
    name, conditional = instruction.name, instruction.predicate is not None
    if name in ("EXIT", "RET", "BRX"):
        return None, conditional
    if name != "BRA" or ".DIV" in instruction.opcode:  # BRA.DIV leads to the path of a diverged warp
        return None, True
    found = _TARGET.search(instruction.operands)
    return (int(found.group(1), 16) if found else None), conditional or "," in instruction.operands


def blocks_of(instructions: Sequence[Instruction]) -> list[Block]:
    """Basic blocks that the entry (block 0) can reach, in the order of their addresses."""
    index = {instruction.address: i for i, instruction in enumerate(instructions)}
    leaders = {0}
    for i, instruction in enumerate(instructions):
        if instruction.name in ("BRA", "EXIT", "RET", "BRX"):
            target, _ = _branch(instruction)
            leaders |= {i + 1} | ({index[target]} if target in index else set())
    starts = sorted(leader for leader in leaders if leader < len(instructions))
    number = {start: n for n, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)], strict=True):
        target, falls = _branch(instructions[end - 1])
        after = [number[index[target]]] if target in index else []
        blocks.append(Block(instructions[start:end], after + ([number[end]] if falls and end in number else [])))
    reached, stack = {0}, [0]
    while stack:
        new = set(blocks[stack.pop()].successors) - reached
        reached |= new
        stack += new
    kept = {old: new for new, old in enumerate(sorted(reached))}
    return [Block(blocks[old].instructions, [kept[s] for s in blocks[old].successors]) for old in kept]


def dominators(blocks: Sequence[Block]) -> list[set[int]]:
    """For each block, the blocks on every path from the entry to it (itself included)."""
    everything = set(range(len(blocks)))
    before: list[list[int]] = [[] for _ in blocks]
    for b, block in enumerate(blocks):
        for successor in block.successors:
            before[successor].append(b)
    dominating = [{0}] + [set(everything) for _ in blocks[1:]]
    changed = True
    while changed:
        changed = False
        for b in range(1, len(blocks)):
            new = {b} | set.intersection(*(dominating[p] for p in before[b]))
            changed |= new != dominating[b]
            dominating[b] = new
    return dominating


@dataclass(frozen=True)
class Loop:
    """A natural loop: its blocks, and those among them that every iteration passes."""

    blocks: frozenset[int]
    always: frozenset[int]


def loops_of(blocks: Sequence[Block]) -> list[Loop]:
    """Natural loops, smallest first; loops with the same header are one."""
    dominating = dominators(blocks)
    latches: dict[int, list[int]] = {}
    for b, block in enumerate(blocks):
        for header in block.successors:
            if header in dominating[b]:
                latches.setdefault(header, []).append(b)
    loops = []
    for header, ends in latches.items():
        body, stack = {header}, list(ends)
        while stack:
            b = stack.pop()
            if b not in body:
                body.add(b)
                stack += [p for p, block in enumerate(blocks) if b in block.successors]
        always = set.intersection(*(dominating[end] for end in ends)) & body
        loops.append(Loop(frozenset(body), frozenset(always)))
    return sorted(loops, key=lambda loop: len(loop.blocks))


def _waits(block: Block, b: int) -> bool:
    """Whether a block polls a barrier again and again, or only leads back from there."""
    polls = b in block.successors and any("TRYWAIT" in i.opcode for i in block.instructions)
    return polls or [i.name for i in block.instructions] == ["BRA"]


def count_issued(
    listing: Listing, steps: int, mma: re.Pattern[str] = TENSOR_CORE, mma_per_step: float | None = None
) -> IssueCount:
    """Counts what one warp issues.

    Args:
        listing: the machine code.
        steps: of the reduction, for one output tile.
        mma: matrix instructions that mark the reduction.
        mma_per_step: how many of them one step needs in one warp. None takes the loop's own number, as if it were
            not unrolled.

    Raises:
        ValueError: the number of matrix instructions in the loop is no multiple of ``mma_per_step``.
    """
    blocks = blocks_of(listing.instructions)
    issued = [0 if _waits(block, b) else len(block.instructions) for b, block in enumerate(blocks)]
    loops = loops_of(blocks)

    def total(chosen: Iterable[int]) -> int:
        return sum(issued[b] for b in chosen)

    everything = frozenset(range(len(blocks)))
    matrix = [block.count(mma) for block in blocks]
    holders = [loop for loop in loops if any(matrix[b] for b in loop.blocks)]
    innermost = [loop for loop in holders if not any(other.blocks < loop.blocks for other in holders)]
    if not innermost:
        return IssueCount(0, total(everything), 0, 0)
    reduction = max(innermost, key=lambda loop: sum(matrix[b] for b in loop.blocks))
    stores = [block.has(STORE) for block in blocks]
    flattened = any(stores[b] for b in reduction.blocks)
    each_step = {b for b in reduction.blocks if b in reduction.always or not flattened or matrix[b]}
    # the outermost loop that stores is a persistent program's loop over its tiles
    persistent = [
        loop.blocks for loop in holders if reduction.blocks <= loop.blocks and any(stores[b] for b in loop.blocks)
    ]
    tile = persistent[-1] if persistent else everything

    in_loop = sum(matrix[b] for b in each_step)
    per_step = mma_per_step or in_loop
    unrolled = max(1, round(in_loop / per_step))
    peeled = 0
    if mma is TENSOR_CORE:
        if in_loop != unrolled * per_step:
            raise ValueError(f"a loop with {in_loop} matrix instructions does not fit {per_step} a step")
        peeled = round(sum(matrix[b] for b in tile - each_step) / per_step)
    return IssueCount(
        total(each_step) / unrolled, total(tile - each_step), total(everything - tile), max(0, steps - peeled)
    )

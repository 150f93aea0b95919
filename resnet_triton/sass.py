"""Reads machine code back: what ``cuobjdump`` says of a compiled kernel, its basic blocks, and its loops."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Instructions of the tensor cores by architecture: sm_90 (warp groups), sm_80 (warps), sm_100 (one thread).
TENSOR_CORE = re.compile(r"(HGMMA|QGMMA|IGMMA|HMMA|IMMA|QMMA|UTC\w*MMA)\b")
FFMA = re.compile(r"FFMA2?\b")
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


def in_order(blocks: Sequence[Block]) -> list[int]:
    """The blocks so that each comes before those that it leads to, but for jumps back (reverse postorder)."""
    done: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        b, after = stack[-1]
        new = next((s for s in after if s not in seen), None)
        if new is None:
            done.append(b)
            stack.pop()
        else:
            seen.add(new)
            stack.append((new, iter(blocks[new].successors)))
    return done[::-1]


@dataclass(frozen=True)
class NaturalLoop:
    """A loop: the block that is its only entry, its blocks, and those among them that every iteration passes."""

    header: int
    blocks: frozenset[int]
    always: frozenset[int]


def loops_of(blocks: Sequence[Block]) -> list[NaturalLoop]:
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
        loops.append(NaturalLoop(header, frozenset(body), frozenset(always)))
    return sorted(loops, key=lambda loop: len(loop.blocks))

"""How often a warp issues what a listing holds: the loops of the machine code, matched with those of the source.

A kernel's source says its loops, how often each runs and how many multiply-adds an iteration holds (:mod:`.nests`). The
listing says which loops there are and which matrix instructions lie in them, whose opcodes tell their multiply-adds.
Comparing the two shows what the compiler did: a loop whose body holds twice the products of an iteration was unrolled
twice, one that is absent was unrolled completely, and products before or behind a loop are iterations peeled off.
What fits no such explanation is an error: a wrong count cannot pass unseen.

A block that some iterations skip does not dominate the loop's end; where the source has code behind a condition
(``Loop.taken``), such a block counts as often as the condition holds, elsewhere every time. In a persistent kernel
whose tile loop and reduction are flattened into one loop, such blocks are a tile's first and last step. Loops without
products count once; waiting does not count, because the later polls of a barrier depend on time, not on the code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from .nests import Loop
from .sass import FFMA, TENSOR_CORE, Block, Listing, NaturalLoop, blocks_of, in_order, loops_of


@dataclass(frozen=True)
class LoopCount:
    """What one warp issues in a loop of the listing.

    Args:
        depth: 0 for a loop that lies in no other one with products.
        step: instructions of one iteration of the source, besides those of inner loops; the mean where iterations
            differ.
        times: iterations for one tile in all; the peeled ones are not among them.
        macs: multiply-adds of the program that go with ``step``; where an iteration has none but those of inner
            loops, these.
    """

    depth: int
    step: float
    times: float
    macs: float


@dataclass(frozen=True)
class IssueCount:
    """Instructions that one warp issues.

    Args:
        loops: those with products, in the order of execution, each before those inside it.
        tile: for one output tile besides its loops.
        program: once for a persistent program, whatever the number of its tiles; 0 where a program has one tile.
    """

    loops: tuple[LoopCount, ...]
    tile: int
    program: int

    def per_tile(self, tiles_per_program: float) -> float:
        """Instructions for one tile with everything that it shares spread over the program's tiles."""
        return sum(loop.step * loop.times for loop in self.loops) + self.tile + self.program / tiles_per_program


@dataclass(frozen=True)
class _Match:
    """A loop of the listing, and the source's loop that it is.

    Args:
        trips: iterations of the source each time it is entered, without the peeled ones.
        unrolled: iterations of the source in one of the listing.
        inner: of ``loop.inner``, those that the listing has.
    """

    natural: NaturalLoop
    loop: Loop
    trips: int
    unrolled: int
    inner: tuple[_Match, ...] = ()

    @property
    def own(self) -> frozenset[int]:
        """Its blocks without those of inner loops."""
        return self.natural.blocks - _blocks(self.inner)


class _Body:
    """The basic blocks of a listing: what each issues and multiplies, and the loops that multiply, in their order."""

    def __init__(self, listing: Listing, weigh: Callable[[str], float]) -> None:
        blocks = blocks_of(listing.instructions)
        self.blocks = frozenset(range(len(blocks)))
        self._issued = [0 if _waits(block, b) else len(block.instructions) for b, block in enumerate(blocks)]
        self._macs = [sum(weigh(i.opcode) for i in block.instructions) for block in blocks]
        order = {b: n for n, b in enumerate(in_order(blocks))}
        loops = [loop for loop in loops_of(blocks) if self.macs(loop.blocks)]
        self.loops = sorted(loops, key=lambda loop: order[loop.header])

    def issued(self, blocks: Iterable[int]) -> int:
        return sum(self._issued[b] for b in blocks)

    def macs(self, blocks: Iterable[int]) -> float:
        return sum(self._macs[b] for b in blocks)

    def inside(self, blocks: frozenset[int]) -> list[NaturalLoop]:
        """The outermost loops that are a part of these blocks."""
        found = [loop for loop in self.loops if loop.blocks < blocks]
        return [loop for loop in found if not any(loop.blocks < other.blocks for other in found)]

    def describe(self, blocks: frozenset[int]) -> str:
        """Multiply-adds in a region as ``straight + [loop + [inner loop]]``."""
        loops = self.inside(blocks)
        straight = self.macs(blocks - frozenset().union(*(loop.blocks for loop in loops)))
        return " + ".join([f"{straight:g}", *(f"[{self.describe(loop.blocks)}]" for loop in loops)])


def count_issued(
    listing: Listing,
    nest: Sequence[Loop],
    warps: int,
    repeats: int = 1,
    persistent: bool = False,
    tensor_cores: bool = True,
) -> IssueCount:
    """Counts what one warp issues.

    Args:
        listing: the machine code.
        nest: the loops of the source for one output tile; none for a kernel without products.
        warps: of a program.
        repeats: how many of its warps, or groups of them, compute the same products.
        persistent: whether a program walks over several tiles.
        tensor_cores: whether the products are matrix instructions, else fp32 multiply-adds. Of those, which appear
            elsewhere too, only the loop with the most is looked for, and no peeled iteration.

    Raises:
        ValueError: the listing's loops do not fit the nest.
    """
    matrix = {i.opcode for i in listing.instructions if TENSOR_CORE.match(i.opcode)}
    sizes = {opcode: size / repeats for opcode in matrix if (size := _macs_of(opcode, warps))}
    exact = tensor_cores and len(sizes) == len(matrix)

    def weigh(opcode: str) -> float:
        if not tensor_cores:
            return 32 * warps * (2 if opcode.startswith("FFMA2") else 1) if FFMA.match(opcode) else 0
        return (sizes[opcode] if exact else 1) if opcode in matrix else 0

    body = _Body(listing, weigh)
    scope, loops = body.blocks, body.inside(body.blocks)
    if persistent and len(loops) == 1:
        scope, outer = loops[0].blocks, loops
        loops = body.inside(scope)
        if not loops:  # flattened: what runs once a tile lies behind conditions
            loops, nest = outer, [replace(loop, taken=1) for loop in nest]
    if not nest:
        matches: tuple[_Match, ...] | None = ()
    elif exact:
        straight = body.macs(scope - frozenset().union(*(loop.blocks for loop in loops)))
        matches = _fit(body, straight, loops, nest)
    else:
        matches = _largest(body, scope, nest, sized=not tensor_cores)
    if matches is None:
        raise ValueError(
            f"products {body.describe(scope)} in the listing, repeated {repeats} times, do not fit the source's loops "
            f"{tuple(nest)}"
        )
    counts = tuple(_counts(body, matches, 1, 0))
    return IssueCount(counts, body.issued(scope - _blocks(matches)), body.issued(body.blocks - scope))


def _macs_of(opcode: str, warps: int) -> float | None:
    """Multiply-adds of a program where each warp issues one matrix instruction; None if its opcode does not say."""
    name, _, rest = opcode.partition(".")
    size = rest.split(".")[0]
    if name == "HGMMA":  # 64x128x16, by the four warps of a group together
        m, n, k = map(int, size.split("x"))
        return m * n * k * warps / 4
    if name == "HMMA":  # 16816 is 16x8x16
        return 16 * 8 * int(size[3:]) * warps
    return None


def _fit(
    body: _Body, straight: float, naturals: Sequence[NaturalLoop], loops: Sequence[Loop]
) -> tuple[_Match, ...] | None:
    """Which of the source's loops the listing's are, in the same order; None if there is no explanation.

    Args:
        body: the listing.
        straight: multiply-adds beside ``naturals``: loops that were unrolled, and peeled iterations.
        naturals, loops: of the listing and the source, at the same depth.
    """
    for present in itertools.combinations(loops, len(naturals)):
        left = straight - sum(loop.work for loop in loops if not any(loop is other for other in present))
        for peeled in _peelings(left, present):
            matches = [
                _fit_loop(body, natural, loop, loop.trips - off)
                for natural, loop, off in zip(naturals, present, peeled, strict=True)
            ]
            if all(matches):
                return tuple(match for match in matches if match)
    return None


def _fit_loop(body: _Body, natural: NaturalLoop, loop: Loop, trips: int) -> _Match | None:
    within = body.inside(natural.blocks)
    own = body.macs(natural.blocks - frozenset().union(*(inner.blocks for inner in within)))
    if within:
        inner = _fit(body, own - loop.macs, within, loop.inner)
        return None if inner is None else _Match(natural, loop, trips, 1, inner)
    unrolled = own / loop.longest
    return _Match(natural, loop, trips, int(unrolled)) if unrolled >= 1 and unrolled.is_integer() else None


def _peelings(macs: float, loops: Sequence[Loop]) -> Iterator[tuple[int, ...]]:
    """How many iterations of each loop make up these multiply-adds; the fewest first."""
    if macs < 0:
        return
    ranges = [range(min(loop.trips - 1, int(macs / loop.longest)) + 1) for loop in loops]
    for peeled in sorted(itertools.product(*ranges), key=sum):
        if math.isclose(sum(n * loop.longest for n, loop in zip(peeled, loops, strict=True)), macs):
            yield peeled


def _largest(body: _Body, scope: frozenset[int], nest: Sequence[Loop], sized: bool) -> tuple[_Match, ...] | None:
    """The innermost loop with the most products, as the nest's only loop.

    ``sized``: whether the products are weighed in multiply-adds, else they are merely counted.
    """
    found = [loop for loop in body.loops if loop.blocks <= scope and not body.inside(loop.blocks)]
    if not found:
        return ()
    if len(nest) > 1 or nest[0].inner:
        return None
    natural, loop = max(found, key=lambda natural: body.macs(natural.blocks)), nest[0]
    macs = body.macs(natural.blocks)
    if sized:
        return (_Match(natural, loop, loop.trips, max(1, round(macs / loop.macs))),)
    peeled = round(body.macs(scope - natural.blocks) / macs)
    return (_Match(natural, loop, max(0, loop.trips - peeled), 1),)


def _counts(body: _Body, matches: Sequence[_Match], entries: float, depth: int) -> Iterator[LoopCount]:
    for match in matches:
        loop = match.loop
        always = match.own & match.natural.always
        sometimes = match.own - always
        share = loop.entries / loop.trips
        if len(match.inner) == len(loop.inner):  # then the products behind no loop are those of every iteration
            always |= {b for b in sometimes if body.macs([b])}
            sometimes -= always
        macs = loop.work / loop.trips - share * sum(inner.trips * inner.loop.longest for inner in match.inner)
        yield LoopCount(
            depth,
            (body.issued(always) + share * body.issued(sometimes)) / match.unrolled,
            entries * match.trips,
            macs or loop.work / loop.trips,
        )
        yield from _counts(body, match.inner, entries * match.trips * share, depth + 1)


def _blocks(matches: Sequence[_Match]) -> frozenset[int]:
    return frozenset().union(*(match.natural.blocks for match in matches))


def _waits(block: Block, b: int) -> bool:
    """Whether a block polls a barrier again and again, or only leads back from there."""
    polls = b in block.successors and any("TRYWAIT" in i.opcode for i in block.instructions)
    return polls or [i.name for i in block.instructions] == ["BRA"]

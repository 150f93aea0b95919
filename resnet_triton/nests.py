"""The loops of each kernel that hold matrix products, as its source says them: what its machine code is held against.

Pure Python: no torch, no triton.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .kernels.config import ConvConfig, reduction_steps
from .kernels.geometry import ChainShape, ConvShape, cdiv


@dataclass(frozen=True)
class Loop:
    """A loop of one program.

    Args:
        trips: iterations each time it is entered.
        macs: multiply-adds of one iteration, besides those of ``inner``.
        inner: the loops in it that hold products, in their order.
        taken: of the ``trips``, those that pass the code behind a condition, to which ``inner`` belongs; None: all.
    """

    trips: int
    macs: int
    inner: tuple[Loop, ...] = ()
    taken: int | None = None

    @property
    def entries(self) -> int:
        """How often ``inner`` is entered each time this loop is."""
        return self.trips if self.taken is None else self.taken

    @property
    def longest(self) -> int:
        """Multiply-adds of an iteration that passes everything, with all of ``inner``."""
        return self.macs + sum(loop.work for loop in self.inner)

    @property
    def work(self) -> int:
        """Multiply-adds each time it is entered."""
        return self.trips * self.macs + self.entries * sum(loop.work for loop in self.inner)


def nest_of(shape: ConvShape | ChainShape, config: ConvConfig) -> tuple[Loop, ...]:
    """The loops of one program for one output tile (one strip of a rolling kernel), in their order."""
    if isinstance(shape, ChainShape):
        return _chain(shape, config)
    bm, bn, bk = config.bm, config.bn, config.bk
    if config.kernel == "conv_rolling":
        rows = config.box[1]
        return (Loop(rows + 2, 9 * bm * bn * shape.c, taken=rows),)
    if config.kernel == "stem_pool":  # an iteration is four rows of windows, 64 deep, each a part of four output rows
        return (Loop(cdiv(config.box[1], 4) + 1, 16 * bm * bn * 64),)
    return (Loop(cdiv(reduction_steps(config, shape), config.split), bm * bn * bk),)


def _chain(shape: ChainShape, config: ConvConfig) -> tuple[Loop, ...]:
    bm, bn, bk = config.bm, config.bn, config.bk
    expand, project, reduce = shape.expand, shape.project, shape.reduce
    depth = expand.c + (project.c if project else 0) + (reduce.k if reduce else 0)
    pointwise = Loop(cdiv(expand.k, bn), bm * bn * depth)
    conv = shape.conv
    if conv is None:
        return (pointwise,)
    if config.kernel == "chain_rolling":
        rows = config.box[1]
        return (Loop(rows + 2, 9 * bm * conv.k * conv.c, (pointwise,), taken=rows),)
    taps = conv.r * conv.s * cdiv(conv.c, bk)
    if shape.first is None:
        return Loop(taps, bm * conv.k * bk), pointwise
    return Loop(taps + 1, bm * (conv.k * bk + shape.first.weights)), pointwise  # anew for each tap, which it precedes


class Nest(NamedTuple):
    """A program of a training step.

    Args:
        loops: for one tile, in their order.
        walks: whether a program walks over several tiles.
        tiles: of the launch.
    """

    loops: tuple[Loop, ...]
    walks: bool
    tiles: int


def longest_of(loops: Sequence[Loop]) -> Loop:
    """Of a nest, the loop without inner ones that has most of the work, with all its iterations."""
    every = [(loop, 1) for loop in loops]
    for loop, times in every:  # grows
        every += [(inner, times * loop.entries) for inner in loop.inner]
    loop, times = max(((loop, n) for loop, n in every if not loop.inner), key=lambda one: one[0].work * one[1])
    return Loop(loop.trips * times, loop.macs)


def nest_of_training(kernel: str, a: Mapping[str, Any]) -> Nest:
    """The loops of a training kernel, from the arguments that it is launched with.

    Args:
        kernel: its name.
        a: the arguments of the launch by name, None where an optional one is absent.

    Where iterations differ, from phase to phase of a ``dgrad`` with stride 2 or in the shares of a ``wgrad``, the trips
    are the mean, rounded up. The tile of a kernel that shares a reduction among programs is what a program adds to it.
    """
    return _TRAINING[kernel](a)


def _boxes(a: Mapping[str, Any], height: str = "P", width: str = "Q") -> int:
    return cdiv(a["N"], a["TN"]) * cdiv(a[height], a["TH"]) * cdiv(a[width], a["TW"])


def _bm(a: Mapping[str, Any]) -> int:
    return a["TN"] * a["TH"] * a["TW"]


def _conv_stats(a: Mapping[str, Any]) -> Nest:
    taps, chunks, macs = a["R"] * a["S"], cdiv(a["C"], a["BK"]), _bm(a) * a["BN"] * a["BK"]
    tiles = _boxes(a) * cdiv(a["K"], a["BN"])
    if a["scale"] is None:
        return Nest((Loop(taps * chunks, macs),), True, tiles)
    if taps == 1:
        return Nest((Loop(chunks, macs),), True, tiles)
    loop = Loop(taps, macs, taken=_taps_at_the_border(a))
    return Nest((loop if chunks == 1 else Loop(chunks, 0, (loop,)),), True, tiles)


def _taps_at_the_border(a: Mapping[str, Any]) -> int:
    """How many of a box's taps reach outside the image, in the mean over the boxes, rounded up."""

    def outside(size: str, out: str, side: str, taps: str) -> list[bool]:
        """Of each box and tap along one axis: whether it leaves the image."""
        first = range(0, a[out] * a["STRIDE"], a[side] * a["STRIDE"])
        shifts = range(-a["PAD"], a[taps] * a["DIL"] - a["PAD"], a["DIL"])
        last = (a[side] - 1) * a["STRIDE"]
        return [start + shift < 0 or start + shift + last >= a[size] for start in first for shift in shifts]

    rows, columns = outside("H", "P", "TH", "R"), outside("W", "Q", "TW", "S")
    inside = rows.count(False) * columns.count(False)
    return cdiv((len(rows) * len(columns) - inside) * a["R"] * a["S"], len(rows) * len(columns))


def _conv_stats_rolling(a: Mapping[str, Any]) -> Nest:
    return _rolling(a, a["P"], a["Q"], a["C"], a["K"])


def _dgrad_rolling(a: Mapping[str, Any]) -> Nest:
    return _rolling(a, a["H"], a["W"], a["K"], a["C"])


def _rolling(a: Mapping[str, Any], height: int, width: int, depth: int, channels: int) -> Nest:
    rows, bm = a["ROWS"], a["TN"] * a["TW"]
    strips = cdiv(cdiv(a["N"], a["TN"]) * cdiv(width, a["TW"]) * (height + 1), rows)
    loop = Loop(rows + 2, 9 * bm * a["BN"] * depth, taken=rows)
    return Nest((loop,), False, strips * cdiv(channels, a["BN"]))


def _dgrad(a: Mapping[str, Any]) -> Nest:
    steps, phases = a["R"] * a["S"] * cdiv(a["K"], a["BK"]), a["STRIDE"] ** 2
    tiles = a["PHASES"] * _boxes(a, "H", "W") * cdiv(a["C"], a["BN"])
    return Nest((Loop(cdiv(steps, phases), _bm(a) * a["BN"] * a["BK"]),), a["parts"] is not None, tiles)


def _wgrad(a: Mapping[str, Any]) -> Nest:
    shares = cdiv(a["K"], a["BN"]) * cdiv(a["C"], a["BC"]) * (a["R"] // a["RT"]) * (a["S"] // a["ST"]) * a["SPLIT"]
    macs = _bm(a) * a["BN"] * a["BC"] * a["RT"] * a["ST"]
    return Nest((Loop(cdiv(a["BOXES"], a["SPLIT"]), macs),), False, shares)


def _wgrad_rolling(a: Mapping[str, Any]) -> Nest:
    shares = cdiv(a["K"], a["BN"]) * cdiv(a["C"], a["BC"]) * a["SPLIT"]
    return Nest((Loop(cdiv(a["STEPS"], a["SPLIT"]) + 2, 9 * a["TN"] * a["TW"] * a["BN"] * a["BC"]),), False, shares)


def _expand(a: Mapping[str, Any]) -> Nest:
    bm, bn, projected = _bm(a), a["BN"], a["wd"] is not None
    macs, inner = bm * bn * a["CN"] if a["next_w"] is not None else 0, []
    for channels, chunk in ((a["C"], a["BK"]), (a["CX"], a["BX"]))[: 1 + projected]:
        if channels <= chunk:
            macs += bm * bn * chunk
        else:
            inner.append(Loop(cdiv(channels, chunk), bm * bn * chunk))
    chained = a["next_w"] is not None
    tiles = _boxes(a) * (1 if chained else a["GROUPS"])
    return Nest((Loop(a["COLUMNS"], macs, tuple(inner)),), chained, tiles)


def _gram_dgrad(a: Mapping[str, Any]) -> Nest:
    tile = _bm(a) * a["BN"]
    square = Loop(cdiv(a["C"], a["BC"]), tile * a["BC"])
    long = Loop(cdiv(a["K"], a["BK"]), tile * a["BK"])
    return Nest((square, long), a["WALKS"], _boxes(a) * cdiv(a["C"], a["BN"]))


def _gram_products(a: Mapping[str, Any]) -> Nest:
    return _times_centred(a, 2 + a["GUARD"])


def _gram_dw(a: Mapping[str, Any]) -> Nest:
    return _times_centred(a, 2)


def _times_centred(a: Mapping[str, Any], products: int) -> Nest:
    loop = Loop(cdiv(a["C"], a["BK"]), products * a["BM"] * a["BN"] * a["BK"])
    return Nest((loop,), False, cdiv(a["K"], a["BM"]) * cdiv(a["C"], a["BN"]))


def _gram_matrix(a: Mapping[str, Any]) -> Nest:
    loop = Loop(cdiv(a["K"], a["BK"]), a["TERMS"] * a["BM"] * a["BN"] * a["BK"])
    return Nest((loop,), False, cdiv(a["C"], a["BM"]) * cdiv(a["C"], a["BN"]))


#: Kernels of small matrices, whose products are several of TF32 or bf16 each where the filters have 16 bits.
SMALL_PRODUCTS = ("gram_products", "gram_dw", "gram_matrix")
_TRAINING = {
    "gram_products": _gram_products,
    "gram_dw": _gram_dw,
    "gram_matrix": _gram_matrix,
    "conv_stats": _conv_stats,
    "conv_stats_rolling": _conv_stats_rolling,
    "dgrad": _dgrad,
    "dgrad_rolling": _dgrad_rolling,
    "wgrad": _wgrad,
    "wgrad_rolling": _wgrad_rolling,
    "expand": _expand,
    "gram_dgrad": _gram_dgrad,
}

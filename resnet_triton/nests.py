"""The loops of each kernel that hold matrix products, as its source says them: what its machine code is held against.

Pure Python: no torch, no triton.
"""

from __future__ import annotations

from dataclasses import dataclass

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

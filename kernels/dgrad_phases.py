"""How the pixels of an input gradient are divided among launches, phases and programs. Pure Python; see ``dgrad``."""

from __future__ import annotations

from dataclasses import dataclass

from .config import (
    FEW_TILES,
    SHORTEST_STRIP,
    ConvConfig,
    least_waste_box,
    next_power_of_two,
    rolling_config,
    rows_of_tiles,
)
from .geometry import ConvShape, cdiv

#: Programs that leave sums: two for each multiprocessor of an H200. The same on every GPU, and so are the bits.
SUMMING_PROGRAMS = 264


@dataclass(frozen=True)
class Walk:
    """The pixels of one launch.

    Args:
        phases: 1, or 4 where the launch covers all of them.
        phase: ``2 * row parity + column parity`` of the only phase, or of the one that comes first.
        n, h, w: images, rows and columns of a phase.
        box: pixels of a tile.
    """

    phases: int
    phase: int
    n: int
    h: int
    w: int
    box: tuple[int, int, int]

    @property
    def tiles(self) -> int:
        """Boxes of pixels in all."""
        tn, th, tw = self.box
        return self.phases * cdiv(self.n, tn) * cdiv(self.h, th) * cdiv(self.w, tw)

    def exact(self, prologue: bool, flat: bool) -> bool:
        """Whether what boxes compute beyond the tensor is zero.

        There is no gradient beyond the last image, unless a prologue makes something of nothing; beyond a row or a
        column of an image, some taps still meet pixels inside.
        """
        tn, th, tw = self.box
        inside = flat or self.h % th == self.w % tw == 0
        return inside and not (prologue and (self.n % tn or self.w % tw))

    def summing(self, column_blocks: int) -> int:
        """Programs of a column block where sums are wanted; each walks over the tiles and leaves one row."""
        return min(self.tiles, max(1, SUMMING_PROGRAMS // column_blocks))


def phased(shape: ConvShape, residual_stride: int) -> bool:
    """Whether pixels are told apart by parity."""
    return shape.stride == 2 or residual_stride == 2


def walks(shape: ConvShape, config: ConvConfig, residual_stride: int = 1) -> list[Walk]:
    """The launches of one gradient: one, or one a phase where no dense view has all phases side by side.

    That is with an odd number of rows or columns, or where a block of channels would reach into the next half.
    """
    if not phased(shape, residual_stride):
        if shape.pointwise:
            return [Walk(1, 0, 1, 1, shape.n * shape.h * shape.w, (1, 1, config.bm))]
        return [Walk(1, 0, shape.n, shape.h, shape.w, config.box)]
    half = cdiv(shape.h, 2), cdiv(shape.w, 2)
    box = pixel_box(shape.n, *half, config.bm) if shape.pointwise else config.box
    blocks = shape.c % config.bn == 0 and (shape.stride == 2 or shape.k % config.bk == 0)
    if shape.h % 2 == 0 and shape.w % 2 == 0 and blocks:
        most_taps = 3 if shape.stride == 2 and shape.padding % 2 and max(shape.r, shape.s) > 1 else 0
        return [Walk(4, most_taps, shape.n, *half, box)]
    parities = ((a, b) for a in (0, 1) for b in (0, 1))
    separate = [Walk(1, 2 * a + b, shape.n, (shape.h + 1 - a) // 2, (shape.w + 1 - b) // 2, box) for a, b in parities]
    return [walk for walk in separate if walk.tiles]


def dgrad_parts(shape: ConvShape, config: ConvConfig, residual_stride: int = 1) -> int:
    """Rows of the sums that ``launch_dgrad`` leaves."""
    columns = cdiv(shape.c, config.bn)
    if config.kernel == "dgrad_rolling":
        rows = rows_of_tiles(config, shape)
        return cdiv(rows, cdiv(rows, max(1, SUMMING_PROGRAMS // columns)))
    return sum(walk.summing(columns) for walk in walks(shape, config, residual_stride))


def rolls(shape: ConvShape) -> bool:
    """Whether ``dgrad_rolling`` computes a convolution."""
    return (shape.r, shape.s, shape.stride, shape.padding, shape.dilation) == (3, 3, 1, 1, 1)


def pixel_box(n: int, h: int, w: int, bm: int) -> tuple[int, int, int]:
    """The box of ``bm`` pixels that covers ``n`` images of ``h x w`` pixels best."""
    return least_waste_box(ConvShape(n, h, w, 8, 8), bm)


def dgrad_configs(shape: ConvShape, itemsize: int, prologue: bool, precision: str = "tf32") -> list[ConvConfig]:
    """Configurations from the shape of the forward convolution alone, none of which spills on sm_90.

    Args:
        shape: of the forward convolution, stride 1 or 2.
        itemsize: bytes of an element.
        prologue: whether BN's backward is applied as the gradient is loaded.
        precision: of fp32; without tensor cores (``"ieee"``) only small tiles do not spill.

    Sums, a residual and boxes that overhang rows or columns, all at once, may cost a few spills in the epilogue; no
    block of a ResNet has a residual where it needs sums.

    Those that leave most of a large GPU idle are left out. Four warps for a 128x128 or 256x64 tile,
    as in the forward. A prologue costs the same for any number of columns, so it prefers 256 of them, and few rows,
    because two or three programs on a multiprocessor have to hide one another's waits. With sums (what it is that costs
    most registers), sm_90, bf16, of the layers of ResNet-50:

    ======== =================== ========= ============ ========
    prologue rows, columns, warps registers shared bytes pressure
    ======== =================== ========= ============ ========
    no       256, 64, 4          255       81,936       0.20
    no       128, 128, 4         255       98,328       0.23
    no       256, 128, 8         255       147,480      0.22
    no       128, 256, 8         255       147,480      0.23
    yes      64, 256, 4          255       90,904       0.71
    yes      64, 128, 4          168       58,136       1.41
    yes      128, 256, 8         255       115,480      0.70
    yes      128, 128, 8         164       82,712       1.38
    ======== =================== ========= ============ ========
    """
    deep = 128 // itemsize
    bk = min(deep, max(16, next_power_of_two(shape.k)))
    columns = min(128, max(16, next_power_of_two(shape.c)))
    if shape.stride == 2 and shape.c % 32 == 0:
        columns = min(columns, shape.c & -shape.c)  # so that one launch has all phases
    n, h, w = shape.n, cdiv(shape.h, shape.stride), cdiv(shape.w, shape.stride)
    tiles: list[tuple[int, int, int, int]]  # rows, columns, warps, stages
    if itemsize == 4:
        tiles = [(128, min(32 if prologue else 64, columns), 8, 2)]
        if precision == "tf32":
            tiles = [(128, columns, 8 if columns == 128 else 4, 2)]
    elif prologue:
        tiles = [(64, columns, 4, 2), (128, columns, 8 if columns == 128 else 4, 2)]
        if shape.c % 256 == 0 and n * h * w % 128 == 0:  # overhanging rows to leave out of sums would make them spill
            tiles = [(64, 256, 4, 2), *tiles, (128, 256, 8, 2)]
    elif columns == 128:
        tiles = [(128, 128, 4, 3), (256, 128, 8, 3), (64, 128, 4, 3)]
        if shape.c % 256 == 0:
            tiles.insert(2, (128, 256, 8, 3))
    else:
        tiles = [(256, columns, 4, 2), (128, columns, 4, 3)]
    configs = []
    if itemsize == 2 and rolls(shape) and shape.c == shape.k == 64:
        tn, strip, tw = rolling_config(shape).box
        if strip >= SHORTEST_STRIP:
            configs = [ConvConfig("dgrad_rolling", (tn, 1, tw), 64, 64, 4, 2)]
    blocks = shape.stride**2 * n * h * w
    busy = [t for t in tiles if cdiv(blocks, t[0]) * cdiv(shape.c, t[1]) >= FEW_TILES]
    return configs + [
        ConvConfig("dgrad", (1, 1, bm) if shape.pointwise else pixel_box(n, h, w, bm), bn, bk, warps, stages)
        for bm, bn, warps, stages in busy or [(64, min(64, columns), 4, 3)]
    ]

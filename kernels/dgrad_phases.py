"""How the pixels of an input gradient are divided among launches, phases and programs. Pure Python; see ``dgrad``."""

from __future__ import annotations

from dataclasses import dataclass

from .config import FEW_TILES, ConvConfig, least_waste_box, next_power_of_two
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

    @property
    def exact(self) -> bool:
        """Whether no box overhangs."""
        tn, th, tw = self.box
        return self.n % tn == self.h % th == self.w % tw == 0

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
    return sum(walk.summing(columns) for walk in walks(shape, config, residual_stride))


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

    Four warps for a 128x128 or 256x64 tile, as in the forward; with a prologue, which every warp computes for its own
    rows, eight. A prologue costs the same for any number of columns: 256 of them halve it.
    """
    deep = 128 // itemsize
    bk = min(deep, max(16, next_power_of_two(shape.k)))
    columns = min(128, max(16, next_power_of_two(shape.c)))
    if shape.stride == 2 and shape.c % 32 == 0:
        columns = min(columns, shape.c & -shape.c)  # so that one launch has all phases
    if shape.pointwise:
        n, h, w = 1, 1, shape.n * shape.h * shape.w
    else:
        n, h, w = shape.n, cdiv(shape.h, shape.stride), cdiv(shape.w, shape.stride)
    blocks = shape.stride**2

    def tile(bm: int, bn: int, warps: int, stages: int) -> ConvConfig:
        box = (1, 1, bm) if shape.pointwise else pixel_box(n, h, w, bm)
        return ConvConfig("dgrad", box, bn, bk, warps, stages)

    def tiles(bm: int, bn: int) -> int:
        return blocks * cdiv(n * h * w, bm) * cdiv(shape.c, bn)

    if itemsize == 4:
        if precision == "ieee":
            return [tile(128, min(64, columns), 8, 2)]
        return [tile(128, columns, 8 if columns == 128 else 4, 2)]
    bm = 128 if columns > 64 or prologue else 256
    while bm > 64 and tiles(bm, columns) < FEW_TILES:
        bm //= 2
    if prologue:
        configs = [tile(bm, columns, 8 if columns == 128 and bm == 128 else 4, 3)]
        if columns == 128 and shape.c % 256 == 0 and tiles(128, 256) >= FEW_TILES:
            configs += [tile(128, 256, 8, 3), tile(64, 256, 4, 2)]
        return configs
    configs = [tile(bm, columns, 4, 2 if bm == 256 else 3)]
    if bm * columns == 128 * 128 and tiles(256, 128) >= FEW_TILES:
        configs.append(tile(256, 128, 8, 3))
        if shape.c % 256 == 0:
            configs.append(tile(128, 256, 8, 3))
    if bm == 256:
        configs.append(tile(128, columns, 4, 3))
    return configs

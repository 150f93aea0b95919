"""The typed records of a launch: what is fused into a convolution, and how it is tiled. Pure Python.

Every tuning choice of a convolution lives in one :class:`ConvConfig`. :func:`heuristic` makes one from the
shape alone; the tuner and the tests make others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .geometry import ConvShape, cdiv

KERNELS = ("conv_tma", "conv1x1", "conv_pointer")


@dataclass(frozen=True)
class Epilogue:
    """What follows the convolution in the same kernel: ``relu((acc + bias) * scale + shift + residual)``.

    ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale`` when ``bn`` is set.
    """

    bn: bool = False
    bias: bool = False
    residual: bool = False
    relu: bool = False

    def __str__(self) -> str:
        names = [
            n for n, on in (("bias", self.bias), ("bn", self.bn), ("add", self.residual), ("relu", self.relu)) if on
        ]
        return "+".join(names) or "-"


@dataclass(frozen=True)
class ConvConfig:
    """Tiling of one convolution kernel.

    Args:
        kernel: one of :data:`KERNELS`.
        box: output pixels of a tile as ``(images, rows, columns)``; ``BM`` is their product. ``conv1x1`` and
            ``conv_pointer`` see the pixels as one row and use ``(1, 1, BM)``.
        bn: output channels of a tile.
        bk: channels of one step of the reduction.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
    """

    kernel: str
    box: tuple[int, int, int]
    bn: int
    bk: int
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r} is unknown; allowed: {', '.join(KERNELS)}")
        box = tuple(self.box)
        if len(box) != 3 or not all(isinstance(side, int) and side > 0 for side in box):
            raise ValueError(f"box={self.box!r} must be (images, rows, columns), positive ints")
        object.__setattr__(self, "box", box)
        for name, value in (("box", self.bm), ("bn", self.bn), ("bk", self.bk), ("warps", self.warps)):
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two (box: its product), got {value!r}")
        if min(self.bn, self.bk, self.bm) < 16:
            raise ValueError(f"box, bn and bk must be at least 16 for the tensor cores, got {self}")
        if not isinstance(self.stages, int) or self.stages < 1:
            raise ValueError(f"stages must be a positive int, got {self.stages!r}")

    @property
    def bm(self) -> int:
        """Rows of the tile."""
        return self.box[0] * self.box[1] * self.box[2]

    def to_dict(self) -> dict:
        """A JSON-ready dict; :meth:`from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> ConvConfig:
        """Inverse of :meth:`to_dict`; raises ValueError naming the bad field."""
        fields = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) - fields or not {"kernel", "box", "bn", "bk"} <= set(data):
            raise ValueError(f"a configuration needs kernel, box, bn, bk (optional: warps, stages), got {data!r}")
        return cls(**{**data, "box": tuple(data["box"])})

    def __str__(self) -> str:
        box = "x".join(map(str, self.box)) if self.kernel == "conv_tma" else str(self.bm)
        return f"{box} n{self.bn} k{self.bk} w{self.warps} s{self.stages}"


def tma_describable(shape: ConvShape, itemsize: int) -> bool:
    """Whether tensor maps can describe this convolution: 16-byte rows, stride 1, or stride 2 on an even image."""
    aligned = shape.c * itemsize % 16 == 0 and shape.k * itemsize % 16 == 0
    if shape.stride == 1:
        return aligned
    even = shape.h % 2 == 0 and shape.w % 2 == 0
    # the box of one half must not reach into the other half's channels
    return aligned and shape.stride == 2 and even and shape.c % 16 == 0


def runs_on(config: ConvConfig, shape: ConvShape, itemsize: int) -> bool:
    """Whether a configuration's kernel can compute this convolution at all."""
    if config.kernel == "conv_pointer":
        return True
    # no side of a TMA box may exceed 256
    if not tma_describable(shape, itemsize) or max(*config.box, config.bn, config.bk) > 256:
        return False
    if config.kernel == "conv1x1":
        return shape.pointwise
    return shape.stride == 1 or shape.c % config.bk == 0


def heuristic(shape: ConvShape, itemsize: int, tma: bool) -> ConvConfig:
    """A configuration from the shape alone: no spills on sm_90, lowest issue pressure among those tried there.

    Four warps rather than eight: each warp then owns twice the rows, so the main loop's scalar instructions,
    which every warp issues, are shared by twice the tensor-core work (pressure 0.64 -> 0.35 for 128x128).
    In fp32 eight, because without tensor cores (``precision="ieee"``) four spill, and ``conv_tma`` for pointwise
    convolutions too, because ``conv1x1`` then spills with any tile.
    """
    deep = 128 // itemsize  # channels in the widest row that one swizzled shared-memory line holds
    bn = min(128, max(16, next_power_of_two(shape.k)))
    if not tma or not tma_describable(shape, itemsize):
        return ConvConfig("conv_pointer", (1, 1, 128), min(bn, 64), min(32, max(16, next_power_of_two(shape.c))))
    bm = 128 if bn > 64 else 256
    while bm > 64 and cdiv(shape.m, bm) * cdiv(shape.k, bn) < 132:
        bm //= 2
    bk = min(deep, max(16, next_power_of_two(shape.c)))
    if shape.pointwise and itemsize < 4:
        return ConvConfig("conv1x1", (1, 1, min(bm, 128)), bn, bk)
    if shape.stride == 2:
        bk = min(deep, shape.c & -shape.c)
    warps = 8 if itemsize == 4 and bm * bn > 64 * 128 else 4
    return ConvConfig("conv_tma", least_waste_box(shape, bm), bn, bk, warps)


def least_waste_box(shape: ConvShape, bm: int) -> tuple[int, int, int]:
    """The box of ``bm`` pixels that covers the output with the fewest boxes; among those the squarest in the image."""
    boxes = []
    for log_h in range(bm.bit_length()):
        for log_w in range(bm.bit_length() - log_h):
            th, tw = 1 << log_h, 1 << log_w
            boxes.append((bm // (th * tw), th, tw))

    def cost(box: tuple[int, int, int]) -> tuple[int, int, int]:
        tn, th, tw = box
        tiles = cdiv(shape.n, tn) * cdiv(shape.p, th) * cdiv(shape.q, tw)
        return tiles, -min(th, tw), -max(th, tw)

    return min(boxes, key=cost)


def next_power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()

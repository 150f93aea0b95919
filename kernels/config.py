"""The typed records of a launch: what is fused into a convolution, and how it is tiled. Pure Python.

Every tuning choice of a convolution lives in one :class:`ConvConfig`. :func:`heuristic` makes one from the
shape alone; the tuner and the tests make others.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .geometry import ConvShape, cdiv

#: Fewer tiles than this leave more than half of a large GPU's multiprocessors idle.
FEW_TILES = 66
#: A strip of rows loads and multiplies two rows more than it stores.
SHORTEST_STRIP = 4
#: Kernels of one convolution, and those of several.
KERNELS = ("conv_tma", "conv1x1", "conv_pointer", "conv_rolling")
CHAIN_KERNELS = ("conv_chain", "chain_rolling")
#: Kernels at the ends of a network.
END_KERNELS = ("conv1x1_pool", "stem_pool")
#: Kernels of a training step.
TRAIN_KERNELS = (
    "conv_stats", "conv_stats_rolling", "dgrad", "dgrad_rolling", "wgrad", "wgrad_rolling", "expand", "gram_dgrad",
)  # fmt: skip
#: Kernels whose programs share the pixels of a weight gradient.
WGRAD_KERNELS = ("wgrad", "wgrad_rolling")
ALL_KERNELS = KERNELS + CHAIN_KERNELS + END_KERNELS
#: Kernels that see the output pixels as one row.
FLAT_KERNELS = ("conv1x1", "conv_pointer", "conv1x1_pool", "gram_dgrad")
#: Kernels whose program walks down a strip of rows: the box is ``(images, rows of the strip, columns)``.
ROLLING_KERNELS = ("conv_rolling", "chain_rolling", "stem_pool")
#: Kernels that can share a tile's reduction among programs, and those that can be launched dependently.
SPLIT_KERNELS = ("conv_tma", "conv1x1")
PDL_KERNELS = (*SPLIT_KERNELS, "conv_pointer")
#: Kernels that can end in PReLU.
PRELU_KERNELS = ("conv_tma", "conv1x1", "conv_pointer")
#: Kernels whose programs may walk over several tiles.
PERSISTENT_KERNELS = ("conv1x1", "conv_stats", "conv_stats_rolling")
MOST_SPLITS = 16
#: Programs that can share the pixels of one block of a weight gradient.
MOST_WGRAD_SPLITS = 1024


@dataclass(frozen=True)
class Epilogue:
    """What follows the convolution in the same kernel: ``relu((acc + bias) * scale + shift + residual)``.

    ``scale = gamma / sqrt(var + eps)`` and ``shift = beta - mean * scale`` when ``bn`` is set. With ``residual_bn``
    (``conv1x1`` only) the residual has a BN of its own, applied as it is added. With ``prelu`` (:data:`PRELU_KERNELS`)
    PReLU comes last in place of the ReLU.
    """

    bn: bool = False
    bias: bool = False
    residual: bool = False
    relu: bool = False
    residual_bn: bool = False
    prelu: bool = False

    def __str__(self) -> str:
        added = "add(bn)" if self.residual_bn else "add"
        parts = {"bias": self.bias, "bn": self.bn, added: self.residual, "relu": self.relu, "prelu": self.prelu}
        return "+".join(name for name, on in parts.items() if on) or "-"

    def runs_in(self, config: ConvConfig) -> bool:
        """Whether the kernel of a configuration has this epilogue."""
        return not self.prelu or config.kernel in PRELU_KERNELS


@dataclass(frozen=True)
class ConvConfig:
    """Tiling of one convolution kernel, or of one chain of convolutions.

    Args:
        kernel: one of :data:`ALL_KERNELS` or :data:`TRAIN_KERNELS`.
        box: output pixels of a tile as ``(images, rows, columns)``; ``BM`` is their product. :data:`FLAT_KERNELS` see
            the pixels as one row and use ``(1, 1, BM)``. A program of a rolling kernel walks down
            ``rows``, any number of them, one row of tiles at a time: there ``BM`` is ``images * columns``.
        bn: output channels of a tile; of a chain, the expanded channels that are in work at a time.
        bk: channels of one step of the reduction.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        persistent: programs per multiprocessor that walk over the tiles (:data:`PERSISTENT_KERNELS`); 0 is one program
            a tile.
        split: programs that share the reduction of a tile; a second kernel adds their sums (:data:`SPLIT_KERNELS` and
            :data:`WGRAD_KERNELS`).
        pdl: launched before the kernel in front has finished, from sm_90 on (:data:`PDL_KERNELS`).
    """

    kernel: str
    box: tuple[int, int, int]
    bn: int
    bk: int
    warps: int = 4
    stages: int = 3
    persistent: int = 0
    split: int = 1
    pdl: bool = False

    def __post_init__(self) -> None:
        if self.kernel not in ALL_KERNELS + TRAIN_KERNELS:
            raise ValueError(f"kernel={self.kernel!r} is unknown; allowed: {', '.join(ALL_KERNELS + TRAIN_KERNELS)}")
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
        if not isinstance(self.persistent, int) or self.persistent < 0:
            raise ValueError(f"persistent must be programs per multiprocessor or 0, got {self.persistent!r}")
        if self.persistent and self.kernel not in PERSISTENT_KERNELS:
            raise ValueError(
                f"persistent={self.persistent} is for {', '.join(PERSISTENT_KERNELS)}, got kernel={self.kernel!r}"
            )
        most = MOST_WGRAD_SPLITS if self.kernel in WGRAD_KERNELS else MOST_SPLITS
        if type(self.split) is not int or not 1 <= self.split <= most:
            raise ValueError(f"split must be an int from 1 to {most}, got {self.split!r}")
        if self.split > 1 and (self.kernel not in SPLIT_KERNELS + WGRAD_KERNELS or self.persistent):
            raise ValueError(
                f"split={self.split} is for {', '.join(SPLIT_KERNELS)} that are not persistent and "
                f"{', '.join(WGRAD_KERNELS)}, "
                f"got kernel={self.kernel!r}, persistent={self.persistent}"
            )
        if not isinstance(self.pdl, bool):
            raise ValueError(f"pdl must be True or False, got {self.pdl!r}")
        if self.pdl and self.kernel not in PDL_KERNELS:
            raise ValueError(f"pdl is for {', '.join(PDL_KERNELS)}, got kernel={self.kernel!r}")

    @property
    def bm(self) -> int:
        """Rows of the tile."""
        images, rows, columns = self.box
        return images * columns if self.kernel in ROLLING_KERNELS else images * rows * columns

    def to_dict(self) -> dict:
        """A JSON-ready dict; :meth:`from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> ConvConfig:
        """Inverse of :meth:`to_dict`; raises ValueError naming the bad field."""
        fields = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) - fields or not {"kernel", "box", "bn", "bk"} <= set(data):
            raise ValueError(
                f"a configuration needs kernel, box, bn, bk "
                f"(optional: warps, stages, persistent, split, pdl), got {data!r}"
            )
        return cls(**{**data, "box": tuple(data["box"])})

    def __str__(self) -> str:
        box = str(self.bm) if self.kernel in FLAT_KERNELS else "x".join(map(str, self.box))
        persistent = f" p{self.persistent}" if self.persistent else ""
        split = f" /{self.split}" if self.split > 1 else ""
        return f"{box} n{self.bn} k{self.bk} w{self.warps} s{self.stages}{persistent}{split}{' pdl' * self.pdl}"


def reduction_steps(config: ConvConfig, shape: ConvShape) -> int:
    """Steps of the reduction of one output tile, those of all its programs together."""
    return shape.r * shape.s * cdiv(shape.c, config.bk)


def count_tiles(config: ConvConfig, shape: ConvShape) -> int:
    """Output tiles of a convolution (strips of a rolling kernel); ``config.split`` programs compute each."""
    tn, th, tw = config.box
    if config.kernel == "conv_tma":
        rows = cdiv(shape.n, tn) * cdiv(shape.p, th) * cdiv(shape.q, tw)
    elif config.kernel == "conv_rolling":
        rows = count_strips(config, shape)
    elif config.kernel == "conv1x1_pool":  # as many whole images as fit
        rows = cdiv(shape.n, max(1, config.bm // (shape.p * shape.q)))
    else:
        rows = cdiv(shape.m, config.bm)
    return rows * cdiv(shape.k, config.bn)


def count_strips(config: ConvConfig, shape: ConvShape) -> int:
    """Strips of a rolling kernel's output pixels."""
    return cdiv(rows_of_tiles(config, shape), config.box[1])


def rows_of_tiles(config: ConvConfig, shape: ConvShape) -> int:
    """Rows of all columns of tiles of a rolling kernel, each with one more that separates it from the next."""
    tn, _, tw = config.box
    return cdiv(shape.n, tn) * cdiv(shape.q, tw) * (shape.p + 1)


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
    if config.kernel not in KERNELS + END_KERNELS:
        return False
    if config.split > reduction_steps(config, shape):
        return False
    tn, rows, tw = config.box
    sides = (tn, 1 if config.kernel in ROLLING_KERNELS else rows, tw, config.bn, config.bk)
    if not tma_describable(shape, itemsize) or max(sides) > 256:  # the longest side of a TMA box
        return False
    if config.kernel == "conv1x1":
        return shape.pointwise
    if config.kernel == "conv1x1_pool":
        return shape.pointwise and shape.p * shape.q <= config.bm
    if config.kernel == "conv_rolling":
        same = (shape.r, shape.s, shape.stride, shape.padding, shape.dilation) == (3, 3, 1, 1, 1)
        return same and config.bk == shape.c <= 128
    return shape.stride == 1 or shape.c % config.bk == 0


def heuristic(shape: ConvShape, itemsize: int, tma: bool) -> ConvConfig:
    """The first of :func:`alternatives`."""
    return alternatives(shape, itemsize, tma)[0]


def alternatives(shape: ConvShape, itemsize: int, tma: bool, multiprocessors: int = 0) -> list[ConvConfig]:
    """Configurations from the shape alone, none of which spills on sm_90; which is best depends on the GPU.

    ``multiprocessors`` sets the length of a rolling kernel's strips (0: those of an H200).

    Four warps for a 128x128 or 256x64 tile rather than eight: each warp then owns twice the rows, so the main loop's
    scalar instructions, which every warp issues, are shared by twice the tensor-core work. A tile of 256x128 reads a
    quarter less through L2. Exact fp32 (no TF32) has no tensor core to feed: plan it with ``tma=False``, because the
    TMA kernels spill there and the pointer kernel does not.
    """
    bn = min(128, max(16, next_power_of_two(shape.k)))
    deep = 128 // itemsize  # channels in the widest row that one swizzled shared-memory line holds
    if not tma or not tma_describable(shape, itemsize):
        # whole chunks of channels are copied in 16-byte pieces, asynchronously; others value by value
        bk = deep if shape.c % deep == 0 else min(32, max(16, next_power_of_two(shape.c)))
        return [ConvConfig("conv_pointer", (1, 1, 128), bn, bk, 8 if bn == 128 or itemsize == 4 else 4)]
    bk = min(deep, max(16, next_power_of_two(shape.c)))
    if shape.stride == 2:
        bk = min(deep, shape.c & -shape.c)
    bm = 128 if bn > 64 else 256
    while bm > 64 and cdiv(shape.m, bm) * cdiv(shape.k, bn) < FEW_TILES:
        bm //= 2
    wide = itemsize < 4 and bm * bn == 128 * 128 and cdiv(shape.m, 256) * cdiv(shape.k, bn) >= FEW_TILES
    if shape.pointwise:
        # a reduction to fewer channels never has a residual in a ResNet, and its long loop hides the epilogue
        persistent = (2 if bn <= 64 else 1) if shape.c > shape.k else 0
        configs = [ConvConfig("conv1x1", (1, 1, min(bm, 128)), bn, bk, persistent=persistent)]
        if wide:  # persistent, a third stage and a residual together would not fit
            stages = 2 if persistent else 3
            configs.append(ConvConfig("conv1x1", (1, 1, 256), bn, bk, 8, stages, persistent=min(1, persistent)))
        return configs
    stages = 2 if bm == 256 else 3  # leaves room for a second program on the multiprocessor
    configs = [ConvConfig("conv_tma", least_waste_box(shape, bm), bn, bk, 4, stages)]
    if wide:
        configs.append(ConvConfig("conv_tma", least_waste_box(shape, 256), bn, bk, 8))
    rolling = rolling_config(shape, multiprocessors)
    if itemsize == 2 and runs_on(rolling, shape, itemsize) and rolling.box[1] >= SHORTEST_STRIP:
        configs.append(rolling)
    return configs


def rolling_config(shape: ConvShape, multiprocessors: int = 0) -> ConvConfig:
    """``conv_rolling`` in one wave of programs, whether or not it can compute the shape (:func:`runs_on` says so).

    Tiles of 64 pixels by 64 filters in four warps. The machine code for sm_90, 16-bit, BN and ReLU, of one row of tiles
    (nothing spills, and a multiprocessor holds two programs, one where C = 128):

    ======== ========= ========= ============ ============ ========
    C        residual  registers shared bytes instructions pressure
    ======== ========= ========= ============ ============ ========
    64       no        177       106,536      346          0.30
    64       yes       227       114,728      547          0.47
    128      no        255       204,840      474          0.21
    128      yes       254       213,032      666          0.29
    ======== ========= ========= ============ ============ ========

    Eight warps on 64 pixels would compute most products twice: products that feed one another are spread over the
    pixels only. Filters times pixels needs the boxes twice in shared memory and spills from 128 pixels on.
    """
    bn = min(64, max(16, next_power_of_two(shape.k)))
    boxes = [(64 >> log, 1 << log) for log in range(7)]
    tn, tw = min(boxes, key=lambda box: (cdiv(shape.n, box[0]) * cdiv(shape.q, box[1]), -box[1]))
    resident = max(1, 128 // shape.c)  # programs on a multiprocessor
    programs = max(1, (multiprocessors or 132) * resident // cdiv(shape.k, bn))
    rows = cdiv(cdiv(shape.n, tn) * cdiv(shape.q, tw) * (shape.p + 1), programs)
    return ConvConfig("conv_rolling", (tn, rows, tw), bn, max(16, next_power_of_two(shape.c)), 4, 2)


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

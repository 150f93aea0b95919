"""Predicted time of a convolution, from the five limits of a GPU. A prediction is never reported as a measurement.

A kernel takes as long as the slowest of: bytes through device memory, bytes from L2 into the multiprocessors (a TMA
box has no L1), shared-memory bytes read by the tensor cores, tensor-core work, and issued instructions. The tile
counts are rounded up to whole waves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .devices import Target
from .kernels.config import ROLLING_KERNELS, ConvConfig, Epilogue, count_strips, count_tiles, reduction_steps, runs_on
from .kernels.geometry import ChainShape, ConvShape, cdiv

LAUNCH_US = 2.0  # start and drain of one kernel
DEPENDENT_LAUNCH_SAVES_US = (
    1.0  # of it, where a kernel starts while the one before it drains; an estimate, not measured
)
LOAD_US = 0.7  # from asking for a box to having it, an estimate
LIBRARY_EFFICIENCY = 0.85  # share of the matrix rate that a library's convolution reaches, an estimate
# Instructions per warp, read off sm_90 machine code (the codegen tests print the table).
LOOP_INSTRUCTIONS = 115  # of one reduction step, besides the matrix instructions and, without TMA, the addresses
POINTER_INSTRUCTIONS = 260
EPILOGUE_INSTRUCTIONS = 300
EPILOGUE_PER_VALUE = 2.5
RESIDUAL_PER_VALUE = 2.5
PRELU_PER_VALUE = 2  # a product, a comparison and a choice in place of a maximum
POOLED_PER_VALUE = 2  # for each image that a tile of pixels holds
# Of one row of a rolling convolution: besides what follows, a matrix instruction, a value, a residual's value; and once
# a program.
ROLLING_INSTRUCTIONS = 90
ROLLING_PER_PRODUCT = 3.55
ROLLING_PER_VALUE = 4.0
ROLLING_RESIDUAL_PER_VALUE = 6.1
ROLLING_START = 800
# Of a chain: one product of the 3x3, and one step of the pointwise loop besides its values.
CHAIN_PRODUCT = 40
CHAIN_INSTRUCTIONS = 240
CHAIN_PER_VALUE = 4.3
FIRST_PER_VALUE = 6  # of a block's first convolution, computed on load: BN, ReLU, padding, through shared memory
CHAIN_ROLLING_INSTRUCTIONS = 165
CHAIN_ROLLING_PER_VALUE = 5
# Of the fused stem: once a program, and a value of each row of the convolution.
STEM_START = 700
STEM_PER_VALUE = 10.2
BARRIERS = 256  # bytes of shared memory for barriers


@dataclass(frozen=True)
class Prediction:
    """Microseconds of each limit; ``us`` is the largest, whose name is ``limit``, plus ``extra``.

    ``extra`` is what nothing overlaps: the launch, and the second kernel of a split reduction.
    """

    hbm: float
    l2: float = 0.0
    shared: float = 0.0
    tensor: float = 0.0
    issue: float = 0.0
    extra: float = LAUNCH_US

    @property
    def limits(self) -> dict[str, float]:
        """Microseconds by the name of each limit."""
        return {name: value for name, value in self.__dict__.items() if name != "extra"}

    @property
    def limit(self) -> str:
        """The binding resource."""
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def us(self) -> float:
        """Predicted time in microseconds."""
        return max(self.limits.values()) + self.extra


def predict(
    shape: ConvShape, epilogue: Epilogue, config: ConvConfig, dtype: torch.dtype, precision: str, target: Target
) -> Prediction:
    """Prices one of this package's kernels, or the two of a split reduction."""
    if config.kernel == "conv_rolling":
        return _predict_rolling(shape, epilogue, config, dtype, precision, target)
    size, bm, bn = dtype.itemsize, config.bm, config.bn
    programs = count_tiles(config, shape) * config.split
    waves = cdiv(programs, target.multiprocessors) * target.multiprocessors  # a partial wave costs a whole one
    steps = cdiv(reduction_steps(config, shape), config.split)  # of one program
    depth = steps * config.bk
    moved, written, residual = shape.bytes_moved(size, epilogue.residual), 0, epilogue.residual
    extra = LAUNCH_US - DEPENDENT_LAUNCH_SAVES_US * config.pdl
    if config.split > 1:  # the first kernel writes the partial sums, the second reads them and has the epilogue
        written, residual = workspace_bytes(config, shape) // 2, False
        moved = shape.bytes_moved(size) - shape.m * shape.k * size + written
        extra = 2 * extra + (written + shape.m * shape.k * size * (1 + epilogue.residual)) / target.hbm_tb_s / 1e6
    per_value = EPILOGUE_PER_VALUE + RESIDUAL_PER_VALUE * residual + PRELU_PER_VALUE * epilogue.prelu
    if config.kernel == "conv1x1_pool":
        moved = pooled_bytes(shape, size)
        per_value += POOLED_PER_VALUE * (bm // (shape.p * shape.q))
    cycles = target.multiprocessors * target.clock_ghz * 1e3  # multiprocessor cycles in a microsecond
    values = bm * bn / (32 * config.warps)
    loop = LOOP_INSTRUCTIONS + (POINTER_INSTRUCTIONS if config.kernel == "conv_pointer" else 0)
    instructions = steps * loop + EPILOGUE_INSTRUCTIONS + values * per_value
    return Prediction(
        hbm=moved / target.hbm_tb_s / 1e6,
        l2=(programs * (depth * (bm + bn) + bm * bn * residual) * size + written) / target.l2_tb_s / 1e6,
        shared=waves * depth * size * (2 * bm + bn + cdiv(bm, 64) * bn) / 128 / cycles,
        tensor=waves * 2 * bm * bn * depth / target.tflops(dtype, precision) / 1e6,
        issue=waves * instructions * config.warps / 4 / cycles,
        extra=extra,
    )


def _predict_rolling(
    shape: ConvShape, epilogue: Epilogue, config: ConvConfig, dtype: torch.dtype, precision: str, target: Target
) -> Prediction:
    """Prices ``conv_rolling``: a step loads a row three times, and nothing overlaps a program's load of its weights."""
    size, bm, bn, c = dtype.itemsize, config.bm, config.bn, shape.c
    programs, steps = count_tiles(config, shape), config.box[1] + 2
    waves = cdiv(programs, target.multiprocessors) * target.multiprocessors
    weights, loaded = 9 * bn * c, 3 * bm * c  # elements: of a program, and of a step
    cycles = target.multiprocessors * target.clock_ghz * 1e3
    products = 9 * cdiv(c, 16) * bm / (16 * config.warps)
    values = bm * bn / (32 * config.warps)
    per_value = ROLLING_PER_VALUE + ROLLING_RESIDUAL_PER_VALUE * epilogue.residual
    instructions = ROLLING_START + steps * (ROLLING_INSTRUCTIONS + ROLLING_PER_PRODUCT * products + per_value * values)
    return Prediction(
        hbm=shape.bytes_moved(size, epilogue.residual) / target.hbm_tb_s / 1e6,
        l2=programs * steps * (loaded + bm * bn * epilogue.residual) * size / target.l2_tb_s / 1e6,
        # boxes pass through shared memory into registers, weights are read by each group of 64 pixels
        shared=waves * steps * (2 * loaded + cdiv(bm, 64) * weights) * size / 128 / cycles,
        tensor=waves * steps * 2 * bm * weights / target.tflops(dtype, precision) / 1e6,
        issue=waves * instructions * config.warps / 4 / cycles,
        extra=LAUNCH_US + waves * weights * size / target.l2_tb_s / 1e6,
    )


def pooled_bytes(shape: ConvShape, itemsize: int) -> int:
    """Bytes through device memory of a convolution with residual whose output is only averaged over the image."""
    return shape.bytes_moved(itemsize, True) + itemsize * (shape.n - shape.m) * shape.k


def workspace_bytes(config: ConvConfig, shape: ConvShape) -> int:
    """Bytes through device memory of a split reduction's partial sums, fp32, written once and read once; else 0."""
    return 2 * 4 * config.split * shape.m * shape.k if config.split > 1 else 0


def chain_programs(shape: ChainShape, config: ConvConfig) -> int:
    """Programs of a chain's launch."""
    tn, th, tw = config.box
    expand = shape.expand
    if config.kernel in ROLLING_KERNELS:
        return count_strips(config, expand)
    return cdiv(expand.n, tn) * cdiv(expand.p, th) * cdiv(expand.q, tw)


def predict_chain(
    shape: ChainShape, config: ConvConfig, dtype: torch.dtype, precision: str, target: Target
) -> Prediction:
    """Prices a chain: one program per box or strip of pixels, which reads all its weights and keeps the rest on chip.

    What a strip's programs wait for that nothing overlaps is in ``extra``.
    """
    size, bm, bn = dtype.itemsize, config.bm, config.bn
    expand, rolling = shape.expand, config.kernel in ROLLING_KERNELS
    programs = chain_programs(shape, config)
    tiles = config.box[1] if rolling else 1  # of BM pixels that a program computes, one after another
    # elements of the first input, weights and steps of the 3x3, multiply-adds of the 1x1 before it for a pixel, and
    # elements that pass through shared memory besides operands
    loaded, filters, steps, again, staged = bm * tiles * expand.c, 0, 0, 0, 0
    if shape.conv is not None:
        c, taps = shape.conv.c, shape.conv.r * shape.conv.s
        rows = tiles + 2 if rolling else 1  # two more than are stored
        filters, steps = shape.conv.weights, rows * taps * cdiv(c, config.bk)
        if shape.first is not None:  # computed anew for each tap
            c, again, steps = shape.first.c, taps * shape.first.weights, steps + 1  # the 3x3 lags by a tap
            staged = bm * taps * shape.conv.c
        loaded = bm * c * (3 * rows if rolling else taps)
    pointwise = sum(conv.weights for conv in (expand, shape.project, shape.reduce) if conv is not None)
    added = bm * tiles * expand.k
    if shape.project is not None:
        added = bm * tiles * shape.project.c
    staged += bm * tiles * (expand.k + (shape.reduce.k if shape.reduce else 0))
    conv_tiles = (tiles + 2 if rolling else 1) if filters else 0
    macs = bm * (conv_tiles * (filters + again) + tiles * pointwise)
    waves = cdiv(programs, target.multiprocessors) * target.multiprocessors
    cycles = target.multiprocessors * target.clock_ghz * 1e3
    values = bm * bn / (32 * config.warps)
    columns = tiles * cdiv(expand.k, bn)  # steps of the pointwise loop
    per_column = CHAIN_INSTRUCTIONS + values * CHAIN_PER_VALUE
    if rolling:
        per_column = CHAIN_ROLLING_INSTRUCTIONS + values * CHAIN_ROLLING_PER_VALUE
    if shape.project is not None:
        per_column += CHAIN_PRODUCT + values
    per_step: float = CHAIN_PRODUCT if rolling else LOOP_INSTRUCTIONS
    if again:
        per_step += CHAIN_PRODUCT + FIRST_PER_VALUE * bm * expand.c / (32 * config.warps)
    instructions = steps * per_step + columns * per_column + EPILOGUE_INSTRUCTIONS * tiles
    # every operand is written to shared memory once; weights are read by each group of 64 pixels
    through = 2 * (loaded + added) + staged + (1 + bm / 64) * (filters * conv_tiles + pointwise * tiles)
    prediction = Prediction(
        hbm=shape.bytes_moved(size) / target.hbm_tb_s / 1e6,
        l2=programs * (loaded + filters + tiles * pointwise + added) * size / target.l2_tb_s / 1e6,
        shared=waves * through * size / 128 / cycles,
        tensor=waves * 2 * macs / target.tflops(dtype, precision) / 1e6,
        issue=waves * instructions * config.warps / 4 / cycles,
    )
    if not rolling:
        return prediction
    # a row waits for its three boxes, one after another, and for its first step; only other programs work meanwhile
    resident = max(1, 8 // config.warps)
    turns = cdiv(programs, target.multiprocessors * resident)
    busy = max(prediction.tensor, prediction.issue) * target.multiprocessors / waves
    alone = turns * (busy + (tiles + 2) * 4 * LOAD_US)
    return replace(prediction, extra=LAUNCH_US + max(0.0, alone - max(prediction.limits.values())))


def shared_bytes(config: ConvConfig, itemsize: int, residual: bool = False) -> int:
    """Estimated shared memory of a kernel in bytes (read off sm_90 programs; the pointer kernel uses at most this).

    The staged output and residual reuse the pipeline's memory, except in a persistent ``conv1x1``, which keeps the next
    tile's loads in flight during the epilogue, and in ``conv_rolling``, which holds its weights besides.
    """
    if config.kernel == "conv_rolling":
        weights, box, out = 9 * config.bn * config.bk, config.bm * config.bk, config.bm * config.bn
        rows = 3 * (config.stages - 1) * box + out * (2 if residual else 1) if config.stages > 1 else max(box, out)
        return (weights + rows) * itemsize + BARRIERS
    pipeline = config.stages * (config.bm + config.bn) * config.bk * itemsize
    if config.kernel == "conv_pointer":
        return pipeline
    staged = config.bm * config.bn * itemsize * (2 if residual else 1)
    if config.split > 1:
        staged = config.bm * config.bn * 4
    if config.persistent:
        return pipeline + staged + BARRIERS
    return max(pipeline, staged) + BARRIERS


def fits(config: ConvConfig, shape: ConvShape, itemsize: int, residual: bool, target: Target) -> bool:
    """Whether a target has the shared memory for a kernel, which can compute this convolution at all."""
    room = not target.shared_memory or shared_bytes(config, itemsize, residual) <= target.shared_memory
    return room and (target.tma or config.kernel == "conv_pointer") and runs_on(config, shape, itemsize)


def passes_behind(epilogue: Epilogue, one_pass: bool = False) -> tuple[int, int]:
    """Reads and writes of an output behind a library's convolution, and launches: PyTorch's, or ``bn_act``'s."""
    if one_pass:
        return 2 + epilogue.residual, 1
    last = epilogue.relu or epilogue.prelu
    return 2 * epilogue.bn + 3 * epilogue.residual + 2 * last, epilogue.bn + epilogue.residual + last


def passes_us(shape: ConvShape, epilogue: Epilogue, itemsize: int, target: Target, one_pass: bool = False) -> float:
    """Predicted microseconds of the passes behind a library's convolution."""
    passes, launches = passes_behind(epilogue, one_pass)
    return passes * shape.m * shape.k * itemsize / target.hbm_tb_s / 1e6 + launches * LAUNCH_US


def predict_unfused(
    shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, target: Target, one_pass: bool = False
) -> Prediction:
    """Prices a library convolution at a share of the matrix rate, then PyTorch's separate BN, add and ReLU passes, or
    (``one_pass``) our single one."""
    size = dtype.itemsize
    behind = passes_us(shape, epilogue, size, target, one_pass)
    return Prediction(
        hbm=shape.bytes_moved(size) / target.hbm_tb_s / 1e6 + behind,
        tensor=2 * shape.macs / target.tflops(dtype, precision) / LIBRARY_EFFICIENCY / 1e6 + behind,
    )


def library_us(moved: int, macs: int, dtype: torch.dtype, target: Target) -> tuple[float | None, str]:
    """Predicted microseconds of one library operator by bytes and multiply-adds, and its limit; None without a GPU."""
    us = memory_us(moved, target)
    if us is None or not macs:
        return us, "hbm" if us is not None else ""
    if dtype == torch.float64:  # no rate is known
        return us, "hbm"
    product = 2 * macs / target.tflops(dtype, "tf32") / LIBRARY_EFFICIENCY / 1e6 + LAUNCH_US
    return max(us, product), "hbm" if us >= product else "tensor"


def ideal_us(moved: int, macs: int, dtype: torch.dtype, target: Target) -> float:
    """Microseconds that a GPU needs at least: bytes at its full bandwidth, or products at its full matrix rate."""
    memory = moved / target.hbm_tb_s / 1e6
    if not macs or dtype == torch.float64:  # whose rate is not known
        return memory
    return max(memory, 2 * macs / target.tflops(dtype, "tf32") / 1e6)


def unfused_bytes(shape: ConvShape, epilogue: Epilogue, itemsize: int, one_pass: bool = False) -> int:
    """Bytes through device memory of a library's convolution and the passes behind it."""
    return shape.bytes_moved(itemsize) + shape.m * shape.k * itemsize * passes_behind(epilogue, one_pass)[0]


def stem_bytes(shape: ConvShape, itemsize: int, pool: bool = False) -> int:
    """Bytes of the stem on our kernels: image in, cells out and in, activation (``pool``: the pooled one) out."""
    outputs = pooled_size(shape) if pool else shape.m * shape.k
    return itemsize * (shape.n * shape.h * shape.w * 3 + 2 * cells_size(shape) + outputs)


def cells_size(shape: ConvShape) -> int:
    """Elements of the stem's cells: 16 channels, an even number of columns."""
    columns = shape.q + 3
    return shape.n * (shape.p + 3) * (columns + columns % 2) * 16


def pooled_size(shape: ConvShape) -> int:
    """Elements of a convolution's output behind a 3x3 max-pool of stride 2 and padding 1."""
    return shape.n * cdiv(shape.p, 2) * cdiv(shape.q, 2) * shape.k


def predict_stem_pool(shape: ConvShape, config: ConvConfig, dtype: torch.dtype, target: Target) -> Prediction:
    """Prices ``stem_pool``, and in ``extra`` also the cells and the packed weight that it reads."""
    size, bm, bn = dtype.itemsize, config.bm, config.bn
    images, rows, columns = config.box
    strips = cdiv(cdiv(shape.q, 2), columns // 2 - 1) * cdiv(cdiv(shape.p, 2), rows // 2)
    programs = cdiv(shape.n, images) * strips
    steps = 4 * (cdiv(rows, 4) + 1)  # rows of cells
    waves = cdiv(programs, target.multiprocessors) * target.multiprocessors
    loaded, weights = bm * config.bk, 4 * bn * config.bk  # elements: of a step, and of a program
    cycles = target.multiprocessors * target.clock_ghz * 1e3
    cells = size * cells_size(shape)
    before = memory_us(size * shape.n * shape.h * shape.w * 3 + cells, target, 2) or 0.0
    # a box is written once and read by the products with four rows of weights; rows change their layout to be pooled
    through = 5 * loaded + weights + 2.5 * bm * bn
    values = bm * bn / (32 * config.warps)
    return Prediction(
        hbm=(cells + size * pooled_size(shape)) / target.hbm_tb_s / 1e6,
        l2=programs * (steps * loaded + weights) * size / target.l2_tb_s / 1e6,
        shared=waves * steps * through * size / 128 / cycles,
        tensor=waves * steps * 2 * bm * weights / target.tflops(dtype, "tf32") / 1e6,
        issue=waves * (STEM_START + steps * STEM_PER_VALUE * values) * config.warps / 4 / cycles,
        extra=LAUNCH_US + before,
    )


def head_bytes(n: int, c: int, k: int, pixels: int, itemsize: int) -> int:
    """Bytes of global average pool (none of one pixel) and fully connected layer, ours and the library's alike."""
    features = n * c * (pixels + 2 if pixels > 1 else 1)
    return itemsize * (features + c * k + n * k)


def memory_us(moved: int, target: Target, launches: int = 1) -> float | None:
    """Predicted microseconds of steps that only move bytes through device memory; None without a GPU."""
    return moved / target.hbm_tb_s / 1e6 + launches * LAUNCH_US if target.is_cuda else None

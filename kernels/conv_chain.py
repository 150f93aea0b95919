"""A chain of convolutions in one kernel: ``[[1x1 ->] 3x3 ->] 1x1 -> + shortcut -> ReLU [-> 1x1]``, see ``chain.py``.

A program owns a box of TN x TH x TW output pixels, the BM columns of one GEMM block, and all of their channels:

    h[CM, BM]       = relu(bn(conv(t)))                    the reduction of conv_fwd.py, over taps and channels
    for BN of the K expanded channels at a time:
        o[BN, BM]   = relu(bn(w_expand[BN, CM] h) + shortcut)    shortcut = x, or bn(w_project[BN, CI] x)
        y           = o                                    stored, never read back
        after[CN, BM] += w_reduce[CN, BN] o
    t_next          = relu(bn(after))

Where the chain begins with the block's first 1x1, the pixels of each tap come from its input:

    t[C, BM]        = relu(bn(w_first[C, CI] x)), zero outside the image

It is computed anew for each tap, nine times in all: the halo is never stored, so ``t`` moves no byte.

``h``, ``o`` and ``after`` stay in the multiprocessor. A projected shortcut has an accumulator of its own, so its BN is
its own too, and nothing is divided by a scale that may be zero.

Written like this, filters times pixels, both operands of a product come from shared memory, where only weights have to
be loaded and the pixels lie already. Behind the 3x3 that pays as long as each warp has 16 of the BN filters' rows to
itself; with fewer, warps would compute the same rows twice, and the products are turned: pixels times filters, with the
pixels as left operand from registers.

Read off the machine code for sm_90, bf16 and ResNet-50's blocks, none of which spills (registers; shared memory; issue
pressure of the 3x3 and behind it): CM = 64, 128 pixels, BN = 64, 4 warps 166; 97 KB; 0.38, 0.97, two programs on a
multiprocessor. CM = 128, the same tile: 250; 145 KB; 0.23, 0.52. CM = 256, 128 pixels, BN = 32, 8 warps: 250; 185 KB;
0.24, 0.63. With the first 1x1 and a projection of 64 channels, CM = 64: 256 pixels, BN = 32, 8 warps 212; 120 KB; 0.61,
1.10. Without the reduction, the compiler does not load the shortcut ahead: only other programs hide its latency.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .chain import ChainUnits, Unit
from .config import ConvConfig, least_waste_box
from .epilogue import bn_scale_shift, relu
from .geometry import INT32_MAX, ChainShape, ConvShape, cdiv
from .launch import count
from .tiles import box_origin


@triton.jit
def product(filters, pixels, acc, FILTERS_LEFT: tl.constexpr, PRECISION: tl.constexpr):
    """``acc`` plus ``filters [X, C]`` times ``pixels [BM, C]``: ``[X, BM]`` with the filters left, else ``[BM, X]``."""
    if FILTERS_LEFT:
        return tl.dot(filters, pixels.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(pixels, filters.T, acc, input_precision=PRECISION)


@triton.jit
def normalised(acc, k, K, vectors, FILTERS_LEFT: tl.constexpr):
    """Bias and BN of the channels ``k`` applied to a product."""
    scale, shift = bn_scale_shift(k, K, *vectors)
    if FILTERS_LEFT:
        return acc * scale[:, None] + shift[:, None]
    else:
        return acc * scale[None, :] + shift[None, :]


@triton.jit
def conv_chain(
    t, shortcut, y, t_next, w_first, w_conv, w_project, w_expand, w_reduce,
    bn_first, bn_conv, bn_project, bn_expand, bn_reduce,
    N, H, W, P, Q, K: tl.constexpr, C: tl.constexpr, CM: tl.constexpr, CN: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    PROJECT_STRIDE: tl.constexpr, SUBSAMPLE: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    FILTERS_LEFT: tl.constexpr,
):  # fmt: skip
    """One box of output pixels. Tensors are descriptors, ``y`` with SUBSAMPLE > 1 a pointer; what is absent is None.

    ``bn_...`` are tuples ``(bias, gamma, beta, mean, var, eps)``.
    """
    BM: tl.constexpr = TN * TH * TW
    n0, p0, q0 = box_origin(tl.program_id(0), P, Q, TN, TH, TW)
    if w_conv is None:
        h = t.load([n0, p0, q0, 0]).reshape(BM, CM)
    else:
        CHUNKS: tl.constexpr = 1 if w_first is not None else C // BK
        LAG: tl.constexpr = 1 if w_first is not None else 0
        if w_first is not None:
            first = w_first.load([0, 0])
            scale, shift = bn_scale_shift(tl.arange(0, BK), BK, *bn_first)
            i = tl.arange(0, BM)
            row = (p0 + i // TW % TH) * STRIDE
            column = (q0 + i % TW) * STRIDE
            ready = tl.zeros((BM, BK), t.dtype)
        acc = tl.zeros((CM, BM), tl.float32)
        for step in range(R * S * CHUNKS + LAG):
            tap = step // CHUNKS
            c0 = step % CHUNKS * BK
            dh = tap // S * DIL - PAD
            dw = tap % S * DIL - PAD
            if STRIDE == 1:
                a = t.load([n0, p0 + dh, q0 + dw, c0])
            else:  # input row 2*p + dh is row p + dh//2 of half dh%2
                a = t.load([n0, p0 + (dh >> 1), dh & 1, q0 + (dw >> 1), (dw & 1) * C + c0])
            a = a.reshape(BM, a.shape[-1])
            if w_first is not None:
                # The 3x3 is padded with zeros, not with what the first 1x1 makes of zeros. The product of those is zero
                # (as long as the parameters are finite), so leaving out the shift is enough.
                inside = (row + dh >= 0) & (row + dh < H) & (column + dw >= 0) & (column + dw < W)
                squeezed = product(first, a, None, True, PRECISION) * scale[:, None]
                squeezed += tl.where(inside[None, :], shift[:, None], 0.0)
                # The 3x3 lags by a tap: a product that feeds another in the same step would be spread over its rows
                # only, and eight warps would compute the 64 filters of the first 1x1 twice.
                acc = product(w_conv.load([0, (step - 1) * BK]), ready, acc, True, PRECISION)
                ready = relu(squeezed).to(t.dtype).T
            else:
                acc = product(w_conv.load([0, step * BK]), a, acc, True, PRECISION)
        h = relu(normalised(acc, tl.arange(0, CM), CM, bn_conv, True)).to(t.dtype).T
    if w_project is not None:
        if PROJECT_STRIDE == 1:
            x = shortcut.load([n0, p0, q0, 0])
        else:
            x = shortcut.load([n0, p0, 0, q0, 0])
        x = x.reshape(BM, x.shape[-1])
    if SUBSAMPLE > 1:
        i = tl.arange(0, BM)
        n = i // (TH * TW)
        p = p0 + i // TW % TH
        q = q0 + i % TW
        kept = (n0 + n < N) & (p < P) & (q < Q) & (p % SUBSAMPLE == 0) & (q % SUBSAMPLE == 0)
        rows = tl.cdiv(P, SUBSAMPLE)
        columns = tl.cdiv(Q, SUBSAMPLE)
        offsets = ((n * rows + p // SUBSAMPLE) * columns + q // SUBSAMPLE) * K
        y += n0.to(tl.int64) * (rows * columns * K)
    if w_reduce is not None:
        after = tl.zeros((CN, BM) if FILTERS_LEFT else (BM, CN), tl.float32)
    for k0 in range(0, K, BN):
        k = k0 + tl.arange(0, BN)
        o = product(w_expand.load([k0, 0]), h, None, FILTERS_LEFT, PRECISION)
        o = normalised(o, k, K, bn_expand, FILTERS_LEFT)
        if w_project is not None:
            projected = product(w_project.load([k0, 0]), x, None, FILTERS_LEFT, PRECISION)
            o += normalised(projected, k, K, bn_project, FILTERS_LEFT)
        else:
            residual = shortcut.load([n0, p0, q0, k0]).reshape(BM, BN)
            o += (residual.T if FILTERS_LEFT else residual).to(tl.float32)
        o = relu(o).to(t.dtype)
        o = o.T if FILTERS_LEFT else o
        if SUBSAMPLE == 1:
            y.store([n0, p0, q0, k0], o.reshape(TN, TH, TW, BN))
        else:
            tl.store(y + offsets[:, None] + k[None, :], o, mask=kept[:, None])
        if w_reduce is not None:
            after = product(w_reduce.load([0, k0]), o, after, FILTERS_LEFT, PRECISION)
    if w_reduce is not None:
        after = relu(normalised(after, tl.arange(0, CN), CN, bn_reduce, FILTERS_LEFT)).to(t.dtype)
        t_next.store([n0, p0, q0, 0], (after.T if FILTERS_LEFT else after).reshape(TN, TH, TW, CN))


#: Pixels of a tile, expanded channels of a step, warps.
TILES = ((256, 64, 8), (256, 32, 8), (128, 64, 4), (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4))
#: The same with the first 1x1.
TILES_FIRST = ((256, 32, 8), (128, 64, 4), (128, 32, 4), (64, 64, 4))
#: Values per thread that leave room for addresses and the epilogue: with at most so many, none of the programs seen
#: spills or waits for each of its matrix instructions.
VALUES = 224
#: The same for a 3x3 with an identity shortcut, which needs fewer addresses. The compiler may then wait for each
#: product of the 3x3; the products of the other warp group run meanwhile.
VALUES_IDENTITY = 240
#: Bytes of shared memory that a program may have on sm_90.
SHARED_LIMIT = 227 * 1024


def conv_chain_configs(shape: ChainShape, itemsize: int) -> list[ConvConfig]:
    """Configurations that do not spill on sm_90 with 16-bit operands; the widest tile of pixels first.

    A wide tile reads the weights less often through L2. Empty for fp32, for a 3x3 or a reduction to fewer than the 64
    channels that a matrix instruction has rows, and where :func:`refusal` has a reason.
    """
    if itemsize != 2 or min(shape.expand.c, shape.reduce.k if shape.reduce else 64) < 64:
        return []
    bk = min(64, max(16, shape.conv.c & -shape.conv.c)) if shape.conv else 64
    configs: dict[tuple, ConvConfig] = {}
    for bm, bn, warps in TILES_FIRST if shape.first else TILES:
        # a third stage where it leaves room for the second program of 4 warps
        for stages, limit in ((3, SHARED_LIMIT * warps // 8), (2, SHARED_LIMIT)):
            config = ConvConfig("conv_chain", least_waste_box(shape.expand, bm), bn, bk, warps, stages)
            if conv_chain_shared_bytes(config, shape, itemsize) <= limit:
                break
        else:
            continue
        if refusal(shape, config) is None and values_per_thread(config, shape) <= most_values(shape):
            # narrower steps only where wide ones do not fit, or where the order of the products differs
            configs.setdefault((bm, warps, filters_left(config)), config)
    return list(configs.values())


def most_values(shape: ChainShape) -> int:
    """What :func:`values_per_thread` may be without spills."""
    return VALUES_IDENTITY if shape.conv is not None and shape.project is None else VALUES


def filters_left(config: ConvConfig) -> bool:
    """Whether the products behind the 3x3 are filters times pixels; see the module's docstring."""
    return config.bn >= 16 * config.warps


def refusal(shape: ChainShape, config: ConvConfig) -> str | None:
    """Why a chain cannot be computed with a configuration at all, in words; or None."""
    conv, project, expand, reduce = shape.conv, shape.project, shape.expand, shape.reduce
    whole = {"expand.c": expand.c}
    if project is not None:
        whole["project.c"] = project.c
        if project.r * project.s != 1 or project.padding:
            return f"project must be a 1x1 convolution without padding, got {project}"
    if reduce is not None:
        whole["reduce.k"] = reduce.k
    if shape.first is not None:
        for name, size in (("first.c", shape.first.c), ("first.k", shape.first.k), ("expand.c", expand.c)):
            if size & (size - 1) or not 16 <= size <= 64:
                return f"{name} must be a power of two from 16 to 64 in a chain with first, got {size}"
        if config.bk != shape.first.k:
            return f"bk must be first.k = {shape.first.k}, got bk={config.bk}"
    for name, size in whole.items():
        if size & (size - 1) or not 16 <= size <= 256:
            return f"{name} must be a power of two from 16 to 256, got {size}"
    if expand.k % config.bn or (conv is not None and conv.c % config.bk):
        return f"bn must divide expand.k and bk conv.c, got bn={config.bn} and bk={config.bk} for {shape}"
    for name, c in (("conv", conv), ("project", project)):
        if c is not None and (c.stride not in (1, 2) or (c.stride == 2 and (c.h % 2 or c.w % 2))):
            return f"{name} must have stride 1, or stride 2 on an even image, got {c}"
    n, p, q, k = shape.stored
    if max(config.box) > 256 or min(n, config.box[0]) * p * q * k > INT32_MAX:
        return f"no side of a box may exceed 256, nor its images 2^31 elements, got box={config.box} for {shape}"
    return None


def values_per_thread(config: ConvConfig, shape: ChainShape) -> int:
    """32-bit registers that operands and accumulators fill in the fuller of the two loops."""
    pixels = config.bm / (32 * config.warps)
    mid = shape.expand.c
    first = (mid if shape.conv else 0) + (shape.first.k if shape.first else 0)
    behind = shape.reduce.k if shape.reduce else 0
    behind += config.bn * (1.5 if shape.project is None else 2)
    left = filters_left(config)
    if not left:
        behind += (mid + (shape.project.c if shape.project else 0)) / 2
    # the pixels that are kept need addresses, and pixels loaded straight into registers are moved there
    extra = 8 * (shape.subsample > 1) + 8 * (shape.conv is None and not left)
    return int(pixels * max(first, behind)) + extra


def conv_chain_shared_bytes(config: ConvConfig, shape: ChainShape, itemsize: int) -> int:
    """Shared memory of a program in bytes, at least what the compiled one needs."""
    bm, bn, stages, left = config.bm, config.bn, config.stages, filters_left(config)
    mid = shape.expand.c
    behind = shape.reduce.k if shape.reduce else 0
    projected = shape.project.c if shape.project else 0
    first = stages * (bm + mid) * config.bk if shape.conv else 0
    if shape.first is not None:
        first = shape.first.weights + bm * shape.first.k + stages * (bm * shape.first.c + mid * config.bk)
    # h is loaded into registers or computed into shared memory, from where pixels as left operand are loaded each step
    staged = (mid if left or shape.conv else 0) + (projected if left else 0)
    outgoing = 2 * bn if left and behind else bn
    incoming = 0 if projected else (stages - 1) * bn
    steps = stages * bn * (mid + behind + projected) + bm * (staged + outgoing + incoming)
    elements = max(first, steps, bm * (mid + projected), bm * behind)
    vectors = (stages - 1) * (2 if projected else 1) * 5 * bn * 4
    return itemsize * elements + vectors + 2048


def launch_conv_chain(
    t: torch.Tensor,
    shortcut: torch.Tensor,
    y: torch.Tensor,
    t_next: torch.Tensor | None,
    units: ChainUnits,
    shape: ChainShape,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`conv_chain`; the arguments are those of :func:`.chain.launch_chain`.

    Raises:
        ValueError: the configuration cannot compute this chain; the message says why.
    """
    if reason := refusal(shape, config):
        raise ValueError(f"{reason}; take a configuration of conv_chain_configs, or run the convolutions apart")
    conv, project, expand, reduce = shape.conv, shape.project, shape.expand, shape.reduce
    box, bn, bk = list(config.box), config.bn, config.bk
    tn, th, tw = box
    describe = TensorDescriptor.from_tensor

    def filters(unit: Unit | None, rows: int, channels: int) -> TensorDescriptor | None:
        return None if unit is None else describe(unit.weight.flatten(1), [rows, channels])

    def vectors(unit: Unit | None) -> tuple | None:
        return None if unit is None else unit.operands.vectors

    source = shape.source[-1]
    first = conv or expand
    count("conv_chain")
    conv_chain[(cdiv(expand.n, tn) * cdiv(expand.p, th) * cdiv(expand.q, tw),)](
        pixel_box(t, first, box, source if shape.first else bk if conv else expand.c),
        pixel_box(shortcut, project, box, project.c) if project else describe(shortcut, [*box, bn]),
        describe(y, [*box, bn]) if shape.subsample == 1 else y,
        describe(t_next, [*box, reduce.k]) if reduce else None,
        filters(units.first, bk, source), filters(units.conv, expand.c, bk),
        filters(units.project, bn, project.c if project else 0),
        filters(units.expand, bn, expand.c), filters(units.reduce, reduce.k if reduce else 0, bn),
        vectors(units.first), vectors(units.conv), vectors(units.project), vectors(units.expand), vectors(units.reduce),
        expand.n, first.h, first.w, expand.p, expand.q, K=expand.k, C=source, CM=expand.c, CN=reduce.k if reduce else 0,
        R=first.r, S=first.s, STRIDE=first.stride, PAD=first.padding, DIL=first.dilation,
        PROJECT_STRIDE=project.stride if project else 1, SUBSAMPLE=shape.subsample, PRECISION=precision,
        TN=tn, TH=th, TW=tw, BN=bn, BK=bk, FILTERS_LEFT=filters_left(config),
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def pixel_box(x: torch.Tensor, conv: ConvShape, box: list[int], channels: int) -> TensorDescriptor:
    """The pixels that one tap of a convolution reads for a box of output pixels, as ``conv_fwd.py`` explains."""
    if conv.stride == 1:
        return TensorDescriptor.from_tensor(x, [*box, channels])
    tn, th, tw = box
    image, row, pixel, _ = x.stride()
    halves = [conv.n, conv.h // 2, 2, conv.w // 2, 2 * x.shape[-1]]
    return TensorDescriptor(x, halves, [image, 2 * row, row, 2 * pixel, 1], [tn, th, 1, tw, channels])

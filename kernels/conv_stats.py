"""Forward convolution of a training step: raw output, and the statistics that its batch normalisation needs.

    y[n,p,q,k]   = sum over r,s,c of h[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * w[k,r,s,c]  [+ residual]
    parts[i,:,k] = count, mean and M2 of the i-th program's pixels of y, rounded as they are stored
    h            = x, or relu(x * scale + shift), which is zero in the padding and never stored

M2 is the sum of squared deviations from the mean. A program walks over several tiles; deviations are taken from the
mean of its first one, see ``moments.py``, so that a mean far from zero costs no digits. Which program has which tiles
depends on their number alone: results repeat bitwise.

A tile is a box of pixels as in ``conv_fwd.py``, and the product is filters times pixels as there: the pixels of a
channel, over which statistics run, then lie in one row of the accumulator, four threads wide.

A box that is normalised goes through registers back to shared memory. The loop over channels is the outer one, so that
scale and shift stay in registers while the taps go by. The zeros that a box brings from outside the image would become
``relu(shift)``: boxes that reach there are bounded by their coordinates. bf16 comes as 32-bit words of two channels,
whose halves are fp32 after a shift and a mask; taken apart value by value they cost one instruction more a pair.

Machine code for sm_90, bf16, one step of the 3x3's loop with prologue, away from the border (pixels by filters; none
spills, no shared memory beyond 213,040 bytes):

========= ===== ========= ============ ===========
tile      warps registers instructions pressure
========= ===== ========= ============ ===========
128 x 256 8     223-243   219-225      0.43-0.44
256 x 128 8     240-249   292-307      0.57-0.60
128 x 128 4     247-254   301-306      0.59-0.60
256 x 64  8     199       302          1.18
========= ===== ========= ============ ===========

Two programs of 4 warps share a multiprocessor. With 64 filters a tap has too few products for its normalisation:
there ``conv_stats_rolling.py``, which normalises a row three times instead of nine, comes first.
Boxes at the border add 41 to 86 instructions. Without a prologue a step has 110 to 121: 0.21 to 0.24.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import FEW_TILES, ConvConfig, least_waste_box, next_power_of_two, rows_of_tiles
from .conv_stats_rolling import launch_conv_stats_rolling, rolling_refusal, rolling_stats_configs
from .epilogue import relu
from .geometry import ConvShape, cdiv
from .launch import count, multiprocessors
from .moments import from_pivot, quotient
from .prologue import Normalised, affine
from .tiles import box_origin


@triton.jit
def tap_box(x, n0, p0, q0, dh, dw, c0, C: tl.constexpr, STRIDE: tl.constexpr):
    """The input pixels of one tap of a box of output pixels; ``dh, dw``: its shift."""
    if STRIDE == 1:
        return x.load([n0, p0 + dh, q0 + dw, c0])
    else:  # input row 2*p + dh is row p + dh//2 of half dh%2
        return x.load([n0, p0 + (dh >> 1), dh & 1, q0 + (dw >> 1), (dw & 1) * C + c0])


@triton.jit
def scale_shift(scale, shift, c, C: tl.constexpr):
    """Both vectors at the channels ``c``; 0 beyond the last, where h has to be 0."""
    return tl.load(scale + c, mask=c < C, other=0.0)[None, :], tl.load(shift + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def conv_stats(
    x, w, y, residual, parts, scale, shift, N, H, W, P, Q, K, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WHOLE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Every ``num_programs / column blocks``-th box of pixels times BN channels. ``x, w, y, residual``: descriptors.

    No ``parts``: no statistics; no ``scale``: no prologue; no ``residual``: nothing is added. ``WHOLE``: no box reaches
    beyond the output. ``WORDS``: x holds words of two channels.
    """
    BM: tl.constexpr = TN * TH * TW
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    # loads of the next tile are in flight while this one's statistics are taken
    FLATTEN: tl.constexpr = scale is None and R * S == 1
    column_blocks = tl.cdiv(K, BN)
    part = tl.program_id(0) // column_blocks
    k0 = tl.program_id(0) % column_blocks * BN
    tiles = tl.cdiv(N, TN) * tl.cdiv(P, TH) * tl.cdiv(Q, TW)
    number = 0.0
    pivot = tl.zeros((BN,), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    squares = tl.zeros((BN,), tl.float32)
    for tile in tl.range(part, tiles, tl.num_programs(0) // column_blocks, flatten=FLATTEN):
        n0, p0, q0 = box_origin(tile, P, Q, TN, TH, TW)
        i = tl.arange(0, BM)
        p = p0 + i // TW % TH
        q = q0 + i % TW
        acc = tl.zeros((BN, BM), tl.float32)
        if scale is None:
            for step in range(R * S * CHUNKS):
                tap = step // CHUNKS
                c0 = step % CHUNKS * BK
                a = tap_box(x, n0, p0, q0, tap // S * DIL - PAD, tap % S * DIL - PAD, c0, C, STRIDE)
                acc = tl.dot(w.load([k0, tap * C + c0]), a.reshape(BM, BK).T, acc, input_precision=PRECISION)
        else:
            for c0 in range(0, C, BK):
                if WORDS:
                    c = c0 + 2 * tl.arange(0, BK // 2)
                    scale0, shift0 = scale_shift(scale, shift, c, C)
                    scale1, shift1 = scale_shift(scale, shift, c + 1, C)
                else:
                    scale0, shift0 = scale_shift(scale, shift, c0 + tl.arange(0, BK), C)
                for tap in range(R * S):
                    dh = tap // S * DIL - PAD
                    dw = tap % S * DIL - PAD
                    if WORDS:
                        words = tap_box(x, n0, p0, q0, dh, dw, c0 // 2, C // 2, STRIDE).reshape(BM, BK // 2)
                        h0 = affine((words << 16).to(tl.float32, bitcast=True), scale0, shift0)
                        h1 = affine((words & -65536).to(tl.float32, bitcast=True), scale1, shift1)
                        h = tl.join(h0, h1).reshape(BM, BK)
                    else:
                        a = tap_box(x, n0, p0, q0, dh, dw, c0, C, STRIDE).reshape(BM, BK)
                        h = affine(a, scale0, shift0)
                    if PAD > 0:
                        top = p0 * STRIDE + dh
                        left = q0 * STRIDE + dw
                        if (top < 0) | (top + (TH - 1) * STRIDE >= H) | (left < 0) | (left + (TW - 1) * STRIDE >= W):
                            row = p * STRIDE + dh
                            column = q * STRIDE + dw
                            inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
                            # one instruction a value; a choice would be made after rounding, in three
                            bound = tl.where(inside, float("inf"), 0.0)
                            h = tl.minimum(h, bound[:, None], propagate_nan=tl.PropagateNan.ALL)
                    h = relu(h).to(y.dtype)
                    acc = tl.dot(w.load([k0, tap * C + c0]), h.T, acc, input_precision=PRECISION)
        if residual is not None:
            acc += residual.load([n0, p0, q0, k0]).reshape(BM, BN).T.to(tl.float32)
        out = acc.to(y.dtype)
        y.store([n0, p0, q0, k0], out.T.reshape(TN, TH, TW, BN))
        if parts is not None:
            values = out.to(tl.float32)
            tile_number = tl.cast(BM, tl.float32)
            if not WHOLE:
                stored = ((n0 + i // (TH * TW) < N) & (p < P) & (q < Q))[None, :]
                tile_number = tl.minimum(TN, N - n0) * tl.minimum(TH, P - p0) * tl.minimum(TW, Q - q0)
                tile_number = tile_number.to(tl.float32)
            if number == 0:
                pivot = quotient(tl.sum(values if WHOLE else tl.where(stored, values, 0.0), 1), tile_number)
            deviation = values - pivot[:, None]
            if not WHOLE:
                deviation = tl.where(stored, deviation, 0.0)
            number += tile_number
            total += tl.sum(deviation, 1)
            squares += tl.sum(deviation * deviation, 1)
    if parts is not None:
        mean, m2 = from_pivot(number, pivot, total, squares)
        k = k0 + tl.arange(0, BN)
        offset = part * 3 * K + k
        tl.store(parts + offset, tl.zeros((BN,), tl.float32) + number, mask=k < K)
        tl.store(parts + offset + K, mean, mask=k < K)
        tl.store(parts + offset + 2 * K, m2, mask=k < K)


def refusal(shape: ConvShape, itemsize: int, config: ConvConfig) -> str | None:
    """Why :func:`conv_stats` cannot compute a convolution with a configuration, in words; or None."""
    if shape.c * itemsize % 16 or shape.k * itemsize % 16:
        return f"C and K must be multiples of {16 // itemsize}, so that a pixel is a multiple of 16 bytes, got {shape}"
    if max(config.box) > 256 or max(config.bn, config.bk) > 256:
        return f"no side of a tile may exceed 256, got config={config}"
    if config.kernel == "conv_stats_rolling":
        return rolling_refusal(shape, config)
    if shape.stride == 1 or (shape.r == shape.s == 1 and shape.padding == 0):
        return None
    if shape.stride != 2 or shape.h % 2 or shape.w % 2:
        return f"a tensor map describes stride 1, or stride 2 on even H and W, got {shape}"
    if shape.c % config.bk:
        return f"bk must divide C where the stride is 2, got bk={config.bk} for {shape}"
    return None


SHARED_PER_MULTIPROCESSOR = 228 * 1024
#: Pixels, filters, warps, stages and programs per multiprocessor of tiles with 16-bit operands, none of which spills.
TILES = (
    (128, 256, 8, 3, 1),
    (256, 128, 8, 3, 1),
    (128, 128, 4, 2, 2),
    (256, 64, 8, 2, 1),
    (128, 64, 4, 2, 2),
    (64, 64, 4, 2, 4),
    (256, 32, 4, 2, 2),
    (256, 16, 4, 2, 3),
)
#: The same for a 1x1: its many short tiles hide each other's epilogue.
TILES_1X1 = (
    (128, 128, 4, 2, 2),
    (256, 128, 8, 2, 1),
    (128, 64, 4, 2, 3),
    (64, 64, 4, 3, 3),
    (128, 32, 4, 3, 4),
    (128, 16, 4, 3, 4),
)
#: The same for fp32: with TF32, and exact.
TILES_TF32 = ((128, 128, 8, 2, 1), (64, 64, 8, 2, 3), (128, 32, 4, 2, 2), (128, 16, 4, 2, 2))
TILES_IEEE = ((64, 64, 8, 2, 1), (64, 32, 8, 2, 1), (64, 16, 8, 2, 1))


def conv_stats_configs(
    shape: ConvShape, itemsize: int, prologue: bool, precision: str = "tf32", residual: bool = False
) -> list[ConvConfig]:
    """Configurations that compute the convolution and do not spill on sm_90; the first is the heuristic.

    Empty where a tensor map cannot describe the convolution: the library has to compute it then. ``precision`` matters
    for fp32 alone. With a ``residual``, as many programs share a multiprocessor as its box leaves room for.
    """
    tiles = TILES_1X1 if shape.r * shape.s == 1 else TILES
    if itemsize == 4:
        tiles = TILES_TF32 if precision == "tf32" else TILES_IEEE
    widest = max(16, next_power_of_two(shape.k))
    bk = min(128 // itemsize, max(16, next_power_of_two(shape.c)))
    if shape.stride == 2 and shape.r * shape.s > 1:
        bk = min(bk, shape.c & -shape.c)
    configs, later = [] if residual else rolling_stats_configs(shape, itemsize), []
    for bm, bn, warps, stages, resident in tiles:
        if bk < 16 or bn > widest or (bn < min(64, widest)):
            continue
        box = (1, 1, bm) if shape.pointwise else least_waste_box(shape, bm)
        if residual and shape.r * shape.s * cdiv(shape.c, bk) == 1:  # all boxes of a tile are there at the same time
            held = itemsize * (stages * (bm + bn) * bk + 2 * bm * bn)
            resident = max(1, min(resident, SHARED_PER_MULTIPROCESSOR // (held + 2048)))
        config = ConvConfig("conv_stats", box, bn, bk, warps, stages, persistent=resident)
        if refusal(shape, itemsize, config) is None:
            few = cdiv(shape.m, bm) * cdiv(shape.k, bn) < FEW_TILES
            (later if few else configs).append(config)
    return configs + later[::-1]


def conv_stats_parts(shape: ConvShape, config: ConvConfig, multiprocessors: int = 132) -> int:
    """How many programs share the pixels: as many as fill the GPU, each with as many tiles as the others, or one less.

    Args:
        shape, config: of the launch; ``config.persistent`` programs (at least one) run on a multiprocessor.
        multiprocessors: of the GPU; the default is an H200's. More would wait for each other, fewer leave some idle.
    """
    tn, th, tw = config.box
    if shape.pointwise:
        tiles = cdiv(shape.m, config.bm)
    elif config.kernel == "conv_stats_rolling":
        tiles = rows_of_tiles(config, shape)
    else:
        tiles = cdiv(shape.n, tn) * cdiv(shape.p, th) * cdiv(shape.q, tw)
    programs = max(1, max(1, config.persistent) * multiprocessors // cdiv(shape.k, config.bn))
    return cdiv(tiles, cdiv(tiles, programs))


def launch_conv_stats(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    parts: torch.Tensor | None,
    shape: ConvShape,
    prologue: Normalised | None,
    config: ConvConfig,
    precision: str,
    residual: torch.Tensor | None = None,
) -> None:
    """Launches :func:`conv_stats`, or ``conv_stats_rolling`` where that is the configuration's kernel.

    Args:
        x: ``[N,H,W,C]``, dense.
        w: ``[K,R,S,C]``, dense, of x's dtype. Where ``config.bk`` does not divide C, a chunk reaches into the next
            tap's weights and meets zeros of h there.
        y: ``[N,P,Q,K]``, dense, of x's dtype; raw output.
        parts: dense fp32 ``[conv_stats_parts(shape, config), 3, K]`` for count, mean and M2, or None for no statistics.
            Any other number of parts works too; those without a tile get count 0.
        prologue: the BN and ReLU between the convolution before and this one, or None.
        precision: of fp32 products, ``"tf32"`` or ``"ieee"``.
        residual: as ``y``, added before the output is rounded and its statistics are taken; ``conv_stats`` only.

    Raises:
        ValueError: the configuration cannot compute this convolution; the message says why.
    """
    if reason := refusal(shape, x.element_size(), config):
        raise ValueError(f"{reason}; take a configuration of conv_stats_configs, or the library where it has none")
    number = conv_stats_parts(shape, config, multiprocessors(x.device)) if parts is None else parts.shape[0]
    if config.kernel == "conv_stats_rolling":
        if residual is not None:
            raise ValueError("conv_stats_rolling adds no residual; take a configuration of conv_stats")
        launch_conv_stats_rolling(x, w, y, parts, number, shape, prologue, config, precision)
        return
    n, h, width, p, q, c = shape.n, shape.h, shape.w, shape.p, shape.q, shape.c
    box, bk = list(config.box), config.bk
    if shape.pointwise:
        n, h, width, p, q, box = 1, 1, shape.m, 1, shape.m, [1, 1, config.bm]
        x, y = x.view(1, 1, -1, c), y.view(1, 1, -1, shape.k)
        residual = None if residual is None else residual.view(y.shape)
    tn, th, tw = box
    words = prologue is not None and x.dtype == torch.bfloat16
    if words:
        x, c, bk = x.view(torch.int32), c // 2, bk // 2
    image, row, pixel, _ = x.stride()
    stride = shape.stride
    if stride == 1:
        x_box = TensorDescriptor.from_tensor(x, [*box, bk])
    elif shape.r == shape.s == 1 and shape.padding == 0:  # the pixels it reads are an image, read with stride 1
        x_box = TensorDescriptor(x, [n, p, q, c], [image, stride * row, stride * pixel, 1], [*box, bk])
        stride, h, width = 1, p, q
    else:
        halves = [n, h // 2, 2, width // 2, 2 * c]
        x_box = TensorDescriptor(x, halves, [image, 2 * row, row, 2 * pixel, 1], [tn, th, 1, tw, bk])
    count("conv_stats")
    conv_stats[(number * cdiv(shape.k, config.bn),)](
        x_box, TensorDescriptor.from_tensor(w.flatten(1), [config.bn, config.bk]),
        TensorDescriptor.from_tensor(y, [*box, config.bn]),
        None if residual is None else TensorDescriptor.from_tensor(residual, [*box, config.bn]), parts,
        None if prologue is None else prologue.scale, None if prologue is None else prologue.shift,
        n, h, width, p, q, shape.k, C=shape.c, R=shape.r, S=shape.s,
        STRIDE=stride, PAD=shape.padding, DIL=shape.dilation, PRECISION=precision,
        TN=tn, TH=th, TW=tw, BN=config.bn, BK=config.bk,
        WHOLE=n % tn == p % th == q % tw == 0, WORDS=words,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

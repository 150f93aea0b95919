"""Gradient of a convolution's input, with what surrounds it in a backward pass done in the same kernel.

    acc[n,h,w,c] = sum over r,s,k of d[n, (h + pad - r*dil)/stride, (w + pad - s*dil)/stride, k] * w[k,r,s,c]
    dx           = acc + residual where the mask is positive, else 0

``d`` is the output's gradient, or BN's backward of it formed on load. Stride 1 is the forward's scheme with shifted
boxes of ``d``. With stride 2 a pixel meets only the taps of its own parity: its row and column parity is one of four
*phases*, inside which neighbouring pixels meet neighbouring outputs, so that a phase is a small convolution with
stride 1 (of 1, 2, 2 and 4 taps for a 3x3). The pixels of a phase are a dense box of the view [N, H/2, 2, W/2, 2*C].
The filters are read as they are, a box of BK filters times BN channels of one tap.

A residual with half the rows and columns, the gradient of a projection with stride 2, belongs to the pixels of one
phase: a 1x1 with stride 1 then walks over phases, too.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig
from .dgrad_phases import Walk, dgrad_configs, dgrad_parts, phased, rolls, walks
from .dgrad_rolling import launch_dgrad_rolling
from .geometry import ConvShape, cdiv
from .launch import count
from .prologue import BNBackward, Normalised, affine, bn_backward_of
from .tiles import box_origin

__all__ = ["dgrad_configs", "dgrad_parts", "launch_dgrad"]


@triton.jit
def taps_of(parity, R: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr):
    """First tap, step and number of the taps along one axis that reach pixels of a parity (0 with stride 1)."""
    first = parity * 0
    step: tl.constexpr = 2 if STRIDE == 2 and DIL % 2 == 1 else 1
    if step == 2:
        first = (parity + PAD) % 2
    number = (R - first + step - 1) // step
    if STRIDE == 2 and DIL % 2 == 0:
        number = R * (1 - (parity + PAD) % 2)
    return first, step, number


@triton.jit
def load_pixels(t, n0, h0, w0, c0, a, b, CHANNELS: tl.constexpr, HALVES: tl.constexpr):
    """A box of pixels; with ``HALVES`` those of row parity ``a`` and column parity ``b`` from the view of rank 5."""
    if HALVES:
        box = t.load([n0, h0, a, w0, b * CHANNELS + c0])
    else:
        box = t.load([n0, h0, w0, c0])
    return box


@triton.jit
def dgrad_tile(
    tile, c0, sums, products, dy, raw, g, w, dx, residual, mask, scales, shifts,
    N, H, W, K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, PHASES: tl.constexpr, PHASE: tl.constexpr,
    HALF_RESIDUAL: tl.constexpr, SUMS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One box of pixels times BN channels from ``c0`` on; returns the sums with those of this tile added.

    The product is computed transposed, channels times pixels: both operands come from shared memory, and a channel's
    sums and vectors belong to few threads. Fewer channels than a matrix instruction has rows are computed as columns.
    """
    TRANSPOSED: tl.constexpr = BN >= 64
    BM: tl.constexpr = TN * TH * TW
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    HALVES: tl.constexpr = PHASES == 4
    D_HALVES: tl.constexpr = HALVES and STRIDE == 1  # with stride 2 the output is as large as a phase
    boxes = tl.cdiv(N, TN) * tl.cdiv(H, TH) * tl.cdiv(W, TW)
    n0, h0, w0 = box_origin(tile % boxes, H, W, TN, TH, TW)
    phase = PHASE
    if HALVES:
        phase = PHASE ^ (tile // boxes)
    a = phase // 2
    b = phase % 2
    r0, r_step, r_count = taps_of(a, R, STRIDE, PAD, DIL)
    s0, s_step, s_count = taps_of(b, S, STRIDE, PAD, DIL)
    acc = tl.zeros((BN, BM) if TRANSPOSED else (BM, BN), tl.float32)
    for step in range(0, r_count * s_count * CHUNKS):
        k0 = step % CHUNKS * BK
        tap = step // CHUNKS
        r = r0 + tap // s_count * r_step
        s = s0 + tap % s_count * s_step
        dh = PAD - r * DIL
        dw = PAD - s * DIL
        if STRIDE == 2:
            dh = (dh + a) >> 1
            dw = (dw + b) >> 1
        filters = w.load([k0, (r * S + s) * C + c0])
        d = load_pixels(dy, n0, h0 + dh, w0 + dw, k0, a, b, K, D_HALVES).reshape(BM, BK)
        if raw is not None:
            k = k0 + tl.arange(0, BK)
            g1 = tl.load(g + k, mask=k < K, other=0.0)[None, :]
            g2 = tl.load(g + K + k, mask=k < K, other=0.0)[None, :]
            g3 = tl.load(g + 2 * K + k, mask=k < K, other=0.0)[None, :]
            d = bn_backward_of(
                d, load_pixels(raw, n0, h0 + dh, w0 + dw, k0, a, b, K, D_HALVES).reshape(BM, BK), g1, g2, g3
            )
        if TRANSPOSED:
            acc = tl.dot(filters.T, d.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(d, filters, acc, input_precision=PRECISION)
    if not TRANSPOSED:
        acc = acc.T
    if residual is not None:
        if HALF_RESIDUAL:
            if phase == 0:
                acc += residual.load([n0, h0, w0, c0]).reshape(BM, BN).T.to(tl.float32)
        else:
            acc += load_pixels(residual, n0, h0, w0, c0, a, b, C, HALVES).reshape(BM, BN).T.to(tl.float32)
    if mask is not None:
        m = load_pixels(mask, n0, h0, w0, c0, a, b, C, HALVES).reshape(BM, BN).T.to(tl.float32)
        if scales is not None:
            kept = affine(m, scales[:, None], shifts[:, None]) > 0
        else:
            kept = m > 0
        acc = tl.where(kept, acc, 0.0)
    out = acc.to(dx.dtype)
    if HALVES:
        dx.store([n0, h0, a, w0, b * C + c0], out.T.reshape(TN, TH, 1, TW, BN))
    else:
        dx.store([n0, h0, w0, c0], out.T.reshape(TN, TH, TW, BN))
    if SUMS:
        stored = out.to(tl.float32)
        if not EXACT:
            pixel = tl.arange(0, BM)
            inside = (w0 + pixel % TW < W) & (h0 + pixel // TW % TH < H) & (n0 + pixel // (TW * TH) < N)
            stored = tl.where(inside[None, :], stored, 0.0)
        sums += tl.sum(stored, 1)
        products += tl.sum(stored * m, 1)
    return sums, products


@triton.jit
def dgrad(
    dy, raw, g, w, dx, residual, mask, scale, shift, parts, walkers,
    N, H, W, K: tl.constexpr, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, PHASES: tl.constexpr, PHASE: tl.constexpr,
    HALF_RESIDUAL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile, or every ``walkers``-th one of a column block where sums are wanted.

    ``dy, raw, w, dx, residual, mask`` are tensor descriptors. N, H and W are those of a phase. ``PHASES`` 1: all tiles
    are of phase ``PHASE``, whose pixels the descriptors have. ``PHASES`` 4: ``PHASE``, with most taps, comes first.
    ``EXACT``: what tiles compute beyond the tensor is zero.
    """
    column_blocks: tl.constexpr = (C + BN - 1) // BN
    first = tl.program_id(0) // column_blocks
    c0 = tl.program_id(0) % column_blocks * BN
    c = c0 + tl.arange(0, BN)
    scales = None
    shifts = None
    if scale is not None:
        scales = tl.load(scale + c, mask=c < C, other=0.0)
        shifts = tl.load(shift + c, mask=c < C, other=0.0)
    sums = tl.zeros((BN,), tl.float32)
    products = tl.zeros((BN,), tl.float32)
    if parts is None:
        dgrad_tile(
            first, c0, sums, products, dy, raw, g, w, dx, residual, mask, scales, shifts, N, H, W, K, C, R, S,
            STRIDE, PAD, DIL, PHASES, PHASE, HALF_RESIDUAL, False, EXACT, PRECISION, TN, TH, TW, BN, BK,
        )  # fmt: skip
    else:
        tiles = tl.cdiv(N, TN) * tl.cdiv(H, TH) * tl.cdiv(W, TW) * PHASES
        for tile in tl.range(first, tiles, walkers, num_stages=1):
            sums, products = dgrad_tile(
                tile, c0, sums, products, dy, raw, g, w, dx, residual, mask, scales, shifts, N, H, W, K, C, R, S,
                STRIDE, PAD, DIL, PHASES, PHASE, HALF_RESIDUAL, True, EXACT, PRECISION, TN, TH, TW, BN, BK,
            )  # fmt: skip
        row = parts + first * 2 * C + c
        tl.store(row, sums, mask=c < C)
        tl.store(row + C, products, mask=c < C)


def launch_dgrad(
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    shape: ConvShape,
    prologue: BNBackward | None,
    mask: tuple[torch.Tensor, Normalised] | torch.Tensor | None,
    residual: torch.Tensor | None,
    residual_stride: int,
    parts: torch.Tensor | None,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`dgrad`, or ``dgrad_rolling`` where that is the configuration's kernel. All tensors are dense.

    Args:
        dy: ``[N,P,Q,K]``, the gradient of the convolution's output or of what BN made of it.
        w: ``[K,R,S,C]``.
        dx: ``[N,H,W,C]``, written.
        shape: of the forward convolution.
        prologue: BN's backward, applied to ``dy`` as it is loaded; for 1x1 convolutions without padding.
        mask: ``(c, Normalised)``: dx counts where ``affine(c)`` is positive, ``c`` as ``dx``; or ``x`` as ``dx``: where
            that is positive; or None: everywhere.
        residual: added before the mask: ``[N,H,W,C]``, or ``[N,ceil(H/2),ceil(W/2),C]`` for the even rows and columns.
        residual_stride: 1 or 2, which of these two.
        parts: fp32 ``[dgrad_parts(shape, config, residual_stride), 2, C]``, filled with partial sums over pixels of
            ``dx`` and of ``dx * c`` after rounding; needs a mask ``(c, Normalised)``. Or None.
        config: of kernel ``"dgrad"`` or ``"dgrad_rolling"``; see :func:`dgrad_configs`.
        precision: ``"tf32"`` or ``"ieee"``, for fp32.

    Raises:
        ValueError: a combination of arguments that this kernel does not compute; the message names it.
    """
    check(shape, prologue, mask, residual_stride, config)
    describe = TensorDescriptor.from_tensor
    columns = cdiv(shape.c, config.bn)
    half = residual_stride == 2
    masked, normalised = mask if isinstance(mask, tuple) else (mask, None)
    scale, shift = (normalised.scale, normalised.shift) if normalised else (None, None)
    raw, g = (prologue.c, prologue.g) if prologue else (None, None)
    if parts is not None:
        rows = dgrad_parts(shape, config, residual_stride)
        if normalised is None or parts.shape[0] != rows:
            raise ValueError(
                f"parts has {parts.shape[0]} rows, mask is {type(mask).__name__}; allowed: {rows} rows and a "
                "mask (c, Normalised), because the second sum is of dx * c"
            )
    if config.kernel == "dgrad_rolling":
        number = dgrad_parts(shape, config)
        launch_dgrad_rolling(
            dy, w, dx, residual, masked, scale, shift, parts, number, shape, config, precision
        )  # fmt: skip
        return
    filled = 0  # rows of parts
    for walk in walks(shape, config, residual_stride):
        pixels = functools.partial(pixel_boxes, walk=walk, divided=phased(shape, residual_stride), flat=shape.pointwise)
        d_pixels = functools.partial(pixels, divided=half and shape.stride == 1)
        added = None
        if not half:
            added = pixels(residual, config.bn)
        elif residual is not None and (walk.phases == 4 or walk.phase == 0):
            added = describe(residual, [*walk.box, config.bn])
        exact = walk.exact(raw is not None, shape.pointwise and not phased(shape, residual_stride))
        programs = walk.tiles if parts is None else walk.summing(columns)
        tn, th, tw = walk.box
        count("dgrad")
        dgrad[(programs * columns,)](
            d_pixels(dy, config.bk), d_pixels(raw, config.bk), g, describe(w.flatten(1), [config.bk, config.bn]),
            pixels(dx, config.bn), added, pixels(masked, config.bn), scale, shift,
            None if parts is None else parts[filled:], programs, walk.n, walk.h, walk.w,
            K=shape.k, C=shape.c, R=shape.r, S=shape.s, STRIDE=shape.stride, PAD=shape.padding, DIL=shape.dilation,
            PHASES=walk.phases, PHASE=walk.phase, HALF_RESIDUAL=half, EXACT=exact, PRECISION=precision,
            TN=tn, TH=th, TW=tw, BN=config.bn, BK=config.bk, num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        filled += programs


def pixel_boxes(
    t: torch.Tensor | None, channels: int, walk: Walk, divided: bool, flat: bool
) -> TensorDescriptor | None:
    """Describes a dense ``[N,H,W,C]`` by the boxes of a walk.

    Args:
        t: the tensor, or None.
        channels: of a box.
        walk: whose pixels.
        divided: whether pixels are told apart by parity: then all phases (rank 5), or the walk's own.
        flat: whether they are one row otherwise.
    """
    if t is None:
        return None
    box = [*walk.box, channels]
    if divided and walk.phases == 4:
        n, h, w, c = t.shape
        sizes, strides = [n, h // 2, 2, w // 2, 2 * c], [h * w * c, 2 * w * c, w * c, 2 * c, 1]
        return TensorDescriptor(t, sizes, strides, [*box[:2], 1, *box[2:]])
    if divided:
        t = t[:, walk.phase // 2 :: 2, walk.phase % 2 :: 2]
    elif flat:
        t = t.view(1, 1, -1, t.shape[3])
    return TensorDescriptor.from_tensor(t, box)


def check(
    shape: ConvShape,
    prologue: BNBackward | None,
    mask: tuple[torch.Tensor, Normalised] | torch.Tensor | None,
    residual_stride: int,
    config: ConvConfig,
) -> None:
    """Raises ValueError for what :func:`launch_dgrad` does not compute."""
    if config.kernel not in ("dgrad", "dgrad_rolling"):
        raise ValueError(f"config.kernel={config.kernel!r}; allowed: 'dgrad', 'dgrad_rolling', see dgrad_configs")
    if config.kernel == "dgrad_rolling" and (not rolls(shape) or config.bk != shape.k or config.box[1] != 1):
        raise ValueError(
            f"dgrad_rolling computes 3x3 convolutions of stride 1, padding 1 and dilation 1 with bk=K, a power of two, "
            f"and boxes of one row, got {shape}, {config}; take a configuration of dgrad_configs"
        )
    if shape.stride not in (1, 2):
        raise ValueError(f"stride={shape.stride}; allowed: 1 or 2. Use torch.ops.aten.convolution_backward.")
    if residual_stride not in (1, 2):
        raise ValueError(f"residual_stride={residual_stride!r}; allowed: 1 or 2")
    single_tap = shape.r == shape.s == 1 and shape.padding == 0
    if prologue is not None and not single_tap:
        raise ValueError(f"a prologue is for 1x1 convolutions without padding, got {shape}; form its result beforehand")
    if residual_stride == 2 and shape.stride == 1 and not single_tap:
        raise ValueError(f"residual_stride=2 is for 1x1 convolutions or stride 2, got {shape}; add it beforehand")

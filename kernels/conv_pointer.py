"""Forward convolution by gathered pointers: for GPUs without TMA and for shapes that a tensor map cannot describe.

Same GEMM, same epilogue and same results as ``conv_fwd.conv_tma``; a tile is BM consecutive output pixels of the
flattened [N*P*Q] rows, and each program computes the address of the input pixel behind each row and tap.
"""

import torch
import triton
import triton.language as tl

from .config import ConvConfig
from .dependent import dependent_launch, wait_for_inputs
from .epilogue import Operands, bn_scale_shift, prelu, relu, slopes
from .geometry import ConvShape, cdiv
from .launch import count, needs_int64


@triton.jit
def conv_pointer(
    x, w, y, residual, bias, gamma, beta, mean, var, eps, slope,
    H, W, P, Q, M, K, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    INT64: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
):  # fmt: skip
    """BM output pixels times BN output channels. All tensors dense: x [N,H,W,C], w [K,R,S,C], y [M,K]."""
    if PDL:
        wait_for_inputs()
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    column_blocks = tl.cdiv(K, BN)
    m = tl.program_id(0) // column_blocks * BM + tl.arange(0, BM)
    k = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    # rows past the end repeat the last one: their loads stay inside the tensor, their stores are masked
    row = tl.minimum(m, M - 1)
    h0 = row // Q % P * STRIDE - PAD
    w0 = row % Q * STRIDE - PAD
    image = row // (P * Q)
    if INT64:
        image = image.to(tl.int64)
        m = m.to(tl.int64)
    image = image * (H * W * C)
    filters = tl.minimum(k, K - 1) * (R * S * C)
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(R * S * CHUNKS):
        tap = step // CHUNKS
        c = step % CHUNKS * BK + tl.arange(0, BK)
        h = h0 + tap // S * DIL
        v = w0 + tap % S * DIL
        inside = (h >= 0) & (h < H) & (v >= 0) & (v < W)
        # masked lanes must still point into the tensor: pipelined copies read their address unpredicated
        pixel = image + tl.where(inside, (h * W + v) * C, 0)
        if C % BK == 0:  # clamped channels would no longer be known to be consecutive: no wide, pipelined copies
            a = tl.load(x + pixel[:, None] + c[None, :], mask=inside[:, None], other=0.0)
            b = tl.load(w + filters[:, None] + (tap * C + c)[None, :])
        else:
            channel = tl.minimum(c, C - 1)
            a = tl.load(x + pixel[:, None] + channel[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
            b = tl.load(w + filters[:, None] + (tap * C + channel)[None, :], mask=(c < C)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    scale, shift = bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps)
    out = acc * scale[None, :] + shift[None, :]
    offset = m[:, None] * K + k[None, :]
    stored = (m < M)[:, None] & (k < K)[None, :]
    if slope is not None:
        below = slopes(k, K, slope, ONE_SLOPE)
    if residual is not None:
        out += tl.load(residual + offset, mask=stored, other=0.0).to(tl.float32)
    if RELU:
        out = relu(out)
    if slope is not None:
        out = prelu(out, below[None, :])
    tl.store(y + offset, out.to(y.dtype.element_ty), mask=stored)


def launch_conv_pointer(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    shape: ConvShape,
    operands: Operands,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`conv_pointer`: dense ``x [N,H,W,C]``, ``w [K,R,S,C]``, ``y`` and the residual ``[N,P,Q,K]``."""
    pdl = dependent_launch(config, x.device)
    count("conv_pointer")
    conv_pointer[(cdiv(shape.m, config.bm) * cdiv(shape.k, config.bn),)](
        x, w, y, operands.residual, *operands.with_slope,
        shape.h, shape.w, shape.p, shape.q, shape.m, shape.k, C=shape.c, R=shape.r, S=shape.s,
        STRIDE=shape.stride, PAD=shape.padding, DIL=shape.dilation, RELU=operands.relu, PRECISION=precision,
        INT64=needs_int64(x, y), BM=config.bm, BN=config.bn, BK=config.bk, PDL=pdl,
        ONE_SLOPE=operands.one_slope,
        num_warps=config.warps, num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip

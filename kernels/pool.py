"""Pooling on NHWC tensors.

    max_pool         y[n,p,q,c] = max over r,s of x[n, p*stride - pad + r, q*stride - pad + s, c]
    global_avg_pool  y[n,c]     = sum over h,w of x[n,h,w,c] / (H*W)

Both are bound by device memory; every access takes 16 bytes of neighbouring channels.
"""

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .geometry import cdiv
from .launch import count, needs_int64
from .tiles import box_origin

#: Elements that a program of ``global_avg_pool`` holds: 32 a thread.
TILE = 4096
#: Programs wanted at least, for an H200's multiprocessors: a small batch takes narrower channel blocks.
PROGRAMS = 128


@triton.jit
def max_pool(
    x, y, H, W, P, Q, C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    INT64: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A box of TH x TW output pixels times BC channels of one image."""
    channel_blocks = tl.cdiv(C, BC)
    image, p0, q0 = box_origin(tl.program_id(0) // channel_blocks, P, Q, 1, TH, TW)
    c = tl.program_id(0) % channel_blocks * BC + tl.arange(0, BC)
    pixel = tl.arange(0, TH * TW)
    p = p0 + pixel // TW
    q = q0 + pixel % TW
    x += image.to(tl.int64) * H * W * C
    y += image.to(tl.int64) * P * Q * C
    best = tl.full((TH * TW, BC), float("-inf"), x.dtype.element_ty)
    for tap in tl.static_range(KERNEL * KERNEL):
        # Padding never wins. A window that reaches past an edge also holds that edge, so clamping the coordinate
        # repeats one of its own pixels: no mask, no -inf.
        h = tl.minimum(tl.maximum(p * STRIDE + (tap // KERNEL - PAD), 0), H - 1)
        w = tl.minimum(tl.maximum(q * STRIDE + (tap % KERNEL - PAD), 0), W - 1)
        offset = h * W + w
        if INT64:
            offset = offset.to(tl.int64)
        value = tl.load(x + (offset * C)[:, None] + c[None, :], mask=(c < C)[None, :], other=0.0)
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    offset = p * Q + q
    if INT64:
        offset = offset.to(tl.int64)
    stored = ((p < P) & (q < Q))[:, None] & (c < C)[None, :]
    tl.store(y + (offset * C)[:, None] + c[None, :], best, mask=stored)


@triton.jit
def global_avg_pool(
    x, y, PIXELS, C: tl.constexpr, INT64: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """BC channels of one image. The order of the sum depends on the shape alone, so results repeat bitwise."""
    channel_blocks = tl.cdiv(C, BC)
    image = tl.program_id(0) // channel_blocks
    c = tl.program_id(0) % channel_blocks * BC + tl.arange(0, BC)
    pixel = tl.arange(0, BP)
    x += image.to(tl.int64) * PIXELS * C
    acc = tl.zeros((BP, BC), tl.float32)
    for start in range(0, PIXELS, BP):
        row = start + pixel
        inside = (row < PIXELS)[:, None] & (c < C)[None, :]
        if INT64:
            row = row.to(tl.int64)
        acc += tl.load(x + (row * C)[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(acc, 0) * tl.div_rn(1.0, tl.cast(PIXELS, tl.float32))
    tl.store(y + image * C + c, mean.to(y.dtype.element_ty), mask=c < C)


def launch_max_pool(x: torch.Tensor, y: torch.Tensor, kernel: int = 3, stride: int = 2, padding: int = 1) -> None:
    """Launches :func:`max_pool`: NaN propagates and padding never wins, as ``torch.nn.functional.max_pool2d``.

    Args:
        x: ``[N,H,W,C]`` dense.
        y: ``[N,P,Q,C]`` dense, dtype of ``x``. P and Q may be those of floor or of ceil mode.
        kernel, stride, padding: the same in both directions, ``padding <= kernel // 2``; dilation is 1.
    """
    n, h, w, c = x.shape
    p, q = y.shape[1:3]
    if y.numel() == 0:
        return
    th, tw, bc = 4, 8, min(64, next_power_of_two(c))
    count("max_pool")
    max_pool[(n * cdiv(p, th) * cdiv(q, tw) * cdiv(c, bc),)](
        x, y, h, w, p, q, C=c, KERNEL=kernel, STRIDE=stride, PAD=padding,
        INT64=needs_int64(x[0], y[0]), TH=th, TW=tw, BC=bc, num_warps=4,
    )  # fmt: skip


def launch_global_avg_pool(x: torch.Tensor, y: torch.Tensor) -> None:
    """Launches :func:`global_avg_pool`: dense ``x [N,H,W,C]`` to dense ``y [N,C]``, fp32 sums, NaN kept."""
    n, h, w, c = x.shape
    if y.numel() == 0:
        return
    bc = min(128, next_power_of_two(c))
    while bc > 16 and n * cdiv(c, bc) < PROGRAMS:
        bc //= 2
    bp = min(TILE // bc, next_power_of_two(h * w))
    count("global_avg_pool")
    global_avg_pool[(n * cdiv(c, bc),)](
        x, y, h * w, C=c, INT64=needs_int64(x[0]), BP=bp, BC=bc, num_warps=4
    )  # fmt: skip

"""Gradient of the input of a 3x3 with stride 1 and few channels: programs walk down rows, each is loaded three times.

    acc[n,h,w,c] = sum over r,s,k of dy[n, h + 1 - r, w + 1 - s, k] * w[k,r,s,c]
    dx           = acc + residual where the mask is positive, else 0

``dgrad`` loads every pixel of ``dy`` nine times, which with 64 channels takes L2 longer than the products take. Here
the programs are those of ``conv_rolling.py`` on the filters turned round: a row of ``dy`` gets the taps r = 0 for the
row above, r = 1 for its own and r = 2 for the row below. Mask and residual of a row are fetched one row ahead.
Each thread has two rows of pixels, which are split before the mask, so that sums need no more than they fill.

Machine code for sm_90, 64 channels and filters, with mask and sums: one row of 64 pixels costs 704 (fp16) to 749 (bf16)
instructions, pressure 0.61 to 0.65, in 253 to 255 registers and 114,728 bytes; nothing spills, and two programs share a
multiprocessor. With a residual besides only one does, or it spills: the plan takes ``dgrad`` for that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig, rows_of_tiles
from .conv_rolling import column_taps
from .geometry import ConvShape, cdiv
from .launch import count
from .prologue import affine
from .tiles import next_row, nine_taps, strip_origin


@triton.jit(do_not_specialize=["ROWS"])
def dgrad_rolling(
    dy, w, dx, residual, mask, scale, shift, parts, N, H, W, ROWS, K: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, TN: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of TN x TW pixels times BN channels. ``dy`` and ``dx`` are tensor descriptors."""
    BM: tl.constexpr = TN * TW
    column_blocks: tl.constexpr = (C + BN - 1) // BN
    part = tl.program_id(0) // column_blocks
    c0 = tl.program_id(0) % column_blocks * BN
    first = part * ROWS
    n0, row, w0 = strip_origin(first, H, W, TN, TW)
    c = c0 + tl.arange(0, BN)
    filters = w + tl.arange(0, K)[None, :] * (9 * C) + c[:, None]
    inside = (c < C)[:, None]
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = nine_taps(filters, inside, C)
    if scale is not None:
        scales = tl.load(scale + c, mask=c < C, other=0.0)[None, None, :]
        shifts = tl.load(shift + c, mask=c < C, other=0.0)[None, None, :]
    image, column = tl.arange(0, BM) // TW, tl.arange(0, BM) % TW
    tile = (image * (H * W) + column)[:, None] * C + c[None, :]
    sums = tl.zeros((BM // 16, 8, BN), tl.float32)
    products = tl.zeros((BM // 16, 8, BN), tl.float32)
    if mask is not None:
        m = tl.zeros((BM, BN), dx.dtype)
    if residual is not None:
        added = tl.zeros((BM, BN), dx.dtype)
    above = tl.zeros((BM, BN), tl.float32)
    here = tl.zeros((BM, BN), tl.float32)
    for step in range(ROWS + 2):
        offset = ((n0.to(tl.int64) * H + row) * W + w0) * C
        present = ((image < N - n0) & (column < W - w0) & (row >= 0) & (row < H))[:, None] & (c < C)[None, :]
        if mask is not None:  # of the row that is done in the next step
            next_m = tl.load(mask + offset + tile, present, 0.0)
        if residual is not None:
            next_added = tl.load(residual + offset + tile, present, 0.0)
        below = tl.zeros((BM, BN), tl.float32)
        left = dy.load([n0, row, w0 - 1, 0]).reshape(BM, K)
        above, here, below = column_taps(left, w02, w12, w22, above, here, below, PRECISION)
        mid = dy.load([n0, row, w0, 0]).reshape(BM, K)
        above, here, below = column_taps(mid, w01, w11, w21, above, here, below, PRECISION)
        right = dy.load([n0, row, w0 + 1, 0]).reshape(BM, K)
        done, here, below = column_taps(right, w00, w10, w20, above, here, below, PRECISION)
        above = here + 0.0  # instead of moves: see conv_rolling
        here = below + 0.0
        if (step >= 2) & (row > 0) & (n0 < N):
            if residual is not None:
                done += added.to(tl.float32)
            # rows i and i + 8 of 16 belong to the same thread
            upper, lower = tl.split(done.reshape(BM // 16, 2, 8, BN).permute(0, 2, 3, 1))
            if mask is not None:
                upper_m, lower_m = tl.split(m.reshape(BM // 16, 2, 8, BN).permute(0, 2, 3, 1))
                upper_m = upper_m.to(tl.float32)
                lower_m = lower_m.to(tl.float32)
                if scale is not None:
                    upper = tl.where(affine(upper_m, scales, shifts) > 0, upper, 0.0)
                    lower = tl.where(affine(lower_m, scales, shifts) > 0, lower, 0.0)
                else:
                    upper = tl.where(upper_m > 0, upper, 0.0)
                    lower = tl.where(lower_m > 0, lower, 0.0)
            upper = upper.to(dx.dtype)
            lower = lower.to(dx.dtype)
            out = tl.join(upper, lower).permute(0, 3, 1, 2)
            dx.store([n0, row - 1, w0, c0], out.reshape(TN, 1, TW, BN))
            if parts is not None:
                stored = ((image < N - n0) & (column < W - w0)).reshape(BM // 16, 2, 8).permute(0, 2, 1)
                upper_in, lower_in = tl.split(stored)
                upper = tl.where(upper_in[:, :, None], upper.to(tl.float32), 0.0)
                lower = tl.where(lower_in[:, :, None], lower.to(tl.float32), 0.0)
                sums += upper + lower
                products = tl.fma(upper, upper_m, tl.fma(lower, lower_m, products))
        if mask is not None:
            m = next_m
        if residual is not None:
            added = next_added
        n0, row, w0 = next_row(n0, row, w0, H, W, TN, TW)
    if parts is not None:
        parts += part * 2 * C + c
        tl.store(parts, tl.sum(sums.reshape(BM // 2, BN), 0), mask=c < C)
        tl.store(parts + C, tl.sum(products.reshape(BM // 2, BN), 0), mask=c < C)


def launch_dgrad_rolling(
    dy: torch.Tensor,
    w: torch.Tensor,
    dx: torch.Tensor,
    residual: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    parts: torch.Tensor | None,
    number: int,
    shape: ConvShape,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`dgrad_rolling`; the other arguments are those of :func:`.dgrad.launch_dgrad`, taken apart.

    Args:
        number: of programs that share the pixels.
    """
    tn, _, tw = config.box
    describe = TensorDescriptor.from_tensor
    count("dgrad_rolling")
    dgrad_rolling[(number * cdiv(shape.c, config.bn),)](
        describe(dy, [tn, 1, tw, shape.k]), w, describe(dx, [tn, 1, tw, config.bn]), residual, mask, scale, shift,
        parts, shape.n, shape.h, shape.w, cdiv(rows_of_tiles(config, shape), number),
        K=shape.k, C=shape.c, PRECISION=precision, TN=tn, TW=tw, BN=config.bn,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

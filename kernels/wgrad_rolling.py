"""The weight gradient of a 3x3 with few channels: programs walk down rows, each input row is normalised once.

    dw[k,r,s,c] = sum over n,p,q of dy[n,p,q,k] * h[n, p + r - 1, q + s - 1, c]
    h           = x, or relu(x * scale + shift), which is zero in the padding and never stored

``wgrad`` loads and normalises a box of the input for every filter row, which with 64 channels takes longer than the
products. Here a step takes one row of tiles of the gradient, as three boxes, one a filter column, and the input row
below it. The input's own row and the one above come from the steps before, so that a row is loaded and normalised once
for its three filter rows: four boxes for nine taps instead of six, and 0.67 of ``wgrad``'s bytes through L2.

All columns of tiles are one sequence of rows, in which a row of zeros separates each from the one before; the programs
have equal shares of it, each with two steps more to fetch the input rows above its first, and ``sum_parts`` adds their
results in a fixed order.

Machine code for sm_90 of one row of 64 pixels, 64 channels and 64 filters (eight warps; nothing spills):

========== ========= ============ ============ ============ ===========
dtype      prologue  registers    shared bytes instructions pressure
========== ========= ============ ============ ============ ===========
bf16       yes       238          65,592       325          0.56
fp16       yes       238          65,592       317          0.55
bf16, fp16 no        226          65,592       265          0.46
========== ========= ============ ============ ============ ===========
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig
from .geometry import ConvShape, cdiv
from .launch import count
from .prologue import Normalised, bn_relu
from .sum_parts import MOST_PART_BYTES, launch_sum_parts

#: Channels and filters for which the kernel is offered: a tile has 64 of each.
CHANNELS = 64


@triton.jit
def normalised_row(raw, x_scale, x_shift, row, q0, H, W, TW: tl.constexpr, COLUMN_PADDING: tl.constexpr):
    """``h`` of a row of pixels ``[BM, BC]``, zero where it reaches outside of the image."""
    if x_scale is None:
        h = raw
    else:
        # The TMA reads zeros there, and BN and ReLU of zero without a shift are zero.
        inside = (row >= 0) & (row < H)
        if COLUMN_PADDING:
            inside = (inside & (q0 + tl.arange(0, raw.shape[0]) % TW < W))[:, None]
        h = bn_relu(raw, x_scale, tl.where(inside, x_shift, 0.0))
    return h


@triton.jit
def row_taps(h, d0, d1, d2, a0, a1, a2):
    """Adds the products of one input row with the gradient's three boxes, one a filter column."""
    a0 = tl.dot(h.T, d0, a0)
    a1 = tl.dot(h.T, d1, a1)
    a2 = tl.dot(h.T, d2, a2)
    return a0, a1, a2


@triton.jit
def wgrad_rolling(
    x, dy, scale, shift, parts, N, H, W, C, K, STEPS, PART,
    TN: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    COLUMN_PADDING: tl.constexpr,
):  # fmt: skip
    """One share of the ``STEPS`` rows of TN x TW pixels for BN output and BC input channels.

    ``x`` and ``dy`` are tensor descriptors. ``PART`` is the distance of one share's results from the next's.
    """
    BM: tl.constexpr = TN * TW
    dtype: tl.constexpr = dy.dtype
    other: tl.constexpr = tl.float16 if dtype == tl.bfloat16 else tl.bfloat16
    column_blocks = tl.cdiv(K, BN)
    blocks = column_blocks * tl.cdiv(C, BC)
    program = tl.program_id(0)
    k0 = program % column_blocks * BN
    c0 = program // column_blocks % tl.cdiv(C, BC) * BC
    part = program // blocks
    k = k0 + tl.arange(0, BN)
    c = c0 + tl.arange(0, BC)
    x_scale = None
    x_shift = None
    if scale is not None:
        x_scale = tl.load(scale + c, mask=c < C, other=0.0)[None, :]
        x_shift = tl.load(shift + c, mask=c < C, other=0.0)[None, :]
    first = (part.to(tl.int64) * STEPS // SPLIT).to(tl.int32)
    end = ((part + 1).to(tl.int64) * STEPS // SPLIT).to(tl.int32)
    tl.assume(end > first)  # else the products of the first round wait for one another
    across = tl.cdiv(W, TW)
    tile = first // (H + 1)
    # Two rows further up, whose products do not count, the input rows above the first one are fetched.
    n0, row, q0 = tile // across * TN, first % (H + 1) - 3, tile % across * TW
    a00 = tl.zeros((BC, BN), tl.float32)
    a01, a02, a10, a11, a12, a20, a21, a22 = a00, a00, a00, a00, a00, a00, a00, a00
    above = tl.zeros((BM, BC), tl.int16)
    here = tl.zeros((BM, BC), other)
    for step in range(first - 2, end):
        d_n0 = tl.where(step < first, N, n0)
        # All loads before the first product: a wait between two products would make each of them wait.
        d0 = dy.load([d_n0, row, q0 + 1, k0]).reshape(BM, BN)
        d1 = dy.load([d_n0, row, q0, k0]).reshape(BM, BN)
        d2 = dy.load([d_n0, row, q0 - 1, k0]).reshape(BM, BN)
        raw = x.load([n0, row + 1, q0, c0]).reshape(BM, BC)
        a00, a01, a02 = row_taps(above.to(dtype, bitcast=True), d0, d1, d2, a00, a01, a02)
        a10, a11, a12 = row_taps(here.to(dtype, bitcast=True), d0, d1, d2, a10, a11, a12)
        # while those products are under way
        below = normalised_row(raw, x_scale, x_shift, row + 1, q0, H, W, TW, COLUMN_PADDING)
        a20, a21, a22 = row_taps(below, d0, d1, d2, a20, a21, a22)
        # Where no product needs its result at once, the compiler splits each into matrix instructions with a fence
        # and a wait apiece: two instructions for every matrix instruction.
        a22 += 0.0
        # A row handed on as it is would keep the loop from being pipelined, and one that is an operand as it was
        # handed on would be read from shared memory. Other types of the same bits cost nothing.
        above = here.to(tl.int16, bitcast=True)
        here = below.to(other, bitcast=True)
        bottom = row == H - 1
        row = tl.where(bottom, -1, row + 1)
        q0 = tl.where(bottom, q0 + TW, q0)
        n0 = tl.where(q0 < W, n0, n0 + TN)
        q0 = tl.where(q0 < W, q0, 0)
    out = parts + part.to(tl.int64) * PART + k[None, :] * (9 * C) + c[:, None]
    stored = (c < C)[:, None] & (k < K)[None, :]
    accs = (a00, a01, a02, a10, a11, a12, a20, a21, a22)
    for tap in tl.static_range(9):
        tl.store(out + tap * C, accs[tap], mask=stored)


def rolling_wgrad_configs(shape: ConvShape, itemsize: int, multiprocessors: int = 132) -> list[ConvConfig]:
    """The configuration that does not spill on sm_90, or none where ``wgrad`` has to compute the gradient."""
    if itemsize != 2 or not (rolls(shape) and shape.c == shape.k == CHANNELS):
        return []
    boxes = [(64 >> log, 1, 1 << log) for log in range(7)]
    box = min(boxes, key=lambda box: (cdiv(shape.n, box[0]) * cdiv(shape.w, box[2]), -box[2]))
    config = ConvConfig("wgrad_rolling", box, CHANNELS, CHANNELS, 8, 2)
    most = min(rolling_steps(shape, config), MOST_PART_BYTES // (4 * shape.weights), multiprocessors)
    return [ConvConfig("wgrad_rolling", box, CHANNELS, CHANNELS, 8, 2, split=max(1, most))]


def rolls(shape: ConvShape) -> bool:
    """Whether :func:`wgrad_rolling` computes a convolution's gradient."""
    return (shape.r, shape.s, shape.stride, shape.padding, shape.dilation) == (3, 3, 1, 1, 1)


def rolling_steps(shape: ConvShape, config: ConvConfig) -> int:
    """Rows of tiles that the shares divide among them, with those of zeros that separate columns of tiles."""
    tn, _, tw = config.box
    return cdiv(shape.n, tn) * cdiv(shape.w, tw) * (shape.h + 1)


def launch_wgrad_rolling(
    dy: torch.Tensor,
    x: torch.Tensor,
    dw: torch.Tensor,
    shape: ConvShape,
    prologue: Normalised | None,
    config: ConvConfig,
) -> None:
    """Launches :func:`wgrad_rolling` and, where there are several shares, ``sum_parts``.

    Args:
        dy, x, dw, shape, prologue, config: as for :func:`.wgrad.launch_wgrad`.

    Raises:
        ValueError: another kernel has to compute this gradient, or ``config.split`` exceeds the rows of tiles.
    """
    (tn, th, tw), bn, bk, split = config.box, config.bn, config.bk, config.split
    if not rolls(shape) or th != 1 or x.element_size() != 2:
        raise ValueError(
            f"wgrad_rolling computes 16-bit 3x3 convolutions of stride 1, padding 1 and dilation 1 with boxes of one "
            f"row, got {x.dtype}, config={config} for {shape}. Take a configuration of wgrad."
        )
    steps = rolling_steps(shape, config)
    if split > steps:
        raise ValueError(f"split={split} shares {steps} rows of tiles; allowed: at most {steps}. Take fewer shares.")
    parts = dw if split == 1 else torch.empty((split, dw.numel()), dtype=torch.float32, device=dw.device)
    scale, shift = (None, None) if prologue is None else (prologue.scale, prologue.shift)
    describe = TensorDescriptor.from_tensor
    count("wgrad_rolling")
    wgrad_rolling[(cdiv(shape.k, bn) * cdiv(shape.c, bk) * split,)](
        describe(x, [tn, 1, tw, bk]), describe(dy, [tn, 1, tw, bn]), scale, shift, parts,
        shape.n, shape.h, shape.w, shape.c, shape.k, steps, dw.numel(),
        TN=tn, TW=tw, BC=bk, BN=bn, SPLIT=split, COLUMN_PADDING=shape.w % tw > 0,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        launch_sum_parts(parts, dw)

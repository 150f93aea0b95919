"""The 3x3 of a training step for few channels: programs walk down rows and normalise each input row three times.

    y[n,p,q,k]   = sum over r,s,c of h[n, p + r - 1, q + s - 1, c] * w[k,r,s,c]
    parts[i,:,k] = count, mean and M2 of the i-th program's pixels of y, rounded as they are stored
    h            = x, or relu(x * scale + shift), which is zero in the padding and never stored

``conv_stats`` loads and normalises every input pixel nine times, once a tap, which with 64 filters takes longer than
the products. Here the programs are those of ``conv_rolling.py``: weights stay in shared memory, an input row comes as
three boxes, one a column tap, and belongs to three output rows. All columns of tiles, with a row of zeros between two
of them, are one sequence of rows, of which each program has an equal share.

Pixels are the left operand. A normalised box goes through shared memory once, into the registers of the products. The
sums for the statistics stay apart until the end, eight rows of pixels a warp: a thread adds its own two rows only.

Machine code for sm_90 of one row of 64 pixels, 64 channels and 64 filters (four warps; nothing spills, and two
programs share a multiprocessor); pressure without and with the rounding, the store and the statistics of a row:

========== ========= ============ ============ ============ ===========
dtype      prologue  registers    shared bytes instructions pressure
========== ========= ============ ============ ============ ===========
bf16, fp16 yes       244-246      114,728      571 + 204    0.50 - 0.67
bf16, fp16 no        204-211      107,560      280 + 204    0.24 - 0.42
========== ========= ============ ============ ============ ===========

A box at the border of the image costs 39 instructions more. With 128 channels it spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import SHORTEST_STRIP, ConvConfig, rolling_config, rows_of_tiles
from .conv_rolling import column_taps
from .epilogue import relu
from .geometry import ConvShape, cdiv
from .launch import count
from .moments import from_pivot, quotient
from .prologue import Normalised, affine
from .tiles import next_row, nine_taps, strip_origin


@triton.jit
def normalised_box(
    x, scale, shift, n0, row, q0, P, Q, C: tl.constexpr, TN: tl.constexpr, TW: tl.constexpr,
    WORDS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Input pixels ``[TN * TW, C]`` of a row from column ``q0`` on, zero outside the image; ``scale`` None: as is."""
    BM: tl.constexpr = TN * TW
    if scale is None:
        h = x.load([n0, row, q0, 0]).reshape(BM, C)
    else:
        if WORDS:  # two channels of bf16, whose halves are fp32 after a shift and a mask
            words = x.load([n0, row, q0, 0]).reshape(BM, C // 2)
            scale0, scale1 = tl.split(scale.reshape(C // 2, 2))
            shift0, shift1 = tl.split(shift.reshape(C // 2, 2))
            h0 = affine((words << 16).to(tl.float32, bitcast=True), scale0[None, :], shift0[None, :])
            h1 = affine((words & -65536).to(tl.float32, bitcast=True), scale1[None, :], shift1[None, :])
            h = tl.join(h0, h1).reshape(BM, C)
        else:
            h = affine(x.load([n0, row, q0, 0]).reshape(BM, C), scale[None, :], shift[None, :])
        if (row < 0) | (row >= P) | (q0 < 0) | (q0 + TW > Q):
            column = q0 + tl.arange(0, BM) % TW
            inside = (column >= 0) & (column < Q) & (row >= 0) & (row < P)
            # before rounding, as in conv_stats
            h = tl.minimum(h, tl.where(inside, float("inf"), 0.0)[:, None], propagate_nan=tl.PropagateNan.ALL)
        h = relu(h).to(DTYPE)
    return h


@triton.jit(do_not_specialize=["ROWS"])
def conv_stats_rolling(
    x, w, y, parts, scale, shift, N, P, Q, K, ROWS, C: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of TN x TW output pixels, BN output channels. ``x`` and ``y`` are tensor descriptors.

    No ``parts``: no statistics; no ``scale``: no prologue. ``WHOLE``: no box reaches beyond the output. ``WORDS``: x
    holds words of two channels. Weights are read through pointers, as in ``conv_rolling``.
    """
    BM: tl.constexpr = TN * TW
    column_blocks = tl.cdiv(K, BN)
    part = tl.program_id(0) // column_blocks
    k0 = tl.program_id(0) % column_blocks * BN
    first = part * ROWS
    n0, row, q0 = strip_origin(first, P, Q, TN, TW)
    k = k0 + tl.arange(0, BN)
    filters = w + k[:, None] * (9 * C) + tl.arange(0, C)[None, :]
    inside = (k < K)[:, None]
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = nine_taps(filters, inside, C)
    scales = None
    shifts = None
    if scale is not None:
        scales = tl.load(scale + tl.arange(0, C))
        shifts = tl.load(shift + tl.arange(0, C))
    number = 0.0
    pivot = tl.zeros((BN,), tl.float32)
    total = tl.zeros((BM // 16, 8, BN), tl.float32)
    squares = tl.zeros((BM // 16, 8, BN), tl.float32)
    above = tl.zeros((BM, BN), tl.float32)
    here = tl.zeros((BM, BN), tl.float32)
    for step in range(ROWS + 2):
        below = tl.zeros((BM, BN), tl.float32)
        left = normalised_box(x, scales, shifts, n0, row, q0 - 1, P, Q, C, TN, TW, WORDS, y.dtype)
        above, here, below = column_taps(left, w20, w10, w00, above, here, below, PRECISION)
        mid = normalised_box(x, scales, shifts, n0, row, q0, P, Q, C, TN, TW, WORDS, y.dtype)
        above, here, below = column_taps(mid, w21, w11, w01, above, here, below, PRECISION)
        right = normalised_box(x, scales, shifts, n0, row, q0 + 1, P, Q, C, TN, TW, WORDS, y.dtype)
        done, here, below = column_taps(right, w22, w12, w02, above, here, below, PRECISION)
        above = here + 0.0  # instead of moves: see conv_rolling
        here = below + 0.0
        if (step >= 2) & (row > 0) & (n0 < N):
            out = done.to(y.dtype)
            y.store([n0, row - 1, q0, k0], out.reshape(TN, 1, TW, BN))
            if parts is not None:
                values = out.to(tl.float32)
                row_number = tl.cast(BM, tl.float32)
                if not WHOLE:
                    i = tl.arange(0, BM)
                    stored = ((n0 + i // TW < N) & (q0 + i % TW < Q))[:, None]
                    row_number = (tl.minimum(TN, N - n0) * tl.minimum(TW, Q - q0)).to(tl.float32)
                if number == 0:
                    pivot = quotient(tl.sum(values if WHOLE else tl.where(stored, values, 0.0), 0), row_number)
                deviation = values - pivot[None, :]
                if not WHOLE:
                    deviation = tl.where(stored, deviation, 0.0)
                number += row_number
                # rows i and i + 8 of 16 belong to the same thread
                upper, lower = tl.split(deviation.reshape(BM // 16, 2, 8, BN).permute(0, 2, 3, 1))
                total += upper + lower
                squares = tl.fma(upper, upper, tl.fma(lower, lower, squares))
        n0, row, q0 = next_row(n0, row, q0, P, Q, TN, TW)
    if parts is not None:
        totals = tl.sum(total.reshape(BM // 2, BN), 0)
        mean, m2 = from_pivot(number, pivot, totals, tl.sum(squares.reshape(BM // 2, BN), 0))
        offset = part * 3 * K + k
        tl.store(parts + offset, tl.zeros((BN,), tl.float32) + number, mask=k < K)
        tl.store(parts + offset + K, mean, mask=k < K)
        tl.store(parts + offset + 2 * K, m2, mask=k < K)


#: Channels for which the kernel is offered: fewer leave the products waiting, more spill.
CHANNELS = 64


def rolling_stats_configs(shape: ConvShape, itemsize: int) -> list[ConvConfig]:
    """The configuration that does not spill on sm_90, or none where another kernel has to compute the convolution.

    None, too, where strips would be so short that the two rows which each computes besides are not worth it.
    """
    rolling = rolling_config(shape)
    tn, rows, tw = rolling.box
    config = ConvConfig("conv_stats_rolling", (tn, 1, tw), rolling.bn, rolling.bk, 4, 2, persistent=2)
    offered = itemsize == 2 and shape.c == config.bn == CHANNELS and rows >= SHORTEST_STRIP
    return [config] if offered and rolling_refusal(shape, config) is None else []


def rolling_refusal(shape: ConvShape, config: ConvConfig) -> str | None:
    """Why :func:`conv_stats_rolling` cannot compute a convolution with a configuration, in words; or None."""
    if (shape.r, shape.s, shape.stride, shape.padding, shape.dilation) != (3, 3, 1, 1, 1):
        return f"conv_stats_rolling computes 3x3 convolutions of stride 1, padding 1 and dilation 1, got {shape}"
    if config.bk != shape.c or config.box[1] != 1:
        return f"conv_stats_rolling needs bk=C, a power of two, and boxes of one row, got config={config} for {shape}"
    return None


def launch_conv_stats_rolling(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    parts: torch.Tensor | None,
    number: int,
    shape: ConvShape,
    prologue: Normalised | None,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`conv_stats_rolling`; the other arguments are those of :func:`.conv_stats.launch_conv_stats`.

    Args:
        number: of programs that share the pixels.
    """
    tn, _, tw = config.box
    c, scale, shift = shape.c, None, None
    describe = TensorDescriptor.from_tensor
    words = prologue is not None and x.dtype == torch.bfloat16
    if prologue is not None:
        scale, shift = prologue.scale, prologue.shift
    if words:
        x, c = x.view(torch.int32), c // 2
    count("conv_stats_rolling")
    conv_stats_rolling[(number * cdiv(shape.k, config.bn),)](
        describe(x, [tn, 1, tw, c]), w, describe(y, [tn, 1, tw, config.bn]), parts, scale, shift,
        shape.n, shape.p, shape.q, shape.k, cdiv(rows_of_tiles(config, shape), number),
        C=shape.c, PRECISION=precision, TN=tn, TW=tw, BN=config.bn,
        WHOLE=shape.n % tn == shape.q % tw == 0, WORDS=words, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

"""3x3 convolution, stride 1, whose programs walk down rows: weights are loaded once, each input row three times.

    y[n,p,q,k] = epilogue(sum over r,s,c of x[n, p + r - 1, q + s - 1, c] * w[k,r,s,c])

``conv_tma`` loads every input pixel nine times, once a tap, and the weights again for every tile. Here the nine weight
tiles ``[BN, C]`` stay in shared memory while a program walks down the image. An input row i, loaded as three boxes of
TN images x TW columns (one a column tap), belongs to three output rows, which are in work at a time:

    row i - 1 gets tap r = 2 and is done;   row i gets tap r = 1;   row i + 1 gets tap r = 0 and begins

So two accumulators roll from step to step. All columns of tiles stand on top of each other, with one row of zeros
between two of them (the TMA reads zeros outside the image): whatever is left of one column of tiles ends up in the
separating row, which is not stored. That makes one long sequence of rows, cut into equal strips for the programs,
wherever the cuts fall. A strip costs two rows more than it stores.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig, count_tiles
from .epilogue import Operands, bn_scale_shift, relu
from .geometry import ConvShape
from .launch import count
from .tiles import next_row, nine_taps, strip_origin


@triton.jit
def column_taps(pixels, w2, w1, w0, above, here, below, PRECISION: tl.constexpr):
    """Adds one input row ``[BM, C]``, times the three taps ``[BN, C]`` of a filter column, to its three output rows."""
    above = tl.dot(pixels, w2.T, above, input_precision=PRECISION)
    here = tl.dot(pixels, w1.T, here, input_precision=PRECISION)
    below = tl.dot(pixels, w0.T, below, input_precision=PRECISION)
    return above, here, below


@triton.jit(do_not_specialize=["ROWS"])
def conv_rolling(
    x, w, y, residual, bias, gamma, beta, mean, var, eps, residual_n, residual_h, residual_w,
    N, P, Q, K, ROWS, C: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of TN x TW output pixels, BN output channels. ``x`` and ``y`` are tensor descriptors.

    Weights and residual are read through pointers: the compiler waits on the spot for each TMA load outside of loops,
    and for those in a loop whose value is no operand of a product.
    """
    BM: tl.constexpr = TN * TW
    column_blocks = tl.cdiv(K, BN)
    first = tl.program_id(0) // column_blocks * ROWS
    k0 = tl.program_id(0) % column_blocks * BN
    n0, h, q0 = strip_origin(first, P, Q, TN, TW)
    k = k0 + tl.arange(0, BN)
    filters = w + k[:, None] * (9 * C) + tl.arange(0, C)[None, :]
    inside = (k < K)[:, None]
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = nine_taps(filters, inside, C)
    scale, shift = bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps)
    if residual is not None:
        image, column = tl.arange(0, BM) // TW, tl.arange(0, BM) % TW
        tile = (image.to(tl.int64) * residual_n + column * residual_w)[:, None] + k[None, :]
        added = tl.zeros((BM, BN), y.dtype)
    above = tl.zeros((BM, BN), tl.float32)
    here = tl.zeros((BM, BN), tl.float32)
    for step in range(ROWS + 2):
        if residual is not None:  # of the row that is done in the next step: it arrives during this one's products
            row = residual + n0.to(tl.int64) * residual_n + h.to(tl.int64) * residual_h + q0 * residual_w
            stored = (image < N - n0) & (column < Q - q0) & (h >= 0) & (h < P)
            following = tl.load(row + tile, stored[:, None] & (k < K)[None, :])
        below = tl.zeros((BM, BN), tl.float32)
        left = x.load([n0, h, q0 - 1, 0]).reshape(BM, C)
        above, here, below = column_taps(left, w20, w10, w00, above, here, below, PRECISION)
        mid = x.load([n0, h, q0, 0]).reshape(BM, C)
        above, here, below = column_taps(mid, w21, w11, w01, above, here, below, PRECISION)
        right = x.load([n0, h, q0 + 1, 0]).reshape(BM, C)
        done, here, below = column_taps(right, w22, w12, w02, above, here, below, PRECISION)
        # Additions of zero instead of moves. The compiler would move registers while products are in flight and, as
        # that is not allowed, wait for every single matrix instruction.
        above = here + 0.0
        here = below + 0.0
        if (step >= 2) & (h > 0):
            out = done * scale[None, :] + shift[None, :]
            if residual is not None:
                out += added.to(tl.float32)
            if RELU:
                out = relu(out)
            y.store([n0, h - 1, q0, k0], out.to(y.dtype).reshape(TN, 1, TW, BN))
        if residual is not None:
            added = following
        n0, h, q0 = next_row(n0, h, q0, P, Q, TN, TW)


def launch_conv_rolling(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    shape: ConvShape,
    operands: Operands,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`conv_rolling`.

    Args:
        x: ``[N,H,W,C]``, channels dense, other strides multiples of 16 bytes.
        w: ``[K,3,3,C]`` dense.
        y: ``[N,P,Q,K]``, channels dense, other strides multiples of 16 bytes.
        operands.residual: ``[N,P,Q,K]``, channels dense.
    """
    tn, rows, tw = config.box
    describe, residual = TensorDescriptor.from_tensor, operands.residual
    strides = (0, 0, 0) if residual is None else residual.stride()[:3]
    count("conv_rolling")
    conv_rolling[(count_tiles(config, shape),)](
        describe(x, [tn, 1, tw, shape.c]), w, describe(y, [tn, 1, tw, config.bn]), residual, *operands.vectors,
        *strides, shape.n, shape.p, shape.q, shape.k, rows, C=shape.c, RELU=operands.relu, PRECISION=precision,
        TN=tn, TW=tw, BN=config.bn, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

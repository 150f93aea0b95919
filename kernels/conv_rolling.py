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


@triton.jit
def taps(left, mid, right, w0, w1, w2, acc, PRECISION: tl.constexpr):
    """``acc`` and the three column taps of one filter row: pixels ``[BM, C]`` times filters ``[BN, C]``."""
    acc = tl.dot(left, w0.T, acc, input_precision=PRECISION)
    acc = tl.dot(mid, w1.T, acc, input_precision=PRECISION)
    return tl.dot(right, w2.T, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["ROWS"])
def conv_rolling(
    x, w, y, residual, bias, gamma, beta, mean, var, eps, P, Q, K, ROWS, C: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, TN: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of tiles of TN x TW output pixels, BN output channels. ``x, w, y, residual`` are descriptors."""
    BM: tl.constexpr = TN * TW
    column_blocks = tl.cdiv(K, BN)
    first = tl.program_id(0) // column_blocks * ROWS
    k0 = tl.program_id(0) % column_blocks * BN
    across = tl.cdiv(Q, TW)
    h = first % (P + 1) - 1
    q0 = first // (P + 1) % across * TW
    n0 = first // (P + 1) // across * TN
    w00, w01, w02 = w.load([k0, 0]), w.load([k0, C]), w.load([k0, 2 * C])
    w10, w11, w12 = w.load([k0, 3 * C]), w.load([k0, 4 * C]), w.load([k0, 5 * C])
    w20, w21, w22 = w.load([k0, 6 * C]), w.load([k0, 7 * C]), w.load([k0, 8 * C])
    scale, shift = bn_scale_shift(k0 + tl.arange(0, BN), K, bias, gamma, beta, mean, var, eps)
    above = tl.zeros((BM, BN), tl.float32)
    here = tl.zeros((BM, BN), tl.float32)
    for step in range(ROWS + 2):
        left = x.load([n0, h, q0 - 1, 0]).reshape(BM, C)
        mid = x.load([n0, h, q0, 0]).reshape(BM, C)
        right = x.load([n0, h, q0 + 1, 0]).reshape(BM, C)
        if residual is not None:
            extra = residual.load([n0, h - 1, q0, k0]).reshape(BM, BN)
        done = taps(left, mid, right, w20, w21, w22, above, PRECISION)
        # Adding zero instead of moving registers, which the compiler would do while products that write them are in
        # flight: it would wait for every single matrix instruction then.
        above = taps(left, mid, right, w10, w11, w12, here, PRECISION) + 0.0
        here = taps(left, mid, right, w00, w01, w02, tl.zeros((BM, BN), tl.float32), PRECISION) + 0.0
        if (step >= 2) & (h > 0):
            out = done * scale[None, :] + shift[None, :]
            if residual is not None:
                out += extra.to(tl.float32)
            if RELU:
                out = relu(out)
            y.store([n0, h - 1, q0, k0], out.to(y.dtype).reshape(TN, 1, TW, BN))
        bottom = h == P
        h = tl.where(bottom, 0, h + 1)
        q0 = tl.where(bottom, q0 + TW, q0)
        n0 = tl.where(q0 < Q, n0, n0 + TN)
        q0 = tl.where(q0 < Q, q0, 0)


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
        y, operands.residual: ``[N,P,Q,K]``, channels dense, other strides multiples of 16 bytes.
    """
    tn, rows, tw = config.box
    bn = config.bn
    describe = TensorDescriptor.from_tensor
    residual = operands.residual
    count("conv_rolling")
    conv_rolling[(count_tiles(config, shape),)](
        describe(x, [tn, 1, tw, shape.c]), describe(w.flatten(1), [bn, shape.c]), describe(y, [tn, 1, tw, bn]),
        None if residual is None else describe(residual, [tn, 1, tw, bn]), *operands.vectors,
        shape.p, shape.q, shape.k, rows, C=shape.c, RELU=operands.relu, PRECISION=precision,
        TN=tn, TW=tw, BN=bn, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

"""Everything behind a library's convolution in one elementwise pass, in place: bias, BN, shortcut and ReLU.

    y[m, k] = relu((y[m, k] + bias[k]) * scale[k] + shift[k] + residual[m, k])     in fp32, rounded once

PyTorch's own operators make a pass each. This one is for convolutions whose products the library computes faster.
"""

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .epilogue import Operands, bn_scale_shift, relu
from .geometry import cdiv
from .launch import count

ROWS = 32


@triton.jit
def bn_act(
    y, residual, bias, gamma, beta, mean, var, eps, M, K: tl.constexpr, RELU: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """BM pixels times BN channels of a dense ``[M, K]``."""
    column_blocks = tl.cdiv(K, BN)
    m = tl.program_id(0) // column_blocks * BM
    k = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    scale, shift = bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps)
    row = tl.arange(0, BM)
    inside = (row < M - m)[:, None] & (k < K)[None, :]
    start = m.to(tl.int64) * K  # one 64-bit scalar; the lanes stay 32-bit
    offset = row[:, None] * K + k[None, :]
    out = tl.load(y + start + offset, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if residual is not None:
        out += tl.load(residual + start + offset, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        out = relu(out)
    tl.store(y + start + offset, out.to(y.dtype.element_ty), mask=inside)


def launch_bn_act(y: torch.Tensor, operands: Operands) -> None:
    """Launches :func:`bn_act` on ``y [N,P,Q,K]``, dense, in place; the residual has its shape, dtype and layout."""
    k = y.shape[-1]
    m = y.numel() // max(1, k)
    if m == 0:
        return
    bn = min(128, max(16, next_power_of_two(k)))
    count("bn_act")
    bn_act[(cdiv(m, ROWS) * cdiv(k, bn),)](
        y, operands.residual, *operands.vectors, m, K=k, RELU=operands.relu, BM=ROWS, BN=bn, num_warps=4
    )

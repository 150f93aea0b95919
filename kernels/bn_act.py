"""Everything between two convolutions in one elementwise pass: bias, BN, shortcut and ReLU or PReLU.

    y[m, k] = relu((x[m, k] + bias[k]) * scale[k] + shift[k] + residual[m, k])     in fp32, rounded once

PyTorch's own operators make a pass each. This one is for convolutions whose products the library computes faster, where
it works in place, and for the BN and ReLU in front of a pre-activation block.
"""

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .epilogue import Operands, bn_scale_shift, prelu, relu, slopes
from .geometry import cdiv
from .launch import count

ROWS = 32


@triton.jit
def bn_act(
    x, y, residual, bias, gamma, beta, mean, var, eps, slope, M, K: tl.constexpr, RELU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ONE_SLOPE: tl.constexpr,
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
    out = tl.load(x + start + offset, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if slope is not None:
        below = slopes(k, K, slope, ONE_SLOPE)
    if residual is not None:
        out += tl.load(residual + start + offset, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        out = relu(out)
    if slope is not None:
        out = prelu(out, below[None, :])
    tl.store(y + start + offset, out.to(y.dtype.element_ty), mask=inside)


def launch_bn_act(y: torch.Tensor, operands: Operands, x: torch.Tensor | None = None) -> None:
    """Launches :func:`bn_act` on ``x``, or in place.

    Args:
        y: ``[N,P,Q,K]``, dense.
        operands: what to apply; the residual has the shape, dtype and layout of ``y``.
        x: as ``y``, or None for ``y`` itself.
    """
    k = y.shape[-1]
    m = y.numel() // max(1, k)
    if m == 0:
        return
    bn = min(128, max(16, next_power_of_two(k)))
    count("bn_act")
    bn_act[(cdiv(m, ROWS) * cdiv(k, bn),)](
        y if x is None else x, y, operands.residual, *operands.with_slope, m,
        K=k, RELU=operands.relu, BM=ROWS, BN=bn, ONE_SLOPE=operands.one_slope, num_warps=4,
    )  # fmt: skip

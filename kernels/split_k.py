"""Split-K: the reduction of one output tile divided among several programs, then summed in a fixed order.

    parts[i, m, k] = sum over the i-th share of the reduction        conv_tma or conv1x1, fp32
    y[m, k]        = epilogue(parts[0, m, k] + parts[1, m, k] + ...)   split_k_epilogue

A small batch has fewer tiles than the GPU has multiprocessors, and each would walk alone over thousands of products
while the others idle. The order of the sum depends on nothing but ``split``: results repeat bitwise, without atomics.
"""

import torch
import triton
import triton.language as tl

from .dependent import wait_for_inputs
from .epilogue import Operands, bn_scale_shift, prelu, relu, slopes
from .geometry import cdiv
from .launch import count, needs_int64

#: Rows and columns of a program's tile: one 16-byte load of each part per thread.
ROWS, COLUMNS, WARPS = 8, 64, 4


@triton.jit
def share(part, STEPS: tl.constexpr, SPLIT: tl.constexpr):
    """First step of the reduction that program ``part`` of ``SPLIT`` takes, and the one after its last."""
    return part * STEPS // SPLIT, (part + 1) * STEPS // SPLIT


@triton.jit
def split_k_epilogue(
    parts, y, residual, bias, gamma, beta, mean, var, eps, slope, M, K,
    SPLIT: tl.constexpr, RELU: tl.constexpr, INT64: tl.constexpr, PDL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ONE_SLOPE: tl.constexpr,
):  # fmt: skip
    """BM output pixels times BN channels. All tensors dense: parts [SPLIT,M,K], y and residual [M,K]."""
    if PDL:
        wait_for_inputs()
    column_blocks = tl.cdiv(K, BN)
    m = tl.program_id(0) // column_blocks * BM + tl.arange(0, BM)
    k = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    stored = (m < M)[:, None] & (k < K)[None, :]
    if INT64:
        m = m.to(tl.int64)
    offset = m[:, None] * K + k[None, :]
    acc = tl.load(parts + offset, mask=stored, other=0.0)
    for part in tl.static_range(1, SPLIT):
        acc += tl.load(parts + (part * M + m)[:, None] * K + k[None, :], mask=stored, other=0.0)
    scale, shift = bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps)
    out = acc * scale[None, :] + shift[None, :]
    if slope is not None:
        below = slopes(k, K, slope, ONE_SLOPE)
    if residual is not None:
        out += tl.load(residual + offset, mask=stored, other=0.0).to(tl.float32)
    if RELU:
        out = relu(out)
    if slope is not None:
        out = prelu(out, below[None, :])
    tl.store(y + offset, out.to(y.dtype.element_ty), mask=stored)


def new_parts(y: torch.Tensor, split: int, steps: int) -> torch.Tensor:
    """The uninitialised fp32 ``[split, *y.shape]`` for the partial sums of an output.

    Raises:
        ValueError: there are fewer steps than programs to share them.
    """
    if split > steps:
        raise ValueError(
            f"split={split} shares a reduction of {steps} steps; allowed: at most {steps}. Use a smaller split or bk."
        )
    return torch.empty((split, *y.shape), dtype=torch.float32, device=y.device)


def launch_split_k_epilogue(parts: torch.Tensor, y: torch.Tensor, operands: Operands, pdl: bool) -> None:
    """Launches :func:`split_k_epilogue`.

    Args:
        parts: ``[split, *y.shape]`` dense fp32, all written.
        y, operands.residual: ``[..., K]`` dense.
        pdl: whether it is launched dependently, see :mod:`.dependent`.

    Raises:
        ValueError: ``y`` or the residual has gaps.
    """
    residual = operands.residual
    for name, tensor in (("y", y), ("residual", residual)):
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; a split reduction needs it dense. Use split=1.")
    split, k = parts.shape[0], y.shape[-1]
    m = y.numel() // k
    count("split_k_epilogue")
    split_k_epilogue[(cdiv(m, ROWS) * cdiv(k, COLUMNS),)](
        parts, y, residual, *operands.with_slope, m, k, SPLIT=split, RELU=operands.relu, INT64=needs_int64(parts),
        PDL=pdl, BM=ROWS, BN=COLUMNS, ONE_SLOPE=operands.one_slope, num_warps=WARPS, launch_pdl=pdl,
    )  # fmt: skip

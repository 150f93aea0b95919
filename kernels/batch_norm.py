"""Folding batch normalisation (inference) into the convolution before it.

    scale = gamma / sqrt(var + eps)
    w_out[k, ...] = w[k, ...] * scale[k]
    b_out[k] = beta[k] + (bias[k] - mean[k]) * scale[k]

In fp32 whatever the dtypes are; square root and division round correctly, so that only the last product and
sum differ from an exact fold. The convolutions of this package need no folding (their epilogue normalises);
it is for export, for quantisation and for the CPU.
"""

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .geometry import cdiv
from .launch import count


@triton.jit
def fold_bn(
    w, bias, gamma, beta, mean, var, eps, w_out, b_out, ROW, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK of the ROW weights of one output channel; the first block also folds the bias."""
    blocks = tl.cdiv(ROW, BLOCK)
    k = tl.program_id(0) // blocks
    start = tl.program_id(0) % blocks * BLOCK
    scale = 1.0
    if gamma is not None:
        scale = tl.load(gamma + k).to(tl.float32)
    # an eps from a compiled graph arrives as fp64
    scale = tl.div_rn(scale, tl.sqrt_rn(tl.load(var + k).to(tl.float32) + tl.cast(eps, tl.float32)))
    w += k.to(tl.int64) * ROW
    w_out += k.to(tl.int64) * ROW
    row = start + tl.arange(0, BLOCK)
    value = tl.load(w + row, mask=row < ROW, other=0.0).to(tl.float32) * scale
    tl.store(w_out + row, value.to(w_out.dtype.element_ty), mask=row < ROW)
    if start == 0:
        shift = -tl.load(mean + k).to(tl.float32)
        if bias is not None:
            shift += tl.load(bias + k).to(tl.float32)
        shift *= scale
        if beta is not None:
            shift += tl.load(beta + k).to(tl.float32)
        tl.store(b_out + k, shift.to(b_out.dtype.element_ty))


def launch_fold_bn(
    w: torch.Tensor,
    bias: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    w_out: torch.Tensor,
    b_out: torch.Tensor,
) -> None:
    """Launches :func:`fold_bn`.

    Args:
        w, w_out: ``[K, ...]``, dense with K outermost (contiguous and channels_last both are), equal strides. They may
            be the same tensor.
        bias, gamma, beta: ``[K]`` or None (0, 1 and 0).
        mean, var: ``[K]``.
        b_out: ``[K]``. Every tensor fp16, bf16 or fp32, each its own.
    """
    if w.numel() == 0:
        return
    k = w.shape[0]
    row = w.numel() // k
    block = min(1024, next_power_of_two(row))
    count("fold_bn")
    fold_bn[(k * cdiv(row, block),)](w, bias, gamma, beta, mean, var, float(eps), w_out, b_out, row, BLOCK=block)

"""BN, shortcut and ReLU of a raw convolution output in one pass, with statistics that are already known.

    y[m, k] = relu(c[m, k] * scale[k] + shift[k] + residual[m, k])          or, of a projection's raw output,
    y[m, k] = relu(c[m, k] * scale[k] + shift[k] + (residual[m, k] * its_scale[k] + its_shift[k]))

in fp32, rounded once.
"""

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .epilogue import relu
from .geometry import cdiv
from .launch import count
from .prologue import affine

ROWS = 32


@triton.jit
def bn_apply(
    c, scale, shift, residual, residual_scale, residual_shift, y, M, K: tl.constexpr, RELU: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM pixels times BN channels of dense ``[M, K]``."""
    column_blocks = tl.cdiv(K, BN)
    m = tl.program_id(0) // column_blocks * BM
    k = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    row = tl.arange(0, BM)
    known = k < K
    inside = (row < M - m)[:, None] & known[None, :]
    start = m.to(tl.int64) * K  # one 64-bit scalar; the lanes stay 32-bit
    offset = row[:, None] * K + k[None, :]
    a = tl.load(scale + k, mask=known, other=0.0)[None, :]
    b = tl.load(shift + k, mask=known, other=0.0)[None, :]
    out = affine(tl.load(c + start + offset, mask=inside, other=0.0), a, b)
    if residual is not None:
        added = tl.load(residual + start + offset, mask=inside, other=0.0).to(tl.float32)
        if residual_scale is not None:
            a = tl.load(residual_scale + k, mask=known, other=0.0)[None, :]
            b = tl.load(residual_shift + k, mask=known, other=0.0)[None, :]
            added = affine(added, a, b)
        out += added
    if RELU:
        out = relu(out)
    tl.store(y + start + offset, out.to(y.dtype.element_ty), mask=inside)


def launch_bn_apply(
    c: torch.Tensor,
    stats: torch.Tensor,
    residual: torch.Tensor | None,
    residual_stats: torch.Tensor | None,
    use_relu: bool,
    y: torch.Tensor,
) -> None:
    """Launches :func:`bn_apply`.

    Args:
        c, residual, y: ``[N,P,Q,K]`` dense, of one dtype; ``y`` may be ``c``.
        stats, residual_stats: dense fp32 whose rows 3 and 4 are scale and shift ``[K]``.
        use_relu: whether a ReLU comes last.
    """
    k = c.shape[-1]
    m = c.numel() // max(1, k)
    if m == 0:
        return
    bn = min(128, max(16, next_power_of_two(k)))
    its_scale, its_shift = (None, None) if residual_stats is None else (residual_stats[3], residual_stats[4])
    count("bn_apply")
    bn_apply[(cdiv(m, ROWS) * cdiv(k, bn),)](
        c, stats[3], stats[4], residual, its_scale, its_shift, y, m, K=k, RELU=use_relu, BM=ROWS, BN=bn, num_warps=4
    )

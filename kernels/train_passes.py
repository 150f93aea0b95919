"""The passes of a training step that no product takes along: BN's backward, and the ReLU's at a block's end.

    bn_backward    out = g1 * dz + g2 + g3 * c [+ added]                         per channel, rounded once
    masked_sums    dz = dy where y > 0, else 0          sum of dz, sum of dz * c per channel
    bn_gradients   from those sums: dgamma, dbeta, and the factors g of bn_backward

The first two are bound by device memory. Every sum runs in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .geometry import cdiv
from .launch import count as count_launch
from .prologue import Normalised, affine, bn_backward_of

ROWS = 32
#: Programs of ``masked_sums``: two for each multiprocessor of an H200.
PROGRAMS = 264


@triton.jit
def bn_backward(dz, c, g, added, out, M, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """BM pixels times BN channels of a dense ``[M, C]``."""
    column_blocks = tl.cdiv(C, BN)
    m = tl.program_id(0) // column_blocks * BM
    k = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    g1 = tl.load(g + k, mask=k < C, other=0.0)
    g2 = tl.load(g + C + k, mask=k < C, other=0.0)
    g3 = tl.load(g + 2 * C + k, mask=k < C, other=0.0)
    row = tl.arange(0, BM)
    inside = (row < M - m)[:, None] & (k < C)[None, :]
    start = m.to(tl.int64) * C  # one 64-bit scalar; the lanes stay 32-bit
    offset = row[:, None] * C + k[None, :]
    gradient = tl.load(dz + start + offset, mask=inside, other=0.0)
    value = tl.load(c + start + offset, mask=inside, other=0.0)
    if added is None:
        result = bn_backward_of(gradient, value, g1[None, :], g2[None, :], g3[None, :])
    else:
        result = bn_backward_of(gradient.to(tl.float32), value, g1[None, :], g2[None, :], g3[None, :])
        result += tl.load(added + start + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + offset, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def masked_sums(dy, y, c, scale, shift, dz, parts, M, P, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """BN channels of every P-th tile of BM pixels; the ReLU's sign from ``y``, or from ``c * scale + shift``."""
    column_blocks = tl.cdiv(C, BN)
    part = tl.program_id(0) // column_blocks
    k = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    row = tl.arange(0, BM)
    offset = row[:, None] * C + k[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    product = tl.zeros((BM, BN), tl.float32)
    if scale is not None:
        a = tl.load(scale + k, mask=k < C, other=0.0)[None, :]
        b = tl.load(shift + k, mask=k < C, other=0.0)[None, :]
    for tile in range(part, tl.cdiv(M, BM), P):
        start = tl.cast(tile, tl.int64) * (BM * C)
        inside = (row < M - tile * BM)[:, None] & (k < C)[None, :]
        gradient = tl.load(dy + start + offset, mask=inside, other=0.0)
        value = tl.load(c + start + offset, mask=inside, other=0.0).to(tl.float32)
        if y is not None:
            output = tl.load(y + start + offset, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.where(output > 0.0, gradient, tl.zeros_like(gradient))
        if scale is not None:
            gradient = tl.where(affine(value, a, b) > 0.0, gradient, tl.zeros_like(gradient))
        if dz is not None:
            tl.store(dz + start + offset, gradient, mask=inside)
        total += gradient.to(tl.float32)
        product += gradient.to(tl.float32) * value
    parts += part.to(tl.int64) * (2 * C)
    tl.store(parts + k, tl.sum(total, 0), mask=k < C)
    tl.store(parts + C + k, tl.sum(product, 0), mask=k < C)


@triton.jit
def bn_gradients(
    parts, stats, g, dgamma, dbeta, P, count, C: tl.constexpr, CONSTANT: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """BN channels of all parts, summed in fp64. CONSTANT: the statistics do not depend on the input."""
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = k < C
    total = tl.zeros((BP, BN), tl.float64)
    product = tl.zeros((BP, BN), tl.float64)
    for start in range(0, P, BP):
        part = start + tl.arange(0, BP)
        offset = part[:, None] * (2 * C) + k[None, :]
        mask = (part < P)[:, None] & inside[None, :]
        total += tl.load(parts + offset, mask=mask, other=0.0).to(tl.float64)
        product += tl.load(parts + C + offset, mask=mask, other=0.0).to(tl.float64)
    db = tl.sum(total, 0)
    mean = tl.load(stats + k, mask=inside, other=0.0).to(tl.float64)
    rstd = tl.load(stats + 2 * C + k, mask=inside, other=0.0).to(tl.float64)
    scale = tl.load(stats + 3 * C + k, mask=inside, other=0.0)
    dg = (tl.sum(product, 0) - mean * db) * rstd
    if dgamma is not None:
        tl.store(dgamma + k, dg.to(dgamma.dtype.element_ty), mask=inside)
    if dbeta is not None:
        tl.store(dbeta + k, db.to(dbeta.dtype.element_ty), mask=inside)
    tl.store(g + k, scale, mask=inside)
    if CONSTANT:
        tl.store(g + C + k, tl.zeros_like(scale), mask=inside)
        tl.store(g + 2 * C + k, tl.zeros_like(scale), mask=inside)
    else:
        each = scale.to(tl.float64) / tl.cast(count, tl.float64)
        g3 = -each * rstd * dg
        tl.store(g + C + k, (-each * db - g3 * mean).to(tl.float32), mask=inside)
        tl.store(g + 2 * C + k, g3.to(tl.float32), mask=inside)


def launch_bn_backward(
    dz: torch.Tensor, c: torch.Tensor, g: torch.Tensor, out: torch.Tensor, added: torch.Tensor | None = None
) -> None:
    """Launches :func:`bn_backward`: the gradient of a raw convolution output ``c`` behind batch normalisation.

    Args:
        dz, c, out: ``[..., C]`` dense, one shape and dtype; ``out`` may be ``dz``.
        g: ``[3, C]`` fp32 dense, as :func:`launch_bn_gradients` writes it.
        added: as ``out``: another gradient of ``c``, or None.
    """
    channels = c.shape[-1]
    m = c.numel() // max(1, channels)
    if m == 0:
        return
    bn = min(128, max(16, next_power_of_two(channels)))
    count_launch("bn_backward")
    bn_backward[(cdiv(m, ROWS) * cdiv(channels, bn),)](dz, c, g, added, out, m, C=channels, BM=ROWS, BN=bn, num_warps=4)


def _sums_tile(c: int) -> tuple[int, int]:
    """Pixels and channels of a tile of ``masked_sums``: 8192 elements, 32 a thread."""
    bn = min(128, max(16, next_power_of_two(c)))
    return 8192 // bn, bn


def masked_sums_parts(m: int, c: int) -> int:
    """How many parts :func:`launch_masked_sums` should write for ``[M, C]``; the same on every device."""
    bm, bn = _sums_tile(c)
    return max(1, min(PROGRAMS // cdiv(c, bn), cdiv(m, bm)))


def launch_masked_sums(
    dy: torch.Tensor,
    y: torch.Tensor | Normalised | None,
    c: torch.Tensor,
    dz: torch.Tensor | None,
    parts: torch.Tensor,
) -> None:
    """Launches :func:`masked_sums`: a gradient through a ReLU, with the sums that BN's backward needs.

    Args:
        dy: ``[..., C]`` dense, the gradient behind the ReLU.
        y: the ReLU's output, or how ``c`` is normalised before it, or None for no ReLU.
        c: what was normalised.
        dz: gets ``dy`` where ``y > 0`` and else 0, or None; may be ``dy``. All of one shape and dtype.
        parts: ``[P, 2, C]`` fp32 dense, P of :func:`masked_sums_parts`: partial sums of ``dz`` and of ``dz * c``.
    """
    channels = c.shape[-1]
    m = c.numel() // max(1, channels)
    if channels == 0:
        return
    bm, bn = _sums_tile(channels)
    p = parts.shape[0]
    count_launch("masked_sums")
    output, scale, shift = y, None, None
    if isinstance(y, Normalised):
        output, scale, shift = None, y.scale, y.shift
    masked_sums[(p * cdiv(channels, bn),)](
        dy, output, c, scale, shift, dz, parts, m, p, C=channels, BM=bm, BN=bn, num_warps=8
    )


def launch_bn_gradients(
    parts: torch.Tensor,
    stats: torch.Tensor,
    count: int,
    g: torch.Tensor,
    dgamma: torch.Tensor | None,
    dbeta: torch.Tensor | None,
) -> None:
    """Launches :func:`bn_gradients`.

    With ``sum dz`` and ``sum dz * c`` of all parts, M = ``count`` and the rows of ``stats``:

        dbeta = sum dz        dgamma = (sum dz * c - mean * dbeta) * rstd
        g1 = scale            g3 = -scale * rstd * dgamma / M        g2 = -scale * dbeta / M - g3 * mean

    Args:
        parts: ``[P, 2, C]`` fp32 dense.
        stats: ``[5, C]`` fp32 dense: mean, biased variance, rstd, scale, shift.
        count: pixels that the statistics were taken of; 0 says that the statistics are constants (``g2 = g3 = 0``).
        g: ``[3, C]`` fp32 dense.
        dgamma, dbeta: ``[C]`` or None.
    """
    p, _, c = parts.shape
    if c == 0:
        return
    bn = min(32, next_power_of_two(c))
    count_launch("bn_gradients")
    bn_gradients[(cdiv(c, bn),)](
        parts, stats, g, dgamma, dbeta, p, count, C=c, CONSTANT=count == 0, BP=32, BN=bn, num_warps=4
    )

"""Batch statistics of a 1x1 convolution's output, and their backward, from the second moments of its input.

With ``c = h w^T`` over M pixels, where neither ``c`` nor its gradient is ever stored, and

    s1 = sum over pixels of h        mu = s1 / M        S = sum over pixels of h h^T - M mu mu^T   (s2, centred)

forward:

    mean_k = w_k . mu        var_k = w_k^T S w_k / M
    rstd = 1 / sqrt(var + eps)        scale = gamma * rstd        shift = beta - mean * scale

backward, with the gradient ``d`` of BN's output, ``g = d^T h`` and ``sdz = sum over pixels of d``:

    G = g - sdz mu^T         dbeta = sdz                    dgamma_k = rstd_k * (w_k . G_k)
    BN's gradient is  dc = g1 * d + g2 + g3 * c  with  g1 = scale,  g3 = -scale * rstd * dgamma / M,  so
    dw = g1 * G + g3 * (w S)
    dh = d wp + h Q + v      wp = g1 * w      Q = w^T diag(g3) w      v: what makes the mean of dh over the pixels zero

Both second moments are centred *before* they are multiplied: the differences are small where channels are correlated or
far from zero, and their rounding would be multiplied with them. ``v`` follows the rounded ``wp`` and ``Q``, so that the
roundings of these two meet ``d`` and ``h`` without their means. ``Q``'s diagonal is not rounded at all: its part of
dh_j goes with h_j, and so does the ReLU's mask behind it.

All sums run in a fixed order. Matrices are dense, K filters by C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .geometry import cdiv
from .launch import count as count_launch

#: Errors of an entry of ``s2`` after its accumulation in fp32, in units of 2^-23 of the entry. A tensor core truncates:
#: a few hundred steps into one accumulator make about a hundred, most of them common to all entries.
ULPS = 64
#: Relative error of ``var + eps`` above which the statistics are doubtful.
DOUBTFUL = 1e-3


@triton.jit
def mean_parts(s1, c, C: tl.constexpr, count):
    """The means of the channels ``c`` as the sum of two fp32 numbers."""
    mean = tl.load(s1 + c, mask=c < C, other=0.0).to(tl.float64) / tl.cast(count, tl.float64)
    high = mean.to(tl.float32)
    return high, (mean - high.to(tl.float64)).to(tl.float32)


@triton.jit
def less_product(value, factor, high, low):
    """``value - factor * (high + low)``: fused, so that cancellation leaves no rounding of the product behind."""
    return tl.fma(-factor, low, tl.fma(-factor, high, value))


@triton.jit
def rows_of(w, k, c, K: tl.constexpr, C: tl.constexpr):
    """``w[k, c]``, 0 outside, as stored."""
    return tl.load(w + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def dot_with_filters(filters, right, acc, EXACT: tl.constexpr):
    """``acc + filters @ right`` of fp32 blocks. EXACT: TF32 holds the filters, so two TF32 products suffice."""
    if EXACT:
        high = (right.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the 11 bits of TF32
        acc = tl.dot(filters, high, acc, input_precision="tf32")
        return tl.dot(filters, right - high, acc, input_precision="tf32")
    return tl.dot(filters, right, acc, input_precision="ieee")


@triton.jit
def times_centred(
    w, s2, s1, k, j, count, K: tl.constexpr, C: tl.constexpr, GUARD: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """``(w S)[k, j]``, and if GUARD ``(w^2 (s2/M)^2)[k, j]`` with elementwise squares, roughly.

    S is symmetric: its rows are read as columns, which is how a tensor core wants fp32 numbers.
    """
    high, low = mean_parts(s1, j, C, count)
    product = tl.zeros((k.shape[0], j.shape[0]), tl.float32)
    squares = tl.zeros((k.shape[0], j.shape[0]), tl.float32)
    inverse = 1.0 / tl.cast(count, tl.float32)
    for start in range(0, C, BK):
        i = start + tl.arange(0, BK)
        filters = rows_of(w, k, i, K, C).to(tl.float32)
        moments = rows_of(s2, j, i, C, C)
        total = tl.load(s1 + i, mask=i < C, other=0.0)
        centred = less_product(moments, total[None, :], high[:, None], low[:, None])
        product = dot_with_filters(filters, tl.trans(centred), product, w.dtype.element_ty != tl.float32)
        if GUARD:
            moments *= inverse
            moments = tl.trans((moments * moments).to(tl.bfloat16))
            squares = tl.dot((filters * filters).to(tl.bfloat16), moments, squares)
    return product, squares


@triton.jit
def gram_products(
    w, s2, s1, parts, count, K: tl.constexpr, C: tl.constexpr, GUARD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BM filters times BN channels: their parts of ``M mean``, ``M var`` and, if GUARD, of the squared errors."""
    blocks = tl.cdiv(C, BN)
    part = tl.program_id(0) % blocks
    k = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    j = part * BN + tl.arange(0, BN)
    product, squares = times_centred(w, s2, s1, k, j, count, K, C, GUARD, BK)
    filters = rows_of(w, k, j, K, C).to(tl.float32)
    total = tl.load(s1 + j, mask=j < C, other=0.0).to(tl.float64)
    out = parts + part * (3 * K) + k
    tl.store(out, tl.sum(filters.to(tl.float64) * total[None, :], 1), mask=k < K)
    tl.store(out + K, tl.sum(filters.to(tl.float64) * product.to(tl.float64), 1), mask=k < K)
    if GUARD:
        tl.store(out + 2 * K, tl.sum(filters * filters * squares, 1).to(tl.float64), mask=k < K)


@triton.jit
def gram_stats(
    parts, gamma, beta, stats, doubtful, PARTS, count, eps, ERROR, K: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """The statistics of BM filters. ERROR: relative to an entry of ``s2``, over the one allowed of ``var + eps``."""
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = k < K
    mean = tl.zeros((BM,), tl.float64)
    var = tl.zeros((BM,), tl.float64)
    spread = tl.zeros((BM,), tl.float64)
    for part in range(0, PARTS):
        of = parts + part * (3 * K) + k
        mean += tl.load(of, mask=inside, other=0.0)
        var += tl.load(of + K, mask=inside, other=0.0)
        if doubtful is not None:
            spread += tl.load(of + 2 * K, mask=inside, other=0.0)
    pixels = tl.cast(count, tl.float64)
    mean = (mean / pixels).to(tl.float32)
    var = tl.maximum((var / pixels).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    eps = tl.cast(eps, tl.float32)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    scale = rstd
    if gamma is not None:
        scale *= tl.load(gamma + k, mask=inside, other=0.0).to(tl.float32)
    shift = -mean * scale
    if beta is not None:
        shift = tl.fma(-mean, scale, tl.load(beta + k, mask=inside, other=0.0).to(tl.float32))
    tl.store(stats + k, mean, mask=inside)
    tl.store(stats + K + k, var, mask=inside)
    tl.store(stats + 2 * K + k, rstd, mask=inside)
    tl.store(stats + 3 * K + k, scale, mask=inside)
    tl.store(stats + 4 * K + k, shift, mask=inside)
    if doubtful is not None:
        # independent errors of the entries add in squares; a common one scales the whole second moment
        error = tl.cast(ERROR, tl.float32) * (tl.sqrt(spread.to(tl.float32)) + mean * mean)
        found = tl.max(((error > var + eps) & inside).to(tl.int32), 0)
        tl.store(doubtful, 1, mask=found != 0)


@triton.jit
def gram_rows(
    w, g, sdz, s1, stats, dgamma, dbeta, g3, wp, count, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """What BM filters have without products: ``dgamma``, ``dbeta``, ``g3`` and ``wp``."""
    k = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = k < K
    d = tl.load(sdz + k, mask=inside, other=0.0)
    scale = tl.load(stats + 3 * K + k, mask=inside, other=0.0)
    total = tl.zeros((BM,), tl.float64)
    for start in range(0, C, BN):
        j = start + tl.arange(0, BN)
        high, low = mean_parts(s1, j, C, count)
        centred = less_product(rows_of(g, k, j, K, C), d[:, None], high[None, :], low[None, :])
        filters = rows_of(w, k, j, K, C).to(tl.float32)
        total += tl.sum(filters.to(tl.float64) * centred.to(tl.float64), 1)
        stored = inside[:, None] & (j < C)[None, :]
        tl.store(wp + k[:, None] * C + j[None, :], (scale[:, None] * filters).to(wp.dtype.element_ty), mask=stored)
    rstd = tl.load(stats + 2 * K + k, mask=inside, other=0.0)
    dg = (rstd.to(tl.float64) * total).to(tl.float32)
    tl.store(dgamma + k, dg, mask=inside)
    tl.store(dbeta + k, d, mask=inside)
    tl.store(g3 + k, tl.div_rn(-scale * rstd * dg, tl.cast(count, tl.float32)), mask=inside)


@triton.jit
def gram_dw(
    w, g, sdz, s2, s1, stats, g3, dw, count, K: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of ``dw = g1 * G + g3 * (w S)``."""
    blocks = tl.cdiv(C, BN)
    k = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    j = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    inside = k < K
    product, _ = times_centred(w, s2, s1, k, j, count, K, C, False, BK)
    d = tl.load(sdz + k, mask=inside, other=0.0)
    scale = tl.load(stats + 3 * K + k, mask=inside, other=0.0)
    third = tl.load(g3 + k, mask=inside, other=0.0)
    high, low = mean_parts(s1, j, C, count)
    centred = less_product(rows_of(g, k, j, K, C), d[:, None], high[None, :], low[None, :])
    out = tl.fma(scale[:, None] + tl.zeros_like(centred), centred, third[:, None] * product)
    tl.store(dw + k[:, None] * C + j[None, :], out, mask=inside[:, None] & (j < C)[None, :])


@triton.jit
def gram_matrix(
    w, g3, q, K: tl.constexpr, C: tl.constexpr, TERMS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """A tile of ``Q = w^T diag(g3) w``. TERMS: its products with 16-bit filters are as exact as one in fp32.

    Three bf16 hold an fp32 number. Tensor cores read 16-bit filters in either direction: none is transposed, and only
    the narrow side of a tile is multiplied and split. TF32 holds fp16, in two terms; fp32 is multiplied as it is.
    """
    blocks = tl.cdiv(C, BN)
    i = tl.program_id(0) // blocks * BM + tl.arange(0, BM)
    j = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        left = tl.trans(rows_of(w, k, i, K, C))
        right = rows_of(w, k, j, K, C).to(tl.float32) * tl.load(g3 + k, mask=k < K, other=0.0)[:, None]
        if TERMS == 3:
            for _ in tl.static_range(3):
                term = right.to(tl.bfloat16)
                acc = tl.dot(left, term, acc)
                right -= term.to(tl.float32)
        else:
            acc = dot_with_filters(left.to(tl.float32), right, acc, w.dtype.element_ty != tl.float32)
    tl.store(q + i[:, None] * C + j[None, :], acc, mask=(i < C)[:, None] & (j < C)[None, :])


@triton.jit
def gram_columns(
    q, wp, sdz, s1, mm, rho, v, count, K: tl.constexpr, C: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr
):
    """BC columns of ``Q``: as ``mm * rho``, and their ``v``."""
    j = tl.program_id(0) * BC + tl.arange(0, BC)
    magnitude = tl.zeros((BR, BC), tl.float32)
    for start in range(0, C, BR):
        magnitude = tl.maximum(magnitude, tl.abs(rows_of(q, start + tl.arange(0, BR), j, C, C)))
    largest = tl.max(magnitude, 0)
    # biased exponents of the power of two and of its inverse, both kept normal
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) + 1, 1), 253)
    exponent = tl.where(largest == 0.0, 127, exponent)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    # a column whose diagonal counts is scaled such that this is not rounded: the error would not meet h_j's mean alone,
    # but the ReLU's mask of h_j, and sums over the masked pixels would keep it
    diagonal = tl.load(q + j * C + j, mask=j < C, other=0.0)
    held = (diagonal * inverse).to(mm.dtype.element_ty).to(tl.float32)
    counts = (tl.abs(held) >= 2.0**-10) & (tl.abs(held) <= 1.0)
    scale = tl.where(counts, tl.div_rn(diagonal, tl.where(counts, held, 1.0)), scale)
    inverse = tl.where(counts, 1.0 / scale, inverse)
    total = tl.zeros((BR, BC), tl.float64)
    for start in range(0, C, BR):
        i = start + tl.arange(0, BR)
        column = (rows_of(q, i, j, C, C) * inverse[None, :]).to(mm.dtype.element_ty)
        tl.store(mm + i[:, None] * C + j[None, :], column, mask=(i < C)[:, None] & (j < C)[None, :])
        factor = tl.load(s1 + i, mask=i < C, other=0.0).to(tl.float64)
        total += factor[:, None] * column.to(tl.float32).to(tl.float64)
    total *= scale.to(tl.float64)[None, :]
    for start in range(0, K, BR):
        k = start + tl.arange(0, BR)
        factor = tl.load(sdz + k, mask=k < K, other=0.0).to(tl.float64)
        total += factor[:, None] * rows_of(wp, k, j, K, C).to(tl.float32).to(tl.float64)
    tl.store(rho + j, scale, mask=j < C)
    tl.store(v + j, (-tl.sum(total, 0) / tl.cast(count, tl.float64)).to(tl.float32), mask=j < C)


def _side(size: int, largest: int) -> int:
    """Side of a tile along a dimension of ``size``."""
    return min(largest, max(16, next_power_of_two(size)))


def _tile(w: torch.Tensor) -> dict[str, int]:
    """Tile of ``w S``: each program centres and splits its part of S again, so tiles are large."""
    k, c = w.shape
    rows, depth = (32, 16) if w.element_size() == 4 else (128, 32)
    return {"BM": _side(k, rows), "BN": _side(c, 64), "BK": _side(c, depth)}


def _warps(tile: dict[str, int]) -> int:
    """Warps for such a tile."""
    return 8 if tile["BM"] * tile["BN"] > 4096 else 4


def launch_gram_stats(
    w: torch.Tensor,
    s2: torch.Tensor,
    s1: torch.Tensor,
    count: int,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    stats: torch.Tensor,
    doubtful: torch.Tensor | None = None,
) -> None:
    """Launches :func:`gram_products` and :func:`gram_stats`: BN's statistics of ``h w^T`` without computing it.

    Args:
        w: ``[K, C]``, dtype of the activations.
        s2: ``[C, C]`` fp32, sum of ``h h^T`` over the pixels, not centred.
        s1: ``[C]`` fp32, sum of ``h``.
        count: pixels.
        gamma, beta: ``[K]`` or None (1 and 0).
        eps: added to the variance.
        stats: ``[5, K]`` fp32, gets mean, biased variance (at least 0), rstd, scale and shift.
        doubtful: int32 ``[1]`` or None. Set to 1 where the rounding of ``s2`` may have changed some ``var + eps`` by
            more than about 1e-3 of itself, else left as it is: zero it once, and several launches may share it.
    """
    k, c = w.shape
    if w.numel() == 0:
        return
    tile = _tile(w)
    blocks = cdiv(c, tile["BN"])
    parts = torch.empty((blocks, 3, k), dtype=torch.float64, device=w.device)
    count_launch("gram_products")
    gram_products[(cdiv(k, tile["BM"]) * blocks,)](
        w, s2, s1, parts, count, K=k, C=c, GUARD=doubtful is not None, **tile, num_warps=_warps(tile)
    )
    count_launch("gram_stats")
    gram_stats[(cdiv(k, 128),)](
        parts, gamma, beta, stats, doubtful, blocks, count, float(eps), ULPS * 2.0**-23 / DOUBTFUL, K=k, BM=128,
        num_warps=4,
    )  # fmt: skip


def launch_gram_backward(
    w: torch.Tensor,
    g: torch.Tensor,
    sdz: torch.Tensor,
    s2: torch.Tensor,
    s1: torch.Tensor,
    count: int,
    stats: torch.Tensor,
    dw: torch.Tensor,
    dgamma: torch.Tensor,
    dbeta: torch.Tensor,
    wp: torch.Tensor,
    mm: torch.Tensor,
    rho: torch.Tensor,
    v: torch.Tensor,
) -> None:
    """Launches the backward of ``bn(h w^T)``: the parameters' gradients, and the factors of ``dh``.

    ``dh = d wp + (h mm) * rho + v`` with the gradient ``d`` of BN's output.

    Args:
        w: ``[K, C]``, dtype of the activations.
        g: ``[K, C]`` fp32, ``d^T h``.
        sdz: ``[K]`` fp32, sum of ``d`` over the pixels.
        s2, s1, count: as for :func:`launch_gram_stats`.
        stats: ``[5, K]`` as it wrote them.
        dw: ``[K, C]`` fp32, the gradient of ``w``.
        dgamma, dbeta: ``[K]`` fp32.
        wp: ``[K, C]``, dtype of ``w``.
        mm: ``[C, C]``, dtype of ``w``; the largest magnitude of a column is about 0.5 to 1 (or the column is 0).
        rho: ``[C]`` fp32, near a power of two for each column, such that ``mm * rho`` has the exact diagonal.
        v: ``[C]`` fp32.
    """
    k, c = w.shape
    if w.numel() == 0:
        return
    tile = _tile(w)
    q = torch.empty((c, c), dtype=torch.float32, device=w.device)
    g3 = torch.empty(k, dtype=torch.float32, device=w.device)
    count_launch("gram_rows")
    gram_rows[(cdiv(k, 8),)](
        w, g, sdz, s1, stats, dgamma, dbeta, g3, wp, count, K=k, C=c, BM=8, BN=_side(c, 256), num_warps=4
    )
    count_launch("gram_dw")
    gram_dw[(cdiv(k, tile["BM"]) * cdiv(c, tile["BN"]),)](
        w, g, sdz, s2, s1, stats, g3, dw, count, K=k, C=c, **tile, num_warps=_warps(tile)
    )
    bm, bn = _side(c, 32 if w.element_size() == 4 else 128), _side(c, 32)
    terms = 3 if w.dtype == torch.bfloat16 else 2
    count_launch("gram_matrix")
    gram_matrix[(cdiv(c, bm) * cdiv(c, bn),)](
        w, g3, q, K=k, C=c, TERMS=terms, BM=bm, BN=bn, BK=128 // w.element_size(), num_warps=4
    )
    count_launch("gram_columns")
    gram_columns[(cdiv(c, 16),)](q, wp, sdz, s1, mm, rho, v, count, K=k, C=c, BC=16, BR=64, num_warps=4)

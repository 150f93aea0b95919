"""Statistics of a convolution output that a library computed: one pass that reads it once.

    parts[i,:,k] = count, mean and M2 of the i-th program's rows of c[:, k]

M2 is the sum of squared deviations from the mean. Deviations are first taken from a pivot, the mean of the program's
first rows; then a mean far from zero costs no digits. Nor does a pivot far from the mean: the rows that it comes from
make the variance as large as its distance. Each thread adds on its own, and they meet once, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .geometry import cdiv
from .launch import count

#: Values of a tile, its most columns, programs that fill the GPU several times, and warps of a program.
TILE, MOST_COLUMNS, PROGRAMS, WARPS = 4096, 128, 528, 4


@triton.jit
def quotient(a, n):
    """``a / n`` of a block and a scalar in fp32 to all digits, with one division."""
    reciprocal = tl.div_rn(1.0, n)
    q = a * reciprocal
    return tl.fma(tl.fma(-q, n, a), reciprocal, q)


@triton.jit
def from_pivot(number, pivot, total, squares):
    """Mean and M2 of ``number`` values from the sums of their deviations from ``pivot`` and of the squares of these."""
    drift = quotient(total, tl.maximum(number, 1.0))
    return pivot + drift, tl.maximum(squares - total * drift, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def moments(c, parts, M, ROWS, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """``ROWS`` rows, a multiple of BM, times BN columns of a dense ``[M, K]``."""
    column_blocks = tl.cdiv(K, BN)
    part = tl.program_id(0) // column_blocks
    k = tl.program_id(0) % column_blocks * BN + tl.arange(0, BN)
    rows = tl.minimum(ROWS, M - part * ROWS)
    c += part.to(tl.int64) * ROWS * K  # one 64-bit scalar; the lanes stay 32-bit
    row = tl.arange(0, BM)
    offset = row[:, None] * K + k[None, :]
    column = (k < K)[None, :]
    first = tl.load(c + offset, mask=(row < rows)[:, None] & column, other=0.0).to(tl.float32)
    pivot = quotient(tl.sum(first, 0), tl.minimum(rows, BM).to(tl.float32))
    sums = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BM, BN), tl.float32)
    for m in tl.range(0, rows, BM, num_stages=3):
        inside = (row < rows - m)[:, None] & column
        value = tl.load(c + offset, mask=inside, other=0.0).to(tl.float32)
        c += BM * K
        deviation = tl.where(inside, value - pivot[None, :], 0.0)
        sums += deviation
        squares += deviation * deviation
    number = rows.to(tl.float32)
    mean, m2 = from_pivot(number, pivot, tl.sum(sums, 0), tl.sum(squares, 0))
    parts += part * 3 * K + k
    tl.store(parts, tl.zeros((BN,), tl.float32) + number, mask=k < K)
    tl.store(parts + K, mean, mask=k < K)
    tl.store(parts + 2 * K, m2, mask=k < K)


def tiling(m: int, k: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and the rows of a program."""
    bn = min(MOST_COLUMNS, max(8, next_power_of_two(k)))
    bm = TILE // bn
    tiles = cdiv(m, bm)
    return bm, bn, bm * cdiv(tiles, max(1, PROGRAMS // cdiv(k, bn)))


def moments_parts(m: int, k: int) -> int:
    """Parts that :func:`launch_moments` writes for ``[M, K]``."""
    return cdiv(m, tiling(m, k)[2])


def launch_moments(c: torch.Tensor, parts: torch.Tensor) -> None:
    """Launches :func:`moments`.

    Args:
        c: ``[M, K]`` dense, fp16, bf16 or fp32; M at least 1.
        parts: ``[moments_parts(M, K), 3, K]`` dense fp32 for count, mean and M2 of the rows of each part.
    """
    m, k = c.shape
    bm, bn, rows = tiling(m, k)
    count("moments")
    moments[(moments_parts(m, k) * cdiv(k, bn),)](c, parts, m, rows, K=k, BM=bm, BN=bn, num_warps=WARPS)

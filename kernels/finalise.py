"""The statistics of a batch from its parts, and what batch normalisation makes of them.

    n    = sum of n_i         mean = sum of n_i * mean_i / n
    M2   = sum of M2_i + n_i * (mean_i - mean)^2        var = M2 / n
    rstd = 1 / sqrt(var + eps)     scale = gamma * rstd     shift = beta - mean * scale

The parts are (count, mean, M2) of disjoint sets of pixels. They are added in fp64 in an order that depends on their
number alone. No difference of large numbers occurs: a variance is never negative, nor lost beside a large mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .geometry import cdiv
from .launch import count

#: Columns of a program, one sector of device memory, and the most parts that it reads at once.
COLUMNS, MOST_ROWS = 8, 512


@triton.jit
def part(parts, i, k, PARTS, K):
    """Count and mean of the parts ``i`` (fp64) and their M2; those without values are zero, whatever they hold."""
    offset = i[:, None] * 3 * K + k[None, :]
    inside = (i < PARTS)[:, None] & (k < K)[None, :]
    number = tl.load(parts + offset, mask=inside, other=0.0).to(tl.float64)
    inside = inside & (number != 0.0)
    mean = tl.load(parts + offset + K, mask=inside, other=0.0).to(tl.float64)
    m2 = tl.load(parts + offset + 2 * K, mask=inside, other=0.0).to(tl.float64)
    return number, mean, m2


@triton.jit
def finalise(parts, gamma, beta, eps, stats, moments, PARTS, K, BP: tl.constexpr, BN: tl.constexpr):
    """BN channels. parts [PARTS,3,K], stats [5,K], moments [3,K] or None, all dense fp32."""
    k = tl.program_id(0) * BN + tl.arange(0, BN)
    count = tl.zeros((BP, BN), tl.float64)
    total = tl.zeros((BP, BN), tl.float64)
    for i in range(0, PARTS, BP):
        number, mean, _ = part(parts, i + tl.arange(0, BP), k, PARTS, K)
        count += number
        total += number * mean
    n = tl.sum(count, 0)
    grand = tl.sum(total, 0) / n
    squares = tl.zeros((BP, BN), tl.float64)
    for i in range(0, PARTS, BP):
        number, mean, m2 = part(parts, i + tl.arange(0, BP), k, PARTS, K)
        delta = mean - grand[None, :]
        squares += m2 + number * delta * delta
    m2 = tl.sum(squares, 0)
    inside = k < K
    if moments is not None:
        tl.store(moments + k, n.to(tl.float32), mask=inside)
        tl.store(moments + K + k, grand.to(tl.float32), mask=inside)
        tl.store(moments + 2 * K + k, m2.to(tl.float32), mask=inside)
    var = m2 / n
    rstd = 1.0 / tl.sqrt(var + tl.cast(eps, tl.float32))
    scale = rstd
    if gamma is not None:
        scale *= tl.load(gamma + k, mask=inside, other=0.0).to(tl.float64)
    scale = scale.to(tl.float32)
    # from the scale as it is stored: the rounding of the scale then moves no value at the mean
    shift = -grand * scale.to(tl.float64)
    if beta is not None:
        shift += tl.load(beta + k, mask=inside, other=0.0).to(tl.float64)
    tl.store(stats + k, grand.to(tl.float32), mask=inside)
    tl.store(stats + K + k, var.to(tl.float32), mask=inside)
    tl.store(stats + 2 * K + k, rstd.to(tl.float32), mask=inside)
    tl.store(stats + 3 * K + k, scale, mask=inside)
    tl.store(stats + 4 * K + k, shift.to(tl.float32), mask=inside)


def launch_finalise(
    parts: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    stats: torch.Tensor,
    moments: torch.Tensor | None = None,
) -> None:
    """Launches :func:`finalise`.

    Args:
        parts: ``[P,3,K]`` dense fp32: count, mean, M2 of each part. A part whose count is 0 is not looked at. At least
            one count must not be 0: statistics of nothing are NaN.
        gamma, beta: dense ``[K]`` of any float dtype, or None (1 and 0).
        eps: added to the variance.
        stats: ``[5,K]`` dense fp32 for mean, var (biased), rstd, scale, shift.
        moments: ``[3,K]`` dense fp32 for count, mean, M2 of all parts together, or None. Those of several processes,
            stacked, are parts again.
    """
    number, _, k = parts.shape
    rows = max(2, min(MOST_ROWS, next_power_of_two(number)))
    count("finalise")
    finalise[(cdiv(k, COLUMNS),)](
        parts, gamma, beta, float(eps), stats, moments, number, k, BP=rows, BN=COLUMNS, num_warps=4
    )

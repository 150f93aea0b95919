"""Statistics of a batch from its parts: exact, at large means, with parts without values, merged in two levels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels import launch
from resnet_triton.kernels.finalise import MOST_ROWS, launch_finalise
from tests.cases import EPS, Guarded, integers
from tests.comparers import identical, no_worse_than


def run(parts: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``stats`` and ``moments``; no stray element is written or used."""
    guarded, k = Guarded(), parts.shape[-1]
    stats = guarded.output(5, k, dtype=torch.float32)
    moments = guarded.output(3, k, dtype=torch.float32)
    arguments = [guarded.input(t) for t in (parts, gamma, beta)]
    launch.COUNTS.clear()
    launch_finalise(*arguments, eps, stats, moments)
    assert launch.COUNTS == {"finalise": 1}
    guarded.verify()
    return stats, moments


def parts_of(rows: Tensor, sizes: list[int]) -> Tensor:
    """Count, mean and M2 (fp64, rounded to fp32) of consecutive rows; NaN but for the count where there are none."""
    counts, means = zip(*((len(v), v.mean(0)) for v in rows.double().split(sizes)), strict=True)
    squares = [(v - mean).square().sum(0) for v, mean in zip(rows.double().split(sizes), means, strict=True)]
    numbers = torch.tensor(counts, dtype=torch.float64)[:, None].expand(-1, rows.shape[1])
    return torch.stack((numbers, torch.stack(means), torch.stack(squares)), 1).float()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact(affine: bool, dtype: torch.dtype) -> None:
    # a column's values are its mean plus and minus its deviation, equally often
    k = 21
    mean, deviation = integers(k, low=-8, high=8), torch.arange(k) % 4 * 1.0
    signs = torch.tensor([1.0, -1, -1, 1, 1, -1, 1, 1, -1, -1, 1, -1, -1, 1, -1, 1])[:, None]
    rows = mean + deviation * signs
    eps = EPS
    rows[:, deviation == 3] = mean[deviation == 3]
    parts = parts_of(rows, [2, 4, 0, 8, 2])
    assert parts[2, 1].isnan().all()
    gamma, beta = (
        (integers(k, low=1, high=3).to(dtype), integers(k, low=-3, high=3).to(dtype)) if affine else (None,) * 2
    )
    stats, moments = run(parts, gamma, beta, eps)
    var = rows.double().var(0, False)
    rstd = (var + eps).rsqrt()
    scale = (rstd * (1.0 if gamma is None else gamma.double())).float()
    shift = -mean.double() * scale.double() + (0.0 if beta is None else beta.double())
    identical(stats, torch.stack([t.float() for t in (mean, var, rstd, scale, shift)]))
    identical(moments, torch.stack([torch.full((k,), 16.0), mean, (var * 16).float()]))


def test_close_at_a_large_mean() -> None:
    rows = torch.randn(700, 8) + 1000
    sizes = [3] * 100 + [4] * 100
    assert sum(sizes) == 700
    gamma, beta = torch.rand(8) + 0.5, torch.randn(8)
    stats, moments = run(parts_of(rows, sizes), gamma, beta, 1e-5)
    exact = rows.double()
    var, mean = torch.var_mean(exact, 0, correction=0)
    no_worse_than(stats[0], torch.mean(rows, 0), mean)
    # the parts hold rounded means: each variance is theirs to the last digit, and the rows' to theirs
    held = parts_of(rows, sizes).double()
    between = (held[:, 0] * (held[:, 1] - (held[:, 0] * held[:, 1]).sum(0) / 700).square() + held[:, 2]).sum(0)
    no_worse_than(moments[2], between.float(), between)
    no_worse_than(stats[1], (between / 700).float(), between / 700)
    assert ((stats[1] - var).abs() < 1e-3 * var).all()
    scale = (var + 1e-5).rsqrt() * gamma.double()
    shift = beta.double() - mean * scale
    rounded = exact * scale.float().double() + shift.float().double()
    ours = exact * stats[3].double() + stats[4].double()
    no_worse_than(ours.float(), rounded.float(), exact * scale + shift)


def test_moments_of_moments_and_many_parts() -> None:
    number = MOST_ROWS + 70  # two rounds
    parts = torch.stack((torch.full((number, 8), 2.0), integers(number, 8), 2 * integers(number, 8).abs()), 1)
    stats, moments = run(parts, None, None, 1e-5)
    exact = parts.double()
    mean = exact[:, 1].mean(0)
    m2 = (exact[:, 2] + 2 * (exact[:, 1] - mean).square()).sum(0)
    identical(moments, torch.stack((torch.full((8,), 2.0 * number), mean.float(), m2.float())))
    identical(stats[1], (m2 / (2 * number)).float())
    again, _ = run(parts, None, None, 1e-5)
    identical(again, stats)
    _, first = run(parts[:100].contiguous(), None, None, 1e-5)
    _, second = run(parts[100:].contiguous(), None, None, 1e-5)
    _, both = run(torch.stack((first, second)), None, None, 1e-5)
    no_worse_than(both, moments, torch.stack((torch.full_like(mean, 2.0 * number), mean, m2)))


def test_nan() -> None:
    parts = torch.stack((torch.full((3, 8), 4.0), integers(3, 8), torch.ones(3, 8)), 1)
    parts[1, 1, 2] = float("nan")
    parts[2, 2, 5] = float("inf")
    stats, moments = run(parts, None, None, 1e-5)
    assert stats[:, 2].isnan().all() and moments[1:, 2].isnan().all()
    assert stats[1, 5] == float("inf") and stats[2, 5] == 0
    rest = [0, 1, 3, 4, 6, 7]
    assert stats[:, rest].isfinite().all()

"""Statistics of a stored convolution output: exact, ragged ends, large means, a pivot far from the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels import launch
from resnet_triton.kernels import moments as module
from resnet_triton.kernels.moments import launch_moments, moments_parts, tiling
from tests.cases import Guarded, integers
from tests.comparers import identical, no_worse_than


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and few programs: several tiles a program from few rows."""
    monkeypatch.setattr(module, "TILE", 256)
    monkeypatch.setattr(module, "PROGRAMS", 4)


def run(c: Tensor) -> Tensor:
    """The parts; no stray element is written or used."""
    guarded = Guarded()
    parts = guarded.output(moments_parts(*c.shape), 3, c.shape[1], dtype=torch.float32)
    launch.COUNTS.clear()
    launch_moments(guarded.input(c), parts)
    assert launch.COUNTS == {"moments": 1}
    guarded.verify()
    return parts


def pieces(c: Tensor) -> list[Tensor]:
    """The rows of each part."""
    return list(c.split(tiling(*c.shape)[2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [16, 24, 200])
def test_exact(dtype: torch.dtype, k: int) -> None:
    bm = tiling(1, k)[0]
    m = 8 * bm if k < 128 else 4 * bm
    c = integers(m, k, dtype=dtype, low=-8, high=8)
    parts, split = run(c), pieces(c.double())
    assert len(parts) == len(split) > 1 and len(split[0]) > bm, "several parts of several tiles"
    expected = [torch.stack((torch.full((k,), len(v)), v.mean(0), v.var(0, False) * len(v))) for v in split]
    identical(parts, torch.stack(expected).float())
    identical(run(c), parts)


@pytest.mark.parametrize("m", [1, 37, 83])
def test_ragged(m: int) -> None:
    c = torch.randn(m, 24) + 5
    parts, split = run(c), pieces(c)
    assert len(parts) == len(split)
    for part, values in zip(parts, split, strict=True):
        exact, mean = values.double(), values.mean(0)
        identical(part[0], torch.full((24,), float(len(values))))
        no_worse_than(part[1], mean, exact.mean(0))
        no_worse_than(part[2], (values - mean).square().sum(0), exact.var(0, False) * len(values))


def test_large_mean() -> None:
    c = torch.randn(192, 16) + 1000
    for part, values in zip(run(c), pieces(c), strict=True):
        var, mean = torch.var_mean(values.double(), 0, correction=0)
        naive = values.mean(0)
        no_worse_than(part[1], naive, mean)
        no_worse_than(part[2] / part[0], (values - naive).square().mean(0), var)


def test_pivot_far_from_the_mean() -> None:
    """Most rows lie 1000 standard deviations from the first ones: the deviation as the network's dtype would see it."""
    c = torch.randn(192, 16) + 1000
    c[:16] -= 1000
    (part, *_), (values, *_) = run(c), pieces(c)
    deviation = values.double().std(0, False)
    assert deviation.min() > 100
    no_worse_than((part[2] / part[0]).sqrt().half(), deviation.half(), deviation)


def test_equal_values_have_no_variance_and_nan_propagates() -> None:
    c = torch.full((40, 16), 3.1)
    c[30, 2] = float("nan")
    c[31, 4] = float("inf")
    parts = run(c)
    others = [i for i in range(16) if i not in (2, 4)]
    identical(parts[:, 1, others], torch.full((len(parts), 14), 3.1))
    identical(parts[:, 2, others], torch.zeros(len(parts), 14))
    assert parts[:, 1:, [2, 4]].isnan().any(0).all()

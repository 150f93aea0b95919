"""The rolling training 3x3: outputs and statistics bit by bit, strips that begin anywhere, overhanging tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.conv_stats import conv_stats_configs, conv_stats_parts, launch_conv_stats
from resnet_triton.kernels.geometry import ConvShape, cdiv
from resnet_triton.kernels.prologue import Normalised
from tests.cases import Guarded
from tests.comparers import identical, no_worse_than
from tests.interpreter.test_conv_stats import BF16, FP32, HALF, Inputs, small


def same(n: int, h: int, w: int, c: int = 16, k: int = 16) -> ConvShape:
    return ConvShape(n, h, w, c, k, 3, 3, 1, 1)


def config_of(images: int, columns: int, bn: int = 16, c: int = 16) -> ConvConfig:
    return ConvConfig("conv_stats_rolling", (images, 1, columns), bn, c)


def parts_of(shape: ConvShape, config: ConvConfig, parts: int) -> Tensor:
    """The part of each output pixel, ``[N,P,Q]``: columns of tiles on top of each other, in equal strips."""
    tn, _, tw = config.box
    n, q = torch.arange(shape.n) // tn, torch.arange(shape.q) // tw
    column = n[:, None, None] * cdiv(shape.q, tw) + q
    rows = cdiv(cdiv(shape.n, tn) * cdiv(shape.q, tw) * (shape.p + 1), parts)
    return (column * (shape.p + 1) + torch.arange(shape.p)[:, None]) // rows


def run(inputs: Inputs, config: ConvConfig, parts: int | None) -> tuple[Tensor, Tensor | None]:
    """Output and statistics; only this kernel runs, and no stray element is written or used."""
    s, guarded = inputs.shape, Guarded()
    y = guarded.output(s.n, s.p, s.q, s.k, dtype=inputs.x.dtype)
    statistics = None if parts is None else guarded.output(parts, 3, s.k, dtype=FP32)
    prologue = None
    if inputs.scale is not None and inputs.shift is not None:
        prologue = Normalised(guarded.input(inputs.scale), guarded.input(inputs.shift))
    launch.COUNTS.clear()
    launch_conv_stats(guarded.input(inputs.x), guarded.input(inputs.w), y, statistics, s, prologue, config, "ieee")
    assert launch.COUNTS == {"conv_stats_rolling": 1}
    guarded.verify()
    return y, statistics


@pytest.mark.parametrize(
    ("shape", "config", "parts", "dtype", "prologue"),
    [
        (same(2, 4, 16), config_of(2, 8), 2, BF16, True),  # a strip is a column of tiles
        (same(2, 4, 16), config_of(2, 8), 5, HALF, True),  # of two rows: the last is a separating one alone
        (same(4, 4, 4, 32, 24), config_of(4, 4, c=32), 2, BF16, True),  # a column block overhangs
        (same(2, 4, 8), config_of(2, 8), 1, FP32, True),
        (same(2, 4, 8), config_of(2, 8), 1, HALF, False),
    ],
    ids=str,
)
def test_exact(shape: ConvShape, config: ConvConfig, parts: int, dtype: torch.dtype, prologue: bool) -> None:
    inputs = small(shape, dtype, prologue)
    y, statistics = run(inputs, config, parts)
    expected = inputs.expected().to(dtype)
    identical(y, expected)
    check_statistics(statistics, expected, parts_of(shape, config, parts))
    assert expected.count_nonzero() > expected.numel() / 2, "the case tests nothing"


def check_statistics(statistics: Tensor, y: Tensor, part: Tensor) -> None:
    """Counts are exact, parts without pixels are zero, and the rest is as close as fp32 sums of the same pixels."""
    counts = torch.stack([(part == i).sum() for i in range(len(statistics))])
    identical(statistics[:, 0], counts[:, None].expand(-1, statistics.shape[2]).float())
    assert not statistics[counts == 0].any()
    filled = [y[part == i] for i in range(len(statistics)) if counts[i]]
    for row, reduce in ((1, lambda v: v.mean(0)), (2, lambda v: (v - v.mean(0)).square().sum(0))):
        eager, reference = (torch.stack([reduce(v.to(dtype)) for v in filled]) for dtype in (FP32, torch.float64))
        no_worse_than(statistics[counts > 0, row], eager, reference)


@pytest.mark.parametrize(
    ("shape", "config", "parts", "prologue"),
    [
        (same(3, 5, 11), config_of(2, 8), 5, True),  # images and columns overhang, strips cross columns of tiles
        (same(5, 3, 10), config_of(2, 8), 2, False),  # a strip is three columns
        (same(3, 2, 3), config_of(16, 1), 4, True),  # most images of a tile are beyond the last
        (same(1, 1, 1), config_of(1, 16), 3, True),  # one pixel
    ],
    ids=str,
)
def test_overhang(shape: ConvShape, config: ConvConfig, parts: int, prologue: bool) -> None:
    inputs = small(shape, HALF, prologue)
    inputs.x += 1  # what lies outside differs from the mean
    y, statistics = run(inputs, config, parts)
    expected = inputs.expected().to(HALF)
    identical(y, expected)
    check_statistics(statistics, expected, parts_of(shape, config, parts))
    assert statistics[:, 0].sum() == shape.m * shape.k


def test_equal_outputs_have_no_variance_and_parts_may_be_none() -> None:
    shape = same(3, 3, 5)
    inputs = small(shape, HALF, True)
    inputs.w[:, :1], inputs.w[:, 2:], inputs.w[:, :, :1], inputs.w[:, :, 2:] = 0, 0, 0, 0  # the middle tap alone
    inputs.x.fill_(3)
    y, statistics = run(inputs, config_of(2, 8), 2)
    identical(statistics[:, 1], y[0, 0, :2].float())
    identical(statistics[:, 2], torch.zeros(2, 16))
    without, _ = run(inputs, config_of(2, 8), None)
    identical(without, y)


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_close(dtype: torch.dtype) -> None:
    shape = same(2, 3, 6, 32)
    x, w = torch.randn(2, 3, 6, 32).to(dtype), (torch.randn(16, 3, 3, 32) / 17).to(dtype)
    inputs, config = Inputs(shape, x, w, torch.rand(32) + 0.5, torch.randn(32) / 2), config_of(2, 8, c=32)
    y, statistics = run(inputs, config, 2)
    no_worse_than(y, inputs.expected(dtype), inputs.expected())
    check_statistics(statistics, y, parts_of(shape, config, 2))
    again, repeated = run(inputs, config, 2)
    identical(again, y)
    identical(repeated, statistics)


def test_large_mean() -> None:
    shape = same(2, 6, 6)
    x, w = torch.randn(2, 6, 6, 16), torch.zeros(16, 3, 3, 16)
    x[..., 0] = 1000.0
    w[:, 1, 1, 0] = 1.0
    w[torch.arange(1, 16), 1, 1, torch.arange(1, 16)] = 1.0
    y, statistics = run(Inputs(shape, x, w), config_of(2, 8), 1)
    var, mean = torch.var_mean(y.view(-1, 16).double(), 0, correction=0)
    eager = torch.var_mean(y.view(-1, 16), 0, correction=0)
    assert mean.min() > 999 and var[1:].min() > 0.5
    no_worse_than(statistics[0, 1], eager[1], mean)
    no_worse_than(statistics[0, 2] / statistics[0, 0], eager[0], var)


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_nan_reaches_its_neighbours_only(dtype: torch.dtype) -> None:
    """What is left in the accumulators at the end of a column of tiles must not reach the next column."""
    inputs = small(same(2, 4, 8), dtype, True)
    inputs.x[0, 3, 7, 3] = float("nan")  # the last row
    y, statistics = run(inputs, config_of(1, 16), 2)
    expected = torch.zeros(2, 4, 8, 1, dtype=torch.bool)
    expected[0, 2:, 6:] = True
    identical(y.isnan(), expected.expand(2, 4, 8, 16))
    assert statistics[0, 1:].isnan().all() and statistics[1:].isfinite().all()


def test_refusals() -> None:
    for shape, config, message in (
        (ConvShape(1, 4, 4, 16, 16, 3, 3, 2, 1), config_of(1, 16), "stride 1, padding 1 and dilation 1"),
        (ConvShape(1, 4, 4, 16, 16), config_of(1, 16), "3x3 convolutions"),
        (same(1, 4, 4, 32), config_of(1, 16), "bk=C"),
        (same(1, 4, 4), ConvConfig("conv_stats_rolling", (1, 4, 4), 16, 16), "boxes of one row"),
    ):
        x, w, y = (torch.empty(size, dtype=HALF) for size in ((1, 4, 4, shape.c), (16, 3, 3, shape.c), (1,)))
        with pytest.raises(ValueError, match=message):
            launch_conv_stats(x, w, y, None, shape, None, config, "ieee")


def test_offered_for_64_channels_and_long_strips() -> None:
    shape = same(256, 56, 56, 64, 64)
    (rolling, *others) = conv_stats_configs(shape, 2, True)
    assert rolling.kernel == "conv_stats_rolling" and {c.kernel for c in others} == {"conv_stats"}
    assert conv_stats_parts(shape, rolling) <= 264
    for other, itemsize in ((shape, 4), (same(256, 28, 28, 128, 128), 2), (same(1, 56, 56, 64, 64), 2)):
        assert {c.kernel for c in conv_stats_configs(other, itemsize, True)} == {"conv_stats"}

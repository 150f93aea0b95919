"""The training convolution: outputs and statistics bit by bit, prologue, padding, overhanging tiles, large means."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.conv_stats import conv_stats_configs, conv_stats_parts, launch_conv_stats
from resnet_triton.kernels.geometry import ConvShape, cdiv
from resnet_triton.kernels.prologue import Normalised
from tests.cases import Guarded, integers
from tests.comparers import identical, no_worse_than

HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


@dataclass
class Inputs:
    """A convolution's operands; ``scale, shift`` None: no prologue."""

    shape: ConvShape
    x: Tensor
    w: Tensor
    scale: Tensor | None = None
    shift: Tensor | None = None

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The output ``[N,P,Q,K]``, computed in ``dtype``, from ``h`` rounded to the dtype of x."""
        s, h = self.shape, self.x
        if self.scale is not None and self.shift is not None:
            h = torch.addcmul(self.shift.double(), h.double(), self.scale.double()).relu().to(h.dtype)
        nchw = (t.permute(0, 3, 1, 2).to(dtype) for t in (h, self.w))
        return F.conv2d(*nchw, None, s.stride, s.padding, s.dilation).permute(0, 2, 3, 1)


def small(shape: ConvShape, dtype: torch.dtype, prologue: bool) -> Inputs:
    """Integers so small that the statistics of 2^n pixels are exact too."""
    x = integers(shape.n, shape.h, shape.w, shape.c, dtype=dtype, low=-1, high=1)
    w = integers(shape.k, shape.r, shape.s, shape.c, dtype=dtype, low=-1, high=1)
    if not prologue:
        return Inputs(shape, x, w)
    # h is 0, 1 or 2; where the padding took part before the ReLU, it would be 1
    return Inputs(shape, x, w, integers(shape.c, low=-1, high=1), torch.ones(shape.c))


def parts_of(shape: ConvShape, config: ConvConfig, parts: int) -> Tensor:
    """The part of each output pixel, ``[N,P,Q]``, from the definition of the static map."""
    if shape.pointwise:
        return torch.arange(shape.m).div(config.bm, rounding_mode="floor").view(shape.n, shape.p, shape.q) % parts
    tn, th, tw = config.box
    n, p, q = (torch.arange(size) // side for size, side in ((shape.n, tn), (shape.p, th), (shape.q, tw)))
    down, across = cdiv(shape.p, th), cdiv(shape.q, tw)
    return ((n[:, None, None] * down + p[None, :, None]) * across + q[None, None, :]) % parts


def moments_of(y: Tensor, part: Tensor, parts: int) -> Tensor:
    """``[parts, 3, K]`` in fp64: count, mean, M2."""
    rows = [y[part == i].double() for i in range(parts)]
    return torch.stack(
        [torch.stack((torch.full_like(r[0], len(r)), r.mean(0), r.var(0, False) * len(r))) for r in rows]
    )


def run(inputs: Inputs, config: ConvConfig, parts: int | None, precision: str = "ieee") -> tuple[Tensor, Tensor | None]:
    """Output and statistics; only this kernel runs, and no stray element is written or used."""
    s, guarded = inputs.shape, Guarded()
    y = guarded.output(s.n, s.p, s.q, s.k, dtype=inputs.x.dtype)
    statistics = None if parts is None else guarded.output(parts, 3, s.k, dtype=FP32)
    prologue = None
    if inputs.scale is not None and inputs.shift is not None:
        prologue = Normalised(guarded.input(inputs.scale), guarded.input(inputs.shift))
    launch.COUNTS.clear()
    x, w = guarded.input(inputs.x), guarded.input(inputs.w)
    launch_conv_stats(x, w, y, statistics, s, prologue, config, precision)
    assert launch.COUNTS == {"conv_stats": 1}
    guarded.verify()
    return y, statistics


def config_of(box: tuple[int, int, int], bn: int = 16, bk: int = 16) -> ConvConfig:
    return ConvConfig("conv_stats", box, bn, bk)


EXACT = [
    # shape, box, bn, bk, parts, dtype, prologue
    (ConvShape(2, 8, 8, 16, 16, 3, 3, 1, 1), (1, 4, 8), 16, 16, 2, BF16, True),
    (ConvShape(2, 4, 8, 32, 24, 3, 3, 1, 1), (2, 4, 4), 16, 16, 1, HALF, True),  # two chunks, a column block overhangs
    (ConvShape(1, 8, 8, 24, 16, 3, 3, 1, 1), (1, 4, 8), 16, 16, 2, BF16, True),  # a chunk reaches into the next tap
    (ConvShape(2, 8, 8, 16, 16, 3, 3, 2, 1), (2, 2, 4), 16, 16, 2, BF16, True),
    (ConvShape(2, 8, 8, 16, 16, 3, 3, 2, 1), (2, 2, 4), 16, 16, 1, FP32, False),
    (ConvShape(2, 8, 8, 16, 16, 3, 3, 1, 2, 2), (1, 4, 8), 16, 16, 2, FP32, True),
    (ConvShape(2, 8, 8, 16, 16, 3, 3, 1, 1), (1, 4, 8), 16, 16, 2, HALF, False),
    (ConvShape(4, 4, 4, 32, 40), (1, 1, 16), 16, 16, 2, BF16, False),
    (ConvShape(4, 4, 4, 32, 16), (1, 1, 16), 16, 32, 4, HALF, True),
    (ConvShape(1, 7, 15, 16, 16, 1, 1, 2), (1, 4, 4), 16, 16, 2, BF16, False),  # odd: its pixels are an image of 4x8
    (ConvShape(1, 8, 16, 16, 16, 1, 1, 2), (1, 2, 8), 16, 16, 2, FP32, True),
]


@pytest.mark.parametrize(("shape", "box", "bn", "bk", "parts", "dtype", "prologue"), EXACT, ids=str)
def test_exact(shape, box, bn, bk, parts, dtype, prologue) -> None:
    config = config_of(box, bn, bk)
    inputs = small(shape, dtype, prologue)
    expected = inputs.expected().to(dtype)
    y, statistics = run(inputs, config, parts)
    identical(y, expected)
    identical(statistics, moments_of(expected, parts_of(shape, config, parts), parts).float())
    assert expected.count_nonzero() > expected.numel() / 2 and statistics[:, 2].min() > 0, "the case tests nothing"


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize(
    ("shape", "box", "parts"),
    [
        (ConvShape(3, 7, 5, 16, 16, 3, 3, 1, 1), (2, 4, 4), 3),  # images, rows and columns overhang
        (ConvShape(3, 10, 6, 16, 16, 3, 3, 2, 1), (2, 2, 4), 2),
        (ConvShape(3, 5, 5, 16, 16), (1, 1, 16), 2),
    ],
    ids=str,
)
def test_overhang(shape: ConvShape, box: tuple[int, int, int], parts: int, prologue: bool) -> None:
    config = config_of(box)
    inputs = small(shape, HALF, prologue)
    inputs.x += 1  # what lies outside differs from the mean
    y, statistics = run(inputs, config, parts)
    expected = inputs.expected().to(HALF)
    identical(y, expected)
    part = parts_of(shape, config, parts)
    reference = moments_of(expected, part, parts)
    identical(statistics[:, 0], reference[:, 0].float())
    assert statistics[:, 0].sum() == shape.m * shape.k
    for i in range(parts):  # against the same formula, each sum in fp32
        values = expected[part == i].float()
        mean = values.mean(0)
        no_worse_than(statistics[i, 1], mean, reference[i, 1])
        no_worse_than(statistics[i, 2], (values - mean).square().sum(0), reference[i, 2])


@pytest.mark.parametrize("r", [1, 3])
def test_equal_outputs_have_no_variance(r: int) -> None:
    shape = ConvShape(3, 7, 9, 16, 16, r, r)  # no padding: every output is the same sum
    x = torch.full((3, 7, 9, 16), 3.0)
    inputs = Inputs(shape, x, integers(16, r, r, 16, low=-3, high=3))
    _, statistics = run(inputs, config_of((1, 4, 4)), 2)
    identical(statistics[:, 1], inputs.expected()[0, 0, :2, :].float())
    identical(statistics[:, 2], torch.zeros(2, 16))


def test_no_statistics_and_parts_without_tiles() -> None:
    shape = ConvShape(2, 4, 4, 16, 16)
    inputs, config = small(shape, HALF, True), config_of((1, 1, 16))
    y, _ = run(inputs, config, None)
    again, statistics = run(inputs, config, 5)
    identical(y, inputs.expected().half())
    identical(again, y)
    identical(statistics[:, 0, 0], torch.tensor([16.0, 16, 0, 0, 0]))


def test_large_mean() -> None:
    shape = ConvShape(4, 8, 8, 16, 16)
    x, w = torch.randn(4, 8, 8, 16), torch.zeros(16, 1, 1, 16)
    x[..., 0] = 1000.0
    w[:, 0, 0, 0] = 1.0
    w[torch.arange(1, 16), 0, 0, torch.arange(1, 16)] = 1.0
    y, statistics = run(Inputs(shape, x, w), config_of((1, 1, 32)), 1)
    values = y.view(-1, 16)
    var, mean = torch.var_mean(values.double(), 0, correction=0)
    eager = torch.var_mean(values, 0, correction=0)
    assert mean.min() > 999 and var[1:].min() > 0.5
    no_worse_than(statistics[0, 1], eager[1], mean)
    no_worse_than(statistics[0, 2] / statistics[0, 0], eager[0], var)


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_close(dtype: torch.dtype) -> None:
    shape = ConvShape(1, 6, 6, 32, 16, 3, 3, 1, 1)
    x, w = torch.randn(1, 6, 6, 32).to(dtype), (torch.randn(16, 3, 3, 32) / 17).to(dtype)
    inputs = Inputs(shape, x, w, torch.rand(32) + 0.5, torch.randn(32) / 2)
    config = config_of((1, 4, 8), bk=32)
    y, statistics = run(inputs, config, 1)
    no_worse_than(y, inputs.expected(dtype), inputs.expected())
    again, repeated = run(inputs, config, 1)
    identical(again, y)
    identical(repeated, statistics)


@pytest.mark.parametrize("prologue", [False, True])
@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_nan(dtype: torch.dtype, prologue: bool) -> None:
    shape = ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1)
    inputs = small(shape, dtype, prologue)
    inputs.x[0, 0, 0, 3] = float("nan")
    y, statistics = run(inputs, config_of((1, 4, 4)), 4)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:2, :2] = True
    identical(y.isnan()[0], expected[..., None].expand(8, 8, 16))
    assert statistics[0, 1:].isnan().all() and statistics[1:].isfinite().all()


def test_refusals() -> None:
    config = config_of((1, 4, 4))
    for shape, message in (
        (ConvShape(1, 7, 8, 16, 16, 3, 3, 2, 1), "stride 1, or stride 2 on even H and W"),
        (ConvShape(1, 8, 8, 20, 16, 3, 3, 1, 1), "multiples of 8"),
        (ConvShape(1, 8, 8, 24, 16, 3, 3, 2, 1), "bk must divide C"),
    ):
        x, w, y = (
            torch.empty(size, dtype=HALF) for size in ((1, shape.h, shape.w, shape.c), (16, 3, 3, shape.c), (1,))
        )
        with pytest.raises(ValueError, match=message):
            launch_conv_stats(x, w, y, None, shape, None, config, "ieee")


def test_parts_share_the_tiles_evenly() -> None:
    shape = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)
    config = next(c for c in conv_stats_configs(shape, 2, True) if c.kernel == "conv_stats")
    parts = conv_stats_parts(shape, config)
    tiles = cdiv(256, config.box[0]) * cdiv(56, config.box[1]) * cdiv(56, config.box[2])
    assert parts <= 2 * 132
    assert cdiv(tiles, parts) == cdiv(tiles, max(1, config.persistent) * 132)
    assert (cdiv(tiles, parts) - 1) * parts < tiles, "no program without a tile"
    assert conv_stats_parts(ConvShape(1, 4, 4, 64, 64, 3, 3, 1, 1), config) == 1

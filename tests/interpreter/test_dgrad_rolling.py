"""``dgrad_rolling`` in the interpreter: strips that begin and end anywhere, overhang, masks, residuals and sums."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from resnet_triton.kernels import dgrad_phases
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.dgrad import dgrad_configs, dgrad_parts
from resnet_triton.kernels.geometry import ConvShape
from tests.comparers import GRADIENT, identical, no_worse_than
from tests.interpreter.test_dgrad import F16, Inputs, check


def same(n: int, h: int, w: int, c: int = 16, k: int = 16) -> ConvShape:
    return ConvShape(n, h, w, c, k, 3, 3, 1, 1)


def config_of(images: int, columns: int, bn: int = 16, k: int = 16) -> ConvConfig:
    return ConvConfig("dgrad_rolling", (images, 1, columns), bn, k)


@pytest.mark.parametrize(
    ("shape", "tiling", "programs", "residual"),
    [
        (same(2, 4, 16), config_of(2, 8), 2, 0),  # a strip is a column of tiles
        (same(3, 5, 11), config_of(2, 8), 5, 1),  # images and columns overhang, strips cross columns of tiles
        (same(5, 3, 10), config_of(2, 8), 2, 0),  # a strip is three columns
        (same(1, 1, 1), config_of(1, 16), 3, 1),  # one pixel
        (same(2, 3, 5, 40, 32), config_of(2, 8, 32, 32), 4, 0),  # two column blocks, the second overhangs
    ],
    ids=str,
)
def test_geometry(shape: ConvShape, tiling: ConvConfig, programs: int, residual: int) -> None:
    with patch.object(dgrad_phases, "SUMMING_PROGRAMS", programs):
        check(Inputs(shape, mask="affine", residual=residual), tiling)


@pytest.mark.parametrize(
    ("dtype", "mask", "residual"),
    [(torch.bfloat16, "affine", 0), (torch.bfloat16, "x", 1), (torch.float32, "", 1), (F16, "", 0)],
    ids=str,
)
def test_dtypes_and_operands(dtype: torch.dtype, mask: str, residual: int) -> None:
    with patch.object(dgrad_phases, "SUMMING_PROGRAMS", 2):
        check(Inputs(same(2, 3, 5), dtype, mask=mask, residual=residual), config_of(2, 8))


def test_close_and_repeatable() -> None:
    inputs = Inputs(same(2, 3, 6, 16, 32), F16, mask="affine")
    inputs.dy, inputs.c = torch.randn(inputs.dy.shape).half(), torch.randn(inputs.c.shape).half()
    inputs.w = (torch.randn(inputs.w.shape) / 17).half()
    with patch.object(dgrad_phases, "SUMMING_PROGRAMS", 2):
        dx, parts = inputs.run(config_of(2, 8, k=32), True)
        again, repeated = inputs.run(config_of(2, 8, k=32), True)
    identical(again, dx)
    identical(repeated, parts)
    no_worse_than(dx, inputs.expected(F16), inputs.expected(), GRADIENT)
    for row, factor in ((0, torch.ones(())), (1, inputs.c)):
        summed = dx.double() * factor.double()
        no_worse_than(parts.sum(0)[row], summed.float().sum((0, 1, 2)), summed.sum((0, 1, 2)), GRADIENT)


def test_nan_reaches_its_neighbours_only() -> None:
    """What is left in the accumulators at the end of a column of tiles must not reach the next column."""
    inputs = Inputs(same(2, 4, 8))
    inputs.dy[0, 3, 7, 3] = float("nan")  # the last row
    with patch.object(dgrad_phases, "SUMMING_PROGRAMS", 2):
        dx, _ = inputs.run(config_of(1, 16))
    expected = torch.zeros(2, 4, 8, 1, dtype=torch.bool)
    expected[0, 2:, 6:] = True
    identical(dx.isnan(), expected.expand(2, 4, 8, 16))


def test_refusals() -> None:
    for shape, tiling in (
        (ConvShape(1, 4, 4, 16, 16, 3, 3, 2, 1), config_of(1, 16)),
        (same(1, 4, 4, 16, 32), config_of(1, 16)),
        (same(1, 4, 4), ConvConfig("dgrad_rolling", (1, 4, 4), 16, 16)),
    ):
        with pytest.raises(ValueError, match="dgrad_rolling computes 3x3 convolutions of stride 1"):
            Inputs(shape).run(tiling)


def test_offered_for_64_channels_and_long_strips() -> None:
    shape = same(256, 56, 56, 64, 64)
    (rolling, *others) = dgrad_configs(shape, 2, False)
    assert rolling.kernel == "dgrad_rolling" and {c.kernel for c in others} == {"dgrad"}
    assert dgrad_parts(shape, rolling) <= dgrad_phases.SUMMING_PROGRAMS
    for other, itemsize in ((shape, 4), (same(256, 28, 28, 128, 128), 2), (same(1, 56, 56, 64, 64), 2)):
        assert {c.kernel for c in dgrad_configs(other, itemsize, False)} == {"dgrad"}

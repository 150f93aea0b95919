"""``chain_rolling`` in the interpreter: each part present and absent, strips that begin and end anywhere, overhang."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_triton.kernels.chain import chain_configs, chain_shared_bytes
from resnet_triton.kernels.chain_rolling import chain_rolling_configs
from resnet_triton.kernels.config import ConvConfig, count_strips
from resnet_triton.kernels.geometry import ChainShape
from tests.comparers import identical
from tests.interpreter.chains import chain, chain_inputs, check_close, check_exact, expected, run


def rolling(box: tuple[int, int, int], bn: int = 32, mid: int = 16) -> ConvConfig:
    return ConvConfig("chain_rolling", box, bn, mid, 4, 2)


CASES = [
    pytest.param(chain(2, 3, 8, 16, 32, reduce=16), rolling((2, 4, 8)), id="a strip is a column of tiles"),
    pytest.param(chain(3, 5, 9, 16, 32, reduce=16), rolling((2, 4, 8), 16), id="overhang, strips cross columns"),
    pytest.param(chain(2, 2, 9, 16, 32, reduce=32), rolling((2, 8, 8)), id="a strip is almost three columns"),
    pytest.param(chain(1, 3, 20, 32, 64, reduce=16), rolling((1, 12, 16), mid=32), id="one strip for everything"),
    pytest.param(chain(2, 3, 4, 16, 32, reduce=16), rolling((4, 1, 4)), id="strips of one row"),
    pytest.param(chain(17, 2, 1, 16, 16, reduce=16), rolling((16, 2, 1), 16), id="one column of pixels"),
    pytest.param(chain(1, 1, 1, 16, 32, reduce=16), rolling((1, 5, 16)), id="one pixel"),
    pytest.param(chain(2, 3, 5, 16, 32), rolling((2, 3, 8)), id="no reduction"),
    pytest.param(chain(2, 3, 5, 16, 32, project=(32, 1), reduce=16), rolling((2, 3, 8)), id="projection"),
    pytest.param(chain(2, 3, 5, 16, 32, project=(16, 1)), rolling((2, 3, 8)), id="projection, no reduction"),
    pytest.param(chain(3, 3, 11, 16, 32, reduce=32, subsample=2), rolling((2, 3, 8)), id="every second pixel kept"),
    pytest.param(chain(2, 4, 10, 16, 32, subsample=2), rolling((1, 7, 16)), id="every second pixel, no reduction"),
    pytest.param(chain(2, 3, 5, 16, 32, project=(16, 1), reduce=16, subsample=2), rolling((2, 3, 8)), id="everything"),
    pytest.param(chain(1, 2, 4, 64, 64, reduce=128), rolling((4, 3, 4), 64, 64), id="64 channels"),
]


@pytest.mark.parametrize(("shape", "tiling"), CASES)
def test_exact(shape: ChainShape, tiling: ConvConfig) -> None:
    check_exact(chain_inputs(shape), tiling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_exact_dtypes(dtype: torch.dtype) -> None:
    check_exact(chain_inputs(chain(2, 3, 4, 16, 32, project=(32, 1), reduce=16), dtype), rolling((2, 3, 8)))
    check_exact(chain_inputs(chain(2, 2, 5, 32, 32, reduce=16, subsample=2), dtype), rolling((2, 3, 8), 16, 32))


@pytest.mark.parametrize(
    "options",
    [{"bn": False}, {"bn": False, "bias": True}, {"bias": True}, {"affine": False}, {"vector_dtype": torch.float16}],
    ids=str,
)
def test_exact_vectors(options: dict) -> None:
    check_exact(chain_inputs(chain(2, 2, 4, 16, 32, project=(16, 1), reduce=16), **options), rolling((2, 3, 8)))


def test_projection_is_right_where_gamma_of_the_expansion_is_zero() -> None:
    inputs = chain_inputs(chain(2, 2, 4, 16, 32, project=(16, 1), reduce=16))
    gamma = inputs.expand.gamma.clone()
    gamma[::2] = 0
    check_exact(inputs.replaced(expand=inputs.expand.replaced(gamma=gamma)), rolling((2, 3, 8)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_close(dtype: torch.dtype) -> None:
    check_close(chain_inputs(chain(2, 4, 5, 32, 64, reduce=32), dtype, bias=True), rolling((2, 3, 8), 32, 32))
    shape = chain(2, 4, 4, 32, 64, project=(32, 1), reduce=64, subsample=2)
    check_close(chain_inputs(shape, dtype), rolling((2, 5, 8), 64, 32))


def test_shortcut_may_be_the_input() -> None:
    inputs = chain_inputs(chain(2, 3, 5, 32, 32, reduce=16))
    check_exact(inputs.replaced(shortcut=inputs.t), rolling((2, 3, 8), 32, 32))


def test_tiling_does_not_change_the_result() -> None:
    """Only the reduction's sums depend on BN: neither the box, the strip nor a repeat may change a bit."""
    inputs = chain_inputs(chain(3, 3, 5, 16, 32, reduce=16))
    inputs = inputs.replaced(t=torch.randn(inputs.t.shape).half(), shortcut=torch.randn(inputs.shortcut.shape).half())
    first = run(inputs, rolling((2, 4, 8)))
    for tiling in (rolling((2, 4, 8)), rolling((1, 14, 16))):
        for out, before in zip(run(inputs, tiling), first, strict=True):
            identical(out, before)


def test_nan_and_inf_stay_in_their_image_and_column() -> None:
    """What is left in the accumulators at the bottom of a column of tiles must not reach the next one."""
    inputs = chain_inputs(chain(3, 3, 10, 16, 32, reduce=16))
    t, shortcut = inputs.t.clone(), inputs.shortcut.clone()
    t[0, 2, 1, 5] = float("nan")
    t[1, 2, 8, 3] = float("inf")
    shortcut[1, 1, 2, 7] = float("-inf")
    shortcut[2, 0, 5, 2] = float("nan")
    inputs = inputs.replaced(t=t, shortcut=shortcut)
    for out, right in zip(run(inputs, rolling((1, 6, 16))), expected(inputs), strict=True):
        assert right.isnan().any() and right.isfinite().any()
        identical(out, right)


REFUSED = [
    pytest.param(chain(2, 4, 4, 16, 32, conv=False), "conv must be a 3x3 .* got None", id="no 3x3"),
    pytest.param(chain(2, 4, 4, 16, 32, stride=2), "conv must be a 3x3 convolution of stride 1", id="stride 2"),
    pytest.param(chain(2, 4, 4, 16, 32, dilation=2), "conv must be a 3x3 .* dilation 1", id="dilation 2"),
    pytest.param(chain(2, 4, 4, 32, 32), "conv must have bk=16 channels in and out", id="other channels than bk"),
    pytest.param(chain(2, 4, 4, 16, 32, project=(16, 2)), "project must be .* stride 1", id="projection, stride 2"),
    pytest.param(chain(2, 4, 4, 16, 512), "expand.k must be .* 256, got 512", id="512 expanded channels"),
    pytest.param(chain(2, 4, 4, 16, 32, project=(128, 1)), "project.c must be .* 64, got 128", id="wide projection"),
    pytest.param(chain(2, 4, 4, 16, 32, reduce=48), "reduce.k must be .* 128, got 48", id="reduction to 48"),
    pytest.param(chain(2, 4, 4, 16, 16), "bn must divide expand.k", id="fewer expanded channels than bn"),
]


@pytest.mark.parametrize(("shape", "reason"), REFUSED)
def test_refused(shape: ChainShape, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*; take a configuration of chain_rolling_configs"):
        run(chain_inputs(shape), rolling((2, 4, 8)))


def test_one_column_cannot_be_subsampled() -> None:
    with pytest.raises(ValueError, match="2 the box's columns"):
        run(chain_inputs(chain(2, 4, 4, 16, 32, subsample=2)), rolling((16, 4, 1)))


def test_configurations_of_resnet50() -> None:
    plain, end = chain(256, 56, 56, 64, 256, reduce=64), chain(256, 56, 56, 64, 256, reduce=128, subsample=2)
    first = chain(256, 56, 56, 64, 256, project=(64, 1), reduce=64)
    for shape, warps in ((plain, [4, 8]), (first, [4, 8]), (end, [8]), (replace(plain, reduce=None), [4, 8])):
        configs = chain_rolling_configs(shape, 2)
        assert [c.warps for c in configs] == warps
        assert set(configs) <= set(chain_configs(shape, 2))
        for config in configs:
            assert count_strips(config, shape.expand) <= 132 * 8 // config.warps  # one wave
            assert chain_shared_bytes(config, shape, 2) <= 227 * 1024
    for without in (
        chain(1, 56, 56, 64, 256, reduce=64),  # too few rows
        chain(256, 28, 28, 128, 512, reduce=128),
        chain(256, 56, 56, 64, 256, stride=2),
        chain(256, 56, 56, 64, 256, conv=False),
        chain(256, 56, 56, 48, 192),
    ):
        assert chain_rolling_configs(without, 2) == []
    assert chain_rolling_configs(plain, 4) == []

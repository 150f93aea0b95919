"""``conv_chain`` in the interpreter: each part present and absent, both orders of the products, overhanging tiles."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.conv_chain import (
    SHARED_LIMIT,
    conv_chain_configs,
    conv_chain_shared_bytes,
    filters_left,
    most_values,
    values_per_thread,
)
from resnet_triton.kernels.geometry import ChainShape
from tests.comparers import identical
from tests.interpreter.chains import chain, chain_inputs, check_close, check_exact, expected, normals, run

#: Filters left of the pixels behind the 3x3, and right of them.
LEFT = ConvConfig("conv_chain", (2, 4, 4), 64, 16, 4, 2)
RIGHT = ConvConfig("conv_chain", (2, 4, 4), 32, 16, 4, 2)

SHAPES = [
    pytest.param(chain(2, 4, 4, 16, 64, reduce=16), id="no waste"),
    pytest.param(chain(3, 5, 6, 16, 64, reduce=32), id="overhang in every dimension"),
    pytest.param(chain(3, 5, 3, 32, 128, reduce=16), id="two chunks of channels"),
    pytest.param(chain(1, 5, 7, 16, 64, dilation=2, reduce=16), id="dilation 2"),
    pytest.param(chain(3, 6, 6, 16, 64, stride=2, reduce=16), id="stride 2"),
    pytest.param(chain(1, 4, 6, 16, 64, project=(16, 1), reduce=16), id="projection"),
    pytest.param(chain(3, 6, 6, 16, 64, stride=2, project=(32, 1), reduce=16), id="projection of kept pixels"),
    pytest.param(chain(1, 6, 10, 16, 64, stride=2, project=(32, 2), reduce=16), id="projection, stride 2"),
    pytest.param(chain(3, 3, 5, 16, 64, reduce=32, subsample=2), id="every second pixel kept"),
    pytest.param(chain(3, 4, 4, 16, 64, project=(16, 1), subsample=2), id="every second pixel kept, no reduction"),
    pytest.param(chain(2, 5, 5, 16, 64), id="no reduction"),
    pytest.param(chain(3, 5, 3, 16, 64, conv=False, reduce=16), id="behind the 3x3"),
    pytest.param(chain(3, 5, 3, 16, 64, conv=False, project=(32, 1)), id="behind the 3x3, projection"),
    pytest.param(chain(3, 3, 5, 16, 64, conv=False, subsample=2), id="expansion alone, every second pixel kept"),
    pytest.param(chain(1, 1, 1, 16, 64, reduce=16), id="one pixel"),
    pytest.param(chain(3, 3, 5, 16, 64, project=(32, 1), reduce=16, first=True), id="first, projection"),
    pytest.param(chain(1, 6, 10, 16, 64, stride=2, project=(16, 2), reduce=16, first=True), id="first, stride 2"),
    pytest.param(chain(1, 5, 7, 16, 64, dilation=2, subsample=2, first=True), id="first, dilation 2, identity"),
    pytest.param(chain(1, 1, 1, 16, 64, project=(16, 1), first=True), id="first, one pixel"),
]  # fmt: skip


@pytest.mark.parametrize("tiling", [LEFT, RIGHT], ids=["filters left", "pixels left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact(shape: ChainShape, tiling: ConvConfig) -> None:
    assert filters_left(tiling) == (tiling is LEFT)
    check_exact(chain_inputs(shape), tiling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tiling", [LEFT, RIGHT], ids=["filters left", "pixels left"])
def test_exact_dtypes(dtype: torch.dtype, tiling: ConvConfig) -> None:
    for shape in (
        chain(3, 6, 6, 16, 64, stride=2, project=(32, 2), reduce=16),
        chain(2, 5, 4, 16, 64, reduce=16, subsample=2),
        chain(1, 3, 5, 16, 64, project=(32, 1), first=True),
    ):
        check_exact(chain_inputs(shape, dtype), tiling)


@pytest.mark.parametrize("box", [(32, 1, 1), (1, 1, 32), (1, 32, 1), (1, 8, 8)], ids=str)
def test_exact_boxes(box: tuple[int, int, int]) -> None:
    check_exact(chain_inputs(chain(3, 2, 3, 16, 64, reduce=16)), replace(LEFT, box=box))
    check_exact(chain_inputs(chain(3, 3, 2, 16, 64, subsample=2, conv=False)), replace(RIGHT, box=box))


@pytest.mark.parametrize("filter_size", [(1, 3), (2, 2), (1, 1)], ids=str)
def test_exact_filters_other_than_3x3(filter_size: tuple[int, int]) -> None:
    shape = chain(1, 5, 7, 16, 64, reduce=16)
    r, s = filter_size
    conv = replace(shape.conv, r=r, s=s, padding=0, h=5 + r - 1, w=7 + s - 1, c=48)
    check_exact(chain_inputs(replace(shape, conv=conv)), LEFT)


@pytest.mark.parametrize(
    "options",
    [{"bn": False}, {"bn": False, "bias": True}, {"bias": True}, {"affine": False}, {"vector_dtype": torch.float16}],
    ids=str,
)
def test_exact_vectors(options: dict) -> None:
    check_exact(chain_inputs(chain(2, 4, 4, 16, 64, project=(16, 1), reduce=16), **options), LEFT)
    check_exact(chain_inputs(chain(2, 4, 4, 16, 64, conv=False, project=(16, 1), reduce=16), **options), RIGHT)


@pytest.mark.parametrize("options", [{"bn": False}, {"bn": False, "bias": True}, {"affine": False}], ids=str)
def test_exact_vectors_of_the_first_convolution(options: dict) -> None:
    check_exact(chain_inputs(chain(1, 4, 4, 16, 64, project=(16, 1), first=True), **options), LEFT)


@pytest.mark.parametrize("box", [(32, 1, 1), (1, 1, 32), (1, 16, 4)], ids=str)
def test_the_3x3_is_padded_behind_the_first_convolution(box: tuple[int, int, int]) -> None:
    """All of its shifts are positive: zeros from outside the image would become those."""
    inputs = chain_inputs(chain(2, 2, 3, 16, 64, project=(16, 1), first=True))
    shifted = inputs.first.replaced(beta=torch.full((16,), 5.0), mean=torch.zeros(16))
    check_exact(inputs.replaced(first=shifted), replace(LEFT, box=box))


def test_projection_is_right_where_gamma_of_the_expansion_is_zero() -> None:
    inputs = chain_inputs(chain(2, 4, 4, 16, 64, project=(16, 1), reduce=16))
    gamma = inputs.expand.gamma.clone()
    gamma[::2] = 0
    check_exact(inputs.replaced(expand=inputs.expand.replaced(gamma=gamma)), LEFT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tiling", [LEFT, RIGHT], ids=["filters left", "pixels left"])
def test_close(dtype: torch.dtype, tiling: ConvConfig) -> None:
    check_close(chain_inputs(chain(2, 6, 5, 32, 128, reduce=32), dtype, bias=True), tiling)
    check_close(chain_inputs(chain(2, 8, 8, 32, 64, stride=2, project=(64, 2), reduce=64, subsample=2), dtype), tiling)
    check_close(chain_inputs(chain(1, 6, 5, 16, 64, project=(64, 1), reduce=16, first=True), dtype), tiling)


def test_shortcut_may_be_the_input() -> None:
    inputs = chain_inputs(chain(2, 4, 5, 64, 64, reduce=16))
    check_exact(inputs.replaced(shortcut=inputs.t), replace(LEFT, bk=64))


@pytest.mark.parametrize(
    "shape",
    [chain(3, 4, 5, 16, 64, reduce=16), chain(1, 4, 5, 16, 64, project=(16, 1), reduce=16, first=True)],
    ids=str,
)
def test_tiling_does_not_change_the_result(shape: ChainShape) -> None:
    """fp32 sums depend on BK and, of the reduction, on BN: the box may not change a bit, nor may a repeat."""
    inputs = normals(chain_inputs(shape))
    first = run(inputs, LEFT)
    for tiling in (LEFT, replace(LEFT, box=(1, 8, 8))):
        for out, before in zip(run(inputs, tiling), first, strict=True):
            identical(out, before)


def test_nan_and_inf_pass_through_the_first_convolution() -> None:
    inputs = chain_inputs(chain(1, 5, 6, 16, 64, project=(16, 1), first=True))
    x = inputs.t.clone()
    x[0, 0, 1, 5] = float("nan")
    x[0, 4, 5, 2] = float("-inf")
    inputs = inputs.replaced(t=x, shortcut=x)
    out, right = run(inputs, LEFT)[0], expected(inputs)[0]
    assert right.isnan().any() and right.isfinite().any()
    identical(out, right)


@pytest.mark.parametrize("tiling", [LEFT, RIGHT], ids=["filters left", "pixels left"])
def test_nan_and_inf_propagate_as_in_pytorch(tiling: ConvConfig) -> None:
    inputs = chain_inputs(chain(1, 5, 6, 16, 64, reduce=16))
    t, shortcut = inputs.t.clone(), inputs.shortcut.clone()
    t[0, 0, 1, 5] = float("nan")
    shortcut[0, 3, 4, 7] = float("inf")
    shortcut[0, 4, 5, 2] = float("nan")
    shortcut[0, 4, 1, 3] = float("-inf")
    inputs = inputs.replaced(t=t, shortcut=shortcut)
    for out, right in zip(run(inputs, tiling), expected(inputs), strict=True):
        assert right.isnan().any() and right.isfinite().any()
        identical(out, right)


REFUSED = [
    pytest.param(chain(2, 4, 4, 96, 192), "expand.c must be a power of two from 16 to 256, got 96", id="96 channels"),
    pytest.param(chain(2, 4, 4, 512, 64), "expand.c must be .*, got 512", id="512 channels"),
    pytest.param(chain(2, 4, 4, 64, 256, reduce=512), "reduce.k must be .*, got 512", id="reduction to 512"),
    pytest.param(chain(2, 4, 4, 64, 256, project=(24, 1)), "project.c must be .*, got 24", id="projection of 24"),
    pytest.param(chain(2, 4, 4, 64, 80), "bn must divide expand.k", id="80 expanded channels"),
    pytest.param(chain(2, 5, 6, 64, 256, stride=2), "conv must have stride 1, or stride 2 on an even", id="odd image"),
    pytest.param(chain(2, 8, 8, 64, 256, stride=4), "conv must have stride 1", id="stride 4"),
    pytest.param(chain(2, 4, 4, 64, 256, project=(16, 3)), "project must have stride 1", id="projection, stride 3"),
    pytest.param(chain(2, 4, 4, 64, 256, first=True), "first.c must be .* 16 to 64 .*, got 256", id="256 in front"),
    pytest.param(chain(2, 4, 4, 128, 256, project=(64, 1), first=True), "first.k must be .*, got 128", id="128 behind"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "reason"), REFUSED)
def test_refused(shape: ChainShape, reason: str) -> None:
    assert conv_chain_configs(shape, 2) == []
    with pytest.raises(ValueError, match=f"{reason}.*; take a configuration of conv_chain_configs"):
        run(chain_inputs(shape), LEFT)


def test_the_first_convolution_is_one_chunk_of_the_3x3() -> None:
    with pytest.raises(ValueError, match=r"bk must be first\.k = 32, got bk=16"):
        run(chain_inputs(chain(2, 4, 4, 32, 64, project=(16, 1), first=True)), LEFT)


def test_configurations() -> None:
    for shape in (
        chain(256, 56, 56, 64, 256, project=(64, 1), reduce=64),
        chain(256, 28, 28, 128, 512, reduce=256, subsample=2),
        chain(2, 14, 14, 256, 1024, conv=False),
        chain(256, 56, 56, 64, 256, project=(64, 1), reduce=64, first=True),
    ):
        configs = conv_chain_configs(shape, 2)
        assert len({(c.bm, c.warps, filters_left(c)) for c in configs}) == len(configs) >= 3
        for config in configs:
            assert config.kernel == "conv_chain" and shape.expand.k % config.bn == 0
            assert values_per_thread(config, shape) <= most_values(shape)
            assert conv_chain_shared_bytes(config, shape, 2) <= SHARED_LIMIT
        assert conv_chain_configs(shape, 4) == []
    assert conv_chain_configs(chain(256, 32, 32, 32, 128), 2) == [], (
        "a 3x3 to 32 channels has no warp-group instruction"
    )
    assert conv_chain_configs(chain(256, 7, 7, 256, 1024, project=(512, 1), conv=False), 2) == []

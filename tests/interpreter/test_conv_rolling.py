"""``conv_rolling`` in the interpreter: strips that begin and end anywhere, overhanging tiles, every epilogue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_triton.kernels.config import ConvConfig, Epilogue, count_tiles
from resnet_triton.kernels.conv_rolling import launch_conv_rolling
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import EPILOGUES, FULL, SENTINEL, conv_inputs
from tests.comparers import identical
from tests.interpreter.launching import check_close, check_exact, run


def same(n: int, h: int, w: int, c: int = 16, k: int = 16) -> ConvShape:
    return ConvShape(n, h, w, c, k, 3, 3, 1, 1)


def rolling(box: tuple[int, int, int], bn: int = 16, c: int = 16) -> ConvConfig:
    return ConvConfig("conv_rolling", box, bn, c, 4, 2)


GEOMETRIES = [
    pytest.param(same(2, 6, 8), rolling((2, 7, 8)), id="a strip is a column of tiles"),
    pytest.param(same(2, 6, 8), rolling((2, 3, 8)), id="strips end inside the image"),
    pytest.param(same(3, 5, 11), rolling((2, 4, 8)), id="overhang on every side, strips cross columns"),
    pytest.param(same(5, 3, 10), rolling((2, 11, 8)), id="a strip is almost three columns"),
    pytest.param(same(3, 4, 20), rolling((1, 100, 16)), id="one strip for everything"),
    pytest.param(same(2, 4, 9), rolling((2, 1, 8)), id="strips of one row"),
    pytest.param(same(2, 1, 8), rolling((2, 3, 8)), id="one row of pixels"),
    pytest.param(same(20, 3, 1), rolling((16, 2, 1)), id="one column of pixels"),
    pytest.param(same(1, 1, 1), rolling((1, 5, 16)), id="one pixel"),
    pytest.param(same(2, 5, 7, 32, 40), rolling((2, 4, 8), 32, 32), id="two column blocks, the second overhangs"),
    pytest.param(same(1, 4, 6, 64, 8), rolling((2, 3, 8), 16, 64), id="fewer filters than a block"),
    pytest.param(same(1, 4, 4, 128, 64), rolling((4, 5, 4), 64, 128), id="128 channels"),
]


@pytest.mark.parametrize(("shape", "tiling"), GEOMETRIES)
def test_exact_geometry(shape: ConvShape, tiling: ConvConfig) -> None:
    check_exact(conv_inputs(shape, FULL), tiling)


def test_strips_cover_all_rows_once() -> None:
    shape = same(5, 3, 10)  # 3 x 2 columns of 3 rows, each with a separating row
    assert [count_tiles(rolling((2, rows, 8)), shape) for rows in (1, 4, 11, 24, 25)] == [24, 6, 3, 1, 1]
    assert count_tiles(rolling((2, 11, 8)), same(5, 3, 10, k=40)) == 9


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_exact_and_close_dtypes(dtype: torch.dtype) -> None:
    inputs = conv_inputs(same(2, 5, 9, 32, 24), Epilogue(True, True, True, True), dtype)
    check_exact(inputs, rolling((2, 4, 8), 32, 32))
    check_close(inputs, rolling((2, 4, 8), 32, 32))


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_exact_epilogues(epilogue: Epilogue) -> None:
    check_exact(conv_inputs(same(2, 3, 5), epilogue), rolling((2, 3, 8)))


@pytest.mark.parametrize("vector_dtype", [torch.float16, torch.float64], ids=str)
def test_exact_bn_without_gamma_and_beta(vector_dtype: torch.dtype) -> None:
    inputs = conv_inputs(same(2, 3, 5), Epilogue(bn=True, bias=True), affine=False, vector_dtype=vector_dtype)
    check_exact(inputs, rolling((2, 3, 8)))


def test_tiling_does_not_change_the_result() -> None:
    """fp32 sums have one order: neither the box, the strip nor a repeat may change a bit."""
    inputs = conv_inputs(same(3, 5, 9, 32, 24), FULL)
    inputs = inputs.replaced(x=torch.randn(inputs.x.shape).half(), w=torch.randn(inputs.w.shape).half())
    first = run(inputs, rolling((2, 4, 8), 32, 32))
    for tiling in (rolling((2, 4, 8), 32, 32), rolling((4, 7, 4), 16, 32), rolling((1, 50, 16), 32, 32)):
        identical(run(inputs, tiling), first)


@pytest.mark.parametrize("relu", [False, True])
def test_nan_and_inf_reach_their_neighbours_only(relu: bool) -> None:
    """What is left in the accumulators at the end of a column of tiles must not reach the next column."""
    inputs = conv_inputs(same(3, 4, 9), Epilogue(bn=True, residual=True, relu=relu))
    x, residual = inputs.x.clone(), inputs.residual.clone()
    x[0, 3, 4, 5] = float("nan")  # in the last row
    x[0, 0, 0, -1] = float("inf")
    residual[1, 3, 7, 2] = float("nan")
    residual[2, 2, 0, 3] = float("-inf")
    inputs = inputs.replaced(x=x, residual=residual)
    expected = inputs.expected()
    assert expected.isnan().any() and expected.isfinite().any() and expected.isinf().any()
    for rows in (3, 5, 100):
        identical(run(inputs, rolling((1, rows, 16))), expected)


@pytest.mark.parametrize("change", [{"padding": 0}, {"stride": 2}, {"dilation": 2, "padding": 2}, {"c": 32}], ids=str)
def test_other_convolutions_are_refused(change: dict[str, int]) -> None:
    inputs = conv_inputs(replace(same(1, 4, 4), **change))
    with pytest.raises(ValueError, match=r"conv_rolling computes 3x3 convolutions of stride 1.* got 3x3/"):
        run(inputs, rolling((2, 3, 8)))


def test_channel_slices_of_larger_tensors() -> None:
    """Views with dense channels and 16-byte strides need no copy; what lies beside them is neither read nor written."""
    inputs = conv_inputs(same(2, 4, 6, 32, 24), FULL)
    s = inputs.shape
    x = torch.full((s.n + 1, s.h + 2, s.w, s.c + 16), float("nan"), dtype=torch.half)[1:, 1:-1, :, : s.c]
    x.copy_(inputs.x)
    residual = torch.full((s.n, s.p, s.q, s.k + 16), float("nan"), dtype=torch.half)[..., 8 : 8 + s.k]
    residual.copy_(inputs.residual)
    wide_y = torch.full((s.n, s.p, s.q + 3, s.k + 24), SENTINEL, dtype=torch.half)
    y = wide_y[:, :, 2 : 2 + s.q, 16 : 16 + s.k]
    operands = Operands(residual, *inputs.vectors, eps=inputs.eps, relu=True)
    launch_conv_rolling(x, inputs.w, y, s, operands, rolling((2, 3, 8), 32, 32), "ieee")
    identical(y.clone(), inputs.expected())
    y.fill_(SENTINEL)
    assert (wide_y == SENTINEL).all()

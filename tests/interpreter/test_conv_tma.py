"""``conv_tma`` in the interpreter: shifted boxes, both strides, overhanging tiles, every epilogue, strided views."""

from __future__ import annotations

import random

import pytest
import torch

from resnet_triton.kernels.config import ConvConfig, Epilogue, runs_on
from resnet_triton.kernels.conv_fwd import launch_conv_tma
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import EPILOGUES, FULL, PLAIN, SENTINEL, conv_inputs
from tests.comparers import identical
from tests.interpreter.launching import check_close, check_exact, run


def config(box: tuple[int, int, int] = (2, 8, 8), bn: int = 64, bk: int = 64) -> ConvConfig:
    return ConvConfig("conv_tma", box, bn, bk)


GEOMETRIES = [
    # shape (n, h, w, c, k, r, s, stride, padding, dilation), configuration
    pytest.param(ConvShape(2, 8, 8, 64, 64, 3, 3, 1, 1), config(), id="no waste"),
    pytest.param(ConvShape(3, 9, 11, 24, 40, 3, 3, 1, 1), config(), id="overhang in every dimension"),
    pytest.param(ConvShape(3, 9, 11, 72, 72, 3, 3, 1, 1), config(), id="two column blocks, two channel blocks"),
    pytest.param(ConvShape(2, 7, 7, 8, 16, 1, 1), config(), id="1x1"),
    pytest.param(ConvShape(2, 8, 10, 16, 40, 1, 1, 2), config(bk=16), id="1x1 stride 2"),
    pytest.param(ConvShape(3, 8, 12, 32, 40, 3, 3, 2, 1), config(bk=32), id="3x3 stride 2"),
    pytest.param(ConvShape(1, 8, 12, 32, 40, 3, 3, 2, 0), config(bk=16), id="3x3 stride 2, no padding"),
    pytest.param(ConvShape(1, 6, 10, 48, 24, 5, 5, 2, 2), config(bk=16), id="5x5 stride 2"),
    pytest.param(ConvShape(1, 10, 8, 16, 24, 7, 7, 2, 3), config(bk=16), id="7x7 stride 2"),
    pytest.param(ConvShape(1, 12, 8, 16, 24, 3, 3, 2, 2, 2), config(bk=16), id="stride 2 and dilation 2"),
    pytest.param(ConvShape(2, 7, 9, 40, 24, 5, 5, 1, 2), config(), id="5x5"),
    pytest.param(ConvShape(1, 9, 9, 16, 16, 7, 7, 1, 0), config(bk=16), id="7x7, no padding"),
    pytest.param(ConvShape(2, 9, 8, 24, 40, 3, 3, 1, 2, 2), config(), id="dilation 2"),
    pytest.param(ConvShape(1, 5, 5, 16, 16, 3, 3, 1, 3, 3), config(), id="dilation 3, taps outside on all sides"),
    pytest.param(ConvShape(1, 4, 4, 16, 16, 3, 3, 1, 5), config(), id="padding larger than the filter"),
    pytest.param(ConvShape(2, 6, 9, 16, 16, 1, 3, 1, 1), config(), id="1x3 filter"),
    pytest.param(ConvShape(2, 9, 6, 16, 16, 4, 2, 1, 0), config(), id="4x2 filter"),
    pytest.param(ConvShape(1, 1, 1, 16, 16, 3, 3, 1, 1), config(), id="one pixel"),
    pytest.param(ConvShape(5, 3, 3, 16, 16, 3, 3, 1, 1), config((128, 1, 1)), id="box of images"),
    pytest.param(ConvShape(131, 2, 1, 16, 16, 3, 3, 1, 1), config((128, 1, 1), 16, 16), id="two boxes of images"),
    pytest.param(ConvShape(2, 5, 17, 16, 16, 3, 3, 1, 1), config((1, 1, 64), 16, 16), id="box of one row"),
    pytest.param(ConvShape(2, 17, 5, 16, 16, 3, 3, 1, 1), config((1, 64, 1), 16, 16), id="box of one column"),
    pytest.param(ConvShape(5, 14, 14, 32, 128, 3, 3, 1, 1), config((32, 2, 2), 128, 32), id="14x14 tile"),
    pytest.param(ConvShape(3, 8, 8, 32, 32, 3, 3, 1, 1), config((4, 8, 8), 32, 32), id="256 rows"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "tiling"), GEOMETRIES)
def test_exact_geometry(shape: ConvShape, tiling: ConvConfig) -> None:
    check_exact(conv_inputs(shape, FULL), tiling)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_exact_dtypes(dtype: torch.dtype, stride: int) -> None:
    tiling = config(bk=32)
    check_exact(conv_inputs(ConvShape(2, 8, 10, 32, 40, 3, 3, stride, 1), FULL, dtype), tiling)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_exact_epilogues(epilogue: Epilogue) -> None:
    check_exact(conv_inputs(ConvShape(2, 5, 7, 24, 40, 1, 1), epilogue), config((2, 4, 8), bk=32))


@pytest.mark.parametrize("vector_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_exact_vectors_of_any_dtype_and_bn_without_gamma_and_beta(vector_dtype: torch.dtype) -> None:
    epilogue = Epilogue(bn=True, bias=True)
    shape = ConvShape(2, 5, 7, 24, 40, 1, 1)
    for affine in (False, True):
        check_exact(conv_inputs(shape, epilogue, affine=affine, vector_dtype=vector_dtype), config((2, 4, 8)))


@pytest.mark.parametrize("seed", range(16))
def test_exact_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    while True:
        shape = ConvShape(
            rng.randint(1, 5), rng.randint(1, 12), rng.randint(1, 12), 8 * rng.randint(1, 12), 8 * rng.randint(1, 12),
            rng.randint(1, 4), rng.randint(1, 4), rng.choice((1, 1, 2)), rng.randint(0, 3), rng.choice((1, 1, 2, 3)),
        )  # fmt: skip
        log = [rng.randint(0, 5) for _ in range(3)]
        tiling = ConvConfig.from_dict(
            {
                "kernel": "conv_tma",
                "box": tuple(1 << i for i in log) if 5 <= sum(log) <= 8 else (2, 4, 8),
                "bn": rng.choice((16, 32, 64, 128)),
                "bk": rng.choice((16, 32, 64)),
            }
        )
        if min(shape.p, shape.q) > 0 and runs_on(tiling, shape, 2) and boxes(shape, tiling) <= 12:
            break
    check_exact(conv_inputs(shape, rng.choice(EPILOGUES)), tiling)


def boxes(shape: ConvShape, tiling: ConvConfig) -> int:
    tn, th, tw = tiling.box
    return -(-shape.n // tn) * -(-shape.p // th) * -(-shape.q // tw) * -(-shape.k // tiling.bn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_close(dtype: torch.dtype, stride: int) -> None:
    shape = ConvShape(2, 10, 12, 64, 72, 3, 3, stride, 1)
    check_close(conv_inputs(shape, Epilogue(True, True, True, True), dtype), config(bk=32))
    check_close(conv_inputs(shape, PLAIN, dtype), config(bk=32))


def test_tiling_does_not_change_the_result() -> None:
    """fp32 sums depend on BK only: the box and BN may not change a bit."""
    inputs = conv_inputs(ConvShape(3, 9, 11, 32, 40, 3, 3, 1, 1), FULL)
    inputs = inputs.replaced(x=torch.randn(inputs.x.shape).half(), w=torch.randn(inputs.w.shape).half())
    first = run(inputs, config(bk=32))
    identical(run(inputs, config(bk=32)), first)
    identical(run(inputs, config((4, 8, 8), bk=32)), first)
    identical(run(inputs, config((1, 16, 16), bn=32, bk=32)), first)


@pytest.mark.parametrize("relu", [False, True])
def test_nan_and_inf_propagate_as_in_pytorch(relu: bool) -> None:
    inputs = conv_inputs(ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1), Epilogue(bn=True, residual=True, relu=relu))
    x, residual = inputs.x.clone(), inputs.residual.clone()
    x[0, 3, 4, 5] = float("nan")
    x[0, 0, 0, -1] = float("inf")  # the last channel before those that fill the block
    residual[0, 7, 7, 2] = float("nan")
    residual[0, 7, 0, 3] = float("-inf")
    inputs = inputs.replaced(x=x, residual=residual)
    expected = inputs.expected()
    assert expected.isnan().any() and expected.isfinite().any() and expected.isinf().any()
    identical(run(inputs, config()), expected)


def test_padding_times_infinite_weights_is_as_in_pytorch() -> None:
    inputs = conv_inputs(ConvShape(1, 5, 5, 16, 16, 3, 3, 1, 1))
    w = inputs.w.clone()
    w[3, 0, 0, 0] = float("inf")  # the tap that meets padding in the first row and column
    inputs = inputs.replaced(x=inputs.x.abs() + 1, w=w)
    y, expected = run(inputs, config()), inputs.expected()
    others = torch.arange(16) != 3
    identical(y[..., others], expected[..., others])
    inside = (slice(None), slice(1, None), slice(1, None), 3)
    identical(y[inside], expected[inside])
    # zero times Inf is NaN; PyTorch's own convolutions multiply the padding or leave it out, by algorithm
    border = torch.cat((y[0, 0, :, 3], y[0, 1:, 0, 3]))
    assert border.isnan().all() or torch.equal(border, torch.cat((expected[0, 0, :, 3], expected[0, 1:, 0, 3])))


@pytest.mark.parametrize("stride", [1, 2])
def test_channel_slices_of_larger_tensors(stride: int) -> None:
    """Views with dense channels and 16-byte strides need no copy; what lies beside them is neither read nor written."""
    inputs = conv_inputs(ConvShape(2, 8, 6, 32, 40, 3, 3, stride, 1), FULL)
    s = inputs.shape
    wide_x = torch.full((s.n + 1, s.h + 2, s.w, s.c + (16 if stride == 1 else 0)), float("nan"), dtype=torch.half)
    x = wide_x[1:, 1:-1, :, : s.c]
    x.copy_(inputs.x)
    wide_residual = torch.full((s.n, s.p, s.q, s.k + 16), float("nan"), dtype=torch.half)
    residual = wide_residual[..., 8 : 8 + s.k]
    residual.copy_(inputs.residual)
    wide_y = torch.full((s.n, s.p, s.q + 3, s.k + 24), SENTINEL, dtype=torch.half)
    y = wide_y[:, :, 2 : 2 + s.q, 16 : 16 + s.k]
    operands = Operands(residual, *inputs.vectors, eps=inputs.eps, relu=True)
    launch_conv_tma(x, inputs.w, y, s, operands, config(bk=32), "ieee")
    identical(y.clone(), inputs.expected())
    y.fill_(SENTINEL)
    assert (wide_y == SENTINEL).all()

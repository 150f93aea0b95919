"""``conv_pointer`` in the interpreter: what ``conv_tma`` does, and the shapes that tensor maps cannot describe."""

from __future__ import annotations

import random

import pytest
import torch

from resnet_triton.kernels import conv_pointer as module
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import EPILOGUES, FULL, PLAIN, conv_inputs
from tests.comparers import identical
from tests.interpreter.launching import check_close, check_exact, run


def config(bm: int = 128, bn: int = 64, bk: int = 32) -> ConvConfig:
    return ConvConfig("conv_pointer", (1, 1, bm), bn, bk)


GEOMETRIES = [
    pytest.param(ConvShape(2, 8, 8, 64, 64, 3, 3, 1, 1), config(bk=64), id="no waste"),
    pytest.param(ConvShape(3, 9, 11, 24, 40, 3, 3, 1, 1), config(), id="overhang in M, K and C"),
    pytest.param(ConvShape(2, 9, 11, 24, 72, 1, 1), config(bn=32), id="1x1, three column blocks"),
    pytest.param(ConvShape(3, 9, 11, 24, 40, 3, 3, 2, 1), config(), id="stride 2, odd sizes"),
    pytest.param(ConvShape(2, 11, 13, 20, 19, 3, 3, 3, 1), config(), id="stride 3, odd channels"),
    pytest.param(ConvShape(2, 13, 15, 3, 24, 7, 7, 2, 3), config(bk=16), id="stem: C=3"),
    pytest.param(ConvShape(2, 9, 7, 1, 10, 3, 3, 1, 1), config(bk=16), id="C=1"),
    pytest.param(ConvShape(2, 6, 6, 5, 1, 2, 2, 2), config(bk=16), id="K=1"),
    pytest.param(ConvShape(2, 7, 9, 40, 24, 5, 5, 1, 2), config(), id="5x5"),
    pytest.param(ConvShape(2, 9, 8, 24, 40, 3, 3, 1, 2, 2), config(), id="dilation 2"),
    pytest.param(ConvShape(1, 12, 9, 24, 40, 3, 3, 2, 3, 3), config(), id="stride 2 and dilation 3"),
    pytest.param(ConvShape(1, 4, 4, 16, 16, 3, 3, 1, 5), config(), id="padding larger than the filter"),
    pytest.param(ConvShape(2, 6, 9, 16, 16, 1, 3, 1, 1), config(), id="1x3 filter"),
    pytest.param(ConvShape(1, 1, 1, 17, 16, 3, 3, 1, 1), config(), id="one pixel"),
]


@pytest.fixture(params=[False, True], ids=["int32", "int64"])
def wide(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both widths of offsets; the wide one needs tensors of 2**31 elements otherwise."""
    if request.param:
        monkeypatch.setattr(module, "needs_int64", lambda *tensors: True)
    return request.param


@pytest.mark.parametrize(("shape", "tiling"), GEOMETRIES)
def test_exact_geometry(shape: ConvShape, tiling: ConvConfig) -> None:
    check_exact(conv_inputs(shape, FULL), tiling)


@pytest.mark.parametrize(("shape", "tiling"), [GEOMETRIES[1], GEOMETRIES[3], GEOMETRIES[5]])
def test_exact_with_64_bit_offsets(shape: ConvShape, tiling: ConvConfig, wide: bool) -> None:
    check_exact(conv_inputs(shape, FULL), tiling)


def test_input_and_output_decide_the_width_of_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "needs_int64", lambda *tensors: seen.extend(t.shape for t in tensors))
    inputs = conv_inputs(ConvShape(1, 4, 4, 16, 24))
    run(inputs, config())
    assert seen == [(1, 4, 4, 16), (1, 4, 4, 24)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_exact_dtypes(dtype: torch.dtype, stride: int) -> None:
    check_exact(conv_inputs(ConvShape(2, 9, 10, 21, 40, 3, 3, stride, 1), FULL, dtype), config())


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_exact_epilogues(epilogue: Epilogue) -> None:
    check_exact(conv_inputs(ConvShape(2, 5, 7, 21, 35), epilogue), config())


def test_exact_bn_without_gamma_and_beta() -> None:
    check_exact(conv_inputs(ConvShape(2, 5, 7, 21, 35), Epilogue(bn=True), affine=False), config())


@pytest.mark.parametrize("seed", range(12))
def test_exact_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    while True:
        shape = ConvShape(
            rng.randint(1, 5), rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 70), rng.randint(1, 90),
            rng.randint(1, 4), rng.randint(1, 4), rng.randint(1, 4), rng.randint(0, 3), rng.choice((1, 1, 2, 3)),
        )  # fmt: skip
        tiling = config(rng.choice((64, 128, 256)), rng.choice((16, 32, 64)), rng.choice((16, 32, 64)))
        if min(shape.p, shape.q) > 0 and -(-shape.m // tiling.bm) * -(-shape.k // tiling.bn) <= 8:
            break
    check_exact(conv_inputs(shape, rng.choice(EPILOGUES)), tiling)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_close(dtype: torch.dtype) -> None:
    shape = ConvShape(2, 10, 13, 64, 72, 3, 3, 2, 1)
    check_close(conv_inputs(shape, Epilogue(True, True, True, True), dtype), config())
    check_close(conv_inputs(shape, PLAIN, dtype), config())


def test_same_bits_as_conv_tma() -> None:
    """The two kernels add in the same order, so a GPU without TMA gives what one with it gives."""
    inputs = conv_inputs(ConvShape(2, 8, 12, 32, 40, 3, 3, 2, 1), FULL)
    inputs = inputs.replaced(x=torch.randn(inputs.x.shape).half(), w=torch.randn(inputs.w.shape).half())
    first = run(inputs, config())
    identical(run(inputs, config(64, 16)), first)
    identical(run(inputs, ConvConfig("conv_tma", (2, 8, 8), 64, 32)), first)


@pytest.mark.parametrize("relu", [False, True])
def test_nan_and_inf_propagate_as_in_pytorch(relu: bool) -> None:
    inputs = conv_inputs(ConvShape(1, 7, 8, 16, 16, 3, 3, 1, 1), Epilogue(bn=True, residual=True, relu=relu))
    x, residual = inputs.x.clone(), inputs.residual.clone()
    x[0, 3, 4, 5] = float("nan")
    x[0, 0, 0, -1] = float("inf")  # the last channel before those that fill the block
    residual[0, 6, 7, 2] = float("nan")
    residual[0, 6, 0, 3] = float("-inf")
    inputs = inputs.replaced(x=x, residual=residual)
    expected = inputs.expected()
    assert expected.isnan().any() and expected.isfinite().any() and expected.isinf().any()
    identical(run(inputs, config()), expected)

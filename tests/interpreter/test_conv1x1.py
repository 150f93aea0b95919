"""``conv1x1`` in the interpreter: overhangs in M, K and C, more tiles than programs, every epilogue, strided rows."""

from __future__ import annotations

import pytest
import torch

from resnet_triton.kernels import conv1x1 as module
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.conv1x1 import launch_conv1x1
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import EPILOGUES, FULL, PLAIN, SENTINEL, conv_inputs
from tests.comparers import identical
from tests.interpreter.launching import check_close, check_exact, run


def config(bm: int = 64, bn: int = 64, bk: int = 64, persistent: int = 0) -> ConvConfig:
    return ConvConfig("conv1x1", (1, 1, bm), bn, bk, persistent=persistent)


@pytest.mark.parametrize(
    ("shape", "tiling"),
    [
        pytest.param(ConvShape(2, 8, 8, 64, 64), config(), id="no waste"),
        pytest.param(ConvShape(3, 9, 11, 24, 40), config(), id="overhang in M, K and C"),
        pytest.param(ConvShape(3, 9, 11, 72, 136), config(128, 32, 32), id="ten column blocks, three channel blocks"),
        pytest.param(ConvShape(1, 1, 1, 8, 8), config(16, 16, 16), id="smallest"),
        pytest.param(ConvShape(1, 1, 1, 512, 1000), config(16, 128, 64), id="fully connected"),
        pytest.param(ConvShape(5, 7, 13, 16, 8), config(32, 16, 16), id="fifteen row blocks"),
        pytest.param(ConvShape(2, 16, 16, 48, 256), config(256, 256, 16), id="256x256"),
    ],
)
def test_exact_geometry(shape: ConvShape, tiling: ConvConfig) -> None:
    check_exact(conv_inputs(shape, FULL), tiling)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_exact_dtypes(dtype: torch.dtype) -> None:
    check_exact(conv_inputs(ConvShape(2, 9, 11, 40, 72), FULL, dtype), config(bk=32))


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_exact_epilogues(epilogue: Epilogue) -> None:
    check_exact(conv_inputs(ConvShape(2, 5, 7, 24, 40), epilogue), config())


@pytest.mark.parametrize("persistent", (0, 1))
def test_exact_residual_with_a_bn_of_its_own(persistent: int) -> None:
    shape = ConvShape(2, 5, 7, 24, 40)
    inputs, other = conv_inputs(shape, FULL), conv_inputs(shape, FULL)
    scale = torch.rsqrt(other.var.double() + other.eps) * other.gamma.double()
    normalised = (inputs.residual.double() - other.mean.double()) * scale + other.beta.double()
    expected = inputs.replaced(residual=normalised).expected()
    y = torch.full((70, 40), float("nan"), dtype=torch.float16)
    operands = Operands(
        inputs.residual.view(70, 40), *inputs.vectors, inputs.eps, True, residual_bn=(*other.vectors, other.eps)
    )
    x, w = inputs.x.view(70, 24), inputs.w.view(40, 24)
    launch_conv1x1(x, w, y, operands, config(16, 16, 16, persistent), "ieee")
    identical(y, expected.view(70, 40))
    with pytest.raises(ValueError, match="the second kernel of split=2 does not normalise the residual"):
        launch_conv1x1(x, w, y, operands, ConvConfig("conv1x1", (1, 1, 16), 16, 16, split=2), "ieee")


def test_exact_bn_without_gamma_and_beta() -> None:
    check_exact(conv_inputs(ConvShape(2, 5, 7, 24, 40), Epilogue(bn=True), affine=False), config())


@pytest.mark.parametrize(("multiprocessors", "persistent"), [(1, 1), (1, 2), (1, 3), (7, 1), (5, 2), (1000, 1)])
def test_any_number_of_persistent_programs_covers_every_tile(
    multiprocessors: int, persistent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 tiles."""
    monkeypatch.setattr(module, "multiprocessors", lambda device: multiprocessors)
    check_exact(conv_inputs(ConvShape(3, 9, 11, 16, 40), FULL), config(64, 16, 16, persistent))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
def test_close(dtype: torch.dtype) -> None:
    shape = ConvShape(2, 9, 11, 256, 72)
    check_close(conv_inputs(shape, Epilogue(True, True, True, True), dtype), config(bk=32))
    check_close(conv_inputs(shape, PLAIN, dtype), config(bk=32))


def test_tiling_does_not_change_the_result() -> None:
    inputs = conv_inputs(ConvShape(3, 9, 11, 64, 40), FULL)
    inputs = inputs.replaced(x=torch.randn(inputs.x.shape).half(), w=torch.randn(inputs.w.shape).half())
    first = run(inputs, config(bk=32))
    for tiling in (config(bk=32), config(128, 32, 32), config(256, 16, 32), config(64, 32, 32, 1)):
        identical(run(inputs, tiling), first)


def test_nan_and_inf_propagate_as_in_pytorch() -> None:
    inputs = conv_inputs(ConvShape(1, 6, 6, 16, 16), FULL)
    x, residual = inputs.x.clone(), inputs.residual.clone()
    x[0, 3, 4, 5] = float("nan")
    x[0, 0, 0, -1] = float("inf")  # the last channel before those that fill the block
    residual[0, 5, 5, 2] = float("nan")
    residual[0, 5, 0, 3] = float("inf")
    inputs = inputs.replaced(x=x, residual=residual)
    expected = inputs.expected()
    assert expected.isnan().any() and expected.isfinite().any() and expected.isinf().any()
    identical(run(inputs, config()), expected)


def test_padded_rows() -> None:
    """Rows may lie apart by any multiple of 16 bytes."""
    inputs = conv_inputs(ConvShape(1, 9, 11, 32, 40), FULL)
    m, c, k = inputs.shape.m, 32, 40
    x = torch.full((m, c + 8), float("nan"), dtype=torch.half)[:, :c]
    residual = torch.full((m, k + 24), float("nan"), dtype=torch.half)[:, 16 : 16 + k]
    wide_y = torch.full((m, k + 16), SENTINEL, dtype=torch.half)
    y = wide_y[:, 8 : 8 + k]
    x.copy_(inputs.x.view(m, c))
    residual.copy_(inputs.residual.view(m, k))
    operands = Operands(residual, *inputs.vectors, eps=inputs.eps, relu=True)
    launch_conv1x1(x, inputs.w.view(k, c), y, operands, config(), "ieee")
    identical(y.clone(), inputs.expected().reshape(m, k))
    y.fill_(SENTINEL)
    assert (wide_y == SENTINEL).all()


@pytest.mark.parametrize(
    "shape",
    [
        ConvShape(1, 8, 8, 16, 16, stride=2),
        ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1),
        ConvShape(1, 8, 8, 16, 16, padding=1),
    ],
)
def test_refuses_what_is_no_plain_gemm(shape: ConvShape) -> None:
    with pytest.raises(ValueError, match=r"conv1x1 computes 1x1 convolutions of stride 1, got"):
        run(conv_inputs(shape), config())

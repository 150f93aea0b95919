"""PReLU at the end of a convolution in the interpreter: slopes are powers of two, so integers stay exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import functional, plan, reference, use_backend
from resnet_triton.kernels.bn_act import launch_bn_act
from resnet_triton.kernels.config import PRELU_KERNELS, ConvConfig, Epilogue
from resnet_triton.kernels.conv_pointer import launch_conv_pointer
from resnet_triton.kernels.conv_rolling import launch_conv_rolling
from resnet_triton.kernels.dispatch import launch_conv
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import ConvInputs, Guarded, conv_inputs
from tests.comparers import identical, no_worse_than

NAN, INF = float("nan"), float("inf")
BIASED = Epilogue(bias=True)
FULL = Epilogue(bn=True, bias=True, residual=True)
ADDED = Epilogue(bn=True, residual=True)
#: Rows and columns beyond the tiles, channels beyond the blocks; and a reduction that two programs share.
CASES = {
    "conv_tma": (ConvShape(1, 5, 7, 16, 24, 3, 3, 1, 1), ConvConfig("conv_tma", (1, 4, 4), 16, 16), FULL),
    "split": (ConvShape(1, 5, 4, 32, 24, 3, 3, 1, 1), ConvConfig("conv_tma", (1, 4, 4), 16, 32, split=2), FULL),
    "conv1x1": (ConvShape(2, 5, 7, 24, 40), ConvConfig("conv1x1", (1, 1, 32), 32, 16), BIASED),
    "persistent": (ConvShape(2, 5, 7, 16, 40), ConvConfig("conv1x1", (1, 1, 16), 16, 16, persistent=1), ADDED),
    "conv_pointer": (ConvShape(2, 7, 5, 10, 20, 3, 3, 2, 1), ConvConfig("conv_pointer", (1, 1, 16), 32, 16), FULL),
}  # fmt: skip


def powers(count: int) -> Tensor:
    """Slopes of either sign, zero among them."""
    return torch.tensor([0.25, -0.5, 0.0, 2.0, 1.0])[torch.randint(0, 5, (count,))]


def expected_of(inputs: ConvInputs, slope: Tensor) -> Tensor:
    """``[N,P,Q,K]``: the fp64 reference, rounded once."""
    x, w, residual = (
        None if t is None else t.permute(0, 3, 1, 2).double() for t in (inputs.x, inputs.w, inputs.residual)
    )
    vectors = (None if v is None else v.double() for v in inputs.vectors)
    s = inputs.shape
    y = reference.conv_bn_act(
        x, w, *vectors, residual, inputs.eps, False, s.stride, s.padding, s.dilation, slope.double()
    )
    return y.to(inputs.x.dtype).permute(0, 2, 3, 1)


@pytest.mark.parametrize(("dtype", "one"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, dtype: torch.dtype, one: bool, counts) -> None:
    shape, config, epilogue = CASES[name]
    inputs = conv_inputs(shape, epilogue, dtype)
    slope = torch.tensor([0.25]) if one else powers(shape.k)
    guarded = Guarded()
    y = guarded.output(shape.n, shape.p, shape.q, shape.k, dtype=dtype)
    operands = Operands(
        guarded.input(inputs.residual), *(guarded.input(v) for v in inputs.vectors), eps=inputs.eps,
        slope=guarded.input(slope),
    )  # fmt: skip
    launch_conv(guarded.input(inputs.x), guarded.input(inputs.w), y, shape, operands, config, "ieee")
    guarded.verify()
    assert counts == {config.kernel: 1, **({"split_k_epilogue": 1} if config.split > 1 else {})}
    expected = expected_of(inputs, slope)
    assert (expected < 0).any() and (expected > 0).any()
    identical(y, expected)


@pytest.mark.parametrize("one", [False, True])
def test_the_pass_behind_a_librarys_convolution(one: bool, counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that is planned so: the library's convolution and one launch."""
    inputs = conv_inputs(ConvShape(2, 6, 5, 16, 24, 3, 3, 2, 1), FULL, torch.float32)
    slope = torch.tensor([0.5]) if one else powers(24)
    x, w, residual = (t.permute(0, 3, 1, 2) for t in (inputs.x, inputs.w, inputs.residual))
    monkeypatch.setattr(plan, "choose_conv", lambda *_: plan.Choice(plan.ONE_PASS, None, "the test says so"))
    with torch.no_grad(), use_backend("triton"):
        y = functional.conv_bn_act(
            x, w, *inputs.vectors, residual=residual, eps=inputs.eps, stride=2, padding=1, slope=slope
        )
    assert counts == {"bn_act": 1}
    identical(y.permute(0, 2, 3, 1), expected_of(inputs, slope))


def test_nan_and_infinity_as_in_pytorch() -> None:
    values = torch.tensor([NAN, INF, -INF, -0.0, 0.0, -3.0, 5.0, NAN]).repeat(4, 1)
    slope = torch.tensor([0.5, 0.5, 0.5, 2.0, 0.25, NAN, NAN, 0.0])
    y = torch.empty(1, 1, 4, 8)
    launch_bn_act(y, Operands(slope=slope), values.view(1, 1, 4, 8))
    expected = torch.nn.functional.prelu(values, slope)
    identical(y.view(4, 8).nan_to_num(7.0), expected.nan_to_num(7.0))
    identical(y.view(4, 8).isnan(), expected.isnan())


@pytest.mark.parametrize("kernel", PRELU_KERNELS)
def test_the_plan_runs_it_through_the_public_function(kernel: str, counts) -> None:
    """Values and all gradients, in fp32 no worse than PyTorch's own."""
    size, dtype = (1, 32) if kernel == "conv1x1" else (3, 32), torch.float32
    channels = 10 if kernel == "conv_pointer" else 16
    torch.manual_seed(3)
    x, weight, bias, slope = (
        torch.randn(2, channels, 5, 6), torch.randn(size[1], channels, size[0], size[0]) / 8, torch.randn(size[1]),
        torch.rand(size[1]) - 0.3,
    )  # fmt: skip
    arguments = {"stride": 1, "padding": size[0] // 2}

    def outputs(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias, slope)]
        y = function(*leaves[:3], slope=leaves[3], **arguments)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    with use_backend("triton"):
        ours = outputs(functional.conv_bn_act, dtype)
    assert counts == {kernel: 2}, "the backward computes PReLU's input again"
    eager, exact = (outputs(reference_of, d) for d in (dtype, torch.float64))
    for a, b, c in zip(ours, eager, exact, strict=True):
        no_worse_than(a.detach(), b.detach(), c.detach())


def reference_of(x: Tensor, weight: Tensor, bias: Tensor, *, slope: Tensor, stride: int, padding: int) -> Tensor:
    return torch.nn.functional.prelu(torch.nn.functional.conv2d(x, weight, bias, stride, padding), slope)


def test_other_kernels_refuse_it() -> None:
    """Nothing is lost silently; and an empty batch needs no launch."""
    shape = ConvShape(1, 4, 8, 16, 16, 3, 3, 1, 1)
    inputs, operands = conv_inputs(shape), Operands(slope=torch.ones(16))
    y = torch.empty(1, 4, 8, 16, dtype=torch.float16)
    config = ConvConfig("conv_rolling", (2, 4, 8), 16, 16, 4, 2)
    with pytest.raises(ValueError, match=r"operands.slope is set; PReLU is for conv_tma, conv1x1"):
        launch_conv_rolling(inputs.x, inputs.w, y, shape, operands, config, "ieee")
    config = ConvConfig("conv_pointer", (1, 1, 16), 16, 16)
    launch_conv_pointer(inputs.x, inputs.w, y, shape, operands, config, "ieee")
    identical(y, inputs.expected())

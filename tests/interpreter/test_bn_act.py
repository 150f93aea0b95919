"""``bn_act`` in the interpreter: the pass behind a library's convolution, alone and as a convolution's realisation."""

from __future__ import annotations

import pytest
import torch

from resnet_triton import functional, plan, use_backend
from resnet_triton.kernels.bn_act import launch_bn_act
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import EPILOGUES, FULL, Guarded, conv_inputs
from tests.comparers import identical


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_exact(epilogue: Epilogue, dtype: torch.dtype) -> None:
    inputs = conv_inputs(ConvShape(2, 3, 7, 16, 40, 1, 1), epilogue, dtype)
    plain = inputs.replaced(epilogue=Epilogue(), bias=None, residual=None, gamma=None, beta=None, mean=None, var=None)
    guarded = Guarded()
    y = guarded.output(2, 3, 7, 40, dtype=dtype)
    y.copy_(plain.expected())
    vectors = (guarded.input(v) for v in inputs.vectors)
    launch_bn_act(y, Operands(guarded.input(inputs.residual), *vectors, eps=inputs.eps, relu=epilogue.relu))
    guarded.verify()
    identical(y, inputs.expected())


def test_many_rows_and_channel_blocks() -> None:
    inputs = conv_inputs(ConvShape(3, 5, 5, 16, 200, 1, 1), FULL)
    y = conv_inputs(inputs.shape).replaced(x=inputs.x, w=inputs.w).expected().contiguous()
    launch_bn_act(y, Operands(inputs.residual, *inputs.vectors, eps=inputs.eps, relu=True))
    identical(y, inputs.expected())
    empty = torch.empty(0, 5, 5, 8)
    launch_bn_act(empty, Operands(relu=True))


def test_behind_the_librarys_convolution(counts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution that is planned so: same result, the library's convolution and one launch."""
    inputs = conv_inputs(ConvShape(2, 6, 5, 16, 24, 3, 3, 2, 1), FULL, torch.float32)
    x, w, residual = (t.permute(0, 3, 1, 2) for t in (inputs.x, inputs.w, inputs.residual))
    monkeypatch.setattr(plan, "choose_conv", lambda *_: plan.Choice(plan.ONE_PASS, None, "the test says so"))
    bias, gamma, beta, mean, var = inputs.vectors
    with torch.no_grad(), use_backend("triton"):
        y = functional.conv_bn_act(
            x, w, bias, gamma, beta, mean, var, residual=residual, eps=inputs.eps, stride=2, padding=1
        )
    assert counts == {"bn_act": 1}
    assert y.is_contiguous(memory_format=torch.channels_last)
    identical(y.permute(0, 2, 3, 1), inputs.expected())

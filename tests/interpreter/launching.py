"""Runs one convolution kernel on guarded buffers and checks all that every case has to satisfy."""

from __future__ import annotations

import torch
from torch import Tensor

from resnet_triton import reference
from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.dispatch import launch_conv
from resnet_triton.kernels.epilogue import Operands
from tests.cases import ConvInputs, Guarded
from tests.comparers import identical, no_worse_than


def run(inputs: ConvInputs, config: ConvConfig, precision: str = "ieee") -> Tensor:
    """The output ``[N,P,Q,K]`` of ``config.kernel``; only that kernel runs, and no stray element is written or used."""
    s = inputs.shape
    guarded = Guarded()
    y = guarded.output(s.n, s.p, s.q, s.k, dtype=inputs.x.dtype)
    operands = Operands(
        guarded.input(inputs.residual),
        *(guarded.input(v) for v in inputs.vectors),
        eps=inputs.eps,
        relu=inputs.epilogue.relu,
    )
    launch.COUNTS.clear()
    launch_conv(guarded.input(inputs.x), guarded.input(inputs.w), y, s, operands, config, precision)
    second = {"split_k_epilogue": 1} if config.split > 1 else {}
    assert {config.kernel: 1, **second} == launch.COUNTS
    guarded.verify()
    return y


def check_exact(inputs: ConvInputs, config: ConvConfig) -> None:
    """Bit by bit the fp64 reference."""
    expected = inputs.expected()
    assert expected.isfinite().all() and expected.count_nonzero() > 0, "the case tests nothing"
    identical(run(inputs, config), expected)


def check_close(inputs: ConvInputs, config: ConvConfig) -> None:
    """Random normal values: no worse than eager PyTorch of the same dtype."""
    s, dtype = inputs.shape, inputs.x.dtype
    scaled = inputs.replaced(
        x=torch.randn(inputs.x.shape).to(dtype),
        w=(torch.randn(inputs.w.shape) / s.reduction**0.5).to(dtype),
        residual=None if inputs.residual is None else torch.randn(inputs.residual.shape).to(dtype),
        bias=None if inputs.bias is None else torch.randn(s.k).to(dtype),
        gamma=None if inputs.gamma is None else torch.rand(s.k) + 0.5,
        beta=None if inputs.beta is None else torch.randn(s.k),
        mean=None if inputs.mean is None else torch.randn(s.k) / 4,
        var=None if inputs.var is None else torch.rand(s.k) + 0.5,
        eps=1e-5,
    )

    def convolve(cast) -> Tensor:
        x, w, residual = (
            None if t is None else cast(t.permute(0, 3, 1, 2)) for t in (scaled.x, scaled.w, scaled.residual)
        )
        vectors = (None if v is None else (v.double() if x.dtype == torch.float64 else v) for v in scaled.vectors)
        y = reference.conv_bn_act(
            x, w, *vectors, residual, scaled.eps, scaled.epilogue.relu, s.stride, s.padding, s.dilation
        )
        return y.permute(0, 2, 3, 1)

    no_worse_than(run(scaled, config), convolve(lambda t: t), convolve(lambda t: t.double()))

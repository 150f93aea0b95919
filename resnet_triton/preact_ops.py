"""The operators of pre-activation blocks with constant statistics: a BN and ReLU, and both in front of a convolution.

    bn_relu(x)        = relu(bn(x))
    bn_relu_conv(x)   = [relu](bn'(conv(relu(bn(x)))))

The second is one kernel where ``conv1x1`` can normalise what it loads: the residual sum is then read once, and what the
first would store never exists. Elsewhere a pass comes first. As in :mod:`.ops`, a graph never depends on the plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, cost, plan
from .devices import Target
from .kernels.config import Epilogue, count_tiles, reduction_steps
from .kernels.geometry import ConvShape, cdiv
from .ops import FAKES, IMPLEMENTATIONS, library
from .steps import (
    Recorder,
    Vectors,
    channels_last,
    check_conv,
    conv_geometry,
    conv_out_shape,
    conv_step,
    dense_vectors,
    new_channels_last,
    nhwc,
    run,
    target_for,
)

#: Instructions that normalising a value costs as it is loaded, read off sm_90 machine code.
LEAD_PER_VALUE = 5.0
LEAD = ("gamma", "beta", "mean", "var")

library.define("bn_relu(Tensor x, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps) -> Tensor")
library.define(
    "bn_relu_conv(Tensor x, Tensor? lead_gamma, Tensor? lead_beta, Tensor lead_mean, Tensor lead_var, float lead_eps, "
    "Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, bool relu, "
    "int stride, int padding, int dilation) -> Tensor"
)


def _check_lead(x: Tensor, vectors: tuple[Tensor | None, ...]) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be [N, C, H, W] of a floating type, got {tuple(x.shape)} {x.dtype}")
    for name, v in zip(LEAD, vectors, strict=True):
        if v is not None and tuple(v.shape) != (x.shape[1],):
            raise ValueError(f"{name} of the BN in front must be [C] = [{x.shape[1]}], got {tuple(v.shape)}")
        if v is not None and v.device != x.device:
            raise ValueError(f"{name} of the BN in front is on {v.device}, x on {x.device}; move both to one device")


def bn_relu(x, gamma, beta, mean, var, eps):
    """Implementation of ``torch.ops.resnet_triton.bn_relu``."""
    _check_lead(x, (gamma, beta, mean, var))
    x = channels_last(x)
    if x.numel() == 0 and not Recorder.active:
        return torch.empty_like(x)
    choice = choose_pass(x.numel() * x.element_size(), x.dtype, target_for(x), backend.current_backend())

    def launch(out: Tensor) -> None:
        from .kernels.bn_act import launch_bn_act
        from .kernels.epilogue import Operands

        operands = Operands(None, *dense_vectors((None, gamma, beta, mean, var)), eps=eps, relu=True)
        launch_bn_act(out.permute(0, 2, 3, 1), operands, nhwc(x))

    size = x.numel() * x.element_size()
    return run(
        "bn+relu",
        choice,
        lambda: new_channels_last(x, *x.shape),
        launch,
        lambda: F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps)),
        lambda: 2 * size if choice.fused else 4 * size,
        weight=mean,
    )


def _fake_bn_relu(x, gamma, beta, mean, var, eps):
    _check_lead(x, (gamma, beta, mean, var))
    return new_channels_last(x, *x.shape)


def choose_pass(size: int, dtype: torch.dtype, target: Target, backend: str) -> plan.Choice:
    """How BN and ReLU of a tensor of so many bytes run."""
    return plan.choose_step("bn_act", target, dtype, backend, (2 * size, 1), (4 * size, 2))


def bn_relu_conv(
    x, lead_gamma, lead_beta, lead_mean, lead_var, lead_eps, weight, bias, gamma, beta, mean, var, eps, relu, stride,
    padding, dilation,
):  # fmt: skip
    """Implementation of ``torch.ops.resnet_triton.bn_relu_conv``."""
    lead = (lead_gamma, lead_beta, lead_mean, lead_var)
    vectors: Vectors = (bias, gamma, beta, mean, var)
    _check_lead(x, lead)
    check_conv(x, weight, vectors, None)
    shape, out = conv_geometry(x.shape, weight.shape, stride, padding, dilation)
    epilogue = Epilogue(var is not None, bias is not None, False, relu)
    precision = backend.dot_precision(x.dtype)
    choice = None
    if shape.n > 0 or Recorder.active:
        choice = choose_lead(shape, epilogue, x.dtype, precision, target_for(x), backend.current_backend())
    if choice is None:
        h = bn_relu(x, *lead, lead_eps)
        return conv_step(h, weight, vectors, None, eps, relu, stride, padding, dilation)

    def launch(y: Tensor) -> None:
        from .kernels.conv1x1 import launch_conv1x1
        from .kernels.epilogue import Operands
        from .kernels.prologue import launch_bn_vectors

        prologue = launch_bn_vectors(*lead, lead_eps)
        operands = Operands(None, *dense_vectors(vectors), eps=eps, relu=relu)
        rows, filters = nhwc(x).view(shape.m, shape.c), nhwc(weight).view(shape.k, shape.c)
        launch_conv1x1(
            rows, filters, y.permute(0, 2, 3, 1).view(shape.m, shape.k), operands, choice.tiling, precision, prologue
        )

    size = x.element_size()
    return run(
        "bn+relu+conv",
        choice,
        lambda: new_channels_last(x, *out),
        launch,
        lambda: new_channels_last(x, *out),
        lambda: plan.conv_bytes(shape, epilogue, choice, size),
        weight=weight,
        shape=shape,
        epilogue=epilogue,
        weight_bytes=shape.weights * size,
    )


def _fake_bn_relu_conv(
    x, lead_gamma, lead_beta, lead_mean, lead_var, lead_eps, weight, bias, gamma, beta, mean, var, eps, relu, stride,
    padding, dilation,
):  # fmt: skip
    _check_lead(x, (lead_gamma, lead_beta, lead_mean, lead_var))
    check_conv(x, weight, (bias, gamma, beta, mean, var), None)
    return new_channels_last(x, *conv_out_shape(x.shape, weight.shape, stride, padding, dilation))


@functools.lru_cache(maxsize=1024)
def choose_lead(
    shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, target: Target, backend: str
) -> plan.Choice | None:
    """The kernel that normalises what it loads, or None where a pass in front of the convolution comes first.

    Args:
        shape, epilogue: of the convolution.
        dtype, precision, target, backend: as in :func:`.plan.choose_conv`.
    """
    if backend == "cudnn" or plan.refusal(target, dtype) or not shape.pointwise:
        return None
    if not target.is_cuda and backend != "triton":
        return None
    size = dtype.itemsize
    configs = [
        config
        for config in plan.own_configs(shape, dtype, precision, target)
        if config.kernel == "conv1x1" and (not target.is_cuda or cost.fits(config, shape, size, False, target))
    ]
    if not configs:
        return None
    if not target.is_cuda:
        return plan.Choice("conv1x1", configs[0], "use_backend('triton') in the interpreter")

    def predict(config) -> cost.Prediction:
        ours = cost.predict(shape, epilogue, config, dtype, precision, target)
        values = reduction_steps(config, shape) * config.bm * config.bk / 32
        waves = cdiv(count_tiles(config, shape), target.multiprocessors)
        issue = ours.issue + waves * values * LEAD_PER_VALUE / 4 / (target.clock_ghz * 1e3)
        return replace(ours, issue=issue, extra=ours.extra + cost.LAUNCH_US)  # of the vectors

    config = min(configs, key=lambda config: predict(config).us)
    ours = predict(config)
    alone = plan.choose_conv(shape, epilogue, dtype, precision, target, backend)
    before = choose_pass(shape.n * shape.h * shape.w * shape.c * size, dtype, target, backend)
    apart = (alone.measured_us or alone.predicted_us or 0.0) + (before.predicted_us or 0.0)
    if ours.us >= apart:
        return None
    text = f"unmeasured; BN and ReLU on load: predicted {ours.us:.1f} us ({ours.limit}), {apart:.1f} us behind a pass"
    return plan.Choice("conv1x1", config, text, ours.us, limit=ours.limit)


plan.CLEARED.append(choose_lead.cache_clear)

_IMPLEMENTATIONS: dict[str, Callable] = {"bn_relu": bn_relu, "bn_relu_conv": bn_relu_conv}
_FAKES: dict[str, Callable] = {"bn_relu": _fake_bn_relu, "bn_relu_conv": _fake_bn_relu_conv}
IMPLEMENTATIONS.update(_IMPLEMENTATIONS)
FAKES.update(_FAKES)
for _name, _implementation in _IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_triton::{_name}", _FAKES[_name], lib=library)

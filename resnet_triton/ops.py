"""The ``torch.ops.resnet_triton`` operators: schemas, shapes, and the steps of each.

An operator says *what* is computed. How (one of our kernels, cuDNN, oneDNN) is decided step by step inside, by
``plan``, where shapes are concrete; so a traced graph never depends on the batch or image size. Every activation that
an operator returns is channels_last.

Several convolutions of one operator are passed as *units*: ``[weight, bias, gamma, beta, mean, var]`` lists, with one
``eps`` and one ``(stride, padding, dilation)`` each. An empty list is an absent unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend, plan, reference
from .kernels.geometry import out_size
from .steps import (
    UNIT,
    Recorder,
    aligned,
    channels_last,
    check_conv,
    check_operands,
    check_residual,
    check_slope,
    conv_out_shape,
    conv_step,
    dense_vectors,
    new_channels_last,
    nhwc,
    run,
    stem_step,
    target_for,
)
from .tail import Unit, Units, tail_shapes, tail_step

library = torch.library.Library("resnet_triton", "DEF")

library.define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, "
    "Tensor? residual, float eps, bool relu, int stride, int padding, int dilation, Tensor? slope=None) -> Tensor"
)
library.define(
    "block_tail(Tensor t, Tensor shortcut, Tensor?[] conv2, Tensor?[] conv3, Tensor?[] downsample, Tensor?[] next, "
    "float[] eps, int[] geometry, int subsample=1, bool pool=False) -> Tensor[]"
)
library.define(
    "bottleneck(Tensor x, Tensor?[] conv1, Tensor?[] conv2, Tensor?[] conv3, Tensor?[] downsample, Tensor?[] next, "
    "float[] eps, int[] geometry, int subsample=1, bool pool=False) -> Tensor[]"
)
library.define(
    "stem(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, "
    "Tensor? norm_mean, Tensor? norm_std, float eps, bool pool) -> Tensor"
)
library.define("head(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
library.define(
    "fold_bn(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps) "
    "-> (Tensor, Tensor)"
)
library.define("add_relu(Tensor x, Tensor y) -> Tensor")


def conv_bn_act(x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation, slope=None):
    """Implementation of ``torch.ops.resnet_triton.conv_bn_act``."""
    vectors = (bias, gamma, beta, mean, var)
    check_slope(slope, weight, relu)
    return conv_step(x, weight, vectors, residual, eps, relu, stride, padding, dilation, slope=slope)


def _fake_conv(x, weight, vectors, residual, stride, padding, dilation):
    check_conv(x, weight, vectors, residual)
    out = conv_out_shape(x.shape, weight.shape, stride, padding, dilation)
    check_residual(residual, out, x.dtype)
    return new_channels_last(x, *out)


def _fake_conv_bn_act(
    x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation, slope=None
):
    check_slope(slope, weight, relu)
    return _fake_conv(x, weight, (bias, gamma, beta, mean, var), residual, stride, padding, dilation)


def split_units(units: Sequence[Sequence[Tensor | None]], eps: Sequence[float], geometry: Sequence[int]):
    """The :class:`.tail.Unit` of each unit, None for an absent one."""
    present = sum(1 for unit in units if unit)
    if len(eps) != present or len(geometry) != 3 * present:
        raise ValueError(
            f"{present} units need {present} eps and {3 * present} geometry values, got {len(eps)} and {len(geometry)}"
        )
    parts: list[Any] = []
    i = 0
    for unit in units:
        if not unit:
            parts.append(None)
            continue
        if len(unit) != len(UNIT) or unit[0] is None:
            raise ValueError(f"a unit is [{', '.join(UNIT)}] with a weight, got {len(unit)} items")
        parts.append(Unit(unit[0], tuple(unit[1:]), eps[i], tuple(geometry[3 * i : 3 * i + 3])))  # type: ignore[arg-type]
        i += 1
    return parts


def _units(first, second, third, project, reduce, subsample: int, pool: bool) -> Units:
    if subsample < 1 or (pool and (subsample > 1 or reduce is not None)):
        raise ValueError(
            f"subsample must be at least 1, and pool comes alone; got subsample={subsample}, pool={pool}, "
            f"next {'absent' if reduce is None else 'present'}"
        )
    return Units(second, None, project, reduce) if third is None else Units(third, second, project, reduce, first)


def _tail_units(conv2, conv3, downsample, next, eps, geometry, subsample, pool) -> Units:
    second, third, project, reduce = split_units((conv2, conv3, downsample, next), eps, geometry)
    return _units(None, second, third, project, reduce, subsample, pool)


def _block_units(conv1, conv2, conv3, downsample, next, eps, geometry, subsample, pool) -> Units:
    first, second, third, project, reduce = split_units((conv1, conv2, conv3, downsample, next), eps, geometry)
    if first is None or second is None or third is None:
        raise ValueError("a bottleneck has conv1, conv2 and conv3; got an empty list for one of them")
    return _units(first, second, third, project, reduce, subsample, pool)


def block_tail(t, shortcut, conv2, conv3, downsample, next, eps, geometry, subsample=1, pool=False):
    """Implementation of ``torch.ops.resnet_triton.block_tail``."""
    units = _tail_units(conv2, conv3, downsample, next, eps, geometry, subsample, pool)
    return tail_step(t, shortcut, units, subsample, pool)


def _fake_block_tail(t, shortcut, conv2, conv3, downsample, next, eps, geometry, subsample=1, pool=False):
    units = _tail_units(conv2, conv3, downsample, next, eps, geometry, subsample, pool)
    return tail_shapes(t, shortcut, units, subsample, pool)


def bottleneck(x, conv1, conv2, conv3, downsample, next, eps, geometry, subsample=1, pool=False):
    """Implementation of ``torch.ops.resnet_triton.bottleneck``."""
    units = _block_units(conv1, conv2, conv3, downsample, next, eps, geometry, subsample, pool)
    return tail_step(x, x, units, subsample, pool)


def _fake_bottleneck(x, conv1, conv2, conv3, downsample, next, eps, geometry, subsample=1, pool=False):
    units = _block_units(conv1, conv2, conv3, downsample, next, eps, geometry, subsample, pool)
    return tail_shapes(x, x, units, subsample, pool)


def _check_stem(x, weight, norm_mean, norm_std) -> tuple[int, int]:
    if x.dim() != 4 or tuple(weight.shape[1:]) != (3, 7, 7) or x.shape[1] != 3:
        raise ValueError(
            f"stem takes x [N, 3, H, W] and weight [K, 3, 7, 7], got {tuple(x.shape)} and {tuple(weight.shape)}; "
            f"an NHWC batch enters as x.permute(0, 3, 1, 2)"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}; convert it with .to()")
    if x.dtype != torch.uint8 and x.dtype != weight.dtype and norm_mean is None:
        raise ValueError(
            f"x must be uint8 or the weight's dtype {weight.dtype}, got {x.dtype}; convert it with .to(), "
            f"or run under torch.autocast"
        )
    if (norm_mean is None) != (norm_std is None):
        raise ValueError("norm_mean and norm_std belong together; got only one of them")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x has no pixels: {tuple(x.shape)}")
    return out_size(x.shape[2], 7, 2, 3), out_size(x.shape[3], 7, 2, 3)


def stem(x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std, eps, pool):
    """Implementation of ``torch.ops.resnet_triton.stem``."""
    p, q = _check_stem(x, weight, norm_mean, norm_std)
    check_operands(x, weight, (bias, gamma, beta, mean, var), None)
    n, k = x.shape[0], weight.shape[0]
    if n > 0 or Recorder.active:
        return stem_step(x, weight, (bias, gamma, beta, mean, var), norm_mean, norm_std, eps, (n, k, p, q), pool)
    return _fake_stem(x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std, eps, pool)


def _fake_stem(x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std, eps, pool):
    p, q = _check_stem(x, weight, norm_mean, norm_std)
    check_operands(x, weight, (bias, gamma, beta, mean, var), None)
    if pool:
        p, q = out_size(p, 3, 2, 1), out_size(q, 3, 2, 1)
    return new_channels_last(x, x.shape[0], weight.shape[0], p, q, weight.dtype)


def _check_head(x, weight, bias) -> None:
    if x.dim() != 4 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"head takes x [N, C, H, W] and weight [K, C], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}, weight {weight.dtype}; both must be the same floating type")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move both to one device")


def head(x, weight, bias):
    """Implementation of ``torch.ops.resnet_triton.head``."""
    _check_head(x, weight, bias)
    n, c = x.shape[:2]
    k = weight.shape[0]
    choice = plan.choose_head(n, c, k, x.dtype, target_for(x), backend.current_backend(), x.shape[2] * x.shape[3])

    def launch(out: Tensor) -> None:
        from .kernels.head import launch_head

        precision = backend.dot_precision(x.dtype)
        rows, addend = aligned(weight.contiguous()), None if bias is None else bias.contiguous()
        launch_head(nhwc(x), rows, addend, x.new_empty(n, c), out, choice.tiling, precision)

    return run(
        "head",
        choice,
        lambda: x.new_empty(n, k),
        launch,
        lambda: reference.head(x, weight, bias),
        lambda: plan.cost.head_bytes(n, c, k, x.shape[2] * x.shape[3], x.element_size()),
        weight=weight,
        weight_bytes=c * k * x.element_size(),
    )


def _fake_head(x, weight, bias):
    _check_head(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def fold_bn(weight, bias, gamma, beta, mean, var, eps):
    """Implementation of ``torch.ops.resnet_triton.fold_bn``."""
    folded, shift = _fake_fold_bn(weight, bias, gamma, beta, mean, var, eps)
    moved = 2 * weight.numel() * weight.element_size()  # PyTorch: rsqrt, four vector steps, two passes over the weight
    choice = plan.choose_step(
        "fold_bn", target_for(weight), weight.dtype, backend.current_backend(), (moved, 1), (3 * moved, 7)
    )
    if not choice.fused or Recorder.active:
        eager, shift = reference.fold_bn(weight, bias, gamma, beta, mean, var, eps)
        return (eager if eager.stride() == folded.stride() else folded.copy_(eager)), shift
    from .kernels.batch_norm import launch_fold_bn

    # both layouts keep K outermost and dense, which is all that the kernel asks for
    rows = weight if weight.stride() == folded.stride() else torch.empty_like(folded).copy_(weight)
    bias, gamma, beta, mean, var = dense_vectors((bias, gamma, beta, mean, var))
    launch_fold_bn(rows, bias, gamma, beta, mean, var, eps, folded, shift)
    return folded, shift


def _fake_fold_bn(weight, bias, gamma, beta, mean, var, eps):
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}; convert it with .to()")
    for name, vector in zip(UNIT[1:], (bias, gamma, beta, mean, var), strict=True):
        if vector is not None and tuple(vector.shape) != (weight.shape[0],):
            raise ValueError(f"{name} must be [K] = [{weight.shape[0]}], got {tuple(vector.shape)}")
        if vector is not None and vector.device != weight.device:
            raise ValueError(f"{name} is on {vector.device}, weight on {weight.device}; move both to one device")
    # the weight's own layout if that keeps K outermost
    layout = torch.contiguous_format
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return torch.empty_like(weight, memory_format=layout), weight.new_empty(weight.shape[0])


def _check_add(x, y) -> None:
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"add_relu takes two tensors of one shape, dtype and device, got {tuple(x.shape)} {x.dtype} {x.device} "
            f"and {tuple(y.shape)} {y.dtype} {y.device}"
        )


def add_relu(x, y):
    """Implementation of ``torch.ops.resnet_triton.add_relu``."""
    _check_add(x, y)
    moved = 3 * x.numel() * x.element_size()
    theirs = moved + 2 * x.numel() * x.element_size()
    choice = plan.choose_step("add_relu", target_for(x), x.dtype, backend.current_backend(), (moved, 1), (theirs, 2))

    def launch(out: Tensor) -> None:
        from .kernels.add_relu import launch_add_relu

        launch_add_relu(_dense(x), _dense(y), out)

    return run(
        "add_relu",
        choice,
        lambda: _fake_add_relu(x, y),
        launch,
        lambda: _dense(reference.add_relu(x, y)),
        lambda: moved if choice.fused else theirs,
    )


def _dense(x: Tensor) -> Tensor:
    """In the layout that ``add_relu`` returns: channels_last for 4-D tensors, contiguous otherwise."""
    return channels_last(x) if x.dim() == 4 else x.contiguous()


def _fake_add_relu(x, y):
    _check_add(x, y)
    return new_channels_last(x, *x.shape) if x.dim() == 4 else x.new_empty(x.shape)


IMPLEMENTATIONS: dict[str, Callable] = {
    "conv_bn_act": conv_bn_act,
    "block_tail": block_tail,
    "bottleneck": bottleneck,
    "stem": stem,
    "head": head,
    "fold_bn": fold_bn,
    "add_relu": add_relu,
}
FAKES: dict[str, Callable] = {
    "conv_bn_act": _fake_conv_bn_act,
    "block_tail": _fake_block_tail,
    "bottleneck": _fake_bottleneck,
    "stem": _fake_stem,
    "head": _fake_head,
    "fold_bn": _fake_fold_bn,
    "add_relu": _fake_add_relu,
}
for _name, _implementation in IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_triton::{_name}", FAKES[_name], lib=library)

"""``torch.autograd.Function`` of every op. The forward is the op; the backward is PyTorch's own operators for now.

Nothing but the inputs and the output is saved: what lies between the convolutions of a block is computed again in the
backward. BN here is always inference BN (constant statistics); training statistics take PyTorch's modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import reference
from .ops import split_units

ops = torch.ops.resnet_triton
Gradients = tuple[Tensor | None, ...]


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    vectors: Sequence[Tensor | None],
    y: Tensor | None,
    eps: float,
    geometry: Sequence[int],
    needs: Sequence[bool],
) -> tuple[Gradients, Tensor]:
    """Gradients of ``y = [relu](bn(conv(x, weight) + bias) + residual)``.

    Args:
        grad: of the output, any strides.
        vectors: bias, gamma, beta, mean, var.
        y: the output if a ReLU came last, else None.
        geometry: stride, padding, dilation.
        needs: whether x, weight, bias, gamma, beta need a gradient.

    Returns:
        Gradients of x, weight, bias, gamma, beta (None where not needed), and that of the residual.
    """
    bias, gamma, beta, mean, var = vectors
    stride, padding, dilation = geometry
    dz = grad if y is None else torch.ops.aten.threshold_backward(grad, y, 0)
    need_x, need_weight, need_bias, need_gamma, need_beta = needs
    d_conv, d_gamma, d_beta, d_bias = dz, None, None, None
    if var is not None and mean is not None:
        scale, _ = reference.scale_shift(None, gamma, None, mean, var, eps)
        d_conv = (dz.to(scale.dtype) * scale[:, None, None]).to(dz.dtype)
        if need_gamma and gamma is not None:  # the only gradient that needs the convolution's output
            conv = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation)
            normalised = (conv.to(scale.dtype) - mean[:, None, None]) * torch.rsqrt(var.to(scale.dtype) + eps)[
                :, None, None
            ]
            d_gamma = (dz.to(scale.dtype) * normalised).sum((0, 2, 3)).to(gamma.dtype)
        if need_beta and beta is not None:
            d_beta = dz.sum((0, 2, 3), dtype=scale.dtype).to(beta.dtype)
    if need_bias and bias is not None:
        d_bias = d_conv.sum((0, 2, 3), dtype=torch.promote_types(dz.dtype, torch.float32)).to(bias.dtype)
    d_x = d_weight = None
    if need_x or need_weight:
        d_x, d_weight, _ = torch.ops.aten.convolution_backward(
            d_conv, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1,
            [need_x, need_weight, False],
        )  # fmt: skip
    if d_weight is not None and d_weight.stride() != weight.stride():
        d_weight = torch.empty_like(weight).copy_(d_weight)  # the parameter's own strides, as DDP's buckets expect
    return (d_x, d_weight, d_bias, d_gamma, d_beta), dz


def _again(function: type[Function], *arguments: Any) -> Any:
    """A forward's result once more; it is differentiated where the backward is (second derivatives, torch.func)."""
    return function.apply(*arguments) if torch.is_grad_enabled() else function.forward(*arguments)


class ConvBNAct(Function):
    """``relu(bn(conv(x)) + residual)``; arguments as ``torch.ops.resnet_triton.conv_bn_act``.

    Of a PReLU the backward computes the input again: from the output alone it is not known, whatever the slope's sign.
    """

    @staticmethod
    def forward(x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation, slope=None):
        operands = (x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation)
        return ops.conv_bn_act(*operands) if slope is None else ops.conv_bn_act(*operands, slope)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, *vectors, residual, ctx.eps, relu, stride, padding, dilation = inputs[:13]
        slope = inputs[13] if len(inputs) > 13 else None
        ctx.geometry = (stride, padding, dilation)
        again = (None, None) if slope is None else (slope, residual)
        ctx.save_for_backward(x, weight, *vectors, output if relu else None, *again)

    @staticmethod
    def backward(ctx, grad):
        x, weight, *vectors, y, slope, residual = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_slope = None
        if slope is not None:
            z = _again(ConvBNAct, x, weight, *vectors, residual, ctx.eps, False, *ctx.geometry)
            grad, d_slope = _prelu_backward(grad, z, slope, needs[13])
        grads, d_residual = conv_backward(grad, x, weight, vectors, y, ctx.eps, ctx.geometry, needs[:5])
        return *grads, None, None, (d_residual if needs[7] else None), None, None, None, None, None, d_slope


def _prelu_backward(grad: Tensor, z: Tensor, slope: Tensor, need_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``prelu(z)``: of z, and of the slopes if needed."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    above = z > 0
    d_z = torch.where(above, grad, (grad.to(wide) * slope.to(wide)[:, None, None]).to(grad.dtype))
    if not need_slope:
        return d_z, None
    products = torch.where(above, 0.0, grad.to(wide) * z.to(wide))
    d_slope = products.sum() if slope.shape[0] == 1 else products.sum((0, 2, 3))
    return d_z, d_slope.reshape(slope.shape).to(slope.dtype)


def _tail_backward(grads, t, shortcut, units, eps, geometry, y, y_next, needs):
    """Gradients of ``block_tail``: those of t and shortcut, then six a unit (None for an absent unit)."""
    second, third, project, reduce = split_units(units, eps, geometry)
    offsets = [2 + sum(len(u) for u in units[:i]) for i in range(4)]
    out: list[list[Tensor | None]] = [[None] * len(u) for u in units]

    def back(i, part, grad, x, result, need_x=True):
        weight, vectors, unit_eps, unit_geometry = part
        need = (need_x, *needs[offsets[i] : offsets[i] + 4])
        (d_x, *d_params), d_residual = conv_backward(grad, x, weight, vectors, result, unit_eps, unit_geometry, need)
        out[i][:4] = d_params
        return d_x, d_residual

    grad = grads[0]
    if reduce is not None:
        grad = grad + back(3, reduce, grads[1], y, y_next)[0]
    need_t, need_shortcut = needs[0], needs[1]
    if third is None:
        d_t, d_shortcut = back(0, second, grad, t, y, need_t)
    else:
        weight, vectors, unit_eps, unit_geometry = second
        hidden = _again(ConvBNAct, t, weight, *vectors, None, unit_eps, True, *unit_geometry)
        d_hidden, d_shortcut = back(1, third, grad, hidden, y)
        d_t, _ = back(0, second, d_hidden, t, hidden, need_t)
    if project is not None:
        d_shortcut, _ = back(2, project, d_shortcut, shortcut, None, need_shortcut)
    return d_t, (d_shortcut if need_shortcut else None), out


class BlockTail(Function):
    """``block_tail`` with flat units: ``(t, shortcut, counts, eps, geometry, *tensors)``.

    ``counts`` says how many tensors of ``tensors`` belong to conv2, conv3, downsample and next (6 or 0).
    """

    @staticmethod
    def forward(t, shortcut, counts, eps, geometry, *tensors):
        units = _regroup(counts, tensors)
        return tuple(ops.block_tail(t, shortcut, *units, list(eps), list(geometry)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        t, shortcut, ctx.counts, ctx.eps, ctx.geometry, *tensors = inputs
        ctx.save_for_backward(t, shortcut, *tensors, output[0], output[1] if len(output) > 1 else None)

    @staticmethod
    def backward(ctx, *grads):
        t, shortcut, *tensors, y, y_next = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[:2], *ctx.needs_input_grad[5:])
        units = _regroup(ctx.counts, tensors)
        d_t, d_shortcut, params = _tail_backward(grads, t, shortcut, units, ctx.eps, ctx.geometry, y, y_next, needs)
        return d_t, d_shortcut, None, None, None, *(g for unit in params for g in unit)


class Bottleneck(Function):
    """A whole bottleneck block that saves its input and output only: ``(x, counts, eps, geometry, *tensors)``."""

    @staticmethod
    def forward(x, counts, eps, geometry, *tensors):
        return ops.bottleneck(x, *_regroup(counts, tensors), [], list(eps), list(geometry))[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.counts, ctx.eps, ctx.geometry, *tensors = inputs
        ctx.save_for_backward(x, *tensors, output)

    @staticmethod
    def backward(ctx, grad):
        x, *tensors, y = ctx.saved_tensors
        first, *tail = _regroup(ctx.counts, tensors)
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        ((weight, vectors, eps, geometry),) = split_units((first,), ctx.eps[:1], ctx.geometry[:3])
        t = _again(ConvBNAct, x, weight, *vectors, None, eps, True, *geometry)
        tail_needs = (True, need_x, *needs[len(first) :])
        d_t, d_shortcut, params = _tail_backward(
            (grad,), t, x, [*tail, []], ctx.eps[1:], ctx.geometry[3:], y, None, tail_needs
        )
        (d_x, *d_first), _ = conv_backward(d_t, x, weight, vectors, t, eps, geometry, (need_x, *needs[:4]))
        if need_x:
            d_x = d_x + d_shortcut
        return d_x, None, None, None, *d_first, None, None, *(g for unit in params[:3] for g in unit)


def _regroup(counts: Sequence[int], tensors: Sequence[Tensor | None]) -> list[list[Tensor | None]]:
    groups, start = [], 0
    for count in counts:
        groups.append(list(tensors[start : start + count]))
        start += count
    return groups


class Stem(Function):
    """Stem; arguments as ``torch.ops.resnet_triton.stem``. The backward recomputes the convolution's output."""

    @staticmethod
    def forward(x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std, eps, pool):
        return ops.stem(x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std, eps, pool)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps, ctx.pool = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        x, weight, *vectors, norm_mean, norm_std = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:5])
        image = reference.normalise(x, norm_mean, norm_std, weight.dtype)
        y = _again(Stem, x, weight, *vectors, norm_mean, norm_std, ctx.eps, False)
        if ctx.pool:
            _, argmax = torch.ops.aten.max_pool2d_with_indices(y, [3, 3], [2, 2], [1, 1])
            grad = torch.ops.aten.max_pool2d_with_indices_backward(
                grad.contiguous(memory_format=torch.channels_last), y, [3, 3], [2, 2], [1, 1], [1, 1], False, argmax
            )
        (d_x, *d_params), _ = conv_backward(grad, image, weight, vectors, y, ctx.eps, (2, 3, 1), needs)
        if d_x is not None and norm_std is not None:
            d_x = (d_x / norm_std[:, None, None]).to(x.dtype)
        return d_x, *d_params, None, None, None, None, None, None


class Head(Function):
    """Global average pool and fully connected layer; arguments as ``torch.ops.resnet_triton.head``."""

    @staticmethod
    def forward(x, weight, bias):
        return ops.head(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        d_x = d_weight = d_bias = None
        if need_x:
            d_x = ((grad @ weight) / (x.shape[2] * x.shape[3]))[:, :, None, None].expand_as(x)
            d_x = d_x.contiguous(memory_format=torch.channels_last)
        if need_weight:
            d_weight = grad.t() @ x.mean((2, 3))
        if need_bias and bias is not None:
            d_bias = grad.sum(0)
        return d_x, d_weight, d_bias


class FoldBN(Function):
    """BN folded into weight and bias; arguments as ``torch.ops.resnet_triton.fold_bn``."""

    @staticmethod
    def forward(weight, bias, gamma, beta, mean, var, eps):
        return ops.fold_bn(weight, bias, gamma, beta, mean, var, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, d_folded, d_shift):
        weight, bias, gamma, beta, mean, var = ctx.saved_tensors
        scale, _ = reference.scale_shift(None, gamma, None, mean, var, ctx.eps)
        rstd = torch.rsqrt(var.to(scale.dtype) + ctx.eps)
        wide = d_folded.to(scale.dtype)
        per_filter = scale.view(-1, *[1] * (weight.dim() - 1))
        d_weight = (wide * per_filter).to(weight.dtype) if ctx.needs_input_grad[0] else None
        d_bias = (d_shift * scale).to(bias.dtype) if bias is not None else None
        d_gamma = None
        if gamma is not None:
            offset = (bias if bias is not None else 0) - mean.to(scale.dtype)
            d_gamma = ((wide * weight).flatten(1).sum(1) + d_shift * offset) * rstd
            d_gamma = d_gamma.to(gamma.dtype)
        d_beta = d_shift.to(beta.dtype) if beta is not None else None
        return d_weight, d_bias, d_gamma, d_beta, None, None, None


class AddReLU(Function):
    """``relu(x + y)``."""

    @staticmethod
    def forward(x, y):
        return ops.add_relu(x, y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (out,) = ctx.saved_tensors
        d = torch.ops.aten.threshold_backward(grad, out, 0)
        return d, d


# Calling the operators directly (as an exported program does) differentiates too.
for _name, _function in (
    ("conv_bn_act", ConvBNAct),
    ("stem", Stem),
    ("head", Head),
    ("fold_bn", FoldBN),
    ("add_relu", AddReLU),
):
    torch.library.register_autograd(
        f"resnet_triton::{_name}", _function.backward, setup_context=_function.setup_context
    )

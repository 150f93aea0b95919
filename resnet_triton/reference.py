"""Every op in plain PyTorch, for any float dtype and device: the oracle of the tests and the meaning of the ops.

Shapes are PyTorch's (``N,C,H,W``; filters ``K,C,R,S``) whatever the memory format.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def scale_shift(
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``scale, shift`` [K] with ``bn(c + bias) = c * scale + shift``; in at least fp32."""
    wide = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(wide) + eps)
    if gamma is not None:
        scale = scale * gamma.to(wide)
    shift = (bias.to(wide) - mean.to(wide) if bias is not None else -mean.to(wide)) * scale
    if beta is not None:
        shift = shift + beta.to(wide)
    return scale, shift


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = True,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    slope: Tensor | None = None,
) -> Tensor:
    """``relu(bn(conv(x, weight) + bias) + residual)``, one PyTorch operator after another; PReLU where ``slope`` is."""
    y = F.conv2d(x, weight, bias, stride, padding, dilation)
    if var is not None:
        y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
    if residual is not None:
        y = y + residual
    if slope is not None:
        return F.prelu(y, slope.to(y.dtype))
    return F.relu(y) if relu else y


def block_tail(
    t: Tensor,
    shortcut: Tensor,
    conv2: Sequence[Any],
    conv3: Sequence[Any] | None = None,
    *,
    downsample: Sequence[Any] | None = None,
    next: Sequence[Any] | None = None,
    subsample: int = 1,
    pool: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What follows a block's first convolution; arguments and result as of :func:`.functional.block_tail`."""

    def run(x: Tensor, unit: Sequence[Any], residual: Tensor | None = None, relu: bool = True) -> Tensor:
        weight, bias, gamma, beta, mean, var, eps, stride, padding, dilation = unit
        return conv_bn_act(x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation)

    shortcut = shortcut if downsample is None else run(shortcut, downsample, relu=False)
    y = run(t, conv2, shortcut) if conv3 is None else run(run(t, conv2), conv3, shortcut)
    after = None if next is None else run(y, next)
    return y.mean((2, 3), keepdim=True) if pool else y[:, :, ::subsample, ::subsample], after


def block_and_next(x: Tensor, conv1: Sequence[Any], *rest: Sequence[Any], **then: Any) -> tuple[Tensor, Tensor | None]:
    """A block from its first convolution on; arguments and result as of :func:`.functional.block_and_next`."""
    weight, bias, gamma, beta, mean, var, eps, *places = conv1
    t = conv_bn_act(x, weight, bias, gamma, beta, mean, var, None, eps, True, *places)
    return block_tail(t, x, *rest, **then)


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    norm_mean: Tensor | None = None,
    norm_std: Tensor | None = None,
    eps: float = 1e-5,
    pool: bool = True,
) -> Tensor:
    """Normalise, 7x7/2 convolution, BN, ReLU and (``pool``) 3x3/2 max-pool; uint8 pixels are divided by 255."""
    x = normalise(x, norm_mean, norm_std, weight.dtype)
    y = conv_bn_act(x, weight, bias, gamma, beta, mean, var, None, eps, True, 2, 3)
    return F.max_pool2d(y, 3, 2, 1) if pool else y


def normalise(x: Tensor, norm_mean: Tensor | None, norm_std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``(x - norm_mean) / norm_std`` per channel in fp32, cast to ``dtype``; uint8 pixels are divided by 255."""
    if x.dtype == torch.uint8:
        x = x.to(torch.promote_types(dtype, torch.float32)) / 255
    if norm_mean is not None and norm_std is not None:
        x = (x - norm_mean[:, None, None]) / norm_std[:, None, None]
    return x.to(dtype)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Global average pool, then the fully connected layer: ``[N,C,H,W] -> [N,K]``."""
    return F.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1), weight, bias)


def fold_bn(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in the weight's dtype, of the one convolution that equals convolution then BN."""
    scale, shift = scale_shift(bias, gamma, beta, mean, var, eps)
    folded = (weight.to(scale.dtype) * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
    return folded, shift.to(weight.dtype)


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """``relu(x + y)``."""
    return F.relu(x + y)

"""The public functional interface: fused convolutions and residual blocks on tensors.

Every function takes and returns ``N,C,H,W``-shaped tensors (channels_last is the fast layout, any layout is accepted,
results are channels_last), differentiates, runs under ``torch.autocast`` (inputs, weights and biases are cast; BN
vectors stay as they are), traces under ``torch.compile`` and ``torch.export``, and raises ValueError naming the wrong
argument. BN is inference BN: the statistics are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import autograd

__all__ = ["ConvBN", "add_relu", "block_tail", "bottleneck", "conv_bn_act", "fold_bn", "head", "stem"]

ops = torch.ops.resnet_triton


class ConvBN(NamedTuple):
    """One convolution and the inference BN behind it.

    Args:
        weight: ``[K, C, R, S]``.
        bias: convolution bias ``[K]`` or None.
        gamma, beta: BN's affine parameters ``[K]`` or None.
        mean, var: BN's running statistics ``[K]``; both None without BN.
        eps: BN's epsilon.
        stride, padding, dilation: the same in both directions.
    """

    weight: Tensor
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = 1e-5
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def tensors(self) -> list[Tensor | None]:
        """Weight, bias, gamma, beta, mean, var."""
        return [self.weight, *self.vectors]

    @property
    def vectors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Bias, gamma, beta, mean, var."""
        return self.bias, self.gamma, self.beta, self.mean, self.var


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = True,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """``relu(bn(conv2d(x, weight) + bias) + residual)`` in one kernel.

    Args:
        x: ``[N, C, H, W]``, fp32, fp16 or bf16 (fp64 runs on PyTorch's operators).
        weight: ``[K, C, R, S]`` of the same dtype.
        bias, gamma, beta, mean, var: ``[K]`` or None, see :class:`ConvBN`.
        residual: ``[N, K, P, Q]`` added before the ReLU, or None.

    Returns:
        ``[N, K, P, Q]`` in the dtype of ``x``.
    """
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    _check_constant(mean=mean, var=var)
    tensors = (x, weight, bias, gamma, beta, mean, var, residual)
    function = autograd.ConvBNAct.apply if _differentiating(tensors) else ops.conv_bn_act
    return function(*_distinct(tensors), eps, relu, stride, padding, dilation)


def block_tail(
    t: Tensor,
    shortcut: Tensor,
    conv2: ConvBN,
    conv3: ConvBN | None = None,
    *,
    downsample: ConvBN | None = None,
    next: ConvBN | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What follows a residual block's first convolution, and optionally the next block's first convolution.

    Args:
        t: output of the block's first convolution, after BN and ReLU.
        shortcut: the block's input.
        conv2, conv3: the remaining convolutions (``conv3`` None for a basic block).
        downsample: projection shortcut, or None for identity.
        next: the next block's first convolution, or None.

    Returns:
        ``(y, t_next)``: the block's output and ``relu(bn(conv(y)))`` of ``next`` (None without it).
    """
    units = (conv2, conv3, downsample, next)
    t, shortcut, tensors, counts, eps, geometry = _flatten(t, shortcut, units)
    if _differentiating((t, shortcut, *tensors)):
        first, second, *rest = _distinct((t, shortcut, *tensors))
        out = autograd.BlockTail.apply(first, second, counts, eps, geometry, *rest)
    else:
        groups = autograd._regroup(counts, tensors)
        out = ops.block_tail(t, shortcut, *groups, eps, geometry)
    return out[0], (out[1] if next is not None else None)


def bottleneck(x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, *, downsample: ConvBN | None = None) -> Tensor:
    """A whole bottleneck block, ``[N, C, H, W] -> [N, K, P, Q]``; the backward keeps only its input and output."""
    x, _, tensors, counts, eps, geometry = _flatten(x, x, (conv1, conv2, conv3, downsample))
    if _differentiating((x, *tensors)):
        first, *rest = _distinct((x, *tensors))
        return autograd.Bottleneck.apply(first, counts, eps, geometry, *rest)
    return ops.bottleneck(x, *autograd._regroup(counts, tensors), eps, geometry)


def stem(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    eps: float = 1e-5,
    pool: bool = True,
    layout: str = "NCHW",
) -> Tensor:
    """ImageNet stem: 7x7/2 convolution, BN, ReLU, and 3x3/2 max-pool.

    Args:
        x: images ``[N, 3, H, W]`` (or ``[N, H, W, 3]`` with ``layout="NHWC"``): the weight's dtype, or uint8, which is
            divided by 255.
        weight: ``[K, 3, 7, 7]``.
        normalize: per-channel ``(mean, std)`` applied to the images first.
        pool: whether the max-pool follows.
        layout: ``"NCHW"`` or ``"NHWC"``.
    """
    if layout not in ("NCHW", "NHWC"):
        raise ValueError(f"layout must be 'NCHW' or 'NHWC', got {layout!r}")
    if layout == "NHWC":
        x = x.permute(0, 3, 1, 2)
    if x.dtype == torch.uint8:
        weight, bias = _autocast(weight, bias)
    else:
        x, weight, bias = _autocast(x, weight, bias)
    _check_constant(mean=mean, var=var)
    norm_mean = norm_std = None
    if normalize is not None:
        norm_mean, norm_std = (torch.as_tensor(v, dtype=torch.float32, device=x.device) for v in normalize)
        if norm_mean.shape != (3,) or norm_std.shape != (3,):
            raise ValueError(f"normalize must be (mean, std) of three values each, got {normalize!r}")
    tensors = (x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std)
    function = autograd.Stem.apply if _differentiating(tensors) else ops.stem
    return function(*tensors, eps, pool)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Global average pool, then the fully connected layer: ``[N, C, H, W], [K, C] -> [N, K]``. Deterministic."""
    x, weight, bias = _autocast(x, weight, bias)
    tensors = (x, weight, bias)
    return (autograd.Head.apply if _differentiating(tensors) else ops.head)(*tensors)


def fold_bn(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Weight and bias ``[K]`` (dtype of ``weight``) of the one convolution that equals convolution then BN."""
    _check_constant(mean=mean, var=var)
    tensors = (weight, bias, gamma, beta, mean, var)
    return (autograd.FoldBN.apply if _differentiating(tensors) else ops.fold_bn)(*tensors, eps)


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """``relu(x + y)`` of two tensors of equal shape and dtype in one pass."""
    return (autograd.AddReLU.apply if _differentiating((x, y)) else ops.add_relu)(*_distinct((x, y)))


def _differentiating(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _distinct(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """While compiling, a tensor that is passed twice as two: Dynamo drops one gradient otherwise (pytorch#181146)."""
    if not torch.compiler.is_compiling():
        return tensors
    distinct: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        repeated = t is not None and any(t is earlier for earlier in tensors[:i])
        distinct.append(t.view_as(t) if t is not None and repeated else t)
    return distinct


def _autocast(first: Tensor, *others: Tensor | None) -> tuple:
    """All arguments in autocast's dtype where it is on for the device and they are fp32, fp16 or bf16."""
    tensors = (first, *others)
    device = first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no meta device
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def _check_constant(**statistics: Tensor | None) -> None:
    for name, tensor in statistics.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires grad; running statistics are constants here: pass {name}.detach()")


def _flatten(x: Tensor, shortcut: Tensor, units: Sequence[ConvBN | None]) -> tuple:
    """``(x, shortcut, tensors, counts, eps, geometry)`` in the operators' flat form, cast for autocast."""
    tensors: list[Tensor | None] = []
    counts, eps, geometry = [], [], []
    x, shortcut = _autocast(x, shortcut)
    for unit in units:
        counts.append(6 if unit is not None else 0)
        if unit is None:
            continue
        _check_constant(mean=unit.mean, var=unit.var)
        weight, bias = _autocast(unit.weight, unit.bias)
        tensors += [weight, bias, *unit.vectors[1:]]
        eps.append(unit.eps)
        geometry += [unit.stride, unit.padding, unit.dilation]
    return x, shortcut, tensors, counts, eps, geometry

"""The public functional interface: fused convolutions and residual blocks on tensors.

Every function takes and returns ``N,C,H,W``-shaped tensors (channels_last is the fast layout, any layout is accepted,
results are channels_last), differentiates, runs under ``torch.autocast`` (inputs, weights and biases are cast; BN
vectors stay as they are), traces under ``torch.compile`` and ``torch.export``, and raises ValueError naming the wrong
argument. BN is inference BN: the statistics are constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import autograd

__all__ = ["ConvBN", "add_relu", "block_and_next", "block_tail", "bottleneck", "conv_bn_act", "fold_bn", "head", "stem"]

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
    slope: Tensor | None = None,
) -> Tensor:
    """``relu(bn(conv2d(x, weight) + bias) + residual)`` in one kernel.

    Args:
        x: ``[N, C, H, W]``, fp32, fp16 or bf16 (fp64 runs on PyTorch's operators).
        weight: ``[K, C, R, S]`` of the same dtype.
        bias, gamma, beta, mean, var: ``[K]`` or None, see :class:`ConvBN`.
        residual: ``[N, K, P, Q]`` added before the ReLU, or None.
        slope: of a PReLU in place of the ReLU (whatever ``relu`` says), one a channel ``[K]`` or ``[1]`` for all; None
            without.

    Returns:
        ``[N, K, P, Q]`` in the dtype of ``x``.
    """
    x, weight, bias, residual = cast_for_autocast(x, weight, bias, residual)
    _check_constant(mean, var)
    tensors = (x, weight, bias, gamma, beta, mean, var, residual, slope)
    function = autograd.ConvBNAct.apply if differentiating(tensors) else ops.conv_bn_act.default
    *operands, slope = distinct(tensors)
    if slope is None:
        return function(*operands, eps, relu, stride, padding, dilation)
    return function(*operands, eps, False, stride, padding, dilation, slope)


def block_tail(
    t: Tensor,
    shortcut: Tensor,
    conv2: ConvBN,
    conv3: ConvBN | None = None,
    *,
    downsample: ConvBN | None = None,
    next: ConvBN | None = None,
    subsample: int = 1,
    pool: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What follows a residual block's first convolution, and optionally the next block's first convolution.

    Where it is predicted or measured to be faster, several of these convolutions run as one kernel.

    Args:
        t: output of the block's first convolution, after BN and ReLU.
        shortcut: the block's input.
        conv2, conv3: the remaining convolutions (``conv3`` None for a basic block).
        downsample: projection shortcut, or None for identity.
        next: the next block's first convolution, or None.
        subsample: return ``y[:, :, ::subsample, ::subsample]``, all that a next projection shortcut of that stride
            reads (``next`` still sees every pixel).
        pool: return the average of y over the image, ``[N, K, 1, 1]``; neither with ``next`` nor with ``subsample``.

    Returns:
        ``(y, t_next)``: the block's output and ``relu(bn(conv(y)))`` of ``next`` (None without it).
    """
    t, shortcut, groups, eps, geometry = _operands(t, shortcut, (conv2, conv3, downsample, next))
    if next is not None and _learns_alone(next, (t, shortcut, *chain(*groups[:3]))):
        y, _ = block_tail(t, shortcut, conv2, conv3, downsample=downsample)
        return y[:, :, ::subsample, ::subsample], _behind(y, next)
    if differentiating((t, shortcut, *chain(*groups))):  # the backward needs all of y
        first, second, *rest = distinct((t, shortcut, *chain(*groups)))
        y, *after = autograd.BlockTail.apply(first, second, [len(g) for g in groups], eps, geometry, *rest)
        y = y[:, :, ::subsample, ::subsample] if subsample > 1 else y
        y = y.mean((2, 3), keepdim=True) if pool else y
    else:
        y, *after = ops.block_tail.default(t, shortcut, *groups, eps, geometry, subsample, pool)
    return y, (after[0] if next is not None else None)


def bottleneck(x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, *, downsample: ConvBN | None = None) -> Tensor:
    """A whole bottleneck block, ``[N, C, H, W] -> [N, K, P, Q]``; the backward keeps only its input and output."""
    x, _, groups, eps, geometry = _operands(x, x, (conv1, conv2, conv3, downsample))
    if differentiating((x, *chain(*groups))):
        first, *rest = distinct((x, *chain(*groups)))
        return autograd.Bottleneck.apply(first, [len(g) for g in groups], eps, geometry, *rest)
    return ops.bottleneck.default(x, *groups, [], eps, geometry)[0]


def block_and_next(
    x: Tensor,
    conv1: ConvBN,
    conv2: ConvBN,
    conv3: ConvBN,
    *,
    downsample: ConvBN | None = None,
    next: ConvBN | None = None,
    subsample: int = 1,
    pool: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """A whole bottleneck block, and optionally the next block's first convolution: as :func:`block_tail` behind conv1.

    Args:
        x: the block's input.
        conv1, conv2, conv3, downsample: the block.
        next, subsample, pool: as in :func:`block_tail`.
    """
    units = (conv1, conv2, conv3, downsample, next)
    if differentiating((x, *chain(*(unit.tensors for unit in units if unit is not None)))):
        return block_tail(
            _behind(x, conv1), x, conv2, conv3, downsample=downsample, next=next, subsample=subsample, pool=pool
        )
    x, _, groups, eps, geometry = _operands(x, x, units)
    y, *after = ops.bottleneck.default(x, *groups, eps, geometry, subsample, pool)
    return y, (after[0] if next is not None else None)


def _learns_alone(next: ConvBN, others: Sequence[Tensor | None]) -> bool:
    """Whether a frozen block is before one that learns: as one operator, its inputs would be kept for no backward."""
    return differentiating(next.tensors) and not differentiating(others)


def _tensors(units: Sequence[ConvBN | None]) -> list[Tensor | None]:
    return [t for u in units if u is not None for t in u.tensors]


def _behind(x: Tensor, u: ConvBN) -> Tensor:
    return conv_bn_act(x, u.weight, *u.vectors, eps=u.eps, stride=u.stride, padding=u.padding, dilation=u.dilation)


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
        weight, bias = cast_for_autocast(weight, bias)
    else:
        x, weight, bias = cast_for_autocast(x, weight, bias)
    _check_constant(mean, var)
    norm_mean = norm_std = None
    if normalize is not None:
        norm_mean, norm_std = (torch.as_tensor(v, dtype=torch.float32, device=x.device) for v in normalize)
        if norm_mean.shape != (3,) or norm_std.shape != (3,):
            raise ValueError(f"normalize must be (mean, std) of three values each, got {normalize!r}")
    tensors = (x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std)
    function = autograd.Stem.apply if differentiating(tensors) else ops.stem.default
    return function(*tensors, eps, pool)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Global average pool, then the fully connected layer: ``[N, C, H, W], [K, C] -> [N, K]``. Deterministic."""
    x, weight, bias = cast_for_autocast(x, weight, bias)
    tensors = (x, weight, bias)
    return (autograd.Head.apply if differentiating(tensors) else ops.head.default)(*tensors)


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
    _check_constant(mean, var)
    tensors = (weight, bias, gamma, beta, mean, var)
    return (autograd.FoldBN.apply if differentiating(tensors) else ops.fold_bn.default)(*tensors, eps)


def add_relu(x: Tensor, y: Tensor) -> Tensor:
    """``relu(x + y)`` of two tensors of equal shape and dtype in one pass."""
    return (autograd.AddReLU.apply if differentiating((x, y)) else ops.add_relu.default)(*distinct((x, y)))


def differentiating(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd records what is computed from these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def distinct(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """While compiling, a tensor that is passed twice as two: Dynamo drops one gradient otherwise (pytorch#181146)."""
    if not torch.compiler.is_compiling():
        return tensors
    distinct: list[Tensor | None] = []
    for i, t in enumerate(tensors):
        repeated = t is not None and any(t is earlier for earlier in tensors[:i])
        distinct.append(t.view_as(t) if t is not None and repeated else t)
    return distinct


def cast_for_autocast(first: Tensor, *others: Tensor | None) -> tuple:
    """All arguments in autocast's dtype where it is on for the device and they are fp32, fp16 or bf16."""
    dtype = autocast_dtype(first)
    return (first, *others) if dtype is None else tuple(_cast(t, dtype) for t in (first, *others))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast where it is on for the device of ``x``, else None."""
    device = "cuda" if x.is_cuda else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no meta device
        return None
    return torch.get_autocast_dtype(device)


def _cast(t: Any, dtype: torch.dtype) -> Any:
    return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t


def _check_constant(mean: Tensor | None, var: Tensor | None) -> None:
    if (mean is not None and mean.requires_grad) or (var is not None and var.requires_grad):
        name = "mean" if mean is not None and mean.requires_grad else "var"
        raise ValueError(f"{name} requires grad; running statistics are constants here: pass {name}.detach()")


def _operands(x: Tensor, shortcut: Tensor, units: Sequence[ConvBN | None]) -> tuple:
    """``(x, shortcut, groups, eps, geometry)`` as the operators take them, cast for autocast."""
    groups: list[list[Tensor | None]] = []
    eps: list[float] = []
    geometry: list[int] = []
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, shortcut = _cast(x, dtype), _cast(shortcut, dtype)
    for unit in units:
        if unit is None:
            groups.append([])
            continue
        weight, bias, gamma, beta, mean, var, unit_eps, stride, padding, dilation = unit
        _check_constant(mean, var)
        if dtype is not None:
            weight, bias = _cast(weight, dtype), _cast(bias, dtype)
        groups.append([weight, bias, gamma, beta, mean, var])
        eps.append(unit_eps)
        geometry += (stride, padding, dilation)
    return x, shortcut, groups, eps, geometry

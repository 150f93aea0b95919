"""Runs modules whose BN have batch statistics: from modules to the operators of training, and back to their buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..functional import ConvBN, autocast_dtype, differentiating, distinct
from ..structure import uses_batch_statistics
from . import block as blocks
from . import functions, sync
from .block import Form, Unit

Norm = Any  # nn.BatchNorm2d or what stands in its place


def run_block(
    x: Tensor,
    shortcut: Tensor | None,
    units: Sequence[ConvBN],
    norms: Sequence[Norm],
    project: bool = False,
    *,
    relu: bool = True,
    masked_grad: bool = False,
    mask_input: bool = False,
    ahead: tuple[Tensor, Tensor] | None = None,
    following: tuple[ConvBN, Norm] | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """A block, or a single convolution with its BN, some of whose BN have batch statistics; updates their buffers.

    Args:
        x: ``[N, C, H, W]``.
        shortcut: what is added, or projected; ``x`` itself for a block without anything before its shortcut; or None.
        units: of the main path, then the projection's.
        norms: the modules of their BN.
        project: whether there is a projection.
        relu: whether a ReLU comes last.
        masked_grad, mask_input: see :class:`.block.Form`.
        ahead: what the block before returned.
        following: the next block's first convolution and its BN, which may be computed together with this block's end.

    Returns:
        The output; and raw output and stats of what follows, or None where the next block has to compute them.
    """
    own = shortcut is x
    x, other = cast_input(x), None if own or shortcut is None else cast_input(shortcut)
    tensors: list[Tensor | None] = []
    eps: list[float] = []
    geometry: list[int] = []
    for u, norm in zip(units, norms, strict=True):
        tensors += tensors_of(u, norm, x)
        eps.append(u.eps)
        geometry += (u.stride, u.padding, u.dilation)
    group = group_of(norms)
    gram = _gram(x, units, norms, project, relu and shortcut is not None, group)
    n, follows = len(units), gram and following is not None and _may_follow(*following)
    if follows and following is not None:
        u, norm = following
        tensors += tensors_of(u, norm, x)
        eps.append(u.eps)
        geometry += (u.stride, u.padding, u.dilation)
    tensors = [*distinct(tensors)]
    flags = [relu, own, gram, masked_grad, mask_input, follows]
    before = (None, None) if ahead is None else ahead
    if differentiating((x, other, *tensors[: 5 * n])):
        out = functions.TrainBlock.apply(x, other, eps, geometry, project, flags, group, *before, *tensors)
    else:
        known = [] if ahead is None else list(ahead)
        out = functions.ops.train_block(x, other, tensors, eps, geometry, project, flags, group, known)
    then = (out[-2], out[-1]) if follows else None
    main = n - project
    y, *saved = blocks.given(out, [] if ahead is None else ahead, main, Form(gram=gram, following=follows))
    first = main - gram  # behind the raw outputs come the stats, the projection's behind its raw output
    stats = [*saved[first : first + main]]
    if project:
        stats.append(saved[first + main + (not gram)])
    sizes = [pixels_of(saved[i]) for i in range(first)]
    sizes += [pixels_of(y)] * (n - first)
    update_running(norms, stats, sizes, [u.bias for u in units])
    return y, then


def _may_follow(u: ConvBN, norm: Norm) -> bool:
    """Whether a convolution can be computed together with the end of the block before it."""
    return u.weight.shape[2:] == (1, 1) and (u.stride, u.padding) == (1, 0) and uses_batch_statistics(norm)


def pixels_of(c: Tensor) -> int:
    return c.shape[0] * c.shape[2] * c.shape[3]


def run_stem(x: Tensor, u: ConvBN, norm: Norm) -> Tensor:
    """The ImageNet stem up to its max-pool, with batch statistics."""
    x = cast_input(x)
    tensors = tensors_of(u, norm, x)
    group = group_of((norm,))
    if differentiating((x, *tensors)):
        y, raw, stats = functions.TrainStem.apply(x, *tensors, u.eps, group)
    else:
        y, raw, stats = functions.ops.train_stem(x, *tensors, u.eps, group)
    update_running((norm,), (stats,), (pixels_of(raw),), (u.bias,))
    return y


def cast_input(x: Tensor) -> Tensor:
    dtype = autocast_dtype(x)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def tensors_of(u: ConvBN, norm: Norm, x: Tensor) -> list[Tensor | None]:
    """weight, gamma, beta, mean and var of a unit as the operators of training take them."""
    if autocast_dtype(x) is None and u.weight.dtype != x.dtype:
        raise ValueError(
            f"x has dtype {x.dtype}, weight has {u.weight.dtype}; both must be the same floating type: "
            f"convert one with .to(), or run under torch.autocast"
        )
    beta = u.beta
    if uses_batch_statistics(norm):
        if u.bias is not None:  # BN takes it away again; its gradient is zero
            zero = u.bias * 0
            beta = zero if beta is None else beta + zero
        return [u.weight, u.gamma, beta, None, None]
    if u.mean is None or u.var is None:  # no BN: the convolution's bias is all there is
        zero = x.new_zeros(u.weight.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        return [u.weight, None, u.bias, zero, torch.ones_like(zero)]
    if u.bias is not None:
        shift = u.bias * torch.rsqrt(u.var.to(torch.promote_types(u.var.dtype, torch.float32)) + u.eps)
        shift = shift if u.gamma is None else shift * u.gamma
        beta = shift if beta is None else beta + shift
    return [u.weight, u.gamma, beta, u.mean, u.var]


def group_of(norms: Sequence[Norm]) -> str:
    """The process group that shares batch statistics, or ``""``."""
    for norm in norms:
        if type(norm) is nn.SyncBatchNorm and norm.training:
            return sync.group_name(norm.process_group)
    return ""


def _gram(x: Tensor, units: Sequence[ConvBN], norms: Sequence[Norm], project: bool, adds: bool, group: str) -> bool:
    """Whether a block's end is in the Gram form."""
    memory = backend.memory()
    if memory == "stored" or not adds:
        return False
    if memory == "auto" and (x.dtype.itemsize != 2 or not has_kernels(x)):
        return False
    found = [
        Unit(
            u.weight,
            None,
            None,
            None if uses_batch_statistics(norm) else u.weight,
            None,
            0.0,
            (u.stride, u.padding, u.dilation),
        )
        for u, norm in zip(units, norms, strict=True)
    ]
    return blocks.may_be_gram(found[: len(found) - project], found[-1] if project else None, Form(group=group))


def has_kernels(x: Tensor) -> bool:
    """Whether the kernels of the Gram form may run on the device of ``x``."""
    if x.is_cuda:
        return torch.version.hip is None and torch.cuda.get_device_properties(x.device).major >= 9
    return backend.planning_cuda() or backend.current_backend() == "triton"


# Running statistics


def update_running(
    norms: Sequence[Norm], stats: Sequence[Tensor], pixels: Sequence[int], biases: Sequence[Tensor | None]
) -> None:
    """Moves running means and variances towards the batch's, as PyTorch does: unbiased variance, momentum or average.

    Not while a backward computes a checkpointed forward again.

    Args:
        norms: BN modules; those without running statistics or in eval mode are left alone.
        stats: of each, rows mean and variance first; a sixth row is the count.
        pixels: over which each was computed.
        biases: of the convolutions, which the means that were computed do not have.
    """
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        return
    running: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    counters: list[Tensor] = []
    with torch.no_grad():
        for norm, its, count, bias in zip(norms, stats, pixels, biases, strict=True):
            if not _tracks(norm):
                continue
            n: Any = its[5] if its.shape[0] == 6 else count
            mean, var = its[0], its[1] * (n / (n - 1))
            if bias is not None:
                mean = mean + bias
            new = [mean.to(norm.running_mean.dtype), var.to(norm.running_var.dtype)]
            if norm.momentum is None:
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
                    share = 1.0 / norm.num_batches_tracked.to(new[0].dtype)
                    norm.running_mean.lerp_(new[0], share)
                    norm.running_var.lerp_(new[1], share)
                continue
            if norm.num_batches_tracked is not None:
                counters.append(norm.num_batches_tracked)
            old, to = running.setdefault(norm.momentum, ([], []))
            old += [norm.running_mean, norm.running_var]
            to += new
        if counters:
            torch._foreach_add_(counters, 1)
        for momentum, (old, to) in running.items():
            torch._foreach_lerp_(old, to, momentum)


def _tracks(norm: Norm) -> bool:
    """Whether a forward changes a BN's running statistics."""
    if not uses_batch_statistics(norm) or not norm.training or norm.running_mean is None:
        return False
    return norm.track_running_stats

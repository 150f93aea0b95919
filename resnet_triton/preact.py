"""Runs pre-activation blocks through the fused ops: behind each convolution comes the BN in front of the next one.

    t1 = relu(bn2(conv1(relu(bn1(x)))))      a 1x1 normalises x as it loads it; elsewhere a pass comes first
    t2 = relu(bn3(conv2(t1)))                conv_bn_act, as of any block
    y  = conv3(t2) + x                       conv_bn_act without BN and ReLU

A block whose BN and ReLU in front feed its shortcut too stores their result: two read it. As in :mod:`.nn`, modules are
left as they are, and :mod:`.structure` says on every call whether a block may run so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import preact_ops as _preact_ops  # noqa: F401  (defines the operators)
from .functional import ConvBN, cast_for_autocast, differentiating, head
from .nn import apply_modules, apply_unit, run_stem, run_training_block, unit
from .snapshot import Remembered
from .structure import (
    NO_NORM,
    STEMS,
    Converted,
    blocks_of,
    eps_of,
    is_bypassable,
    projection,
    structural_reason,
    transient_reason,
    uses_batch_statistics,
    why_not_conv,
    why_not_head,
    why_not_norm,
    why_not_now,
    why_not_stem,
)
from .training.preact import run as run_training_preact

ops = torch.ops.resnet_triton


class PreActBlock(NamedTuple):
    """What runs of a pre-activation block.

    Args:
        lead: the module of the BN in front, or None.
        shared: whether its result feeds the shortcut too.
        units: each convolution with the BN behind it, the last with none.
        norms: the modules of these BN.
        shortcut: what has no convolution of the shortcut, or None for identity.
        project: the shortcut's convolution, or None.
    """

    lead: Converted
    shared: bool
    units: list[ConvBN]
    norms: list[nn.Module]
    shortcut: nn.Module | None
    project: ConvBN | None

    @property
    def trains(self) -> bool:
        """Whether a BN of it has batch statistics."""
        return any(norm is not None and uses_batch_statistics(norm) for norm in (self.lead, *self.norms))


def read(block: Converted) -> PreActBlock:
    """What runs of a converted block that is fusable."""
    spec = block._resnet_triton.spec
    pairs = [u.read(block)[:2] for u in spec.units]
    shortcut = getattr(block, spec.shortcut)
    parts = projection(shortcut)
    return PreActBlock(
        getattr(block, spec.lead),
        block.preact == "both",
        [unit(*pair) for pair in pairs],
        [norm for _, norm in pairs],
        shortcut if parts is None else None,
        None if parts is None else unit(parts.conv, parts.norm),
    )


def run_block(block: Converted, x: Tensor) -> Tensor:
    """A converted pre-activation block's forward: fused as a whole, or its own."""
    spec = block._resnet_triton.spec
    if transient_reason(block, spec) is not None or structural_reason(block, spec) is not None:
        return block._eager(x)
    return run_blocks([read(block)], x)[0]


def run_blocks(blocks: Sequence[PreActBlock], x: Tensor, following: Converted = None) -> tuple[Tensor, Tensor | None]:
    """Runs fusable blocks one after another; with batch statistics, each takes those that the next one begins with.

    Args:
        blocks: what runs.
        x: the first one's input.
        following: the module of a BN that reads the output, or None.

    Returns:
        The output; and the statistics that ``following`` normalises it by, or None where they are not known.
    """
    stats = None
    for i, block in enumerate(blocks):
        if not block.trains:
            x, stats = _run_constant(block, x), None
            continue
        after = blocks[i + 1].lead if i + 1 < len(blocks) else following
        x, stats = _run_training(block, x, stats, after)
    return x, stats


def _run_constant(block: PreActBlock, x: Tensor) -> Tensor:
    """A block all of whose BN have constant statistics."""
    first, *between, last = block.units
    shortcut = x
    if block.lead is None:
        t = apply_unit(x, first)
    elif block.shared:
        shortcut = bn_relu(x, block.lead)
        t = apply_unit(shortcut, first)
    else:
        t = _bn_relu_conv(x, block.lead, first)
    if block.project is not None:
        shortcut = apply_unit(shortcut, block.project, relu=False)
    elif block.shortcut is not None:
        shortcut = block.shortcut(shortcut)
    for u in between:
        t = apply_unit(t, u)
    return apply_unit(t, last, relu=False, residual=shortcut)


def _run_training(
    block: PreActBlock, x: Tensor, known: Tensor | None, following: Converted
) -> tuple[Tensor, Tensor | None]:
    """A block some of whose BN have batch statistics; ``following`` and the result as of :func:`run_blocks`."""
    if block.lead is not None and not block.shared:
        return run_training_preact(x, block.lead, block.units, block.norms, known=known, following=following)
    if block.lead is not None:
        x = bn_relu(x, block.lead, known)
    shortcut = x if block.shortcut is None else block.shortcut(x)
    units, norms = block.units, block.norms
    if block.project is not None:
        units, norms = [*units, block.project], [*norms, NO_NORM]
    return run_training_block(x, shortcut, units, norms, block.project is not None, relu=False)[0], None


def bn_relu(x: Tensor, norm: Converted, known: Tensor | None = None) -> Tensor:
    """``relu(norm(x))`` in one pass; with constant statistics PyTorch's operators where gradients are wanted.

    ``known`` are the batch statistics, where the block before took them.
    """
    if uses_batch_statistics(norm):
        return run_training_preact(x, norm, known=known)[0]
    (x,) = cast_for_autocast(x)
    gamma, beta, mean, var = norm.weight, norm.bias, norm.running_mean, norm.running_var
    if differentiating((x, gamma, beta)):
        return F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.0, eps_of(norm)))
    return ops.bn_relu.default(x, gamma, beta, mean, var, eps_of(norm))


def _bn_relu_conv(x: Tensor, norm: Converted, u: ConvBN) -> Tensor:
    """A convolution behind BN and ReLU, with the BN and ReLU behind it; all statistics are constant."""
    lead = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if differentiating((x, *lead[:2], *u.tensors)):
        return apply_unit(bn_relu(x, norm), u)
    x, weight, bias = cast_for_autocast(x, u.weight, u.bias)
    return ops.bn_relu_conv.default(
        x, *lead, eps_of(norm), weight, bias, *u.vectors[1:], u.eps, True, u.stride, u.padding, u.dilation
    )


# Whole networks


def _read_stage(stage: Converted) -> list[PreActBlock] | None:
    """The blocks of a stage if all of them run fused without being called, else None."""
    blocks = blocks_of(stage)
    if blocks is None or not all(block._resnet_triton.spec.lead for block in blocks):
        return None
    return [read(block) for block in blocks]


_stage_blocks = Remembered(_read_stage)


def _blocks_of(m: Converted) -> list[PreActBlock] | None:
    """The blocks of a child of a network if it is a stage all of whose blocks run fused, else None."""
    marker = getattr(type(m), "_resnet_triton", None)
    if marker is None or marker.kind != "stage" or not is_bypassable(m):
        return None
    return _stage_blocks(m)


def run_resnet(model: Converted, x: Tensor) -> Tensor:
    """The forward of a converted pre-activation network."""
    if "_forward_impl" in model.__dict__:  # replaced on the instance
        return model._eager(x)
    names = model._resnet_triton.spec.children
    children = [getattr(model, name) for name in names]
    pending: list[PreActBlock] = []  # fused blocks not run yet
    if names[:3] in STEMS:
        conv, norm, act, pool, *rest = children
        if x.is_floating_point() and why_not_stem(conv, norm, act) is None:
            x, children = run_stem(conv, norm, act, x, pool), rest
    else:
        conv, stage, *rest = children
        blocks = _blocks_of(stage)
        # the BN and ReLU in front of the first block follow the first convolution, and nothing else reads that
        if blocks is not None and blocks[0].shared and why_not_conv(conv) is None and why_not_now((conv,)) is None:
            x, children = apply_modules(x, conv, blocks[0].lead), rest
            pending = [blocks[0]._replace(lead=None), *blocks[1:]]
    for m in children:
        blocks = _blocks_of(m)
        if blocks is None:
            x = m(run_blocks(pending, x)[0])
            pending = []
        else:
            pending = pending + blocks
    if why_not_end(model) is None:
        x, stats = run_blocks(pending, x, model.bn)
        x = bn_relu(x, model.bn, stats)
    else:
        x = model.relu(model.bn(run_blocks(pending, x)[0]))
    if why_not_head(model) is not None:
        return model.fc(torch.flatten(model.avgpool(x), 1))
    return head(x, model.fc.weight, model.fc.bias)


def why_not_end(model: Converted) -> str | None:
    """Why the BN and ReLU behind the last block do not run fused now, or None."""
    if reason := why_not_norm(model.bn):
        return f"bn {reason}"
    if type(model.bn) is nn.Identity or type(model.relu) is not nn.ReLU:
        return f"bn and relu are {type(model.bn).__name__} and {type(model.relu).__name__}"
    return why_not_now((model.bn, model.relu))

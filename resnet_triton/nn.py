"""Runs the residual blocks of a model through the fused ops, leaving the modules as they are.

Three kinds of modules can run fused: a *block* (basic or bottleneck), a *stage* (an ``nn.Sequential`` of such blocks)
and a *container* (a whole ResNet, or torchvision's IntermediateLayerGetter over one). Only what is exactly known is
fused, and that is checked on every call: :func:`why_not_block` names the first thing that is not. Whatever is not fused
runs the module's own forward.

The outermost owner runs its blocks in one loop, in which the next block's first convolution is computed together with
this block's end. It lives in a local variable there: nothing is kept on modules or tensors between calls.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import functional
from .functional import ConvBN


@dataclass(frozen=True)
class BlockSpec:
    """Attribute names of a residual block: its convolution and BN pairs in order, activation, and shortcut."""

    units: tuple[tuple[str, str], ...]
    activation: str = "relu"
    shortcut: str = "downsample"


# Converted modules and their children: attributes that only a BlockSpec knows, so nothing for a type checker to see.
Converted = Any

BASIC = BlockSpec((("conv1", "bn1"), ("conv2", "bn2")))
BOTTLENECK = BlockSpec((("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")))

#: Children of a container in the order of its forward, up to the global average pool.
IMAGENET = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
CIFAR = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3")


# What can be fused


def why_not_conv(conv: Converted) -> str | None:
    """Why a convolution cannot run fused, or None."""
    if type(conv) is not nn.Conv2d:
        return f"is {type(conv).__name__}, not nn.Conv2d"
    if conv.groups != 1:
        return f"has groups={conv.groups}; fused blocks support groups=1"
    if conv.padding_mode != "zeros":
        return f"has padding_mode={conv.padding_mode!r}; fused blocks pad with zeros"
    for name, pair in (("stride", conv.stride), ("padding", conv.padding), ("dilation", conv.dilation)):
        if isinstance(pair, str) or pair[0] != pair[1]:
            return f"has {name}={pair!r}; fused blocks need one number for both directions"
    return None


def why_not_norm(norm: Converted) -> str | None:
    """Why a normalisation cannot run fused whatever the mode, or None."""
    if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) and type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        if norm.running_mean is None:
            return "keeps no running statistics (track_running_stats=False)"
        return None
    if type(norm) is nn.Identity or is_frozen_bn(norm):
        return None
    return f"is {type(norm).__name__}; fused blocks take BatchNorm2d, FrozenBatchNorm2d, or Identity after folding"


def is_frozen_bn(norm: nn.Module) -> bool:
    """Whether this is torchvision's FrozenBatchNorm2d (told by name, so that torchvision stays optional)."""
    cls = type(norm)
    return cls.__name__ == "FrozenBatchNorm2d" and cls.__module__.startswith("torchvision.")


def _why_not_pair(module: Converted, conv: str, norm: str) -> str | None:
    if reason := why_not_conv(getattr(module, conv)):
        return f"{conv} {reason}"
    if reason := why_not_norm(getattr(module, norm)):
        return f"{norm} {reason}"
    return None


def structural_reason(block: Converted, spec: BlockSpec) -> str | None:
    """Why a block can never run fused as it is built, or None."""
    for conv, norm in spec.units:
        if reason := _why_not_pair(block, conv, norm):
            return reason
    activation = getattr(block, spec.activation)
    if type(activation) is not nn.ReLU:
        return f"{spec.activation} is {type(activation).__name__}; fused blocks apply nn.ReLU"
    shortcut = getattr(block, spec.shortcut)
    if shortcut is not None:
        if type(shortcut) is not nn.Sequential or len(shortcut) != 2:
            return f"{spec.shortcut} is not nn.Sequential(convolution, normalisation)"
        if reason := _why_not_pair(shortcut, "0", "1"):
            return f"{spec.shortcut}.{reason}"
    return None


def why_not_block(block: Converted) -> str | None:
    """Why a converted block runs its own forward now, or None when it runs fused."""
    spec = block._resnet_triton.spec
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    if reason := structural_reason(block, spec):
        return reason
    modules = [getattr(block, spec.activation)]
    for conv, norm in spec.units:
        modules += [getattr(block, conv), getattr(block, norm)]
    shortcut = getattr(block, spec.shortcut)
    if shortcut is not None:
        modules += [shortcut, shortcut[0], shortcut[1]]
    return _transient_reason(modules)


def _transient_reason(modules: Iterable[nn.Module]) -> str | None:
    """What about hooks, patches and the mode of these modules keeps them from being fused now."""
    for m in modules:
        if is_hooked(m):
            return f"a hook is registered on a {type(m).__name__}"
        if "forward" in m.__dict__:
            return f"the forward of a {type(m).__name__} was replaced on the instance"
        if m.training and isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            return "BatchNorm is in training mode; batch statistics run on PyTorch's modules"
    if torch_module._has_any_global_hook():
        return "a global module hook is registered"
    return None


def is_hooked(m: nn.Module) -> bool:
    """Whether calling this module would run hooks."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def _bypassable(m: nn.Module) -> bool:
    """Whether an owner may run a fused child without calling it."""
    return not is_hooked(m) and "forward" not in m.__dict__


# Running fused


def unit(conv: Converted, norm: Converted) -> ConvBN:
    """The tensors and geometry of a convolution and its normalisation, read anew on each call."""
    statistics = () if type(norm) is nn.Identity else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    gamma, beta, mean, var = statistics or (None, None, None, None)
    eps = norm.eps if statistics else 0.0
    return ConvBN(
        conv.weight, conv.bias, gamma, beta, mean, var, eps, conv.stride[0], conv.padding[0], conv.dilation[0]
    )


def _apply(x: Tensor, u: ConvBN) -> Tensor:
    return functional.conv_bn_act(
        x, u.weight, *u.vectors, eps=u.eps, stride=u.stride, padding=u.padding, dilation=u.dilation
    )


def _first_unit(block: Converted) -> ConvBN:
    conv, norm = block._resnet_triton.spec.units[0]
    return unit(getattr(block, conv), getattr(block, norm))


def run_blocks(blocks: Sequence[Converted], x: Tensor) -> Tensor:
    """Runs fusable blocks one after another; bottlenecks hand their first convolution to the block before them."""
    t = None
    for i, block in enumerate(blocks):
        spec = block._resnet_triton.spec
        if t is None:
            t = _apply(x, _first_unit(block))
        rest = [unit(getattr(block, conv), getattr(block, norm)) for conv, norm in spec.units[1:]]
        shortcut = getattr(block, spec.shortcut)
        project = None if shortcut is None else unit(shortcut[0], shortcut[1])
        following = None
        if i + 1 < len(blocks) and blocks[i + 1]._resnet_triton.spec is BOTTLENECK:
            following = _first_unit(blocks[i + 1])
        x, t = functional.block_tail(t, x, *rest, downsample=project, next=following)
    return x


def fused_blocks(stage: Converted) -> list[Converted] | None:
    """The blocks of a stage if all of them can run fused without being called, else None."""
    blocks = list(stage._modules.values())  # children() would name a block that is there twice only once
    for block in blocks:
        if not hasattr(block, "_resnet_triton") or block._resnet_triton.kind != "block":
            return None
        if not _bypassable(block) or why_not_block(block) is not None:
            return None
    return blocks


def why_not_stage(stage: Converted) -> str | None:
    """Why a converted stage calls its blocks one by one now, or None."""
    if fused_blocks(stage) is None:
        return "one of its blocks is hooked or not fused"
    return None


def run_block(block: Converted, x: Tensor) -> Tensor:
    """A converted block's forward."""
    if why_not_block(block) is not None:
        return block._eager(x)
    return run_blocks([block], x)


def run_stage(stage: Converted, x: Tensor) -> Tensor:
    """A converted stage's forward."""
    blocks = fused_blocks(stage)
    return stage._eager(x) if blocks is None else run_blocks(blocks, x)


STEM = ("conv1", "bn1", "relu", "maxpool")


def why_not_stem(conv: nn.Module, norm: nn.Module, act: nn.Module) -> str | None:
    """Why the convolution, BN and ReLU at a network's entrance do not run fused now, or None."""
    if reason := why_not_conv(conv):
        return f"conv1 {reason}"
    if reason := why_not_norm(norm):
        return f"bn1 {reason}"
    if type(act) is not nn.ReLU:
        return f"relu is {type(act).__name__}; the fused stem applies nn.ReLU"
    return _transient_reason((conv, norm, act))


def _is_imagenet_stem(u: ConvBN, pool: Converted) -> bool:
    return (
        tuple(u.weight.shape[1:]) == (3, 7, 7)
        and (u.stride, u.padding, u.dilation) == (2, 3, 1)
        and type(pool) is nn.MaxPool2d
        and (pool.kernel_size, pool.stride, pool.padding, pool.dilation) == (3, 2, 1, 1)
        and not (pool.ceil_mode or pool.return_indices)
        and _transient_reason((pool,)) is None
    )


def run_trunk(children: Sequence[tuple[str, Converted]], x: Tensor, taps: Iterable[str] = ()) -> dict[str, Tensor]:
    """Runs a ResNet's named children one after another, fusing the stem and whole runs of stages between taps.

    Args:
        children: ``(name, module)`` in order, e.g. conv1, bn1, relu, maxpool, layer1 ...
        x: images ``[N, C, H, W]``.
        taps: names whose output the caller wants.

    Returns:
        The output of each tapped child in order, and of the last child under ``""``.
    """
    outputs: dict[str, Tensor] = {}
    names = [name for name, _ in children]
    modules = [m for _, m in children]
    i = 0
    if names[:3] == list(STEM[:3]) and not any(name in taps for name in STEM[:2]):
        conv, norm, act = modules[:3]
        if x.is_floating_point() and why_not_stem(conv, norm, act) is None:
            u = unit(conv, norm)
            if names[3:4] == [STEM[3]] and STEM[2] not in taps and _is_imagenet_stem(u, modules[3]):
                x = functional.stem(x, u.weight, *u.vectors, eps=u.eps)
                i = 4
            else:
                x = _apply(x, u)
                i = 3
            if names[i - 1] in taps:
                outputs[names[i - 1]] = x
    pending: list[Converted] = []  # fused blocks not run yet: no tap has asked for what they compute
    while i < len(children):
        name, m = names[i], modules[i]
        marked = getattr(m, "_resnet_triton", None)
        blocks = fused_blocks(m) if marked is not None and marked.kind == "stage" and _bypassable(m) else None
        if blocks is None:
            x = m(run_blocks(pending, x))
            pending = []
        else:
            pending = pending + blocks
        if name in taps:
            x = run_blocks(pending, x)
            pending = []
            outputs[name] = x
        i += 1
    outputs[""] = run_blocks(pending, x)
    return outputs


def run_resnet(model: Converted, x: Tensor) -> Tensor:
    """The forward of a converted ResNet: trunk, global average pool, fully connected layer."""
    if "_forward_impl" in model.__dict__:  # replaced on the instance
        return model._eager(x)
    x = run_trunk([(name, getattr(model, name)) for name in model._resnet_triton.spec], x)[""]
    if why_not_head(model) is None:
        return functional.head(x, model.fc.weight, model.fc.bias)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def why_not_head(model: Converted) -> str | None:
    """Why pooling and classifier of a ResNet do not run fused now, or None."""
    pool, fc = model.avgpool, model.fc
    if type(pool) is not nn.AdaptiveAvgPool2d or pool.output_size not in (1, (1, 1)):
        return "avgpool is not AdaptiveAvgPool2d(1)"
    if type(fc) is not nn.Linear:
        return f"fc is {type(fc).__name__}, not nn.Linear"
    return _transient_reason((pool, fc))


def run_layer_getter(getter: Converted, x: Tensor) -> dict[str, Tensor]:
    """The forward of a converted torchvision IntermediateLayerGetter."""
    taps = getter.return_layers
    outputs = run_trunk(list(getter.items()), x, tuple(taps))
    return OrderedDict((taps[name], output) for name, output in outputs.items() if name)

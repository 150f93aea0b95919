"""``fold``: multiplies inference BN into the convolutions before it, for good."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from operator import attrgetter

import torch
from torch import nn

from . import functional, structure, units
from .convert import check_module, convert, copy_module, is_converted, residual_blocks
from .nn import unit
from .structure import Converted

Place = tuple[nn.Module, str]  # a module and the name of its child


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Folds the BN of every known block and stem into its convolution, for good, and converts the model.

    The convolutions get a bias, the BNs become ``nn.Identity``, so state_dict keys change; a block with hooks or
    replaced forwards stays as it is. Grouped convolutions, which run on cuDNN, are folded too. Fold in fp32, then
    cast: ``fold(model).bfloat16()`` rounds each weight once.

    Args:
        model: a model in eval mode, converted or not.
        inplace: change ``model`` itself; the default works on a deep copy.

    Raises:
        ValueError: a BN to fold is in training mode (nothing is changed).
    """
    check_module(model, "fold", inplace)
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    training = [name for name, m in model.named_modules() if isinstance(m, norms) and m.training]
    if training:
        raise ValueError(
            f"fold needs constant statistics, but {training[0]} is in training mode; call model.eval() first"
        )
    if not inplace:
        model = copy_module(model, "fold")
    convert(model, inplace=True)
    for conv, norm in _foldable(model):
        _fold_pair(conv, norm)
    return model


def _foldable(model: nn.Module) -> Iterator[tuple[Place, Place]]:
    """Where the convolution and the BN of every pair sit that can be folded."""
    for _, block, spec in list(residual_blocks(model)):
        if not is_converted(block) or structure.transient_reason(block, spec) is not None:
            continue
        for u in spec.units:
            if u.norm:  # the BN in front of a pre-activation block stays: a ReLU is between it and the convolution
                yield _place(block, u.conv), _place(block, u.norm)
        shortcut = spec.shortcut_of(block)
        parts = structure.projection(shortcut) if structure.why_not_shortcut(shortcut, "") is None else None
        if parts is not None:
            yield (parts.owner, parts.conv_name), (parts.owner, parts.norm_name)
    m: Converted
    for m in list(model.modules()):
        if is_converted(m):
            yield from _foldable_stem(m)
            yield from _foldable_units(m)


def _foldable_stem(m: Converted) -> Iterator[tuple[Place, Place]]:
    """The pairs at the entrance of a converted network, or of a wrapper that takes features from one."""
    marker = m._resnet_triton
    if marker.kind == "embeddings":
        names: tuple[str, ...] = ("embedder.convolution", "embedder.normalization", "embedder.activation")
        if not structure.is_bypassable(m.embedder):
            return
    elif isinstance(marker.spec, structure.TrunkSpec) and "_forward_impl" not in m.__dict__:
        names = marker.spec.children[:3]
    elif marker.kind == "getter" and "conv1" not in m.return_layers:  # a tap of conv1 must stay without BN
        names = tuple(m)[:3]
    else:
        return
    if marker.kind != "embeddings" and names not in structure.STEMS:
        return
    parts = attrgetter(*names)(m)
    if structure.why_not_stem(*parts) is not None:
        return
    convs = [_place(m, names[0])]
    norms = [_place(m, names[1])]
    if isinstance(parts[0], nn.Sequential):  # a deep stem: convolution, BN, ReLU, ..., convolution
        children = list(parts[0]._modules)
        convs = [(parts[0], name) for name in children[::3]]
        norms = [(parts[0], name) for name in children[1::3]] + norms
    yield from zip(convs, norms, strict=True)


def _foldable_units(m: Converted) -> Iterator[tuple[Place, Place]]:
    """The pairs of a module of convolution, BN and ReLU, or of several."""
    known = m._resnet_triton
    if known.kind == "unit" and units.reasons(m, known)[""] is None:
        yield _place(m, known.spec.conv), _place(m, known.spec.norm)
    sequence = units.sequence_of(m, known)
    if sequence is not None and (sequence is m or units.why_not_sequence(sequence) is None):
        names = list(sequence._modules)
        for f in units.found_in(list(sequence._modules.values())):
            if f.reason is None and f.norm is not structure.NO_NORM:
                yield (sequence, names[f.place]), (sequence, names[f.place + 1])


def _place(m: nn.Module, path: str) -> Place:
    parent, _, name = path.rpartition(".")
    return (attrgetter(parent)(m) if parent else m), name


@torch.no_grad()
def _fold_pair(conv_place: Place, norm_place: Place) -> None:
    conv, norm = getattr(*conv_place), getattr(*norm_place)
    if type(conv) is not nn.Conv2d or type(norm) is nn.Identity or structure.why_not_norm(norm) is not None:
        return
    u = unit(conv, norm)
    assert u.mean is not None and u.var is not None  # why_not_norm asks for statistics
    weight, bias = functional.fold_bn(u.weight, u.bias, u.gamma, u.beta, u.mean, u.var, u.eps)
    folded = copy.deepcopy(conv)  # elsewhere the same convolution may run with another BN, or with none
    folded.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), conv.weight.requires_grad)
    folded.bias = nn.Parameter(bias, conv.weight.requires_grad)
    setattr(*conv_place, folded)
    setattr(*norm_place, nn.Identity())

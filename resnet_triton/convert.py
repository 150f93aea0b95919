"""``convert``: makes the residual blocks of a model run fused, by swapping the class of known modules.

A known module's class is replaced by a generated subclass of that very class whose ``forward`` runs ``nn.run_*`` and
whose ``_eager`` is the original forward. Attributes, children, state_dict, ``isinstance``, hooks, deepcopy, pickle,
TorchScript, fx, export and compile keep working; :func:`unconvert` gives the original classes back.
"""

from __future__ import annotations

import copy
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from . import functional, models
from . import nn as fused

logger = logging.getLogger("resnet_triton")
Spec = fused.BlockSpec | tuple[str, ...] | None


@dataclass(frozen=True)
class Marker:
    """What a generated class carries: its kind, the class it replaces, and attribute names of a block or container."""

    kind: str
    base: type[nn.Module]
    spec: Spec = None


def _originals() -> Iterator[tuple[str, type[nn.Module], Spec]]:
    """``(kind, class, spec)`` of every module class that is known exactly."""
    yield "block", models.BasicBlock, fused.BASIC
    yield "block", models.Bottleneck, fused.BOTTLENECK
    yield "stage", nn.Sequential, None
    yield "container", models.ResNet, fused.IMAGENET
    yield "container", models.CifarResNet, fused.CIFAR
    for module, kind, name, spec in (
        ("torchvision.models.resnet", "block", "BasicBlock", fused.BASIC),
        ("torchvision.models.resnet", "block", "Bottleneck", fused.BOTTLENECK),
        ("torchvision.models.resnet", "container", "ResNet", fused.IMAGENET),
        ("torchvision.models._utils", "getter", "IntermediateLayerGetter", None),
    ):
        try:
            yield kind, getattr(importlib.import_module(module), name), spec
        except (ImportError, RuntimeError, AttributeError):  # absent, or built for another torch
            continue


@functools.cache
def _known() -> dict[object, tuple[str, Spec]]:
    """Kind and spec by the ``forward`` function of a known class: a subclass that overrides it is not known."""
    return {cls.forward: (kind, spec) for kind, cls, spec in _originals()}


@functools.cache
def _helpers() -> set[object]:
    """The ``_forward_impl`` functions of known containers; a subclass that overrides it is not known."""
    return {cls._forward_impl for _, cls, _ in _originals() if hasattr(cls, "_forward_impl")}


# TorchScript compiles a forward from its source, with the first branch only, and wants its argument named as here.


def _forward_block(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    if isinstance(x, fx.Proxy):  # a block is a leaf of a traced graph
        tracer: Any = x.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
    if torch.jit.is_tracing():  # TorchScript cannot record lists of optional tensors
        return self._eager(x)
    return fused.run_block(self, x)


def _forward_stage(self, input):
    if torch.jit.is_scripting():
        return self._eager(input)
    if isinstance(input, fx.Proxy) or torch.jit.is_tracing():
        return self._eager(input)
    return fused.run_stage(self, input)


def _forward_container(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    if isinstance(x, fx.Proxy) or torch.jit.is_tracing():
        return self._eager(x)
    return fused.run_resnet(self, x)


def _forward_getter(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    if isinstance(x, fx.Proxy) or torch.jit.is_tracing():
        return self._eager(x)
    return fused.run_layer_getter(self, x)


_FORWARD: dict[str, Callable] = {
    "block": _forward_block,
    "stage": _forward_stage,
    "container": _forward_container,
    "getter": _forward_getter,
}


@functools.cache
def fused_class(base: Any) -> type[nn.Module]:
    """The generated subclass of a known class."""
    kind, spec = _known()[base.forward]
    eager = FunctionType(
        base.forward.__code__, base.forward.__globals__, "_eager", base.forward.__defaults__, base.forward.__closure__
    )
    eager.__annotations__ = dict(base.forward.__annotations__)
    body = {
        "forward": _FORWARD[kind],
        "_eager": eager,
        "_resnet_triton": Marker(kind, base, spec),
        "__reduce_ex__": _reduce_ex,
        "__module__": __name__,
        "__doc__": f"{base.__name__} whose forward runs fused; see resnet_triton.convert.",
    }
    return type(f"Fused{base.__name__}", (base,), body)


def _marker(m: nn.Module) -> Marker:
    """The marker of a converted module."""
    return type(m)._resnet_triton  # type: ignore[attr-defined]


def _reduce_ex(self, protocol):
    state = self.__getstate__() if hasattr(type(self), "__getstate__") else self.__dict__
    return _rebuild, (self._resnet_triton.base,), state


def _rebuild(base: Any) -> nn.Module:
    cls = fused_class(base)
    return cls.__new__(cls)


def _kind(m: nn.Module) -> str | None:
    """What a module could be converted to, or None."""
    cls: Any = type(m)
    kind, _ = _known().get(_forward_of(m), (None, None))
    if kind is None or "forward" in m.__dict__ or is_converted(m):
        return None
    if kind == "container" and getattr(cls, "_forward_impl", None) not in _helpers():
        return None
    if kind == "stage":
        children = list(m.children())
        if not children or not all(_is_block(child) for child in children):
            return None
    return kind


def _is_block(m: nn.Module) -> bool:
    if is_converted(m):
        return _marker(m).kind == "block"
    return _known().get(_forward_of(m), ("",))[0] == "block" and "forward" not in m.__dict__


def _forward_of(m: nn.Module) -> object:
    """The ``forward`` that a module's class had before it was converted."""
    cls = _marker(m).base if is_converted(m) else type(m)
    return getattr(cls, "forward", None)  # a ScriptModule's class has none


def is_converted(m: nn.Module) -> bool:
    """Whether this very module's class was swapped by :func:`convert`."""
    return hasattr(type(m), "_resnet_triton")


def convert(model: nn.Module, *, inplace: bool = False, strict: bool = False) -> nn.Module:
    """Makes the residual blocks of ``model`` run fused.

    Args:
        model: any module that holds residual blocks of torchvision or of this package.
        inplace: swap classes in ``model`` itself; the default works on a deep copy.
        strict: raise unless every residual block can run fused.

    Returns:
        The converted model. Converting twice changes nothing. Convolution weights of its blocks become channels_last.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: ``model`` is wrapped (torch.compile, DistributedDataParallel) and ``inplace`` is False; or
            ``strict`` and something cannot be fused: every such block is named with its reason, and nothing changes.
    """
    _check_module(model, "convert", inplace)
    if strict:
        _check_strict(model)
    if not inplace:
        model = _copy(model, "convert")
    for m in list(model.modules()):
        if _kind(m) is not None:
            base: Any = type(m)
            m.__class__ = fused_class(base)
    converted = [m for m in model.modules() if is_converted(m)]
    for m in converted:
        _weights_channels_last(m)
    if not any(_marker(m).kind == "block" for m in converted):
        logger.warning(
            "convert found no residual block it knows in %s; it runs as before. Known are the blocks of torchvision's "
            "and this package's ResNets.",
            type(model).__name__,
        )
    return model


def _weights_channels_last(converted: nn.Module) -> None:
    """Lays convolution weights out as K,R,S,C once, so that no call repacks them; sharded ones stay as they are."""
    for m in converted.modules():
        if isinstance(m, nn.Conv2d) and type(m.weight.data) is torch.Tensor:
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)


def unconvert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Gives every converted module its original class back.

    Args:
        model: a converted model.
        inplace: change ``model`` itself; the default works on a deep copy.
    """
    _check_module(model, "unconvert", inplace)
    if not inplace:
        model = _copy(model, "unconvert")
    for m in model.modules():
        if is_converted(m):
            m.__class__ = _marker(m).base
    return model


def _copy(model: nn.Module, function: str) -> nn.Module:
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # a pruned weight, a handle in a hook: copying calls foreign code
        name = type(model).__name__
        raise ValueError(
            f"{function} cannot copy the {name}: {error}; pass inplace=True to change it itself"
        ) from error
    for new, old in zip(copied.modules(), model.modules(), strict=True):
        new.training = old.training  # a copied fx.GraphModule forgets it
    return copied


def _check_module(model: nn.Module, function: str, inplace: bool) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes an nn.Module, got {type(model).__name__}")
    wrapper = hasattr(model, "_orig_mod") or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    if wrapper and not inplace:
        raise ValueError(
            f"model is a {type(model).__name__} wrapper, which cannot be copied; {function} the model before wrapping "
            f"it, or pass inplace=True"
        )


def residual_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, fused.BlockSpec]]:
    """``(name, module, spec)`` of every known residual block, converted or not."""
    for name, m in model.named_modules():
        kind, spec = _known().get(_forward_of(m), ("", None))
        if kind == "block" and isinstance(spec, fused.BlockSpec):
            yield name, m, spec


def _check_strict(model: nn.Module) -> None:
    found = list(residual_blocks(model))
    reasons = [f"{name}: {reason}" for name, m, spec in found if (reason := fused.structural_reason(m, spec))]
    reasons += [f"{name}: its forward was replaced on the instance" for name, m, _ in found if "forward" in m.__dict__]
    if not found:
        raise ValueError(
            f"strict=True, but {type(model).__name__} has no residual block of torchvision or this package. "
            "Use convert(..., strict=False) to leave it as it is."
        )
    if reasons:
        raise ValueError(
            "strict=True, but these blocks cannot run fused: "
            + "; ".join(reasons)
            + ". Use convert(..., strict=False) to leave them to cuDNN."
        )


def fold(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Folds the BN of every fusable block and stem into its convolution, for good, and converts the model.

    The convolutions get a bias, the BNs become ``nn.Identity``, so state_dict keys change; what does not run fused,
    because of its structure or a hook, stays. Fold in fp32, then cast: ``fold(model).bfloat16()`` rounds each weight
    once.

    Args:
        model: a model in eval mode, converted or not.
        inplace: change ``model`` itself; the default works on a deep copy.

    Raises:
        ValueError: a BN to fold is in training mode (nothing is changed).
    """
    _check_module(model, "fold", inplace)
    norms = (nn.BatchNorm2d, nn.SyncBatchNorm)
    training = [name for name, m in model.named_modules() if isinstance(m, norms) and m.training]
    if training:
        raise ValueError(
            f"fold needs constant statistics, but {training[0]} is in training mode; call model.eval() first"
        )
    if not inplace:
        model = _copy(model, "fold")
    convert(model, inplace=True)
    for parent, conv, norm in _foldable(model):
        _fold_pair(parent, conv, norm)
    return model


def _foldable(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """``(parent, convolution name, BN name)`` of every pair that can be folded."""
    for _, block, spec in list(residual_blocks(model)):
        if is_converted(block) and fused.why_not_block(block) is None:
            yield from ((block, conv, norm) for conv, norm in spec.units)
            shortcut = getattr(block, spec.shortcut)
            if shortcut is not None:
                yield shortcut, "0", "1"
    m: fused.Converted
    for m in list(model.modules()):
        kind = _marker(m).kind if is_converted(m) else ""
        if kind == "container" and "_forward_impl" not in m.__dict__:
            names: tuple[str, ...] = fused.STEM[:3]
        elif kind == "getter" and fused.STEM[0] not in m.return_layers:  # a tap of conv1 must stay without BN
            names = tuple(m)[:3]
        else:
            continue
        if names == fused.STEM[:3] and fused.why_not_stem(*(getattr(m, name) for name in names)) is None:
            yield m, "conv1", "bn1"


@torch.no_grad()
def _fold_pair(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = getattr(parent, conv_name), getattr(parent, norm_name)
    if type(norm) is nn.Identity:
        return
    u = fused.unit(conv, norm)
    assert u.mean is not None and u.var is not None  # only pairs with statistics are foldable
    weight, bias = functional.fold_bn(u.weight, u.bias, u.gamma, u.beta, u.mean, u.var, u.eps)
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias, conv.weight.requires_grad)
    setattr(parent, norm_name, nn.Identity())

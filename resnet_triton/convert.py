"""``convert``: makes the residual blocks of a model run fused, by swapping the class of known modules.

A known module's class (:mod:`.families` lists them) is replaced by a generated subclass of that very class whose
``forward`` runs ``nn.run_*`` and whose ``_eager`` is the original forward. Attributes, children, state_dict,
``isinstance``, hooks, deepcopy, pickle, TorchScript, fx, export and compile keep working; :func:`unconvert` gives the
original classes back.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn

from . import structure, units
from .families import family_of

logger = logging.getLogger("resnet_triton")
KNOWN = "torchvision, timm, Hugging Face and this package"


@dataclass(frozen=True)
class Marker:
    """What a generated class carries: its kind, the class it replaces, and attribute names (see :class:`Family`)."""

    kind: str
    base: type[nn.Module]
    spec: structure.BlockSpec | structure.TrunkSpec | structure.UnitSpec | str | None = None


@functools.cache
def fused_class(base: Any) -> type[nn.Module]:
    """The generated subclass of a known class."""
    family = family_of(base)
    assert family is not None, f"{base} is not known"
    body: dict[str, Any] = {
        "_resnet_triton": Marker(family.kind, base, family.spec),
        "__reduce_ex__": _reduce_ex,
        "__module__": __name__,
        "__doc__": f"{base.__name__} whose forward runs fused; see resnet_triton.convert.",
    }
    for name, replacement in family.methods.items():
        body[name] = _renamed(replacement, name)
        eager = "_eager" if name == "forward" else f"_eager_{name}"
        body[eager] = _renamed(getattr(base, name), eager)
    return type(f"Fused{base.__name__}", (base,), body)


def _renamed(f: Any, name: str) -> FunctionType:
    """A copy of a method under another name: TorchScript registers methods by the name that they carry."""
    copied = FunctionType(f.__code__, f.__globals__, name, f.__defaults__, f.__closure__)
    copied.__annotations__ = dict(f.__annotations__)
    return copied


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
    family = None if is_converted(m) else family_of(type(m))
    if family is None or any(name in m.__dict__ for name in ("forward", *family.methods)):
        return None
    if family.kind == "stage" and family.spec is None:  # any Sequential
        children = list(m.children())
        if (not children or not all(is_block(child) for child in children)) and not units.has_prelu(m):
            return None
    return family.kind


def is_block(m: nn.Module) -> bool:
    """Whether a module is a known residual block, converted or not."""
    family = family_of(original_class(m))
    return family is not None and family.kind == "block" and "forward" not in m.__dict__


def original_class(m: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was converted."""
    return _marker(m).base if is_converted(m) else type(m)


def is_converted(m: nn.Module) -> bool:
    """Whether this very module's class was swapped by :func:`convert`."""
    return hasattr(type(m), "_resnet_triton")


def convert(model: nn.Module, *, inplace: bool = False, strict: bool = False) -> nn.Module:
    """Makes the residual blocks of ``model`` run fused.

    Args:
        model: any module that holds residual blocks of torchvision, timm, segmentation_models_pytorch, Hugging Face's
            transformers, or this package; or torchvision's VGG, GoogLeNet or Inception.
        inplace: swap classes in ``model`` itself; the default works on a deep copy.
        strict: raise unless every residual block can run fused, and every convolution of a VGG or GoogLeNet.

    Returns:
        The converted model. Converting twice changes nothing. Convolution weights of its blocks become channels_last.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: ``model`` is wrapped (torch.compile, DistributedDataParallel) and ``inplace`` is False; or
            ``strict`` and something cannot be fused: every such block is named with its reason, and nothing changes.
    """
    check_module(model, "convert", inplace)
    if strict:
        _check_strict(model)
    if not inplace:
        model = copy_module(model, "convert")
    for m in list(model.modules()):
        if _kind(m) is not None:
            base: Any = type(m)
            m.__class__ = fused_class(base)
    converted = [m for m in model.modules() if is_converted(m)]
    for m in converted:
        _weights_channels_last(m)
    if not any(_marker(m).kind == "block" or units.is_known(m, _marker(m)) for m in converted):
        logger.warning(
            "convert found no residual block that it knows in %s; %s. Known are the ResNets of %s, and "
            "torchvision's VGG, GoogLeNet and Inception.",
            original_class(model).__name__,
            "only its stem and head may run fused" if converted else "it runs as before",
            KNOWN,
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
    check_module(model, "unconvert", inplace)
    if not inplace:
        model = copy_module(model, "unconvert")
    for m in model.modules():
        if is_converted(m):
            m.__class__ = _marker(m).base
    return model


def copy_module(model: nn.Module, function: str) -> nn.Module:
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


def check_module(model: nn.Module, function: str, inplace: bool) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} takes an nn.Module, got {type(model).__name__}")
    wrapper = hasattr(model, "_orig_mod") or isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    if wrapper and not inplace:
        raise ValueError(
            f"model is a {type(model).__name__} wrapper, which cannot be copied; {function} the model before wrapping "
            f"it, or pass inplace=True"
        )


def residual_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, structure.BlockSpec]]:
    """``(name, module, spec)`` of every known residual block, converted or not."""
    for name, m in model.named_modules():
        family = family_of(original_class(m))
        if family is not None and isinstance(family.spec, structure.BlockSpec):
            yield name, m, family.spec


def modules_of_units(model: nn.Module, now: bool = True) -> Iterator[tuple[str, nn.Module, dict[str, str | None]]]:
    """``(name, module, reasons)`` of every known module of convolution, BN and ReLU, see :func:`.units.reasons`."""
    owned = set()  # sequences of a module that is listed itself
    for name, m in model.named_modules():
        family = family_of(original_class(m))
        if family is not None and id(m) not in owned and units.is_known(m, family):
            owned.add(id(units.sequence_of(m, family)))
            path = f"{name}." if name else ""
            found = units.reasons(m, family, now)
            yield name, m, {(path + child).removesuffix("."): reason for child, reason in found.items()}


def _check_strict(model: nn.Module) -> None:
    found = list(residual_blocks(model))
    beside = [reasons for _, _, reasons in modules_of_units(model, now=False)]
    reasons = [f"{name}: {reason}" for name, m, spec in found if (reason := structure.structural_reason(m, spec))]
    reasons += [f"{name}: its forward was replaced on the instance" for name, m, _ in found if "forward" in m.__dict__]
    reasons += [f"{name}: {reason}" for parts in beside for name, reason in parts.items() if reason]
    if not found and not beside:
        raise ValueError(
            f"strict=True, but {type(model).__name__} has no residual block of {KNOWN}. "
            "Use convert(..., strict=False) to leave it as it is."
        )
    if reasons:
        raise ValueError(
            "strict=True, but these blocks cannot run fused as a whole: "
            + "; ".join(reasons)
            + ". Use convert(..., strict=False) to leave those parts to cuDNN."
        )

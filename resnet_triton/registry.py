"""``register``: this package's networks by name in the registries of torchvision and timm.

``torchvision.models.get_model("triton_resnet50", ...)`` builds :func:`resnet_triton.resnet50`, with torchvision's
arguments. ``timm.create_model("triton_resnet50", ...)`` builds timm's own ``resnet50``, converted, so that every
argument, pretrained tag and method of timm's network is there.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from typing import Any, Optional

from torch import nn

from . import models
from .weights import ENUMS

logger = logging.getLogger("resnet_triton")
PREFIX = "triton_"


def register() -> list[str]:
    """Puts ``triton_resnet50`` and the others into the registries of torchvision and timm, whichever are installed.

    Calling it again changes nothing. A library that is missing is named in the log (``resnet_triton``, level INFO).

    Returns:
        The registered names, the same in both libraries.

    Raises:
        ImportError: neither torchvision nor timm can be imported.
        ValueError: another package holds one of the names; then nothing is registered there.
    """
    missing = []
    for library, put in (("torchvision", _into_torchvision), ("timm", _into_timm)):
        try:
            importlib.import_module(f"{library}.models")
        except (ImportError, RuntimeError) as error:  # absent, or built for another torch
            missing.append(f"{library} ({error})")
        else:
            put()
    if len(missing) == 2:
        raise ImportError(
            f"register needs torchvision or timm, and neither can be imported: {'; '.join(missing)}. Install one "
            "(pip install torchvision), or call the builders, such as resnet_triton.resnet50()."
        )
    for library in missing:
        logger.info("register left out %s", library)
    return [PREFIX + name for name in models.BUILDERS]


def _into_torchvision() -> None:
    from torchvision.models import get_model_builder, list_models
    from torchvision.models._api import register_model  # it has no public name

    taken = {PREFIX + name for name in models.BUILDERS} & set(list_models())
    for name in _new("torchvision", taken, get_model_builder):
        register_model(PREFIX + name)(_torchvision_builder(name))


def _into_timm() -> None:
    from timm.models import is_model, model_entrypoint, register_model

    taken = {PREFIX + name for name in models.BUILDERS if is_model(PREFIX + name)}
    here: Any = sys.modules[__name__]
    for name in _new("timm", taken, model_entrypoint):
        here.default_cfgs = _timm_configurations(name)
        try:
            register_model(_timm_builder(name))
        finally:
            del here.default_cfgs
    here.__dict__.pop("__all__", None)  # timm adds every name to the module of its builder


def _new(library: str, taken: set[str], entry: Callable[[str], Callable[..., nn.Module]]) -> list[str]:
    """Names of builders that a registry does not have yet.

    Raises:
        ValueError: it has one of another package.
    """
    for key in sorted(taken):
        if entry(key).__module__ != __name__:
            raise ValueError(
                f"{library} already has a model {key!r}, of {entry(key).__module__}. Build with "
                f"resnet_triton.{key.removeprefix(PREFIX)}() instead of registering."
            )
    return [name for name in models.BUILDERS if PREFIX + name not in taken]


def _torchvision_builder(name: str) -> Callable[..., nn.Module]:
    import torchvision.models

    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> nn.Module:
        return models.BUILDERS[name](weights=weights, progress=progress, **kwargs)

    # torchvision.models.get_model_weights reads the enum off the annotation
    build.__annotations__["weights"] = Optional[getattr(torchvision.models, _weights_enum(name))]  # noqa: UP045
    return _named(build, name)


def _weights_enum(name: str) -> str:
    return next(enum for enum in ENUMS.values() if enum.removesuffix("_Weights").lower() == name)


def _timm_builder(name: str) -> Callable[..., nn.Module]:
    from timm.models import model_entrypoint

    from .convert import convert

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return convert(model_entrypoint(name)(pretrained=pretrained, **kwargs), inplace=True)

    return _named(build, name)


def _timm_configurations(name: str) -> dict[str, Any]:
    """timm's pretrained configurations of ``name``, as its ``register_model`` takes them for our name."""
    from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs

    configurations = get_arch_pretrained_cfgs(name)
    return generate_default_cfgs({f"{PREFIX}{tagged}": cfg for tagged, cfg in configurations.items()})


def _named(build: Callable[..., nn.Module], name: str) -> Callable[..., nn.Module]:
    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"``{name}`` with its residual blocks converted by resnet_triton."
    return build

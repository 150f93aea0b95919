"""Networks of this package by name."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

#: Functions of a depth, which stands behind their name: ``cifar_resnet20``; ``resnet20`` is the same.
FAMILIES = ("cifar_resnet", "cifar_plain", "preact_cifar_resnet", "preact_resnet")


def builders() -> dict[str, Callable[..., nn.Module]]:
    """The functions of this package that build a network and need no argument, by name."""
    models = sys.modules[__package__]
    found = {name: getattr(models, name) for name in models.__all__ if inspect.isfunction(getattr(models, name))}
    return {name: build for name, build in found.items() if not any(map(_is_needed, _parameters(build)))}


def build_by_name(name: str, **kwargs: Any) -> nn.Module:
    """A network of this package, converted.

    Args:
        name: of a builder (``"resnet50"``, ``"plain34"``), or a family and a depth: ``"cifar_resnet20"``,
            ``"cifar_plain56"``, ``"preact_cifar_resnet164"``. ``"resnet20"`` is short for ``"cifar_resnet20"``, unless
            there is a builder of that name.
        **kwargs: of the builder.

    Raises:
        ValueError: for a name that is not known, with the nearest known ones; for an argument that the network does not
            have; and as the builder does.
    """
    build, depth = _found(name)
    try:
        return build(*depth, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"model {name!r}: {error}; got {', '.join(kwargs)}") from error


def keyword(text: str) -> tuple[str, Any]:
    """Name and value of ``name=value``; the value is a JSON value (``true``, ``3``, ``null``) or else a text.

    Raises:
        ValueError: for another text.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def with_arguments(spec: str) -> tuple[str, dict[str, Any]]:
    """A name with arguments behind it (``"cifar_resnet20 shortcut=C"``), apart; other texts as they are.

    Raises:
        ValueError: for words behind a known name that are no arguments.
    """
    name, *words = spec.split() or [""]
    return (name, dict(map(keyword, words))) if is_known(name) else (spec, {})


def spec(name: str, arguments: Mapping[str, Any]) -> str:
    """Inverse of :func:`with_arguments`."""
    words = (f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in arguments.items())
    return " ".join([name, *words])


def is_known(name: str) -> bool:
    """Whether :func:`build_by_name` knows a name; the depth behind it may still be refused."""
    return _split(name) is not None or name in builders()


def takes(name: str, argument: str) -> bool:
    """Whether the builder of a known name has an argument of this name."""
    return argument in inspect.signature(_found(name)[0]).parameters


def _found(name: str) -> tuple[Callable[..., nn.Module], list[int]]:
    known = builders()
    if name in known:
        return known[name], []
    split = _split(name)
    if split is None:
        near = difflib.get_close_matches(name, known)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        forms = ", ".join(f"{family}N" for family in FAMILIES)
        raise ValueError(f"model {name!r} is not known{hint}; allowed: {', '.join(known)}, {forms}")
    family, depth = split
    return getattr(sys.modules[__package__], family), [depth]


def _split(name: str) -> tuple[str, int] | None:
    """Family and depth of a name, or None."""
    match = re.fullmatch(r"(\D+)(\d+)", name)
    if match is None:
        return None
    family = "cifar_resnet" if match[1] == "resnet" and int(match[2]) % 6 == 2 else match[1]
    return (family, int(match[2])) if family in FAMILIES else None


def _parameters(build: Callable[..., nn.Module]) -> list[inspect.Parameter]:
    return list(inspect.signature(build).parameters.values())


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD

"""Finds a model by name: the ``--model`` of every command."""

from __future__ import annotations

from torch import nn

from . import models

BUILDERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def load_model(spec: str, *, weights: str | None = None) -> nn.Module:
    """The model that ``spec`` names, in eval mode, not converted.

    Raises:
        ValueError: for a name that is not known.
    """
    if spec not in BUILDERS:
        raise ValueError(f"model {spec!r} is not known; allowed: {', '.join(BUILDERS)}")
    return getattr(models, spec)(weights=weights).eval()

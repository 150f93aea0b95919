"""The model of a run: by name, with as many outputs as the data have classes, converted."""

from __future__ import annotations

import re

import torch
from torch import nn

from .. import models
from ..convert import convert
from ..sources import load_model


def build(spec: str, classes: int, channels: int) -> nn.Module:
    """A converted model with random weights of the present random state.

    Args:
        spec: ``resnetN`` with N = 6n+2 is the CIFAR ResNet of that depth, unless this package has an ImageNet network
            of that name (``resnet50``); everything else is for :func:`resnet_triton.sources.load_model`.
        classes: outputs. A classifier ``fc`` with another number is replaced.
        channels: of the images, for a CIFAR ResNet; other models say themselves what they take.

    Raises:
        ValueError: for a name that is not known.
        ImportError, OSError: as ``load_model`` does.
    """
    depth = re.fullmatch(r"resnet(\d+)", spec)
    if spec in models.BUILDERS:
        return models.BUILDERS[spec](num_classes=classes)
    if depth:
        return models.cifar_resnet(int(depth[1]), classes, channels)
    model = load_model(spec)
    fc = getattr(model, "fc", None)
    if isinstance(fc, nn.Linear) and fc.out_features != classes:
        model.fc = nn.Linear(fc.in_features, classes, bias=fc.bias is not None)
    return convert(model, inplace=True)


def check_outputs(model: nn.Module, spec: str, classes: int, shape: tuple[int, int, int]) -> None:
    """Runs a model on two empty images.

    Args:
        model: in eval mode, so that BN stays as it is.
        spec: its name, for the message.
        classes: of the data.
        shape: channels, height and width.

    Raises:
        ValueError: its output is not one number an image and class.
    """
    with torch.no_grad():
        out = model(torch.zeros(2, *shape))
    came = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
    if came != (2, classes):
        raise ValueError(
            f"--model {spec} gives {came} for 2 images; with {classes} classes in --data it must give {(2, classes)}. "
            "Name a function that returns such a model: --model package.module:function"
        )

"""The model of a run: by name, with as many outputs as the data have classes, converted."""

from __future__ import annotations

import torch
from torch import nn

from ..convert import convert
from ..models import build_by_name
from ..models.names import is_known, takes, with_arguments
from ..sources import load_model


def build(spec: str, classes: int, channels: int) -> nn.Module:
    """A converted model with random weights of the present random state.

    Args:
        spec: a name for :func:`resnet_triton.models.build_by_name`, which may have arguments behind it
            (``"cifar_resnet20 shortcut=C"``); everything else is for :func:`resnet_triton.sources.load_model`.
        classes: outputs. A classifier ``fc`` with another number is replaced.
        channels: of the images, for a CIFAR network; other models say themselves what they take.

    Raises:
        ValueError: for a name or an argument that is not known.
        ImportError, OSError: as ``load_model`` does.
    """
    name, kwargs = with_arguments(spec)
    if is_known(name) and (takes(name, "num_classes") or takes(name, "kwargs")):
        sizes = {"in_channels": channels} if takes(name, "in_channels") else {}
        return build_by_name(name, **{"num_classes": classes, **sizes, **kwargs})
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

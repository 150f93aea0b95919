"""The model of a run: by name, with as many outputs as the data have classes, converted."""

from __future__ import annotations

import hashlib

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


def begin_with(model: nn.Module, spec: str, weights: str) -> tuple[str, list[str]]:
    """Gives a new model the weights of a file; a classifier for other classes keeps its own.

    Args:
        model: what :func:`build` made of ``spec``.
        spec: its name.
        weights: for :func:`resnet_triton.sources.load_model`.

    Returns:
        A digest of the weights, and the names of tensors that stay as they were: those of one layer, or none.

    Raises:
        ValueError: more than one layer differs in shape; nothing is changed then.
        ImportError, OSError: as ``load_model`` does.
    """
    found, own = load_model(spec, weights=weights).state_dict(), model.state_dict()
    kept = [name for name, value in own.items() if name not in found or found[name].shape != value.shape]
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in kept))
    if len(layers) > 1 or found.keys() != own.keys():
        different = ", ".join(layers[:4]) or "their names"
        raise ValueError(f"--weights {weights!r} differ from the model in more than its classifier: {different}")
    model.load_state_dict({**found, **{name: own[name] for name in kept}})
    content = hashlib.sha256()
    for name, value in sorted(found.items()):
        content.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:16], kept


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

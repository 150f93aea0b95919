"""Functions that build a network and return it converted."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from .blocks import BasicBlock, Bottleneck
from .cifar import CifarResNet
from .imagenet import PAPERS, ResNet

#: What ``weights=`` of a builder accepts; see :func:`resnet_triton.weights.load_weights`. ``Any`` stands for
#: a member of a torchvision weights enum, which cannot be named without importing torchvision.
Weights = str | PathLike[str] | Mapping[str, Any] | Any | None


class Builder(Protocol):
    """A function that builds one converted network; arguments as :func:`resnet18`."""

    __name__: str

    def __call__(self, *, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet: ...


def _builder(
    name: str, size: str, block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, int, int, int], **fixed: Any
) -> Builder:
    """The public function ``name``; arguments in ``fixed`` belong to the architecture."""

    def build(*, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet:
        for parameter, value in fixed.items():
            if kwargs.setdefault(parameter, value) != value:
                raise ValueError(
                    f"The parameter '{parameter}' expected value {value} but got {kwargs[parameter]} instead: "
                    f"it makes the network a {name}. Leave it out, or build another network."
                )
        return _resnet(block, layers, weights, progress, kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"``{name}``, converted: {size} at 224 px.\n{_ARGUMENTS}"
    return build


_ARGUMENTS = """
    Args:
        weights: None for random ones; a torchvision weights enum member or its name (``"DEFAULT"``), which
            downloads; a state_dict; the path of a ``.pth``, ``.pt`` or ``.safetensors`` file.
        progress: show the progress of a download.
        **kwargs: arguments of :class:`ResNet`. ``num_classes`` follows named weights.

    Raises:
        ValueError, FileNotFoundError: for ``weights`` that cannot be loaded, see
            :mod:`resnet_triton.weights`; for arguments that :class:`ResNet` or the architecture refuses.
    """

resnet18 = _builder("resnet18", "11.7 M parameters, 1.8 GMAC", BasicBlock, (2, 2, 2, 2))
resnet34 = _builder("resnet34", "21.8 M parameters, 3.7 GMAC", BasicBlock, (3, 4, 6, 3))
resnet50 = _builder("resnet50", "25.6 M parameters, 4.1 GMAC", Bottleneck, (3, 4, 6, 3))
resnet101 = _builder("resnet101", "44.5 M parameters, 7.8 GMAC", Bottleneck, (3, 4, 23, 3))
resnet152 = _builder("resnet152", "60.2 M parameters, 11.5 GMAC", Bottleneck, (3, 8, 36, 3))
wide_resnet50_2 = _builder(
    "wide_resnet50_2", "68.9 M parameters, 11.4 GMAC", Bottleneck, (3, 4, 6, 3), width_per_group=128
)
wide_resnet101_2 = _builder(
    "wide_resnet101_2", "126.9 M parameters, 22.8 GMAC", Bottleneck, (3, 4, 23, 3), width_per_group=128
)
# The grouped 3x3 convolutions, and so the blocks, of a ResNeXt run on PyTorch's operators; its stem and head run fused.
resnext50_32x4d = _builder(
    "resnext50_32x4d", "25.0 M parameters, 4.2 GMAC", Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4
)
resnext101_32x8d = _builder(
    "resnext101_32x8d", "88.8 M parameters, 16.4 GMAC", Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8
)
resnext101_64x4d = _builder(
    "resnext101_64x4d", "83.5 M parameters, 15.5 GMAC", Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4
)

# What the paper compares with: the same convolutions without shortcuts, so the parameters of option A.
plain18 = _builder("plain18", "11.5 M parameters, 1.8 GMAC", BasicBlock, (2, 2, 2, 2), shortcut="none")
plain34 = _builder("plain34", "21.6 M parameters, 3.6 GMAC", BasicBlock, (3, 4, 6, 3), shortcut="none")

#: torchvision's networks, by name.
BUILDERS: dict[str, Builder] = {
    build.__name__: build
    for build in (
        resnet18,
        resnet34,
        resnet50,
        resnet101,
        resnet152,
        wide_resnet50_2,
        wide_resnet101_2,
        resnext50_32x4d,
        resnext101_32x8d,
        resnext101_64x4d,
    )
}


def cifar_resnet(
    depth: int,
    num_classes: int | None = None,
    in_channels: int | None = None,
    *,
    weights: Weights = None,
    shortcut: str | None = None,
) -> CifarResNet:
    """A CIFAR ResNet of ``depth`` = 6n+2 layers, converted.

    What is None follows ``weights``, of this package or of another repository: see
    :mod:`resnet_triton.checkpoints`.

    Args:
        depth: 20, 32, 44, 56, 110, 1202, ...
        num_classes: outputs of ``fc``; None without ``weights`` is 10.
        in_channels: channels of the images; None without ``weights`` is 3.
        weights: None for random ones, a state_dict, or the path of a file.
        shortcut: see :class:`CifarResNet`; None without ``weights`` is the paper's option A.

    Raises:
        ValueError: for another depth or shortcut; for arguments that contradict ``weights``.
        ValueError, FileNotFoundError: for ``weights`` that cannot be loaded, see
            :mod:`resnet_triton.weights`.
    """
    if weights is not None:
        from ..checkpoints import cifar_arguments
        from ..weights import inspect, named_weights

        named_weights(None, weights)  # refuses names, of which torchvision has none here
        network = cifar_arguments(inspect(weights), depth, num_classes, in_channels, shortcut)
        num_classes, in_channels, shortcut = network.num_classes, network.in_channels, network.shortcut
    classes, channels = (10 if num_classes is None else num_classes), (3 if in_channels is None else in_channels)
    return finish(CifarResNet(depth, classes, channels, shortcut=shortcut or "A"), weights)


def cifar_plain(
    depth: int, num_classes: int | None = None, in_channels: int | None = None, *, weights: Weights = None
) -> CifarResNet:
    """The plain network with the convolutions of :func:`cifar_resnet`, converted; arguments as there."""
    return cifar_resnet(depth, num_classes, in_channels, weights=weights, shortcut="none")


def mnist5k_resnet20() -> CifarResNet:
    """The CIFAR ResNet-20 shipped with this package, converted, in eval mode.

    ``bench/train_mnist5k.py`` trained it on 4000 real MNIST images; the file's metadata has its accuracy.
    Input: ``[N, 1, 28, 28]`` grey images with ink 1 on 0, minus 0.1307, divided by 0.3081.
    """
    path = Path(__file__).parents[1] / "data" / "cifar_resnet20_mnist5k.safetensors"
    return cifar_resnet(20, in_channels=1, weights=path, shortcut="B").eval()


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    layers: tuple[int, int, int, int],
    weights: Weights,
    progress: bool,
    kwargs: dict[str, Any],
) -> ResNet:
    from ..weights import ENUMS, named_weights

    shape = (block is Bottleneck, layers, kwargs.get("groups", 1), kwargs.get("width_per_group", 64))
    own = any(kwargs.get(name, default) != default for name, default in PAPERS.items())
    named = named_weights(None if own else ENUMS.get(shape), weights)
    if named is not None:
        weights = named
        classes = len(named.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(
                f"The parameter 'num_classes' expected value {classes} but got {kwargs['num_classes']} "
                f"instead: weights={named!r} has {classes} classes. Leave num_classes out, and replace "
                "model.fc afterwards."
            )
    return finish(ResNet(block, layers, **kwargs), weights, progress)


def finish(model: Any, weights: Weights, progress: bool = True) -> Any:
    from ..convert import convert
    from ..weights import load_weights

    load_weights(model, weights, progress=progress)
    return convert(model, inplace=True)

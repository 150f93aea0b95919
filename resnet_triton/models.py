"""Residual networks in plain PyTorch, and builders that return them converted.

Two families, from "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385): the
ImageNet networks of table 1 (:class:`ResNet`, 18 to 152 layers) and the CIFAR networks of section 4.2
(:class:`CifarResNet`, 6n+2 layers)::

    stage         stem                layer1  layer2    layer3    layer4    head
    ResNet        7x7/2, max-pool/2   64      128, /2   256, /2   512, /2   mean, fc
    CifarResNet   3x3                 16      32, /2    64, /2    -         mean, fc

Attribute names, child order, state_dict keys, constructor arguments and the order of random draws are
torchvision's: a checkpoint or a seed gives the same model here and there. The forwards below are ordinary
eager operations; :func:`resnet_triton.convert` replaces what a block runs, never what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "ResNet",
    "cifar_resnet",
    "mnist5k_resnet20",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

#: What ``weights=`` of a builder accepts; see :func:`resnet_triton.weights.load_weights`. ``Any`` stands for
#: a member of a torchvision weights enum, which cannot be named without importing torchvision.
Weights = str | PathLike[str] | Mapping[str, Any] | Any | None


def _conv3x3(channels: int, filters: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def _conv1x1(channels: int, filters: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, 1, stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)``.

    Args:
        inplanes: channels of the input.
        planes: filters of both convolutions, and channels of the output.
        stride: of ``conv1``.
        downsample: projection shortcut; None is the identity.
        groups, base_width, dilation: as in :class:`Bottleneck`; only 1, 64 and 1 are possible here.
        norm_layer: normalisation, called with a number of channels; None is ``nn.BatchNorm2d``.

    Raises:
        ValueError: for ``groups`` other than 1 or ``base_width`` other than 64.
        NotImplementedError: for ``dilation`` above 1.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock only supports groups=1 and base_width=64, got groups={groups} and "
                f"base_width={base_width}. Use Bottleneck for grouped or wide blocks."
            )
        if dilation > 1:
            raise NotImplementedError(
                f"BasicBlock only supports dilation=1, got dilation={dilation}. Use Bottleneck for dilated stages."
            )
        norm_layer = norm_layer or nn.BatchNorm2d
        self.conv1 = _conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = _conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inplanes, H, W]`` to ``[N, planes, H / stride, W / stride]``."""
        t = self.relu(self.bn1(self.conv1(x)))
        t = self.bn2(self.conv2(t))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        t += shortcut
        return self.relu(t)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand by 4, and a shortcut.

    The stride sits on the 3x3 (``conv2``). The paper's own models (KaimingHe/deep-residual-networks, the
    Caffe prototxt: ``res3a_branch2a`` has ``stride: 2``) put it on the first 1x1, which throws three quarters
    of the block's input away unread. Moving it to the 3x3 came with fb.resnet.torch; torchvision, timm and
    NVIDIA's "ResNet-50 v1.5" do the same, for 6 % more multiply-adds and about half a point of top-1 accuracy
    (https://catalog.ngc.nvidia.com/orgs/nvidia/resources/resnet_50_v1_5_for_pytorch). State_dict keys and
    shapes do not tell the two apart: v1 weights load here without an error and give wrong logits.

    Args:
        inplanes: channels of the input.
        planes: quarter of the channels of the output.
        stride: of ``conv2``.
        downsample: projection shortcut; None is the identity.
        groups: of ``conv2`` (ResNeXt).
        base_width: filters of ``conv1`` and ``conv2`` per group when ``planes`` is 64.
        dilation: of ``conv2``.
        norm_layer: normalisation, called with a number of channels; None is ``nn.BatchNorm2d``.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        outplanes = planes * self.expansion
        self.conv1 = _conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = _conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = _conv1x1(width, outplanes)
        self.bn3 = norm_layer(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inplanes, H, W]`` to ``[N, 4 * planes, H / stride, W / stride]``."""
        t = self.relu(self.bn1(self.conv1(x)))
        t = self.relu(self.bn2(self.conv2(t)))
        t = self.bn3(self.conv3(t))
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x)
        t += shortcut
        return self.relu(t)


class ResNet(nn.Module):
    """An ImageNet ResNet, constructed and initialised as torchvision's.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: blocks of the four stages.
        num_classes: outputs of ``fc``.
        zero_init_residual: start the last BN of each block at gamma = 0, so that each block starts as its
            shortcut (https://arxiv.org/abs/1706.02677, section 5.1).
        groups, width_per_group: of every block (ResNeXt, wide ResNet); :class:`Bottleneck` only.
        replace_stride_with_dilation: for the last three stages, whether to keep the resolution and dilate
            instead; None is three times False.
        norm_layer: normalisation, called with a number of channels; None is ``nn.BatchNorm2d``.

    Raises:
        ValueError: for a ``replace_stride_with_dilation`` of another length than 3, and as the block does.
        NotImplementedError: for a dilated :class:`BasicBlock`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: Sequence[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        dilate = [False] * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None or a 3-element tuple (one bool each for layer2, "
                f"layer3 and layer4), got {replace_stride_with_dilation}"
            )
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self, zero_init_residual)

    def _make_layer(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        # The first block, the one that would have strided, still convolves at the old dilation.
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        outplanes = planes * block.expansion
        shared = (self.groups, self.base_width)
        downsample = None
        if stride != 1 or self.inplanes != outplanes:
            # Made before the block: the order of random draws decides which weights a seed gives.
            downsample = nn.Sequential(_conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))
        stage = [block(self.inplanes, planes, stride, downsample, *shared, first_dilation, self._norm_layer)]
        self.inplanes = outplanes
        for _ in range(1, blocks):
            stage.append(block(outplanes, planes, 1, None, *shared, self.dilation, self._norm_layer))
        return nn.Sequential(*stage)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]``, normalised, to logits ``[N, num_classes]``."""
        return self._forward_impl(x)


class CifarResNet(nn.Module):
    """A ResNet for small images: a 3x3 stem without pooling and three stages of basic blocks.

    Where the width changes the shortcut is a 1x1 projection with BN (option B of the paper, which itself uses
    option A, zero padding, for these networks): depth 20 has 272,474 parameters for 10 classes instead of
    269,722.

    Args:
        depth: weighted layers on the main path, 6n+2 with n >= 1 (20, 32, 44, 56, 110, ...).
        num_classes: outputs of ``fc``.
        in_channels: channels of the images.

    Raises:
        ValueError: for a depth that is not 6n+2.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n+2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...), got {depth!r}")
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(16, 16, blocks, 1)
        self.layer2 = self._make_layer(16, 32, blocks, 2)
        self.layer3 = self._make_layer(32, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        _initialise(self, zero_init_residual=False)

    @staticmethod
    def _make_layer(inplanes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        downsample = None
        if inplanes != planes:
            downsample = nn.Sequential(_conv1x1(inplanes, planes, stride), nn.BatchNorm2d(planes))
        first = BasicBlock(inplanes, planes, stride, downsample)
        return nn.Sequential(first, *(BasicBlock(planes, planes) for _ in range(1, blocks)))

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]``, normalised, to logits ``[N, num_classes]``."""
        return self._forward_impl(x)


def _initialise(model: nn.Module, zero_init_residual: bool) -> None:
    """He initialisation by fan-out for convolutions, gamma = 1 and beta = 0; ``fc`` keeps PyTorch's own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    if zero_init_residual:
        for module in model.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                gamma = module.bn3.weight if isinstance(module, Bottleneck) else module.bn2.weight
                if isinstance(gamma, Tensor):  # None in a norm_layer without affine parameters
                    nn.init.zeros_(gamma)


class Builder(Protocol):
    """A function that builds one converted network; arguments as :func:`resnet18`."""

    __name__: str

    def __call__(self, *, weights: Weights = None, progress: bool = True, **kwargs: Any) -> ResNet: ...


def _builder(
    name: str, size: str, block: type[BasicBlock] | type[Bottleneck], layers: tuple[int, int, int, int], **fixed: int
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

#: The ImageNet networks, by name.
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


def cifar_resnet(depth: int, num_classes: int = 10, in_channels: int = 3, *, weights: Weights = None) -> CifarResNet:
    """A CIFAR ResNet of ``depth`` = 6n+2 layers, converted; ``weights`` is None, a state_dict or a path.

    Raises:
        ValueError: for another depth.
        ValueError, FileNotFoundError: for ``weights`` that cannot be loaded, see
            :mod:`resnet_triton.weights`.
    """
    model = CifarResNet(depth, num_classes, in_channels)
    return _finish(model, weights)


def mnist5k_resnet20() -> CifarResNet:
    """The CIFAR ResNet-20 shipped with this package, converted, in eval mode.

    ``bench/train_mnist5k.py`` trained it on 4000 real MNIST images; the file's metadata has its accuracy.
    Input: ``[N, 1, 28, 28]`` grey images with ink 1 on 0, minus 0.1307, divided by 0.3081.
    """
    path = Path(__file__).parent / "data" / "cifar_resnet20_mnist5k.safetensors"
    return cifar_resnet(20, in_channels=1, weights=path).eval()


def _resnet(
    block: type[BasicBlock] | type[Bottleneck],
    layers: tuple[int, int, int, int],
    weights: Weights,
    progress: bool,
    kwargs: dict[str, Any],
) -> ResNet:
    from .weights import ENUMS, named_weights

    shape = (block is Bottleneck, layers, kwargs.get("groups", 1), kwargs.get("width_per_group", 64))
    named = named_weights(ENUMS.get(shape), weights)
    if named is not None:
        weights = named
        classes = len(named.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(
                f"The parameter 'num_classes' expected value {classes} but got {kwargs['num_classes']} "
                f"instead: weights={named!r} has {classes} classes. Leave num_classes out, and replace "
                "model.fc afterwards."
            )
    return _finish(ResNet(block, layers, **kwargs), weights, progress)


def _finish(model: Any, weights: Weights, progress: bool = True) -> Any:
    from .convert import convert
    from .weights import load_weights

    load_weights(model, weights, progress=progress)
    return convert(model, inplace=True)

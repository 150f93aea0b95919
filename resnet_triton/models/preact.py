"""Pre-activation networks, from "Identity Mappings in Deep Residual Networks" (https://arxiv.org/abs/1603.05027).

BN and ReLU come before each convolution instead of behind it, and nothing follows the addition: from the first block to
the last the shortcuts carry one sum, ``x + branch(x)``. What that leaves to decide is where a network's first and last
activation sit, and what a shortcut reads that changes dimensions. Here, as in the authors' own code: the BN and ReLU in
front of a block that changes dimensions, or that is a CIFAR network's first, feed branch and shortcut (``"both"``); a
projection has no BN; the ImageNet stem keeps its BN, ReLU and max-pool, so that its first block has none in front
(``"none"``); and a last BN and ReLU come before the average pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import ZeroPad, conv1x1, conv3x3, initialise

#: What the BN and ReLU in front of a block feed.
PREACT = ("branch", "both", "none")


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions, each behind BN and ReLU, and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: filters of both convolutions, and channels of the output.
        stride: of ``conv1``.
        downsample: shortcut; None is the identity.
        preact: what ``bn1`` and its ReLU feed: ``"branch"``, ``"both"`` (branch and shortcut), or ``"none"`` (there is
            no ``bn1``: the input is an activation already).

    Raises:
        ValueError: for another ``preact``.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        preact: str = "branch",
    ) -> None:
        super().__init__()
        self.preact = _checked(preact)
        self.bn1 = None if preact == "none" else nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inplanes, H, W]`` to ``[N, planes, H / stride, W / stride]``."""
        h = x
        if self.bn1 is not None:
            h = self.relu(self.bn1(x))
        shortcut = h if self.preact == "both" else x
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        t = self.conv1(h)
        t = self.conv2(self.relu(self.bn2(t)))
        return t + shortcut


class PreActBottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand by 4, each behind BN and ReLU, and a shortcut.

    Args:
        inplanes: channels of the input.
        planes: quarter of the channels of the output.
        stride: of ``conv2``, or of ``conv1`` with ``stride_in_1x1``.
        downsample, preact: as in :class:`PreActBasicBlock`.
        stride_in_1x1: the stride sits on the first 1x1.

    Raises:
        ValueError: for another ``preact``.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        preact: str = "branch",
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        self.preact = _checked(preact)
        self.bn1 = None if preact == "none" else nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv1x1(inplanes, planes, stride if stride_in_1x1 else 1)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, 1 if stride_in_1x1 else stride)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inplanes, H, W]`` to ``[N, 4 * planes, H / stride, W / stride]``."""
        h = x
        if self.bn1 is not None:
            h = self.relu(self.bn1(x))
        shortcut = h if self.preact == "both" else x
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        t = self.conv1(h)
        t = self.conv2(self.relu(self.bn2(t)))
        t = self.conv3(self.relu(self.bn3(t)))
        return t + shortcut


def _projection(channels: int, filters: int, stride: int) -> nn.Sequential:
    """A 1x1 projection without BN; Identity stands where the one of :class:`ResNet` has its BN."""
    return nn.Sequential(conv1x1(channels, filters, stride), nn.Identity())


def _checked(preact: str) -> str:
    if preact not in PREACT:
        raise ValueError(f"preact must be one of {', '.join(map(repr, PREACT))}, got {preact!r}")
    return preact


class PreActCifarResNet(nn.Module):
    """A pre-activation network for small images: a 3x3 convolution, three stages, a last BN and ReLU, and the head.

    Args:
        depth: weighted layers on the main path: 6n+2 of basic blocks, 9n+2 of bottlenecks (164, 1001).
        num_classes: outputs of ``fc``.
        in_channels: channels of the images.
        bottleneck: which blocks; None is basic ones below 164 layers where the depth is 6n+2, else bottlenecks. Basic
            blocks change dimensions by option A (zeros behind the channels), bottlenecks by projections, with the
            stride in the first 1x1.

    Raises:
        ValueError: for a depth that is neither, or not of the blocks that were asked for.
    """

    def __init__(
        self, depth: int, num_classes: int = 10, in_channels: int = 3, *, bottleneck: bool | None = None
    ) -> None:
        super().__init__()
        bottleneck = _has_bottlenecks(depth, bottleneck)
        self.inplanes = 16
        self.conv1 = conv3x3(in_channels, 16)
        blocks = (depth - 2) // (9 if bottleneck else 6)
        self.layer1 = self._make_layer(16, blocks, 1, bottleneck)
        self.layer2 = self._make_layer(32, blocks, 2, bottleneck)
        self.layer3 = self._make_layer(64, blocks, 2, bottleneck)
        self.bn = nn.BatchNorm2d(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        initialise(self, zero_init_residual=False)

    def _make_layer(self, planes: int, blocks: int, stride: int, bottleneck: bool) -> nn.Sequential:
        inplanes, outplanes = self.inplanes, planes * (4 if bottleneck else 1)
        self.inplanes = outplanes
        stage: list[nn.Module] = []
        for i in range(blocks):
            stride, preact = (stride, "both") if i == 0 else (1, "branch")
            downsample: nn.Module | None = None
            if inplanes != outplanes:
                change = _projection if bottleneck else ZeroPad
                downsample = change(inplanes, outplanes, stride)
            if bottleneck:
                stage.append(PreActBottleneck(inplanes, planes, stride, downsample, preact, stride_in_1x1=True))
            else:
                stage.append(PreActBasicBlock(inplanes, planes, stride, downsample, preact))
            inplanes = outplanes
        return nn.Sequential(*stage)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.relu(self.bn(x))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, in_channels, H, W]``, normalised, to logits ``[N, num_classes]``."""
        return self._forward_impl(x)


def _has_bottlenecks(depth: int, bottleneck: bool | None) -> bool:
    """Whether a CIFAR network of ``depth`` layers has bottlenecks; raises ValueError where no blocks fit."""
    whole = isinstance(depth, int) and not isinstance(depth, bool)
    basic_fits = whole and depth >= 8 and depth % 6 == 2
    bottleneck_fits = whole and depth >= 11 and depth % 9 == 2
    if bottleneck is None:
        bottleneck = bottleneck_fits and (depth >= 164 or not basic_fits)
    if not (bottleneck_fits if bottleneck else basic_fits):
        raise ValueError(
            f"depth must be 6n+2 for basic blocks (20, 32, 44, 56, 110, ...) or 9n+2 for bottlenecks (29, 164, 1001, "
            f"...), got {depth!r} with bottleneck={bottleneck}; bottleneck=None takes the blocks that fit"
        )
    return bottleneck


class PreActResNet(nn.Module):
    """A pre-activation ImageNet network: the stem of :class:`ResNet`, four stages, a last BN and ReLU, and the head.

    Args:
        block: :class:`PreActBasicBlock` or :class:`PreActBottleneck`.
        layers: blocks of the four stages.
        num_classes: outputs of ``fc``.
        stride_in_1x1: bottlenecks that halve the image do so in their first 1x1 instead of the 3x3.

    Raises:
        ValueError: ``stride_in_1x1`` of basic blocks, which have no 1x1.
    """

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        if stride_in_1x1 and not issubclass(block, PreActBottleneck):
            raise ValueError(f"stride_in_1x1=True needs PreActBottleneck, got {block.__name__}, which has no 1x1")
        self.inplanes = 64
        self.stride_in_1x1 = stride_in_1x1
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0], 1, "none")
        self.layer2 = self._make_layer(block, 128, layers[1], 2, "both")
        self.layer3 = self._make_layer(block, 256, layers[2], 2, "both")
        self.layer4 = self._make_layer(block, 512, layers[3], 2, "both")
        self.bn = nn.BatchNorm2d(self.inplanes)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(self.inplanes, num_classes)
        initialise(self, zero_init_residual=False)

    def _make_layer(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        planes: int,
        blocks: int,
        stride: int,
        first: str,
    ) -> nn.Sequential:
        inplanes, outplanes = self.inplanes, planes * block.expansion
        self.inplanes = outplanes
        make: Any = block
        if self.stride_in_1x1:
            make = partial(make, stride_in_1x1=True)
        downsample = None
        if stride != 1 or inplanes != outplanes:
            downsample = _projection(inplanes, outplanes, stride)
        stage = [make(inplanes, planes, stride, downsample, first)]
        stage += [make(outplanes, planes) for _ in range(1, blocks)]
        return nn.Sequential(*stage)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)
        x = self.relu(self.bn(x))
        x = torch.flatten(self.avgpool(x), 1)
        return self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, 3, H, W]``, normalised, to logits ``[N, num_classes]``."""
        return self._forward_impl(x)


#: Blocks of the four stages of the ImageNet networks, by depth.
LAYERS = {
    18: (PreActBasicBlock, (2, 2, 2, 2)),
    34: (PreActBasicBlock, (3, 4, 6, 3)),
    50: (PreActBottleneck, (3, 4, 6, 3)),
    101: (PreActBottleneck, (3, 4, 23, 3)),
    152: (PreActBottleneck, (3, 8, 36, 3)),
    200: (PreActBottleneck, (3, 24, 36, 3)),
}


def preact_resnet(depth: int, *, weights: Any = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """A pre-activation ImageNet network, converted.

    Args:
        depth: 18, 34, 50, 101, 152 or 200.
        weights: None for random ones, a state_dict, or the path of a ``.pth``, ``.pt`` or ``.safetensors`` file.
        progress: has no effect: nothing is downloaded.
        **kwargs: arguments of :class:`PreActResNet`.

    Raises:
        ValueError: for another depth.
        ValueError, FileNotFoundError: for ``weights`` that cannot be loaded, see :mod:`resnet_triton.weights`.
    """
    if depth not in LAYERS:
        raise ValueError(f"depth must be one of {', '.join(map(str, LAYERS))}, got {depth!r}")
    from .builders import finish

    block, layers = LAYERS[depth]
    return finish(PreActResNet(block, layers, **kwargs), weights, progress)


def preact_resnet200(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> PreActResNet:
    """``preact_resnet200``, converted: 64.7 M parameters, 15.0 GMAC at 224 px; arguments of :func:`preact_resnet`."""
    return preact_resnet(200, weights=weights, progress=progress, **kwargs)


def preact_cifar_resnet(
    depth: int,
    num_classes: int = 10,
    in_channels: int = 3,
    *,
    weights: Any = None,
    bottleneck: bool | None = None,
) -> PreActCifarResNet:
    """A pre-activation CIFAR network, converted; ``weights`` is None, a state_dict or a path.

    Args:
        depth, num_classes, in_channels, bottleneck: of :class:`PreActCifarResNet`.
        weights: None for random ones, a state_dict, or the path of a file.

    Raises:
        ValueError: for another depth.
        ValueError, FileNotFoundError: for ``weights`` that cannot be loaded, see :mod:`resnet_triton.weights`.
    """
    from .builders import finish

    return finish(PreActCifarResNet(depth, num_classes, in_channels, bottleneck=bottleneck), weights)

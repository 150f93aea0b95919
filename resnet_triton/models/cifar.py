"""The CIFAR networks of the paper (section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import BasicBlock, PlainBlock, conv3x3, initialise, make_shortcut


class CifarResNet(nn.Module):
    """A ResNet for small images: a 3x3 stem without pooling and three stages of basic blocks.

    Args:
        depth: weighted layers on the main path, 6n+2 with n >= 1 (20, 32, 44, 56, 110, ...).
        num_classes: outputs of ``fc``.
        in_channels: channels of the images.
        shortcut: see :func:`.blocks.make_shortcut`. The paper's is ``"A"``, without parameters; ``"none"`` is the plain
            network.

    Raises:
        ValueError: for a depth that is not 6n+2, or another ``shortcut``.
    """

    def __init__(self, depth: int, num_classes: int = 10, in_channels: int = 3, *, shortcut: str = "A") -> None:
        super().__init__()
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n+2 with n >= 1 (8, 14, 20, 32, 44, 56, 110, ...), got {depth!r}")
        blocks = (depth - 2) // 6
        self.shortcut = shortcut
        self.inplanes = 16
        self.conv1 = conv3x3(in_channels, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(16, blocks, 1)
        self.layer2 = self._make_layer(32, blocks, 2)
        self.layer3 = self._make_layer(64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        initialise(self, zero_init_residual=False)

    def _make_layer(self, planes: int, blocks: int, stride: int) -> nn.Sequential:
        block = PlainBlock if self.shortcut == "none" else BasicBlock
        stage: list[nn.Module] = []
        for step in (stride, *[1] * (blocks - 1)):
            downsample = make_shortcut(self.shortcut, self.inplanes, planes, step)
            stage.append(block(self.inplanes, planes, step, downsample))
            self.inplanes = planes
        return nn.Sequential(*stage)

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

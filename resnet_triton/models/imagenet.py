"""The ImageNet networks of the paper (table 1), as torchvision builds them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .blocks import BasicBlock, Bottleneck, conv1x1, initialise


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
        initialise(self, zero_init_residual)

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
            downsample = nn.Sequential(conv1x1(self.inplanes, outplanes, stride), self._norm_layer(outplanes))
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

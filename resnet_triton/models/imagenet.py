"""The ImageNet networks of the paper (table 1), as torchvision builds them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BasicBlock, Bottleneck, PlainBlock, initialise, make_shortcut

#: Arguments that torchvision's networks do not have, and their values there.
PAPERS = {"shortcut": "B", "stride_in_1x1": False, "caffe_pool": False, "conv1_bias": False}


class ResNet(nn.Module):
    """An ImageNet ResNet, constructed and initialised as torchvision's; the keyword-only arguments are the paper's.

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
        shortcut: see :func:`.blocks.make_shortcut`; ``"none"`` is the plain network.
        stride_in_1x1: see :class:`Bottleneck`.
        caffe_pool: pool behind the stem as Caffe does, without padding and with the last window cut off: windows start
            at even pixels instead of odd ones.
        conv1_bias: give ``conv1`` a bias, as the ResNet-50 of the paper's authors has.

    Raises:
        ValueError: for a ``replace_stride_with_dilation`` of another length than 3; for another ``shortcut``; for a
            plain network of bottlenecks or with ``zero_init_residual``; for ``stride_in_1x1`` of basic blocks; and as
            the block does.
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
        *,
        shortcut: str = "B",
        stride_in_1x1: bool = False,
        caffe_pool: bool = False,
        conv1_bias: bool = False,
    ) -> None:
        super().__init__()
        make: Any = block
        if shortcut == "none":
            if block is not BasicBlock or zero_init_residual:
                raise ValueError(
                    "shortcut='none' is a plain network, which has BasicBlock's convolutions and no residual branch "
                    f"to start at zero; got {block.__name__} and zero_init_residual={zero_init_residual}"
                )
            make = PlainBlock
        if stride_in_1x1:
            if not issubclass(block, Bottleneck):
                raise ValueError(f"stride_in_1x1=True needs Bottleneck, which has a 1x1 first; got {block.__name__}")
            make = functools.partial(block, stride_in_1x1=True)
        dilate = [False] * 3 if replace_stride_with_dilation is None else replace_stride_with_dilation
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation should be None or a 3-element tuple (one bool each for layer2, "
                f"layer3 and layer4), got {replace_stride_with_dilation}"
            )
        self.shortcut = shortcut
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.is_torchvisions = (shortcut, stride_in_1x1, caffe_pool, conv1_bias) == tuple(PAPERS.values())
        self.inplanes = 64
        self.dilation = 1
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=conv1_bias)
        self.bn1 = self._norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=0 if caffe_pool else 1, ceil_mode=caffe_pool)
        self.layer1 = self._make_layer(make, 64 * block.expansion, 64, layers[0], 1, False)
        self.layer2 = self._make_layer(make, 128 * block.expansion, 128, layers[1], 2, dilate[0])
        self.layer3 = self._make_layer(make, 256 * block.expansion, 256, layers[2], 2, dilate[1])
        self.layer4 = self._make_layer(make, 512 * block.expansion, 512, layers[3], 2, dilate[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        initialise(self, zero_init_residual)

    def _make_layer(
        self, make: Any, outplanes: int, planes: int, blocks: int, stride: int, dilate: bool
    ) -> nn.Sequential:
        # The first block, the one that would have strided, still convolves at the old dilation.
        dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        stage = []
        for _ in range(blocks):
            # Made before the block: the order of random draws decides which weights a seed gives.
            downsample = make_shortcut(self.shortcut, self.inplanes, outplanes, stride, self._norm_layer)
            norm = self._norm_layer
            stage.append(make(self.inplanes, planes, stride, downsample, self.groups, self.base_width, dilation, norm))
            self.inplanes, stride, dilation = outplanes, 1, self.dilation
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

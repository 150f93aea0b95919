"""Residual and plain blocks, their shortcuts, and what else every network here is built of."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

#: What ``shortcut=`` of a network accepts: the options of the paper's section 3.3 and 4.1.
SHORTCUTS = ("A", "A-both", "B", "C", "none")


def conv3x3(channels: int, filters: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size at stride 1."""
    return nn.Conv2d(channels, filters, 3, stride, padding=dilation, dilation=dilation, groups=groups, bias=False)


def conv1x1(channels: int, filters: int, stride: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias."""
    return nn.Conv2d(channels, filters, 1, stride, bias=False)


class ZeroPad(nn.Module):
    """Shortcut without parameters (option A): every ``stride``-th pixel, and zeros for the channels that are missing.

    Args:
        channels: of the input.
        filters: channels of the output.
        stride: of the pixels that are kept.
        both: half of the zeros before the channels and half behind, instead of all behind.
    """

    def __init__(self, channels: int, filters: int, stride: int = 1, both: bool = False) -> None:
        super().__init__()
        self.channels, self.filters, self.stride, self.both = channels, filters, stride, both

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, filters, H / stride, W / stride]``."""
        before = (self.filters - self.channels) // 2 if self.both else 0
        behind = self.filters - self.channels - before
        pixels = x.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride]  # so that the result is channels_last
        return F.pad(pixels, (before, behind)).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Sizes for ``print``."""
        return f"{self.channels}, {self.filters}, stride={self.stride}" + ", both=True" * self.both


def make_shortcut(
    option: str, channels: int, filters: int, stride: int, norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d
) -> nn.Module | None:
    """The shortcut of one block.

    Args:
        option: ``"A"``: zeros behind the channels (fb.resnet.torch); ``"A-both"``: half of them on each side (the
            common CIFAR checkpoints); ``"B"``: a 1x1 projection with BN where the sizes change; ``"C"``: everywhere;
            ``"none"``: there is none.
        channels, filters: of the block's input and output.
        stride: of the block.
        norm_layer: behind a projection.

    Returns:
        The module, or None for the identity and for ``"none"``.

    Raises:
        ValueError: for another option.
    """
    if option not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(map(repr, SHORTCUTS))}, got {option!r}")
    same = stride == 1 and channels == filters
    if option == "none" or (same and option != "C"):
        return None
    if option in ("B", "C"):
        return nn.Sequential(conv1x1(channels, filters, stride), norm_layer(filters))
    return ZeroPad(channels, filters, stride, both=option == "A-both")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut)``.

    Args:
        inplanes: channels of the input.
        planes: filters of both convolutions, and channels of the output.
        stride: of ``conv1``.
        downsample: shortcut; None is the identity.
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
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
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


class PlainBlock(BasicBlock):
    """A :class:`BasicBlock` without its shortcut, for the plain networks that the paper compares with."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inplanes, H, W]`` to ``[N, planes, H / stride, W / stride]``."""
        t = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(t)))


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3, 1x1 expand by 4, and a shortcut.

    The stride sits on the 3x3 (``conv2``), unless ``stride_in_1x1``: the paper's own models
    (KaimingHe/deep-residual-networks, the Caffe prototxt: ``res3a_branch2a`` has ``stride: 2``) put it on the first
    1x1, which throws three quarters of the block's input away unread. Moving it to the 3x3 came with fb.resnet.torch;
    torchvision, timm and NVIDIA's "ResNet-50 v1.5" do the same, for 6 % more multiply-adds and about half a point of
    top-1 accuracy (https://catalog.ngc.nvidia.com/orgs/nvidia/resources/resnet_50_v1_5_for_pytorch). State_dict keys
    and shapes do not tell the two apart: v1 weights load in a v1.5 network without an error and give wrong logits.

    Args:
        inplanes: channels of the input.
        planes: quarter of the channels of the output.
        stride: of ``conv2``, or of ``conv1``.
        downsample: shortcut; None is the identity.
        groups: of ``conv2`` (ResNeXt).
        base_width: filters of ``conv1`` and ``conv2`` per group when ``planes`` is 64.
        dilation: of ``conv2``.
        norm_layer: normalisation, called with a number of channels; None is ``nn.BatchNorm2d``.
        stride_in_1x1: put the stride on ``conv1``.
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
        *,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        outplanes = planes * self.expansion
        self.conv1 = conv1x1(inplanes, width, stride if stride_in_1x1 else 1)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, 1 if stride_in_1x1 else stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, outplanes)
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


def initialise(model: nn.Module, zero_init_residual: bool) -> None:
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

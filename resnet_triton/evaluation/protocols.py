"""Test protocols: which views of an image are tested, and how a network scores them.

=======  ==========================================================================================================
1-crop   shorter side resized to 256, the centre of 224
10-crop  the centre and the four corners of that image, and their mirror images
dense    whole images with shorter sides 224, 256, 384, 480 and 640, and their mirror images; the global average pool
         slides as a 7x7 window over the last feature map, and the classifier is a 1x1 convolution behind it
plain    the image as it is
=======  ==========================================================================================================

A view gives one score a class. A score is a softmax, or a logit where asked; scores of the windows of a view are
averaged, then those of an image's views, then those of an ensemble's networks, each with equal weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import tensors_of

#: What a score is.
AVERAGES = ("softmax", "logits")


class Procedure(Protocol):
    """What :func:`.evaluate.evaluate` needs of a protocol."""

    @property
    def name(self) -> str:
        """As ``--protocol`` has it."""

    @property
    def count(self) -> int:
        """Views of an image."""

    @property
    def size(self) -> int | None:
        """Height and width of a view in pixels, or of what takes as much memory; None where images have one size."""

    def views(self, image: Any) -> list[Tensor]:
        """Views of one image, ``[V, C, H, W]`` of each size."""

    def scorer(self, model: nn.Module) -> nn.Module:
        """The network as it scores views: ``[N, classes]``, or ``[N, classes, P, Q]`` of P x Q windows."""


@dataclass(frozen=True)
class Plain:
    """Images as they are: what is small is tested whole."""

    name = "plain"
    count = 1
    size = None

    def views(self, image: Tensor) -> list[Tensor]:
        """A tensor ``[C, H, W]`` as one view."""
        if not isinstance(image, Tensor):
            raise ValueError(
                f"protocol plain takes tensors, got {type(image).__name__}; choose 1-crop, 10-crop or dense"
            )
        return [image.unsqueeze(0)]

    def scorer(self, model: nn.Module) -> nn.Module:
        """The network itself."""
        return model

    def __str__(self) -> str:
        return "one view, the image as it is"


@dataclass(frozen=True)
class _Crops:
    """Crops of one size.

    Args:
        size: height and width of a crop in pixels.
        resize: the shorter side of the image that it is cut from.

    Raises:
        ValueError: for a crop that is larger than the image.
    """

    size: int = 224
    resize: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.size <= self.resize:
            raise ValueError(
                f"a crop of {self.size} pixels is not in an image whose shorter side is resized to {self.resize}"
            )

    def scorer(self, model: nn.Module) -> nn.Module:
        """The network itself."""
        return model


@dataclass(frozen=True)
class OneCrop(_Crops):
    """The centre. See :class:`_Crops` for the arguments: 256 and 224 pixels; the follow-up paper has 320 and 320."""

    name = "1-crop"
    count = 1

    def views(self, image: Any) -> list[Tensor]:
        """uint8 ``[1, 3, size, size]`` of a PIL image."""
        from torchvision.transforms import functional

        return [_stack([functional.center_crop(_resized(image, self.resize), [self.size])])]

    def __str__(self) -> str:
        return f"shorter side {self.resize}, centre crop of {self.size}"


@dataclass(frozen=True)
class TenCrop(_Crops):
    """The four corners, the centre, and their mirror images. Arguments as of :class:`OneCrop`."""

    name = "10-crop"
    count = 10

    def views(self, image: Any) -> list[Tensor]:
        """uint8 ``[10, 3, size, size]`` of a PIL image: corners, centre, the same mirrored."""
        from torchvision.transforms import functional

        crops = functional.five_crop(_resized(image, self.resize), [self.size])
        return [_stack([*crops, *map(functional.hflip, crops)])]

    def __str__(self) -> str:
        return f"shorter side {self.resize}, centre and four corners of {self.size}, and their mirror images"


@dataclass(frozen=True)
class Dense:
    """Whole images at several scales, and their mirror images, through a fully convolutional network.

    Args:
        scales: shorter sides in pixels.
        size: of the crops that the network knows: its feature map of such a crop is the window that the classifier
            sees, 7x7 of 224 pixels in an ImageNet ResNet.

    Raises:
        ValueError: no scale, or one below ``size``.
    """

    scales: tuple[int, ...] = (224, 256, 384, 480, 640)
    size: int = 224
    name = "dense"

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) < self.size or self.size < 1:
            raise ValueError(f"dense takes scales of at least size={self.size} pixels, got {self.scales}")

    @property
    def count(self) -> int:
        """Views of an image."""
        return 2 * len(self.scales)

    def views(self, image: Any) -> list[Tensor]:
        """uint8 ``[2, 3, H, W]`` of a PIL image for each scale: it, and its mirror image."""
        from torchvision.transforms import functional

        resized = [_resized(image, scale) for scale in self.scales]
        return [_stack([view, functional.hflip(view)]) for view in resized]

    def scorer(self, model: nn.Module) -> nn.Module:
        """The fully convolutional form."""
        return FullyConvolutional(model, self.size)

    def __str__(self) -> str:
        scales = ", ".join(map(str, self.scales))
        return f"fully convolutional, shorter sides {scales}, and their mirror images, all positions"


def _resized(image: Any, shorter: int) -> Any:
    """An RGB image whose shorter side has so many pixels, as torchvision's ``Resize`` gives it."""
    from torchvision.transforms import functional

    return functional.resize(image.convert("RGB"), [shorter])


def _stack(images: Sequence[Any]) -> Tensor:
    from torchvision.transforms import functional

    return torch.stack([functional.pil_to_tensor(image) for image in images])


class FullyConvolutional(nn.Module):
    """A classifier that scores every window of an image: its pool slides at stride 1, the classifier sees each.

    That is the network with its classifier as a 1x1 convolution. All else is the network's own forward, fused where it
    is converted. Of an image of the crops' size there is one window, and its score is the network's own.

    Args:
        model: in eval mode, with one global average pool and a classifier behind it. Its tensors are shared.
        size: height and width in pixels of the crops whose feature map is one window.

    Raises:
        ValueError: the model has no global average pool, or more than one, or cannot be copied.
    """

    def __init__(self, model: nn.Module, size: int = 224) -> None:
        super().__init__()
        pools = [name for name, m in model.named_modules() if _is_global_pool(m)]
        pools = [name for name in pools if name.rpartition(".")[0] not in pools]  # timm's holds PyTorch's
        if len(pools) != 1:
            found = ", ".join(pools[:4]) or "none"
            raise ValueError(
                f"the dense protocol needs one global average pool to slide, {type(model).__name__} has {found}; "
                "choose 1-crop or 10-crop"
            )
        tensors = [*model.parameters(), *model.buffers()]
        try:
            self.model = copy.deepcopy(model, {id(t): t for t in tensors})
        except Exception as error:  # a handle in a hook: copying calls foreign code
            raise ValueError(f"the dense protocol cannot copy the {type(model).__name__}: {error}") from error
        self.pool = SlidingPool()
        owner, _, name = pools[0].rpartition(".")
        setattr(self.model.get_submodule(owner), name, self.pool)
        like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        with torch.no_grad():
            self.model(like.new_zeros(1, channels, size, size))  # shows how large a window is

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, classes, P, Q]`` of P x Q windows."""
        logits = tensors_of(self.model(x))[0]
        return logits.unflatten(0, (len(x), *self.pool.positions)).permute(0, 3, 1, 2)


class SlidingPool(nn.Module):
    """In place of a global average pool: averages over windows as large as the first feature map that came.

    Attributes:
        window: height and width of a window.
        positions: rows and columns of windows in the last call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.window: tuple[int, ...] = ()
        self.positions: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N * P * Q, C]``: each window is an image of its own to what follows."""
        self.window = self.window or tuple(x.shape[2:])
        pooled = F.avg_pool2d(x, self.window, stride=1)
        self.positions = tuple(pooled.shape[2:])
        return pooled.permute(0, 2, 3, 1).flatten(0, 2)


def _is_global_pool(m: nn.Module) -> bool:
    """An average over the whole image, of PyTorch or timm."""
    if type(m).__name__ == "SelectAdaptivePool2d":
        return getattr(m, "pool_type", "") == "avg"
    return type(m) is nn.AdaptiveAvgPool2d and m.output_size in (1, (1, 1))

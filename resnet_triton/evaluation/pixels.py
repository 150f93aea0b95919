"""From the bytes of an image to what a network takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..images import MEAN, STD

#: Mean of ImageNet's training images in the order blue, green, red, 0 to 255.
CAFFE_MEAN = (103.939, 116.779, 123.68)


class Pixels:
    """``(x / scale - mean) / std`` of RGB bytes, a mean and a deviation a channel.

    Args:
        mean, std: per channel, in the order that the network takes them.
        bgr: the network takes blue, green, red, not red, green, blue.
        scale: what 255 is divided by first: 255 for images of 0 to 1, 1 for images of 0 to 255.

    Raises:
        ValueError: mean and std of different lengths, not finite, or a deviation that is not positive.
    """

    def __init__(
        self, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, bgr: bool = False, scale: float = 255.0
    ) -> None:
        good = len(mean) == len(std) > 0 and all(map(math.isfinite, (*mean, *std))) and min(std) > 0
        if not good:
            raise ValueError(f"mean and positive std must have one number a channel each, got {mean!r} and {std!r}")
        self.mean, self.std, self.bgr, self.scale = tuple(mean), tuple(std), bgr, scale

    def __call__(self, x: Tensor) -> Tensor:
        """Images ``[N, C, H, W]``, uint8 in RGB, to fp32; others are taken to be normalised already."""
        if x.dtype != torch.uint8:
            return x
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=x.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        x = x.flip(1) if self.bgr else x
        return x.float().div_(self.scale).sub_(mean).div_(std)

    def __str__(self) -> str:
        order = "BGR" if self.bgr else "RGB"
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"{order}, 0 to {255 / self.scale:g}, minus ({mean}), over ({std})"


#: torchvision's and timm's usual one.
IMAGENET = Pixels()
#: Of the original Caffe weights, with one mean a channel (theirs has one a pixel).
CAFFE = Pixels(CAFFE_MEAN, (1.0, 1.0, 1.0), bgr=True, scale=1.0)

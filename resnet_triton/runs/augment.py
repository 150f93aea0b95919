"""Augmentation of the papers: padded crops of small images; scaled crops of photographs with AlexNet's colour noise.

Everything is done on whole grey levels, so that a batch can travel to the device as uint8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BORDER = 4  # pixels around small images
CHOICES = 2 * (2 * BORDER + 1) ** 2  # of a crop, mirrored or not
SHORTER = 256 / 224, 480 / 224  # shorter side of a photograph, over the side of a crop

#: Principal components of the colours of ImageNet's training images, scaled to 0..1: standard deviations, and the
#: directions (red, green, blue) as columns, as computed for fb.resnet.torch.
DEVIATIONS = (0.2175, 0.0188, 0.0045)
DIRECTIONS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
STRENGTH = 0.1  # deviation of the factor of each


def padded_crops(images: Tensor, choices: Tensor, fill: Tensor) -> Tensor:
    """Crops of the images' own size out of the images with a border, mirrored or not.

    Args:
        images: ``[n, C, H, W]``.
        choices: ``[n]``, 0 to :data:`CHOICES` - 1: twice the number of the place, plus one where it is mirrored.
        fill: ``[C]`` values of the border, of the images' dtype.

    Returns:
        ``[n, H, W, C]``.
    """
    (n, _, height, width) = images.shape
    padded = fill.view(1, -1, 1, 1).repeat(n, 1, height + 2 * BORDER, width + 2 * BORDER)
    padded[:, :, BORDER:-BORDER, BORDER:-BORDER] = images
    place, mirrored = choices // 2, choices % 2 == 1
    rows = (place // (2 * BORDER + 1))[:, None] + torch.arange(height)
    across = torch.arange(width)
    columns = (place % (2 * BORDER + 1))[:, None] + torch.where(mirrored[:, None], across.flip(0), across)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]


def scaled_crop(image: Any, size: int, generator: torch.Generator) -> Tensor:
    """A random crop of a photograph of random scale, mirrored or not, of changed colour.

    Args:
        image: of PIL, in RGB.
        size: of the crop; the shorter side is scaled to a whole number of pixels of :data:`SHORTER` times that.
        generator: of the choices.

    Returns:
        uint8 ``[size, size, 3]``.
    """
    from PIL import Image

    def choice(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    side = choice(round(size * SHORTER[0]), round(size * SHORTER[1]))
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    left, top = choice(0, width - size), choice(0, height - size)
    # the crop is scaled, not the whole image; its edges in pixels of the image
    across, down = image.size[0] / width, image.size[1] / height
    box = left * across, top * down, (left + size) * across, (top + size) * down
    crop = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if choice(0, 1):
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return (pixels_of(crop) + colour_shift(generator)).round_().clamp_(0, 255).to(torch.uint8)


def colour_shift(generator: torch.Generator) -> Tensor:
    """What AlexNet's colour noise adds to red, green and blue of an image, in grey levels.

    Along each principal component of the colours, a normal number of deviation :data:`STRENGTH` times the component's.
    """
    factors = torch.randn(3, generator=generator) * STRENGTH * torch.tensor(DEVIATIONS)
    return 255 * (torch.tensor(DIRECTIONS) @ factors)


def pixels_of(image: Any) -> Tensor:
    """Pixels of an image of PIL, uint8 ``[H, W, C]``."""
    import numpy as np

    return torch.from_numpy(np.array(image))

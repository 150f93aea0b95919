"""Images for ``verify``: the user's files, or deterministic ones, as an ImageNet classifier is evaluated on them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def find_images(folder: str) -> list[Path]:
    """Image files in a folder and its subfolders (classes), in the order of their names; hidden ones are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
    """
    root = Path(folder).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"--images {folder!r}: there is no such folder (looked in {root.absolute().parent})")
    files = [root] if root.is_file() else root.rglob("*")
    found = [p for p in files if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()]
    if not found:
        raise ValueError(f"--images {folder!r} holds no image; looked for {', '.join(SUFFIXES)}, in subfolders too")
    return sorted(found)


def spread(items: list[Any], limit: int) -> list[Any]:
    """At most ``limit`` items at even distances, so that every class of a sorted folder has its share."""
    if len(items) <= limit:
        return items
    return [items[i * len(items) // limit] for i in range(limit)]


def read_image(path: Path, channels: int, height: int, width: int) -> Tensor:
    """One file as fp32 ``[channels, height, width]``, through :func:`evaluated`.

    Raises:
        ValueError: the file cannot be decoded.
        ImportError: without pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("--images needs pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            return evaluated(image.convert("RGB"), channels, height, width)
    except Exception as error:  # each decoder has exceptions of its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"image {str(path)!r} cannot be read ({first}); remove or replace it") from error


def evaluated(image: Any, channels: int, height: int, width: int) -> Tensor:
    """torchvision's evaluation transform of a PIL RGB image: resize to 256/224 of the crop, centre crop, normalise.

    The shorter side is resized to 256 pixels for a crop of 224, as ``torchvision.transforms.Resize`` does it.

    Raises:
        ValueError: for ``channels`` other than 3 and 1 (grey).
    """
    from PIL import Image

    if channels not in (1, 3):
        raise ValueError(f"images have 3 channels or 1, the model takes {channels}")
    short = round(max(height, width) * 256 / 224)
    scale = short / min(image.size)
    sides = [short if side == min(image.size) else int(side * scale) for side in image.size]
    resized = image.resize(sides, Image.Resampling.BILINEAR)
    left, top = round((sides[0] - width) / 2.0), round((sides[1] - height) / 2.0)
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.float32)
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).div(255)
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return x if channels == 3 else x.mean(0, keepdim=True)


def photographs(n: int, channels: int, height: int, width: int) -> Tensor | None:
    """``n`` crops of scikit-learn's two photographs, fp32 ``[n, channels, height, width]``; None where it is absent."""
    try:
        from PIL import Image
        from sklearn.datasets import load_sample_image

        photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    except ImportError:
        return None
    images = []
    for i in range(n):
        photo = photos[i % 2]
        # The whole photograph first; then boxes of 1/2 to 9/10 of its sides, at places that do not repeat.
        share = 1.0 if i < 2 else 0.5 + 0.4 * (i * 0.618 % 1)
        w, h = (int(side * share) for side in photo.size)
        left, top = int((photo.width - w) * (i * 0.755 % 1)), int((photo.height - h) * (i * 0.570 % 1))
        images.append(evaluated(photo.crop((left, top, left + w, top + h)), channels, height, width))
    return torch.stack(images)


def waves(n: int, channels: int, height: int, width: int) -> Tensor:
    """``n`` smooth patterns, sums of six waves a channel, fp32 ``[n, channels, height, width]``, unit variance."""
    rows = torch.linspace(0, 2 * math.pi, height).view(1, 1, height, 1)
    columns = torch.linspace(0, 2 * math.pi, width).view(1, 1, 1, width)
    seed = torch.arange(n * channels, dtype=torch.float32).view(n, channels, 1, 1)
    total = torch.zeros(n, channels, height, width)
    for k in range(1, 7):
        angle = 2.4 * (seed + 1) * k  # 2.4 radians, the golden angle: directions that do not repeat
        total += torch.sin(k * (rows * torch.cos(angle) + columns * torch.sin(angle)) + angle)
    return total / math.sqrt(3)

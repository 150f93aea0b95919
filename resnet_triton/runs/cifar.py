"""CIFAR-10 and CIFAR-100 from their standard files; reading them runs no code.

The binary version has rows of bytes: the label (of CIFAR-100 a coarse one before it), then 1024 red, 1024 green and
1024 blue pixels. The python version has pickles of dictionaries with the same pixels as a numpy array. A pickle may
name any function to be called, so this one may only name what such an array is made of, and each of these names stands
for a class of this file that keeps what it is given: nothing outside this file is called, numpy neither.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PIXELS = 3 * 32 * 32
PLACE = "https://www.cs.toronto.edu/~kriz"


class Version(NamedTuple):
    """Files of a data set in one of its two versions."""

    folder: str  # which its archive unpacks to
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    binary: bool


VERSIONS = {
    "cifar10": (
        Version(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            ("test_batch.bin",),
            True,
        ),
        Version(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
            False,
        ),
    ),
    "cifar100": (
        Version("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), True),
        Version("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), False),
    ),
}
CLASSES = {"cifar10": 10, "cifar100": 100}

Images = tuple[np.ndarray, np.ndarray]


def read(kind: str, root: Path) -> tuple[Images, Images]:
    """Images to train on and to test with, each as pixels uint8 ``[N, 3, 32, 32]`` and labels int64 ``[N]``.

    Args:
        kind: ``cifar10`` or ``cifar100``.
        root: the folder of the files, or the one in which their archive was unpacked.

    Raises:
        FileNotFoundError: a file is missing; says which, and where it comes from.
        ValueError: a file is damaged, or holds something else.
    """
    folder, version = _place(kind, root)

    def joined(names: tuple[str, ...]) -> Images:
        pixels, labels = zip(*(_file(kind, folder / name, version) for name in names), strict=True)
        return np.concatenate(pixels), np.concatenate(labels)

    return joined(version.train), joined(version.test)


def download(kind: str, root: Path) -> None:
    """Fetches the python version with torchvision, which checks its hash, unless some version is there.

    Raises:
        ImportError: without torchvision.
        OSError, RuntimeError: it could not be fetched.
    """
    try:
        _place(kind, root)
        return
    except FileNotFoundError:
        pass
    try:
        from torchvision import datasets
        from torchvision.datasets.utils import download_and_extract_archive
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"--download needs torchvision: pip install torchvision ({error})") from error
    theirs = datasets.CIFAR10 if kind == "cifar10" else datasets.CIFAR100
    download_and_extract_archive(theirs.url, str(root), filename=theirs.filename, md5=theirs.tgz_md5)


def _place(kind: str, root: Path) -> tuple[Path, Version]:
    """The folder of the files, and which version they are."""
    for version in VERSIONS[kind]:
        for folder in (root, root / version.folder):
            names = version.train + version.test
            missing = [name for name in names if not (folder / name).is_file()]
            if not missing:
                return folder, version
            if len(missing) < len(names):
                raise FileNotFoundError(
                    f"--data '{kind}:{root}': there is no file {str(folder / missing[0])!r} beside the others; unpack "
                    f"{PLACE}/{version.archive} again"
                )
    binary, python = VERSIONS[kind]
    raise FileNotFoundError(
        f"--data '{kind}:{root}': there is neither {binary.train[0]} nor {python.train[0]} in it, nor in a folder "
        f"{binary.folder} or {python.folder}. Unpack {PLACE}/{binary.archive} there, or pass --download"
    )


def _file(kind: str, path: Path, version: Version) -> Images:
    content = path.read_bytes()
    try:
        pixels, labels = (_binary if version.binary else _python)(kind, content)
        if labels.size and not 0 <= labels.min() <= labels.max() < CLASSES[kind]:
            raise ValueError(f"a label is outside of 0 to {CLASSES[kind] - 1}")
    except _Refused as error:
        raise ValueError(
            f"{str(path)!r} is refused: it names {error}, and reading it would run code; the files of "
            f"{PLACE}/{version.archive} do not"
        ) from error
    except Exception as error:  # whatever a damaged pickle leads to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{str(path)!r} is damaged or no file of {kind} ({reason}); unpack {PLACE}/{version.archive} again"
        ) from error
    return pixels.reshape(-1, 3, 32, 32), labels


def _binary(kind: str, content: bytes) -> Images:
    head = 1 if kind == "cifar10" else 2
    if not content or len(content) % (head + PIXELS):
        raise ValueError(f"its {len(content)} bytes are no whole number of rows of {head + PIXELS}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, head + PIXELS)
    return rows[:, head:], rows[:, head - 1].astype(np.int64)


def _python(kind: str, content: bytes) -> Images:
    found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    names = {k.decode() if isinstance(k, bytes) else k: v for k, v in found.items()}
    labels = np.array(names["labels" if kind == "cifar10" else "fine_labels"])
    pixels = names["data"].pixels()
    if labels.dtype != np.int64 or labels.shape != (len(pixels),) or not len(pixels):
        raise ValueError(f"it has {len(pixels)} images and labels {labels.dtype} {labels.shape}")
    return pixels, labels


class _Refused(pickle.UnpicklingError):
    """A pickle names something else than an array."""


class _Array:
    """What a pickle says of a numpy array."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> np.ndarray:
        """Its content, uint8 ``[N, 3072]``.

        Raises:
            ValueError: it is of another type or shape.
        """
        _, shape, dtype, by_columns, content = self.state
        if dtype.name not in (b"u1", "u1") or len(shape) != 2 or shape[1] != PIXELS or by_columns:
            raise ValueError(f"its data are {dtype.name!r} {shape}, not uint8 of {PIXELS} columns")
        return np.frombuffer(content, np.uint8).reshape(shape)


class _DType:
    """What a pickle says of a numpy dtype."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


STANDS_FOR: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,  # Python 3's way to write bytes for Python 2
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of :data:`STANDS_FOR` only."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if (module, name) not in STANDS_FOR:
            raise _Refused(f"{module}.{name}")
        return STANDS_FOR[module, name]

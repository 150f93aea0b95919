"""Measured configurations: one JSON file per device name, and where they are looked up.

A configuration is looked for in ``$RESNET_TRITON_CONFIG_DIR``, then in the user's cache, then in the files shipped in
``resnet_triton/tuned``, first under the device's own name, then under the names of GPUs of the same architecture. The
first folder that has the convolution, the chain of them or the step of training, at a near batch size answers.

A bad file is left out with one warning that says what is wrong with it, and the next folder serves. What may be in one
is in :mod:`.entries`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from .devices import Target, known_devices
from .entries import AnyEntry, ChainEntry, E, Entry, TrainEntry, check_keys, check_whole, nearest, refuse
from .kernels.geometry import ChainShape, ConvShape

if TYPE_CHECKING:
    from .training.plan import Work

logger = logging.getLogger("resnet_triton")
FORMAT = 3
READS = (2, FORMAT)  # format 2 has no steps of training
LISTS = ("entries", "chains", "training")
MAX_BYTES = 16 << 20
MAX_ENTRIES = 50_000
MAX_FILES = 64  # of one folder, where any GPU's file will do
WAY_OUT = "delete it, or measure again with `resnet-triton tune`"


@dataclass(frozen=True)
class Tuned:
    """The content of one file: the GPU that it was measured on, its compute capability times ten, the entries."""

    device: str
    sm: int
    entries: tuple[Entry, ...]
    chains: tuple[ChainEntry, ...] = ()
    training: tuple[TrainEntry, ...] = ()

    @property
    def all(self) -> list[AnyEntry]:
        """The entries of convolutions, then those of chains, then those of steps of training."""
        return [*self.entries, *self.chains, *self.training]

    def nearest(self, shape: ConvShape, dtype: str, precision: str, residual: bool) -> Entry | None:
        """The entry of the same convolution at the nearest batch within a factor of two, or None."""
        return nearest((e for e in self.entries if e.is_of(shape, dtype, precision, residual)), shape.n)

    def nearest_chain(self, shape: ChainShape, dtype: str) -> ChainEntry | None:
        """The same for a chain."""
        return nearest((e for e in self.chains if e.is_of(shape, dtype)), shape.expand.n)

    def nearest_training(self, work: Work, dtype: str, precision: str) -> TrainEntry | None:
        """The same for a step of training."""
        assert work.shape is not None
        return nearest((e for e in self.training if e.is_of(work, dtype, precision)), work.shape.n)


# Files


def file_name(device_name: str) -> str:
    """``NVIDIA H200`` -> ``NVIDIA_H200.json``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name) + ".json"


def cache_dir() -> Path:
    """The user's own tuned files.

    Raises:
        ValueError: there is no home directory.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "resnet_triton"
    except RuntimeError as error:
        raise ValueError(f"no home directory ({error}); set XDG_CACHE_HOME or HOME") from None


def shipped_dir() -> Path:
    """The files that come with this package; absent until something was measured."""
    return Path(__file__).parent / "tuned"


def search_path() -> list[Path]:
    """Folders that may hold tuned files, first match wins."""
    extra = os.environ.get("RESNET_TRITON_CONFIG_DIR")
    folders = [Path(extra)] if extra else []
    with contextlib.suppress(ValueError):
        folders.append(cache_dir())
    return [*folders, shipped_dir()]


def read(path: Path) -> Tuned:
    """Reads one file.

    Raises:
        ValueError: naming the file, what is wrong with it, and the way out.
        OSError: it cannot be opened.
    """
    text = _bytes_of(path)

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        data = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a ValueError too
        what = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{path} is not JSON that this package writes ({what}); {WAY_OUT}") from None
    found = data.get("format") if isinstance(data, dict) else None
    if type(found) is int and found > FORMAT:
        raise ValueError(
            f"{path} has format {found}, of a newer resnet-triton; this version reads up to format {FORMAT}: "
            f"upgrade resnet-triton, or {WAY_OUT}"
        )
    if type(found) is not int or found not in READS:
        reads = " and ".join(map(str, READS))
        raise ValueError(f"{path} has format {found!r:.50}; this version reads formats {reads}: {WAY_OUT}")
    try:
        optional = ("chains", "training")[: found - 1]
        check_keys(data, "the file", ("format", "device", "sm", "entries", *optional), optional)
        if not isinstance(data["device"], str) or not 0 < len(data["device"]) <= 200:
            refuse("device", data["device"], "a device name")
        check_whole(data["sm"], "sm", 0, 999)
        entries = _records(data["entries"], "entries", Entry.from_dict)
        chains = _records(data.get("chains", []), "chains", ChainEntry.from_dict)
        training = _records(data.get("training", []), "training", TrainEntry.from_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {WAY_OUT}") from None
    return Tuned(data["device"], data["sm"], entries, chains, training)


def _records(items: Any, where: str, from_dict: Callable[[Any, str], E]) -> tuple[E, ...]:
    if not isinstance(items, list) or len(items) > MAX_ENTRIES:
        what = f"{len(items)} of them" if isinstance(items, list) else items
        refuse(where, what, f"a list of at most {MAX_ENTRIES}")
    return tuple(from_dict(item, f"{where}[{i}]") for i, item in enumerate(items))


def _bytes_of(path: Path) -> bytes:
    """The content of a regular file of bounded size; a pipe or a device is not waited for."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is not a regular file; {WAY_OUT}")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{path} has {status.st_size} bytes, allowed: {MAX_BYTES}; {WAY_OUT}")
        with open(handle, "rb", closefd=False) as file:
            return file.read(MAX_BYTES)
    finally:
        os.close(handle)


def load(path: Path) -> list[AnyEntry]:
    """The entries of one file: convolutions, chains, steps of training; raises as :func:`read`."""
    return read(path).all


def versions() -> dict[str, str]:
    """What an entry is noted with: versions of torch, triton and cuDNN, where present."""
    found = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version() or "")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return {name: version for name, version in found.items() if version}


def save(path: Path, device_name: str, entries: Iterable[AnyEntry], sm: int | None = None) -> None:
    """Writes one file atomically: a reader sees the old file or the new one.

    Args:
        path, device_name, entries: of the file; entries of every kind in any order.
        sm: compute capability times ten; None is that of the device's record, 0 without one.
    """
    if sm is None:
        sm = known_devices()[device_name].sm if device_name in known_devices() else 0
    lists: dict[type, list[dict]] = {Entry: [], ChainEntry: [], TrainEntry: []}
    for entry in entries:
        lists[type(entry)].append(entry.to_dict())
    data = {"format": FORMAT, "device": device_name, "sm": sm, **dict(zip(LISTS, lists.values(), strict=True))}
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=path.stem, suffix=".part", dir=path.parent)
    try:
        with open(handle, "w") as file:
            file.write(json.dumps(data, indent=1, allow_nan=False))
            file.flush()
            os.fsync(handle)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def merge(path: Path, device_name: str, entries: Iterable[AnyEntry], sm: int | None = None) -> None:
    """Adds entries to a file, in place of those for the same work; the others stay. None at all only checks it.

    Raises:
        ValueError: the file is there and cannot be read as one of this device; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        found: dict[tuple, AnyEntry] = {}
        if os.path.lexists(path):
            before = read(path)
            if before.device != device_name:
                raise ValueError(f"{path} is of {before.device!r}, these entries are of {device_name!r}; {WAY_OUT}")
            found = {entry.key: entry for entry in before.all}
            sm = before.sm if sm is None else sm
        added = {entry.key: entry for entry in entries}
        if added:
            save(path, device_name, (found | added).values(), sm)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Within the block, no other process holds this lock file (which stays; where there is no flock, nothing happens).

    Raises:
        BlockingIOError: ``wait`` is false and another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where no kernel of this package runs
        yield
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError as error:  # a network file system without locks
            logger.debug("%s cannot be locked: %s", path, error)
        yield
    finally:
        os.close(handle)


# Looking up


def lookup(
    device_name: str, shape: ConvShape, dtype: torch.dtype, residual: bool, precision: str = "tf32"
) -> Entry | None:
    """The entry of the same convolution, measured on this device at the nearest batch within a factor of two, or None.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        shape, dtype, residual: of the convolution.
        precision: ``"tf32"`` or ``"ieee"``; it matters for fp32 alone.
    """
    wanted = _wanted(dtype, precision)
    return _first(device_name, lambda tuned: tuned.nearest(shape, *wanted, residual))


def lookup_chain(device_name: str, shape: ChainShape, dtype: torch.dtype) -> ChainEntry | None:
    """The same for a chain."""
    name, _ = _wanted(dtype)
    return _first(device_name, lambda tuned: tuned.nearest_chain(shape, name))


def lookup_training(device_name: str, work: Work, dtype: torch.dtype, precision: str) -> TrainEntry | None:
    """The same for a step of training."""
    wanted = _wanted(dtype, precision)
    return _first(device_name, lambda tuned: tuned.nearest_training(work, *wanted))


def lookup_sibling(
    target: Target, shape: ConvShape, dtype: torch.dtype, residual: bool, precision: str = "tf32"
) -> tuple[str, Entry] | None:
    """The same from a GPU of another name and the same architecture: ``(its name, the entry)``, or None."""
    wanted = _wanted(dtype, precision)
    return _first_sibling(target, lambda tuned: tuned.nearest(shape, *wanted, residual))


def lookup_sibling_chain(target: Target, shape: ChainShape, dtype: torch.dtype) -> tuple[str, ChainEntry] | None:
    """The same for a chain."""
    name, _ = _wanted(dtype)
    return _first_sibling(target, lambda tuned: tuned.nearest_chain(shape, name))


def lookup_sibling_training(
    target: Target, work: Work, dtype: torch.dtype, precision: str
) -> tuple[str, TrainEntry] | None:
    """The same for a step of training."""
    wanted = _wanted(dtype, precision)
    return _first_sibling(target, lambda tuned: tuned.nearest_training(work, *wanted))


def _first(device_name: str, find: Callable[[Tuned], E | None]) -> E | None:
    """What the first folder finds that has it in the device's own file."""
    for folder in _folders():
        tuned = _own_file(folder, device_name)
        entry = find(tuned) if tuned else None
        if entry:
            return entry
    return None


def _first_sibling(target: Target, find: Callable[[Tuned], E | None]) -> tuple[str, E] | None:
    """What the first folder finds that has it in the file of a sibling of the target; and whose file that is."""
    for folder in _folders():
        for tuned in _all_files(folder):
            if tuned.sm == target.sm and tuned.device != target.name:
                entry = find(tuned)
                if entry:
                    return tuned.device, entry
    return None


def _wanted(dtype: torch.dtype, precision: str = "") -> tuple[str, str]:
    name = str(dtype).removeprefix("torch.")
    return name, precision if name == "float32" else ""


def forget() -> None:
    """Reads every file anew at the next look-up."""
    for cached in (_folders, _own_file, _all_files):
        cached.cache_clear()


@functools.cache
def _folders() -> tuple[Path, ...]:
    extra = os.environ.get("RESNET_TRITON_CONFIG_DIR")
    if extra and not os.path.isdir(extra):
        logger.warning("RESNET_TRITON_CONFIG_DIR=%s is not a folder: no tuned configurations from there", extra)
    return tuple(search_path())


@functools.cache
def _own_file(folder: Path, device_name: str) -> Tuned | None:
    path = folder / file_name(device_name)
    try:
        tuned = read(path)
        if tuned.device != device_name:
            raise ValueError(f"{path} is of {tuned.device!r}, not of {device_name!r}; {WAY_OUT}")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        logger.warning("tuned configurations ignored: %s", error)
        return None
    return tuned


@functools.cache
def _all_files(folder: Path) -> tuple[Tuned, ...]:
    """Every tuned file of a folder; others, such as the results of a bench, are passed over."""
    found = []
    try:
        paths = sorted(folder.glob("*.json"))[:MAX_FILES]
    except OSError:
        return ()
    for path in paths:
        try:
            tuned = read(path)
        except (ValueError, OSError) as error:
            logger.debug("passed over: %s", error)
            continue
        if path.name == file_name(tuned.device):
            found.append(tuned)
    return tuple(found)

"""Measured configurations: one JSON file per device name, and where they are looked up.

A configuration is looked for in ``$RESNET_TRITON_CONFIG_DIR``, then in the user's cache, then in the files shipped in
``resnet_triton/tuned``, first under the device's own name, then under the names of GPUs of the same architecture. The
first folder that has the convolution at a near batch size answers.

A file is data only: every value in it is checked for type and range before use, and none can name code. A bad file is
left out with one warning that says what is wrong with it, and the next folder serves.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from .devices import Target, known_devices
from .kernels.config import KERNELS, ConvConfig
from .kernels.geometry import ConvShape

logger = logging.getLogger("resnet_triton")
FORMAT = 2
MAX_BYTES = 16 << 20
MAX_ENTRIES = 50_000
MAX_FILES = 64  # of one folder, where any GPU's file will do
DTYPES = ("float32", "float16", "bfloat16")
PRECISIONS = ("tf32", "ieee")
WAY_OUT = "delete it, or measure again with `resnet-triton tune`"
_SIZES = {
    "n": (1, 1 << 20), "h": (1, 1 << 16), "w": (1, 1 << 16), "c": (1, 1 << 20), "k": (1, 1 << 20), "r": (1, 64),
    "s": (1, 64), "stride": (1, 64), "padding": (0, 1024), "dilation": (1, 1024),
}  # fmt: skip
_TILING = {
    "bn": (16, 512), "bk": (16, 512), "warps": (1, 32), "stages": (1, 16), "persistent": (0, 32), "split": (1, 16),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One measured convolution.

    Args:
        shape, dtype, residual: what was measured (dtype name without ``torch.``).
        config: the fastest configuration of ours.
        us: its time, microseconds.
        library_us: time of cuDNN and the separate passes that it replaces, microseconds.
        precision: ``"tf32"`` or ``"ieee"`` for float32, else ``""``.
        versions: of torch, triton and cuDNN at the measurement.
    """

    shape: ConvShape
    dtype: str
    residual: bool
    config: ConvConfig
    us: float
    library_us: float
    precision: str = ""
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        allowed = PRECISIONS if self.dtype == "float32" else ("",)
        if self.precision not in allowed:
            raise ValueError(f"precision is {self.precision!r}, allowed for {self.dtype}: {_listed(allowed)}")

    @property
    def key(self) -> tuple[ConvShape, str, str, bool]:
        """What a file holds at most once."""
        return self.shape, self.dtype, self.precision, self.residual

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        return {**asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: dict, where: str = "entry") -> Entry:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: naming the value (``where`` and its path) and what is allowed.
        """
        names = ("shape", "dtype", "residual", "config", "us", "library_us", "precision", "versions")
        _keys(data, where, names)
        shape = _keys(data["shape"], f"{where}.shape", tuple(_SIZES))
        for name, (low, high) in _SIZES.items():
            _whole(shape[name], f"{where}.shape.{name}", low, high)
        conv = ConvShape(**shape)
        if min(conv.p, conv.q) < 1:
            _refuse(f"{where}.shape", data["shape"], "a window that fits the padded image")
        _choice(data["dtype"], f"{where}.dtype", DTYPES)
        _choice(data["precision"], f"{where}.precision", PRECISIONS if data["dtype"] == "float32" else ("",))
        if not isinstance(data["residual"], bool):
            _refuse(f"{where}.residual", data["residual"], "true or false")
        times = {name: _microseconds(data[name], f"{where}.{name}") for name in ("us", "library_us")}
        config = _config(data["config"], f"{where}.config")
        versions = _versions(data["versions"], f"{where}.versions")
        return cls(
            conv, data["dtype"], data["residual"], config, **times, precision=data["precision"], versions=versions
        )


@dataclass(frozen=True)
class Tuned:
    """The content of one file: the GPU that it was measured on, its compute capability times ten, the entries."""

    device: str
    sm: int
    entries: tuple[Entry, ...]

    def nearest(self, shape: ConvShape, dtype: str, precision: str, residual: bool) -> Entry | None:
        """The entry of the same convolution at the nearest batch within a factor of two, or None."""
        wanted = _without_batch(shape)
        near = [
            e
            for e in self.entries
            if (e.dtype, e.precision, e.residual) == (dtype, precision, residual)
            and e.shape.n <= 2 * shape.n
            and shape.n <= 2 * e.shape.n
            and _without_batch(e.shape) == wanted
        ]
        return min(near, key=lambda e: abs(e.shape.n - shape.n), default=None)


def _without_batch(shape: ConvShape) -> tuple[int, ...]:
    return tuple(vars(shape).values())[1:]


# Checking what a file says


def _refuse(where: str, value: object, allowed: str) -> NoReturn:
    raise ValueError(f"{where} is {value!r:.80}, allowed: {allowed}")


def _listed(values: Iterable[str]) -> str:
    return ", ".join(repr(value) for value in values)


def _keys(data: Any, where: str, names: Sequence[str], optional: Sequence[str] = ()) -> dict:
    if not isinstance(data, dict):
        _refuse(where, data, f"an object with {_listed(names)}")
    missing, unknown = set(names) - set(data) - set(optional), set(data) - set(names)
    if missing:
        raise ValueError(f"{where} lacks {_listed(sorted(missing))}")
    if unknown:
        raise ValueError(f"{where} has unknown keys {_listed(sorted(unknown))[:80]}, allowed: {_listed(names)}")
    return data


def _whole(value: Any, where: str, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _refuse(where, value, f"an integer from {low} to {high}")
    return value


def _choice(value: Any, where: str, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        _refuse(where, value, _listed(allowed))
    return value


def _microseconds(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        _refuse(where, value, "positive microseconds below 1e9")
    return float(value)


def _config(data: Any, where: str) -> ConvConfig:
    _keys(data, where, ("kernel", "box", *_TILING, "pdl"), ("warps", "stages", "persistent", "split", "pdl"))
    _choice(data["kernel"], f"{where}.kernel", KERNELS)
    box = data["box"]
    if not isinstance(box, list) or len(box) != 3:
        _refuse(f"{where}.box", box, "three integers: images, rows, columns")
    for side in box:
        _whole(side, f"{where}.box", 1, 512)
    for name in _TILING.keys() & data.keys():
        _whole(data[name], f"{where}.{name}", *_TILING[name])
    if not isinstance(data.get("pdl", False), bool):
        _refuse(f"{where}.pdl", data["pdl"], "true or false")
    try:
        config = ConvConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _whole(config.bm, f"{where}.box (its product)", 16, 1024)
    return config


def _versions(data: Any, where: str) -> dict[str, str]:
    if not isinstance(data, dict) or len(data) > 16:
        _refuse(where, data, "an object of at most 16 names and versions")
    for name, version in data.items():
        if not isinstance(version, str) or len(name) + len(version) > 200:
            _refuse(f"{where}.{name:.50}", version, "a short text")
    return data


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
            f"{path} has format {found}, of a newer resnet-triton; this version reads format {FORMAT}: "
            f"upgrade resnet-triton, or {WAY_OUT}"
        )
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{path} has format {found!r:.50}; this version reads format {FORMAT}: {WAY_OUT}")
    try:
        _keys(data, "the file", ("format", "device", "sm", "entries"))
        if not isinstance(data["device"], str) or not 0 < len(data["device"]) <= 200:
            _refuse("device", data["device"], "a device name")
        _whole(data["sm"], "sm", 0, 999)
        entries = data["entries"]
        if not isinstance(entries, list) or len(entries) > MAX_ENTRIES:
            what = f"{len(entries)} of them" if isinstance(entries, list) else entries
            _refuse("entries", what, f"a list of at most {MAX_ENTRIES}")
        made = tuple(Entry.from_dict(item, f"entries[{i}]") for i, item in enumerate(entries))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {WAY_OUT}") from None
    return Tuned(data["device"], data["sm"], made)


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


def load(path: Path) -> list[Entry]:
    """The entries of one file; raises as :func:`read`."""
    return list(read(path).entries)


def versions() -> dict[str, str]:
    """What an entry is noted with: versions of torch, triton and cuDNN, where present."""
    found = {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version() or "")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return {name: version for name, version in found.items() if version}


def save(path: Path, device_name: str, entries: Iterable[Entry], sm: int | None = None) -> None:
    """Writes one file atomically: a reader sees the old file or the new one.

    Args:
        path, device_name, entries: of the file.
        sm: compute capability times ten; None is that of the device's record, 0 without one.
    """
    if sm is None:
        sm = known_devices()[device_name].sm if device_name in known_devices() else 0
    data = {"format": FORMAT, "device": device_name, "sm": sm, "entries": [entry.to_dict() for entry in entries]}
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


def merge(path: Path, device_name: str, entries: Iterable[Entry], sm: int | None = None) -> None:
    """Adds entries to a file, in place of those for the same convolutions; the others stay. None at all only checks it.

    Raises:
        ValueError: the file is there and cannot be read as one of this device; it is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        found = {}
        if os.path.lexists(path):
            before = read(path)
            if before.device != device_name:
                raise ValueError(f"{path} is of {before.device!r}, these entries are of {device_name!r}; {WAY_OUT}")
            found = {entry.key: entry for entry in before.entries}
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
    for folder in _folders():
        tuned = _own_file(folder, device_name)
        entry = tuned and tuned.nearest(shape, *wanted, residual)
        if entry:
            return entry
    return None


def lookup_sibling(
    target: Target, shape: ConvShape, dtype: torch.dtype, residual: bool, precision: str = "tf32"
) -> tuple[str, Entry] | None:
    """The same from a GPU of another name and the same architecture: ``(its name, the entry)``, or None."""
    wanted = _wanted(dtype, precision)
    for folder in _folders():
        for tuned in _all_files(folder):
            if tuned.sm == target.sm and tuned.device != target.name:
                entry = tuned.nearest(shape, *wanted, residual)
                if entry:
                    return tuned.device, entry
    return None


def _wanted(dtype: torch.dtype, precision: str) -> tuple[str, str]:
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

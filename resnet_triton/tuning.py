"""Measured configurations: one JSON file per device name, and where they are looked up.

Order: ``$RESNET_TRITON_CONFIG_DIR``, the user's cache, then the files shipped in ``resnet_triton/tuned``. A file is
data only; it is validated before use, and a bad one is refused with a warning that says what is wrong with it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .kernels.config import ConvConfig
from .kernels.geometry import ConvShape

logger = logging.getLogger("resnet_triton")
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One measured convolution.

    Args:
        shape, dtype, residual: what was measured (dtype name without ``torch.``).
        config: the fastest configuration of ours.
        us: its time, microseconds.
        library_us: time of cuDNN and the separate passes that it replaces, microseconds.
    """

    shape: ConvShape
    dtype: str
    residual: bool
    config: ConvConfig
    us: float
    library_us: float

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        return {**asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: dict) -> Entry:
        """Inverse of :meth:`to_dict`; raises ValueError, KeyError or TypeError on malformed data."""
        times = {name: float(data[name]) for name in ("us", "library_us")}
        if not all(0 < value < 1e9 for value in times.values()):
            raise ValueError(f"us and library_us must be positive microseconds, got {times}")
        shape = ConvShape(**{name: int(value) for name, value in data["shape"].items()})
        return cls(shape, str(data["dtype"]), bool(data["residual"]), ConvConfig.from_dict(data["config"]), **times)


def file_name(device_name: str) -> str:
    """``NVIDIA H200`` -> ``NVIDIA_H200.json``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device_name) + ".json"


def cache_dir() -> Path:
    """The user's own tuned files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet_triton"


def search_path() -> list[Path]:
    """Folders that may hold tuned files, first match wins."""
    folders = [cache_dir(), Path(__file__).parent / "tuned"]
    extra = os.environ.get("RESNET_TRITON_CONFIG_DIR")
    return [Path(extra), *folders] if extra else folders


def load(path: Path) -> list[Entry]:
    """Reads one file.

    Raises:
        ValueError: naming the file and what is wrong with it (not JSON, another format, a malformed entry).
    """
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); delete it or tune again") from None
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads format {FORMAT}: tune again")
    try:
        return [Entry.from_dict(item) for item in data["entries"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a malformed entry ({type(error).__name__}: {error}); tune again") from None


def save(path: Path, device_name: str, entries: list[Entry]) -> None:
    """Writes one file atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}
    data = {"format": FORMAT, "device": device_name, "versions": versions, "entries": [e.to_dict() for e in entries]}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1))
    os.replace(part, path)


@functools.cache
def entries_for(device_name: str) -> tuple[Entry, ...]:
    """All entries for a device name, of the first folder that has a readable file."""
    for folder in search_path():
        path = folder / file_name(device_name)
        try:
            if path.is_file():
                return tuple(load(path))
        except (ValueError, OSError) as error:
            logger.warning("tuned configurations ignored: %s", error)
    return ()


def lookup(device_name: str, shape: ConvShape, dtype: torch.dtype, residual: bool) -> Entry | None:
    """The measured entry of the same convolution at the nearest batch within a factor of two, or None."""
    name = str(dtype).removeprefix("torch.")
    wanted = {**asdict(shape), "n": 0}
    same = [
        e
        for e in entries_for(device_name)
        if e.dtype == name and e.residual == residual and {**asdict(e.shape), "n": 0} == wanted
    ]
    near = [e for e in same if e.shape.n <= 2 * shape.n and shape.n <= 2 * e.shape.n]
    return min(near, key=lambda e: abs(e.shape.n - shape.n), default=None)

"""What a tuned file holds: measured convolutions, chains and steps of training as records, every value checked.

A record is data only: no value of it can name code, and none is used before its type and range are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .kernels.config import CHAIN_KERNELS, KERNELS, MOST_WGRAD_SPLITS, ROLLING_KERNELS, WGRAD_KERNELS, ConvConfig
from .kernels.geometry import ChainShape, ConvShape

if TYPE_CHECKING:
    from .training.plan import Work

DTYPES = ("float32", "float16", "bfloat16")
CHAIN_DTYPES = ("float16", "bfloat16")  # the tiles of a chain in fp32 fit no multiprocessor
PRECISIONS = ("tf32", "ieee")
_SIZES = {
    "n": (1, 1 << 20), "h": (1, 1 << 16), "w": (1, 1 << 16), "c": (1, 1 << 20), "k": (1, 1 << 20), "r": (1, 64),
    "s": (1, 64), "stride": (1, 64), "padding": (0, 1024), "dilation": (1, 1024),
}  # fmt: skip
_TILING = {
    "bn": (16, 512), "bk": (16, 512), "warps": (1, 32), "stages": (1, 16), "persistent": (0, 32), "split": (1, 16),
}  # fmt: skip
_SIDE, _STRIP = 512, 1 << 20  # longest side of a tile, and longest strip of a rolling kernel


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
    def batch(self) -> int:
        """Images at the measurement."""
        return self.shape.n

    @property
    def key(self) -> tuple:
        """What a file holds at most once."""
        return self.shape, self.dtype, self.precision, self.residual

    def is_of(self, shape: ConvShape, dtype: str, precision: str, residual: bool) -> bool:
        """Whether it measured this convolution, at any batch."""
        same = (self.dtype, self.precision, self.residual) == (dtype, precision, residual)
        return same and _without_batch(self.shape) == _without_batch(shape)

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
        check_keys(data, where, names)
        shape = _conv_shape(data["shape"], f"{where}.shape")
        _choice(data["dtype"], f"{where}.dtype", DTYPES)
        _choice(data["precision"], f"{where}.precision", PRECISIONS if data["dtype"] == "float32" else ("",))
        if not isinstance(data["residual"], bool):
            refuse(f"{where}.residual", data["residual"], "true or false")
        measured = _measured(data, where, KERNELS)
        return cls(shape, data["dtype"], data["residual"], precision=data["precision"], **measured)


@dataclass(frozen=True)
class ChainEntry:
    """One measured chain of convolutions.

    Args:
        shape, dtype: what was measured (dtype name without ``torch.``).
        config: the fastest configuration of ours.
        us: its time, microseconds.
        library_us: time of cuDNN's convolutions and the separate passes that it replaces, microseconds.
        versions: of torch, triton and cuDNN at the measurement.
    """

    shape: ChainShape
    dtype: str
    config: ConvConfig
    us: float
    library_us: float
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def batch(self) -> int:
        """Images at the measurement."""
        return self.shape.expand.n

    @property
    def key(self) -> tuple:
        """What a file holds at most once."""
        return self.shape, self.dtype

    def is_of(self, shape: ChainShape, dtype: str) -> bool:
        """Whether it measured this chain, at any batch."""
        return self.dtype == dtype and _chain_without_batch(self.shape) == _chain_without_batch(shape)

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        return {**asdict(self), "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: dict, where: str = "entry") -> ChainEntry:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: naming the value (``where`` and its path) and what is allowed.
        """
        check_keys(data, where, ("shape", "dtype", "config", "us", "library_us", "versions"))
        shape = chain_shape_of(data["shape"], f"{where}.shape")
        _choice(data["dtype"], f"{where}.dtype", CHAIN_DTYPES)
        return cls(shape, data["dtype"], **_measured(data, where, CHAIN_KERNELS))


@dataclass(frozen=True)
class TrainEntry:
    """One measured step of training.

    Args:
        work, dtype: what was measured (dtype name without ``torch.``).
        config: the fastest configuration of ours.
        us: its time, microseconds.
        library_us: time of the library and the passes that it needs besides, microseconds; 0 where there is none.
        precision: ``"tf32"`` or ``"ieee"`` for float32, else ``""``.
        versions: of torch, triton and cuDNN at the measurement.
    """

    work: Work
    dtype: str
    config: ConvConfig
    us: float
    library_us: float
    precision: str = ""
    versions: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def batch(self) -> int:
        """Images at the measurement."""
        assert self.work.shape is not None
        return self.work.shape.n

    @property
    def key(self) -> tuple:
        """What a file holds at most once."""
        return self.work, self.dtype, self.precision

    def is_of(self, work: Work, dtype: str, precision: str) -> bool:
        """Whether it measured this step, at any batch."""
        return (self.dtype, self.precision) == (dtype, precision) and _one_image(self.work) == _one_image(work)

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        work = asdict(self.work)
        del work["moved"]  # of steps that only move bytes, which have no configurations
        return {**asdict(self), "work": work, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: dict, where: str = "entry") -> TrainEntry:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: naming the value (``where`` and its path) and what is allowed.
        """
        check_keys(data, where, ("work", "dtype", "precision", "config", "us", "library_us", "versions"))
        work = work_of(data["work"], f"{where}.work")
        _choice(data["dtype"], f"{where}.dtype", DTYPES)
        _choice(data["precision"], f"{where}.precision", PRECISIONS if data["dtype"] == "float32" else ("",))
        measured = _measured(data, where, work.kernels, work.has_library)
        return cls(work, data["dtype"], precision=data["precision"], **measured)


AnyEntry = Entry | ChainEntry | TrainEntry
E = TypeVar("E", Entry, ChainEntry, TrainEntry)


def nearest(entries: Iterable[E], batch: int) -> E | None:
    """Of entries of the same work, the one measured at the nearest batch within a factor of two, or None."""
    near = [e for e in entries if e.batch <= 2 * batch and batch <= 2 * e.batch]
    return min(near, key=lambda e: abs(e.batch - batch), default=None)


def _without_batch(shape: ConvShape) -> tuple[int, ...]:
    return tuple(vars(shape).values())[1:]


def _chain_without_batch(shape: ChainShape) -> tuple:
    parts = (shape.first, shape.conv, shape.expand, shape.project, shape.reduce)
    return shape.subsample, *(part and _without_batch(part) for part in parts)


def _one_image(work: Work) -> Work:
    assert work.shape is not None
    project = work.project and replace(work.project, n=1)
    return replace(work, shape=replace(work.shape, n=1), project=project)


# Checking what a file says


def refuse(where: str, value: object, allowed: str) -> NoReturn:
    """Raises the ValueError for a value that is not allowed."""
    raise ValueError(f"{where} is {value!r:.80}, allowed: {allowed}")


def check_keys(data: Any, where: str, names: Sequence[str], optional: Sequence[str] = ()) -> dict:
    """``data`` if it is a dict with all of these names but the optional ones, and no others; else ValueError."""
    if not isinstance(data, dict):
        refuse(where, data, f"an object with {_listed(names)}")
    missing, unknown = set(names) - set(data) - set(optional), set(data) - set(names)
    if missing:
        raise ValueError(f"{where} lacks {_listed(sorted(missing))}")
    if unknown:
        raise ValueError(f"{where} has unknown keys {_listed(sorted(unknown))[:80]}, allowed: {_listed(names)}")
    return data


def check_whole(value: Any, where: str, low: int, high: int) -> int:
    """``value`` if it is an int in the range, else ValueError."""
    if type(value) is not int or not low <= value <= high:
        refuse(where, value, f"an integer from {low} to {high}")
    return value


def chain_shape_of(data: Any, where: str = "shape") -> ChainShape:
    """Inverse of ``dataclasses.asdict`` of a chain's shape.

    Raises:
        ValueError: naming the value (``where`` and its path) and what is allowed.
    """
    names = ("conv", "expand", "project", "reduce", "first")
    check_keys(data, where, (*names, "subsample"), optional=("first",))
    convs = {
        name: None if data.get(name) is None and name != "expand" else _conv_shape(data[name], f"{where}.{name}")
        for name in names
    }
    subsample = check_whole(data["subsample"], f"{where}.subsample", 1, 2)
    try:
        return ChainShape(**convs, subsample=subsample)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def work_of(data: Any, where: str = "work") -> Work:
    """A step of training with products, as ``dataclasses.asdict`` writes one.

    Raises:
        ValueError: naming the value (``where`` and its path) and what is allowed.
    """
    from .training.plan import TUNED_STEPS, Work

    flags = ("prologue", "backward", "moments")
    check_keys(data, where, ("step", "shape", *flags, "project", "residual_stride", "following"))
    _choice(data["step"], f"{where}.step", TUNED_STEPS)
    for name in flags:
        if not isinstance(data[name], bool):
            refuse(f"{where}.{name}", data[name], "true or false")
    check_whole(data["residual_stride"], f"{where}.residual_stride", 0, 2)
    check_whole(data["following"], f"{where}.following", 0, _SIZES["k"][1])
    shape = _conv_shape(data["shape"], f"{where}.shape")
    project = None if data["project"] is None else _conv_shape(data["project"], f"{where}.project")
    return Work(**{**data, "shape": shape, "project": project})


def _listed(values: Iterable[str]) -> str:
    return ", ".join(repr(value) for value in values)


def _choice(value: Any, where: str, allowed: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in allowed:
        refuse(where, value, _listed(allowed))
    return value


def _conv_shape(data: Any, where: str) -> ConvShape:
    check_keys(data, where, tuple(_SIZES))
    for name, (low, high) in _SIZES.items():
        check_whole(data[name], f"{where}.{name}", low, high)
    shape = ConvShape(**data)
    if min(shape.p, shape.q) < 1:
        refuse(where, data, "a window that fits the padded image")
    return shape


def _measured(data: dict, where: str, kernels: Sequence[str], library: bool = True) -> dict[str, Any]:
    """What entries have in common, checked; without a library its time is 0."""
    found: dict[str, Any] = {"us": _microseconds(data["us"], f"{where}.us"), "library_us": 0.0}
    if library:
        found["library_us"] = _microseconds(data["library_us"], f"{where}.library_us")
    elif type(data["library_us"]) not in (int, float) or data["library_us"] != 0:
        refuse(f"{where}.library_us", data["library_us"], "0, for a step that no library has")
    found["config"] = _config(data["config"], f"{where}.config", kernels)
    return found | {"versions": _versions(data["versions"], f"{where}.versions")}


def _microseconds(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        refuse(where, value, "positive microseconds below 1e9")
    return float(value)


def _config(data: Any, where: str, kernels: Sequence[str]) -> ConvConfig:
    check_keys(data, where, ("kernel", "box", *_TILING, "pdl"), ("warps", "stages", "persistent", "split", "pdl"))
    _choice(data["kernel"], f"{where}.kernel", kernels)
    box = data["box"]
    if not isinstance(box, list) or len(box) != 3:
        refuse(f"{where}.box", box, "three integers: images, rows, columns")
    rows = _STRIP if data["kernel"] in ROLLING_KERNELS else _SIDE
    for side, most in zip(box, (_SIDE, rows, _SIDE), strict=True):
        check_whole(side, f"{where}.box", 1, most)
    limits = {**_TILING, "split": (1, MOST_WGRAD_SPLITS)} if data["kernel"] in WGRAD_KERNELS else _TILING
    for name in limits.keys() & data.keys():
        check_whole(data[name], f"{where}.{name}", *limits[name])
    if not isinstance(data.get("pdl", False), bool):
        refuse(f"{where}.pdl", data["pdl"], "true or false")
    try:
        config = ConvConfig.from_dict(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    check_whole(config.bm, f"{where}.box (its product)", 16, 1024)
    return config


def _versions(data: Any, where: str) -> dict[str, str]:
    if not isinstance(data, dict) or len(data) > 16:
        refuse(where, data, "an object of at most 16 names and versions")
    for name, version in data.items():
        if not isinstance(version, str) or len(name) + len(version) > 200:
            refuse(f"{where}.{name:.50}", version, "a short text")
    return data

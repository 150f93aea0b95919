"""Arguments and helpers that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..compare import is_out_of_memory, untrained
from ..models import names
from ..sources import load_model

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--model-kwargs`` and ``--weights``, read by :func:`model_of`."""
    parser.add_argument(
        "--model",
        default="resnet50",
        help="a network of this package (default: resnet50; also plain34, cifar_resnet20, cifar_plain20, "
        "preact_cifar_resnet164), torchvision:NAME, timm:NAME, hf:FOLDER, or package.module:function (a function of no "
        "arguments that returns the model)",
    )
    model_kwargs_argument(parser)
    parser.add_argument(
        "--weights",
        help="a file (.pth, .pt, .th, .safetensors, ..., .caffemodel), or a name of torchvision's weights, which is "
        "downloaded; the default is random weights",
    )


def model_kwargs_argument(parser: argparse.ArgumentParser) -> None:
    """``--model-kwargs``: pairs of a name and a value."""
    parser.add_argument(
        "--model-kwargs",
        type=keyword,
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="arguments of a network of this package, such as shortcut=A stride_in_1x1=true",
    )


def keyword(text: str) -> tuple[str, Any]:
    """``NAME=VALUE``, for argparse."""
    try:
        return names.keyword(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_of(args: argparse.Namespace) -> nn.Module:
    """The model that the arguments name, in eval mode, not converted; raises as ``load_model``."""
    return load_model(args.model, weights=args.weights, arguments=dict(args.model_kwargs))


def image_arguments(parser: argparse.ArgumentParser, batch: int = 1) -> None:
    """``--batch``, ``--size`` and ``--channels``, read by :func:`input_shape`."""
    parser.add_argument("--batch", type=positive, default=batch, help=f"images at a time (default: {batch})")
    size_arguments(parser)


def size_arguments(parser: argparse.ArgumentParser) -> None:
    """``--size H [W]`` and ``--channels``."""
    parser.add_argument(
        "--size",
        "--input-size",
        type=positive,
        nargs="+",
        default=[224],
        metavar=("H", "W"),
        help="image height and width in pixels; one number is both (default: 224)",
    )
    parser.add_argument("--channels", type=positive, help="of the images (default: those that the model's stem takes)")


def positive(text: str) -> int:
    """An integer above 0, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """A number of minutes above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of minutes above 0, got {text!r}")
    return value


def height_and_width(size: Sequence[int]) -> tuple[int, int]:
    """What ``--size`` means.

    Raises:
        ValueError: for more than two numbers.
    """
    if len(size) > 2:
        raise ValueError(f"--size takes a height and a width, got {len(size)} numbers")
    return size[0], size[-1]


def input_shape(args: argparse.Namespace, model: nn.Module) -> tuple[int, int, int, int]:
    """``(N, C, H, W)`` of the images that the arguments ask for."""
    return (args.batch, args.channels or channels_of(model), *height_and_width(args.size))


def channels_of(model: nn.Module) -> int:
    """Channels that the first convolution of a model takes; 3 where there is none."""
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)


def device_of(name: str | None) -> torch.device:
    """The device to compute on: the one named, else a GPU where there is one, else the CPU.

    Raises:
        ValueError: for a name that is no device, or a GPU that is not there.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is no device; allowed: cpu, cuda, cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name!r} is not supported; allowed: cpu, cuda, cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name!r}: there are {torch.cuda.device_count()} CUDA devices; resnet-triton info")
    return device


def progress(items: Iterable[T], what: str, args: argparse.Namespace, unit: str = "it") -> Iterable[T]:
    """``items`` under a progress bar on stderr; none with ``--json`` or where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit=unit, file=sys.stderr, disable=True if args.json else None, leave=False)


def output_file(path: str, suffixes: Sequence[str], force: bool) -> Path:
    """Where a command will write, checked before any work.

    Raises:
        ValueError: for another suffix.
        OSError: where nothing can be written, or a file is there and ``force`` is False.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() not in suffixes:
        raise ValueError(f"--output {path!r} has suffix {target.suffix!r}; allowed: {', '.join(suffixes)}")
    if target.is_dir():
        raise IsADirectoryError(f"--output {path!r} is a folder; name a file in it")
    if target.exists() and not force:
        raise FileExistsError(f"--output {path!r} exists; pass --force to overwrite it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--output {path!r}: there is no folder {str(target.parent)!r}")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"--output {path!r}: the folder {str(target.parent)!r} cannot be written to")
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A file beside ``target`` to write to, which takes its place at the end, or is removed when anything fails."""
    part = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # some writers make files that only their owner reads
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def in_one_line(what: str, step: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """``step(...)``, in which the user's own model runs: what that raises becomes one line that starts with ``what``.

    Raises:
        ValueError: for any exception but running out of memory.
    """
    try:
        return step(*args, **kwargs)
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, ValueError):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{what}: {type(error).__name__}: {first}") from error


def note_random_weights(args: argparse.Namespace, model: nn.Module, consequence: str = "") -> bool:
    """Whether a model has random weights, which is said on stderr."""
    random = args.weights is None and untrained(model)
    if random:
        print(f"{args.model} has random weights (--weights loads real ones){consequence}", file=sys.stderr)
    return random


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns under a head."""
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)

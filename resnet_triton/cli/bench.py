"""``resnet-triton bench``: is it faster for this model, on this machine?"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .. import compare
from ..backend import dot_precision
from ..compare import Group, Watch
from ..convert import convert, is_converted, unconvert
from ..errors import tensors_of
from ..providers import absent_on, providers_on
from ..results import FAILED, WRITERS, WRONG, Row, environment, write
from ..tables import LEGEND, MODEL_COLUMNS, busy, cells, conditions, plain
from ..verdict import NOT_MEASURED, SLOWER, Verdict, verdict
from .common import (
    DTYPES,
    channels_of,
    device_of,
    height_and_width,
    in_one_line,
    minutes,
    model_arguments,
    model_of,
    output_file,
    positive,
    size_arguments,
)

HELP = "is it faster for this model? Exits 0 when it is, or is equal, and 1 when it is slower or wrong"
EXAMPLE = "resnet-triton bench --model timm:resnet50 --batch 1 64 --dtype bf16 fp32"
CALIBRATION_IMAGES = 4


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, shapes, dtypes, and how long."""
    model_arguments(parser)
    parser.add_argument("--batch", type=positive, nargs="+", default=[32], help="images at a time (default: 32)")
    size_arguments(parser)
    parser.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on the CPU")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--minutes", type=minutes, default=1.0, help="of timing; building comes on top (default: 1)")
    parser.add_argument(
        "--providers",
        nargs="+",
        metavar="NAME",
        help="who competes, named as in the table, spaces as hyphens (default: all on this device); eager always does, "
        "as the measure of errors",
    )
    parser.add_argument("--output", metavar="FILE", help="also write all rows to FILE.json or FILE.csv")
    parser.add_argument("--force", action="store_true", help="overwrite --output")


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table and the verdicts."""
    output = output_file(args.output, tuple(WRITERS), args.force) if args.output else None
    device = _device(args.device)
    left_out = _left_out(args.providers, device)
    height, width = height_and_width(args.size)
    # builders of this package return converted models
    model = unconvert(model_of(args).float(), inplace=True)
    images = _images(max(*args.batch, compare.EXTRA_IMAGES), args.channels or channels_of(model), height, width)
    what = f"{args.model} does not take an image of shape {tuple(images[:1].shape)}"
    in_one_line(what, _outputs, model, images[:1])  # before the clock starts: not every model fits every size
    notes = []
    if args.weights is None and compare.untrained(model):
        in_one_line("BN cannot get statistics; pass --weights", compare.calibrate, model, images[:CALIBRATION_IMAGES])
        notes.append("random weights, BN statistics of the random images, small last gammas; --weights takes yours")
    if not any(is_converted(m) for m in convert(model).modules()):
        notes.append(f"nothing in this model runs fused; why: resnet-triton convert --model {args.model}")
    dtypes = tuple(_dtype_name(name, device) for name in args.dtype or [_default_dtype(device)])
    env = environment("cpu" if device == "cpu" else None)
    rows: list[Row] = []
    verdicts: list[Verdict] = []
    with _Progress(quiet=args.json) as watch:
        for batch in args.batch:
            seconds = 60 * args.minutes / len(args.batch)
            group = Group(device, args.model, batch, height, tuple(dict.fromkeys(dtypes)), seconds, left_out)
            found = list(compare.measure(group, model, images, watch=watch).values())
            verdicts += [verdict([row for row in found if row.dtype == dtype]) for dtype in group.dtypes]
            rows += found
            if output:  # now: the next batch may be interrupted
                write(output, rows, env)
    if height != width:
        notes.append(f"images of {height} x {width} pixels; infer_img_size is their height")
    if args.json:
        report: dict[str, Any] = {"environment": env, "notes": notes, "verdicts": [asdict(v) for v in verdicts]}
        print(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        lines = [*plain(cells(rows, MODEL_COLUMNS)), "", LEGEND, conditions(env), *notes, *filter(None, [busy(rows)])]
        print("\n".join([*lines, "", *map(_line, verdicts)]))
    return _exit_code(rows, verdicts)


def _line(answer: Verdict) -> str:
    return f"batch {answer.batch}, {answer.dtype}: {answer.outcome}: {answer.text}"


def _exit_code(rows: list[Row], verdicts: list[Verdict]) -> int:
    outcomes = {answer.outcome for answer in verdicts}
    ours_failed = any(row.status.startswith(FAILED) and row.provider.startswith("ours") for row in rows)
    if outcomes & {SLOWER, WRONG} or (NOT_MEASURED in outcomes and ours_failed):
        return 1
    return 2 if NOT_MEASURED in outcomes else 0


def _device(name: str | None) -> str:
    device = device_of(name)
    if device.index:
        raise ValueError(f"--device {name}: bench measures the first device; choose it by CUDA_VISIBLE_DEVICES")
    return device.type


def _default_dtype(device: str) -> str:
    return "bf16" if device == "cuda" else "fp32"


def _dtype_name(name: str, device: str) -> str:
    """The name in the rows; PyTorch's default for fp32 on a GPU is TF32, and says so."""
    tf32 = device == "cuda" and name == "fp32" and dot_precision(torch.float32) == "tf32"
    return "tf32" if tf32 else str(DTYPES[name]).removeprefix("torch.")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _left_out(chosen: list[str] | None, device: str) -> tuple[str, ...]:
    """Names of the providers that do not take part.

    Raises:
        ValueError: for a name that does not compete on the device, or a choice without one of ours.
    """
    if chosen is None:
        return ()
    competing = {_slug(provider.name): provider for provider in providers_on(device)}
    unknown = [name for name in chosen if _slug(name) not in competing]
    if unknown:
        for provider in absent_on(device):
            if _slug(provider.name) == _slug(unknown[0]):
                raise ValueError(f"--providers {unknown[0]!r} is not installed: pip install {provider.package}")
        raise ValueError(f"--providers {unknown[0]!r} is not known on {device}; allowed: {', '.join(competing)}")
    slugs = {_slug(name) for name in chosen}
    if not any(competing[slug].ours for slug in slugs):
        allowed = ", ".join(slug for slug, provider in competing.items() if provider.ours)
        raise ValueError(f"--providers names none of ours to compare; add one of: {allowed}")
    baseline = next(iter(competing))
    return tuple(provider.name for slug, provider in competing.items() if slug not in slugs | {baseline})


def _images(count: int, channels: int, height: int, width: int) -> Tensor:
    """Random images, as timm's ``benchmark.py`` takes them; the same on every run."""
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _outputs(model: nn.Module, image: Tensor) -> list[Tensor]:
    return tensors_of(model(image))


class _Progress(Watch):
    """Bars on stderr: one while the providers are built and checked, one while they are timed."""

    def __init__(self, quiet: bool) -> None:
        self.disable = True if quiet else None  # None: only where stderr is a terminal
        self.phase = ""
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def stage(self, what: str, share: float) -> None:
        from tqdm import tqdm

        phase = "timing" if what == "timing" else "building"
        if phase != self.phase or share == 0:
            self._close()
            form = "{desc}{percentage:3.0f}%|{bar}| {elapsed}"
            self.bar = tqdm(desc=what, total=100, file=sys.stderr, leave=False, disable=self.disable, bar_format=form)
            self.phase = phase
        self.bar.set_description(what, refresh=False)
        self.bar.n = round(100 * share)
        self.bar.refresh()

    def say(self, text: str) -> None:
        self._close()
        self.phase = ""
        print(text, file=sys.stderr)

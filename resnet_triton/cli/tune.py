"""``resnet-triton tune``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import tuning
from ..backend import dot_precision
from ..convert import convert
from ..devices import Target, known_devices, target_of
from ..entries import PRECISIONS
from ..sites import AnySite, ChainSite, Site, merged, sites_of
from ..tune import Progress, Report, Result, tune
from .common import (
    DTYPES,
    channels_of,
    height_and_width,
    minutes,
    model_arguments,
    model_of,
    positive,
    size_arguments,
    table,
)

HELP = "measure the fastest configuration of every convolution and chain of a model on this GPU, or of training steps"
EXAMPLE = "resnet-triton tune --model resnet50 --batch 1 32 256 --dtype bf16 --minutes 20"
BATCHES, TRAIN_BATCHES = [1, 32, 256], [256]
PLANNED = "NVIDIA H200"  # what a dry run plans for where there is no GPU


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, batches, dtypes, time and output."""
    model_arguments(parser)
    parser.add_argument(
        "--train", action="store_true", help="the steps of training, forward and backward, instead of inference"
    )
    parser.add_argument("--batch", type=positive, nargs="+", help="default: 1 32 256, with --train 256")
    size_arguments(parser)
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=tuple(DTYPES), help="default: bf16")
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of fp32 convolutions: TF32 or exact (default: PyTorch's setting, which is TF32)",
    )
    parser.add_argument(
        "--minutes", type=minutes, help="stop by itself after this time; a later call goes on (default: no limit)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the tuned file (default: the user's cache)")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier call has finished")
    parser.add_argument("--dry-run", action="store_true", help="list what would be measured; needs no GPU")
    parser.add_argument(
        "--device", help="a CUDA device (default: cuda); with --dry-run also a known device name such as 'NVIDIA H200'"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, or lists what would be measured."""
    device, target = _device(args)
    folder = Path(args.output).expanduser() if args.output else tuning.cache_dir()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--output {args.output!r} is not a folder")
    model = convert(model_of(args), inplace=True)
    model.train(args.train)
    size = (args.channels or channels_of(model), *height_and_width(args.size))
    sites: list[AnySite] = []
    for dtype in dict.fromkeys(DTYPES[name] for name in args.dtype):
        precision = args.precision or dot_precision(dtype)
        for batch in dict.fromkeys(args.batch or (TRAIN_BATCHES if args.train else BATCHES)):
            sites += sites_of(model, (batch, *size), dtype, target, precision if dtype == torch.float32 else "tf32")
    del model
    sites = merged(sites)
    if args.dry_run:
        return _list(args, sites, target, folder)
    try:
        with _Bar(args) as bar:
            report = tune(sites, target, folder, device=device, minutes=args.minutes, fresh=args.fresh, progress=bar)
    except KeyboardInterrupt:
        print("what is finished is kept; the same command goes on where this one stops", file=sys.stderr)
        raise
    _print(args, report, target)
    return int(any(result.entry is None for result in report.results))


def _device(args: argparse.Namespace) -> tuple[str, Target]:
    """The torch device, and the GPU that it is.

    Raises:
        ValueError: there is no such GPU.
    """
    name = args.device or "cuda"
    if args.dry_run:
        if args.device is None and not torch.cuda.is_available():
            print(f"no CUDA device: planned for {PLANNED} (--device names another)", file=sys.stderr)
            name = PLANNED
        target = target_of(name)
        if not target.is_cuda:
            raise ValueError(f"--device {name!r} is no GPU; known: {', '.join(known_devices())}")
        return name, target
    if not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA device, and there is none; --dry-run lists what would be measured")
    if name in known_devices():
        present = torch.cuda.get_device_name()
        if present != name:
            raise ValueError(f"--device {name!r}: this machine has {present}; only --dry-run plans for another GPU")
        name = "cuda"
    target = target_of(name)
    if not target.is_cuda:
        raise ValueError(f"--device {name!r} is no CUDA device; allowed: cuda, cuda:0")
    return name, target


# What is printed


def _layers(site: AnySite) -> str:
    more = f" and {len(site.layers) - 1} more" if len(site.layers) > 1 else ""
    return f"{site.layers[0]}{more}"


def _dtype(site: AnySite) -> str:
    name = next(name for name, dtype in DTYPES.items() if dtype == site.dtype)
    return f"{name} {site.precision}" if site.dtype == torch.float32 else name


def _columns(site: AnySite) -> tuple[str, ...]:
    """Layers, shape, what runs besides, and dtype."""
    return _layers(site), str(site.shape), site.beside, _dtype(site)


def _site(site: AnySite) -> dict[str, Any]:
    found: dict[str, Any] = {"layers": list(site.layers), "shape": asdict(site.shape)}
    found |= {"dtype": str(site.dtype).removeprefix("torch."), "share": round(site.share, 4)}
    if isinstance(site, ChainSite):
        return found | {"gain": round(site.gain, 4)}
    found |= {"epilogue": site.beside} if isinstance(site, Site) else {"work": site.payload()["work"]}
    return found | ({"precision": site.precision} if site.dtype == torch.float32 else {})


def _sorted(sites: Iterable[AnySite], rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of convolutions, those of chains, and those of steps of training."""
    found: dict[str, list[dict[str, Any]]] = {"convolutions": [], "chains": [], "training": []}
    for site, row in zip(sites, rows, strict=True):
        found[_kind(site)].append(row)
    return found


def _kind(site: AnySite) -> str:
    return "convolutions" if isinstance(site, Site) else "chains" if isinstance(site, ChainSite) else "training"


def _counted(sites: Sequence[AnySite]) -> str:
    counts = Counter(map(_kind, sites))
    if counts["training"]:
        return f"{counts['training']} steps of training"
    return f"{counts['convolutions']} convolutions" + (f" and {counts['chains']} chains" if counts["chains"] else "")


def _list(args: argparse.Namespace, sites: list[AnySite], target: Target, folder: Path) -> int:
    """What would be measured, most valuable first."""
    file = folder / tuning.file_name(target.name)
    rows, lines = [], []
    for site in sites:
        count, ours, theirs = len(site.candidates(target)), site.ours_us(target), site.library_us(target)
        known = site.measured(target)
        measured = known.us if known else None
        row = {**_site(site), "candidates": count, "predicted_us": ours, "predicted_library_us": theirs or None}
        rows.append({**row, "measured_us": measured})
        before = "not measured" if measured is None else f"{measured:.1f}"
        beside = f"{theirs:.1f}" if theirs else "none"
        lines.append((*_columns(site), f"{site.share:.1%}", str(count), f"{ours:.1f}", beside, before))
    if args.json:
        print(json.dumps({"device": target.name, "file": str(file), **_sorted(sites, rows)}, indent=1))
        return 0
    head = ("layers", "shape", "with", "dtype", "share", "candidates", "predicted us", "cudnn predicted us",
            "measured us")  # fmt: skip
    print(table(head, lines))
    total = sum(row["candidates"] for row in rows)
    print(f"{_counted(sites)}, {total} candidates on {target.name}; the result would go to {file}")
    return 0


def _print(args: argparse.Namespace, report: Report, target: Target) -> None:
    rows, lines = [], []
    for result in report.results:
        site, entry, outcome = result.site, result.entry, result.outcome
        row: dict[str, Any] = {**_site(site), "outcome": outcome, "detail": result.detail}
        row["dropped"] = list(result.dropped)
        if entry:
            row |= {"us": entry.us, "library_us": entry.library_us, "config": entry.config.to_dict()}
        rows.append(row)
        lines.append((*_columns(site), *_outcome(result)))
    sites, left = [result.site for result in report.results], [_site(site) for site in report.left]
    if args.json:
        found = {"device": target.name, "file": str(report.file), **_sorted(sites, rows), "left": left}
        print(json.dumps(found, indent=1))
        return
    head = ("layers", "shape", "with", "dtype", "ours us", "cudnn us", "speedup", "config", "candidates")
    print(table(head, lines))
    for result in report.results:
        if result.entry is None:
            print(f"{_layers(result.site)}: {result.detail}", file=sys.stderr)
    dropped = sum(len(result.dropped) for result in report.results)
    if dropped:
        print(f"{dropped} candidates were dropped before they ran, because they spill or do not fit; --json lists them")
    print(f"{len(rows)} of {_counted([*sites, *report.left])} measured on {target.name}: {report.file}")
    if left:
        print(f"{len(left)} are left: the same command goes on where this one stopped")


def _outcome(result: Result) -> tuple[str, ...]:
    """Times, speed-up and configuration; then how many candidates ended how."""
    counts = ", ".join(f"{count} {status}" for status, count in sorted(result.outcome.items()))
    entry = result.entry
    if entry is None:
        return "none", "", "", "", counts
    theirs, speedup = "none", ""
    if entry.library_us:  # the Gram form has no library
        theirs, speedup = f"{entry.library_us:.1f}", f"{entry.library_us / entry.us:.2f}x"
    return f"{entry.us:.1f}", theirs, speedup, f"{entry.config.kernel} {entry.config}", counts


class _Bar:
    """Progress on stderr: a bar on a terminal, a line for each finished row elsewhere, nothing with --json."""

    def __init__(self, args: argparse.Namespace) -> None:
        from tqdm import tqdm

        self.quiet, self.terminal = args.json, sys.stderr.isatty()
        disable = self.quiet or not self.terminal
        self.bar = tqdm(desc="tune", unit="candidate", file=sys.stderr, disable=disable, leave=False)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, progress: Progress) -> None:
        self.bar.total = progress.of
        self.bar.update(progress.candidates - self.bar.n)
        for result in progress.fresh:
            ours, theirs, speedup, *_ = _outcome(result)
            beside = f", cudnn {theirs} us, {speedup}" if speedup else ""
            times = f"{ours} us{beside}" if result.entry else "no candidate works"
            text = f"{_layers(result.site)} {result.site.shape} {_dtype(result.site)}: {times}"
            if self.terminal:
                self.bar.set_postfix_str(text)
            elif not self.quiet:
                print(text, file=sys.stderr, flush=True)

"""``resnet-triton experiment``: the paper's experiments on small data."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import tables
from ..experiments import construction, cost, degradation, nets, output, plan, responses, shortcuts
from ..experiments.output import Report
from ..results import available_cores
from .common import device_of, minutes, positive, progress
from .train import number

HELP = "the paper's experiments: tables, a picture and a verdict from the numbers alone"
EXAMPLE = "resnet-triton experiment degradation --data digits --output runs/experiments"

#: What a recipe stands for where an experiment needs a part of it.
RECIPE_EPOCHS, RECIPE_LR = 164, 0.1

#: The experiments in the order of ``--help``, each with one line about it.
EXPERIMENTS = {
    "degradation": "plain against residual nets of growing depth: training and test errors (figure 6)",
    "responses": "standard deviations of the layers' responses, plain against residual (figure 7)",
    "construction": "identity blocks appended to a trained net leave its outputs unchanged; what training makes of it",
    "shortcuts": "options A, B and C: parameters, multiply-adds and errors (table 3)",
    "cost": "parameters, multiply-adds, latency and memory of every network, by depth and width",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand for each experiment."""
    subparsers = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, about in EXPERIMENTS.items():
        one = subparsers.add_parser(name, help=about, description=about)
        one.add_argument(
            "--output", required=True, metavar="DIR", help="folder of the results; trained nets in it are not repeated"
        )
        one.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
        # the command itself has --json too, and its default is the one that counts
        one.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
        _cost_arguments(one) if name == "cost" else _training_arguments(one, name)


def _training_arguments(one: argparse.ArgumentParser, name: str) -> None:
    one.add_argument("--data", default="digits", help=f"{plan.ALLOWED} (default: digits)")
    one.add_argument(
        "--seeds", type=positive, default=3, metavar="S", help="runs of each net, seeds 0 to S-1 (default: 3)"
    )
    if name == "degradation":
        _depths(one, [20, 32, 44, 56])
        _kinds(one, nets.KINDS)
    elif name == "responses":
        _depths(one, [20, 56])
        _kinds(one, nets.STAGED)
    elif name == "construction":
        one.add_argument(
            "--depths",
            type=positive,
            nargs=2,
            default=[20, 32],
            metavar=("N", "M"),
            help="layers of the trained and of the deepened net (default: 20 32)",
        )
        _kinds(one, nets.STAGED)
        one.add_argument("--further", type=positive, metavar="EPOCHS", help="of further training (default: a third)")
        one.add_argument(
            "--further-lr", type=number(0, 1e3), help="learning rate that it begins with (default: a tenth of --lr)"
        )
    else:
        _depths(one, [20])
        one.add_argument(
            "--options", nargs="+", choices=tuple(shortcuts.OPTIONS), default=["A", "B", "C"], help="default: A B C"
        )
    defaults = plan.DEFAULTS
    for option, kind, key, what in (
        ("--size", positive, "size", "height and width of the images"),
        ("--epochs", positive, "epochs", "passes over the training images"),
        ("--batch-size", positive, "batch_size", "images of a step"),
        ("--lr", number(0, 1e3), "lr", "highest learning rate of SGD"),
    ):
        shown = ", ".join(f"{data} {getattr(found, key) or 'as the recipe'}" for data, found in defaults.items())
        one.add_argument(option, type=kind, help=f"{what} (default: {shown})")
    one.add_argument(
        "--jobs", type=positive, help="runs at once, on the CPU with one thread each (default: the cores; on a GPU 1)"
    )


def _depths(one: argparse.ArgumentParser, default: list[int]) -> None:
    shown = " ".join(map(str, default))
    one.add_argument(
        "--depths", type=positive, nargs="+", default=default, metavar="N", help=f"6n+2 (default: {shown})"
    )


def _kinds(one: argparse.ArgumentParser, allowed: Iterable[str]) -> None:
    one.add_argument(
        "--kinds", nargs="+", choices=tuple(allowed), default=["plain", "residual"], help="default: plain residual"
    )


def _cost_arguments(one: argparse.ArgumentParser) -> None:
    known = dict.fromkeys(entry.family for entry in cost.FAMILY)
    one.add_argument(
        "--families", nargs="+", choices=tuple(known), metavar="NAME", help=f"default: all, {', '.join(known)}"
    )
    one.add_argument("--batch", type=positive, default=1, help="images of a forward (default: 1)")
    one.add_argument("--minutes", type=minutes, default=1.0, help="of timing; building comes on top (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Runs the experiment; prints its summary and verdict."""
    device, folder = device_of(args.device), Path(args.output).expanduser()
    if args.experiment == "cost":
        report, settings = _cost(args, device)
    else:
        with _Progress(quiet=args.json) as watch:
            report, settings = _trained(args, device, folder, watch)
    name = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    content = output.write(report, folder, settings, name, _command(args, settings))
    if args.json:
        print(json.dumps(content, indent=1))
        return 0
    print("\n".join([*tables.plain(report.cells()), "", *report.lines, "", f"files: {', '.join(content['files'])}"]))
    return 0


def _cost(args: argparse.Namespace, device: torch.device) -> tuple[Report, dict[str, Any]]:
    entries = [entry for entry in cost.FAMILY if args.families is None or entry.family in args.families]
    seconds = 60 * args.minutes / len(entries)
    report = cost.run(entries, args.batch, device, seconds, lambda each: progress(each, "cost", args, "net"))
    settings = {"families": args.families, "batch": args.batch, "minutes": args.minutes, "device": device.type}
    return report, settings


def _trained(
    args: argparse.Namespace, device: torch.device, folder: Path, watch: _Progress
) -> tuple[Report, dict[str, Any]]:
    chosen = plan.default_plan(args.data)
    own = {name: getattr(args, name) for name in ("size", "epochs", "batch_size", "lr")}
    own = {name: value for name, value in own.items() if value is not None}
    chosen = replace(chosen, data=args.data, device=str(device), **own)
    jobs = args.jobs or (1 if device.type == "cuda" else available_cores())
    settings: dict[str, Any] = {"data": chosen.data, "depths": args.depths, "seeds": args.seeds}
    settings |= {name: getattr(chosen, name) for name in ("size", "epochs", "batch_size", "lr", "schedule", "recipe")}
    settings |= {"device": device.type, "jobs": jobs}
    shared = (args.seeds, folder, jobs, watch)
    if args.experiment == "shortcuts":
        return shortcuts.run(chosen, args.options, args.depths, *shared), {"options": args.options, **settings}
    settings = {"kinds": args.kinds, **settings}
    if args.experiment == "construction":
        low, high = args.depths
        epochs = args.further or max(1, (chosen.epochs or RECIPE_EPOCHS) // 3)
        lr = (chosen.lr or RECIPE_LR) / 10 if args.further_lr is None else args.further_lr
        onward = construction.goes_on(chosen, epochs, lr)
        report = construction.run(chosen, args.kinds, (low, high), args.seeds, onward, folder, jobs, watch)
        return report, {**settings, "further": epochs, "further_lr": lr}
    experiment = degradation if args.experiment == "degradation" else responses
    return experiment.run(chosen, args.kinds, args.depths, *shared), settings


def _command(args: argparse.Namespace, settings: dict[str, Any]) -> str:
    """The command that gives the same again, whatever the defaults will be."""
    words = ["resnet-triton", "experiment", args.experiment]
    for name, value in settings.items():
        if value is not None and name not in ("schedule", "recipe", "jobs"):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join([*words, "--output", args.output])


class _Progress:
    """A bar of epochs on stderr, and a line for each net; nothing with ``--json``."""

    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet
        self.bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _say(self, text: str, always: bool = False) -> None:
        if always or not self.quiet:
            if self.bar is not None:
                self.bar.clear()
            print(text, file=sys.stderr, flush=True)

    def begin(self, runs: int, found: int, epochs: int) -> None:
        """How much there is to do."""
        self._close()
        self._say(f"{runs} trained nets are needed, {found} of them are there")
        if epochs and not self.quiet:
            from tqdm import tqdm

            self.bar = tqdm(total=epochs, unit="epoch", file=sys.stderr, disable=None, leave=False)

    def epoch(self, name: str, row: Mapping[str, Any]) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(f"{name}: {row['train_error']:.1%}", refresh=False)
            self.bar.update()

    def done(self, name: str, row: Mapping[str, Any]) -> None:
        """A line for a net."""
        self._say(f"{name}: training error {row['train_error_eval']:.2%}, test error {row['test_error']:.2%}")

    def stopped(self, finished: int, runs: int) -> None:
        """What is left of an interrupted experiment."""
        self._close()
        self._say(f"stopped: {finished} of {runs} nets are trained and kept; the same command goes on from there", True)

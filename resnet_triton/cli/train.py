"""``resnet-triton train``."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..models import names
from ..runs import build, config, curves, data, distributed, recipes, rng
from ..runs.checkpoint import Checkpoints, name_of
from ..runs.distributed import Processes
from ..runs.interrupt import Stop
from ..runs.loop import Trainer
from ..transfer import freeze
from .common import channels_of, device_of, in_one_line, model_kwargs_argument, positive

HELP = "train a converted model, with checkpoints from which the same command goes on"
#: Options that count more than a recipe's values, named as the settings that they are for.
OVERRIDES = (
    "epochs",
    "iterations",
    "batch_size",
    "lr",
    "schedule",
    "patience",
    "warmup",
    "init",
    "momentum",
    "weight_decay",
    "validation",
)
BUILT = "built"
EXAMPLE = "resnet-triton train --data digits --output runs/digits"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Data, output, model and how to train."""
    parser.add_argument(
        "--data",
        required=True,
        help=f"{data.ALLOWED} (imagefolder: a folder with train/CLASS/*.jpg and val/CLASS/*.jpg; cifar: the folder "
        "of its standard files, binary or python version)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run; made where it is not there")
    parser.add_argument(
        "--model",
        help="for small images cifar_resnetN with N = 6n+2 (short: resnet20), cifar_plainN or preact_cifar_resnetN, a "
        "builder of this package (resnet50), torchvision:NAME, timm:NAME, or package.module:function; its weights "
        f"start random (default: {_defaults('model')})",
    )
    model_kwargs_argument(parser)
    parser.add_argument(
        "--weights", help="begin with those of a file, or of torchvision by name; a classifier of other classes is new"
    )
    parser.add_argument(
        "--freeze",
        nargs="+",
        default=(),
        metavar="STAGE",
        help="parts of the model that do not learn and whose BN keeps its statistics (conv1 layer1)",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        action=_RecipeAction,
        help=f"{', '.join(recipes.RECIPES)}, or help, which lists what each means: defaults for augmentation, "
        "initialisation and the options below",
    )
    parser.add_argument("--size", type=positive, help="image height and width in pixels (default: 32, 28 or 224)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, help=f"default: {_defaults('epochs')}")
    length.add_argument(
        "--iterations", type=positive, metavar="STEPS", help="length in optimizer steps; the last epoch ends early"
    )
    parser.add_argument(
        "--batch-size", type=positive, help=f"images of a step, over all processes (default: {_defaults('batch_size')})"
    )
    parser.add_argument("--lr", type=number(0, 1e3), help="highest learning rate of SGD (default: 0.1)")
    parser.add_argument("--schedule", choices=config.SCHEDULES, help="default: cosine")
    parser.add_argument(
        "--drops",
        type=number(0, 1),
        nargs="+",
        metavar="SHARE",
        help="where --schedule step divides the learning rate by 10, as shares of the run (default: 0.5 0.75)",
    )
    parser.add_argument(
        "--patience",
        type=positive,
        metavar="EPOCHS",
        help="--schedule plateau divides it where the error has not fallen for so long (default: 5)",
    )
    parser.add_argument(
        "--warmup",
        type=number(0, 1e4),
        metavar="EPOCHS",
        help="rise of the learning rate, in place of a recipe's (default: a twentieth of the epochs, at most 5)",
    )
    parser.add_argument(
        "--init",
        choices=(*config.INITS, BUILT),
        help=f"draw the weights from N(0, sqrt(2/n)), as recipes do, or keep those that the model is built with "
        f"(default: {BUILT})",
    )
    parser.add_argument("--momentum", type=number(0, 1), help="default: 0.9")
    parser.add_argument("--nesterov", action="store_true", help="Nesterov's momentum")
    parser.add_argument("--weight-decay", type=number(0, 1), help="default: 1e-4")
    parser.add_argument("--label-smoothing", type=number(0, 1), default=0.0, help="default: 0")
    parser.add_argument(
        "--ema", type=number(0, 1), metavar="DECAY", help="also test, and save, a moving average of the weights (0.999)"
    )
    parser.add_argument(
        "--amp", choices=config.AMP, default="off", help="dtype of autocast (default: off, which is fp32)"
    )
    parser.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory format (default: on)"
    )
    parser.add_argument("--sync-bn", action="store_true", help="BN statistics over all processes (GPUs)")
    parser.add_argument("--deterministic", action="store_true", help="same bits on a GPU too; slower there")
    parser.add_argument("--seed", type=natural, default=0, help="of weights, order and augmentation (default: 0)")
    parser.add_argument(
        "--validation",
        type=positive,
        metavar="IMAGES",
        help="hold out so many training images and test with them, not with the test images (the paper's 5000)",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch the files of cifar10:PATH or cifar100:PATH where they are not"
    )
    parser.add_argument(
        "--workers",
        type=natural,
        help=f"processes that prepare batches (default: {_defaults('workers')}, at most the cores)",
    )
    parser.add_argument(
        "--save-every",
        type=positive,
        metavar="STEPS",
        help="checkpoints within an epoch too (default: after each epoch)",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        help="--resume: only go on; --no-resume: delete the run in DIR and start over "
        "(default: go on where there is one)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def _defaults(name: str) -> str:
    return ", ".join(f"{kind} {getattr(found, name)}" for kind, found in data.DEFAULTS.items())


class _RecipeAction(argparse.Action):
    """Keeps a recipe's name; ``help`` lists them and ends, as ``--help`` does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if values == "help":
            print(recipes.table())
            parser.exit()
        if values not in recipes.RECIPES:
            parser.error(f"argument --recipe: {values!r} is not known; allowed: {', '.join(recipes.RECIPES)}, help")
        namespace.recipe = values


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from ``low`` to ``high``, for argparse."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value

    return parse


def natural(text: str) -> int:
    """An integer of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Trains, or goes on; prints the errors reached."""
    kind = data.kind_of(args.data)
    with Stop() as stop, Processes(_device(args)) as processes:
        report = _Report(args, processes.writes)
        folder = Path(args.output).expanduser()
        with _only_run_in(folder, processes):
            if args.download:
                if processes.writes:
                    data.download(args.data)
                processes.from_first(None)  # the others wait
            trainer = _trainer(args, kind, processes, report)
            session = _Session(args, folder, trainer, report)
            session.start()
            finished = trainer.fit(lambda: processes.any(stop.requested), session.save, args.save_every, report)
            report.close()
            session.end(finished)
            if not finished:
                raise KeyboardInterrupt
    return 0


def _device(args: argparse.Namespace) -> torch.device:
    """The device of this process; of several on one machine, each has its own GPU."""
    device = device_of(args.device)
    if distributed.started() > 1 and device.type == "cuda":
        if device.index is not None:
            raise ValueError(
                f"--device {args.device!r}: under torchrun each process takes its own GPU; pass --device cuda"
            )
        device = device_of(f"cuda:{distributed.local_rank()}")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    return device


def _trainer(args: argparse.Namespace, kind: str, processes: Processes, report: _Report) -> Trainer:
    defaults = data.DEFAULTS[kind]
    spec, size = _model(args, kind), args.size or defaults.size
    # The data say how many classes the model needs, the model how many channels the images: a CIFAR ResNet takes any.
    rng.seed_all(args.seed)
    images = data.load_data(
        args.data,
        size,
        args.seed,
        recipe=args.recipe,
        validation=args.validation or 0,
        uint8=args.channels_last,  # its bytes are channels last, and so would be what is made of them
    )
    classes = len(images.classes)
    model = build.build(spec, classes, defaults.channels)
    settings = _settings(args, kind, len(images.train), model, processes)
    if settings.init is not None:
        recipes.initialise(model, settings.init)
    if args.weights is not None:
        began, new = build.begin_with(model, spec, args.weights)
        settings = replace(settings, weights=began)
        report.say(f"begins with {args.weights}{'; new are ' + ', '.join(new) if new else ''}")
    channels = channels_of(model)
    images.set_channels(channels)
    what = f"--model {spec} fails on images of {channels}x{size}x{size}"
    in_one_line(what, build.check_outputs, model.eval(), spec, classes, (channels, size, size))
    if settings.sync_bn:
        model = distributed.with_sync_bn(model, processes.device)
    freeze(model, args.freeze)
    layout = torch.channels_last if settings.channels_last else torch.preserve_format
    model.to(processes.device, memory_format=layout)  # type: ignore[call-overload]
    workers = min(defaults.workers, os.cpu_count() or 1) if args.workers is None else args.workers
    rng.seed_all(settings.seed + processes.rank)  # what a model draws while it trains differs between processes
    report.say(
        f"{spec} on {args.data}: {len(images.train)} training and {len(images.test)} {_tests(settings)} images, "
        f"{classes} classes, {settings.epochs} epochs on {processes.device}"
        + (f" and {processes.count - 1} more processes" if processes.count > 1 else "")
    )
    trainer = Trainer(settings, images, model, processes.device, processes, workers)
    if settings.recipe is not None:
        report.say(f"recipe {settings.recipe}: {recipes.describe(settings, trainer.whole)}")
    return trainer


def _model(args: argparse.Namespace, kind: str) -> str:
    recipe = None if args.recipe is None else recipes.RECIPES[args.recipe].model
    return names.spec(args.model or recipe or data.DEFAULTS[kind].model, dict(args.model_kwargs))


def _settings(
    args: argparse.Namespace, kind: str, images: int, model: torch.nn.Module, processes: Processes
) -> config.Settings:
    """What is said, else what the recipe says, else the defaults."""
    defaults = data.DEFAULTS[kind]
    chosen: dict[str, Any] = {"epochs": defaults.epochs, "batch_size": defaults.batch_size, "lr": defaults.lr}
    if args.recipe is not None:
        chosen |= recipes.RECIPES[args.recipe].settings(recipes.layers(model))
    given = {name: getattr(args, name) for name in OVERRIDES}
    if args.drops is not None:
        given["drops"] = tuple(args.drops)
    if args.warmup is not None:
        chosen["warmup_lr"] = chosen["warmup_error"] = None
    if args.epochs is not None:
        chosen["iterations"] = None
    chosen |= {name: value for name, value in given.items() if value is not None}
    if args.init == BUILT:
        chosen["init"] = None
    if chosen.get("iterations") is not None:
        chosen["epochs"] = math.ceil(chosen["iterations"] / max(1, images // chosen["batch_size"]))
    settings = config.Settings(
        **{"warmup": min(5.0, chosen["epochs"] / 20)} | chosen,
        data=kind,
        model=_model(args, kind),
        size=args.size or defaults.size,
        nesterov=args.nesterov,
        label_smoothing=args.label_smoothing,
        ema=args.ema,
        amp=args.amp,
        channels_last=args.channels_last,
        sync_bn=args.sync_bn,
        deterministic=args.deterministic,
        seed=args.seed,
        device=processes.device.type,
        processes=processes.count,
        recipe=args.recipe,
        freeze=tuple(args.freeze),
    )
    if settings.nesterov and not settings.momentum:
        raise ValueError("--nesterov needs a --momentum above 0")
    return settings


def _tests(settings: config.Settings) -> str:
    """What a run is tested with."""
    return "validation" if settings.validation else "test"


class _Session:
    """The folder of a run: where it begins, what is saved, and what is said at its end."""

    def __init__(self, args: argparse.Namespace, folder: Path, trainer: Trainer, report: _Report) -> None:
        self.args, self.folder, self.trainer, self.report = args, folder, trainer, report
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.configuration = config.configuration(trainer.settings, trainer.data.id, trainer.model)
        self.resumed: str | None = None
        self.board: curves.Board | None = None

    @property
    def id(self) -> str:
        """The configuration id."""
        return config.digest(self.configuration)

    def start(self) -> None:
        """Goes back to the last checkpoint, if any; the first process decides for all.

        Raises:
            ValueError: there is none and ``--resume``; it is damaged or of another configuration.
        """
        processes = self.trainer.processes
        name, error = None, None
        if processes.writes:
            try:
                name = self._chosen()
            except (ValueError, OSError) as found:
                error = found
        name, failed = processes.from_first((name, error is not None))
        if error is not None:
            raise error
        if failed:
            raise SystemExit(2)  # the first process says why
        if name is not None:
            self.trainer.restore(self.checkpoints.load(name))
            self.resumed = name
        if processes.writes:
            self.board = curves.Board(self.folder / "tensorboard", self.trainer.epoch)
            if not self.board.present:
                self.report.say("TensorBoard is not installed: the numbers of each epoch go to metrics.csv only")

    def _chosen(self) -> str | None:
        """The checkpoint to go on from, checked; the folder is made, or emptied of an earlier run."""
        names = self.checkpoints.names()
        if self.args.resume is False:
            self.checkpoints.clear()
            for file in ("metrics.csv", "curves.png"):
                (self.folder / file).unlink(missing_ok=True)
            return None
        if not names:
            if self.args.resume:
                raise FileNotFoundError(
                    f"--resume: there is no checkpoint in {str(self.checkpoints.folder)!r}; leave --resume out to start"
                )
            return None
        facts = self.checkpoints.load(names[-1]).facts
        if facts["id"] != self.id:
            different = "; ".join(config.differences(facts["configuration"], self.configuration))
            raise ValueError(
                f"checkpoint {str(self.checkpoints.folder / names[-1])!r} has configuration id {facts['id']}, this "
                f"command {self.id}: the checkpoint has {different}. Repeat the command of that run to go on with it, "
                "choose another --output, or pass --no-resume to delete that run and start over"
            )
        if facts["versions"] != (now := _versions(self.trainer.device)):
            older = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if now.get(k) != v)
            self.report.say(f"the run was begun with {older}: losses may differ in their last bits from here on")
        done = f"{facts['epoch']} epochs and {facts['step']} steps are done"
        self.report.say(f"going on from {names[-1]}: {done}")
        return names[-1]

    def save(self) -> None:
        """Writes a checkpoint and the table; keeps the last and the best. All processes must call it."""
        trainer = self.trainer
        facts, tensors = trainer.state()
        if not trainer.processes.writes:
            return
        name = name_of(trainer.epoch, trainer.step)
        keep = []
        if trainer.best is not None:
            keep = [name_of(trainer.best["epoch"], 0)]
        about = {"id": self.id, "configuration": self.configuration, "versions": _versions(trainer.device)}
        self.checkpoints.save(name, {**about, **facts}, tensors, keep)
        if trainer.step == 0:
            curves.write_metrics(self.folder / "metrics.csv", trainer.history)
            if self.board is not None and trainer.history:
                self.board.add(trainer.history[-1])

    def end(self, finished: bool) -> None:
        """Saves what is not saved yet, draws the curves, and prints what was reached."""
        trainer = self.trainer
        if not finished:
            self.save()
        if not trainer.processes.writes:
            return
        assert self.board is not None
        self.board.close()
        if trainer.history:
            curves.write_metrics(self.folder / "metrics.csv", trainer.history)
        picture = self._drawn()
        if not finished:
            where = f"epoch {trainer.epoch + 1}, step {trainer.step} of {trainer.steps}"
            self.report.say(f"stopped in {where}; the same command goes on from there", always=True)
            return
        self.report.result(self._facts(picture))

    def _drawn(self) -> Path | None:
        trainer, picture = self.trainer, self.folder / "curves.png"
        if not trainer.history:
            return None
        try:
            curves.draw_curves(picture, trainer.history, f"{trainer.settings.model} on {trainer.settings.data}")
        except ImportError as error:
            self.report.say(f"no curves.png: {error}")
            return None
        return picture

    def _facts(self, picture: Path | None) -> dict[str, Any]:
        trainer = self.trainer
        last, best = trainer.history[-1], trainer.best
        assert best is not None
        stem = "model" if trainer.ema is None else "ema"
        folder = self.checkpoints.folder
        return {
            "output": str(self.folder),
            "id": self.id,
            "recipe": trainer.settings.recipe,
            "tested_with": _tests(trainer.settings),
            "resumed_from": self.resumed,
            **{key: last[key] for key in ("train_loss", "train_error", "test_loss", "test_error", "ema_test_error")},
            "test_images": len(trainer.data.test),
            "epochs": len(trainer.history),
            "seconds": round(sum(row["seconds"] for row in trainer.history), 3),
            "last": str(folder / name_of(trainer.epoch, 0) / f"{stem}.safetensors"),
            "best": {**best, "weights": str(folder / name_of(best["epoch"], 0) / f"{stem}.safetensors")},
            "metrics": str(self.folder / "metrics.csv"),
            "curves": None if picture is None else str(picture),
        }


def _versions(device: torch.device) -> dict[str, str]:
    """What changes the last bits of a loss, but not what is trained."""
    gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if gpu else f"{platform.machine()}, {torch.get_num_threads()} threads"
    return {"resnet-triton": __version__, "torch": torch.__version__, "device": where}


@contextmanager
def _only_run_in(folder: Path, processes: Processes) -> Iterator[None]:
    """Makes the folder, and holds its lock, which ends with the process however that ends.

    Raises:
        ValueError: another run holds it.
        OSError: it cannot be written to.
    """
    if not processes.writes:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            import fcntl
        except ImportError:  # Windows
            pass
        else:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"--output {str(folder)!r}: another run is writing there; wait for it, or choose another folder"
                ) from None
        yield


class _Report:
    """Progress on stderr: a bar on a terminal, a line an epoch; nothing with --json. The result on stdout."""

    def __init__(self, args: argparse.Namespace, writes: bool) -> None:
        self.json, self.writes = args.json, writes
        self.quiet = args.json or not writes
        self.bar: Any = None
        self.what = "validation" if args.validation else "test"

    def say(self, text: str, always: bool = False) -> None:
        """A line on stderr, from the first process."""
        if self.writes and (always or not self.quiet):
            if self.bar is not None:
                self.bar.clear()
            print(text, file=sys.stderr, flush=True)

    def step(self, epoch: int, step: int, steps: int, loss: float | None) -> None:
        """Moves the bar of the epoch."""
        if self.quiet:
            return
        if self.bar is None:
            from tqdm import tqdm

            what = f"epoch {epoch + 1}"
            self.bar = tqdm(
                desc=what, total=steps, initial=step - 1, unit="step", file=sys.stderr, disable=None, leave=False
            )
        if loss is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self.bar.update()

    def epoch(self, row: Mapping[str, Any]) -> None:
        """A line for an epoch."""
        self.close()
        averaged = "" if row["ema_test_error"] is None else f", averaged {row['ema_test_error']:.2%}"
        self.say(
            f"epoch {row['epoch']}: training loss {row['train_loss']:.4f}, error {row['train_error']:.2%}; "
            f"{self.what} loss {row['test_loss']:.4f}, error {row['test_error']:.2%}{averaged}; {row['seconds']:.1f} s"
        )

    def close(self) -> None:
        """Takes the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def result(self, facts: Mapping[str, Any]) -> None:
        """What was reached."""
        if self.json:
            print(json.dumps(facts, indent=1))
            return
        best, what = facts["best"], facts["tested_with"]
        averaged = facts["ema_test_error"]
        more = "" if averaged is None else f", of the averaged weights {averaged:.2%}"
        print(
            f"{what} error {facts['test_error']:.2%} of {facts['test_images']} images{more} after {facts['epochs']} "
            f"epochs ({facts['seconds']:.0f} s); training error {facts['train_error']:.2%}"
        )
        print(f"weights: {facts['last']}")
        print(
            f"lowest {what} error: {best['test_error']:.2%} after epoch {best['epoch']}, chosen by the {what} images: "
            f"{best['weights']}"
        )
        print(f"per epoch: {facts['metrics']}" + (f", {facts['curves']}" if facts["curves"] else ""))

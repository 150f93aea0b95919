"""One run of an experiment: trained, kept, and found again by the next command.

``FOLDER/runs/plain-56-seed-0.json`` holds what determined the run and its epochs, ``.safetensors`` its weights. The
first is written last, so a run that was interrupted is not there, and is trained again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..runs import config, files, rng
from ..runs.data import Data, load_data
from ..runs.distributed import Processes
from ..runs.loop import Trainer
from ..runs.recipes import initialise
from . import nets
from .nets import Net
from .plan import Plan

FORMAT = 1
FOLDER = "runs"

#: Columns of an epoch. Errors are shares of images. ``train_error`` is the mean over the epoch as it went along, on
#: augmented images and with the BN statistics of each batch; ``train_error_eval`` that of the net after the epoch, in
#: eval mode, on all training images as they are.
COLUMNS = (
    "epoch",
    "lr",
    "train_loss",
    "train_error",
    "train_loss_eval",
    "train_error_eval",
    "test_loss",
    "test_error",
    "seconds",
)


@dataclass(frozen=True)
class Run:
    """What is trained.

    Args:
        net: the network.
        seed: of weights, order and augmentation.
        plan: how.
        start: another run of the same seed, finished, whose weights this one starts with; blocks that ``net`` has
            beyond it start as identities. None starts with random weights.
    """

    net: Net
    seed: int
    plan: Plan
    start: Run | None = None

    @property
    def title(self) -> str:
        """What it trains, without the seed."""
        return f"{self.net}" if self.start is None else f"{self.net}-from-{self.start.net.depth}"

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.title}-seed-{self.seed}"


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        run: what was trained.
        configuration: what determined it.
        rows: its epochs, by :data:`COLUMNS`.
        versions: what it was trained with.
    """

    run: Run
    configuration: dict[str, Any]
    rows: list[dict[str, Any]]
    versions: dict[str, Any]

    def last(self, column: str) -> float:
        """A number of the last epoch."""
        return self.rows[-1][column]


class Store:
    """The finished runs in a folder.

    Args:
        folder: of the experiments; runs are in a folder of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def find(self, run: Run, data: Data) -> Result | None:
        """A finished run; None where it is not there.

        Raises:
            ValueError: a run of this name is there that something else determined, or its file is damaged.
        """
        path = self.folder / f"{run.name}.json"
        if not path.exists():
            return None
        try:
            facts = json.loads(path.read_text())
            found, rows, versions = facts["configuration"], facts["rows"], facts["versions"]
            if facts["format"] != FORMAT or not (self.folder / f"{run.name}.safetensors").exists():
                raise ValueError("of another format, or without its weights")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); delete it to train that net again") from error
        wanted = configuration(run, data)
        if found != wanted:
            different = "; ".join(config.differences(found, wanted))
            raise ValueError(
                f"{str(path)!r} is of another run, which has {different}. Choose another --output, or delete that file "
                "to train that net again"
            )
        return Result(run, found, rows, versions)

    def model(self, run: Run, data: Data) -> nn.Module:
        """The trained network of a finished run, in eval mode, on the CPU.

        Raises:
            OSError: its weights are not there.
        """
        from safetensors.torch import load

        model = nets.build(run.net, len(data.classes), run.plan.channels)
        model.load_state_dict(load((self.folder / f"{run.name}.safetensors").read_bytes()))
        return model.eval()

    def keep(self, run: Run, data: Data, trainer: Trainer) -> None:
        """Writes a finished run.

        Raises:
            OSError: it cannot be written.
        """
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in trainer.model.state_dict().items()}
        files.replace_file(self.folder / f"{run.name}.safetensors", save(state, {"format": "pt"}))
        rows = [{column: row[column] for column in COLUMNS} for row in trainer.history]
        facts = {
            "format": FORMAT,
            "configuration": configuration(run, data),
            "versions": {"resnet-triton": __version__, "torch": torch.__version__},
            "rows": rows,
        }
        files.replace_file(self.folder / f"{run.name}.json", json.dumps(facts, indent=1).encode())


def data_of(plan: Plan, seed: int) -> Data:
    """The images of a plan's runs."""
    data = load_data(plan.data, plan.size, seed, recipe=plan.recipe)
    data.set_channels(plan.channels)
    return data


def configuration(run: Run, data: Data) -> dict[str, Any]:
    """What determines a run, as JSON holds it."""
    with torch.device("meta"):
        model = nets.build(run.net, len(data.classes), run.plan.channels)
    settings = run.plan.settings(run.title, run.seed, model, len(data.train))
    found = config.configuration(settings, data.id, model)
    if run.start is not None:
        found["start"] = config.digest(configuration(run.start, data))
    return json.loads(json.dumps(found))


def train(
    run: Run, store: Store, stop: Callable[[], bool], epoch: Callable[[Run, Mapping[str, Any]], None]
) -> Result | None:
    """Trains a run on one thread of the CPU, or on a GPU, and keeps it.

    One thread, so that the numbers do not depend on how many cores there are.

    Args:
        run: what to train; what it starts from must be there.
        store: where to keep it.
        stop: is asked after each step; True ends the run, and nothing is kept.
        epoch: is told of each epoch.

    Returns:
        The run, or None where it was stopped.

    Raises:
        ValueError: the loss is not finite.
    """
    with _one_thread(run.plan.device):
        rng.seed_all(run.seed)
        data = data_of(run.plan, run.seed)
        model = started(run, store, data)
        settings = run.plan.settings(run.title, run.seed, model, len(data.train))
        if settings.init is not None and run.start is None:
            initialise(model, settings.init)
        device = torch.device(run.plan.device)
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        rng.seed_all(run.seed)
        trainer = _Measured(settings, data, model, device, Processes(device))
        try:
            finished = trainer.fit(stop, lambda: None, None, _Watcher(run, epoch))
        except ValueError as error:
            raise ValueError(f"{run.name}: {error}") from error
        if not finished:
            return None
        store.keep(run, data, trainer)
        return store.find(run, data)


def started(run: Run, store: Store, data: Data) -> nn.Module:
    """The network of a run before its first step, in eval mode where its weights are another run's."""
    if run.start is None:
        return nets.build(run.net, len(data.classes), run.plan.channels)
    from .construction import deepened

    return deepened(store.model(run.start, data), run.net, len(data.classes), run.plan.channels)


class _Measured(Trainer):
    """Also measures the error on the training images in eval mode after each epoch."""

    def _evaluated(self, stop: Callable[[], bool]) -> dict[str, Any] | None:
        row = super()._evaluated(stop)
        if row is None:
            return None
        found = self._tested(self.model, stop, self.data.train)
        return None if found is None else row | {"train_loss_eval": found[0], "train_error_eval": found[1]}


class _Watcher:
    """Hands epochs on."""

    def __init__(self, run: Run, tell: Callable[[Run, Mapping[str, Any]], None]) -> None:
        self.run, self.tell = run, tell

    def step(self, epoch: int, step: int, steps: int, loss: float | None) -> None:
        """Nothing: epochs are short."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done."""
        self.tell(self.run, row)


@contextmanager
def _one_thread(device: str) -> Iterator[None]:
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def seeds_of(net: Net, plan: Plan, seeds: int) -> list[Run]:
    """The runs of a network with seeds 0, 1, ..."""
    return [Run(net, seed, plan) for seed in range(seeds)]


def further(run: Run, net: Net, plan: Plan) -> Run:
    """A run that goes on from another one, as a network with the same or more blocks."""
    return replace(run, net=net, plan=plan, start=run)

"""The training loop: steps, epochs and evaluation; what a checkpoint takes from it and gives back.

The state of a run lies between two optimizer steps: ``epoch`` and ``step`` (of the epoch; equal to ``steps`` while the
epoch waits for its evaluation), the sums of the present epoch, weights, optimizer, average, scaler, random states, and
what errors have changed in the learning rate.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import rng
from .checkpoint import Checkpoint
from .config import Settings
from .data import Data, Request, Split, evaluation_requests, loader, training_requests
from .distributed import Processes
from .schedule import Reached, learning_rate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOOK = 20  # steps between two looks at loss and training error, for each of which a GPU is waited for


class Watcher(Protocol):
    """What is told how a run goes."""

    def step(self, epoch: int, step: int, steps: int, loss: float | None) -> None:
        """``step`` of ``steps`` are done; ``loss`` is the mean of the epoch so far, now and then."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is done: its row of metrics.csv."""


class Trainer:
    """Trains a model.

    Args:
        settings: of the run.
        data: of the run.
        model: converted, on ``device``.
        device: to compute on.
        processes: this one and the others.
        workers: processes that prepare batches.

    Raises:
        ValueError: for a batch that the processes cannot share equally, or fewer images than one batch.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        model: nn.Module,
        device: torch.device,
        processes: Processes,
        workers: int = 0,
    ) -> None:
        self.settings, self.data, self.device, self.processes, self.workers = settings, data, device, processes, workers
        if settings.batch_size % processes.count:
            raise ValueError(
                f"--batch-size {settings.batch_size} counts the images of all processes, and {processes.count} cannot "
                f"share it equally; allowed: a multiple of {processes.count}"
            )
        self.whole = len(data.train) // settings.batch_size
        if not self.whole:
            raise ValueError(f"--batch-size {settings.batch_size} is more than the {len(data.train)} training images")
        self.model = model
        self.optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad],
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
            nesterov=settings.nesterov,
        )
        average = None if settings.ema is None else get_ema_multi_avg_fn(settings.ema)
        self.ema = None if average is None else AveragedModel(model, multi_avg_fn=average, use_buffers=True)
        self.parallel = processes.parallel(data.taken_by(model))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == "fp16")
        self.epoch, self.step = 0, 0
        self.seconds = 0.0
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss and wrong answers of this process
        self.recent = torch.zeros(1, dtype=torch.float64, device=device)  # wrong answers since the last look
        self.reached = Reached()
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    @property
    def steps(self) -> int:
        """Steps of the present epoch; where they are counted, the last one ends early."""
        left = (self.settings.iterations or math.inf) - self.epoch * self.whole
        return int(min(self.whole, left))

    # Running

    def fit(self, stop: Callable[[], bool], save: Callable[[], None], every: int | None, watcher: Watcher) -> bool:
        """Trains to the end, or until ``stop()``, which is asked after each step; then the state is ready to be saved.

        Args:
            stop: must give the same answer in all processes.
            save: is called after each epoch.
            every: and after every so many steps of an epoch.
            watcher: is told how it goes.

        Returns:
            Whether it came to the end.

        Raises:
            ValueError: the loss is not finite.
        """
        while self.epoch < self.settings.epochs:
            started = time.perf_counter() - self.seconds
            for loss in self._steps():
                self.seconds = time.perf_counter() - started
                watcher.step(self.epoch, self.step, self.steps, loss)
                if stop():
                    return False
                if every and self.step % every == 0 and self.step < self.steps:
                    self._check_finite()
                    save()
            row = self._evaluated(stop)
            if row is None:
                return False
            row["seconds"] = round(time.perf_counter() - started, 3)
            self._finish_epoch(row)
            save()
            watcher.epoch(row)
        return True

    def _steps(self) -> Iterator[float | None]:
        """Does the steps that are left of an epoch; gives the mean loss so far, now and then."""
        settings, processes = self.settings, self.processes
        requests = training_requests(
            len(self.data.train),
            settings.batch_size,
            self.epoch,
            settings.seed,
            start=self.step,
            rank=processes.rank,
            processes=processes.count,
        )[: self.steps - self.step]
        self.parallel.train()
        for images, labels in self._batches(self.data.train, requests):
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr()
            with self._autocast():
                logits = self.parallel(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.update_parameters(self.model)
            sums = _sums(loss.detach() * len(labels), logits, labels)
            self.sums += sums
            self.step += 1
            self._warm_up(sums[1])
            yield self._check_finite() if self.step % LOOK == 0 else None
        self._check_finite()

    def _lr(self) -> float:
        return learning_rate(self.settings, self.epoch * self.whole + self.step, self.whole, self.reached)

    def _warm_up(self, wrong: Tensor) -> None:
        """Ends a warm-up that waits for the training error, which is that of the last :data:`LOOK` steps."""
        settings, processes = self.settings, self.processes
        if settings.warmup_error is None or self.reached.warm:
            return
        self.recent += wrong
        if (self.epoch * self.whole + self.step) % LOOK == 0:
            error = processes.total(self.recent).item() / (LOOK * settings.batch_size)
            self.reached.warm = error < settings.warmup_error
            self.recent.zero_()

    def _check_finite(self) -> float:
        """The mean loss of the epoch so far on this process."""
        loss = self.sums[0].item() / max(1, self.step * self.settings.batch_size // self.processes.count)
        if loss - loss != 0:  # NaN or infinite
            raise ValueError(
                f"the loss is {loss} in epoch {self.epoch + 1}, before step {self.step + 1}: the training diverged. "
                f"Choose a lower --lr than {self.settings.lr} or a longer --warmup than {self.settings.warmup} epochs, "
                "and another --output"
            )
        return loss

    def _evaluated(self, stop: Callable[[], bool]) -> dict[str, Any] | None:
        """The row of the epoch that has just been trained; None where ``stop()`` came first."""
        count = self.steps * self.settings.batch_size
        train_loss, train_wrong = (self.processes.total(self.sums) / count).tolist()
        tested = [self._tested(model, stop) for model in self._models()]
        if None in tested:
            return None
        (test_loss, test_error), *averaged = (found for found in tested if found is not None)
        return {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": train_loss,
            "train_error": train_wrong,
            "test_loss": test_loss,
            "test_error": test_error,
            "ema_test_error": averaged[0][1] if averaged else None,
        }

    def _models(self) -> list[nn.Module]:
        """What is tested: the model, and its average."""
        return [self.model, *([] if self.ema is None else [self.ema.module])]

    def _tested(
        self, model: nn.Module, stop: Callable[[], bool], split: Split | None = None
    ) -> tuple[float, float] | None:
        """Mean loss and error in eval mode on the images of a split as they are; None is the test images."""
        processes = self.processes
        split = self.data.test if split is None else split
        processes.share_buffers(model)
        requests = evaluation_requests(
            len(split), self.settings.batch_size, rank=processes.rank, processes=processes.count
        )
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        model.eval()
        takes = self.data.taken_by(model)
        with torch.no_grad():
            for images, labels in self._batches(split, requests):
                if stop():
                    return None
                if len(labels):
                    with self._autocast():
                        logits = takes(images)
                    loss = F.cross_entropy(logits.float(), labels, reduction="sum")
                    sums += _sums(loss, logits, labels)
        loss, wrong = (processes.total(sums) / len(split)).tolist()
        return loss, wrong

    def _finish_epoch(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        if self.settings.schedule == "plateau":
            self.reached.tested(row["test_error"], self.settings.patience)
        error = row["test_error"] if row["ema_test_error"] is None else row["ema_test_error"]
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        if self.best is None or error < self.best["test_error"]:
            self.best = {"epoch": self.epoch, "test_error": error}

    def _batches(self, split: Split, requests: list[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        gpu = self.device.type == "cuda"
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        for images, labels in loader(split, requests, self.workers, pin=gpu):
            images = images.to(self.device, non_blocking=gpu)
            if images.is_floating_point():  # uint8 is channels last as it is
                images = images.contiguous(memory_format=layout)
            yield images, labels.to(self.device, non_blocking=gpu)

    def _autocast(self) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(self.device.type, DTYPES.get(amp, torch.bfloat16), enabled=amp != "off")

    # Saving

    def state(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """What a checkpoint needs: facts of JSON, and tensors on the CPU. All processes must call it."""
        mine = (*rng.state(self.device), self.sums.tolist(), self.recent.tolist())
        everyone = self.processes.gather(mine)
        optimizer = self.optimizer.state_dict()
        facts = {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "history": self.history,
            "best": self.best,
            "optimizer": _rows(optimizer["param_groups"]),
            "scaler": self.scaler.state_dict(),
            "reached": asdict(self.reached),
            "processes": [{"random": random, "sums": sums, "recent": recent} for random, _, sums, recent in everyone],
        }
        tensors = {
            "model": _copied(self.model.state_dict()),
            "optimizer": _copied(_flat(optimizer["state"])),
            "random": {f"{rank}.{k}": v for rank, (_, found, *_) in enumerate(everyone) for k, v in found.items()},
        }
        if self.ema is not None:
            tensors["ema"] = _copied(self.ema.state_dict())
        return facts, tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to the state of a checkpoint of this configuration.

        Raises:
            ValueError: it lacks a tensor, or has one too many or of another shape; nothing was changed.
        """
        facts, tensors = checkpoint.facts, checkpoint.tensors
        rank = self.processes.rank
        targets = {"model": self.model.state_dict()}
        if self.ema is not None:
            targets["ema"] = self.ema.state_dict()
        for stem, target in targets.items():
            _check_fit(tensors.get(stem, {}), target, f"{checkpoint.path / stem}.safetensors")
        mine = facts["processes"][rank]
        self.model.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors["ema"])
        self._restore_optimizer(facts["optimizer"], tensors["optimizer"])
        self.scaler.load_state_dict(facts["scaler"])
        self.epoch, self.step, self.seconds = facts["epoch"], facts["step"], facts["seconds"]
        self.history, self.best = facts["history"], facts["best"]
        self.reached = Reached(**facts.get("reached", {}))  # runs of before had none
        self.sums.copy_(torch.tensor(mine["sums"], dtype=torch.float64))
        self.recent.copy_(torch.tensor(mine.get("recent", [0.0]), dtype=torch.float64))
        named = {k.partition(".")[2]: v for k, v in tensors["random"].items() if k.startswith(f"{rank}.")}
        rng.restore(mine["random"], named, self.device)

    def _restore_optimizer(self, groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            number, _, name = key.partition(".")
            state.setdefault(int(number), {})[name] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        for (
            p,
            found,
        ) in self.optimizer.state.items():  # with the strides of the weights, for which there are fast kernels
            for name, value in found.items():
                if isinstance(value, Tensor) and value.shape == p.shape:
                    found[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def _sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss and the number of wrong answers, float64, on the device."""
    return torch.stack([loss.double(), (logits.argmax(1) != labels).sum().double()])


def _rows(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups as JSON can hold them."""
    return [{k: list(v) if k == "params" else v for k, v in group.items()} for group in groups]


def _flat(state: Mapping[int, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors of an optimizer as ``"number.name"``."""
    return {
        f"{number}.{name}": value
        for number, found in state.items()
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


def _copied(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, without memory in common.

    Raises:
        NotImplementedError: for an entry that is no tensor.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise NotImplementedError(
                f"the model's state has {type(value).__name__} under {name!r}; checkpoints hold tensors only. "
                "Remove its get_extra_state"
            )
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}


def _check_fit(found: Mapping[str, Tensor], target: Mapping[str, Tensor], file: str) -> None:
    wrong = sorted(found.keys() ^ target.keys())
    wrong += [k for k in found.keys() & target.keys() if found[k].shape != target[k].shape]
    if wrong:
        raise ValueError(
            f"checkpoint {file!r} does not fit the model: {len(wrong)} tensors are missing, unexpected or of another "
            f"shape ({', '.join(wrong[:4])}). Choose another --output, or pass --no-resume to start over"
        )

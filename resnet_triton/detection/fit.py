"""Training a detector, and detecting on a whole data set.

What a step does depends on the seed, the number of the step and the weights alone: its images, their mirroring, and
which anchors and regions are drawn. A run that goes on from a checkpoint therefore ends with the weights of one that
was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..runs.checkpoint import Checkpoint, Checkpoints, name_of
from ..runs.data import generator, mixed
from ..runs.interrupt import leave_group
from .data import DetectionData
from .metrics import Found
from .refine import refined

RECORD_EVERY = 20  # steps, in the history of a run

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


@dataclass(frozen=True)
class Recipe:
    """SGD as the paper's detectors were trained on VOC.

    Args:
        steps: optimizer steps.
        lr: learning rate at first.
        drops: steps after which it is a tenth of what it was.
        warmup: steps in which it rises linearly at first.
        momentum, weight_decay: of SGD.
        batch_size: images of a step.
        flip: mirror half of the images.
        max_norm: of the gradient, above which it is scaled down; None never does.
        seed: of order, mirroring and of what RPN and head train on.
    """

    steps: int = 80_000
    lr: float = 1e-3
    drops: tuple[int, ...] = (60_000,)
    warmup: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 1
    flip: bool = True
    max_norm: float | None = None
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        return self.lr * rise * 0.1 ** sum(step >= drop for drop in self.drops)


class Fit:
    """A detector in training.

    Args:
        model: from :func:`.c4.faster_rcnn_c4`, or any detector of torchvision's kind, on ``device``.
        data: what to train on; what its :meth:`.DetectionData.for_training` leaves out is left out.
        recipe: of the training.
        device: to compute on.
        workers: processes that read images.

    Raises:
        ValueError: there are fewer images than a batch, or nothing to train.
    """

    def __init__(
        self,
        model: nn.Module,
        data: DetectionData,
        recipe: Recipe,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        self.model, self.recipe, self.device, self.workers = model, recipe, torch.device(device), workers
        self.data = data.for_training()
        if len(self.data) < recipe.batch_size:
            raise ValueError(
                f"batch_size {recipe.batch_size} is more than the {len(self.data)} images with objects to train on"
            )
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.named:
            raise ValueError("every parameter of the model is frozen; train some with frozen_stages=4 or less")
        self.optimizer = torch.optim.SGD(
            self.named.values(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.step = 0
        self.history: list[dict[str, float]] = []

    def run(self, steps: int | None = None) -> Iterator[dict[str, float]]:
        """Trains to step ``steps`` (None: to the end of the recipe); gives the number and losses of each step.

        Raises:
            ValueError: a loss is not finite.
        """
        last = self.recipe.steps if steps is None else min(steps, self.recipe.steps)
        self.model.train()
        for images, targets in _loader(_Batches(self.data, self.recipe), range(self.step, last), self.workers):
            yield self._step(images, targets)

    def _step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, float]:
        recipe = self.recipe
        torch.manual_seed(mixed(recipe.seed, self.step, 2))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(self.step)
        losses = self.model([x.to(self.device) for x in images], [_on(t, self.device) for t in targets])
        total = torch.stack(list(losses.values())).sum()
        values = torch.stack([total, *losses.values()]).tolist()
        row = {"step": self.step + 1, **dict(zip(("loss", *losses), values, strict=True))}
        if row["loss"] - row["loss"] != 0:  # NaN or infinite
            raise ValueError(
                f"the loss is {row['loss']} in step {self.step + 1}: the training diverged. Choose a lower learning "
                f"rate than {recipe.lr}, or more steps of warm-up than {recipe.warmup}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if recipe.max_norm is not None:
            nn.utils.clip_grad_norm_(self.named.values(), recipe.max_norm)
        self.optimizer.step()
        self.step += 1
        if self.step % RECORD_EVERY == 0 or self.step == recipe.steps:
            self.history.append(row)
        return row

    def save(self, checkpoints: Checkpoints, about: Mapping[str, Any]) -> None:
        """Writes a checkpoint, which replaces the older ones.

        Args:
            checkpoints: of the run.
            about: facts of JSON beside those of this training.
        """
        states = {name: self.optimizer.state[p] for name, p in self.named.items() if p in self.optimizer.state}
        momentum = {name: state["momentum_buffer"] for name, state in states.items()}
        facts = {**about, "epoch": 0, "step": self.step, "history": self.history}
        checkpoints.save(
            name_of(0, self.step), facts, {"model": _copied(self.model.state_dict()), "momentum": _copied(momentum)}
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes back to the state of a checkpoint.

        Raises:
            ValueError: it does not fit the model.
        """
        from ..weights import load_weights

        load_weights(self.model, checkpoint.tensors["model"])
        for name, value in checkpoint.tensors["momentum"].items():
            p = self.named[name]
            self.optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(value)
        self.step, self.history = checkpoint.facts["step"], checkpoint.facts["history"]


def fit_detector(
    model: nn.Module,
    data: DetectionData,
    recipe: Recipe | None = None,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    watch: Callable[[dict[str, float]], object] | None = None,
) -> list[dict[str, float]]:
    """Trains a detector in place.

    Args:
        model, data, device, workers: see :class:`Fit`.
        recipe: None is the paper's for VOC.
        watch: is called with the losses of every step.

    Returns:
        The losses of every 20th step and of the last.
    """
    fit = Fit(model, data, recipe or Recipe(), device, workers)
    for row in fit.run():
        if watch is not None:
            watch(row)
    return fit.history


@torch.no_grad()
def detect(
    model: nn.Module,
    data: DetectionData,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
    workers: int = 0,
    refine: bool = False,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> list[Found]:
    """The detections on every image of a data set, for :mod:`.metrics`; the model is in eval mode afterwards.

    Args:
        model: a detector on ``device``.
        data: the images.
        device: to compute on.
        batch_size: images at a time.
        workers: processes that read images.
        refine: with box refinement, see :func:`.refine.refined`.
        progress: what shows how far it is; passes the batches on.
    """
    model.eval()
    positions = [list(range(len(data))[i : i + batch_size]) for i in range(0, len(data), batch_size)]
    found = []
    for images, _ in progress(_loader(_Chosen(data), positions, workers)):
        batch = [x.to(device) for x in images]
        for output in refined(model, batch) if refine else model(batch):
            found.append(Found(*(output[key].cpu().numpy() for key in ("boxes", "labels", "scores"))))
    return found


class _Chosen(Dataset):
    """Batches by the positions of their images."""

    def __init__(self, data: DetectionData) -> None:
        self.data = data

    def __getitem__(self, positions: Sequence[int]) -> Batch:
        images, targets = zip(*(self.data[i] for i in positions), strict=True)
        return list(images), list(targets)


class _Batches(Dataset):
    """The batch of each step: each epoch has an order of its own, without the images after its last whole batch."""

    def __init__(self, data: DetectionData, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe

    def __getitem__(self, step: int) -> Batch:
        size, seed = self.recipe.batch_size, self.recipe.seed
        epoch, place = divmod(step, len(self.data) // size)
        order = torch.randperm(len(self.data), generator=generator(seed, epoch, 0))[place * size : (place + 1) * size]
        mirror = torch.rand(size, generator=generator(seed, step, 1)) < 0.5
        images, targets = [], []
        for i, flip in zip(order.tolist(), mirror.tolist(), strict=True):
            image, target = self.data[i]
            if flip and self.recipe.flip:
                image, target = mirrored(image, target)
            images.append(image)
            targets.append(target)
        return images, targets


def mirrored(image: Tensor, target: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """An image and its target with left and right exchanged."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes}


def _loader(batches: Dataset, requests: Sequence[Any], workers: int) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,  # a request is a batch already
        sampler=requests,
        num_workers=min(workers, len(requests)),
        worker_init_fn=leave_group,
        generator=torch.Generator(),  # else it would draw from the model's
    )


def _on(target: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in target.items()}


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}

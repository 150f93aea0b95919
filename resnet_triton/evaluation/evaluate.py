"""The loop of an evaluation: views of images in batches, scores of each network, averages, errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import tensors_of
from ..runs.data import evaluation_requests, loader
from .errors import Errors
from .pixels import IMAGENET, Pixels
from .protocols import AVERAGES, Procedure


class Batch(NamedTuple):
    """Views of some images.

    Args:
        views: ``[V, C, H, W]``, of one size each.
        owners: of each of ``views``, the image in this batch, int64 ``[V]``.
        labels: of the images, int64.
    """

    views: list[Tensor]
    owners: list[Tensor]
    labels: Tensor


@dataclass
class Result:
    """What an evaluation found.

    Args:
        errors: of the average of all networks.
        single: of each network alone.
    """

    errors: Errors
    single: list[Errors]


class _Views:
    """Batches of views, as a DataLoader's worker makes them."""

    def __init__(self, images: Any, protocol: Procedure) -> None:
        self.images, self.protocol = images, protocol

    def __getitem__(self, request: Any) -> Batch:
        views: list[Tensor] = []
        owners: list[Tensor] = []
        labels = []
        for i, index in enumerate(request.indices):
            image, label = self.images[index]
            found = self.protocol.views(image)
            views += found
            owners += [torch.full((len(view),), i) for view in found]
            labels.append(int(label))
        return Batch(*_together(views, owners), torch.tensor(labels, dtype=torch.int64))


def _together(views: list[Tensor], owners: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Views of one size as one tensor each."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, view in enumerate(views):
        groups.setdefault(tuple(view.shape[1:]), []).append(i)
    indices = list(groups.values())
    return [torch.cat([views[i] for i in group]) for group in indices], [
        torch.cat([owners[i] for i in group]) for group in indices
    ]


def evaluate(
    models: nn.Module | Sequence[nn.Module],
    images: Any,
    protocol: Procedure,
    *,
    batch: int = 32,
    pixels: Pixels | Sequence[Pixels] = IMAGENET,
    average: str = "softmax",
    classes: int | None = None,
    workers: int = 0,
    watch: Callable[[Iterable[Batch]], Iterable[Batch]] = lambda batches: batches,
) -> Result:
    """Errors of a classifier, or of an ensemble, on labelled images.

    Args:
        models: networks in eval mode, converted or not; each computes on its own device, in its own dtype.
        images: ``len(images)`` and ``images[i] -> (image, label)``: PIL images, as torchvision's ImageFolder gives
            them, or normalised tensors ``[C, H, W]`` for :class:`.protocols.Plain`.
        protocol: one of :mod:`.protocols`.
        batch: crops that run at a time; of larger views, as many as have so many pixels, but at least one.
        pixels: how bytes are normalised, for all networks or for each.
        average: ``"softmax"`` or ``"logits"``, see :mod:`.protocols`.
        classes: that the images have; another number of scores is refused.
        workers: processes that read and cut images.
        watch: is given the batches, and gives them back as they are wanted (a progress bar).

    Raises:
        ValueError: no image or network; a network in training mode, or whose scores are not finite or are not one a
            class; another ``average``.
    """
    members = [models] if isinstance(models, nn.Module) else list(models)
    normalise = [pixels] * len(members) if isinstance(pixels, Pixels) else list(pixels)
    if average not in AVERAGES:
        raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {average!r}")
    if not members or not len(images):
        raise ValueError(f"there is nothing to evaluate: {len(members)} networks on {len(images)} images")
    if len(normalise) != len(members):
        raise ValueError(f"pixels must be one for all networks or one each, got {len(normalise)} for {len(members)}")
    if any(m.training for model in members for m in model.modules()):
        raise ValueError("evaluate takes networks in eval mode: call model.eval() first")
    scorers = [_Scorer(protocol, model, to, average, batch) for model, to in zip(members, normalise, strict=True)]
    result = Result(Errors(), [Errors() for _ in members])
    requests = evaluation_requests(len(images), max(1, batch // protocol.count))
    pin = any(scorer.device.type == "cuda" for scorer in scorers)
    views: Any = _Views(images, protocol)
    for found in watch(loader(views, requests, workers, pin)):
        scores = [scorer(found) for scorer in scorers]
        _check(scores, found.labels, classes)
        for errors, its in zip(result.single, scores, strict=True):
            errors.add(its, found.labels)
        result.errors.add(torch.stack(scores).mean(0), found.labels)
    return result


class _Scorer:
    """A network's average scores of images."""

    def __init__(self, protocol: Procedure, model: nn.Module, pixels: Pixels, average: str, batch: int) -> None:
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = first.device, first.dtype
        self.model, self.pixels, self.average = protocol.scorer(model), pixels, average
        self.batch, self.size = batch, protocol.size

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Scores ``[images, classes]`` of a batch, float64 on the CPU."""
        total = None
        for views, owners in zip(batch.views, batch.owners, strict=True):
            height, width = views.shape[2:]
            room = self.batch if self.size is None else self.batch * self.size**2 // (height * width)
            most = max(1, room)
            for part, its in zip(views.split(most), owners.split(most), strict=True):
                found = self._scores(part)
                if total is None:
                    total = found.new_zeros(len(batch.labels), found.shape[1])
                total.index_add_(0, its.to(found.device), found)
        assert total is not None
        counts = torch.cat(batch.owners).bincount(minlength=len(total)).to(total.device)
        return (total / counts[:, None]).cpu()

    def _scores(self, views: Tensor) -> Tensor:
        x = self.pixels(views.to(self.device, non_blocking=True)).to(self.dtype)
        logits = tensors_of(self.model(x.contiguous(memory_format=torch.channels_last)))[0]
        if logits.dim() not in (2, 4) or len(logits) != len(views):
            came = tuple(logits.shape)
            raise ValueError(f"a classifier gives one score an image and class; the network gives {came}")
        # float64: in fp32 small softmaxes become zero, and ties
        logits = logits.double()
        scores = logits.softmax(1) if self.average == "softmax" else logits
        return scores.flatten(2).mean(2) if scores.dim() == 4 else scores


def _check(scores: list[Tensor], labels: Tensor, classes: int | None) -> None:
    found = sorted({its.shape[1] for its in scores})
    if len(found) > 1:
        raise ValueError(f"networks of an ensemble must score the same classes, got {found}")
    if classes not in (None, *found):
        raise ValueError(
            f"the network scores {found[0]} classes, the images have {classes}; both must have the same classes, in "
            "the order of the network's outputs (folders of classes in the order of their names)"
        )
    if int(labels.max()) >= found[0]:
        raise ValueError(f"label {int(labels.max())} is none of the {found[0]} classes that the network scores")
    if not all(its.isfinite().all() for its in scores):
        raise ValueError("scores are not finite; check the weights, or choose bf16 or fp32 instead of fp16")

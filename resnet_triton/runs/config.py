"""What determines a run, and the configuration id that every checkpoint carries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

FORMAT = 1  # of checkpoints; another one is refused

AMP = ("off", "bf16", "fp16")
SCHEDULES = ("cosine", "step", "constant", "plateau")
INITS = ("fan_in", "fan_out")


@dataclass(frozen=True)
class Settings:
    """Everything a user chooses that changes the numbers of a run.

    Args:
        data: kind of the data: ``digits``, ``mnist5k``, ``imagefolder``, ``cifar10`` or ``cifar100``.
        model: as ``--model`` names it.
        size: height and width of the images in pixels.
        epochs: passes over the training images; with ``iterations``, the last one ends early.
        batch_size: images of one optimizer step, over all processes.
        lr: the highest learning rate.
        schedule: one of :data:`SCHEDULES`.
        warmup: epochs in which the learning rate rises linearly to ``lr``.
        weight_decay, momentum, nesterov: of SGD.
        label_smoothing: of the cross entropy, 0 to 1.
        ema: decay of the moving average of the weights, a step; None keeps none.
        amp: one of :data:`AMP`: the dtype of autocast; fp16 comes with a GradScaler.
        channels_last: memory format of images and weights.
        sync_bn: BN statistics over all processes.
        deterministic: only algorithms that give the same bits each time (on a GPU).
        seed: of weights, order and augmentation.
        device: ``cpu`` or ``cuda``.
        processes: how many share a batch.
        recipe: name in :data:`resnet_triton.runs.recipes.RECIPES`, which the values here come from where the user said
            nothing else, and the augmentation.
        iterations: optimizer steps in all; None is whole epochs.
        drops: where the schedule ``step`` divides the learning rate by 10, as shares of the run.
        patience: epochs without progress after which the schedule ``plateau`` does.
        init: one of :data:`INITS`; None leaves the model as its builder makes it.
        warmup_lr: a lower learning rate to begin with; None begins with ``lr``, or with ``warmup``.
        warmup_iterations: steps with ``warmup_lr``.
        warmup_error: in place of these: it ends when the training error is below this.
        validation: training images held out and tested with, in place of the test images.
        weights: digest of the weights that the run begins with; None begins with random ones.
        freeze: names of modules that do not learn, see :func:`resnet_triton.freeze`.
    """

    data: str
    model: str
    size: int
    epochs: int
    batch_size: int
    lr: float
    schedule: str = "cosine"
    warmup: float = 0.0
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = False
    label_smoothing: float = 0.0
    ema: float | None = None
    amp: str = "off"
    channels_last: bool = True
    sync_bn: bool = False
    deterministic: bool = False
    seed: int = 0
    device: str = "cpu"
    processes: int = 1
    recipe: str | None = None
    iterations: int | None = None
    drops: tuple[float, ...] = (0.5, 0.75)
    patience: int = 5
    init: str | None = None
    warmup_lr: float | None = None
    warmup_iterations: int = 0
    warmup_error: float | None = None
    validation: int = 0
    weights: str | None = None
    freeze: tuple[str, ...] = ()


#: Settings that came later: left out of the configuration where they are as before, so that older runs go on.
LATER = (
    "recipe",
    "iterations",
    "drops",
    "patience",
    "init",
    "warmup_lr",
    "warmup_iterations",
    "warmup_error",
    "validation",
    "weights",
    "freeze",
)


def configuration(settings: Settings, data_id: str, model: nn.Module) -> dict[str, Any]:
    """The settings, as JSON holds them, with digests of the data and of the model's names and shapes."""
    before = {field.name: field.default for field in fields(settings) if field.name in LATER}
    chosen = {k: v for k, v in asdict(settings).items() if k not in before or v != before[k]}
    shapes = [(name, list(value.shape), str(value.dtype)) for name, value in model.state_dict().items()]
    return {**json.loads(json.dumps(chosen)), "data_id": data_id, "model_id": digest(shapes)}


def digest(facts: Any) -> str:
    """16 hexadecimal digits that stand for what JSON can hold."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between the configuration of a checkpoint and the one asked for, in words."""
    missing = object()
    names = {"data_id": "the images of --data", "model_id": "the names and shapes of the model's weights"}
    lines = []
    for key in dict.fromkeys((*wanted, *found)):
        came, asked = found.get(key, missing), wanted.get(key, missing)
        if came == asked:
            continue
        if key in names:
            lines.append(f"{names[key]} (digest {came} instead of {asked})")
        else:
            came, asked = ("nothing" if value is missing else value for value in (came, asked))
            lines.append(f"{key} = {came} instead of {asked}")
    return lines

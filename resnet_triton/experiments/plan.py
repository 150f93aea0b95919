"""What all runs of an experiment have in common: data and training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..runs.config import Settings
from ..runs.data import kind_of
from ..runs.recipes import RECIPES, layers

#: The data sets of the experiments, as ``--data`` names them.
ALLOWED = "digits, mnist5k, cifar10:PATH"


@dataclass(frozen=True)
class Plan:
    """Data and training of every run; what is None is the recipe's.

    Args:
        data: as ``--data`` names it.
        size: height and width of the images in pixels.
        channels: of the images.
        epochs: passes over the training images.
        batch_size: images of one optimizer step.
        lr: the highest learning rate.
        schedule: ``step`` is the paper's: a tenth from half of the epochs on, a hundredth from three quarters on.
        warmup: epochs in which the learning rate rises to ``lr``.
        recipe: a name in :data:`resnet_triton.runs.recipes.RECIPES`.
        device: ``cpu`` or ``cuda``.
    """

    data: str
    size: int
    channels: int
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    schedule: str | None = "step"
    warmup: float | None = 1.0
    recipe: str | None = None
    device: str = "cpu"

    def settings(self, name: str, seed: int, model: nn.Module, images: int) -> Settings:
        """The settings of one run.

        Args:
            name: of what is trained.
            seed: of weights, order and augmentation.
            model: what is trained; a recipe may depend on its depth.
            images: to train on.
        """
        chosen: dict[str, Any] = {}
        if self.recipe is not None:
            chosen = {**RECIPES[self.recipe].settings(layers(model)), "recipe": self.recipe}
        own = {name: getattr(self, name) for name in ("epochs", "batch_size", "lr", "schedule", "warmup")}
        chosen |= {name: value for name, value in own.items() if value is not None}
        if self.warmup is not None:
            chosen |= {"warmup_lr": None, "warmup_error": None}
        if self.epochs is not None:
            chosen.pop("iterations", None)
        elif chosen.get("iterations"):
            chosen["epochs"] = math.ceil(chosen["iterations"] / max(1, images // chosen["batch_size"]))
        return Settings(data=kind_of(self.data), model=name, size=self.size, seed=seed, device=self.device, **chosen)


#: What is taken for a kind of data where nothing else is said. Digits of 8 pixels, or a learning rate of 0.1, are too
#: little and too much for residual nets of 56 layers; CIFAR-10 has the paper's recipe.
DEFAULTS = {
    "digits": Plan("digits", size=12, channels=1, epochs=8, batch_size=64, lr=0.05),
    "mnist5k": Plan("mnist5k", size=14, channels=1, epochs=10, batch_size=64, lr=0.05),
    "cifar10": Plan("cifar10", size=32, channels=3, schedule=None, warmup=None, recipe="paper-cifar"),
}


def default_plan(data: str) -> Plan:
    """What ``--data`` means where nothing else is said.

    Raises:
        ValueError: for other data.
    """
    kind = data.partition(":")[0]
    if kind not in DEFAULTS:
        raise ValueError(f"--data {data!r} is not known here; allowed: {ALLOWED}")
    kind_of(data)
    return DEFAULTS[kind]

"""Named ways to train: ``--recipe``.

``paper-imagenet``  section 3.4 of https://arxiv.org/abs/1512.03385
``paper-cifar``     its section 4.2
``preact-cifar``    appendix of https://arxiv.org/abs/1603.05027
``torchvision``     the reference script behind torchvision's first ResNet weights (IMAGENET1K_V1)

A recipe is a set of defaults: what is said on the command line beside it counts. What the papers leave open is chosen
here: the plateau rule (:mod:`resnet_triton.runs.schedule`), the initialisation of the classifier, and over how many
steps the training error of the warm-up is taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import INITS, Settings

PHOTOGRAPHS = ("imagefolder",)
SMALL_IMAGES = ("cifar10", "cifar100", "digits", "mnist5k")

#: In words, by the name that a recipe has it under.
AUGMENTATIONS = {
    "scale-crop-colour": "shorter side 256 to 480 of a 224 crop, random crop, mirror, PCA colour",
    "resized-crop": "crop of 8 to 100 % of the area, aspect 3/4 to 4/3, mirror",
    "pad-crop": "4 pixels of border, random crop, mirror",
}


@dataclass(frozen=True)
class Recipe:
    """A way to train.

    Args:
        source: what it follows.
        data: the kinds of ``--data`` that it is for.
        augmentation: of :data:`AUGMENTATIONS`; digits keep their own, since a mirrored digit is another shape.
        per_pixel_mean: subtract from each pixel its mean over the training images, of CIFAR; else every image is
            normalised by a mean and a deviation a channel.
        init: of :data:`resnet_triton.runs.config.INITS`.
        batch_size: images of a step.
        lr: the learning rate.
        schedule: of :data:`resnet_triton.runs.config.SCHEDULES`.
        iterations, epochs: its length, in one of the two.
        milestones: where ``step`` divides the learning rate by 10, in the same unit.
        warmup_lr: a lower learning rate to begin with,
        warmup_iterations: for so many steps,
        warmup_error: or until the training error is below this,
        warmup_layers: in networks of at least so many layers.
        momentum, weight_decay: of SGD.
        model: where ``--model`` names none; None is that of the data.
    """

    source: str
    data: tuple[str, ...]
    augmentation: str
    init: str
    batch_size: int
    lr: float
    schedule: str
    iterations: int | None = None
    epochs: int | None = None
    milestones: tuple[int, ...] = ()
    per_pixel_mean: bool = False
    warmup_lr: float | None = None
    warmup_iterations: int = 0
    warmup_error: float | None = None
    warmup_layers: int = 0
    momentum: float = 0.9
    weight_decay: float = 1e-4
    model: str | None = None

    def settings(self, layers: int) -> dict[str, Any]:
        """The fields of :class:`resnet_triton.runs.config.Settings` that it decides, for a network of so many layers.

        ``milestones`` become shares of the length, so that a run made shorter goes through the whole schedule.
        """
        length = self.iterations or self.epochs or 0
        found: dict[str, Any] = {
            "init": self.init,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "schedule": self.schedule,
            "iterations": self.iterations,
            "epochs": self.epochs,
            "warmup": 0.0,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        if self.milestones:
            found["drops"] = tuple(milestone / length for milestone in self.milestones)
        if self.warmup_lr is not None and layers >= self.warmup_layers:
            found["warmup_lr"] = self.warmup_lr
            found["warmup_iterations"], found["warmup_error"] = self.warmup_iterations, self.warmup_error
        return found


RECIPES: Mapping[str, Recipe] = {
    "paper-imagenet": Recipe(
        source="1512.03385, section 3.4",
        data=PHOTOGRAPHS,
        augmentation="scale-crop-colour",
        init="fan_in",
        batch_size=256,
        lr=0.1,
        schedule="plateau",
        iterations=600_000,
    ),
    "paper-cifar": Recipe(
        source="1512.03385, section 4.2",
        data=SMALL_IMAGES,
        augmentation="pad-crop",
        per_pixel_mean=True,
        init="fan_in",
        batch_size=128,
        lr=0.1,
        schedule="step",
        iterations=64_000,
        milestones=(32_000, 48_000),
        warmup_lr=0.01,
        warmup_error=0.8,
        warmup_layers=110,
    ),
    "preact-cifar": Recipe(
        source="1603.05027, appendix",
        data=SMALL_IMAGES,
        augmentation="pad-crop",
        init="fan_in",
        batch_size=128,
        lr=0.1,
        schedule="step",
        iterations=64_000,
        milestones=(32_000, 48_000),
        warmup_lr=0.01,
        warmup_iterations=400,
        model="preact_cifar_resnet110",
    ),
    "torchvision": Recipe(
        source="references/classification of torchvision, IMAGENET1K_V1",
        data=PHOTOGRAPHS,
        augmentation="resized-crop",
        init="fan_out",
        batch_size=256,
        lr=0.1,
        schedule="step",
        epochs=90,
        milestones=(30, 60),
    ),
}


def recipe_for(name: str | None, kind: str) -> Recipe | None:
    """The recipe of a name, for a kind of ``--data``; None is none.

    Raises:
        ValueError: there is no such recipe, or it is for other data.
    """
    if name is None:
        return None
    if name not in RECIPES:
        raise ValueError(f"--recipe {name!r} is not known; allowed: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if kind not in recipe.data:
        others = ", ".join(other for other, found in RECIPES.items() if kind in found.data)
        raise ValueError(
            f"--recipe {name} is for --data {', '.join(recipe.data)}, got {kind}; allowed with {kind}: {others}"
        )
    return recipe


def layers(model: nn.Module) -> int:
    """Convolutions and fully connected layers of a network as its name counts them: projections are left out."""
    kinds = nn.Conv2d, nn.Linear
    return sum(isinstance(m, kinds) for name, m in model.named_modules() if "downsample" not in name.split("."))


@torch.no_grad()
def initialise(model: nn.Module, init: str) -> None:
    """Draws the weights of a model anew, as He et al. (https://arxiv.org/abs/1502.01852): N(0, sqrt(2 / n)).

    BN begins with weights 1 and biases 0. With ``fan_out`` a fully connected layer stays as it is, as torchvision's
    networks have it; with ``fan_in`` it is drawn like a convolution, with biases 0.

    Args:
        model: changed in place.
        init: ``fan_in``: n counts the inputs of a value, as the paper does; ``fan_out``: the outputs that one feeds.

    Raises:
        ValueError: for another ``init``.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and init == "fan_in"):
            nn.init.kaiming_normal_(module.weight, mode=init, nonlinearity="relu")  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def describe(settings: Settings, steps_per_epoch: int) -> str:
    """What a run with a recipe uses, on one line; of learning rates, at which step each begins."""
    steps = settings.iterations or settings.epochs * steps_per_epoch
    parts = [f"{steps} iterations of {settings.batch_size} images"]
    rate = f"learning rate {settings.lr:g}"
    if settings.schedule == "step":
        places = " and ".join(str(math.ceil(round(share * steps, 6))) for share in settings.drops)
        rate += f" divided by 10 at {places}"
    elif settings.schedule == "plateau":
        rate += f" divided by 10 where the error has not fallen for {settings.patience} epochs"
    elif settings.schedule == "cosine":
        rate += " falling along a cosine"
    parts.append(rate)
    if settings.warmup_lr is not None and settings.warmup_error is not None:
        parts.append(f"{settings.warmup_lr:g} until the training error is below {settings.warmup_error:.0%}")
    elif settings.warmup_lr is not None:
        parts.append(f"{settings.warmup_lr:g} for the first {settings.warmup_iterations}")
    elif settings.warmup:
        parts.append(f"rising over {settings.warmup:g} epochs")
    nesterov = " (Nesterov)" if settings.nesterov else ""
    parts.append(f"momentum {settings.momentum:g}{nesterov}, weight decay {settings.weight_decay:g}")
    if settings.init is not None:
        parts.append(f"weights N(0, sqrt(2 / {settings.init}))")
    augmentation = RECIPES[settings.recipe].augmentation if settings.recipe else None
    if settings.data in ("digits", "mnist5k"):
        parts.append("shifted, turned and scaled digits")
    elif augmentation is not None:
        parts.append(AUGMENTATIONS[augmentation])
    return ", ".join(parts)


def table() -> str:
    """Every recipe, as ``--recipe help`` prints them."""
    lines = []
    for name, recipe in RECIPES.items():
        unit = "iterations" if recipe.iterations else "epochs"
        length = f"{recipe.iterations or recipe.epochs} {unit}"
        rate = f"{recipe.lr:g}, a tenth " + (
            f"at {' and '.join(map(str, recipe.milestones))}" if recipe.milestones else "at each plateau of the error"
        )
        warm = "none"
        if recipe.warmup_lr is not None:
            until = f"{recipe.warmup_iterations} iterations"
            if recipe.warmup_error is not None:
                until = f"until the training error is below {recipe.warmup_error:.0%}"
            deep = f", networks of {recipe.warmup_layers} layers or more" if recipe.warmup_layers else ""
            warm = f"{recipe.warmup_lr:g}, {until}{deep}"
        mean = "mean of each pixel subtracted" if recipe.per_pixel_mean else "mean and deviation a channel"
        facts = {
            "after": recipe.source,
            "data": ", ".join(recipe.data),
            "length": f"{length}, batch {recipe.batch_size}",
            "learning rate": rate,
            "warm-up": warm,
            "SGD": f"momentum {recipe.momentum:g}, weight decay {recipe.weight_decay:g}",
            "initialisation": f"N(0, sqrt(2 / {recipe.init}))",
            "images": f"{AUGMENTATIONS[recipe.augmentation]}; {mean}",
        }
        lines += [name, *(f"  {key:15}{value}" for key, value in facts.items()), ""]
    return "\n".join(lines).rstrip()

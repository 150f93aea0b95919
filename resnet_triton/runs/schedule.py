"""The learning rate as a function of the step alone: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from .config import Settings


def learning_rate(settings: Settings, step: int, steps_per_epoch: int) -> float:
    """The learning rate of optimizer step ``step``, counted from 0 over the whole run.

    A linear warm-up to ``settings.lr``, then ``cosine``: half a cosine to 0; ``step``: a tenth from half of the epochs
    on and a hundredth from three quarters on, as section 4.2 of https://arxiv.org/abs/1512.03385; or ``constant``.
    """
    steps = settings.epochs * steps_per_epoch
    warmup = round(settings.warmup * steps_per_epoch)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    if settings.schedule == "step":
        return settings.lr * (1.0 if step < steps / 2 else 0.1 if step < steps * 3 / 4 else 0.01)
    return settings.lr

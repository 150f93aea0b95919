"""The learning rate of a step: a function of the step, and of what errors have changed, which checkpoints keep.

The paper divides the learning rate by 10 "when the error plateaus" and does not say what a plateau is. Here it is one
where the error of the images that a run is tested with has not fallen by :data:`PROGRESS` below its lowest value for
``patience`` epochs; then the count begins again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import Settings

PROGRESS = 1e-3  # of the error, as a share of images


@dataclass
class Reached:
    """What the errors of a run have changed in its learning rate.

    Args:
        warm: the training error has fallen below ``warmup_error``.
        divisions: by 10, at plateaus.
        lowest: error of the tests so far; None before the first.
        waited: epochs since it was reached, or since the last division.
    """

    warm: bool = False
    divisions: int = 0
    lowest: float | None = None
    waited: int = 0

    def tested(self, error: float, patience: int) -> None:
        """Takes the error of an epoch's test into account."""
        self.waited += 1
        if self.lowest is None or error < self.lowest - PROGRESS:
            self.lowest, self.waited = error, 0
        elif self.waited >= patience:
            self.divisions, self.waited = self.divisions + 1, 0


def learning_rate(settings: Settings, step: int, steps_per_epoch: int, reached: Reached | None = None) -> float:
    """The learning rate of optimizer step ``step``, counted from 0 over the whole run.

    A lower constant one (``warmup_lr``) or a linear warm-up to ``settings.lr``, then ``cosine``: half a cosine to 0;
    ``step``: a tenth from each of ``drops`` on, which are a half and three quarters of the run as in section 4.2 of
    https://arxiv.org/abs/1512.03385; ``plateau``: a tenth at each plateau of the error; or ``constant``.
    """
    reached = reached or Reached()
    steps = settings.iterations or settings.epochs * steps_per_epoch
    if settings.warmup_lr is not None:
        warm = reached.warm if settings.warmup_error is not None else step >= settings.warmup_iterations
        if not warm:
            return settings.warmup_lr
    warmup = round(settings.warmup * steps_per_epoch)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.schedule == "cosine":
        return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    if settings.schedule == "step":
        # rounded: a third of a multiple of three is a whole number, whatever its share is rounded to
        return settings.lr * 10.0 ** -sum(step >= round(share * steps, 6) for share in settings.drops)
    if settings.schedule == "plateau":
        return settings.lr * 10.0**-reached.divisions
    return settings.lr

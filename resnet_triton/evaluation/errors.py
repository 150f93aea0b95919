"""Top-1 and top-5 errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """How many other classes score at least as high as the right one, int64 ``[N]``; 0 is top-1.

    A tie counts against the label: a network that scores all classes alike knows nothing. A score that is no number
    counts as higher.

    Args:
        scores: ``[N, classes]``.
        labels: int64 ``[N]``.
    """
    own = scores.gather(1, labels[:, None])
    return (~(scores < own)).sum(1) - 1


@dataclass
class Errors:
    """Counts wrong answers.

    Args:
        images: seen so far.
        wrong1, wrong5: of them, those whose label is not the first, not among the first five.
        classes: that the scores had.
    """

    images: int = 0
    wrong1: int = 0
    wrong5: int = 0
    classes: int = 0

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Counts images of ``scores [N, classes]`` and their labels."""
        rank = ranks(scores, labels)
        self.images += len(labels)
        self.wrong1 += int(torch.count_nonzero(rank >= 1))
        self.wrong5 += int(torch.count_nonzero(rank >= 5))
        self.classes = scores.shape[1]

    @property
    def top1(self) -> float:
        """Top-1 error, 0 to 1."""
        return self.wrong1 / self.images

    @property
    def top5(self) -> float | None:
        """Top-5 error, 0 to 1; None of five classes or fewer."""
        return self.wrong5 / self.images if self.classes > 5 else None

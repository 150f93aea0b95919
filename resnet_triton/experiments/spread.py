"""Several runs as a mean and a spread, and when two groups of runs differ."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

HIGHER, LOWER, UNDECIDED = "higher", "lower", "undecided"

#: A difference of means counts from so many standard deviations of single runs on. With three runs each this is beyond
#: the 5 % of Student's t (3.67 against 2.78 at 4 degrees of freedom).
DECISIVE = 3.0


def mean(values: Sequence[float]) -> float:
    """The mean of at least one value."""
    return statistics.fmean(values)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of the runs that these are a sample of (n - 1); None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """How the runs of one group lie against those of another.

    Args:
        difference: mean of the first minus mean of the second.
        deviations: the same in standard deviations of single runs, pooled over both; None where a group has one run.
        outcome: :data:`HIGHER` or :data:`LOWER` (the first against the second), or :data:`UNDECIDED`.
    """

    difference: float
    deviations: float | None
    outcome: str


def compare(first: Sequence[float], second: Sequence[float], resolution: float = 0.0) -> Difference:
    """Compares two groups of runs.

    They differ where each has at least two runs, the means are :data:`DECISIVE` standard deviations apart, and no run
    of one lies within the range of the other.

    Args:
        first, second: one number a run.
        resolution: the smallest step of the numbers (one image of all, for an error). A spread below it counts as it:
            equal numbers do not mean that there is no spread.
    """
    difference = mean(first) - mean(second)
    one, other = deviation(first), deviation(second)
    if one is None or other is None:
        return Difference(difference, None, UNDECIDED)
    pooled = max(math.sqrt((one**2 + other**2) / 2), resolution)
    deviations = difference / pooled if pooled else math.copysign(math.inf, difference) if difference else 0.0
    apart = max(second) < min(first) or max(first) < min(second)
    if abs(deviations) < DECISIVE or not apart:
        return Difference(difference, deviations, UNDECIDED)
    return Difference(difference, deviations, HIGHER if difference > 0 else LOWER)


def points(share: float) -> str:
    """A difference of shares in percentage points: ``+1.20 points``."""
    return f"{100 * share:+.2f} points"


def in_deviations(found: Difference) -> str:
    """How far apart, in words."""
    if found.deviations is None:
        return "one run says nothing about the spread"
    return f"{abs(found.deviations):.1f} standard deviations of single runs"

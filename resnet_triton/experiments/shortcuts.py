"""Shortcut options A, B and C on the same data (table 3 of the paper).

A: identity, zeros for new channels, no parameters. B: a 1x1 projection with BN where sizes change. C: everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import degradation
from .nets import Net
from .output import Images, Report, Shown, Tables
from .plan import Plan
from .pool import Watch, run_all
from .runs import seeds_of
from .spread import HIGHER, LOWER, compare, in_deviations, mean, points

#: The option of a kind.
OPTIONS = {"A": "residual", "A-both": "residual-A-both", "B": "residual-B", "C": "residual-C"}
#: Columns of the summary.
SHOWN: Shown = (
    ("option", lambda row: next(option for option, kind in OPTIONS.items() if kind == row["kind"])),
    *degradation.SHOWN[1:],
)


def run(
    plan: Plan, options: Sequence[str], depths: Sequence[int], seeds: int, folder: Path, jobs: int, watch: Watch
) -> Report:
    """Trains every option with every depth and seed, and reports.

    Args:
        plan: data and training.
        options: of :data:`OPTIONS`.
        depths: of the nets.
        seeds: how many, from 0.
        folder: of the experiments.
        jobs: runs at once.
        watch: is told how it goes.

    Raises:
        ValueError: as :func:`.pool.run_all` does.
    """
    chosen = [Net(OPTIONS[option], depth) for depth in sorted(set(depths)) for option in options]
    results = run_all([each for net in chosen for each in seeds_of(net, plan, seeds)], folder, jobs, watch)
    return Report("shortcuts", *degradation.tables_of(results, plan))


def judge(tables: Tables, images: Images) -> tuple[list[str], dict[str, Any]]:
    """What test errors say."""
    return verdict(degradation.errors_of(tables[""], "test_error"), 1 / images.test)


def verdict(errors: degradation.Errors, resolution: float) -> tuple[list[str], dict[str, Any]]:
    """Each option against the one before it, by test error, at each depth."""
    names = {kind: option for option, kind in OPTIONS.items()}
    kinds = list(errors)
    lines, facts = [], []
    for before, after in pairwise(kinds):
        for depth in sorted(errors[before].keys() & errors[after].keys()):
            one, other = errors[after][depth], errors[before][depth]
            found = compare(one, other, resolution)
            word = {HIGHER: "higher than", LOWER: "lower than"}.get(found.outcome, "not told apart from")
            lines.append(
                f"{depth} layers: the test error of option {names[after]} ({mean(one):.2%}) is {word} that of option "
                f"{names[before]} ({mean(other):.2%}): {points(found.difference)}, {in_deviations(found)}."
            )
            facts.append({"depth": depth, "of": names[after], "against": names[before], **vars(found)})
    return lines, {"test_error": facts}


def draw(figure: Any, tables: Tables) -> None:
    """Training and test error after the last epoch: a bar for the mean, a dot for each seed."""
    names = {kind: option for option, kind in OPTIONS.items()}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, what in zip(panels, ("train_error_eval", "test_error"), ("training", "test"), strict=True):
        errors = degradation.errors_of(tables[""], column)
        bars = {f"{names[kind]}, {depth} layers": found for kind in errors for depth, found in errors[kind].items()}
        for place, values in enumerate(bars.values()):
            axes.barh(place, 100 * mean(values), color="silver")
            axes.plot([100 * value for value in values], [place] * len(values), "o", color="black", markersize=3)
        axes.set_xlabel(f"{what} error, %")
        axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    panels[0].invert_yaxis()

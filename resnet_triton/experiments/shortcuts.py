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
from .output import Report, Shown
from .plan import Plan
from .pool import Watch, run_all
from .runs import Result, data_of, seeds_of
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
    data = data_of(plan, 0)
    lines, facts = verdict(degradation.errors_of(results, "test_error"), 1 / len(data.test))
    tables = {"": degradation.epochs(results), "summary": degradation.summarise(results, data, plan)}
    return Report("shortcuts", tables, SHOWN, lines, facts, lambda figure: draw(figure, results), (8, 4))


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


def draw(figure: Any, results: Sequence[Result]) -> None:
    """Training and test error after the last epoch: a bar for the mean, a dot for each seed."""
    nets = list(dict.fromkeys(result.run.net for result in results))
    names = {kind: option for option, kind in OPTIONS.items()}
    labels = [f"{names[net.kind]}, {net.depth} layers" for net in nets]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, what in zip(panels, ("train_error_eval", "test_error"), ("training", "test"), strict=True):
        for place, net in enumerate(nets):
            values = [100 * result.last(column) for result in results if result.run.net == net]
            axes.barh(place, mean(values), color="silver")
            axes.plot(values, [place] * len(values), "o", color="black", markersize=3)
        axes.set_xlabel(f"{what} error, %")
    panels[0].set_yticks(range(len(nets)), labels, fontsize=8)
    panels[0].invert_yaxis()

"""Plain against residual nets of growing depth (figure 6 and section 4.2 of the paper).

The question is about the *training* error: does a deeper plain net have a higher one than a shallower one, and does a
residual net not? It is the error in eval mode on all training images as they are, after the last epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import macs
from . import nets
from .nets import Net
from .output import Images, Report, Shown, Table, Tables, integer, spans, spread, text
from .plan import Plan
from .pool import Watch, run_all
from .runs import COLUMNS, Result, data_of, seeds_of
from .spread import HIGHER, LOWER, UNDECIDED, Difference, compare, in_deviations, mean, points

AS_IN_PAPER, PARTLY, NOT_AS_IN_PAPER, NOT_DECIDED = (
    "as in the paper",
    "partly as in the paper",
    "not as in the paper",
    "the numbers do not decide it",
)
#: Columns of the summary.
SHOWN: Shown = (
    ("kind", text("kind")),
    ("layers", text("depth")),
    ("parameters", integer("parameters")),
    ("multiply-adds", integer("multiply_adds")),
    ("runs", text("seeds")),
    ("training error, %", spread("train_error_eval")),
    ("as it went along, %", spread("train_error")),
    ("test error, %", spread("test_error")),
)
ERRORS = ("train_error_eval", "train_error", "test_error")


def run(
    plan: Plan, kinds: Sequence[str], depths: Sequence[int], seeds: int, folder: Path, jobs: int, watch: Watch
) -> Report:
    """Trains every net with every seed, and reports.

    Args:
        plan: data and training.
        kinds: of :data:`.nets.KINDS`.
        depths: of the nets.
        seeds: how many, from 0.
        folder: of the experiments.
        jobs: runs at once.
        watch: is told how it goes.

    Raises:
        ValueError: for depths that a kind does not have, and as :func:`.pool.run_all` does.
    """
    chosen = [Net(kind, depth) for kind in kinds for depth in sorted(set(depths))]
    results = run_all([run for net in chosen for run in seeds_of(net, plan, seeds)], folder, jobs, watch)
    return Report("degradation", *tables_of(results, plan))


def tables_of(results: Sequence[Result], plan: Plan) -> tuple[Tables, Images]:
    """The tables of finished runs, and how many images there were."""
    data, table = data_of(plan, 0), epochs(results)
    return {"": table, "summary": summarise(table, len(data.classes), plan)}, Images(len(data.train), len(data.test))


def epochs(results: Sequence[Result]) -> Table:
    """Every epoch of every run."""
    return [
        {"kind": result.run.net.kind, "depth": result.run.net.depth, "seed": result.run.seed}
        | {column: row[column] for column in COLUMNS}
        for result in results
        for row in result.rows
    ]


def summarise(table: Table, classes: int, plan: Plan) -> Table:
    """A line for each net: its size, and errors after the last epoch over its seeds."""
    errors = {column: errors_of(table, column) for column in ERRORS}
    summary = []
    for net in dict.fromkeys(Net(row["kind"], row["depth"]) for row in table):
        model = nets.build(net, classes, plan.channels)
        line: dict[str, Any] = {
            "kind": net.kind,
            "depth": net.depth,
            "seeds": len(errors[ERRORS[0]][net.kind][net.depth]),
            "parameters": macs.parameters(model),
            "multiply_adds": macs.multiply_adds(model, (1, plan.channels, plan.size, plan.size)),
        }
        for column, found in errors.items():
            line |= {f"{column}_{name}": value for name, value in spans(found[net.kind][net.depth]).items()}
        summary.append(line)
    return summary


Errors = dict[str, dict[int, list[float]]]


def errors_of(table: Table, column: str) -> Errors:
    """Errors after the last epoch: by kind and depth, one a seed."""
    last = {(row["kind"], row["depth"], row["seed"]): row[column] for row in table}  # epochs are in order
    found: Errors = {}
    for (kind, depth, _), error in last.items():
        found.setdefault(kind, {}).setdefault(depth, []).append(error)
    return {kind: dict(sorted(depths.items())) for kind, depths in found.items()}


def judge(tables: Tables, images: Images) -> tuple[list[str], dict[str, Any]]:
    """The verdict, which rests on training errors, and what test errors say."""
    lines, facts = verdict(errors_of(tables[""], "train_error_eval"), 1 / images.train)
    return lines + tested(errors_of(tables[""], "test_error"), 1 / images.test), facts


def verdict(errors: Errors, resolution: float) -> tuple[list[str], dict[str, Any]]:
    """What training errors say, from the numbers alone.

    Args:
        errors: training errors by kind and depth, one a seed.
        resolution: one image of all.

    Returns:
        Sentences, and the same for programs. ``outcome`` is about plain and residual nets of the smallest and the
        largest depth; None where one of them is missing.
    """
    lines: list[str] = []
    facts: dict[str, Any] = {}
    ends: dict[str, Difference] = {}
    for kind, depths in errors.items():
        steps = list(depths)
        if len(steps) < 2:
            continue
        low, high = steps[0], steps[-1]
        ends[kind] = compare(depths[high], depths[low], resolution)
        lines.append(_about(kind, low, high, ends[kind], len(depths[high])))
        pairs = [(low, high), *pairwise(steps)]
        facts[kind] = [
            {"shallow": a, "deep": b, **vars(compare(depths[b], depths[a], resolution))}
            for a, b in dict.fromkeys(pairs)
        ]
    outcome = None
    if {"plain", "residual"} <= ends.keys():
        deepest = max(errors["plain"].keys() & errors["residual"].keys(), default=None)
        if deepest is not None:
            between = compare(errors["residual"][deepest], errors["plain"][deepest], resolution)
            lines.append(
                f"At {deepest} layers the residual net's training error is {_word(between)} the plain net's: "
                f"{points(between.difference)}, {in_deviations(between)}."
            )
            facts["residual_against_plain"] = {"depth": deepest, **vars(between)}
            outcome = outcome_of(ends["plain"], ends["residual"], between)
            lines.append(f"Verdict: {outcome}.")
    return lines, {"outcome": outcome, "training_error": facts}


def outcome_of(plain: Difference, residual: Difference, between: Difference) -> str:
    """The verdict.

    Args:
        plain, residual: the deepest net against the shallowest, of each kind.
        between: the deepest residual net against the deepest plain one.
    """
    if plain.outcome == LOWER or between.outcome == HIGHER:
        return NOT_AS_IN_PAPER
    if plain.outcome == UNDECIDED or between.outcome == UNDECIDED:
        return NOT_DECIDED
    return PARTLY if residual.outcome == HIGHER else AS_IN_PAPER


def _about(kind: str, low: int, high: int, found: Difference, seeds: int) -> str:
    start = f"{kind}: the training error of {high} layers"
    size = f"{points(found.difference)}, {in_deviations(found)}"
    if found.outcome == UNDECIDED:
        runs = f"{seeds} runs each" if seeds > 1 else "one run each"
        return f"{start} is not told apart from that of {low} layers by {runs} ({size})."
    return f"{start} is {found.outcome} than that of {low} layers ({size})."


def _word(found: Difference) -> str:
    return {HIGHER: "higher than", LOWER: "lower than", UNDECIDED: "not told apart from"}[found.outcome]


def tested(errors: Errors, resolution: float) -> list[str]:
    """The same about the test error, which the verdict does not rest on."""
    lines = []
    for kind, depths in errors.items():
        steps = list(depths)
        if len(steps) > 1:
            found = compare(depths[steps[-1]], depths[steps[0]], resolution)
            lines.append(
                f"{kind}: the test error of {steps[-1]} layers is {_word(found)} that of {steps[0]} layers "
                f"({points(found.difference)}, {in_deviations(found)})."
            )
    return lines


def draw(figure: Any, tables: Tables) -> None:
    """Errors over epochs, a panel for each kind: training dashed, test bold; bands are the range over seeds."""
    table = tables[""]
    kinds, depths = (list(dict.fromkeys(row[name] for row in table)) for name in ("kind", "depth"))
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, axes in zip(kinds, panels, strict=True):
        for i, depth in enumerate(depths):
            rows = [row for row in table if (row["kind"], row["depth"]) == (kind, depth)]
            if rows:
                _curves(axes, rows, f"C{i}", str(depth))
        axes.set_title(kind, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        axes.legend(title="layers", fontsize=8, title_fontsize=8)
    panels[0].set_ylabel("error, %")
    figure.suptitle("dashed: training images, bold: test images; mean and range over seeds", fontsize=9)


def _curves(axes: Any, rows: Table, colour: str, label: str) -> None:
    epochs = sorted({row["epoch"] for row in rows})
    for column, bold in (("train_error_eval", False), ("test_error", True)):
        values = [[100 * row[column] for row in rows if row["epoch"] == epoch] for epoch in epochs]
        style: dict[str, Any] = {"linewidth": 2.2, "label": label} if bold else {"linewidth": 1, "linestyle": "--"}
        axes.plot(epochs, [mean(each) for each in values], color=colour, **style)
        axes.fill_between(
            epochs, [min(each) for each in values], [max(each) for each in values], color=colour, alpha=0.12
        )

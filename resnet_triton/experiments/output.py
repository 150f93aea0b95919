"""The files of an experiment: its tables as CSV, a picture, the verdict in words, and everything else as JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..results import environment
from ..runs import files

FORMAT = 1
Table = list[dict[str, Any]]
#: Titles of columns, and what each shows of a row.
Shown = Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]]


@dataclass
class Report:
    """What an experiment found.

    Args:
        name: of the experiment, and stem of its files.
        tables: rows by name; the table ``""`` is written to ``NAME.csv``, a table ``T`` to ``NAME-T.csv``. The last one
            is the summary.
        shown: columns of the summary for people.
        verdict: what the numbers say, one sentence a line.
        facts: the same for programs.
        draw: draws the picture on an empty figure, whose size in inches is ``size``.
        size: of the picture.
    """

    name: str
    tables: dict[str, Table]
    shown: Shown
    verdict: list[str]
    facts: dict[str, Any]
    draw: Callable[[Any], None]
    size: tuple[float, float] = (9, 4)
    files: list[str] = field(default_factory=list)

    @property
    def summary(self) -> Table:
        """The table to show."""
        return list(self.tables.values())[-1]


def write(report: Report, folder: Path, settings: Mapping[str, Any], device: str, command: str) -> dict[str, Any]:
    """Writes every file of a report, and puts their names into it.

    Args:
        report: what was found.
        folder: where; made where it is not there.
        settings: what was chosen, seeds included.
        device: ``cpu``, or the name of a GPU.
        command: that gives the same again.

    Returns:
        What the JSON file holds.

    Raises:
        OSError: a file cannot be written.
    """
    from .. import plot

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for table, rows in report.tables.items():
        names.append(f"{report.name}-{table}.csv" if table else f"{report.name}.csv")
        files.replace_file(folder / names[-1], as_csv(rows).encode())
    content = {
        "format": FORMAT,
        "experiment": report.name,
        "command": command,
        "settings": dict(settings),
        "environment": environment(device),
        "verdict": report.verdict,
        **report.facts,
    }
    files.replace_file(folder / f"{report.name}.json", (json.dumps(content, indent=1) + "\n").encode())
    files.replace_file(folder / f"{report.name}.txt", ("\n".join(report.verdict) + "\n").encode())
    figure = plot.new_figure(*report.size)
    report.draw(figure)
    plot.save(figure, folder / f"{report.name}.png")
    report.files = [
        str(folder / name) for name in (*names, f"{report.name}.png", f"{report.name}.txt", f"{report.name}.json")
    ]
    return content


def as_csv(rows: Table) -> str:
    """Rows as text; numbers read back to the same bits, None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> Table:
    """Rows of a file of :func:`as_csv`: numbers as numbers, empty cells as None.

    Raises:
        OSError: it cannot be read.
    """
    with path.open(newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> int | float | str | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def cells(rows: Table, shown: Shown) -> list[list[str]]:
    """Heads and rows as strings."""
    return [[title for title, _ in shown], *([show(row) for _, show in shown] for row in rows)]


def spread(column: str, unit: float = 100, digits: int = 2) -> Callable[[Mapping[str, Any]], str]:
    """Shows mean and standard deviation of a column of :func:`spans`: ``8.75 ± 0.16``."""

    def show(row: Mapping[str, Any]) -> str:
        mean, sd = row[f"{column}_mean"], row[f"{column}_sd"]
        return f"{unit * mean:.{digits}f}" + ("" if sd is None else f" ± {unit * sd:.{digits}f}")

    return show


def integer(column: str) -> Callable[[Mapping[str, Any]], str]:
    """Shows a whole number with commas."""
    return lambda row: "" if row[column] is None else f"{row[column]:,}"


def text(column: str) -> Callable[[Mapping[str, Any]], str]:
    """Shows a column as it is."""
    return lambda row: "" if row[column] is None else str(row[column])


def spans(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation and range of the runs, as columns."""
    from .spread import deviation, mean

    return {"mean": mean(values), "sd": deviation(values), "min": min(values), "max": max(values)}

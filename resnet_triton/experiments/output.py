"""The files of an experiment: its tables as CSV, a picture, the verdict in words, and everything else as JSON."""

from __future__ import annotations

import csv
import importlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ..results import environment
from ..runs import files

FORMAT = 1
SIZE = (9, 4.5)  # of pictures, in inches
Table = list[dict[str, Any]]
#: Titles of columns, and what each shows of a row.
Shown = Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]]


Tables = dict[str, Table]


@dataclass(frozen=True)
class Images:
    """How many images the errors of an experiment are shares of."""

    train: int
    test: int


class Experiment(Protocol):
    """What the module of an experiment has, so that its verdict and picture can be made again from its CSV files."""

    SHOWN: Shown

    def judge(self, tables: Tables, images: Images | None) -> tuple[list[str], dict[str, Any]]:
        """What the numbers say: a sentence a line, and the same for programs."""

    def draw(self, figure: Any, tables: Tables) -> None:
        """Draws the picture on an empty figure of :data:`SIZE` inches."""


@dataclass(frozen=True)
class Report:
    """What an experiment found.

    Args:
        name: of the experiment, its module here, and the stem of its files.
        tables: rows by name: the table ``""`` goes to ``NAME.csv``, a table ``T`` to ``NAME-T.csv``. The last one is
            the summary.
        images: where there are errors.
    """

    name: str
    tables: Tables
    images: Images | None = None

    @property
    def experiment(self) -> Experiment:
        """The module."""
        return importlib.import_module(f".{self.name}", __package__)

    @property
    def lines(self) -> list[str]:
        """The verdict."""
        return self.experiment.judge(self.tables, self.images)[0]

    def cells(self) -> list[list[str]]:
        """The summary as strings, heads first."""
        return cells(list(self.tables.values())[-1], self.experiment.SHOWN)


def write(report: Report, folder: Path, settings: Mapping[str, Any], device: str, command: str) -> dict[str, Any]:
    """Writes every file of a report.

    Args:
        report: what was found.
        folder: where; made where it is not there.
        settings: what was chosen, seeds included.
        device: ``cpu``, or the name of a GPU.
        command: that gives the same again.

    Returns:
        What the JSON file holds, and under ``files`` the files.

    Raises:
        ImportError: without matplotlib; all other files are written.
        OSError: a file cannot be written.
    """
    from .. import plot

    folder.mkdir(parents=True, exist_ok=True)
    paths = {table: table_file(folder, report.name, table) for table in report.tables}
    for table, path in paths.items():
        files.replace_file(path, as_csv(report.tables[table]).encode())
    lines, facts = report.experiment.judge(report.tables, report.images)
    content = {
        "format": FORMAT,
        "experiment": report.name,
        "command": command,
        "settings": dict(settings),
        "images": None if report.images is None else asdict(report.images),
        "environment": environment(device),
        "tables": list(report.tables),
        "verdict": lines,
        **facts,
    }
    others = {suffix: folder / f"{report.name}{suffix}" for suffix in (".txt", ".json", ".png")}
    files.replace_file(others[".json"], (json.dumps(content, indent=1) + "\n").encode())
    files.replace_file(others[".txt"], ("\n".join(lines) + "\n").encode())
    figure = plot.new_figure(*SIZE)
    report.experiment.draw(figure, report.tables)
    plot.save(figure, others[".png"])
    return {**content, "files": [str(path) for path in (*paths.values(), *others.values())]}


def read(folder: Path, name: str) -> tuple[Report, dict[str, Any]]:
    """What :func:`write` wrote: tables from the CSV files, and the content of the JSON file.

    Raises:
        OSError: a file is not there.
    """
    content = json.loads((folder / f"{name}.json").read_text())
    tables = {table: read_csv(table_file(folder, name, table)) for table in content["tables"]}
    images = None if content["images"] is None else Images(**content["images"])
    return Report(name, tables, images), content


def table_file(folder: Path, name: str, table: str) -> Path:
    """The CSV file of a table."""
    return folder / (f"{name}-{table}.csv" if table else f"{name}.csv")


def as_csv(rows: Table) -> str:
    """Rows as text; numbers read back to the same bits, None is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> Table:
    """Rows of a file of :func:`as_csv`: numbers and truth values as such, empty cells as None.

    Raises:
        OSError: it cannot be read.
    """
    with path.open(newline="") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(text: str) -> bool | int | float | str | None:
    if text in ("True", "False"):
        return text == "True"
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

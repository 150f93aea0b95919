"""Fills ``docs/experiments.md`` from the files of ``resnet-triton experiment``: commands, conditions, tables, verdicts.

``python -m tools.experiments_page --results runs/experiments`` copies tables and conditions of that folder to
``docs/experiments``, draws the pictures into ``docs/images``, and writes what lies between the marks of the page;
without ``--results`` it does the latter two from ``docs/experiments``. What is told in the page around the marks is
written by hand.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_triton import plot
from resnet_triton.cli.experiment import EXPERIMENTS
from resnet_triton.experiments import construction, output
from resnet_triton.tables import DISTURBED, conditions, markdown

DOCS = Path(__file__).resolve().parent.parent / "docs"
RESULTS, PAGE, IMAGES = "experiments", "experiments.md", "images"
MARKS = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_RUN = "Not run yet."


def filled(text: str, results: Path) -> str:
    """The page with every part between marks made anew from the results in a folder."""
    return MARKS.sub(lambda mark: f"{mark[1]}{part(results, mark[2])}\n{mark[3]}", text)


def part(results: Path, name: str) -> str:
    """What the page says about one experiment's results."""
    if not (results / f"{name}.json").exists():
        return NOT_RUN
    report, content = output.read(results, name)
    lines = [f"    {content['command']}", "", f"{about(content)}.", "", f"![{name}]({IMAGES}/{picture(name)})"]
    lines += ["", *markdown(report.cells())]
    if name == "construction":
        lines += ["", *markdown(output.cells(report.tables["check"], construction.CHECK_SHOWN))]
    lines += ["", "What the numbers say, as the command prints it:", "", *(f"- {line}" for line in report.lines)]
    busy = max((row.get("others_cpu") or 0 for rows in report.tables.values() for row in rows), default=0)
    if busy > DISTURBED:
        lines += ["", f"**While times were taken, other processes took up to {busy:.0%} of the cores.**"]
    return "\n".join(lines)


def about(content: dict[str, Any]) -> str:
    """Hardware, versions and seeds in one line."""
    seeds = content["settings"].get("seeds")
    trained = f"Seeds 0 to {seeds - 1}, each net on one thread. " if seeds else ""
    return f"{trained}{conditions(content['environment'])}"


def picture(name: str) -> str:
    """File name of an experiment's picture."""
    return f"experiment-{name}.png"


def take(source: Path, target: Path) -> list[str]:
    """Copies tables and conditions of the experiments that were run; returns their names."""
    target.mkdir(parents=True, exist_ok=True)
    names = [name for name in EXPERIMENTS if (source / f"{name}.json").exists()]
    for name in names:
        for path in (*source.glob(f"{name}.csv"), *source.glob(f"{name}-*.csv"), source / f"{name}.json"):
            shutil.copy(path, target)
    return names


def draw(results: Path, images: Path) -> None:
    """Draws every picture of the page from the tables."""
    for name in EXPERIMENTS:
        if (results / f"{name}.json").exists():
            report, _ = output.read(results, name)
            figure = plot.new_figure(*output.SIZE)
            report.experiment.draw(figure, report.tables)
            plot.save(figure, images / picture(name))


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 1 where a folder holds no results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, help="folder to take new results from: --output of the experiments")
    args = parser.parse_args(argv)
    if args.results is not None:
        names = take(args.results, DOCS / RESULTS)
        if not names:
            print(f"no results of an experiment in {args.results}", file=sys.stderr)
            return 1
        print(f"took {', '.join(names)}")
    draw(DOCS / RESULTS, DOCS / IMAGES)
    page = DOCS / PAGE
    page.write_text(filled(page.read_text(), DOCS / RESULTS))
    print(f"wrote {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

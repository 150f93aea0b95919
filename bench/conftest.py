"""Keeps the rows of a run, feeds them to pytest-benchmark, and prints the tables at its end.

A test is one row. The first test of a group measures the whole group, interleaved; the others look their row up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import RESULTS, report
from resnet_triton.compare import Watch
from resnet_triton.results import FAILED, OK, WRONG, Row, environment, folder_name, save

#: RESNET_TRITON_BENCH=smoke: a tiny run that shows that everything works, and measures nothing worth keeping.
SMOKE = os.environ.get("RESNET_TRITON_BENCH") == "smoke"
OURS = ("ours", "our kernels")


class Lab(Watch):
    """The rows of this run, what was measured already, and what else its reader must know."""

    def __init__(self) -> None:
        self.environment = environment()
        self.rows: list[Row] = []
        self.said: list[str] = []
        self._measured: dict[Hashable, Any] = {}

    def once(self, key: Hashable, measure: Callable[[], Any]) -> Any:
        """``measure()``, computed the first time and kept; an exception is kept too."""
        if key not in self._measured:
            try:
                self._measured[key] = measure()
            except Exception as error:
                self._measured[key] = error
        found = self._measured[key]
        if isinstance(found, Exception):
            raise found
        return found

    def say(self, text: str) -> None:
        """Keeps it for the end of the run."""
        self.said.append(text)

    def write(self, folder: Path, complete: bool) -> Path | None:
        """Writes the results: ``latest`` for a whole run, ``partial`` for a selection of rows."""
        if not self.rows:
            return None
        target = folder / folder_name(self.environment["device"])
        return save(target, self.rows, self.environment, "latest" if complete else "partial")


LAB = pytest.StashKey[Lab]()
DESELECTED = pytest.StashKey[bool]()


def results_folder() -> Path:
    """Where this run writes: ``$RESNET_TRITON_BENCH_RESULTS``, or ``bench/results`` (smoke runs: ``.cache``)."""
    chosen = os.environ.get("RESNET_TRITON_BENCH_RESULTS")
    return Path(chosen) if chosen else RESULTS.parent.parent / ".cache" / "bench-smoke" if SMOKE else RESULTS


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError("bench/ measures compiled code: unset TRITON_INTERPRET")
    if hasattr(config, "workerinput") or getattr(config.option, "numprocesses", None):
        raise pytest.UsageError("bench/ measures in one process: run it without -n")
    # One table is enough; pytest-benchmark's own is for comparing runs.
    if not getattr(config.option, "benchmark_compare", None):
        config.option.benchmark_quiet = True
    config.stash[DESELECTED] = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():  # a visit to a GPU may end early: whole networks first
        items.sort(key=lambda item: item.path.name != "test_models.py")


def pytest_deselected(items: list[pytest.Item]) -> None:
    if items:
        items[0].config.stash[DESELECTED] = True


@pytest.fixture(scope="session")
def lab(request: pytest.FixtureRequest) -> Lab:
    """The rows of this run."""
    return request.config.stash.setdefault(LAB, Lab())


@pytest.fixture(autouse=True)
def _backend_left_alone() -> Iterator[None]:
    from resnet_triton.backend import current_backend

    yield
    assert current_backend() == "auto"


@pytest.fixture
def record(lab: Lab) -> Callable[[Row], None]:
    """Adds a row to the tables; fails or skips the test for a row without a result."""

    def add(row: Row) -> None:
        lab.rows.append(row)
        if row.status.startswith(WRONG) or (row.status.startswith(FAILED) and row.provider.startswith(OURS)):
            pytest.fail(f"{row.provider}: {row.status}", pytrace=False)
        if row.status != OK:
            pytest.skip(row.status)

    return add


@pytest.fixture
def publish(record: Callable[[Row], None], benchmark: Any) -> Callable[[Row], None]:
    """Adds a row to the tables, and its samples to pytest-benchmark."""

    def add(row: Row) -> None:
        record(row)
        batch = row.train_batch_size or row.infer_batch_size
        kind = "training" if row.train_batch_size else None
        benchmark.group = " ".join(filter(None, [kind, row.model, f"batch {batch}", row.dtype]))
        benchmark.extra_info.update({k: v for k, v in vars(row).items() if k != "samples" and v is not None})
        benchmark.pedantic(lambda: None, rounds=1)
        if benchmark.stats is not None:  # None under --benchmark-disable
            benchmark.stats.stats.data[:] = row.samples

    return add


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> Iterator[None]:
    yield
    lab = config.stash.get(LAB, None)
    if lab is None or not lab.rows:
        return
    complete = not config.stash[DESELECTED] and _whole_folder(config) and exitstatus == 0
    path = lab.write(results_folder(), complete)
    terminalreporter.section("resnet-triton bench" + (" (smoke: not a measurement)" if SMOKE else ""))
    for line in report.terminal(lab.rows, lab.environment):
        terminalreporter.write_line(line, red=WRONG in line)
    for text in lab.said:
        terminalreporter.write_line(text, yellow=True)
    terminalreporter.write_line(f"written to {path} and .csv")


def _whole_folder(config: pytest.Config) -> bool:
    """Whether the run was asked for all of bench/, not for some of its files."""
    return any((config.invocation_params.dir / arg).resolve() == RESULTS.parent for arg in config.args)

"""Several runs at once: each in a process of its own, on one thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import Empty
from typing import Any, Protocol

from ..runs.data import Data
from ..runs.interrupt import SIGNALS, Stop
from .runs import Result, Run, Store, configuration, data_of, train

LOOK = 0.2  # seconds between two looks at what the processes have said


class Watch(Protocol):
    """What is told how runs go."""

    def begin(self, runs: int, found: int, epochs: int) -> None:
        """So many runs are wanted, so many of them are done already, and the others have so many epochs."""

    def epoch(self, name: str, row: Mapping[str, Any]) -> None:
        """A run has done an epoch."""

    def done(self, name: str, row: Mapping[str, Any]) -> None:
        """A run is done; its last epoch."""

    def stopped(self, finished: int, runs: int) -> None:
        """All of them stop; so many are done and kept."""


def run_all(runs: Sequence[Run], folder: Path, jobs: int, watch: Watch) -> list[Result]:
    """Trains what is not there yet.

    Args:
        runs: of one plan and data set; what they start from must be there.
        folder: of the experiments.
        jobs: runs at once; 1 trains in this process.
        watch: is told how it goes.

    Returns:
        The runs, in their order.

    Raises:
        KeyboardInterrupt: by Ctrl-C or SIGTERM; finished runs are kept.
        ValueError: for a run of another configuration in the folder, or one that diverges.
        OSError: a process was killed, or a file cannot be written.
    """
    store = Store(folder)
    data = data_of(runs[0].plan, 0)
    found = {run: store.find(run, data) for run in dict.fromkeys(runs)}
    missing = [run for run, result in found.items() if result is None]
    watch.begin(len(found), len(found) - len(missing), sum(_epochs(run, data) for run in missing))
    if missing:
        with Stop() as stop:
            work = _here if min(jobs, len(missing)) == 1 else _in_processes
            for run, result in work(missing, folder, min(jobs, len(missing)), stop, watch):
                found[run] = result
            if stop.requested:
                watch.stopped(sum(result is not None for result in found.values()), len(found))
                raise KeyboardInterrupt
    results = [found[run] for run in runs]
    return [result for result in results if result is not None]


def _epochs(run: Run, data: Data) -> int:
    return configuration(run, data)["epochs"]


def _here(runs: Sequence[Run], folder: Path, jobs: int, stop: Stop, watch: Watch) -> list[tuple[Run, Result]]:
    done = []
    for run in runs:
        result = train(run, Store(folder), lambda: stop.requested, lambda run, row: watch.epoch(run.name, row))
        if result is None:
            break
        watch.done(run.name, result.rows[-1])
        done.append((run, result))
    return done


def _in_processes(runs: Sequence[Run], folder: Path, jobs: int, stop: Stop, watch: Watch) -> list[tuple[Run, Result]]:
    context = get_context("spawn")  # a GPU, and the threads of PyTorch, do not survive a fork
    told, end = context.Queue(), context.Event()
    done: list[tuple[Run, Result]] = []
    with ProcessPoolExecutor(jobs, context, _begin, (told, end)) as pool:
        # deep nets first, so that the last ones to end are short
        waiting: dict[Future[Result | None], Run] = {
            pool.submit(_train, run, folder): run for run in sorted(runs, key=lambda run: -run.net.depth)
        }
        try:
            while waiting:
                ready, _ = wait(waiting, LOOK, FIRST_COMPLETED)
                _hear(told, watch.epoch)
                for future in ready:
                    run, result = waiting.pop(future), future.result()
                    if result is not None:
                        watch.done(run.name, result.rows[-1])
                        done.append((run, result))
                if stop.requested:
                    end.set()
                    waiting = {future: run for future, run in waiting.items() if not future.cancel()}
        except BrokenProcessPool as error:
            raise OSError(
                "a process that trains ended early (it ran out of memory, or its error is above); --jobs 1 trains in "
                "this process. Finished runs are kept"
            ) from error
        finally:
            end.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return done


def _hear(told: Any, tell: Callable[[str, Mapping[str, Any]], None]) -> None:
    while True:
        try:
            tell(*told.get_nowait())
        except Empty:
            return


# In the processes

_told: Any = None
_end: Any = None


def _begin(told: Any, end: Any) -> None:
    """What a terminal sends to all processes is for the main one to answer; without it, nobody would."""
    global _told, _end
    _told, _end = told, end
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train(run: Run, folder: Path) -> Result | None:
    if _end.is_set():
        return None
    return train(run, Store(folder), _end.is_set, lambda run, row: _told.put((run.name, dict(row))))

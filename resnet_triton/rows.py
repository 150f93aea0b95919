"""Rows of work in processes of their own: a crash, a hang or an illegal access costs its row only.

:class:`Crew` feeds a queue of rows to worker processes and watches the journal. A worker that dies or takes too long is
noted at the row it was in, and another one goes on with the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .journal import INTERRUPTED, Journal

START_S = 90.0  # from the start of a worker to its first row: imports and the CUDA context
POLL_S = 0.05
STARTS = 2  # how often a worker may fail before its first row
#: A worker imports what this process would import, whatever lies in its working directory.
_WORKER = (
    "import sys; sys.path[:] = sys.argv.pop(1).split('\\n'); from {package} import worker; sys.exit(worker.main())"
)


@dataclass(frozen=True)
class Row:
    """One unit of work.

    Args:
        key: its name in the journal, unique.
        kernel, config: what runs, for the report when it does not survive.
        limit_s: how long it may take, compilation included.
        payload: what the handler needs, as JSON.
    """

    key: str
    kernel: str
    config: str
    limit_s: float = 60.0
    payload: dict[str, Any] = field(default_factory=dict)


def end(process: subprocess.Popen) -> None:
    """Kills a child and its own children; does not wait long for one that hangs in the driver."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)


class Crew:
    """Worker processes for a queue of rows, as a context manager: they end with the block.

    Args:
        rows: what to do, most important first; those that the journal shows as finished are left out.
        handler: ``"module:function"`` that takes a row (as a dict) and the journal, and returns its result as a dict;
            its ``status`` is ``"ok"`` by default.
        journal: takes the results.
        deadline: on ``time.monotonic()``; rows still running then are stopped and stay unfinished.
        workers: processes at once. One where time is measured.
        env: environment variables besides this process's own (without TRITON_INTERPRET).
        prefix: a command that runs the worker, such as compute-sanitizer.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        handler: str,
        journal: Journal,
        *,
        deadline: float,
        workers: int = 1,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        queue = [row for row in rows if row.key not in journal.finished]
        self.journal = journal
        self._workers = [
            _Worker(handler, journal, f"{handler}#{i}", deadline, env, prefix, queue[i::workers])
            for i in range(workers)
        ]

    def __enter__(self) -> Crew:
        for worker in self._workers:
            threading.Thread(target=worker.run, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.deadline = 0.0
        for worker in self._workers:
            worker.done.wait()
        self.journal.reload()

    def wait(self, tick: Callable[[], None] = lambda: None, every: float = 0.5) -> None:
        """Returns when every row is finished or time is up; meanwhile calls ``tick`` every so many seconds."""
        while not all(worker.done.is_set() for worker in self._workers):
            give_up = time.monotonic() + every
            for worker in self._workers:
                worker.done.wait(max(0.0, give_up - time.monotonic()))
            tick()

    @property
    def printed(self) -> str:
        """What the workers that have ended printed."""
        return "\n".join(worker.printed for worker in self._workers)


def run_rows(rows: Sequence[Row], handler: str, journal: Journal, **options: Any) -> str:
    """Runs every row that the journal does not show as finished; returns what the workers printed.

    Arguments as :class:`Crew`.
    """
    with Crew(rows, handler, journal, **options) as crew:
        crew.wait()
    return crew.printed


class _Worker:
    """One slice of the queue: starts processes until it is done or time is up."""

    def __init__(
        self,
        handler: str,
        journal: Journal,
        name: str,
        deadline: float,
        env: Mapping[str, str] | None,
        prefix: Sequence[str],
        rows: Sequence[Row],
    ) -> None:
        self.handler, self.name, self.deadline = handler, name, deadline
        self.env, self.prefix, self.rows = env, prefix, rows
        self.journal = Journal(journal.path, journal.code, name)
        self.printed = ""
        self.done = threading.Event()  # a join() that Ctrl-C interrupts would take the thread for finished

    def run(self) -> None:
        """Runs the slice, then sets ``done``."""
        try:
            self._run()
        finally:
            self.done.set()

    def _run(self) -> None:
        failures = 0
        while time.monotonic() < self.deadline:
            left = [row for row in self.rows if row.key not in self.journal.finished]
            if not left:
                return
            before = self._noted()
            output = self._one_process(left)
            self.printed += output
            if self._noted() > before:
                failures = 0
                continue
            failures += 1
            if failures >= STARTS and time.monotonic() < self.deadline:  # give up on the row in front
                row = left[0]
                self.journal.start(row.key, kernel=row.kernel, config=row.config)
                self.journal.finish(row.key, "crashed", detail=f"the worker ends without a result: {output[-1500:]}")
                failures = 0

    def _noted(self) -> int:
        """How many results this worker has noted: a worker that adds none makes no progress."""
        return sum(record["worker"] == self.name for record in self.journal.finished.values())

    def _one_process(self, rows: Sequence[Row]) -> str:
        """One process over the rows, until it ends or must be ended; returns what it printed."""
        path = "\n".join(os.path.abspath(folder) for folder in sys.path)
        command = [*self.prefix, sys.executable, "-c", _WORKER.format(package=__package__), path]
        command += ["--handler", self.handler, "--journal", str(self.journal.path.absolute())]
        command += ["--code", self.journal.code, "--name", self.name]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"PYTHONUNBUFFERED": "1", **(self.env or {})}
        with tempfile.TemporaryFile("w+") as queue, tempfile.TemporaryFile("w+", errors="replace") as output:
            json.dump([asdict(row) for row in rows], queue)
            queue.seek(0)
            process = subprocess.Popen(
                command, env=env, stdin=queue, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )  # fmt: skip
            try:
                why = self._watch(process)
            finally:
                end(process)
            output.seek(0)
            text = output.read()
        self._settle(why, process.returncode, text)
        return text

    def _watch(self, process: subprocess.Popen) -> str:
        """Waits for the end of a process: ``"ended"``, or ``"hung"`` or ``"deadline"`` when it must be ended."""
        started, seen = time.monotonic(), False
        while process.poll() is None:
            if time.monotonic() >= self.deadline:
                return "deadline"
            self.journal.reload()
            running = self.journal.open(self.name)
            seen = seen or bool(running)
            # of nested records the innermost, youngest one is what runs
            limit = running[-1]["limit_s"] if running else None
            if limit is not None and time.time() > running[-1]["time"] + limit:
                return "hung"
            if not seen and time.monotonic() > started + START_S:
                return "hung"
            time.sleep(POLL_S)
        return "ended"

    def _settle(self, why: str, code: int | None, text: str) -> None:
        """Notes what became of the records that the process left open."""
        self.journal.reload()
        running = self.journal.open(self.name)
        for record in reversed(running):
            if record is running[-1] and why != "deadline":
                status = "hung" if why == "hung" else "crashed"
                how = f"no end after {record['limit_s']} s" if why == "hung" else _exit_text(code)
                self.journal.finish(record["key"], status, detail=f"{how}; {text[-1500:]}".strip("; "))
            else:
                self.journal.finish(record["key"], INTERRUPTED)


def _exit_text(code: int | None) -> str:
    if code is None:
        return "the process cannot be ended"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"

"""An append-only log of work that may crash: what was started, what finished, and how.

One JSON record a line, flushed to disk before the work starts, so that after a crash the log names its culprit.
Several processes may append to one file. Records carry the hash of the code they ran (``code``): results of other code
do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INTERRUPTED = "interrupted"  # not the work's own fault: it is done again next time

Record = dict[str, Any]


def hash_of(files: Iterable[Path], *facts: str) -> str:
    """A hash of source files and of whatever else results depend on."""
    digest = hashlib.sha256("\0".join(facts).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


class Journal:
    """The records of one file, and appending to it.

    Args:
        path: the file; made on the first record.
        code: hash of the code that does the work.
        worker: who appends (several workers may work on different keys at once).
    """

    def __init__(self, path: Path, code: str = "", worker: str = "") -> None:
        self.path, self.code, self.worker = path, code, worker
        self.finished: dict[str, Record] = {}
        self.interrupted: Counter[str] = Counter()
        self._open: dict[str, Record] = {}
        self._read = 0
        self.reload()

    def start(self, key: str, limit_s: float | None = None, **info: Any) -> None:
        """Notes that work begins, before it does. ``limit_s`` is how long it may take, ``info`` what it is."""
        self._append({"event": "start", "key": key, "limit_s": limit_s, **info})

    def finish(self, key: str, status: str, **result: Any) -> None:
        """Notes the end of started work. A status of :data:`INTERRUPTED` leaves it unfinished."""
        self._append({"event": "finish", "key": key, "status": status, **result})

    def resume(self) -> None:
        """Settles what a killed process left open: it is done again, unless that has come to nothing twice already."""
        for record in self.open():
            if self.interrupted[record["key"]] < 2:
                self.finish(record["key"], INTERRUPTED)
            else:
                self.finish(record["key"], "crashed", detail="the process died each time that it ran")

    def open(self, worker: str | None = None) -> list[Record]:
        """Start records without an end, oldest first: of one worker, or of all."""
        return [r for r in self._open.values() if worker is None or r["worker"] == worker]

    def reload(self) -> None:
        """Reads what was appended since the last call, by this process or another."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # still being written, or cut off by a crash
                    break
                self._read += len(line)
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                self._take(record)

    def _take(self, record: Record) -> None:
        key = record["key"]
        if record["event"] == "start":
            self._open[key] = record
            return
        started = self._open.pop(key, {})
        if record["status"] == INTERRUPTED:
            self.interrupted[key] += 1
        elif record["code"] == self.code:
            seconds = record["time"] - started.get("time", record["time"])
            self.finished[key] = {**started, **record, "seconds": round(seconds, 3)}

    def _append(self, record: Record) -> None:
        record |= {"time": round(time.time(), 3), "code": self.code, "worker": self.worker}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # one write to a file opened for appending: lines of several processes never mix
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if self.path.stat().st_size and not self._ends_in_newline():
                os.write(handle, b"\n")
            os.write(handle, (json.dumps(record) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        self.reload()

    def _ends_in_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

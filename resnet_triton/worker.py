"""A process that works through a queue of rows; :mod:`.rows` starts it.

Reads the rows as a JSON list from stdin. Every row is noted in the journal before it starts, so when the process dies
the driver knows which one killed it. A row that leaves the GPU unusable ends the process with :data:`LOST`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .journal import INTERRUPTED, Journal

LOST = 70  # exit code: the device is unusable for this process
_PR_SET_PDEATHSIG = 1  # of Linux's prctl

Handler = Callable[[dict[str, Any], Journal], dict[str, Any]]


def resolve(name: str) -> Handler:
    """The function that ``"module:function"`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, even by SIGKILL; elsewhere it ends after its row."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def device_state() -> str:
    """``"ok"``, or ``"lost"`` when a CUDA error made the device unusable for this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return "ok"
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return "lost"
    return "ok"


def run_row(row: dict[str, Any], handler: Handler, journal: Journal) -> bool:
    """Runs one row and notes how it ended; False when this process must not go on."""
    from .tuner import DeviceLost

    key = row["key"]
    journal.start(key, row["limit_s"], kernel=row["kernel"], config=row["config"])
    try:
        result = handler(row, journal)
        status = result.pop("status", "ok")
    except DeviceLost:  # noted under the name of the candidate that did it; the rest of the row goes on elsewhere
        journal.finish(key, INTERRUPTED)
        return False
    except Exception as error:
        traceback.print_exc()
        status, result = "error", {"detail": f"{type(error).__name__}: {error}"[:2000]}
    if device_state() == "lost":  # a fault in a kernel shows at the next synchronisation
        journal.finish(key, "crashed", detail=result.get("detail") or "the GPU reports an error after this row")
        return False
    journal.finish(key, status, **result)
    return True


def main(argv: list[str] | None = None) -> int:
    """Works through the rows of stdin."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--handler", required=True, help="module:function that runs a row")
    parser.add_argument("--journal", required=True, type=Path)
    parser.add_argument("--code", default="", help="hash of the code, noted in the journal")
    parser.add_argument("--name", default="", help="this worker's name in the journal")
    options = parser.parse_args(argv)
    parent = os.getppid()
    die_with_parent()
    rows = json.load(sys.stdin)
    journal = Journal(options.journal, options.code, options.name)
    handler = resolve(options.handler)
    for row in rows:
        if os.getppid() != parent:  # the driver is gone
            return 1
        print(f"ROW {row['key']}", flush=True)
        if not run_row(row, handler, journal):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(LOST)  # the usual exit would wait for the device
    return 0

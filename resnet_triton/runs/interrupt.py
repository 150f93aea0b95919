"""Ctrl-C and SIGTERM ask a run to stop after its present step; a second Ctrl-C stops it at once."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Catches the signals while it is entered; ``requested`` says whether one came."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def ignore(worker: int) -> None:
    """For worker processes: signals that reach the whole group are for the main process to answer."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

"""Handlers with planted times and faults, for the workers that `test_tune.py` starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from resnet_triton.devices import target_of
from resnet_triton.journal import Journal
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.sites import site_of
from resnet_triton.tune import measure_candidates
from resnet_triton.tuner import Timing

#: Positions among the candidates of a convolution.
UNFIT, KILLER, BEST = 1, 2, 4


def measure(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Times are planted. Every run of a candidate is noted in the file ``TUNE_LOG``.

    With ``TUNE_KILLER``, one candidate of the convolution with so many filters kills the process.
    """
    configs = [ConvConfig.from_dict(config) for config in row["payload"]["configs"]]

    def validate(config: ConvConfig) -> str | None:
        with Path(os.environ["TUNE_LOG"]).open("a") as log:
            log.write(f"{os.getpid()} {config}\n")
        filters = str(row["payload"].get("shape", {}).get("k"))
        if configs.index(config) == KILLER and os.environ.get("TUNE_KILLER") == filters:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ.get("TUNE_NAP", 0)))
        return None

    def timer(config: ConvConfig) -> Timing:
        i = configs.index(config)
        return Timing(5.0 if i == BEST else 10.0 + i, 20.0)

    return measure_candidates(row, journal, timer, validate)


def compile_ahead(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """One candidate spills."""
    configs = site_of(row["payload"]).candidates(target_of("NVIDIA H200"))
    position = configs.index(ConvConfig.from_dict(row["payload"]["config"]))
    return {"status": "unfit", "detail": "spills"} if position == UNFIT else {}

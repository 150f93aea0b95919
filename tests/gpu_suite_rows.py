"""Rows with planted faults, for the workers that `test_gpu_suite.py` starts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from resnet_triton.journal import Journal
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.tuner import Timing, entry_of, key_of, search

SHAPE, EPILOGUE, DTYPE = ConvShape(32, 14, 14, 256, 256, 3, 3, 1, 1), Epilogue(bn=True, relu=True), torch.bfloat16
CONFIGS = [ConvConfig("conv_tma", (bm // 4, 2, 2), 128, 64, warps) for bm in (64, 128) for warps in (2, 4, 8)]


def handle(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Does what the payload says; ``log`` notes every start, so that tests can count them."""
    payload = row["payload"]
    with Path(payload["log"]).open("a") as log:
        log.write(row["key"] + "\n")
    match payload["do"]:
        case "crash":
            os._exit(3)
        case "signal":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(600)
        case "raise":
            raise RuntimeError("planted")
        case "wrong":
            return {"status": "wrong", "error": 0.5, "library_error": 0.001, "detail": "planted"}
        case "nap":
            time.sleep(payload["s"])
    return {}


def tune(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Tunes a convolution whose candidates crash (0), hang (1), raise (2), are wrong (3), are slow (4) and fast (5)."""

    def validate(config: ConvConfig) -> str | None:
        match CONFIGS.index(config):
            case 0:
                os._exit(3)
            case 1:
                time.sleep(600)
            case 2:
                raise RuntimeError("out of resources")
            case 3:
                return "planted"
        return None

    def timer(config: ConvConfig) -> Timing:
        return Timing(float(10 - CONFIGS.index(config)), 20.0)

    name = key_of(SHAPE, EPILOGUE, DTYPE)
    trials = search(name, timer=timer, validate=validate, candidates=CONFIGS, journal=journal, limit_s=1.0)
    entry = entry_of(SHAPE, EPILOGUE, DTYPE, trials)
    assert entry is not None
    return {"entry": entry.to_dict()}

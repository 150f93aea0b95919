"""What a measurement must be reported with: GPU, clocks, versions, revision. Reads, never sets.

`python -m bench.gpu.environment` prints it as JSON.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .rows import ROOT

QUERY = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.limit", "temperature.gpu", "persistence_mode", "ecc.mode.current",
)  # fmt: skip


def output_of(command: list[str]) -> str | None:
    """What a command prints, or None if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def smi() -> dict[str, str]:
    """nvidia-smi's answers for the first GPU; empty without it."""
    answer = output_of(["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader", "--id=0"])
    values = [value.strip() for value in answer.splitlines()[0].split(",")] if answer else []
    return dict(zip(QUERY, values, strict=True)) if len(values) == len(QUERY) else {}


def code_hash(paths: Iterable[Path]) -> str:
    """A hash of source files: results of other code are not taken for this one's."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Everything, as JSON; ``device`` is None without a CUDA device."""
    import torch

    found: dict[str, Any] = {
        "device": None,
        "nvidia_smi": smi(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "cudnn": torch.backends.cudnn.version(),
        "cuda": torch.version.cuda,
        "git": output_of(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
        "compute_sanitizer": output_of(["which", "compute-sanitizer"]),
    }
    names = ("torch", "triton", "numpy", "torchvision", "timm", "pytest", "pytest-benchmark")
    found |= {name: version(name) for name in names}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["device"] = {
            "name": properties.name,
            "sm": properties.major * 10 + properties.minor,
            "multiprocessors": properties.multi_processor_count,
            "shared_memory": getattr(properties, "shared_memory_per_block_optin", 0),
            "l2_bytes": getattr(properties, "L2_cache_size", 0),
            "memory_bytes": properties.total_memory,
        }
    return found


if __name__ == "__main__":
    json.dump(environment(), sys.stdout)

"""Rows of the suite in processes of their own (:mod:`resnet_triton.rows`), and the environment of its children."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from resnet_triton.rows import Row, end, run_rows

__all__ = ["ROOT", "Row", "child_env", "end", "run_rows"]

ROOT = Path(__file__).resolve().parents[2]


def child_env(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: this repository on its path, no setting of the caller that changes what runs."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    return {**env, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **(extra or {})}

"""Compiled kernels: this folder must run in a process whose triton does not interpret."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise pytest.UsageError(
        "tests/codegen compiles kernels, and TRITON_INTERPRET is set: run it in a process without it"
    )

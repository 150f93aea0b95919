"""Tests here run kernels in Triton's interpreter, which has to be chosen before triton is imported."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/interpreter needs TRITON_INTERPRET=1 in the environment, because triton reads it when it is imported, "
        "and a process of its own: run `TRITON_INTERPRET=1 pytest tests/interpreter`, and the other tests with "
        "`pytest tests --ignore=tests/interpreter`, or all with `make test`"
    )

from tests.interpreter import patches  # imports triton

patches.install()


def pytest_configure(config: pytest.Config) -> None:
    # numpy reports Inf - Inf and overflow, which some tests are about
    config.addinivalue_line("filterwarnings", "ignore:(invalid value|overflow) encountered:RuntimeWarning")

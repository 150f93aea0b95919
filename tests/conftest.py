"""Rules for every test.

- tests marked ``gpu`` are skipped without a CUDA device;
- any other skip must have a reason of :data:`ALLOWED_SKIPS`, else it counts as a failure: a skip must not hide a test;
- a test may not take more CPU time than its rung's cap in ``budget.toml`` (CPU time, so that a busy machine does not
  fail it);
- every test starts from the same random state and must leave ``use_backend`` as it was.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest itself needs it there

ROOT = Path(__file__).resolve().parent.parent
BUDGET = tomllib.loads(Path(__file__).with_name("budget.toml").read_text())
NEEDS_GPU = "needs a CUDA device"

#: Patterns of the reasons for which a test may be skipped: something is absent that a user may lack too.
ALLOWED_SKIPS = (
    NEEDS_GPU,
    r"could not import '(mlxtend|sklearn|torchvision|timm|transformers|segmentation_models_pytorch|matplotlib|jax)",
    r"could not import 'cudnn'",
    r"make is not installed",
    r"resnet-triton is not installed in this environment",
    r"torch\.compile for the CPU needs a C\+\+ compiler",
    r"no network",
)


def skip_is_allowed(reason: str) -> bool:
    """Whether a test may be skipped for this reason."""
    return any(re.search(pattern, reason) for pattern in ALLOWED_SKIPS)


def rung(path: str) -> str | None:
    """The entry of ``budget.toml`` for a path relative to the repository: the longest prefix wins."""
    return max((r for r in BUDGET if path == r or path.startswith(r + "/")), key=len, default=None)


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    return sum(os.times()[:4])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    gpu = [item for item in items if item.get_closest_marker("gpu") and here in item.path.parents]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason=NEEDS_GPU))


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if report.skipped and not hasattr(report, "wasxfail") and not skip_is_allowed(reason):
        report.outcome = "failed"
        report.longrepr = f"{reason}\nthis reason is not in ALLOWED_SKIPS of tests/conftest.py"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    start = cpu_seconds()
    try:
        return (yield)
    finally:
        item.stash[CPU_TIME] = cpu_seconds() - start


CPU_TIME = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _refuse_skip(report)
    report.user_properties.append(("cpu_s", item.stash.get(CPU_TIME, 0.0) if call.when == "call" else 0.0))
    if call.when == "call" and report.passed:
        name = rung(item.path.relative_to(ROOT).as_posix())
        cap, used = BUDGET[name]["test_cpu_s"], item.stash.get(CPU_TIME, 0.0)
        if used > cap:
            report.outcome = "failed"
            report.longrepr = (
                f"took {used:.1f} s of CPU time; tests/budget.toml allows {cap} s a test under {name}: "
                f"shrink shapes, not coverage"
            )
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    seconds: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            name = rung(report.nodeid.split("::")[0]) if isinstance(report, pytest.TestReport) else None
            if name:
                seconds[name] += dict(report.user_properties).get("cpu_s", 0.0)
    for name, used in sorted(seconds.items()):
        allowed = 60 * BUDGET[name]["total_minutes"]
        if used > 2 * allowed:  # the totals are for two workers
            terminalreporter.write_line(
                f"{name} took {used:.0f} s of CPU time; tests/budget.toml plans {2 * allowed:.0f} s",
                yellow=True,
            )


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random state for every test, and no leaked backend."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    if "resnet_triton.backend" in sys.modules:
        backend = sys.modules["resnet_triton.backend"]
        assert backend.current_backend() == "auto", f"use_backend({backend.current_backend()!r}) is still in force"


@pytest.fixture
def counts():
    """``kernels.launch.COUNTS``, emptied: how often each kernel was launched in this test."""
    from resnet_triton.kernels.launch import COUNTS

    COUNTS.clear()
    return COUNTS

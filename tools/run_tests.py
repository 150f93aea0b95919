"""Runs the tests as separate pytest processes and sums them up.

Triton reads TRITON_INTERPRET when it is imported, so interpreted and compiled tests cannot share a process.
Every group runs even if another one failed; the exit code is 0 only if all passed and each of them ran tests.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

GROUPS: dict[str, tuple[list[str], dict[str, str]]] = {
    "compiled": (["tests", "--ignore=tests/interpreter", "--ignore=tests/codegen"], {}),
    "interpreter": (["tests/interpreter"], {"TRITON_INTERPRET": "1"}),
    "codegen": (["tests/codegen"], {}),
}
NO_TESTS_COLLECTED = 5
COUNTS = ("tests", "failures", "errors", "skipped")


def environment(jobs: int, overrides: dict[str, str]) -> dict[str, str]:
    """The variables of one group. Of several workers, each computes on one thread unless told otherwise."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if jobs > 1:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
            env.setdefault(name, "1")
    return env | overrides


def count(report: Path) -> dict[str, int]:
    """Numbers of tests, failures, errors and skips in a JUnit report; zeros if pytest wrote none."""
    if not report.exists():
        return dict.fromkeys(COUNTS, 0)
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    return {key: sum(int(suite.get(key, 0)) for suite in suites) for key in COUNTS}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="pytest workers per group")
    parser.add_argument("--only", choices=GROUPS, action="append", help="run this group (repeatable)")
    parser.add_argument("pytest_args", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args(argv)

    reports = Path(".cache", "reports")
    reports.mkdir(parents=True, exist_ok=True)
    lines, totals, failed = [], dict.fromkeys(COUNTS, 0), False
    start = time.monotonic()
    for name in options.only or GROUPS:
        paths, overrides = GROUPS[name]
        report = reports / f"{name}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", *paths, "--benchmark-disable", f"--junitxml={report}"]
        # One worker is slower than none.
        command += ["-n", str(options.jobs)] if options.jobs > 1 else []
        print(f"== {name}: pytest {' '.join(command[3:])} {' '.join(options.pytest_args)}".rstrip(), flush=True)
        group_start = time.monotonic()
        code = subprocess.call(command + options.pytest_args, env=environment(options.jobs, overrides))
        counts = count(report)
        totals = {key: totals[key] + counts[key] for key in COUNTS}
        # With arguments such as -k, a group may have nothing to run; without them that is a failure.
        good = code == 0 or (code == NO_TESTS_COLLECTED and bool(options.pytest_args))
        failed |= not good
        verdict = "ok" if good else f"FAILED (pytest exit code {code})"
        lines.append(f"{name:<12} {verdict}, {counts['tests']} tests, {time.monotonic() - group_start:.0f} s")

    bad = totals["failures"] + totals["errors"]
    passed = totals["tests"] - bad - totals["skipped"]
    failed |= passed == 0
    lines.append(f"{'all':<12} {'FAILED' if failed else 'ok'}, {time.monotonic() - start:.0f} s")
    print("\n".join(["", *lines]))
    print(f"tests: {passed} passed, {bad} failed, {totals['skipped']} skipped", flush=True)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""The steps of `bench/gpu_suite.py`. Each does what it can until its deadline and returns one line about it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from resnet_triton.journal import INTERRUPTED
from resnet_triton.results import OK
from resnet_triton.results import Row as Result
from resnet_triton.results import save as save_results
from resnet_triton.tuning import file_name, save

from . import check as checks
from . import limits as limit
from . import precompile, report, training
from . import tune as tuning
from .rows import ROOT, Row, child_env, end, run_rows
from .suite import Suite

CHECK_WORKERS = 4
TRAIN_CHECK_SHARE = 0.35  # of the train step's time


def environment(suite: Suite, deadline: float) -> str:
    """Step 0: what the results are reported with."""
    device = suite.environment.get("device")
    smi = suite.environment.get("nvidia_smi", {})
    report.write_json(suite.out / "environment.json", suite.environment)
    torch, triton = suite.environment["torch"], suite.environment["triton"]
    return f"{device['name'] if device else 'no CUDA device'}, torch {torch}, triton {triton}, {smi.get('clocks.sm')}"


def limits(suite: Suite, deadline: float) -> str:
    """Step 1: micro-benchmarks."""
    if suite.environment.get("device") is None:
        report.write_json(suite.out / "limits.json", {"state": "not measured: no CUDA device"})
        return "not measured: no CUDA device"
    queue = limit.rows()
    run_rows(queue, "bench.gpu.limits:run_row", suite.limits, deadline=deadline)
    found = {key: r for key, r in suite.limits.finished.items() if key.startswith("limit ")}
    device = suite.environment["device"]
    versions = {name: suite.environment[name] for name in ("torch", "triton")}
    driver = suite.environment["nvidia_smi"].get("driver_version")
    entry = limit.record(found, {**device, **versions, "driver": driver})
    keep = ("value", "unit", "spread", "status", "config", "host_us", "sm_clock_mhz", "detail")
    rounded = {key: {name: r[name] for name in keep if name in r} for key, r in found.items()}
    report.write_json(suite.out / "limits.json", {"devices.json": {device["name"]: entry}, "rows": rounded})
    return f"{report.count_text(found.values())} of {len(queue)}"


def check(suite: Suite, deadline: float) -> str:
    """Step 2: numerics of every kernel at full size, the GPU tests, compute-sanitizer."""
    if suite.dry:
        queue = checks.dry_rows()
        run_rows(queue, checks.HANDLER, suite.checks, deadline=deadline, env={"TRITON_INTERPRET": "1"})
    else:
        queue = checks.rows(suite.target())
        run_rows(queue, checks.HANDLER, suite.checks, deadline=deadline, workers=CHECK_WORKERS)
        pytest_gpu(suite, deadline)
        sanitize(suite, deadline)
    done = suite.check_records
    report.write_csv(suite.out / "check.csv", report.CHECK_COLUMNS, done)
    return f"{report.count_text(done)} of {len(queue)}"


def pytest_gpu(suite: Suite, deadline: float) -> None:
    """`pytest -m gpu tests` as one row."""
    key = "pytest -m gpu tests"
    if key in suite.checks.finished or time.monotonic() > deadline:
        return
    suite.checks.start(key, kernel="pytest", config="-")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests", "-q", "--maxfail=20", "-p", "no:cacheprovider"]
    command += ["--ignore=tests/interpreter", "--ignore=tests/codegen"]
    code, text = suite.child(command, min(deadline, time.monotonic() + 120))
    nothing = 5  # pytest's exit code when no test was selected
    status = "ok" if code in (0, nothing) else INTERRUPTED if code is None else "failed"
    suite.checks.finish(key, status, detail=text[-1500:] if code else "".join(text.splitlines()[-1:]))


def sanitize(suite: Suite, deadline: float) -> None:
    """One small case per kernel under compute-sanitizer's memcheck, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    target = suite.target()
    rows = [*checks.sanitizer_rows(target), *on_sanitizer(training.sanitizer_rows(target))]
    if tool is None or all(row.key in suite.checks.finished for row in rows):
        return
    text = run_rows(
        rows, checks.HANDLER, suite.checks, deadline=min(deadline, time.monotonic() + 150),
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, prefix=[tool, "--tool", "memcheck", "--print-limit", "3"],
    )  # fmt: skip
    by_row = {part.split("\n", 1)[0]: part for part in text.split("ROW ")[1:]}
    for row in rows:
        part = by_row.get(row.key, "")
        if "========= Invalid" in part or "========= Program hit" in part:
            suite.checks.start(row.key, kernel=row.kernel, config=row.config)
            suite.checks.finish(row.key, "memory error", detail=part[part.index("========= ") :][:1500])


def on_sanitizer(rows: list[Row]) -> list[Row]:
    """The rows under names and limits of their own."""
    return [Row(f"sanitizer: {r.key}", r.kernel, r.config, 90, r.payload) for r in rows]


def tune(suite: Suite, deadline: float) -> str:
    """Step 3: the fastest configuration of every convolution, chain and step of training, beside cuDNN."""
    rows = tuning.dry_rows() if suite.dry else tuning.rows(suite.target())
    env = {"TRITON_INTERPRET": "1"} if suite.dry else {}
    run_rows(rows, tuning.HANDLER, suite.tuning, deadline=deadline, env=env)
    lines = write_tuned(suite)
    candidates = report.count_text(candidate_records(suite))
    return f"{len(lines)} of {len(rows)} convolutions, chains and steps of training, candidates: {candidates}"


def candidate_records(suite: Suite) -> list[dict[str, Any]]:
    """Finished candidates of the tune step."""
    return [r for key, r in suite.tuning.finished.items() if key.startswith("tune ") and " / " in key]


def write_tuned(suite: Suite) -> list[dict[str, Any]]:
    """Writes the tuned file of this device and `layers.csv`; returns the lines of the latter."""
    entries, lines = tuning.results(suite.tuning)
    if entries:
        save(suite.out / file_name(suite.device_name), suite.device_name, entries)
        report.write_csv(suite.out / "layers.csv", tuning.COLUMNS, lines)
    return lines


def train(suite: Suite, deadline: float) -> str:
    """Step 4: training: numerics of its kernels, networks and single steps beside PyTorch."""
    env = {"RESNET_TRITON_CONFIG_DIR": str(suite.out.resolve())}
    if suite.dry:
        checked, timed = training.dry_rows(), training.dry_timed_rows()
        run_rows(checked, checks.HANDLER, suite.checks, deadline=deadline, env={"TRITON_INTERPRET": "1"})
    else:
        checked, timed = training.check_rows(suite.target()), training.timed_rows(suite.target())
        half = deadline - (1 - TRAIN_CHECK_SHARE) * (deadline - time.monotonic())
        run_rows(checked, checks.HANDLER, suite.checks, deadline=half, workers=CHECK_WORKERS)
        env["TORCHINDUCTOR_CACHE_DIR"] = str(suite.out.resolve() / "inductor")  # compiling goes on where it stopped
    run_rows(timed, training.HANDLER, suite.training, deadline=deadline, env=env)
    report.write_csv(suite.out / "check.csv", report.CHECK_COLUMNS, suite.check_records)
    write_training(suite)
    keys = {row.key for row in checked}
    done = [record for record in suite.check_records if record["key"] in keys]
    times = report.count_text(suite.train_records)
    return f"checks: {report.count_text(done)} of {len(checked)}; timed: {times} of {len(timed)}"


def write_training(suite: Suite) -> None:
    """Writes `training.json`, which `bench.report` reads beside a device's `latest.json`."""
    records = suite.train_records
    rows: dict[tuple[str, ...], Result] = {}
    for record in records:
        for data in record.get("rows", []):
            row = Result(**data)
            known = rows.get(row.key)
            if known is None or known.status != OK or row.status == OK:
                rows[row.key] = row
    if rows:
        save_results(suite.out, list(rows.values()), records[-1]["environment"], "training")


def bench(suite: Suite, deadline: float) -> str:
    """Step 5: `pytest bench/` with the fresh configurations, but for what the train step measures."""
    env = {"RESNET_TRITON_CONFIG_DIR": str(suite.out.resolve())}
    command = [sys.executable, "-m", "pytest", "bench/", "-q", "-p", "no:cacheprovider"]
    command.append("--ignore=bench/test_training.py")
    command += ["--collect-only"] if suite.dry else [f"--benchmark-json={suite.out.resolve() / 'bench.json'}"]
    code, text = suite.child(command, deadline, env)
    last = "".join(text.strip().splitlines()[-1:])
    if code not in (0, 5):
        print(text[-3000:], flush=True)
    return f"{'stopped in time' if code is None else f'exit code {code}'}: {last}"


#: Name, what it does, share of the time by which it must be over, estimated seconds.
STEPS: dict[str, tuple[Callable[[Suite, float], str], float, int]] = {
    "environment": (environment, 0.03, 10),
    "limits": (limits, 0.17, 65),
    "check": (check, 0.45, 175),
    "tune": (tune, 0.70, 160),
    "train": (train, 0.85, 400),
    "bench": (bench, 1.00, 105),
}


@contextlib.contextmanager
def compiling_ahead(suite: Suite, steps: list[str]) -> Iterator[None]:
    """Meanwhile, other cores compile what check and tune will need."""
    if suite.environment.get("device") is None or not {"check", "tune"} & set(steps):
        yield
        return
    target = suite.target()
    jobs = checks.compile_jobs(target) if "check" in steps else []
    jobs += tuning.compile_jobs(target) if "tune" in steps else []
    command = [sys.executable, "-m", "bench.gpu.precompile", "--sm", str(target.sm)]
    command += ["--multiprocessors", str(target.multiprocessors)]
    with tempfile.TemporaryFile("w+") as queue, tempfile.TemporaryFile("w+", errors="replace") as output:
        json.dump(precompile.distinct(jobs), queue)
        queue.seek(0)
        process = subprocess.Popen(
            command, cwd=ROOT, env=child_env(), stdin=queue, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            yield
        finally:
            end(process)
            output.seek(0)
            last = "".join(output.readlines()[-1:]).strip()
            suite.steps.append({"name": "(compile)", "state": "beside", "seconds": 0.0, "text": last})

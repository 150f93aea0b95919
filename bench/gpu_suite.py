"""One command for a visit to a GPU: `python bench/gpu_suite.py --minutes 9 --out DIR`.

Steps, most valuable first: environment, limits (micro-benchmarks), check (numerics of every kernel), tune, train
(training: numerics and times), bench. Stops by itself in time. A second call with the same --out goes on where the
first one stopped; results of changed code are made anew. Rows run in worker processes, so a crash or a hang costs one
row and is reported with its kernel and configuration. Needs torch, triton, numpy, pytest and pytest-benchmark, no
installation. Leaves the GPU's settings as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# the repository instead of this folder, whose modules are no top-level ones
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "bench")]

from bench.gpu import report, tune  # noqa: E402
from bench.gpu.rows import child_env  # noqa: E402
from bench.gpu.steps import STEPS, compiling_ahead, write_training, write_tuned  # noqa: E402
from bench.gpu.suite import DRY, Suite  # noqa: E402
from resnet_triton.tuning import file_name  # noqa: E402

FILES = (
    "environment.json",
    "limits.json",
    "check.csv",
    "layers.csv",
    "training.json",
    "training.csv",
    "bench.json",
    "journal.jsonl",
    "summary.json",
)


def run_steps(suite: Suite, names: list[str]) -> None:
    """Runs the steps in order, each until its share of the time; the last one may use all that is left."""
    for name in names:
        step, share, estimate = STEPS[name]
        deadline = suite.until(1.0 if name == names[-1] else share)
        begun = time.monotonic()
        left = suite.until(1.0) - begun
        if left < 5 and name != "environment":
            suite.steps.append({"name": name, "state": "no time", "seconds": 0.0, "text": "call again to go on"})
            continue
        print(f"== {name}: until {deadline - suite.started:.0f} s, about {estimate} s on a GPU", flush=True)
        try:
            text, state = step(suite, deadline), "done"
        except Exception as error:  # a step that fails must not cost the later ones
            text, state = f"{type(error).__name__}: {error}", "failed"
        seconds = time.monotonic() - begun
        suite.steps.append({"name": name, "state": state, "seconds": seconds, "text": text})
        print(f"   {state} after {seconds:.0f} s: {text}", flush=True)
        summarise(suite)


def summarise(suite: Suite) -> dict[str, Any]:
    """Writes `summary.json` from what there is."""
    summary: dict[str, Any] = {
        "device": suite.device_name,
        "seconds": round(time.monotonic() - suite.started, 1),
        "code": {"limits": suite.limits.code, "check": suite.checks.code, "tune": suite.tuning.code},
        "steps": suite.steps,
        "problems": report.problems(suite.records),
    }
    entry = None
    with contextlib.suppress(OSError, ValueError):
        entry = json.loads((suite.out / "limits.json").read_text()).get("devices.json", {}).get(suite.device_name)
    if entry:
        rates = {f"{name}_tflop_s": rate for name, rate in entry["tensor_tflops"].items()}
        summary["limits"] = {"hbm_tb_s": entry["hbm_tb_s"], "l2_tb_s": entry["l2_tb_s"], **rates}
    if not suite.dry and suite.environment.get("device"):
        summary["networks"] = tune.totals(tune.results(suite.tuning)[1], suite.target())
    report.write_json(suite.out / "summary.json", summary)
    return summary


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    made.add_argument("--minutes", type=float, default=9.0, help="stop by itself after this time (default: 9)")
    made.add_argument(
        "--out", type=Path, default=Path(".cache/gpu_suite"), help="folder of the results, kept between calls"
    )
    made.add_argument("--steps", default=",".join(STEPS), help=f"comma-separated, of: {', '.join(STEPS)}")
    made.add_argument("--fresh", action="store_true", help="forget the results in --out")
    made.add_argument("--list", action="store_true", help="print the steps with estimated times")
    made.add_argument(
        "--dry-run", action="store_true", help="no GPU: tiny sizes in Triton's interpreter, invented times"
    )
    return made


def open_suite(options: argparse.Namespace, started: float) -> Suite | str:
    """The suite that the options ask for, or why it cannot run."""
    probe = [sys.executable, "-m", "bench.gpu.environment"]
    answer = subprocess.run(probe, cwd=ROOT, env=child_env(), capture_output=True, text=True)
    if answer.returncode != 0:
        return f"the environment cannot be read: {''.join(answer.stderr.strip().splitlines()[-1:])}"
    found = json.loads(answer.stdout)
    if options.dry_run:
        found["device"] = None
    elif found["device"] is None:
        return "no CUDA device: run this on a machine with a GPU, or try it with --dry-run"
    name = found["device"]["name"] if found["device"] else DRY
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        for file in (*FILES, file_name(name)):
            (out / file).unlink(missing_ok=True)
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((out / "environment.json").read_text())["device"]
        known = before["name"] if before else DRY
        if known != name:
            return f"{out} holds results of {known}, this is {name}: take another --out, or --fresh"
    return Suite(out, 60 * options.minutes, options.dry_run, started, found)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    options = parser().parse_args(argv)
    if options.list:
        for name, (step, _, seconds) in STEPS.items():
            print(f"{name:<12} about {seconds:4} s  {(step.__doc__ or '').split(': ', 1)[-1]}")
        return 0
    wanted = options.steps.split(",")
    unknown = sorted(set(wanted) - set(STEPS))
    if unknown:
        print(f"--steps: unknown {', '.join(unknown)}; allowed: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    suite = open_suite(options, started)
    if isinstance(suite, str):
        print(f"gpu_suite: {suite}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = [name for name in STEPS if name in wanted]
    interrupted = False
    try:
        with compiling_ahead(suite, names):
            run_steps(suite, names)
    except KeyboardInterrupt:
        interrupted = True
    for journal in (suite.limits, suite.checks, suite.tuning, suite.training):
        journal.reload()
    write_tuned(suite)
    write_training(suite)
    summary = summarise(suite)
    print(report.table(summary), flush=True)
    if interrupted:
        return 130
    return int(bool(summary["problems"]) or any(s["state"] == "failed" for s in suite.steps))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # threads of a step that was interrupted may still wait for a process

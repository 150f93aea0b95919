"""One call of `bench/gpu_suite.py`: its clock, its journals, and the processes it starts."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_triton.devices import Target, known_devices
from resnet_triton.journal import INTERRUPTED, Journal

from .environment import code_hash
from .rows import ROOT, child_env, end

DRY = "dry-run"  # instead of a device's name
#: Modules of the package that compare, print and draw: a change of theirs changes no result of the checks.
BESIDE = {
    f"{name}.py"
    for name in (
        "compare", "errors", "jax_provider", "plot", "providers", "results", "tables", "timing", "verdict",
    )
}  # fmt: skip


@dataclass
class Suite:
    """One call: its options, its clock, and what the steps have found out so far."""

    out: Path
    seconds: float
    dry: bool
    started: float
    environment: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        kernels, package = list(ROOT.glob("kernels/*.py")), ROOT / "resnet_triton"
        checked = [path for path in package.glob("*.py") if path.name not in BESIDE]
        checked += package.glob("training/*.py")
        here = ROOT / "bench/gpu"
        self.limits = self._journal(here / "limits.py", here / "limit_kernels.py")
        self.checks = self._journal(*kernels, *checked)
        measuring = [package / name for name in ("tuner.py", "measure.py", "training/measure.py")]
        self.tuning = self._journal(*kernels, *measuring)
        self.training = self._journal(
            *kernels, *checked, *(ROOT / "bench").glob("training*.py"), ROOT / "bench" / "cudnn_graphs.py"
        )
        for record in self.checks.open():  # of a call that was killed
            self.checks.finish(record["key"], INTERRUPTED)

    def _journal(self, *code: Path) -> Journal:
        """The journal, in which results of this code count."""
        return Journal(self.out / "journal.jsonl", ("dry" if self.dry else "") + code_hash(code))

    @property
    def records(self) -> list[dict[str, Any]]:
        """What is finished, of all steps."""
        limits = [r for key, r in self.limits.finished.items() if key.startswith("limit ")]
        tuned = [r for key, r in self.tuning.finished.items() if key.startswith("tune ")]
        return limits + self.check_records + tuned + self.train_records

    @property
    def check_records(self) -> list[dict[str, Any]]:
        """What is finished of the check step."""
        return [r for key, r in self.checks.finished.items() if not key.startswith(("tune ", "limit ", "train "))]

    @property
    def train_records(self) -> list[dict[str, Any]]:
        """What is finished of what the train step times."""
        return [r for key, r in self.training.finished.items() if key.startswith("train ")]

    @property
    def reserve(self) -> float:
        """Seconds kept for writing the results."""
        return min(20.0, 0.05 * self.seconds)

    def until(self, share: float) -> float:
        """The moment, on ``time.monotonic()``, when this share of the time is used up."""
        return self.started + (self.seconds - self.reserve) * share

    @property
    def device_name(self) -> str:
        """As PyTorch names it."""
        device = self.environment.get("device")
        return device["name"] if device else DRY

    def target(self) -> Target:
        """The planner's record of this device, without opening it here."""
        name = self.device_name
        if name in known_devices():
            return known_devices()[name]
        base = known_devices()["NVIDIA H200"]
        device = self.environment["device"]
        return Target(
            name, device["sm"], device["multiprocessors"], base.clock_ghz, device["shared_memory"],
            base.hbm_tb_s, base.l2_tb_s, base.tensor_tflops,
        )  # fmt: skip

    def child(self, command: list[str], deadline: float, env: dict[str, str] | None = None) -> tuple[int | None, str]:
        """Runs a command until the deadline; exit code (None if it was ended) and what it printed."""
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=child_env(env), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            code: int | None
            try:
                code = process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
                process.send_signal(signal.SIGINT)  # pytest then still writes its reports
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=min(10.0, self.reserve))
            finally:
                end(process)
            output.seek(0)
            return code, output.read()

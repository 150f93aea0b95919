"""What a comparison writes down: one row per measurement, the environment it was made in, and the files that keep both.

Column names are those of timm's ``benchmark.py`` where it has them, so that tables can be put side by side.
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._version import __version__

FORMAT = 1
NO_CUDA = "not measured: no CUDA device"
OK, WRONG, FAILED = "ok", "WRONG", "failed"


@dataclass
class Row:
    """One line of the table; None is "not measured" or "does not apply".

    Args:
        suite: ``"models"``, ``"layers"``, ``"accuracy"``, ``"training"`` or ``"training layers"``.
        device: ``"cpu"``, a GPU's name, or ``"cuda"`` for a row that no GPU was there to measure.
        provider: who computed it.
        model: network or, in the layers suite, the step.
        dtype: of the activations; ``tf32`` is float32 with TF32 matrix instructions.
        status: ``"ok"``, or why there is no number: ``"WRONG: ..."``, ``"needs g++"``,
            ``"not available: ..."``, ``"not measured: ..."``.
        infer_batch_size, infer_img_size: images of a batch, pixels of a side.
        infer_samples_per_sec: images per second, from the median time.
        infer_step_time: median milliseconds of one forward; step_time_p20 and step_time_p80 are its spread.
        rounds: samples behind these.
        speedup: against PyTorch eager of the same dtype; speedup_fp32: against eager float32.
        error, eager_error: largest deviation of the logits from float64 over the largest logit; and eager's own.
        accuracy, agreement: share of test images classified right, and as float32 eager classifies them.
        images: test images behind these two.
        others_cpu: share of the cores that other processes took while the row was timed (Linux).
        host_time: median milliseconds until the call returns (GPU only).
        peak_memory_mb: largest allocation during a forward, weights included, in 2^20 bytes (GPU only).
        tflops: achieved, two FLOP per multiply-add, in 10^12 per second.
        param_count: parameters in millions; infer_gmacs: 10^9 multiply-adds of one image.
        predicted_step_time: milliseconds by the cost model; a prediction, never a measurement.
        predicted_for: the device that it is for.
        train_batch_size, train_img_size, train_samples_per_sec, train_step_time: the same of a training step, whose
            ``error`` is that of its gradients; train_fwd_time, train_bwd_time, train_opt_time: median milliseconds of
            its parts.
        saved_mb_per_image: what autograd keeps between forward and backward, parameters not counted, in 10^6 bytes.
        note: what else a reader must know.
        samples: seconds of each round.
    """

    suite: str
    device: str
    provider: str
    model: str
    dtype: str
    status: str = OK
    infer_batch_size: int | None = None
    infer_img_size: int | None = None
    infer_samples_per_sec: float | None = None
    infer_step_time: float | None = None
    step_time_p20: float | None = None
    step_time_p80: float | None = None
    rounds: int | None = None
    speedup: float | None = None
    speedup_fp32: float | None = None
    error: float | None = None
    eager_error: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    images: int | None = None
    others_cpu: float | None = None
    host_time: float | None = None
    peak_memory_mb: float | None = None
    tflops: float | None = None
    param_count: float | None = None
    infer_gmacs: float | None = None
    predicted_step_time: float | None = None
    predicted_for: str | None = None
    train_batch_size: int | None = None
    train_img_size: int | None = None
    train_samples_per_sec: float | None = None
    train_step_time: float | None = None
    train_fwd_time: float | None = None
    train_bwd_time: float | None = None
    train_opt_time: float | None = None
    saved_mb_per_image: float | None = None
    note: str = ""
    samples: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the row within one run."""
        batch = self.train_batch_size or self.infer_batch_size
        return self.suite, self.device, self.model, str(batch), self.dtype, self.provider


COLUMNS = tuple(f.name for f in fields(Row) if f.name != "samples")


def device_name() -> str:
    """Name of the GPU, or ``"cpu"`` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def folder_name(device: str) -> str:
    """``"NVIDIA H200"`` -> ``"NVIDIA_H200"``."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", device)


def environment(device: str | None = None) -> dict[str, Any]:
    """Hardware, versions and conditions that a reader needs to repeat the numbers.

    Args:
        device: ``"cpu"`` where a GPU is there and was not measured; None is :func:`device_name`.
    """
    device = device_name() if device is None else device
    env: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cpu": cpu_name(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "torchvision": version("torchvision"),
        "jax": version("jax"),
        "resnet_triton": __version__,
        "cudnn": torch.backends.cudnn.version(),
        "mkldnn": torch.backends.mkldnn.is_available(),
    }
    if device != "cpu":
        env |= {"cuda": torch.version.cuda, "clocks": gpu_clocks()}
    return env


def version(distribution: str) -> str | None:
    """Installed version, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's model name."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def gpu_clocks() -> str:
    """Current and highest clocks as nvidia-smi prints them, or why they are unknown."""
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    return "; ".join(done.stdout.split("\n")[:2]).strip()


def save(folder: Path, rows: Sequence[Row], env: dict[str, Any], name: str = "latest") -> Path:
    """Writes ``name.json`` (everything) and ``name.csv`` (without the samples) to a folder; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in WRITERS:
        write(folder / f"{name}{suffix}", rows, env)
    return folder / f"{name}.json"


def write(path: Path, rows: Sequence[Row], env: dict[str, Any]) -> None:
    """Writes one file, atomically: ``.json`` (everything) or ``.csv`` (rows without the samples).

    Raises:
        ValueError: for another suffix.
    """
    if path.suffix not in WRITERS:
        raise ValueError(f"{path}: the name of a result file must end in {' or '.join(WRITERS)}")
    part = path.with_name(f"{path.name}.part")
    part.write_text(WRITERS[path.suffix](rows, env), newline="")
    os.replace(part, path)


def _as_json(rows: Sequence[Row], env: dict[str, Any]) -> str:
    return json.dumps({"format": FORMAT, "environment": env, "rows": [asdict(row) for row in rows]}, indent=1)


def _as_csv(rows: Sequence[Row], env: dict[str, Any]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()


WRITERS: dict[str, Callable[[Sequence[Row], dict[str, Any]], str]] = {".json": _as_json, ".csv": _as_csv}


def load(path: Path) -> tuple[list[Row], dict[str, Any]]:
    """Reads a JSON file that :func:`write` wrote: rows and environment.

    Raises:
        ValueError: naming the file, when it is not such a file.
    """
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, this version reads {FORMAT}")
        return [Row(**row) for row in data["rows"]], data["environment"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no result of a bench ({error}); make a new one: pytest bench/, or resnet-triton bench --output"
        ) from error

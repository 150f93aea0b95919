"""Tunes the convolutions of the ResNets on this GPU and reports them beside cuDNN, layer by layer.

A row is one convolution; its candidates are noted in the journal one by one, so a candidate that crashes or hangs costs
itself only. Results become the tuned file of this device and `layers.csv`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from resnet_triton import cost, tuning
from resnet_triton.devices import Target, known_devices, target_of
from resnet_triton.journal import Journal
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.shapes import BN_ADD_RELU, BN_RELU, resnet_convs
from resnet_triton.tuner import Timing, Trial, candidates, entry_of, key_of, search

from .precompile import Job, job
from .rows import Row

HANDLER = "bench.gpu.tune:run_row"
PREFIX = "tune "
#: Depth (50 has every convolution of 101 and 152, 18 those of 34), batch and dtype, most valuable first.
NETWORKS = (
    (50, 256, "bfloat16"),
    (50, 32, "bfloat16"),
    (50, 1, "bfloat16"),
    (18, 256, "bfloat16"),
    (18, 32, "bfloat16"),
    (18, 1, "bfloat16"),
    (50, 256, "float16"),
    (50, 32, "float16"),
    (50, 1, "float16"),
    (50, 128, "bfloat16"),
    (50, 64, "bfloat16"),
    (50, 8, "bfloat16"),
)
CANDIDATE_S = 30.0
ROW_S = 240.0
COLUMNS = (
    "layer", "network", "batch", "dtype", "count", "shape", "epilogue", "kernel", "config", "ours_us", "spread",
    "cudnn_conv_us", "cudnn_passes_us", "speedup", "conv_only_speedup", "tflops", "tb_s", "predicted_us", "limit",
    "tried", "failed",
)  # fmt: skip


class Site(NamedTuple):
    """A distinct convolution of a network, and the names of the layers that it is."""

    shape: ConvShape
    epilogue: Epilogue
    names: list[str]


def sites(depth: int, batch: int, dtype: str, target: Target) -> list[Site]:
    """A network's distinct convolutions (as tuned files tell them apart), those with the most predicted time first."""
    found: dict[tuple[ConvShape, bool], Site] = {}
    for name, shape, epilogue in resnet_convs(depth, batch):
        found.setdefault((shape, epilogue.residual), Site(shape, epilogue, [])).names.append(name)
    kind = getattr(torch, dtype)

    def total(site: Site) -> float:
        return len(site.names) * cost.predict_unfused(site.shape, site.epilogue, kind, "tf32", target).us

    return sorted(found.values(), key=total, reverse=True)


def rows(target: Target, networks: Sequence[tuple[int, int, str]] = NETWORKS) -> list[Row]:
    """One row per convolution; one that two networks share belongs to the first."""
    found: dict[str, Row] = {}
    for depth, batch, dtype in networks:
        for site in sites(depth, batch, dtype, target):
            key = PREFIX + key_of(site.shape, site.epilogue, getattr(torch, dtype)) + " (whole)"
            payload: dict[str, Any] = {"shape": vars(site.shape), "epilogue": vars(site.epilogue), "dtype": dtype}
            payload |= {"layer": site.names[0], "count": len(site.names), "network": f"resnet{depth}"}
            found.setdefault(key, Row(key, "tuner", "all candidates", ROW_S, payload))
    return list(found.values())


def dry_rows() -> list[Row]:
    """Two tiny convolutions whose times are invented."""
    found = []
    tiny = (ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1), BN_RELU), (ConvShape(1, 8, 8, 16, 32), BN_ADD_RELU)
    for shape, epilogue in tiny:
        key = PREFIX + key_of(shape, epilogue, torch.float16) + " (whole)"
        payload = {"shape": vars(shape), "epilogue": vars(epilogue), "dtype": "float16", "layer": str(shape)}
        found.append(
            Row(key, "tuner", "all candidates", ROW_S, {**payload, "count": 1, "network": "-", "dry_run": True})
        )
    return found


def compile_jobs(target: Target, networks: Sequence[tuple[int, int, str]] = NETWORKS) -> list[Job]:
    """What tuning compiles, in its order."""
    found = []
    for row in rows(target, networks):
        shape, epilogue, dtype = _problem(row.payload)
        for config in candidates(shape, dtype, target, epilogue=epilogue):
            found.append(job(shape, epilogue, dtype, "tf32", config, dtype))
    return found


def _problem(payload: dict[str, Any]) -> tuple[ConvShape, Epilogue, torch.dtype]:
    return ConvShape(**payload["shape"]), Epilogue(**payload["epilogue"]), getattr(torch, payload["dtype"])


def run_row(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Handler of a row: measures the candidates; ``entry`` for the tuned file, ``layer`` for the table."""
    from resnet_triton.measure import ConvProblem, device_lost

    payload = row["payload"]
    shape, epilogue, dtype = _problem(payload)
    dry = payload.get("dry_run", False)
    target = known_devices()["NVIDIA H200"] if dry else target_of("cuda")
    configs = candidates(shape, dtype, target, epilogue=epilogue, limit=3 if dry else 10)
    problem = ConvProblem(shape, epilogue, dtype, "cpu" if dry else "cuda")

    def invented(config: ConvConfig) -> Timing:
        us = cost.predict(shape, epilogue, config, dtype, "tf32", target).us
        return Timing(us, 2 * us, us, 0.0)

    trials = search(
        PREFIX + key_of(shape, epilogue, dtype),
        timer=invented if dry else problem.time,
        validate=problem.validate,
        candidates=configs,
        journal=journal,
        lost=None if dry else device_lost,
        limit_s=CANDIDATE_S,
    )
    del problem  # and its graphs' memory
    if not dry:
        torch.cuda.empty_cache()
    entry = entry_of(shape, epilogue, dtype, trials)
    if entry is None:
        return {"status": "wrong", "detail": f"none of {len(configs)} candidates is right: {trials[0].reason}"}
    return {"entry": entry.to_dict(), "layer": layer(payload, trials, target)}


def layer(payload: dict[str, Any], trials: Sequence[Trial], target: Target) -> dict[str, Any]:
    """The line of `layers.csv`: ours, cuDNN's convolution alone, and cuDNN with the separate passes."""
    shape, epilogue, dtype = _problem(payload)
    best, timing = trials[0].config, trials[0].timing
    assert timing is not None
    prediction = cost.predict(shape, epilogue, best, dtype, "tf32", target)
    moved = shape.bytes_moved(dtype.itemsize, epilogue.residual)
    return {
        "layer": payload["layer"],
        "network": payload["network"],
        "batch": shape.n,
        "dtype": payload["dtype"],
        "count": payload["count"],
        "shape": str(shape),
        "epilogue": str(epilogue),
        "kernel": best.kernel,
        "config": str(best),
        "ours_us": round(timing.us, 2),
        "spread": timing.spread and round(timing.spread, 3),
        "cudnn_conv_us": timing.conv_us and round(timing.conv_us, 2),
        "cudnn_passes_us": round(timing.library_us, 2),
        "speedup": round(timing.library_us / timing.us, 3),
        "conv_only_speedup": timing.conv_us and round(timing.conv_us / timing.us, 3),
        "tflops": round(2 * shape.macs / timing.us / 1e6, 1),
        "tb_s": round(moved / timing.us / 1e6, 3),
        "predicted_us": round(prediction.us, 2),
        "limit": prediction.limit,
        "tried": len(trials),
        "failed": sum(trial.status != "ok" for trial in trials),
    }


def results(journal: Journal) -> tuple[list[tuning.Entry], list[dict[str, Any]]]:
    """Entries and table lines of every finished row."""
    done = [r for r in journal.finished.values() if r.get("entry")]
    return [tuning.Entry.from_dict(r["entry"]) for r in done], [r["layer"] for r in done]


def totals(lines: Sequence[dict[str, Any]], target: Target) -> list[dict[str, Any]]:
    """Sums over the convolutions of each network that is measured whole, in milliseconds."""
    by_shape = {(line["shape"], line["dtype"], "add" in line["epilogue"]): line for line in lines}
    found = []
    for depth, batch, dtype in NETWORKS:
        counts = Counter((str(s.shape), dtype, s.epilogue.residual) for s in resnet_convs(depth, batch))
        if any(key not in by_shape for key in counts):
            continue

        def total(column: str, counts: Counter = counts) -> float:
            return sum(count * (by_shape[key][column] or 0) for key, count in counts.items()) / 1e3

        ours, passes, conv = total("ours_us"), total("cudnn_passes_us"), total("cudnn_conv_us")
        lost = sum(by_shape[key]["speedup"] < 1 for key in counts)
        found.append(
            {
                "network": f"resnet{depth}",
                "batch": batch,
                "dtype": dtype,
                "convs": sum(counts.values()),
                "ours_ms": round(ours, 3),
                "cudnn_passes_ms": round(passes, 3),
                "cudnn_conv_ms": round(conv, 3),
                "speedup": round(passes / ours, 3),
                "slower_layers": lost,
            }
        )
    return found

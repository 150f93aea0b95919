"""Tunes the convolutions and chains of the ResNets on this GPU, then steps of training, beside cuDNN, layer by layer.

A row is one convolution, one chain that a block may end with, or one step of training; its candidates are noted in the
journal one by one, so a candidate that crashes or hangs costs itself only. Results become the tuned file of this device
and `layers.csv`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from resnet_triton import cost, models
from resnet_triton.chains import bottleneck_tails, refusal_of_chains
from resnet_triton.devices import Target, known_devices, target_of
from resnet_triton.entries import AnyEntry, ChainEntry, Entry, TrainEntry
from resnet_triton.journal import Journal
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.shapes import BN_ADD_RELU, BN_RELU, ConvSite, resnet_convs
from resnet_triton.sites import AnySite, ChainSite, Site, chain_gains, merged, site_of
from resnet_triton.training.plan import Work, moved_bytes
from resnet_triton.training.sites import TrainSite, training_sites
from resnet_triton.tuner import Timing, Trial, search

from .precompile import Job, site_job
from .rows import Row

HANDLER = "bench.gpu.tune:run_row"
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
#: Those whose chains are measured too, right behind their convolutions.
CHAINED = ((50, 256, "bfloat16"), (50, 32, "bfloat16"))
#: Those whose steps of training are measured, behind everything else.
TRAINED = ((50, 256, "bfloat16"),)
#: Candidates that are measured of a convolution, of a chain and of a step of training.
CANDIDATES, CHAIN_CANDIDATES, TRAIN_CANDIDATES = 10, 6, 5
CANDIDATE_S = 30.0
ROW_S = 240.0
CHAIN, TRAIN = "chain", "train: "  # stands for the epilogue of a chain in `layers.csv`, or begins that of a step
COLUMNS = (
    "layer", "network", "batch", "dtype", "count", "shape", "epilogue", "kernel", "config", "ours_us", "spread",
    "cudnn_conv_us", "cudnn_passes_us", "speedup", "conv_only_speedup", "tflops", "tb_s", "predicted_us", "limit",
    "tried", "failed",
)  # fmt: skip


def convs_of(depth: int, batch: int) -> Iterator[ConvSite]:
    """A network's convolutions as they run: a bottleneck's projection reads only the pixels that were stored for it."""
    tails = dict(bottleneck_tails(depth, batch, 224)) if depth >= 50 else {}
    for site in resnet_convs(depth, batch):
        tail = tails.get(site.name.removesuffix(".downsample.0"))
        yield site._replace(shape=tail.project) if tail and tail.project else site


def sites(depth: int, batch: int, dtype: str, target: Target) -> list[AnySite]:
    """A network's distinct convolutions (as tuned files tell them apart), those with the most predicted time first.

    Behind them the chains that its blocks may end with and that are predicted to save time, the greatest gain first.
    """
    kind = getattr(torch, dtype)
    convs: dict[tuple[ConvShape, bool], Site] = {}
    for name, shape, epilogue in convs_of(depth, batch):
        us = cost.predict_unfused(shape, epilogue, kind, "tf32", target).us
        site, same = Site(shape, epilogue, kind, "tf32", (name,), us), (shape, epilogue.residual)
        convs[same] = convs[same].joined(site) if same in convs else site
    chained = (depth, batch, dtype) in CHAINED and not refusal_of_chains(target, kind, "tf32")
    tails = bottleneck_tails(depth, batch, 224) if chained else ()
    gains = [(name, *found) for name, tail in tails for found in chain_gains(tail, kind, target)]
    found = [ChainSite(shape, kind, (name,), gain=gain) for name, shape, gain in gains if gain > 0]
    return merged([*convs.values(), *found])


@functools.cache
def train_sites(depth: int, batch: int, dtype: str, target: Target) -> tuple[AnySite, ...]:
    """A network's distinct steps of training, those with the most predicted time first."""
    if not target.tma:
        return ()
    model, kind = getattr(models, f"resnet{depth}")(), getattr(torch, dtype)
    return tuple(merged(training_sites(model.to(kind).train(), (batch, 3, 224, 224), kind, target)))


def rows(target: Target, networks: Sequence[tuple[int, int, str]] = NETWORKS) -> list[Row]:
    """One row per convolution, chain or step of training; one that two networks share belongs to the first."""
    found: dict[str, Row] = {}
    every = [(depth, sites(depth, batch, dtype, target)) for depth, batch, dtype in networks]
    every += [(depth, [*train_sites(depth, batch, dtype, target)]) for depth, batch, dtype in TRAINED]
    for depth, those in every:
        for site in those:
            found.setdefault(site.key, _row(site, f"resnet{depth}"))
    return list(found.values())


def _row(site: AnySite, network: str, **more: Any) -> Row:
    layer = site.layers[0] if site.layers else "-"
    payload = {**site.payload(), "layer": layer, "count": len(site.layers), "network": network, **more}
    return Row(site.row_key, "tuner", "all candidates", ROW_S, payload)


def dry_rows() -> list[Row]:
    """Two tiny convolutions, a chain and a step of training, whose times are invented."""
    kind = torch.float16
    chain = ChainShape(None, ConvShape(1, 8, 8, 64, 256), None, ConvShape(1, 8, 8, 256, 64))
    tiny: list[AnySite] = [
        Site(ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1), BN_RELU, kind, "tf32", ("3x3",)),
        Site(ConvShape(1, 8, 8, 16, 32), BN_ADD_RELU, kind, "tf32", ("1x1",)),
        ChainSite(chain, kind, ("chain",)),
        TrainSite(Work("wgrad", ConvShape(1, 4, 4, 16, 32), prologue=True, moments=True), kind, layers=("wgrad",)),
    ]
    return [_row(site, "-", dry_run=True) for site in tiny]


def compile_jobs(target: Target, networks: Sequence[tuple[int, int, str]] = NETWORKS) -> list[Job]:
    """What tuning compiles, in its order."""
    found = []
    for row in rows(target, networks):
        site = site_of(row.payload)
        found += [site_job(site, config, site.dtype) for config in _candidates(site, target)]
    return found


def _candidates(site: AnySite, target: Target) -> list[ConvConfig]:
    limits = {ChainSite: CHAIN_CANDIDATES, TrainSite: TRAIN_CANDIDATES}
    return site.candidates(target)[: limits.get(type(site), CANDIDATES)]


def run_row(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Handler of a row: measures the candidates; ``entry`` for the tuned file, ``layer`` for the table."""
    payload = row["payload"]
    site, dry = site_of(payload), payload.get("dry_run", False)
    target = known_devices()["NVIDIA H200"] if dry else target_of("cuda")
    configs = _candidates(site, target)[: 2 if dry else None]
    trials, prediction = _measure(site, configs, target, dry, journal)
    if not dry:
        torch.cuda.empty_cache()
    entry = site.entry(trials)
    if entry is None:
        return {"status": "wrong", "detail": f"none of {len(configs)} candidates is right: {trials[0].reason}"}
    return {"entry": entry.to_dict(), "layer": layer(site, payload, trials, prediction)}


def _measure(
    site: AnySite, configs: Sequence[ConvConfig], target: Target, dry: bool, journal: Journal
) -> tuple[list[Trial], cost.Prediction]:
    """The trials, best first, and the prediction of the best; the operands' memory is free afterwards."""
    from resnet_triton.measure import device_lost

    problem = site.problem("cpu" if dry else "cuda")

    def invented(config: ConvConfig) -> Timing:
        us = problem.predict(config, target).us
        return Timing(us, 2 * us, us, 0.0)

    trials = search(
        site.key,
        timer=invented if dry else problem.time,
        validate=problem.validate,
        candidates=configs,
        journal=journal,
        lost=None if dry else device_lost,
        limit_s=CANDIDATE_S,
    )
    return trials, problem.predict(trials[0].config, target)


def layer(
    site: AnySite, payload: dict[str, Any], trials: Sequence[Trial], prediction: cost.Prediction
) -> dict[str, Any]:
    """The line of `layers.csv`: ours, cuDNN's convolution alone, and cuDNN with the separate passes."""
    best, timing = trials[0].config, trials[0].timing
    assert timing is not None
    size = site.dtype.itemsize
    if isinstance(site, ChainSite):
        batch, moved, epilogue = site.shape.expand.n, site.shape.bytes_moved(size), CHAIN
    elif isinstance(site, TrainSite):
        batch, moved, epilogue = site.shape.n, moved_bytes(site.work, site.dtype), f"{TRAIN}{site.beside}"
    else:
        batch, moved = site.shape.n, site.shape.bytes_moved(size, site.epilogue.residual)
        epilogue = str(site.epilogue)
    return {
        "layer": payload["layer"],
        "network": payload["network"],
        "batch": batch,
        "dtype": payload["dtype"],
        "count": payload["count"],
        "shape": str(site.shape),
        "epilogue": epilogue,
        "kernel": best.kernel,
        "config": str(best),
        "ours_us": round(timing.us, 2),
        "spread": timing.spread and round(timing.spread, 3),
        "cudnn_conv_us": timing.conv_us and round(timing.conv_us, 2),
        "cudnn_passes_us": round(timing.library_us, 2) or None,  # the Gram form of training has no library
        "speedup": round(timing.library_us / timing.us, 3) or None,
        "conv_only_speedup": timing.conv_us and round(timing.conv_us / timing.us, 3),
        "tflops": round(2 * site.shape.macs / timing.us / 1e6, 1),
        "tb_s": round(moved / timing.us / 1e6, 3),
        "predicted_us": round(prediction.us, 2),
        "limit": prediction.limit,
        "tried": len(trials),
        "failed": sum(trial.status != "ok" for trial in trials),
    }


def results(journal: Journal) -> tuple[list[AnyEntry], list[dict[str, Any]]]:
    """Entries and table lines of every finished row."""
    done = [r for r in journal.finished.values() if r.get("entry")]
    return [_entry(r) for r in done], [r["layer"] for r in done]


def _entry(record: dict[str, Any]) -> AnyEntry:
    if "work" in record["entry"]:
        return TrainEntry.from_dict(record["entry"])
    if record["layer"].get("epilogue") == CHAIN:
        return ChainEntry.from_dict(record["entry"])
    return Entry.from_dict(record["entry"])


def totals(lines: Sequence[dict[str, Any]], target: Target) -> list[dict[str, Any]]:
    """Sums over the convolutions of each network that is measured whole, in milliseconds."""
    convs = [line for line in lines if not line["epilogue"].startswith((CHAIN, TRAIN))]
    by_shape = {(line["shape"], line["dtype"], "add" in line["epilogue"]): line for line in convs}
    found = []
    for depth, batch, dtype in NETWORKS:
        counts = Counter((str(s.shape), dtype, s.epilogue.residual) for s in convs_of(depth, batch))
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

"""Finds the fastest configuration of one convolution, or of one chain, by measuring a few promising ones.

The space is pruned before anything runs: what the GPU's shared memory or a thread's registers cannot hold is left out,
and the cost model orders the rest. What the compiler then says of a candidate (:mod:`.codegen`) may drop it too. Each
candidate is validated numerically before its time counts. How to time and to validate is passed in (:mod:`.measure`
does both on a GPU), so the search itself runs anywhere.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from . import chains, cost, plan, tuning
from .devices import Target
from .journal import Journal
from .kernels.config import ROLLING_KERNELS, ConvConfig, Epilogue, least_waste_box, next_power_of_two, runs_on
from .kernels.geometry import ChainShape, ConvShape
from .tuning import ChainEntry, Entry

logger = logging.getLogger("resnet_triton")

ACCUMULATORS = 128  # fp32 values of the tile that a thread may hold before registers spill
TILES = 6  # distinct tiles measured per convolution
LIMIT = 12  # candidates per convolution or chain


@dataclass(frozen=True)
class Timing:
    """Median times of one candidate, in microseconds.

    Args:
        us: our kernel.
        library_us: PyTorch's convolution and its separate BN, add and ReLU, measured in turns with it; 0 where PyTorch
            has nothing of the kind.
        conv_us: PyTorch's convolution alone, where measured.
        spread: (80th - 20th percentile) / median of our kernel.
    """

    us: float
    library_us: float
    conv_us: float | None = None
    spread: float | None = None


@dataclass(frozen=True)
class Trial:
    """What became of one candidate: status ``"ok"``, ``"unfit"`` (dropped before it ran, because it spills or does not
    fit), ``"wrong"``, ``"error"``, ``"crashed"`` or ``"hung"``."""

    config: ConvConfig
    status: str
    timing: Timing | None = None
    reason: str = ""


class DeviceLost(RuntimeError):
    """A candidate left the GPU unusable for this process: start another one, with the same journal."""


def candidates(
    shape: ConvShape,
    dtype: torch.dtype,
    target: Target,
    *,
    epilogue: Epilogue | None = None,
    precision: str = "tf32",
    limit: int = LIMIT,
) -> list[ConvConfig]:
    """The configurations worth measuring, most promising first; the one that the plan would take is always among them.

    Args:
        shape, dtype: of the convolution.
        target: where it will run (needs no GPU).
        epilogue: what follows; the default is BN and ReLU.
        precision: ``"tf32"`` or ``"ieee"``, for fp32 only.
        limit: how many at most.
    """
    epilogue = epilogue or Epilogue(bn=True, relu=True)
    size = dtype.itemsize

    tma = target.tma and plan.tensor_cores(dtype, precision)

    def fits(config: ConvConfig) -> bool:
        return epilogue.runs_in(config) and cost.fits(config, shape, size, epilogue.residual, target)

    def predicted(config: ConvConfig) -> tuple[float, float]:
        prediction = cost.predict(shape, epilogue, config, dtype, precision, target)
        return prediction.us, sum(vars(prediction).values())  # the other limits break ties

    known = [config for config in plan.own_configs(shape, dtype, precision, target) if epilogue.runs_in(config)]
    small_grid = any(config.pdl for config in known)
    if small_grid:
        known = [known[0], *sorted(known[1:], key=predicted)[: TILES - 1]]
    first = known[0]
    if first.kernel == "conv1x1" and not small_grid:  # the same tile with the other ways to place programs
        others = (replace(first, persistent=n) for n in (0, 1, 2) if n != first.persistent)
        known += [config for config in others if fits(config)]
    space = [c for c in (*_tiles(shape, size, tma), *_strips(known)) if fits(c) and c not in known]
    if target.is_cuda:
        space.sort(key=predicted)
    chosen = [*known, *space[: 2 if small_grid else TILES - 1]]
    steps = shape.r * shape.s * -(-shape.c // first.bk)
    # a long reduction wants more loads in flight, a short one more programs on a multiprocessor
    changes = (1, 2) if steps > 4 else (1, -1)
    deepened = known[1:3] if small_grid else (*space[:1], first, *space[1:2])
    for change, tile in itertools.product(changes, deepened):
        other = replace(tile, stages=tile.stages + change)
        if fits(other) and other not in chosen:
            chosen.append(other)
    return chosen[:limit]


def _tiles(shape: ConvShape, itemsize: int, tma: bool) -> list[ConvConfig]:
    """Every tile of the space, three stages deep (two where the tile is large)."""
    deep = 128 // itemsize
    bk = min(deep, max(16, next_power_of_two(shape.c)))
    if shape.stride == 2:
        bk = min(deep, max(16, shape.c & -shape.c))
    kernels = ["conv_pointer"]
    if not tma and shape.c % bk:
        bk = min(bk, 32)
    if tma and runs_on(ConvConfig("conv_tma", (1, 8, 8), 64, bk), shape, itemsize):
        kernels = ["conv1x1", "conv_tma"] if shape.pointwise else ["conv_tma"]
    widest = max(16, next_power_of_two(shape.k))
    found = []
    for kernel, bm, bn, warps in itertools.product(kernels, (64, 128, 256), (32, 64, 128, 256), (4, 8)):
        # four warps of a warp group share 64 rows; eight need 128
        if bn > widest or bm * bn > ACCUMULATORS * 32 * warps or bm < 16 * warps:
            continue
        if kernel == "conv_pointer" and bn > 128:
            continue
        for box in _boxes(shape, bm) if kernel == "conv_tma" else [(1, 1, bm)]:
            stages = 3 if (bm + bn) * bk * itemsize <= 48 * 1024 else 2
            found.append(ConvConfig(kernel, box, bn, bk, warps, stages))
    return found


def _strips(known: Sequence[ConvConfig]) -> list[ConvConfig]:
    """Other rolling convolutions than a known one: half the strip, twice the tile, half the filters."""
    found = []
    for config in known:
        tn, rows, tw = config.box
        if config.kernel == "conv_rolling":
            found += [
                replace(config, box=(tn, -(-rows // 2), tw)),
                replace(config, box=(2 * tn, rows, tw), warps=2 * config.warps),
            ]
            found += [replace(config, bn=config.bn // 2)] if config.bn > 16 else []
    return found


def _boxes(shape: ConvShape, bm: int) -> list[tuple[int, int, int]]:
    """The box that wastes least, and the one of 8x8 pixels (whose halo is read least often)."""
    boxes = [least_waste_box(shape, bm)]
    if min(shape.p, shape.q) >= 8:
        boxes.append((bm // 64, 8, 8))
    return list(dict.fromkeys(boxes))


def chain_candidates(shape: ChainShape, dtype: torch.dtype, target: Target, *, limit: int = LIMIT) -> list[ConvConfig]:
    """The configurations of a chain worth measuring, the one that the plan would take first; empty without any kernel.

    Args:
        shape, dtype: of the chain.
        target: where it will run (needs no GPU).
        limit: how many at most.
    """

    def predicted(config: ConvConfig) -> float:
        return cost.predict_chain(shape, config, dtype, "tf32", target).us

    known = sorted(chains.configs_of(shape, dtype, target), key=predicted)
    best = known[:1] + [c for c in known[1:] if c.kernel != known[0].kernel][:1]  # of each kernel
    space = [c for config in best for c in _varied(config) if chains.fits(c, shape, dtype, target)]
    return list(dict.fromkeys((*known, *sorted(space, key=predicted))))[:limit]


def _varied(config: ConvConfig) -> list[ConvConfig]:
    """Other chains than a known one: one stage more or less, narrower steps, strips half as long."""
    found = [replace(config, stages=stages) for stages in (config.stages + 1, config.stages - 1) if stages > 1]
    if config.bn > 16:
        found.append(replace(config, bn=config.bn // 2))
    if config.kernel in ROLLING_KERNELS:
        tn, rows, tw = config.box
        found.append(replace(config, box=(tn, -(-rows // 2), tw)))
    return found


def key_of(
    shape: ConvShape | ChainShape, epilogue: Epilogue | None, dtype: torch.dtype, precision: str = "tf32"
) -> str:
    """The name of one convolution in a journal, or of a chain, which has no epilogue."""
    exact = " exact" if dtype == torch.float32 and precision == "ieee" else ""
    after = f" {epilogue}" if epilogue else ""
    return f"{shape} {_name(dtype)}{exact}{after}"


def search(
    name: str,
    *,
    timer: Callable[[ConvConfig], Timing],
    validate: Callable[[ConvConfig], str | None],
    candidates: Sequence[ConvConfig],
    unfit: Callable[[ConvConfig], str | None] | None = None,
    journal: Journal | None = None,
    lost: Callable[[], bool] | None = None,
    limit_s: float = 60.0,
    finalists: int = 2,
) -> list[Trial]:
    """Measures every candidate, then the fastest ones once more (their second time counts); fastest first.

    Args:
        name: of the convolution or chain in the journal, such as :func:`key_of` makes.
        timer: times a configuration.
        validate: None for a configuration that computes the right thing, else what is wrong; may raise.
        candidates: the configurations, most promising first.
        unfit: why a configuration need not be tried, or None; asked before anything runs.
        journal: finished candidates are taken from it, and one that it shows as started but not finished counts
            as crashed: a search that died goes on behind its culprit.
        lost: after an exception, whether the device is unusable for this process.
        limit_s: how long a candidate may take, for whoever watches the journal.
        finalists: how many are measured twice.

    Raises:
        DeviceLost: ``lost`` says so. The candidate is noted as crashed.
    """

    def attempt(config: ConvConfig, suffix: str = "") -> Trial:
        key = f"{name} / {config.kernel} {config}{suffix}"
        if journal is not None and (known := _known(journal, key, config)):
            return known
        why = unfit(config) if unfit else None
        if journal is not None:
            journal.start(key, limit_s, kernel=config.kernel, config=str(config))
        trial, error = (Trial(config, "unfit", None, why), None) if why else _measure(config, timer, validate)
        crashed = error is not None and lost is not None and lost()
        if crashed:
            trial = Trial(config, "crashed", None, trial.reason)
        if journal is not None:
            timing = asdict(trial.timing) if trial.timing else None
            journal.finish(key, trial.status, timing=timing, detail=trial.reason)
        if crashed:
            raise DeviceLost(f"{key}: {trial.reason}") from error
        if trial.status != "ok":
            logger.info("tuner: %s is out: %s (%s)", key, trial.status, trial.reason)
        return trial

    trials = sorted((attempt(config) for config in candidates), key=_rank)
    good = [t.config for t in trials if t.status == "ok"][:finalists]
    if len(good) < 2:
        return trials
    again = sorted((attempt(config, " again") for config in good), key=_rank)
    rest = [t for t in trials if t.config not in good]
    return again + rest if again[0].status == "ok" else rest + again


def entry_of(
    shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, trials: Sequence[Trial], precision: str = "tf32"
) -> Entry | None:
    """The entry of the best trial of :func:`search`, or None if none is good."""
    best = trials[0] if trials else None
    if best is None or best.timing is None:
        return None
    us, library_us = best.timing.us, best.timing.library_us
    exact = precision if dtype == torch.float32 else ""
    return Entry(shape, _name(dtype), epilogue.residual, best.config, us, library_us, exact, tuning.versions())


def chain_entry_of(shape: ChainShape, dtype: torch.dtype, trials: Sequence[Trial]) -> ChainEntry | None:
    """The entry of a chain's best trial, or None if none is good."""
    best = trials[0] if trials else None
    if best is None or best.timing is None:
        return None
    return ChainEntry(shape, _name(dtype), best.config, best.timing.us, best.timing.library_us, tuning.versions())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _measure(
    config: ConvConfig, timer: Callable[[ConvConfig], Timing], validate: Callable[[ConvConfig], str | None]
) -> tuple[Trial, Exception | None]:
    try:
        wrong = validate(config)
        if wrong:
            return Trial(config, "wrong", None, wrong), None
        return Trial(config, "ok", timer(config)), None
    except Exception as error:  # out of shared memory, a compiler error, a launch failure: all only cost this one
        return Trial(config, "error", None, f"{type(error).__name__}: {error}"[:500]), error


def _known(journal: Journal, key: str, config: ConvConfig) -> Trial | None:
    """The trial that a journal holds under ``key``, or None."""
    if any(record["key"] == key for record in journal.open()):
        journal.finish(key, "crashed", detail="the process died while it ran")
    record = journal.finished.get(key)
    if record is None:
        return None
    timing = record.get("timing")
    return Trial(config, record["status"], Timing(**timing) if timing else None, record.get("detail") or "")


def _rank(trial: Trial) -> float:
    return trial.timing.us if trial.timing else float("inf")

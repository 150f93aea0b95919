"""Times several functions in one process, interleaved, so that drift of the machine hits all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Sample(NamedTuple):
    """One call: seconds until its result was there, and (on a GPU) seconds until the call returned, else None."""

    seconds: float
    host: float | None = None


class Percentiles(NamedTuple):
    """Spread of the samples; in their unit."""

    p20: float
    p50: float
    p80: float


class Bystanders:
    """Within the block: which share of this process's cores other processes took (``share``; None where unknown)."""

    share: float | None = None

    def __enter__(self) -> Bystanders:
        self._start = time.perf_counter(), sum(os.times()[:2]), busy_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        began, own, busy = self._start
        now = busy_seconds()
        if busy is None or now is None:
            return
        available = (time.perf_counter() - began) * len(os.sched_getaffinity(0))
        others = now - busy - (sum(os.times()[:2]) - own)
        self.share = min(1.0, max(0.0, others / available)) if available else None


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds that the cores of this process have worked since the machine started, for anyone; None without /proc."""
    try:
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        lines = [line.split() for line in stat.read_text().splitlines()]
        ticks = os.sysconf("SC_CLK_TCK")
    except (AttributeError, OSError, ValueError):
        return None
    # user, nice, system, (idle, iowait), irq, softirq, steal
    return sum(int(line[i]) for line in lines if line and line[0] in cores for i in (1, 2, 3, 6, 7, 8)) / ticks


Clock = Callable[[Callable[[], Any]], Sample]


def cpu_clock(call: Callable[[], Any]) -> Sample:
    """Wall time of a call that computes on the CPU."""
    start = time.perf_counter()
    call()
    return Sample(time.perf_counter() - start)


def cuda_clock(call: Callable[[], Any]) -> Sample:
    """Time of a call between two CUDA events, and the CPU's time until the call returned. The L2 cache stays warm."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    end.record()
    end.synchronize()
    return Sample(begin.elapsed_time(end) / 1e3, host)


def clock_for(device: str) -> Clock:
    """The clock of a device type."""
    return cuda_clock if device == "cuda" else cpu_clock


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    clock: Clock,
    budget_s: float,
    *,
    warmup: int = 1,
    min_rounds: int = 3,
    max_rounds: int = 200,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, list[Sample]]:
    """Samples each call once per round until the budget is spent.

    Every round starts one call later than the round before, so none always runs after the same pause.

    Args:
        calls: what to time, by name.
        clock: how to time one call.
        budget_s: seconds for all rounds; they end with the first round beyond it.
        warmup: untimed calls of each before.
        min_rounds, max_rounds: limits whatever the budget.
        progress: called after each round with the share that is done, at most 1.

    Returns:
        The samples of each call, equally many for all.
    """
    names = list(calls)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    if not names:
        return samples
    for name in names:
        for _ in range(warmup):
            clock(calls[name])
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - start >= budget_s:
            break
        first = done % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(clock(calls[name]))
        spent = (time.perf_counter() - start) / budget_s if budget_s > 0 else 1.0
        progress(min(1.0, (done + 1) / min_rounds, max(spent, (done + 1) / max_rounds)))
    return samples


def percentiles(values: list[float]) -> Percentiles:
    """20th, 50th and 80th percentile of at least one value, interpolated linearly."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Percentiles(*quantiles.tolist())

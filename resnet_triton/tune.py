"""Tunes the convolutions and chains of a model on this GPU, or its steps of training (:mod:`.sites` says which).

Each one is a row for a worker process that measures its candidates (:mod:`.tuner`, :mod:`.measure`); meanwhile other
processes compile the candidates ahead, without the GPU, and drop those that spill or do not fit. A candidate that kills
its process costs itself only. Everything is noted in a journal beside the output, so a later call goes on where one was
stopped; the output is written after each finished row.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import plan, sass, tuning
from .devices import Target
from .entries import AnyEntry
from .journal import Journal, Record, hash_of
from .kernels.config import ConvConfig, Epilogue
from .kernels.geometry import ConvShape
from .rows import Crew, Row
from .sites import AnySite, Site, site_of
from .steps import Recorder
from .tuner import Trial, candidates, search

logger = logging.getLogger("resnet_triton")
HANDLER, COMPILER = f"{__name__}:measure_row", f"{__name__}:compile_row"
CANDIDATE_S = 60.0  # for compiling, checking and timing one candidate
COMPILE_S = 120.0  # how long a worker waits for what is compiled ahead
COMPILERS = 8  # processes at most
AUTOTUNE_LIMIT = 8  # candidates at a first call


# The work on one, in a worker process


def measure_row(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Handler of a row on the GPU: measures the candidates of one site."""
    from .measure import device_lost, fp32_precision

    payload = row["payload"]
    site = site_of(payload)
    with torch.cuda.device(payload["device"]), fp32_precision(site.precision):
        problem = site.problem(payload["device"])
        result = measure_candidates(row, journal, problem.time, problem.validate, lost=device_lost)
        del problem  # and its graphs' memory
        torch.cuda.empty_cache()
    return result


def measure_candidates(
    row: dict[str, Any],
    journal: Journal,
    timer: Callable,
    validate: Callable,
    lost: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The search of a row, with the timer and the check given; its ``entry``, and what became of the candidates."""
    payload = row["payload"]
    site = site_of(payload)
    trials = search(
        site.key,
        timer=timer,
        validate=validate,
        candidates=[ConvConfig.from_dict(config) for config in payload["configs"]],
        unfit=functools.partial(_unfit, journal, site.name) if payload["compiled"] else None,
        journal=journal,
        lost=lost,
        limit_s=CANDIDATE_S,
    )
    entry = site.entry(trials)
    dropped = [f"{t.config.kernel} {t.config}: {t.reason}" for t in trials if t.status == "unfit"]
    outcome = {"outcome": dict(Counter(trial.status for trial in trials)), "dropped": dropped}
    if entry is None:
        return {"status": "none", "detail": _why_none(trials), **outcome}
    return {"entry": entry.to_dict(), **outcome}


def _why_none(trials: Sequence[Trial]) -> str:
    reasons = Counter(f"{trial.status}: {trial.reason}" for trial in trials)
    most = "; ".join(reason[:200] for reason, _ in reasons.most_common(2))
    return f"none of {len(trials)} candidates works: {most}"


def _compile_key(name: str, config: ConvConfig) -> str:
    return f"compile {name} / {config.kernel} {config}"


def _unfit(journal: Journal, name: str, config: ConvConfig) -> str | None:
    """What the processes that compile ahead found out about a candidate; waits for them a while."""
    key, give_up = _compile_key(name, config), time.monotonic() + COMPILE_S
    while key not in journal.finished:
        if time.monotonic() > give_up:
            return None
        time.sleep(0.05)
        journal.reload()
    record = journal.finished[key]
    return None if record["status"] == "ok" else record.get("detail") or record["status"]


def compile_row(row: dict[str, Any], journal: Journal) -> dict[str, Any]:
    """Handler of a row without the GPU: compiles one candidate, and says whether it spills or does not fit."""
    from . import codegen

    payload = row["payload"]
    torch.set_num_threads(1)
    config = ConvConfig.from_dict(payload["config"])
    launches = site_of(payload).launches(config, payload["multiprocessors"])
    reason = codegen.misfit(launches, payload["sm"], payload["shared_memory"])
    return {"status": "unfit", "detail": reason} if reason else {}


# All of them


@dataclass(frozen=True)
class Result:
    """What became of one site.

    Args:
        site, entry: the convolution, chain or step of training, and its entry if there is one.
        detail: why there is none.
        outcome: counts candidates by status (see :class:`.tuner.Trial`).
        dropped: candidates that never ran, with the reason.
    """

    site: AnySite
    entry: AnyEntry | None
    detail: str
    outcome: dict[str, int]
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How far tuning is: finished candidates of all, and the results that came since the last report."""

    candidates: int
    of: int
    fresh: tuple[Result, ...]


@dataclass(frozen=True)
class Report:
    """What :func:`tune` did: the file, results in the order of their worth, and sites that time did not suffice for."""

    file: Path
    results: tuple[Result, ...]
    left: tuple[AnySite, ...]


def journal_of(file: Path) -> Journal:
    """The journal beside a tuned file. Results of other kernels, torch or triton do not count."""
    here = Path(__file__).parent
    code = [*(here / "kernels").glob("*.py"), here / "tuner.py", here / "measure.py", here / "training/measure.py"]
    return Journal(file.with_suffix(".jsonl"), hash_of(code, *sorted(tuning.versions().values())))


def tune(
    sites: Sequence[AnySite],
    target: Target,
    folder: Path,
    *,
    device: str = "cuda",
    minutes: float | None = None,
    fresh: bool = False,
    progress: Callable[[Progress], None] = lambda progress: None,
    handler: str = HANDLER,
    compiler: str | None = COMPILER,
    compilers: int | None = None,
) -> Report:
    """Measures sites in their order and writes the tuned file of the target into a folder as it goes.

    Args:
        sites: from :func:`.sites.merged`.
        target: the GPU.
        folder: for the tuned file and its journal; entries that the file has for other work stay.
        device: as torch names the GPU.
        minutes: stop after this time; None is when all is done.
        fresh: measure what the journal shows as finished, too.
        progress: called about twice a second.
        handler, compiler: of the rows (see :class:`.rows.Crew`); without a compiler nothing is dropped ahead of time.
        compilers: processes that compile; None is by the number of cores.

    Raises:
        ValueError: the tuned file is there and cannot be read; it is left as it is.
        OSError: the folder cannot be written to, or another process tunes into it.
    """
    if compiler == COMPILER and not sass.cuobjdump().is_file():
        logger.warning("%s is missing: no candidate is dropped ahead of time", sass.cuobjdump())
        compiler = None
    deadline = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    file = folder / tuning.file_name(target.name)
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(tuning.locked(file.with_suffix(".tuning"), wait=False))
        except BlockingIOError:
            raise OSError(f"another process tunes into {folder}; wait for it, or take another folder") from None
        tuning.merge(file, target.name, (), target.sm)  # finds out now what would fail later
        if fresh:
            file.with_suffix(".jsonl").unlink(missing_ok=True)
        journal = journal_of(file)
        journal.resume()
        rows, jobs = _rows(sites, target, device, compiled=compiler is not None)
        watch = _Watch(sites, rows, journal, file, target, progress)
        watch()
        if compiler is not None:
            unfinished = [row.payload["of"] not in journal.finished for row in jobs]
            jobs = [row for row, wanted in zip(jobs, unfinished, strict=True) if wanted]
            count = compilers or min(COMPILERS, max(1, (os.cpu_count() or 1) - 1))
            env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            stack.enter_context(Crew(jobs, compiler, journal, deadline=deadline, workers=count, env=env))
        with Crew(rows, handler, journal, deadline=deadline) as crew:
            try:
                crew.wait(watch)
            finally:
                watch()
    plan.forget()
    results = tuple(watch.results[site.key] for site in sites if site.key in watch.results)
    return Report(file, results, tuple(site for site in sites if site.key not in watch.results))


def _rows(sites: Sequence[AnySite], target: Target, device: str, compiled: bool) -> tuple[list[Row], list[Row]]:
    """The rows that measure, and those that compile."""
    measuring, compiling = [], []
    for site in sites:
        configs = site.candidates(target)
        payload = site.payload()
        more = {"configs": [config.to_dict() for config in configs], "device": device, "compiled": compiled}
        limit = COMPILE_S + 2 * CANDIDATE_S * len(configs)
        measuring.append(Row(site.row_key, "tuner", "all candidates", limit, {**payload, **more}))
        gpu = {"sm": target.sm, "multiprocessors": target.multiprocessors, "shared_memory": target.shared_memory}
        for config in configs:
            key = _compile_key(site.name, config)
            work = {**payload, **gpu, "config": config.to_dict(), "of": site.row_key}
            compiling.append(Row(key, config.kernel, str(config), COMPILE_S, work))
    return measuring, compiling


class _Watch:
    """Takes results from the journal as they come: into the tuned file, and to whoever watches."""

    def __init__(
        self,
        sites: Sequence[AnySite],
        rows: Sequence[Row],
        journal: Journal,
        file: Path,
        target: Target,
        progress: Callable[[Progress], None],
    ) -> None:
        self.sites, self.journal, self.file, self.target = sites, journal, file, target
        self.progress = progress
        self.results: dict[str, Result] = {}
        self.counts = {row.key: len(row.payload["configs"]) for row in rows}
        self.keys = [
            f"{site.key} / {config.kernel} {config}"
            for site, row in zip(sites, rows, strict=True)
            for config in map(ConvConfig.from_dict, row.payload["configs"])
        ]

    def __call__(self) -> None:
        self.journal.reload()
        fresh = []
        for site in self.sites:
            record = self.journal.finished.get(site.row_key)
            if record and site.key not in self.results:
                self.results[site.key] = _result(site, record)
                fresh.append(self.results[site.key])
        entries = [result.entry for result in fresh if result.entry]
        if entries:
            tuning.merge(self.file, self.target.name, entries, self.target.sm)
        done = sum(key in self.journal.finished for key in self.keys)
        self.progress(Progress(done, len(self.keys), tuple(fresh)))


def _result(site: AnySite, record: Record) -> Result:
    entry = site.read_entry(record["entry"]) if record.get("entry") else None
    dropped = tuple(record.get("dropped") or ())
    return Result(site, entry, str(record.get("detail") or ""), record.get("outcome") or {}, dropped)


# At a first call

_tried: set[str] = set()


def tune_now(shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, target: Target) -> bool:
    """Measures one convolution in this process and keeps the result in the user's cache; False if that is not possible.

    Not while ``explain`` asks, while a CUDA graph is captured, or a second time.
    """
    site = Site(shape, epilogue, dtype, precision)
    if Recorder.active or site.name in _tried or not _runs_on(target):
        return False
    _tried.add(site.name)
    from .measure import ConvProblem, device_lost, fp32_precision

    logger.warning("RESNET_TRITON_AUTOTUNE: measuring %s", site.name)
    try:
        file = tuning.cache_dir() / tuning.file_name(target.name)
        journal = journal_of(file)
        configs = candidates(shape, dtype, target, epilogue=epilogue, precision=precision, limit=AUTOTUNE_LIMIT)
        with torch.no_grad(), fp32_precision(precision):
            problem = ConvProblem(shape, epilogue, dtype)
            trials = search(
                f"first call {site.name}",
                timer=problem.time,
                validate=problem.validate,
                candidates=configs,
                journal=journal,
                lost=device_lost,
            )
        entry = site.entry(trials)
        if entry is None:
            raise ValueError(_why_none(trials))
        tuning.merge(file, target.name, [entry], target.sm)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        logger.warning("RESNET_TRITON_AUTOTUNE: %s stays unmeasured: %s", site.name, str(error).partition("\n")[0])
        return False
    return True


def _runs_on(target: Target) -> bool:
    """Whether this process can measure on the target now."""
    if not torch.cuda.is_available() or torch.cuda.get_device_name() != target.name:
        return False
    return not torch.cuda.is_current_stream_capturing()

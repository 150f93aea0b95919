"""Fills Triton's cache ahead of time on many cores: `python -m bench.gpu.precompile < jobs.json`.

A job is one convolution, or one chain of them, with one configuration. Its launcher runs on meta tensors, and Triton
stops before the launch, so the program has exactly the signature that it will have later; no process here opens the
GPU. Failures cost nothing: who needs the program compiles it again and reports the error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from typing import Any

import torch

from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.sites import AnySite, ChainSite, Site, site_of

Job = dict[str, Any]


def job(
    shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, config: ConvConfig, vectors: torch.dtype
) -> Job:
    """A job as JSON: one convolution with one configuration; ``vectors`` is the dtype of BN's vectors and the bias."""
    return site_job(Site(shape, epilogue, dtype, precision), config, vectors)


def chain_job(shape: ChainShape, dtype: torch.dtype, config: ConvConfig, vectors: torch.dtype) -> Job:
    """The same for a chain."""
    return site_job(ChainSite(shape, dtype), config, vectors)


def site_job(site: AnySite, config: ConvConfig, vectors: torch.dtype) -> Job:
    """The same for either."""
    return {**site.payload(), "config": config.to_dict(), "vectors": str(vectors).removeprefix("torch.")}


def distinct(jobs: Iterable[Job]) -> list[Job]:
    """Jobs without repetitions, in order."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(j, sort_keys=True) for j in jobs)]


class _NoDevice:
    """Stands in for Triton's driver in a process that never launches: names the target, has no device."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def compile_job(work: tuple[Job, int, int]) -> str | None:
    """Compiles one job for ``(job, sm, multiprocessors)``; returns an error's text, or None."""
    job, sm, multiprocessors = work
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from resnet_triton.codegen import chain_launches, conv_launches
    from resnet_triton.training.sites import TrainSite

    site, config, vectors = site_of(job), ConvConfig.from_dict(job["config"]), getattr(torch, job["vectors"])
    try:
        if isinstance(site, TrainSite):  # its vectors are fp32
            launches = site.launches(config, multiprocessors)
        elif isinstance(site, ChainSite):
            launches = chain_launches(site.shape, site.dtype, "tf32", config, multiprocessors, vectors)
        else:
            precision = site.precision
            launches = conv_launches(site.shape, site.epilogue, site.dtype, precision, config, multiprocessors, vectors)
        driver.set_active(_NoDevice(GPUTarget("cuda", sm, 32)))
        for kernel, grid, args, kwargs in launches:
            kernel.run(*args, grid=grid, warmup=True, **kwargs)
    except Exception as error:
        return f"{site.shape} {config.kernel} {config}: {type(error).__name__}: {error}"[:500]
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) - 4))
    parser.add_argument("--sm", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--multiprocessors", type=int, default=132)
    options = parser.parse_args(argv)
    jobs = [(job, options.sm, options.multiprocessors) for job in json.load(sys.stdin)]
    os.nice(10)  # measurements run beside this
    failed = []
    with multiprocessing.get_context("spawn").Pool(options.processes, torch.set_num_threads, (1,)) as pool:
        for done, error in enumerate(pool.imap_unordered(compile_job, jobs), 1):
            if error:
                failed.append(error)
                print(f"failed: {error}", flush=True)
            if done % 20 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} compiled", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

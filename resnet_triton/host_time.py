"""How long the host takes for one forward: Python, dispatcher, planning and allocation, without any computing.

A GPU computes a small batch faster than the host can ask for it. This measures the asking, on a machine without a GPU
too, in CPU time of the calling thread, so that other processes on the machine hardly matter::

    dispatch   the operators of this package only allocate their results
    plan       they also check their arguments and decide how each step runs, as on the named device
    calls      how many Python and C functions one forward calls with dispatch alone: the same on every machine

Launches themselves are not in it: they need the device. A CUDA graph (:func:`resnet_triton.graph`) skips all of this.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .devices import target_of
from .ops import FAKES
from .steps import Recorder


@dataclass(frozen=True)
class HostTime:
    """Host time of one forward.

    Args:
        dispatch_us, plan_us: microseconds of CPU time, 20th percentile of the repeats; see the module.
        calls: functions called, Python's and C's, with dispatch alone.
    """

    dispatch_us: float
    plan_us: float
    calls: int


def host_time(model: nn.Module, x: Tensor, *, device: str = "NVIDIA H200", repeats: int = 50) -> HostTime:
    """Measures the host's part of one forward of a converted model; nothing is computed.

    Args:
        model: a converted model on the CPU, in eval mode. What is not fused in it does compute.
        x: a small batch of images on the CPU; the host's time does not depend on its size.
        device: name of the device that is planned for, see :func:`resnet_triton.explain`.
        repeats: forwards per figure.
    """
    target = target_of(device)

    def planned() -> None:
        with Recorder(target):
            model(x)

    with torch.no_grad():
        plan_us = cpu_us(planned, repeats)
        with only_allocating() as restart:

            def dispatched() -> None:
                restart()
                model(x)

            dispatch_us = cpu_us(dispatched, repeats)
            calls = sum(calls_of(dispatched).values())
    return HostTime(dispatch_us, plan_us, calls)


def cpu_us(call: Callable[[], object], repeats: int = 50) -> float:
    """Microseconds of CPU time that ``call`` takes in this thread: 20th percentile, after three calls unmeasured."""
    times = []
    for _ in range(3):
        call()
    for _ in range(max(5, repeats)):
        start = time.thread_time_ns()
        call()
        times.append((time.thread_time_ns() - start) / 1e3)
    return statistics.quantiles(times, n=5)[0]


def calls_of(call: Callable[[], object]) -> Counter[str]:
    """How often ``call`` enters each function, Python's and C's, by qualified name."""
    counts: Counter[str] = Counter()

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            counts[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1
        elif event == "c_call":
            counts[getattr(argument, "__qualname__", str(argument))] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return counts


@contextmanager
def only_allocating() -> Iterator[Callable[[], None]]:
    """Within the block, this package's operators on CPU tensors return uninitialised results.

    Their shapes are worked out in the first forward and repeated in the next, so every forward must call the same
    operators: call what is yielded before each.
    """
    shapes: list[Any] = []
    position = 0

    def restart() -> None:
        nonlocal position
        position = 0

    def stub(fake: Callable[..., Any]) -> Callable[..., Any]:
        def allocate(x: Tensor, *arguments: Any) -> Any:
            nonlocal position
            if position == len(shapes):
                out = fake(x, *arguments)
                shapes.append(out.shape if isinstance(out, Tensor) else [t.shape for t in out])
            shape = shapes[position]
            position += 1
            return [x.new_empty(s) for s in shape] if isinstance(shape, list) else x.new_empty(shape)

        return allocate

    library = torch.library.Library("resnet_triton", "IMPL")
    try:
        for name, fake in FAKES.items():
            library.impl(name, stub(fake), "CPU")
        yield restart
    finally:
        library._destroy()

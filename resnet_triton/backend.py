"""Which implementation the ops may use: the process-wide switch, and PyTorch's precision settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BACKENDS = ("auto", "triton", "cudnn")
MEMORY = ("auto", "gram", "stored")
_current = "auto"
_chains = True
_memory = "auto"
_planning_cuda = False


def current_backend() -> str:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"cudnn"``."""
    return _current


def chains_allowed() -> bool:
    """Whether several convolutions may share a kernel."""
    return _chains and _current != "cudnn"


def memory() -> str:
    """What training keeps for the backward: ``"auto"``, ``"gram"`` or ``"stored"``, see :func:`use_backend`."""
    return _memory


def state() -> tuple[str, bool, str, bool]:
    """All that is in force, to tell whether it changed."""
    return _current, _chains, _memory, _planning_cuda


def planning_cuda() -> bool:
    """Whether shape-only tensors stand for those of a GPU."""
    return _planning_cuda


@contextmanager
def planning_for_cuda(is_cuda: bool) -> Iterator[None]:
    """Within the block, shape-only tensors stand for those of a GPU (``explain``)."""
    global _planning_cuda
    before, _planning_cuda = _planning_cuda, is_cuda
    try:
        yield
    finally:
        _planning_cuda = before


@contextmanager
def use_backend(name: str, *, chains: bool = True, memory: str = "auto") -> Iterator[None]:
    """Within the block, every op of this process uses one backend.

    Args:
        name: ``"auto"`` picks per layer (the default), ``"triton"`` always runs this package's kernels (CPU tensors
            need ``TRITON_INTERPRET=1``), ``"cudnn"`` always runs PyTorch's own operators.
        chains: whether several convolutions may share a kernel where that is predicted or measured to be faster.
        memory: what a training step keeps of a bottleneck's last convolution and projection. ``"gram"``: nothing,
            their statistics come from their inputs' second moments; ``"stored"``: their raw outputs; ``"auto"``: the
            first in 16-bit dtypes on a GPU with a tensor memory accelerator. On the CPU, ``"auto"`` trains on PyTorch's
            own modules, the others on this package's steps, which keep less.

    Raises:
        ValueError: for another name, or another ``memory``.
    """
    global _current, _chains, _memory
    if name not in BACKENDS:
        raise ValueError(f"use_backend got name={name!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    if memory not in MEMORY:
        raise ValueError(f"use_backend got memory={memory!r}; allowed are {', '.join(map(repr, MEMORY))}")
    before = _current, _chains, _memory
    _current, _chains, _memory = name, chains, memory
    try:
        yield
    finally:
        _current, _chains, _memory = before


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: fp32 convolutions follow PyTorch's TF32 settings, others do not care."""
    if dtype != torch.float32:
        return "tf32"  # ignored by the compiler for 16-bit operands
    if not hasattr(torch.backends.cudnn, "fp32_precision"):  # torch < 2.9
        return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
    backends: Any = torch.backends
    settings = (backends.cudnn.conv, backends.cudnn, backends)  # "none" inherits from the next
    chosen = next((s.fp32_precision for s in settings if s.fp32_precision != "none"), "ieee")
    return "tf32" if chosen == "tf32" else "ieee"

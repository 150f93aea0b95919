"""Which implementation the ops may use: the process-wide switch, and PyTorch's precision settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

BACKENDS = ("auto", "triton", "cudnn")
_current = "auto"
_chains = True


def current_backend() -> str:
    """The backend in force: ``"auto"``, ``"triton"`` or ``"cudnn"``."""
    return _current


def chains_allowed() -> bool:
    """Whether several convolutions may share a kernel."""
    return _chains and _current != "cudnn"


@contextmanager
def use_backend(name: str, *, chains: bool = True) -> Iterator[None]:
    """Within the block, every op of this process uses one backend.

    Args:
        name: ``"auto"`` picks per layer (the default), ``"triton"`` always runs this package's kernels (CPU tensors
            need ``TRITON_INTERPRET=1``), ``"cudnn"`` always runs PyTorch's own operators.
        chains: whether several convolutions may share a kernel where that is predicted or measured to be faster.

    Raises:
        ValueError: for another name.
    """
    global _current, _chains
    if name not in BACKENDS:
        raise ValueError(f"use_backend got name={name!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    before = _current, _chains
    _current, _chains = name, chains
    try:
        yield
    finally:
        _current, _chains = before


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

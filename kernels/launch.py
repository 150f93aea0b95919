"""What every launcher shares: dispatch counters, device facts, index width and tensor-map limits."""

from __future__ import annotations

import functools
import os
from collections import Counter

import torch

INT32_MAX = 2**31 - 1

#: How often each kernel was launched in this process, by kernel name. Tests and ``explain`` read it.
COUNTS: Counter[str] = Counter()


def count(kernel: str) -> None:
    """Notes one launch of a kernel in :data:`COUNTS`."""
    COUNTS[kernel] += 1


def interpreting() -> bool:
    """Whether Triton runs its kernels in the interpreter (``TRITON_INTERPRET=1`` when triton was imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 stands in for them in the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_tma(device: torch.device) -> bool:
    """Whether the tensor memory accelerator exists (sm_90 and later); true in the interpreter, which models it."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9


def needs_int64(*tensors: torch.Tensor | None) -> bool:
    """Whether an element offset into one of the tensors can exceed 32 bits."""
    return any(t is not None and span(t) > INT32_MAX for t in tensors)


def span(t: torch.Tensor) -> int:
    """One more than the largest element offset of a strided tensor."""
    return 1 + sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True))


def tma_ready(t: torch.Tensor) -> bool:
    """Whether a tensor can be described to the TMA: unit last stride, other strides and address 16-byte multiples."""
    if t.stride(-1) != 1 or t.data_ptr() % 16:
        return False
    return all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])

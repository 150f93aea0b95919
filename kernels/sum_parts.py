"""Adds partial results in a fixed order: the second half of every reduction that is shared among programs.

    out[i] = parts[0, i] + parts[1, i] + ... + parts[P-1, i]

The order depends on nothing but P: results repeat bitwise, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .geometry import cdiv
from .launch import count, needs_int64

#: Bytes of the partial results of one launch: two of the largest gradient of a ResNet (3x3, 512 channels).
MOST_PART_BYTES = 18 << 20
#: Elements of a program: one 16-byte load of each part per thread.
ELEMENTS, WARPS = 512, 4
#: Parts that are in flight at a time.
UNROLL = 8


@triton.jit
def sum_parts(parts, out, tail, P, L, FIRST, INT64: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """BLOCK elements of ``parts [P, L]``, dense: the first FIRST of a row go to ``out``, the others to ``tail``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = parts + i
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, P, UNROLL):
        for step in tl.static_range(UNROLL):
            part = first + step
            offset = part.to(tl.int64) * L if INT64 else part * L
            acc += tl.load(column + offset, mask=(i < L) & (part < P), other=0.0)
    tl.store(out + i, acc, mask=i < FIRST)
    if tail is not None:
        tl.store(tail + (i - FIRST), acc, mask=(i >= FIRST) & (i < L))


def launch_sum_parts(parts: torch.Tensor, out: torch.Tensor, tail: torch.Tensor | None = None) -> None:
    """Launches :func:`sum_parts`.

    Args:
        parts: fp32 ``[P, L]`` dense, all written.
        out, tail: fp32 dense, together L elements: the first of a row go to ``out``, the rest to ``tail``.

    Raises:
        ValueError: ``out`` and ``tail`` do not have L elements together.
    """
    rows, length = parts.shape
    elements = out.numel() + (0 if tail is None else tail.numel())
    if elements != length:
        raise ValueError(f"out and tail have {elements} elements together; parts {tuple(parts.shape)} sum to {length}")
    count("sum_parts")
    sum_parts[(cdiv(length, ELEMENTS),)](
        parts, out, tail, rows, length, out.numel(), INT64=needs_int64(parts), BLOCK=ELEMENTS, UNROLL=UNROLL,
        num_warps=WARPS,
    )  # fmt: skip

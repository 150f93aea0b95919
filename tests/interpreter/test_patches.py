"""The patches of the interpreter: its bf16 arithmetic equals PyTorch's, and loops run."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.comparers import identical

SPECIAL = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-40, -1e-40, 3.4e38, -3.4e38, 65504.0, 1e5]


@triton.jit
def unary(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def binary(x, y, total, largest, less, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(total + i, a + b)
    tl.store(largest + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(less + i, a < b)


@triton.jit
def dot(x, w, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + i, tl.dot(tl.load(x + i), tl.load(w + i).T))


@triton.jit
def fill(out, SIZE: tl.constexpr):
    tl.store(out + tl.arange(0, SIZE), tl.full((SIZE,), float("-inf"), out.dtype.element_ty))


@triton.jit
def count_up(out, start, stop, STEP: tl.constexpr):
    total = 0
    for i in range(start, stop, STEP):
        total += i
    tl.store(out, total)


@triton.jit
def fma(x, y, z, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


def values(size: int) -> torch.Tensor:
    """fp32 values with every kind of rounding: random ones, ties between two bf16, and special ones."""
    ties = 1 + torch.arange(64) / 256  # bf16 has 7 bits after the point: every second one lies between two
    x = torch.cat((torch.tensor(SPECIAL), ties, -ties))
    return torch.cat((x, torch.randn(size - len(x)) * 100))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32])
def test_conversion_to_bf16_rounds_to_nearest_even(source: torch.dtype) -> None:
    x = values(256) if source == torch.float32 else (values(256).nan_to_num(0, 0, 0).clamp(-6e4, 6e4) * 30).to(source)
    out = torch.full((256,), float("nan"), dtype=torch.bfloat16)
    unary[(1,)](x, out, SIZE=256)
    identical(out, x.to(torch.bfloat16))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_conversion_from_bf16(target: torch.dtype) -> None:
    x = values(256).to(torch.bfloat16)
    if target == torch.int32:
        x = x.nan_to_num(0, 0, 0).clamp(-1000, 1000)
    out = torch.zeros(256, dtype=target)
    unary[(1,)](x, out, SIZE=256)
    identical(out, x.to(target))


def test_arithmetic_maximum_and_comparison() -> None:
    x = values(256).to(torch.bfloat16)
    y = x[torch.randperm(256)]
    total, largest, less = torch.empty_like(x), torch.empty_like(x), torch.empty(256, dtype=torch.bool)
    binary[(1,)](x, y, total, largest, less, SIZE=256)
    identical(total, x + y)
    identical(largest, torch.maximum(x, y))
    identical(less, x < y)


def test_dot() -> None:
    x, w = (torch.randint(-8, 9, (32, 32)).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(32, 32)
    dot[(1,)](x, w, out, SIZE=32)
    identical(out, x.float() @ w.float().T)


@triton.jit
def maxima(x, y, keeping, ignoring, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(keeping + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(ignoring + i, tl.maximum(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maximum_keeps_nan_only_if_asked(dtype: torch.dtype) -> None:
    x = values(256).to(dtype)
    y = x[torch.randperm(256)]
    keeping, ignoring = torch.empty_like(x), torch.empty_like(x)
    maxima[(1,)](x, y, keeping, ignoring, SIZE=256)
    identical(keeping, torch.maximum(x, y))
    identical(ignoring, torch.fmax(x, y))
    assert keeping.isnan().sum() > ignoring.isnan().sum()


def test_constants() -> None:
    out = torch.zeros(16, dtype=torch.bfloat16)
    fill[(1,)](out, SIZE=16)
    identical(out, torch.full_like(out, float("-inf")))


def test_loop_with_run_time_bounds() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    count_up[(1,)](out, 3, 11, STEP=2)
    identical(out, torch.tensor([3 + 5 + 7 + 9], dtype=torch.int32))


def test_a_fused_multiply_add_rounds_once() -> None:
    x = torch.randn(64)
    z = torch.cat((-(x * x)[:32], torch.randn(32)))  # leaves the rounding of the product, or an ordinary sum
    out = torch.full((64,), float("nan"))
    fma[(1,)](x, x, z, out, 64)
    identical(out, (x.double() * x.double() + z).float())
    assert out[:32].count_nonzero() > 0

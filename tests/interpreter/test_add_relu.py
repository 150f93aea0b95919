"""``kernels/add_relu.py`` in the interpreter."""

from __future__ import annotations

import pytest
import torch

from resnet_triton.kernels.add_relu import BLOCK, launch_add_relu
from tests.cases import Guarded
from tests.comparers import identical

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 1000, BLOCK, BLOCK + 1, 3 * BLOCK - 5])
def test_add_relu_rounds_once(size: int, dtype: torch.dtype, counts) -> None:
    x, y = torch.randn(2, size).to(dtype)
    guarded = Guarded()
    out = guarded.output(size, dtype=dtype)
    launch_add_relu(guarded.input(x), guarded.input(y), out)
    guarded.verify()
    assert counts == {"add_relu": 1}
    identical(out, (x + y).relu())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_relu_of_nan_and_infinity(dtype: torch.dtype) -> None:
    values = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0, torch.finfo(dtype).max], dtype=dtype)
    x, y = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    out = torch.empty_like(x)
    launch_add_relu(x, y, out)
    identical(out, (x + y).relu())


def test_add_relu_of_channels_last() -> None:
    x, y = (torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last) for _ in range(2))
    out = torch.full_like(x, NAN)
    assert out.stride() == x.stride()
    launch_add_relu(x, y, out)
    identical(out, (x + y).relu())


def test_add_relu_in_place() -> None:
    x, y = torch.randn(2, 100)
    expected = (x + y).relu()
    launch_add_relu(x, y, x)
    identical(x, expected)


def test_empty_tensor_launches_nothing(counts) -> None:
    launch_add_relu(torch.empty(0, 4), torch.empty(0, 4), torch.empty(0, 4))
    assert not counts

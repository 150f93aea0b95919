"""``kernels/pool.py`` in the interpreter: max-pool and global average pool."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.kernels import pool
from tests.cases import Guarded, integers
from tests.comparers import identical, no_worse_than

NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.float32, torch.bfloat16]


def check_max_pool(x: Tensor, kernel: int = 3, stride: int = 2, padding: int = 1, ceil_mode: bool = False) -> None:
    """Bit by bit PyTorch's, on ``x [N,H,W,C]``."""
    expected = F.max_pool2d(x.permute(0, 3, 1, 2), kernel, stride, padding, ceil_mode=ceil_mode).permute(0, 2, 3, 1)
    guarded = Guarded()
    y = guarded.output(*expected.shape, dtype=x.dtype)
    pool.launch_max_pool(guarded.input(x), y, kernel, stride, padding)
    guarded.verify()
    identical(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "h", "w", "c", "kernel", "stride", "padding"),
    [
        pytest.param(2, 9, 19, 24, 3, 2, 1, id="odd sizes, several boxes"),
        pytest.param(1, 1, 1, 8, 3, 2, 1, id="one pixel"),
        pytest.param(1, 8, 8, 64, 3, 2, 1, id="no waste"),
        pytest.param(2, 4, 5, 70, 2, 2, 0, id="channels past the last block"),
        pytest.param(1, 7, 6, 3, 3, 1, 1, id="three channels"),
        pytest.param(1, 11, 4, 8, 5, 3, 2, id="5x5/3"),
        pytest.param(1, 5, 5, 1, 1, 2, 0, id="1x1/2"),
    ],
)
def test_max_pool_is_exact(n, h, w, c, kernel, stride, padding, dtype, counts) -> None:
    check_max_pool(torch.randn(n, h, w, c).to(dtype), kernel, stride, padding)
    assert counts == {"max_pool": 1}


def test_padding_never_wins() -> None:
    check_max_pool(-1 - torch.rand(1, 6, 7, 8))
    check_max_pool(torch.full((1, 3, 3, 8), -INF))
    check_max_pool(-1 - torch.rand(1, 7, 7, 8), 4, 3, 2)


def test_ceil_mode() -> None:
    check_max_pool(torch.randn(1, 6, 7, 8), 3, 2, 0, ceil_mode=True)
    check_max_pool(-1 - torch.rand(2, 8, 8, 8), 3, 2, 1, ceil_mode=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_max_pool_of_nan_and_infinity(dtype: torch.dtype) -> None:
    x = torch.randn(1, 8, 9, 8).to(dtype)
    x[0, 3, 4, 1] = NAN
    x[0, 0, 0, 2] = NAN
    x[0, 7, 8, 3] = INF
    x[0, 5, 5, 4] = -INF
    x[0, 2, 2] = NAN
    check_max_pool(x)


def test_max_pool_with_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "needs_int64", lambda *tensors: True)
    check_max_pool(torch.randn(2, 5, 6, 8))


def average(x: Tensor) -> Tensor:
    """Runs the kernel on ``x [N,H,W,C]``, everything guarded."""
    guarded = Guarded()
    y = guarded.output(x.shape[0], x.shape[3], dtype=x.dtype)
    pool.launch_global_avg_pool(guarded.input(x), y)
    guarded.verify()
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "h", "w", "c"),
    [
        pytest.param(2, 4, 4, 24, id="channels past the last block"),
        pytest.param(1, 1, 1, 8, id="one pixel"),
        pytest.param(3, 2, 8, 130, id="several blocks"),
        pytest.param(1, 64, 64, 16, id="many pixels"),
    ],
)
def test_global_avg_pool_is_exact(n, h, w, c, dtype, counts) -> None:
    x = integers(n, h, w, c, dtype=dtype)
    identical(average(x), x.double().mean((1, 2)).to(dtype))
    assert counts == {"global_avg_pool": 1}


def test_global_avg_pool_in_the_wide_blocks_of_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PROGRAMS", 1)
    x = integers(2, 4, 16, 300, dtype=torch.float16)
    identical(average(x), x.double().mean((1, 2)).half())


@pytest.mark.parametrize(
    ("n", "h", "w", "c", "dtype"),
    [
        (2, 7, 7, 256, torch.float16),
        (2, 7, 7, 256, torch.bfloat16),
        (2, 7, 7, 256, torch.float32),
        (1, 3, 1, 64, torch.float32),
        # not in fp32: numpy adds the rows of a tile one after another, a GPU does so in a tree
        (1, 23, 31, 20, torch.float16),
    ],
    ids=str,
)
def test_global_avg_pool_is_no_worse_than_eager(n, h, w, c, dtype) -> None:
    x = (torch.randn(n, h, w, c) + 3).to(dtype)
    eager = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1)
    no_worse_than(average(x), eager, x.double().mean((1, 2)))


def test_global_avg_pool_sums_beyond_fp16() -> None:
    identical(average(torch.full((1, 16, 16, 8), 60000.0).half()), torch.full((1, 8), 60000.0).half())


def test_global_avg_pool_of_nan_and_infinity() -> None:
    x = integers(2, 4, 4, 8)
    x[0, 1, 2, 3] = NAN
    x[1, 0, 0, 4] = INF
    x[1, 0, 0, 5] = -INF
    x[1, 1:3, 0, 6] = torch.tensor([INF, -INF])
    identical(average(x), x.mean((1, 2)))


def test_global_avg_pool_repeats_bitwise() -> None:
    x = torch.randn(2, 9, 9, 72)
    identical(average(x), average(x))


def test_global_avg_pool_with_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "needs_int64", lambda *tensors: True)
    x = integers(2, 4, 4, 24)
    identical(average(x), x.mean((1, 2)))


def test_empty_batch_launches_nothing(counts) -> None:
    pool.launch_max_pool(torch.empty(0, 8, 8, 16), torch.empty(0, 4, 4, 16))
    pool.launch_global_avg_pool(torch.empty(0, 8, 8, 16), torch.empty(0, 16))
    assert not counts

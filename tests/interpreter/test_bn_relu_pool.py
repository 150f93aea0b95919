"""``kernels/bn_relu_pool.py`` in the interpreter: max-pool of a normalised, rectified tensor, and its gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.kernels import bn_relu_pool
from tests.cases import Guarded, integers
from tests.comparers import identical

NAN, INF = float("nan"), float("inf")
CASES = {
    "even, two tiles of columns, two shares": (1, 8, 18, 24, torch.float16),
    "odd": (1, 7, 9, 72, torch.bfloat16),
    "images of four pixels": (3, 2, 2, 8, torch.float32),
    "images of one pixel": (2, 1, 1, 8, torch.float16),
    "one row": (1, 1, 6, 8, torch.bfloat16),
}


def normalised(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``c * scale + shift`` with one rounding to fp32 and one to the dtype of ``c``, as ``[N,C,H,W]``."""
    return (c.double() * scale + shift).float().to(c.dtype).permute(0, 3, 1, 2)


def forward(c: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Runs the kernel on guarded buffers."""
    guarded = Guarded()
    n, h, w, k = c.shape
    y = guarded.output(n, (h + 1) // 2, (w + 1) // 2, k, dtype=c.dtype)
    bn_relu_pool.launch_bn_relu_pool(*(guarded.input(t) for t in (c, scale, shift)), y)
    guarded.verify()
    return y


def backward(dy: Tensor, c: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the kernel on guarded buffers."""
    guarded = Guarded()
    dz = guarded.output(*c.shape, dtype=c.dtype)
    parts = guarded.output(bn_relu_pool.bn_relu_pool_parts(*c.shape[:3]), 2, c.shape[3], dtype=torch.float32)
    bn_relu_pool.launch_bn_relu_pool_backward(*(guarded.input(t) for t in (dy, c, scale, shift)), dz, parts)
    guarded.verify()
    return dz, parts


def check(c: Tensor, scale: Tensor, shift: Tensor) -> None:
    """Both ways bit by bit PyTorch's. Gradients are integers, so that their sums are exact."""
    z = normalised(c, scale, shift).float().requires_grad_()
    y = F.max_pool2d(z.relu(), 3, 2, 1)
    dy = integers(*y.shape, low=-8, high=8)
    y.backward(dy)
    identical(forward(c, scale, shift), y.detach().to(c.dtype).permute(0, 2, 3, 1))
    dz, parts = backward(dy.permute(0, 2, 3, 1).to(c.dtype).contiguous(), c, scale, shift)
    expected = z.grad.permute(0, 2, 3, 1)
    identical(dz, expected.to(c.dtype))
    if c.isfinite().all():
        sums = torch.stack((expected.double().sum((0, 1, 2)), (expected * c).double().sum((0, 1, 2))))
        identical(parts.double().sum(0), sums)


@pytest.mark.parametrize(("n", "h", "w", "k", "dtype"), CASES.values(), ids=CASES)
def test_is_exact_with_many_ties(n, h, w, k, dtype, counts) -> None:
    c, scale, shift = integers(n, h, w, k, dtype=dtype, low=-3, high=3), integers(k), integers(k)
    check(c, scale, shift)
    assert counts == {"bn_relu_pool": 1, "bn_relu_pool_backward": 1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ties_that_rounding_makes_or_breaks(dtype) -> None:
    # many neighbours become equal only by rounding, and some differ by one unit in the last place
    c = (1 + integers(1, 6, 7, 64, low=0, high=7) * torch.finfo(dtype).eps).to(dtype)
    scale, shift = torch.rand(64) + 0.5, torch.randn(64) / 4
    z = normalised(c, scale, shift)
    y, index = F.max_pool2d(z.float().relu(), 3, 2, 1, return_indices=True)
    assert any(z[0, k].unique().numel() < c[..., k].unique().numel() for k in range(64)), "no ties by rounding"
    dz, _ = backward(torch.ones_like(y).permute(0, 2, 3, 1).to(dtype).contiguous(), c, scale, shift)
    expected = torch.zeros_like(z, dtype=torch.float32).flatten(2)
    expected.scatter_add_(2, index.flatten(2), (y > 0).float().flatten(2))
    identical(dz, expected.view(z.shape).permute(0, 2, 3, 1).to(dtype))


def test_a_maximum_of_zero_stops_the_gradient() -> None:
    c = -integers(1, 3, 3, 8, dtype=torch.float16, low=0, high=2)
    ones = torch.ones(8)
    dz, parts = backward(torch.ones(1, 2, 2, 8, dtype=torch.float16), c, ones, torch.zeros(8))
    assert not dz.any() and not parts.any()
    assert not forward(c, ones, torch.zeros(8)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nan_and_infinity_as_in_pytorch(dtype) -> None:
    c = integers(1, 5, 6, 64, dtype=dtype, low=-3, high=3)
    c[torch.rand(c.shape) < 0.15] = NAN
    c[torch.rand(c.shape) < 0.05] = INF
    c[torch.rand(c.shape) < 0.05] = -INF
    scale = torch.tensor([1.0, -1.0, 2.0, 0.0, 1.0, 1.0, NAN, 1.0]).repeat(8)
    check(c, scale, integers(64))


def test_repeats_bitwise() -> None:
    c, scale, shift = torch.randn(1, 5, 6, 16).half(), torch.randn(16), torch.randn(16)
    dy = torch.randn(1, 3, 3, 16).half()
    first, second = backward(dy, c, scale, shift), backward(dy, c, scale, shift)
    identical(first[0], second[0])
    identical(first[1], second[1])


def test_empty_batch_launches_nothing(counts) -> None:
    c, vector, parts = torch.empty(0, 8, 8, 8), torch.ones(8), torch.full((1, 2, 8), NAN)
    bn_relu_pool.launch_bn_relu_pool(c, vector, vector, torch.empty(0, 4, 4, 8))
    bn_relu_pool.launch_bn_relu_pool_backward(torch.empty(0, 4, 4, 8), c, vector, vector, c, parts)
    assert not counts and not parts.any()


def test_parts_are_checked() -> None:
    c, vector = torch.empty(1, 8, 8, 8), torch.ones(8)
    with pytest.raises(ValueError, match="parts must be"):
        bn_relu_pool.launch_bn_relu_pool_backward(torch.empty(1, 4, 4, 8), c, vector, vector, c, torch.empty(3, 2, 8))
    assert bn_relu_pool.bn_relu_pool_parts(256, 112, 112) <= bn_relu_pool.PROGRAMS

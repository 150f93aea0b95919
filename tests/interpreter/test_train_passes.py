"""``kernels/train_passes.py`` in the interpreter: BN's backward and masked sums, apart and as one backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.kernels import train_passes
from resnet_triton.kernels.train_passes import (
    launch_bn_backward,
    launch_bn_gradients,
    launch_masked_sums,
    masked_sums_parts,
)
from tests.cases import Guarded, integers
from tests.comparers import GRADIENT, identical, no_worse_than

DTYPES = [torch.float16, torch.float32, torch.bfloat16]
SIZES = [
    pytest.param((2, 5, 7, 24), id="overhanging"),
    pytest.param((4, 4, 4, 128), id="no waste"),
    pytest.param((3, 130), id="several blocks of channels"),
    pytest.param((1, 1, 1, 3), id="one pixel"),
]
NAN = float("nan")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_bn_backward_is_exact(size: tuple[int, ...], dtype: torch.dtype, counts) -> None:
    dz, c, g = integers(*size, dtype=dtype), integers(*size, dtype=dtype), integers(3, size[-1]) / 4
    guarded = Guarded()
    out = guarded.output(*size, dtype=dtype)
    launch_bn_backward(guarded.input(dz), guarded.input(c), guarded.input(g), out)
    guarded.verify()
    identical(out, (g[0].double() * dz + g[1] + g[2].double() * c).to(dtype))
    assert counts == {"bn_backward": 1}


def test_bn_backward_in_place_with_nan() -> None:
    dz, c, g = integers(70, 24), integers(70, 24), integers(3, 24)
    dz[60, 4] = NAN
    c[2, 3] = float("inf")
    expected = g[0] * dz + g[1] + g[2] * c
    guarded = Guarded()
    out = guarded.output(70, 24, dtype=torch.float32)
    out.copy_(dz)
    launch_bn_backward(out, c, g, out)
    guarded.verify()
    identical(out, expected)


def masked_sums(dy: Tensor, y: Tensor | None, c: Tensor, parts: int = 0, store: bool = True) -> tuple[Tensor, ...]:
    """``dz`` (or None) and the parts, everything guarded."""
    channels = c.shape[-1]
    guarded = Guarded()
    dz = guarded.output(*c.shape, dtype=c.dtype) if store else None
    p = parts or masked_sums_parts(c.numel() // channels, channels)
    out = guarded.output(p, 2, channels, dtype=torch.float32)
    launch_masked_sums(guarded.input(dy), guarded.input(y), guarded.input(c), dz, out)
    guarded.verify()
    return dz, out


def sums(dz: Tensor, c: Tensor) -> Tensor:
    """``[2,C]`` in fp64."""
    dz, c = dz.double().flatten(0, -2), c.double().flatten(0, -2)
    return torch.stack((dz.sum(0), (dz * c).sum(0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_masked_sums_are_exact(size: tuple[int, ...], dtype: torch.dtype, counts) -> None:
    dy, y, c = (integers(*size, dtype=dtype) for _ in range(3))
    dz, parts = masked_sums(dy, y, c)
    expected = torch.where(y > 0, dy, 0)
    identical(dz, expected)
    identical(parts.sum(0), sums(expected, c).float())
    assert counts == {"masked_sums": 1}


@pytest.mark.parametrize("parts", [1, 3, 20])
def test_masked_sums_in_any_number_of_parts(parts: int) -> None:
    """Several tiles a part, the last one partly outside, and parts without a tile."""
    dy, y, c = (integers(700, 136, dtype=torch.float16) for _ in range(3))
    assert masked_sums_parts(700, 136) == 11
    dz, out = masked_sums(dy, y, c, parts)
    identical(dz, torch.where(y > 0, dy, 0))
    identical(out.sum(0), sums(dz, c).float())
    tiles = [sums(*(t[start : start + 64] for t in (dz, c))) for start in range(0, 700, 64)]
    last = parts - 1
    identical(out[last], sum(tiles[last::parts], torch.zeros(2, 136).double()).float())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stored", [False, True])
def test_masked_sums_without_mask_or_output(masked: bool, stored: bool) -> None:
    dy, y, c = (integers(150, 24, dtype=torch.bfloat16) for _ in range(3))
    dz, parts = masked_sums(dy, y if masked else None, c, store=stored)
    expected = torch.where(y > 0, dy, 0) if masked else dy
    identical(parts.sum(0), sums(expected, c).float())
    if stored:
        identical(dz, expected)


def test_masked_sums_in_place_with_nan() -> None:
    dy, y, c = (integers(300, 24) for _ in range(3))
    y[3:6, 2] = 1
    dy[3, 2] = c[4, 7] = y[5, 2] = NAN
    dy[250, 9], y[250, 9] = NAN, 0
    expected = torch.where(y > 0, dy, 0)
    parts = torch.full((2, 2, 24), NAN)
    launch_masked_sums(dy, y, c, dy, parts)
    identical(dy, expected)
    total = parts.sum(0)
    identical(total, sums(expected, c).float())
    assert total[0].isnan().nonzero().flatten().tolist() == [2]
    assert total[1].isnan().nonzero().flatten().tolist() == [2, 7]


def test_few_parts_whatever_the_size() -> None:
    assert masked_sums_parts(0, 64) == masked_sums_parts(1, 64) == 1
    for c in (3, 64, 128, 256, 2048):
        blocks = -(-c // 128)
        assert 256 <= masked_sums_parts(10**9, c) * blocks <= train_passes.PROGRAMS
    assert masked_sums_parts(100, 10**6) == 1


def test_no_pixels_sum_to_zero() -> None:
    none = torch.empty(0, 24)
    parts = torch.full((masked_sums_parts(0, 24), 2, 24), NAN)
    launch_masked_sums(none, none, none, None, parts)
    identical(parts, torch.zeros(1, 2, 24))


def gradients(parts: Tensor, stats: Tensor, count: int, names: str = "gamma beta", dtype=torch.float32) -> list:
    """``g``, ``dgamma`` and ``dbeta``, None where not asked for; everything guarded."""
    c = stats.shape[1]
    guarded = Guarded()
    g = guarded.output(3, c, dtype=torch.float32)
    vectors = [guarded.output(c, dtype=dtype) if name in names.split() else None for name in ("gamma", "beta")]
    launch_bn_gradients(guarded.input(parts), guarded.input(stats), count, g, *vectors)
    guarded.verify()
    return [g, *vectors]


@pytest.mark.parametrize("count", [16, 0, 1])
@pytest.mark.parametrize(("p", "c", "names"), [(1, 3, "gamma beta"), (70, 40, "gamma"), (33, 64, "beta"), (5, 8, "")])
def test_gradients_are_exact(p: int, c: int, names: str, count: int, counts) -> None:
    parts = integers(p, 2, c, low=-9, high=9)
    stats = integers(5, c) / 2
    g, dgamma, dbeta = gradients(parts, stats, count, names)
    db, product = parts.double().sum(0)
    mean, _, rstd, scale, _ = stats.double()
    dg = (product - mean * db) * rstd
    g3 = -scale * rstd * dg / count if count else torch.zeros(c)
    g2 = -scale * db / count - g3 * mean if count else torch.zeros(c)
    identical(g, torch.stack((scale, g2, g3)).float())
    for out, expected, name in ((dgamma, dg, "gamma"), (dbeta, db, "beta")):
        assert (out is not None) == (name in names)
        if out is not None:
            identical(out, expected.float())
    assert counts == {"bn_gradients": 1}


def test_gradients_in_the_dtype_of_the_parameters() -> None:
    parts, stats = integers(5, 2, 24), integers(5, 24)
    for one, other in zip(gradients(parts, stats, 16), gradients(parts, stats, 16, dtype=torch.bfloat16), strict=True):
        identical(one.bfloat16(), other.bfloat16())


def test_sums_of_parts_keep_what_fp32_would_lose() -> None:
    parts = torch.zeros(100, 2, 8)
    parts[0], parts[1:99], parts[99] = 2.0**30, 1.0, -(2.0**30)
    stats = torch.zeros(5, 8)
    stats[2:4] = 1
    _, dgamma, dbeta = gradients(parts, stats, 16)
    identical(dbeta, torch.full((8,), 98.0))
    identical(dgamma, torch.full((8,), 98.0))


def backward(dy: Tensor, y: Tensor, c: Tensor, stats: Tensor, count: int, parts: int = 0) -> tuple[Tensor, ...]:
    """The gradient of ``c``, gamma and beta: all three passes."""
    dz, sums_ = masked_sums(dy, y, c, parts)
    g, dgamma, dbeta = gradients(sums_, stats, count)
    launch_bn_backward(dz, c, g, dz)
    return dz, dgamma, dbeta


@pytest.mark.parametrize(
    ("dtype", "mean"),
    [*((dtype, mean) for dtype in DTYPES for mean in (0.5, 2.0)), (torch.float16, 20.0), (torch.bfloat16, 20.0)],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_a_backward_is_no_worse_than_eager(dtype: torch.dtype, mean: float, training: bool) -> None:
    m, k = 500, 24
    c, dy = (torch.randn(m, k) * 2 + mean).to(dtype), torch.randn(m, k).to(dtype)
    gamma, beta = torch.rand(k) + 0.5, torch.randn(k)
    running = torch.full((k,), mean), torch.full((k,), 3.0)

    def eager(as_dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        leaves = [t.to(as_dtype or t.dtype).requires_grad_() for t in (c, gamma, beta)]
        statistics = [t.clone().to(as_dtype or t.dtype) for t in running]
        y = F.batch_norm(leaves[0], *statistics, *leaves[1:], training=training, eps=1e-5).relu()
        return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))

    y, *theirs = eager(None)
    y64, *exact = eager(torch.float64)
    assert torch.equal(y > 0, y64 > 0)
    average, var = (c.double().mean(0), c.double().var(0, unbiased=False)) if training else running
    rstd = (var.double() + 1e-5).rsqrt()
    stats = torch.stack((average, var, rstd, gamma * rstd, beta - average * gamma * rstd)).float()
    ours = backward(dy, y, c, stats, m if training else 0)
    for out, other, reference in zip(ours, theirs, exact, strict=True):
        # the sums of dz * c are not centred: dgamma's last fp32 digits suffer from a mean, those of 16 bits do not
        if mean >= 2 and dtype != torch.float32:
            out, other = out.to(dtype), other.to(dtype)
        no_worse_than(out, other, reference, GRADIENT)


def test_repeats_bitwise() -> None:
    dy, y, c = torch.randn(3, 700, 24).half()
    stats = torch.rand(5, 24)
    for one, other in zip(backward(dy, y, c, stats, 700, 2), backward(dy, y, c, stats, 700, 2), strict=True):
        identical(one, other)


def test_nothing_launches_nothing(counts) -> None:
    launch_bn_backward(torch.empty(0, 8), torch.empty(0, 8), torch.zeros(3, 8), torch.empty(0, 8))
    none = torch.empty(4, 0)
    launch_masked_sums(none, none, none, None, torch.empty(1, 2, 0))
    launch_bn_gradients(torch.empty(1, 2, 0), torch.empty(5, 0), 4, torch.empty(3, 0), None, None)
    assert not counts

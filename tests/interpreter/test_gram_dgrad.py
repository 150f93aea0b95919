"""``gram_dgrad`` in the interpreter: masks, sums, strides, overhanging rows and columns; and the Gram form's error."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.gram_dgrad import gram_dgrad_parts, launch_gram_dgrad
from resnet_triton.kernels.prologue import Normalised
from tests.cases import Guarded, integers
from tests.comparers import errors, identical

#: Up to 32 channels in one chunk.
TILE = ConvConfig("gram_dgrad", (1, 1, 32), 32, 32, 4, 2)


@dataclass(frozen=True)
class Inputs:
    """Operands of one launch; ``prologue`` is ``[2, C]``: scale and shift."""

    dz: Tensor
    y: Tensor | None
    wp: Tensor
    a: Tensor
    prologue: Tensor | None
    mm: Tensor
    rho: Tensor
    v: Tensor
    masked: bool
    stride: int = 1


def inputs(
    n: int, h: int, w: int, c: int, k: int, stride: int = 1, y: bool = False, prologue: bool = True,
    masked: bool = True, dtype: torch.dtype = torch.float16,
) -> Inputs:  # fmt: skip
    """Small integers."""
    m = n * -(-h // stride) * -(-w // stride)
    return Inputs(
        integers(m, k, dtype=dtype),
        integers(m, k, dtype=dtype, low=-1) if y else None,
        integers(k, c, dtype=dtype, low=-1, high=1),
        integers(n, h, w, c, dtype=dtype),
        integers(2, c, low=-1, high=2) if prologue else None,
        integers(c, c, dtype=dtype, low=-1, high=1),
        2.0 ** integers(c, low=-1, high=2),
        integers(c, low=-5, high=5),
        masked,
        stride,
    )


def expected(given: Inputs) -> tuple[Tensor, Tensor]:
    """``out`` rounded once, and the sums ``[2, C]``, from fp64."""
    s, c = given.stride, given.a.shape[-1]
    raw = given.a[:, ::s, ::s].reshape(-1, c).double()
    d = given.dz.double()
    if given.y is not None:
        d = d.where(given.y > 0, 0.0)
    h = raw
    if given.prologue is not None:
        normalised = raw * given.prologue[0].double() + given.prologue[1].double()
        h = normalised.relu().to(given.a.dtype).double()
    out = h @ given.mm.double() * given.rho.double() + d @ given.wp.double() + given.v.double()
    if given.masked:
        out = out.where(normalised > 0, 0.0)
    rounded = out.to(given.dz.dtype)
    return rounded, torch.stack((rounded.double().sum(0), (rounded.double() * raw).sum(0)))


def run(given: Inputs, config: ConvConfig, parts: int | None = 2) -> tuple[Tensor, Tensor | None]:
    """``out`` and the partial sums of ``parts`` programs (None: no sums are asked for)."""
    guarded = Guarded()
    m, c = given.dz.shape[0], given.a.shape[-1]
    out = guarded.output(m, c, dtype=given.dz.dtype)
    sums = guarded.output(parts, 2, c, dtype=torch.float32) if parts else None
    prologue = None if given.prologue is None else Normalised(*(guarded.input(v) for v in given.prologue))
    launch.COUNTS.clear()
    launch_gram_dgrad(
        guarded.input(given.dz), guarded.input(given.y), guarded.input(given.wp), guarded.input(given.a), prologue,
        guarded.input(given.mm), guarded.input(given.rho), guarded.input(given.v), out, sums,
        given.masked, given.stride, config, "ieee",
    )  # fmt: skip
    assert launch.COUNTS == {"gram_dgrad": 1}
    guarded.verify()
    return out, sums


def check_exact(given: Inputs, config: ConvConfig, parts: int | None = 2) -> None:
    right, sums = expected(given)
    assert right.isfinite().all() and right.count_nonzero() > 0, "the case tests nothing"
    out, partial = run(given, config, parts)
    identical(out, right)
    if parts:
        identical(partial.double().sum(0), sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"n": 2, "h": 4, "w": 4, "c": 32, "k": 64}, id="no waste"),
        pytest.param({"n": 3, "h": 5, "w": 3, "c": 24, "k": 72}, id="overhang in rows and channels"),
        pytest.param({"n": 1, "h": 5, "w": 7, "c": 72, "k": 40}, id="chunks of channels"),
        pytest.param({"n": 1, "h": 3, "w": 5, "c": 8, "k": 8}, id="fewer channels than a product takes"),
        pytest.param({"n": 1, "h": 5, "w": 7, "c": 16, "k": 32, "y": True}, id="ReLU behind the convolution"),
        pytest.param({"n": 1, "h": 5, "w": 7, "c": 40, "k": 32, "masked": False}, id="not masked"),
        pytest.param({"n": 1, "h": 5, "w": 7, "c": 40, "k": 32, "masked": False, "prologue": False}, id="no prologue"),
    ],
)
def test_exact(given: dict, dtype: torch.dtype) -> None:
    check_exact(inputs(**given, dtype=dtype), TILE)


@pytest.mark.parametrize("parts", [1, 3, 5, None])
def test_exact_with_any_number_of_programs(parts: int | None) -> None:
    """Three tiles: programs with several, with one, and with none."""
    check_exact(inputs(1, 9, 8, 40, 32), TILE, parts)


@pytest.mark.parametrize("box", [(2, 4, 4), (16, 1, 2)], ids=str)
@pytest.mark.parametrize("odd", [0, 1], ids=["even", "odd"])
def test_exact_stride_2(odd: int, box: tuple[int, int, int]) -> None:
    plain = {"stride": 2, "prologue": False, "masked": False}
    check_exact(inputs(3, 6 - odd, 6 - odd, 24, 40, **plain), replace(TILE, box=box), None)
    check_exact(inputs(1, 4 - odd, 6 - odd, 72, 32, y=True, **plain), replace(TILE, box=box), None)
    check_exact(inputs(1, 4 - odd, 6 - odd, 16, 32, stride=2), replace(TILE, box=box), None)


def test_number_of_parts() -> None:
    """Four multiprocessors: eight programs, over all blocks of columns."""
    tile = replace(TILE, bk=64)
    assert gram_dgrad_parts(32 * 8, 32, tile, 4) == 8
    assert gram_dgrad_parts(32 * 8, 64, tile, 4) == 4
    assert gram_dgrad_parts(32 * 9, 32, tile, 4) == 5, "as few as finish at the same time"
    assert gram_dgrad_parts(32 * 9, 72, tile, 4) == 9, "channels in chunks: one tile a program"
    assert gram_dgrad_parts(5, 512, tile, 4) == 1


@pytest.mark.parametrize("c", [24, 104])
def test_exact_in_halves_and_with_eight_warps(c: int) -> None:
    check_exact(inputs(1, 7, 10, c, 40, dtype=torch.bfloat16), replace(TILE, bn=128, bk=128, warps=8))
    check_exact(inputs(1, 7, 10, c, 40), replace(TILE, bn=128, bk=64, warps=8), 3)


def test_nan_propagates_where_the_mask_lets_it() -> None:
    given = inputs(1, 4, 5, 16, 32)
    given.prologue[0] = 1
    given.prologue[1] = 0
    given.a.fill_(1)
    given.a[0, 0, 1] = -1
    given.dz[1, 5] = given.dz[3, 7] = float("nan")
    right, _ = expected(given)
    out, partial = run(given, TILE)
    identical(out, right)
    assert not right[1].any() and right[3].isnan().any()
    assert partial.isnan().any()


def test_repeats_are_equal_bit_by_bit() -> None:
    given = inputs(3, 4, 5, 24, 48)
    given = replace(given, dz=torch.randn(given.dz.shape).half(), a=torch.randn(given.a.shape).half())
    out, parts = run(given, TILE)
    for _ in range(2):
        again, parts_again = run(given, TILE)
        identical(again, out)
        identical(parts_again, parts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_closer_than_through_a_stored_output(dtype: torch.dtype) -> None:
    """da of ``y = relu(bn(a w^T) + x)``: the convolution's output, rounded as it is stored, would cost more."""
    m, c, k = 1024, 32, 128
    a, x, dy = torch.randn(m, c).to(dtype), torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype)
    w = (torch.randn(k, c) / c**0.5).to(dtype)
    scale, shift = torch.rand(c) + 0.5, torch.randn(c) / 4
    gamma, beta = torch.rand(k, dtype=torch.float64) + 0.5, torch.randn(k, dtype=torch.float64) / 4
    normalised = a.double() * scale.double() + shift.double()
    h = normalised.relu().to(dtype).double()

    def bn(c3: Tensor) -> tuple[Tensor, Tensor]:
        rstd = (c3.var(0, unbiased=False) + 1e-5).rsqrt()
        return (((c3 - c3.mean(0)) * rstd * gamma + beta + x.double()).relu() > 0), rstd

    def coefficients(c3: Tensor, rstd: Tensor, dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g1 = gamma * rstd
        g3 = -g1 * rstd * ((c3 - c3.mean(0)) * rstd * dz).sum(0) / m
        return g1, -g1 * dz.sum(0) / m - g3 * c3.mean(0), g3

    exact, w64 = h @ w.double().T, w.double()
    positive, rstd = bn(exact)
    dz = dy.double() * positive
    g1, g2, g3 = coefficients(exact, rstd, dz)
    reference = ((g1 * dz + g2 + g3 * exact) @ w64).where(normalised > 0, 0.0)

    rounded = exact.to(dtype).double()
    positive_stored, rstd = bn(rounded)
    dz_stored = dy.double() * positive_stored
    s1, s2, s3 = coefficients(rounded, rstd, dz_stored)
    stored = ((s1 * dz_stored + s2 + s3 * rounded).to(dtype).double() @ w64).where(normalised > 0, 0.0).to(dtype)

    mm = w64.T @ (g3[:, None] * w64)
    rho = torch.exp2(torch.ceil(torch.log2(mm.abs().amax(0))))
    given = Inputs(
        dz.to(dtype), None, (g1[:, None] * w64).to(dtype), a.view(1, 1, m, c), torch.stack((scale, shift)),
        (mm / rho).to(dtype), rho.float(), (g2 @ w64).float(), True,
    )  # fmt: skip
    out, _ = run(given, replace(TILE, box=(1, 1, 128)))
    ours, theirs = errors(out, reference), errors(stored, reference)
    assert ours[0] < theirs[0] and ours[1] < theirs[1]


def test_refused() -> None:
    given = inputs(1, 4, 4, 16, 32)
    with pytest.raises(ValueError, match="masked=True needs the prologue"):
        run(replace(given, prologue=None), TILE)
    with pytest.raises(ValueError, match="stride must be 1, or 2 with parts=None, got stride=2"):
        run(replace(given, stride=2), TILE)
    with pytest.raises(ValueError, match=r"stride must be 1, .* got stride=3"):
        run(replace(given, stride=3), TILE, None)
    with pytest.raises(ValueError, match="1x2x2 pixels of a at stride 2, got 16 rows"):
        run(replace(given, stride=2), TILE, None)

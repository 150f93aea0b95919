"""``dgrad`` in the interpreter: every stride and phase, prologues, masks, residuals and sums, bit by bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels import dgrad_phases, launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.dgrad import dgrad_configs, dgrad_parts, launch_dgrad
from resnet_triton.kernels.geometry import ConvShape, cdiv
from resnet_triton.kernels.prologue import BNBackward, Normalised
from resnet_triton.shapes import BLOCKS, resnet_convs
from tests.cases import Guarded, integers
from tests.comparers import GRADIENT, identical, no_worse_than

F16 = torch.float16


def config(box: tuple[int, int, int] = (2, 8, 8), bn: int = 32, bk: int = 32) -> ConvConfig:
    return ConvConfig("dgrad", box, bn, bk)


class Inputs:
    """Small integers, and what surrounds the convolution."""

    def __init__(
        self,
        shape: ConvShape,
        dtype: torch.dtype = F16,
        prologue: bool = False,
        mask: str = "",
        residual: int = 0,
    ) -> None:
        s = self.shape = shape
        self.dy = integers(s.n, s.p, s.q, s.k, dtype=dtype)
        self.w = integers(s.k, s.r, s.s, s.c, dtype=dtype, low=-1, high=1)
        self.raw = integers(s.n, s.p, s.q, s.k, dtype=dtype) if prologue else None
        self.g = integers(3, s.k, low=-1, high=1) if prologue else None
        self.mask = mask
        self.c = integers(s.n, s.h, s.w, s.c, dtype=dtype) if mask else None
        self.scale, self.shift = (integers(s.c, low=-2, high=2), integers(s.c, low=-3, high=3))
        self.stride = residual or 1
        half = (cdiv(s.h, self.stride), cdiv(s.w, self.stride))
        self.residual = integers(s.n, *half, s.c, dtype=dtype, low=-9, high=9) if residual else None

    def expected(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """dx ``[N,H,W,C]`` computed in ``dtype`` by PyTorch, not rounded."""
        s = self.shape
        d = self.dy.to(dtype)
        if self.raw is not None:
            g = self.g.to(dtype)
            d = (g[0] * d + g[1] + g[2] * self.raw.to(dtype)).to(self.dy.dtype).to(dtype)
        dx = torch.nn.grad.conv2d_input(
            (s.n, s.c, s.h, s.w), self.w.to(dtype).permute(0, 3, 1, 2), d.permute(0, 3, 1, 2),
            s.stride, s.padding, s.dilation,
        ).permute(0, 2, 3, 1)  # fmt: skip
        if self.residual is not None:
            dx = dx.clone()
            dx[:, :: self.stride, :: self.stride] += self.residual.to(dtype)
        if self.mask:
            kept = self.c.to(dtype)
            if self.mask == "affine":
                kept = kept * self.scale.to(dtype) + self.shift.to(dtype)
            dx = torch.where(kept > 0, dx, 0)
        return dx

    def run(self, tiling: ConvConfig, sums: bool = False, precision: str = "ieee") -> tuple[Tensor, Tensor | None]:
        s, guarded = self.shape, Guarded()
        dx = guarded.output(s.n, s.h, s.w, s.c, dtype=self.dy.dtype)
        rows = dgrad_parts(s, tiling, self.stride)
        parts = guarded.output(rows, 2, s.c, dtype=torch.float32) if sums else None
        prologue = None
        if self.raw is not None:
            prologue = BNBackward(guarded.input(self.raw), guarded.input(self.g))
        mask = guarded.input(self.c)
        if self.mask == "affine":
            mask = (mask, Normalised(guarded.input(self.scale), guarded.input(self.shift)))
        launch.COUNTS.clear()
        launch_dgrad(
            guarded.input(self.dy), guarded.input(self.w), dx, s, prologue, mask, guarded.input(self.residual),
            self.stride, parts, tiling, precision,
        )  # fmt: skip
        assert set(launch.COUNTS) == {tiling.kernel}
        guarded.verify()
        return dx, parts


def check(inputs: Inputs, tiling: ConvConfig) -> None:
    """Bit by bit the fp64 reference, and the sums where the mask has what they need."""
    expected = inputs.expected()
    assert expected.count_nonzero() > 0, "the case tests nothing"
    sums = inputs.mask == "affine"
    dx, parts = inputs.run(tiling, sums)
    identical(dx, expected.to(dx.dtype))
    if sums:
        identical(parts.sum(0)[0], expected.sum((0, 1, 2)).float())
        identical(parts.sum(0)[1], (expected * inputs.c.double()).sum((0, 1, 2)).float())


# n, h, w, c, k, r, s, stride, padding, dilation
SHAPES = [
    pytest.param(ConvShape(2, 8, 8, 32, 32, 3, 3, 1, 1), config(), id="3x3, no waste"),
    pytest.param(ConvShape(3, 5, 9, 24, 40, 3, 3, 1, 1), config(bk=64), id="3x3, overhang in every dimension"),
    pytest.param(ConvShape(2, 6, 7, 16, 24, 3, 3, 1, 2, 2), config(), id="dilation 2"),
    pytest.param(ConvShape(1, 7, 6, 16, 16, 3, 3, 1, 0), config(bk=16), id="no padding"),
    pytest.param(ConvShape(1, 4, 4, 16, 16, 3, 3, 1, 3), config(bk=16), id="padding larger than the filter"),
    pytest.param(ConvShape(1, 6, 5, 16, 16, 2, 4, 1, 1), config(), id="2x4 filter"),
    pytest.param(ConvShape(3, 7, 5, 40, 24), config((1, 1, 64)), id="1x1"),
    pytest.param(ConvShape(3, 8, 12, 32, 32, 3, 3, 2, 1), config(), id="3x3 stride 2"),
    pytest.param(ConvShape(3, 8, 8, 64, 24, 3, 3, 2, 1), config((8, 4, 4)), id="3x3 stride 2, two column blocks"),
    pytest.param(ConvShape(3, 8, 6, 24, 40, 3, 3, 2, 1), config(), id="stride 2, half a column block"),
    pytest.param(ConvShape(3, 7, 9, 32, 16, 3, 3, 2, 1), config(), id="stride 2, odd"),
    pytest.param(ConvShape(2, 7, 8, 40, 24, 3, 3, 2, 0), config(), id="stride 2, odd rows, no padding"),
    pytest.param(ConvShape(2, 1, 1, 16, 16, 3, 3, 2, 1), config(bn=16, bk=16), id="stride 2, one pixel"),
    pytest.param(ConvShape(2, 8, 8, 16, 16, 3, 3, 2, 2, 2), config(bn=16), id="stride 2, dilation 2"),
    pytest.param(ConvShape(2, 10, 8, 16, 16, 3, 3, 2, 3, 3), config(bn=16), id="stride 2, dilation 3"),
    pytest.param(ConvShape(2, 10, 8, 16, 16, 5, 5, 2, 2), config(bn=16), id="5x5 stride 2"),
    pytest.param(ConvShape(2, 8, 8, 16, 16, 7, 7, 2, 3), config(bn=16), id="7x7 stride 2"),
    pytest.param(ConvShape(3, 8, 12, 32, 40, 1, 1, 2), config(), id="1x1 stride 2"),
    pytest.param(ConvShape(3, 7, 5, 32, 40, 1, 1, 2), config(), id="1x1 stride 2, odd"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "tiling"), SHAPES)
def test_geometry(shape: ConvShape, tiling: ConvConfig) -> None:
    check(Inputs(shape, mask="affine", residual=1), tiling)


def small(shape: ConvShape) -> ConvShape:
    """A sixteenth of the channels (at least 16) and at most 6 x 6 pixels."""
    pixels = min(shape.h, 6)
    return replace(shape, n=2, h=pixels, w=pixels, c=max(16, shape.c // 16), k=max(16, shape.k // 16))


NETWORKS = sorted({small(site.shape) for depth in BLOCKS for site in resnet_convs(depth, 1, 64)}, key=str)
CIFAR = [
    ConvShape(2, 8, 8, c, k, 3, 3, stride, 1)
    for c, k, stride in ((16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
]


@pytest.mark.parametrize("shape", NETWORKS + CIFAR, ids=str)
def test_convolutions_of_networks_with_their_own_configuration(shape: ConvShape) -> None:
    check(Inputs(shape, mask="x", prologue=shape.pointwise), dgrad_configs(shape, 2, shape.pointwise)[0])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("prologue", [False, True])
def test_every_configuration(itemsize: int, prologue: bool) -> None:
    """Those of a shape large enough to have all of them, on one that is not."""
    r, stride = (1, 1) if prologue else (3, 1)
    for tiling in dgrad_configs(ConvShape(64, 56, 56, 256, 64, r, r, stride, r // 2), itemsize, prologue):
        case = Inputs(ConvShape(1, 4, 4, 256, 64, r, r, stride, r // 2), prologue=prologue, mask="affine")
        check(case, tiling)


@pytest.mark.parametrize("residual", [0, 1, 2])
@pytest.mark.parametrize("mask", ["", "x", "affine"])
@pytest.mark.parametrize("prologue", [False, True])
def test_what_surrounds_a_1x1(prologue: bool, mask: str, residual: int) -> None:
    """Stride 1 and 2, all phases in one launch and one launch a phase."""
    cases = {(1, False), (2, False), (1, residual == 2), (2, mask != "")}
    for stride, odd in sorted(cases):
        h, w = (5, 7) if odd else (4, 6)
        case = Inputs(ConvShape(3, h, w, 32, 16, 1, 1, stride), prologue=prologue, mask=mask, residual=residual)
        box = (1, 1, 64) if stride == 1 else (4, 4, 4)
        check(case, config(box, bk=16))


@pytest.mark.parametrize("residual", [0, 1, 2])
@pytest.mark.parametrize("mask", ["", "x"])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_surrounds_a_3x3(stride: int, mask: str, residual: int) -> None:
    case = Inputs(ConvShape(2, 6, 6, 64, 16, 3, 3, stride, 1), mask=mask, residual=residual)
    if stride == 1 and residual == 2:
        with pytest.raises(ValueError, match="residual_stride=2 is for 1x1 convolutions or stride 2, got 3x3/1"):
            case.run(config())
    else:
        check(case, config((2, 4, 8), bn=64, bk=16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(Inputs(ConvShape(2, 4, 6, 64, 24, 3, 3, 2, 1), dtype, mask="affine", residual=2), config(bn=64))
    check(Inputs(ConvShape(2, 4, 6, 64, 24), dtype, True, "affine", 1), config((1, 1, 32), bn=64))


@pytest.mark.parametrize("sides", [(8, 8), (7, 5)])
def test_programs_walk_over_several_tiles(sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dgrad_phases, "SUMMING_PROGRAMS", 5)
    shape, tiling = ConvShape(3, *sides, 32, 16, 3, 3, 2, 1), config((1, 4, 4), bn=16, bk=16)
    launches = 1 if sides == (8, 8) else 4
    assert dgrad_parts(shape, tiling) == launches * (5 // 2)
    check(Inputs(shape, mask="affine"), tiling)


def test_sums_count_what_was_stored() -> None:
    """After rounding, and nothing beyond the image."""
    case = Inputs(ConvShape(3, 5, 3, 24, 16, 3, 3, 1, 1), mask="affine")
    case.dy = torch.randn(case.dy.shape).to(F16)
    dx, parts = case.run(config(bn=16), sums=True)
    assert parts.shape[0] <= dgrad_phases.SUMMING_PROGRAMS
    stored = dx.double()
    expected = torch.stack((stored.sum((0, 1, 2)), (stored * case.c.double()).sum((0, 1, 2))))
    eager = torch.stack((dx.float().sum((0, 1, 2)), (dx.float() * case.c.float()).sum((0, 1, 2))))
    no_worse_than(parts.sum(0), eager, expected, GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_close(dtype: torch.dtype) -> None:
    for shape, prologue in ((ConvShape(2, 6, 8, 32, 48, 3, 3, 2, 1), False), (ConvShape(2, 6, 8, 32, 48), True)):
        case = Inputs(shape, dtype, prologue, "x", 1)
        for name in ("dy", "raw", "c", "residual"):
            before = getattr(case, name)
            setattr(case, name, None if before is None else torch.randn(before.shape).to(dtype))
        case.w = (torch.randn(case.w.shape) / shape.k**0.5).to(dtype)
        dx, _ = case.run(config((2, 4, 8) if shape.stride == 2 else (1, 1, 64)))
        no_worse_than(dx, case.expected(dtype), case.expected(), GRADIENT)


def test_repeats_are_bitwise_equal_and_tiles_do_not_matter() -> None:
    case = Inputs(ConvShape(2, 4, 4, 64, 32, 3, 3, 2, 1), mask="affine")
    case.dy = torch.randn(case.dy.shape).to(F16)
    first, sums = case.run(config(), sums=True)
    again, same_sums = case.run(config(), sums=True)
    identical(again, first)
    identical(same_sums, sums)
    identical(case.run(config((8, 1, 2), bn=64))[0], first)  # computed transposed


def test_nan_goes_where_pytorch_lets_it_go() -> None:
    case = Inputs(ConvShape(1, 6, 6, 24, 16, 3, 3, 2, 1), mask="affine", residual=2)
    case.dy[0, 1, 2, 3] = float("nan")
    case.residual[0, 0, 0, -1] = float("nan")
    expected = case.expected().to(F16)
    assert expected.isnan().any() and expected.isfinite().any()
    identical(case.run(config())[0], expected)


def test_the_mask_is_the_fused_multiply_add() -> None:
    """A product that rounds to minus the shift is not zero before it is rounded."""
    case = Inputs(ConvShape(1, 4, 4, 16, 16), mask="affine")
    case.c.fill_(1 + 2.0**-10)
    case.scale.fill_(1 + 2.0**-20)
    product = case.c[0, 0, 0].double() * case.scale.double()
    case.shift = -product.float()
    residue = product + case.shift.double()
    assert (residue != 0).all()
    case.scale[::2] *= -1
    case.shift[::2] *= -1
    dx, _ = case.run(config((1, 1, 16), bn=16, bk=16))
    kept = (residue * torch.tensor([-1.0, 1.0]).repeat(8)) > 0
    identical(dx[..., ~kept], torch.zeros_like(dx[..., ~kept]))
    case.mask = ""
    identical(dx[..., kept], case.expected().to(F16)[..., kept])


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (ConvShape(1, 6, 6, 16, 16, 3, 3, 1, 1), {"prologue": True}, "a prologue is for 1x1 .* got 3x3/1"),
        (ConvShape(1, 6, 6, 16, 16, 3, 3, 3, 1), {}, "stride=3; allowed: 1 or 2"),
        (ConvShape(1, 6, 6, 16, 16), {"residual": 3}, "residual_stride=3; allowed: 1 or 2"),
        (ConvShape(1, 6, 6, 16, 16), {"mask": "x", "sums": True}, r"allowed: .* mask \(c, Normalised\)"),
        (ConvShape(1, 6, 6, 16, 16), {"kernel": "wgrad"}, "config.kernel='wgrad'; allowed: 'dgrad'"),
    ],
)
def test_what_is_refused(shape: ConvShape, changes: dict[str, Any], message: str) -> None:
    tiling = replace(config(), kernel=changes.pop("kernel", "dgrad"))
    sums = changes.pop("sums", False)
    with pytest.raises(ValueError, match=message):
        Inputs(shape, **changes).run(tiling, sums)

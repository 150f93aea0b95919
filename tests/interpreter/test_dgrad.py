"""``dgrad`` in the interpreter: every stride and phase, prologues, masks, residuals and sums, bit by bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.dgrad import dgrad_configs, dgrad_parts, launch_dgrad
from resnet_triton.kernels.geometry import ConvShape, cdiv
from resnet_triton.kernels.prologue import BNBackward, Normalised
from tests.cases import Guarded, integers
from tests.comparers import GRADIENT, identical, no_worse_than

F16 = torch.float16


def config(box: tuple[int, int, int] = (2, 4, 8), bn: int = 32, bk: int = 32) -> ConvConfig:
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
        assert set(launch.COUNTS) == {"dgrad"}
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
    pytest.param(ConvShape(3, 5, 9, 24, 40, 3, 3, 1, 1), config(), id="3x3, overhang in every dimension"),
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
    check(Inputs(shape), tiling)
    check(Inputs(shape, mask="affine", residual=1), tiling)

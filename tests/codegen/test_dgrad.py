"""Machine code of the input gradient for layers of ResNet-50: nothing spills, and products wait for memory alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.issue import IssueCount, count_issued
from resnet_triton.kernels.dgrad import dgrad_configs, dgrad_parts, launch_dgrad
from resnet_triton.kernels.dgrad_phases import phased, walks
from resnet_triton.kernels.geometry import ConvShape, cdiv
from resnet_triton.kernels.prologue import BNBackward, Normalised
from resnet_triton.nests import Loop
from resnet_triton.shapes import BLOCKS, resnet_convs

N = 256
BF16, TF32 = torch.bfloat16, torch.float32


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def launches(shape: ConvShape, dtype: torch.dtype, index: int, prologue: bool, mask: str, residual: int):
    """What configuration ``index`` launches, with sums where the mask is of a raw output."""
    config = dgrad_configs(shape, dtype.itemsize, prologue)[index]
    stride = residual or 1
    outputs, inputs = (shape.n, shape.p, shape.q, shape.k), (shape.n, shape.h, shape.w, shape.c)
    half = (shape.n, cdiv(shape.h, stride), cdiv(shape.w, stride), shape.c)
    raw = meta(*inputs, dtype=dtype)
    sums = mask == "affine"
    return config, codegen.trace(
        lambda: launch_dgrad(
            meta(*outputs, dtype=dtype), meta(shape.k, shape.r, shape.s, shape.c, dtype=dtype),
            meta(*inputs, dtype=dtype), shape,
            BNBackward(meta(*outputs, dtype=dtype), meta(3, shape.k)) if prologue else None,
            (raw, Normalised(meta(shape.c), meta(shape.c))) if sums else raw,
            meta(*half, dtype=dtype) if residual else None, stride,
            meta(dgrad_parts(shape, config, stride), 2, shape.c) if sums else None, config, "tf32",
        ),
        132,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "dtype", "index", "prologue", "mask", "residual", "pressure"),
    [
        # the pressure of a step; that of a prologue is bounded by its epilogue's memory traffic, see dgrad_configs
        (ConvShape(N, 56, 56, 64, 64, 3, 3, 1, 1), BF16, 1, False, "affine", 0, 0.25),
        (ConvShape(N, 28, 28, 128, 128, 3, 3, 1, 1), BF16, 0, False, "affine", 1, 0.25),
        (ConvShape(N, 14, 14, 256, 256, 3, 3, 1, 1), BF16, 2, False, "affine", 1, 0.25),
        (ConvShape(N, 56, 56, 128, 128, 3, 3, 2, 1), BF16, 0, False, "affine", 0, 0.3),
        (ConvShape(N, 14, 14, 256, 1024), BF16, 0, True, "affine", 1, 0.75),
        (ConvShape(N, 56, 56, 256, 128), BF16, 0, True, "x", 2, 0.75),
        (ConvShape(N, 14, 14, 1024, 256), BF16, 0, False, "x", 1, 0.25),
        (ConvShape(250, 7, 7, 512, 512, 3, 3, 1, 1), BF16, 1, False, "affine", 0, 0.25),
        (ConvShape(N, 28, 28, 128, 128, 3, 3, 1, 1), TF32, 0, False, "affine", 1, 0.6),
    ],
    ids=str,
)
def test_program(
    shape: ConvShape, dtype: torch.dtype, index: int, prologue: bool, mask: str, residual: int, pressure: float
) -> None:
    config, (launch,) = launches(shape, dtype, index, prologue, mask, residual)
    program = codegen.compile_launch(launch, 90)
    listing = program.listing
    assert not listing.stack_bytes and not listing.count(sass.LOCAL)
    assert program.shared_bytes <= codegen.SHARED_LIMIT[90]
    assert listing.count("HGMMA") and listing.count("UTMALDG") and listing.count("UTMASTG")
    taps = 4 if shape.r == 3 and shape.stride == 2 else shape.r * shape.s  # of the phase that has most
    macs = config.bm * config.bn * config.bk
    steps = Loop(taps * cdiv(shape.k, config.bk), macs)
    counted: IssueCount = count_issued(listing, [steps], program.warps, program.repeats, mask == "affine")
    rate = codegen.MACS_PER_CYCLE[90] * 2 // dtype.itemsize
    for loop in counted.loops:
        assert loop.step * program.warps / 4 / (loop.macs / rate) <= pressure


def test_every_layer_is_one_launch_without_waste() -> None:
    for depth, batch in itertools.product(BLOCKS, (32, 256)):
        for site in resnet_convs(depth, batch):
            for residual_stride in (1, 2) if site.shape.pointwise or site.shape.stride == 2 else (1,):
                divided = phased(site.shape, residual_stride) and min(site.shape.h, site.shape.w) % 2
                for config in dgrad_configs(site.shape, 2, site.shape.pointwise):
                    found = walks(site.shape, config, residual_stride)
                    assert len(found) == (4 if divided else 1), site
                    flat = site.shape.pointwise and residual_stride == 1
                    assert batch == 32 or divided or all(walk.exact(True, flat) for walk in found), (site, config)
                    assert dgrad_parts(site.shape, config, residual_stride) <= 264 * len(found)

"""Machine code of the training convolution and its statistics: no spills, room for the programs planned, pressure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.conv_stats import conv_stats_configs, conv_stats_parts, launch_conv_stats
from resnet_triton.kernels.finalise import launch_finalise
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.moments import launch_moments, moments_parts
from resnet_triton.kernels.prologue import Normalised


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def compiled(
    shape: ConvShape, config: ConvConfig, prologue: bool, dtype: torch.dtype, precision: str
) -> codegen.Compiled:
    s = shape
    x, w = meta(s.n, s.h, s.w, s.c, dtype=dtype), meta(s.k, s.r, s.s, s.c, dtype=dtype)
    y = meta(s.n, s.p, s.q, s.k, dtype=dtype)
    parts = meta(conv_stats_parts(s, config), 3, s.k)
    vectors = Normalised(meta(s.c), meta(s.c)) if prologue else None
    (launch,) = codegen.trace(lambda: launch_conv_stats(x, w, y, parts, s, vectors, config, precision), 132)
    return codegen.compile_launch(launch, 90)


def main_loop(program: codegen.Compiled) -> tuple[int, int]:
    """Instructions of the innermost loop with products: those of every step, and those that only the border needs."""
    blocks = sass.blocks_of(program.listing.instructions)
    loop = next(
        loop for loop in sass.loops_of(blocks)
        if any(sass.TENSOR_CORE.match(i.opcode) for b in loop.blocks for i in blocks[b].instructions)
    )  # fmt: skip
    always = sum(len(blocks[b].instructions) for b in loop.always)
    return always, sum(len(blocks[b].instructions) for b in loop.blocks) - always


def check(
    shape: ConvShape, config: ConvConfig, prologue: bool, dtype: torch.dtype, precision: str = "tf32"
) -> codegen.Compiled:
    """Nothing spills, and as many programs as planned fit a multiprocessor."""
    program = compiled(shape, config, prologue, dtype, precision)
    assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL)
    assert program.shared_bytes <= codegen.SHARED_LIMIT[90]
    resident = codegen.SHARED_PER_SM[90] // (program.shared_bytes + 1024)
    registers = -(-program.listing.registers // 8) * 8 * 32 * config.warps
    assert min(resident, codegen.REGISTERS // registers) >= config.persistent
    return program


@pytest.mark.parametrize(
    ("shape", "choice", "limit"),
    [
        (ConvShape(256, 56, 56, 128, 128, 3, 3, 2, 1), 0, 0.62),
        (ConvShape(256, 28, 28, 128, 128, 3, 3, 1, 1), 1, 0.62),
        (ConvShape(250, 7, 7, 512, 512, 3, 3, 1, 1), 0, 0.62),  # its tiles overhang
        (ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), 1, 1.3),  # too few filters for the normalisation of nine taps
    ],
    ids=str,
)
def test_3x3_with_prologue(shape: ConvShape, choice: int, limit: float) -> None:
    config = conv_stats_configs(shape, 2, True)[choice]
    program = check(shape, config, True, torch.bfloat16)
    always, border = main_loop(program)
    assert border > config.bm * config.bk // (32 * config.warps), "away from the border nothing is bounded"
    assert always * config.warps / 4 <= limit * config.bm * config.bn * config.bk / 2048
    assert program.listing.count("WARPGROUP.DEPBAR") == 1, "one wait for all products of a step"


@pytest.mark.parametrize(
    ("shape", "prologue", "dtype", "precision"),
    [
        (ConvShape(256, 56, 56, 256, 64), False, torch.bfloat16, "tf32"),
        (ConvShape(256, 55, 55, 256, 512, 1, 1, 2), False, torch.float16, "tf32"),
        (ConvShape(30, 32, 32, 16, 16, 3, 3, 1, 1), True, torch.bfloat16, "tf32"),
        (ConvShape(30, 28, 28, 128, 128, 3, 3, 1, 1), False, torch.bfloat16, "tf32"),
        (ConvShape(30, 28, 28, 128, 128, 3, 3, 1, 1), True, torch.float32, "tf32"),
        (ConvShape(30, 28, 28, 128, 128, 3, 3, 1, 1), True, torch.float32, "ieee"),
    ],
    ids=str,
)
def test_others(shape: ConvShape, prologue: bool, dtype: torch.dtype, precision: str) -> None:
    config = conv_stats_configs(shape, dtype.itemsize, prologue, precision)[0]
    program = check(shape, config, prologue, dtype, precision)
    if min(config.bn, shape.c) >= 64 and precision == "tf32":
        assert program.listing.count("HGMMA")
    assert program.listing.count("UTMALDG") and program.listing.count("UTMASTG")


def test_finalise() -> None:
    parts, vector, stats, moments = meta(264, 3, 2048), meta(2048), meta(5, 2048), meta(3, 2048)
    (launch,) = codegen.trace(lambda: launch_finalise(parts, vector, vector, 1e-5, stats, moments), 132)
    program = codegen.compile_launch(launch, 90)
    assert not program.listing.stack_bytes and program.listing.count("DFMA|DMUL|DADD")


def test_moments_loads_wide_and_ahead() -> None:
    c = meta(256 * 14 * 14, 1024, dtype=torch.bfloat16)
    parts = meta(moments_parts(*c.shape), 3, 1024)
    (launch,) = codegen.trace(lambda: launch_moments(c, parts), 132)
    program = codegen.compile_launch(launch, 90)
    assert not program.listing.stack_bytes
    assert program.listing.count(r"LDGSTS\..*128"), "16 bytes a thread, in flight while others are added"

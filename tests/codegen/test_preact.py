"""Machine code of the kernels of pre-activation blocks: a 1x1 behind BN and ReLU, and sums with statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, plan, preact_ops, sass
from resnet_triton.codegen import planned_for
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.conv1x1 import launch_conv1x1
from resnet_triton.kernels.conv_stats import conv_stats_configs, conv_stats_parts, launch_conv_stats
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import Normalised
from tests.codegen.test_conv_stats import main_loop

BF16, HALF, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*sizes: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def compiled_1x1(s: ConvShape, config: ConvConfig, dtype: torch.dtype, lead: bool = True) -> codegen.Compiled:
    x, w, y = meta(s.m, s.c, dtype=dtype), meta(s.k, s.c, dtype=dtype), meta(s.m, s.k, dtype=dtype)
    operands = Operands(None, None, *(meta(s.k, dtype=dtype) for _ in range(4)), 1e-5, True)
    prologue = Normalised(meta(s.c), meta(s.c)) if lead else None
    (launch,) = codegen.trace(lambda: launch_conv1x1(x, w, y, operands, config, "tf32", prologue), 132)
    return codegen.compile_launch(launch, 90)


def check(program: codegen.Compiled, config: ConvConfig) -> None:
    """Nothing spills, and as many programs as planned fit a multiprocessor."""
    assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL)
    assert program.shared_bytes <= codegen.SHARED_LIMIT[90]
    registers = -(-program.listing.registers // 8) * 8 * 32 * config.warps
    resident = min(codegen.SHARED_PER_SM[90] // (program.shared_bytes + 1024), codegen.REGISTERS // registers)
    assert resident >= config.persistent


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (ConvShape(64, 14, 14, 1024, 256), BF16),
        (ConvShape(128, 32, 32, 64, 16), HALF),
        (ConvShape(64, 28, 28, 512, 128), FP32),
    ],
    ids=str,
)
def test_a_1x1_that_normalises_what_it_loads(shape: ConvShape, dtype: torch.dtype) -> None:
    """Every configuration among which the plan chooses."""
    target = planned_for(90)
    assert target is not None
    for config in plan.own_configs(shape, dtype, "tf32", target):
        if config.kernel == "conv1x1":
            check(compiled_1x1(shape, config, dtype), config)


def test_what_normalising_a_value_costs() -> None:
    shape, config = ConvShape(64, 56, 56, 256, 64), ConvConfig("conv1x1", (1, 1, 128), 64, 64)
    with_lead, without = (main_loop(compiled_1x1(shape, config, BF16, lead))[0] for lead in (True, False))
    values = config.bm * config.bk / (32 * config.warps)
    assert preact_ops.LEAD_PER_VALUE - 1 < (with_lead - without) / values <= preact_ops.LEAD_PER_VALUE


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (ConvShape(64, 56, 56, 64, 256), BF16),
        (ConvShape(64, 14, 14, 256, 1024), HALF),
        (ConvShape(64, 28, 28, 128, 128, 3, 3, 1, 1), BF16),
    ],
    ids=str,
)
def test_a_convolution_that_adds_the_shortcut(shape: ConvShape, dtype: torch.dtype) -> None:
    s, config = shape, conv_stats_configs(shape, dtype.itemsize, True, residual=True)[0]
    x, w = meta(s.n, s.h, s.w, s.c, dtype=dtype), meta(s.k, s.r, s.s, s.c, dtype=dtype)
    y, residual = (meta(s.n, s.p, s.q, s.k, dtype=dtype) for _ in range(2))
    parts, prologue = meta(conv_stats_parts(s, config), 3, s.k), Normalised(meta(s.c), meta(s.c))
    (launch,) = codegen.trace(
        lambda: launch_conv_stats(x, w, y, parts, s, prologue, config, "tf32", residual), 132
    )  # fmt: skip
    check(codegen.compile_launch(launch, 90), config)

"""Machine code of the rolling training 3x3: weights stay, rows are fetched ahead, and instructions leave room."""

from __future__ import annotations

import re

import pytest
import torch

from resnet_triton import sass
from resnet_triton.kernels.conv_stats import conv_stats_configs
from resnet_triton.kernels.geometry import ConvShape
from tests.codegen.test_conv_stats import check, main_loop

PIVOT = 230  # instructions that only a program's first row needs


@pytest.mark.parametrize(
    ("shape", "prologue", "dtype", "row", "all_in_all"),
    [
        (ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), True, torch.bfloat16, 0.52, 0.70),
        (ConvShape(250, 55, 55, 64, 64, 3, 3, 1, 1), True, torch.float16, 0.52, 0.80),  # its tiles overhang
        (ConvShape(250, 55, 55, 64, 64, 3, 3, 1, 1), False, torch.bfloat16, 0.27, 0.55),
    ],
    ids=str,
)
def test_loop(shape: ConvShape, prologue: bool, dtype: torch.dtype, row: float, all_in_all: float) -> None:
    config = conv_stats_configs(shape, 2, prologue)[0]
    assert config.kernel == "conv_stats_rolling"
    program = check(shape, config, prologue, dtype)
    always, sometimes = main_loop(program)
    border = 3 * 39 if prologue else 0
    cycles = 9 * config.bm * config.bn * shape.c / 2048
    assert always * config.warps / 4 <= row * cycles
    assert (always + sometimes - border - PIVOT) * config.warps / 4 <= all_in_all * cycles
    blocks = sass.blocks_of(program.listing.instructions)
    (loop,) = [
        opcodes for loop in sass.loops_of(blocks)
        if any(map(sass.TENSOR_CORE.match, opcodes := [i.opcode for b in loop.blocks for i in blocks[b].instructions]))
    ]  # fmt: skip
    count = {name: sum(bool(re.match(name, opcode)) for opcode in loop) for name in ("HGMMA", "UTMALDG", "LDG", "LDSM")}
    assert count == {"HGMMA": 36, "UTMALDG": 3, "LDG": 0, "LDSM": 12}, "three boxes, weights and vectors stay"
    assert program.listing.count("UTMALDG") == 6, "one row is fetched ahead"

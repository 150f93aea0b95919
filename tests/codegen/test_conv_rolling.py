"""What only the machine code of ``conv_rolling`` shows: matrix instructions in flight, weights that stay."""

from __future__ import annotations

import re

import pytest
import torch

from resnet_triton import codegen
from resnet_triton.kernels.config import Epilogue, rolling_config
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.sass import TENSOR_CORE, blocks_of, loops_of


@pytest.mark.parametrize(("side", "c", "residual"), [(56, 64, False), (28, 128, True)])
def test_loop(side: int, c: int, residual: bool) -> None:
    shape = ConvShape(256, side, side, c, c, 3, 3, 1, 1)
    epilogue = Epilogue(bn=True, residual=residual, relu=True)
    (launch,) = codegen.conv_launches(shape, epilogue, torch.bfloat16, "tf32", rolling_config(shape), 132)
    listing = codegen.compile_launch(launch, 90).listing
    blocks = blocks_of(listing.instructions)

    def count(pattern: str, chosen: frozenset[int]) -> int:
        return sum(bool(re.match(pattern, i.opcode)) for b in chosen for i in blocks[b].instructions)

    (loop,) = (loop.blocks for loop in loops_of(blocks) if count(TENSOR_CORE.pattern, loop.blocks))
    assert count("HGMMA", loop) == 9 * c // 16
    assert count("WARPGROUP.DEPBAR", loop) <= 9, "each matrix instruction is waited for"
    assert count("UTMALDG", loop) == 3 and listing.count("UTMALDG") == 6, "one row is fetched ahead"
    assert count(r"LDG\b", loop) == 0, "weights are loaded in the loop"
    assert count("LDGSTS", loop) == 4 * residual, "a residual is not fetched ahead"
    assert listing.stack_bytes == 0

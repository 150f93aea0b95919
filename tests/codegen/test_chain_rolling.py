"""What only the machine code of ``chain_rolling`` shows: nothing spills, two programs fit, weights are loaded once."""

from __future__ import annotations

import pytest
import torch

from resnet_triton import codegen, sass
from resnet_triton.kernels.chain import ChainUnits, Unit
from resnet_triton.kernels.chain_rolling import (
    RESERVED,
    SHARED,
    chain_rolling_configs,
    chain_rolling_shared_bytes,
    launch_chain_rolling,
)
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from tests.interpreter.chains import chain

CASES = [
    pytest.param(chain(256, 56, 56, 64, 256, reduce=64), 4, id="identity"),
    pytest.param(chain(256, 56, 56, 64, 256, project=(64, 1), reduce=64), 8, id="projection"),
    pytest.param(chain(256, 56, 56, 64, 256, reduce=128, subsample=2), 8, id="end of stage 1"),
]


@pytest.mark.parametrize(("shape", "warps"), CASES)
def test_program(shape: ChainShape, warps: int) -> None:
    def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def unit(conv: ConvShape | None) -> Unit | None:
        if conv is None:
            return None
        vectors = (meta(conv.k, dtype=torch.float32) for _ in range(4))
        return Unit(meta(conv.k, conv.r, conv.s, conv.c), Operands(None, None, *vectors, eps=1e-5))

    (config,) = (c for c in chain_rolling_configs(shape, 2) if c.warps == warps)
    units = ChainUnits(unit(shape.conv), unit(shape.expand), unit(shape.project), unit(shape.reduce))
    after = shape.reduce
    arguments = (
        meta(*shape.source),
        meta(*shape.shortcut),
        meta(*shape.stored),
        meta(after.n, after.p, after.q, after.k),
    )
    (launch,) = codegen.trace(lambda: launch_chain_rolling(*arguments, units, shape, config, "ieee"), 132)
    program = codegen.compile_launch(launch, 90)
    listing, estimate = program.listing, chain_rolling_shared_bytes(config, shape, 2)
    assert listing.stack_bytes == 0 and listing.count(sass.LOCAL) == 0
    assert program.shared_bytes <= estimate
    assert 8 // warps * (estimate + RESERVED) <= SHARED
    assert listing.count("WARPGROUP.DEPBAR") <= 16, "each matrix instruction is waited for"
    # 9 weights before the loop, 3 boxes a row; for a step the weights and, per step or per row, the shortcut
    weights = 2 if shape.project is None else 3
    ahead = config.stages  # steps loaded before the pointwise loop, and in it
    shortcut = ahead if shape.project is None else 1
    assert listing.count("UTMALDG") == 9 + 3 + ahead * weights + shortcut

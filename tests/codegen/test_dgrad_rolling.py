"""Machine code of ``dgrad_rolling``: nothing spills, weights stay, rows are fetched ahead."""

from __future__ import annotations

import pytest
import torch

from resnet_triton import codegen, sass
from resnet_triton.kernels.geometry import ConvShape
from tests.codegen.test_dgrad import launches


@pytest.mark.parametrize(
    ("dtype", "mask", "residual", "pressure"),
    [(torch.bfloat16, "affine", 0, 0.67), (torch.float16, "affine", 0, 0.67), (torch.bfloat16, "x", 0, 0.6)],
    ids=str,
)
def test_program(dtype: torch.dtype, mask: str, residual: int, pressure: float) -> None:
    shape = ConvShape(250, 55, 55, 64, 64, 3, 3, 1, 1)  # tiles overhang
    config, (launch,) = launches(shape, dtype, 0, False, mask, residual)
    assert config.kernel == "dgrad_rolling"
    program = codegen.compile_launch(launch, 90)
    assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL)
    assert 2 * (program.shared_bytes + 1024) <= codegen.SHARED_PER_SM[90], "two programs share a multiprocessor"
    blocks = sass.blocks_of(program.listing.instructions)
    bodies = [[i for b in loop.blocks for i in blocks[b].instructions] for loop in sass.loops_of(blocks)]
    (loop,) = [body for body in bodies if any(sass.TENSOR_CORE.match(i.opcode) for i in body)]
    cycles = 9 * config.bm * config.bn * shape.k / codegen.MACS_PER_CYCLE[90]
    assert len(loop) * config.warps / 4 <= pressure * cycles, "of a whole row, the sums included"
    assert sum(i.opcode.startswith("HGMMA") for i in loop) == 36
    assert sum(i.opcode.startswith("UTMALDG") for i in loop) == 3 and program.listing.count("UTMALDG") == 6

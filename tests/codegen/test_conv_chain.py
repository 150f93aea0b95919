"""What only the machine code of ``conv_chain`` shows: nothing spills, matrix instructions in flight, shared memory."""

from __future__ import annotations

import pytest
import torch

from resnet_triton import codegen, sass
from resnet_triton.kernels.chain import ChainUnits, Unit
from resnet_triton.kernels.conv_chain import (
    SHARED_LIMIT,
    conv_chain_configs,
    conv_chain_shared_bytes,
    filters_left,
    launch_conv_chain,
)
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from tests.interpreter.chains import chain

CASES = [
    # shape, pixels of the tile, warps, whether filters are left of the pixels behind the 3x3
    pytest.param(chain(256, 56, 56, 64, 256, reduce=64), 128, 4, True, id="stage 1"),
    pytest.param(chain(256, 28, 28, 128, 512, reduce=256, subsample=2), 128, 8, False, id="end of stage 2"),
    pytest.param(chain(256, 14, 14, 256, 1024, reduce=256), 128, 8, False, id="stage 3"),
    pytest.param(chain(256, 56, 56, 128, 512, stride=2, project=(256, 1), reduce=128), 128, 8, False, id="projection"),
    pytest.param(chain(256, 14, 14, 256, 1024, conv=False, reduce=256), 64, 4, True, id="behind the 3x3"),
]


def compiled(shape: ChainShape, bm: int, warps: int, left: bool) -> tuple[codegen.Compiled, int]:
    """The program, and the estimate of its shared memory."""

    def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def unit(conv: ConvShape | None) -> Unit | None:
        if conv is None:
            return None
        vectors = (meta(conv.k, dtype=torch.float32) for _ in range(4))
        return Unit(meta(conv.k, conv.r, conv.s, conv.c), Operands(None, None, *vectors, eps=1e-5))

    (config,) = (
        c for c in conv_chain_configs(shape, 2) if (c.bm, c.warps, filters_left(c)) == (bm, warps, left)
    )  # fmt: skip
    units = ChainUnits(unit(shape.conv), unit(shape.expand), unit(shape.project), unit(shape.reduce))
    after = shape.reduce
    arguments = (
        meta(*shape.source),
        meta(*shape.shortcut),
        meta(*shape.stored),
        meta(after.n, after.p, after.q, after.k),
    )
    (launch,) = codegen.trace(lambda: launch_conv_chain(*arguments, units, shape, config, "ieee"), 132)
    return codegen.compile_launch(launch, 90), conv_chain_shared_bytes(config, shape, 2)


@pytest.mark.parametrize(("shape", "bm", "warps", "left"), CASES)
def test_program(shape: ChainShape, bm: int, warps: int, left: bool) -> None:
    program, estimate = compiled(shape, bm, warps, left)
    listing = program.listing
    assert listing.stack_bytes == 0 and listing.count(sass.LOCAL) == 0
    assert listing.count("HGMMA") >= 12 and listing.count("HMMA") == 0
    assert listing.count("WARPGROUP.DEPBAR") <= 8, "each matrix instruction is waited for"
    assert program.shared_bytes <= estimate <= SHARED_LIMIT
    # loaded ahead: before each loop and in it
    loads = 2 * ((2 if shape.conv else 0) + 3) + (1 if shape.project or not shape.conv else 0)
    assert listing.count("UTMALDG") >= loads

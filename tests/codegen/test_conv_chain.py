"""What only the machine code of ``conv_chain`` shows: nothing spills, matrix instructions in flight, shared memory."""

from __future__ import annotations

import pytest
import torch

from resnet_triton import codegen, sass
from resnet_triton.issue import count_issued
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.conv_chain import (
    SHARED_LIMIT,
    conv_chain_configs,
    conv_chain_shared_bytes,
    filters_left,
)
from resnet_triton.kernels.geometry import ChainShape
from resnet_triton.nests import nest_of
from tests.interpreter.chains import chain

CASES = [
    # shape, pixels of the tile, warps, whether filters are left of the pixels behind the 3x3
    pytest.param(chain(256, 56, 56, 64, 256, reduce=64), 128, 4, True, id="stage 1"),
    pytest.param(chain(256, 28, 28, 128, 512, reduce=256, subsample=2), 128, 8, False, id="end of stage 2"),
    pytest.param(chain(256, 14, 14, 256, 1024, reduce=256), 128, 8, False, id="stage 3"),
    pytest.param(chain(256, 56, 56, 128, 512, stride=2, project=(256, 1), reduce=128), 128, 8, False, id="projection"),
    pytest.param(chain(256, 14, 14, 256, 1024, conv=False, reduce=256), 64, 4, True, id="behind the 3x3"),
    pytest.param(
        chain(256, 56, 56, 64, 256, project=(64, 1), reduce=64, first=True), 128, 4, False, id="from the block's start"
    ),
]


def compiled(shape: ChainShape, config: ConvConfig) -> codegen.Compiled:
    """The program for sm_90 in bf16."""
    (launch,) = codegen.chain_launches(shape, torch.bfloat16, "ieee", config, 132)
    return codegen.compile_launch(launch, 90)


def test_the_first_convolution_is_computed_once_a_tap() -> None:
    """Not by two groups of warps at once, and its normalisation fits into the time of the products."""
    shape = chain(256, 56, 56, 64, 256, project=(64, 1), reduce=64, first=True)
    configs = conv_chain_configs(shape, 2)
    assert len(configs) == 4
    for config in configs:
        program = compiled(shape, config)
        assert program.repeats == 1 and program.listing.stack_bytes == 0
        counted = count_issued(program.listing, nest_of(shape, config), program.warps)
        taps = counted.loops[0]
        cycles = taps.macs / 2048  # of a multiprocessor's tensor cores
        assert taps.times == 9 + 1 and taps.step * program.warps / 4 <= cycles


@pytest.mark.parametrize(("shape", "bm", "warps", "left"), CASES)
def test_program(shape: ChainShape, bm: int, warps: int, left: bool) -> None:
    (config,) = (c for c in conv_chain_configs(shape, 2) if (c.bm, c.warps, filters_left(c)) == (bm, warps, left))
    program = compiled(shape, config)
    listing = program.listing
    assert listing.stack_bytes == 0 and listing.count(sass.LOCAL) == 0
    assert listing.count("HGMMA") >= 12 and listing.count("HMMA") == 0
    assert listing.count("WARPGROUP.DEPBAR") <= 8, "each matrix instruction is waited for"
    assert program.shared_bytes <= conv_chain_shared_bytes(config, shape, 2) <= SHARED_LIMIT
    # loaded ahead: before each loop and in it
    loads = 2 * ((2 if shape.conv else 0) + 3) + (1 if shape.project or not shape.conv else 0) + bool(shape.first)
    assert listing.count("UTMALDG") >= loads

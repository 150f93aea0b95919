"""Machine code of ``gram_dgrad``: no spills, and few instructions beside the products of the long reduction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.gram_dgrad import gram_dgrad_configs, gram_dgrad_parts, launch_gram_dgrad
from resnet_triton.kernels.prologue import Normalised


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def compiled(shape: ConvShape, choice: int) -> codegen.Compiled:
    m, c, k = shape.m, shape.c, shape.k
    identity = shape.stride == 1

    def half(*sizes: int) -> Tensor:
        return meta(*sizes, dtype=torch.bfloat16)

    config = gram_dgrad_configs(shape, 2)[choice]
    parts = meta(gram_dgrad_parts(m, c, config, 132), 2, c) if identity else None
    prologue = Normalised(meta(c), meta(c)) if identity else None
    (launch,) = codegen.trace(
        lambda: launch_gram_dgrad(
            half(m, k), None, half(k, c), half(shape.n, shape.h, shape.w, c), prologue, half(c, c), meta(c), meta(c),
            half(m, c), parts, identity, shape.stride, config, "tf32",
        ),
        132,
    )  # fmt: skip
    return codegen.compile_launch(launch, 90)


@pytest.mark.parametrize(
    ("shape", "choice", "resident"),
    [
        pytest.param(ConvShape(256, 56, 56, 64, 256), 0, 2, id="64 channels"),
        pytest.param(ConvShape(256, 28, 28, 128, 512), 0, 1, id="128 channels"),
        pytest.param(ConvShape(256, 14, 14, 256, 1024), 0, 2, id="256 channels in chunks"),
        pytest.param(ConvShape(256, 56, 56, 256, 512, stride=2), 0, 2, id="projection"),
    ],
)
def test_program(shape: ConvShape, choice: int, resident: int) -> None:
    program = compiled(shape, choice)
    listing = program.listing
    assert not listing.stack_bytes and not listing.count(sass.LOCAL)
    assert listing.count("HGMMA") and listing.count("UTMALDG") and listing.count("UTMASTG")
    assert resident * (program.shared_bytes + 1024) <= codegen.SHARED_PER_SM[90]
    assert resident * listing.registers * 32 * program.warps <= codegen.REGISTERS

"""Machine code of ``expand``: no spills, and as many programs on a multiprocessor as its latency needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.kernels.expand import Following, Project, expand_configs, launch_expand
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import Normalised


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def compiled(shape: ConvShape, project: ConvShape | None, next_filters: int) -> codegen.Compiled:
    n, p, c, k = shape.n, shape.p, shape.c, shape.k

    def bn(channels: int) -> Normalised:
        return Normalised(meta(channels), meta(channels))

    def half(*sizes: int) -> Tensor:
        return meta(*sizes, dtype=torch.bfloat16)

    shortcut: Tensor | Project = half(n, p, p, k)
    if project:
        x = half(n, project.h, project.h, project.c)
        shortcut = Project(x, half(k, project.c), meta(k), meta(k), project.stride)
    config = expand_configs(shape, 2, project, next_filters)[0]
    f = next_filters
    following = Following(half(f, k), half(n, p, p, f), meta(264, 3, f)) if f else None
    y = half(n, p, p, k)
    (launch,) = codegen.trace(
        lambda: launch_expand(half(n, p, p, c), bn(c), half(k, c), bn(k), shortcut, y, config, "tf32", following), 132
    )
    return codegen.compile_launch(launch, 90)


@pytest.mark.parametrize(
    ("shape", "project", "next_filters", "resident"),
    [
        pytest.param(ConvShape(256, 56, 56, 64, 256), None, 0, 3, id="64 channels"),
        pytest.param(ConvShape(256, 28, 28, 128, 512), None, 0, 2, id="128 channels"),
        pytest.param(ConvShape(256, 7, 7, 512, 2048), None, 0, 1, id="512 channels in chunks"),
        pytest.param(
            ConvShape(256, 28, 28, 128, 512), ConvShape(256, 56, 56, 256, 512, stride=2), 0, 1, id="projection"
        ),
        pytest.param(ConvShape(256, 28, 28, 128, 512), None, 128, 1, id="and the next 1x1"),
    ],
)
def test_program(shape: ConvShape, project: ConvShape | None, next_filters: int, resident: int) -> None:
    program = compiled(shape, project, next_filters)
    listing = program.listing
    assert not listing.stack_bytes and not listing.count(sass.LOCAL)
    assert listing.count("HGMMA") and listing.count("UTMALDG") and listing.count("UTMASTG")
    assert resident * (program.shared_bytes + 1024) <= codegen.SHARED_PER_SM[90]
    assert resident * listing.registers * 32 * program.warps <= codegen.REGISTERS

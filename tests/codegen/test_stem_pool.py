"""Machine code of the fused stem beyond the shipped cases: other filters and vectors; products stay in flight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.stem import stem_cells
from resnet_triton.kernels.stem_pool import TILES, WINDOW, launch_stem_pool


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def compiled(tile: tuple[int, int], k: int, bn: bool, dtype: torch.dtype, size: int) -> codegen.Compiled:
    hs, ws = stem_cells(size, size, True)
    pooled = (hs - 2) // 2
    vectors = [meta(k, dtype=dtype) for _ in range(4)] if bn else [None] * 4
    operands = Operands(None, None if bn else meta(k), *vectors, 1e-5, True)
    config = ConvConfig("stem_pool", (tile[0], 32, tile[1]), 64, WINDOW, 4, 2)
    xs, w, y = meta(5, hs, ws, 16, dtype=dtype), meta(k, 4, 4, 16, dtype=dtype), meta(5, pooled, pooled, k, dtype=dtype)
    (launch,) = codegen.trace(lambda: launch_stem_pool(xs, w, y, operands, config, "tf32"), 132)
    return codegen.compile_launch(launch, 90)


@pytest.mark.parametrize(
    ("tile", "k", "bn", "dtype", "size"),
    [
        (TILES[0], 64, False, torch.bfloat16, 225),
        (TILES[1], 24, True, torch.bfloat16, 97),
        (TILES[2], 32, True, torch.float16, 224),
    ],
    ids=str,
)
def test_program(tile: tuple[int, int], k: int, bn: bool, dtype: torch.dtype, size: int) -> None:
    program = compiled(tile, k, bn, dtype, size)
    assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL)
    products = program.listing.count("HGMMA")
    assert products == 4 * 16, "four rows of cells, four accumulators, 64 channels in steps of 16"
    # the four steps of a product are issued together; a compiler that finds their registers in use waits behind each
    assert program.listing.count("WARPGROUP.DEPBAR") <= products // 4
    assert program.listing.count("UTMALDG") >= 4 + 4, "weights once, and a box for each row of cells"
    assert 2 * (program.shared_bytes + 1024) <= codegen.SHARED_PER_SM[90], "two programs hide each other's waits"

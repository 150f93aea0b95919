"""Machine code of the training stem: nothing spills, and products come from tensor cores without copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.kernels import bn_relu_pool as pool
from resnet_triton.kernels import stem_train
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.stem import stem_cells

SHAPE = ConvShape(256, 224, 224, 3, 64, 7, 7, 2, 3)
BF16, FP32 = torch.bfloat16, torch.float32
STATS, WGRAD = stem_train.stem_stats_configs(SHAPE, 2), stem_train.stem_wgrad_configs(SHAPE, 2)


def meta(*sizes: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def operands(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cells and the convolution's output."""
    s = SHAPE
    return meta(s.n, *stem_cells(s.h, s.w, True), 16, dtype=dtype), meta(s.n, s.p, s.q, s.k, dtype=dtype)


def compiled(launches: list[codegen.Launch], name: str) -> codegen.Compiled:
    """The last launch of a kernel; nothing spills, and no warps compute the same."""
    launch = [launch for launch in launches if launch.kernel.__name__ == name][-1]
    program = codegen.compile_launch(launch, 90)
    assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL)
    assert program.repeats == 1
    return program


def conv_stats(config: ConvConfig, dtype: torch.dtype, precision: str) -> codegen.Compiled:
    (xs, c), w = operands(dtype), meta(SHAPE.k, 4, 4, 16, dtype=dtype)
    parts = meta(stem_train.stem_stats_parts(SHAPE, config), 3, SHAPE.k)
    return compiled(
        codegen.trace(lambda: stem_train.launch_stem_conv_stats(xs, w, c, parts, config, precision), 132), "conv_stats"
    )


def wgrad(config: ConvConfig, dtype: torch.dtype, precision: str) -> codegen.Compiled:
    (xs, dc), dw = operands(dtype), meta(SHAPE.k, 3, 7, 7)
    return compiled(codegen.trace(lambda: stem_train.launch_stem_wgrad(dc, xs, dw, config, precision), 132), "wgrad")


@pytest.mark.parametrize("config", STATS, ids=str)
def test_conv_stats(config: ConvConfig) -> None:
    program = conv_stats(config, BF16, "tf32")
    assert program.listing.count("HGMMA") == config.bk // 16, "the steps of a product, which is in a loop over taps"
    resident = max(1, config.persistent)
    assert resident * (program.shared_bytes + 1024) <= codegen.SHARED_PER_SM[90]
    assert resident * program.listing.registers * 32 * config.warps <= 65536


@pytest.mark.parametrize("config", WGRAD, ids=str)
def test_wgrad(config: ConvConfig) -> None:
    program = wgrad(config, BF16, "tf32")
    products = 4 * stem_train.WINDOW // config.bk * config.bm // 16
    assert program.listing.count("HGMMA") == products, "all taps, the pixels of a box in steps of 16"
    assert program.shared_bytes <= 227 << 10


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_fp32_does_not_spill(precision: str) -> None:
    conv_stats(stem_train.stem_stats_config(SHAPE, 4), FP32, precision)
    wgrad(stem_train.stem_wgrad_config(SHAPE, 4), FP32, precision)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, FP32], ids=str)
def test_pool(dtype: torch.dtype) -> None:
    (_, c), y, vector = operands(dtype), meta(256, 56, 56, 64, dtype=dtype), meta(64)
    forward = compiled(codegen.trace(lambda: pool.launch_bn_relu_pool(c, vector, vector, y), 132), "bn_relu_pool")
    parts = meta(pool.bn_relu_pool_parts(256, 112, 112), 2, 64)
    backward = compiled(
        codegen.trace(lambda: pool.launch_bn_relu_pool_backward(y, c, vector, vector, c, parts), 132),
        "bn_relu_pool_backward",
    )
    wide = "LDG.E.128" if dtype != FP32 else "LDG.E"
    assert forward.listing.count(wide) >= 18, "nine pixels, eight channels of each in one load"
    assert backward.listing.count("LDG") <= 2 * (14 + 3) + 2, "the channels of a pixel in one load"

"""Machine code of weight gradients and Gram matrices on sm_90: every configuration of a few layers of ResNet-50."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import BNBackward, Normalised
from resnet_triton.kernels.wgrad import gram_configs, launch_gram, launch_wgrad, wgrad_configs

SMALL, LARGE = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), ConvShape(256, 28, 28, 128, 128, 3, 3, 1, 1)
STRIDED, CIFAR = ConvShape(256, 56, 56, 128, 128, 3, 3, 2, 1), ConvShape(128, 32, 32, 16, 16, 3, 3, 1, 1)
WIDE, OVERHANG = ConvShape(128, 16, 16, 32, 32, 3, 3, 1, 1), ConvShape(8, 57, 57, 64, 64, 3, 3, 1, 1)
EXPAND, REDUCE = ConvShape(256, 28, 28, 128, 512), ConvShape(256, 56, 56, 256, 64)


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def compiled(
    s: ConvShape, config: ConvConfig, kind: str, normalised: bool, summed: bool, dtype: torch.dtype = torch.bfloat16
) -> codegen.Compiled:
    prologue = Normalised(meta(s.c), meta(s.c)) if normalised else None
    x = meta(s.n, s.h, s.w, s.c, dtype=dtype)
    sums = meta(s.k) if summed else None

    def launch() -> None:
        if kind == "gram":
            launch_gram(x, meta(s.c, s.c), meta(s.c), s.stride, prologue, config, "tf32")
            return
        dy = meta(s.n, s.p, s.q, s.k, dtype=dtype)
        backward = {"none": None, "mask": dy, "bn": BNBackward(dy, meta(3, s.k))}[kind]
        launch_wgrad(dy, x, meta(s.k, s.r, s.s, s.c), sums, s, backward, prologue, config, "tf32")

    first, *_ = codegen.trace(launch, 132)
    return codegen.compile_launch(first, 90)


def loop_pressure(program: codegen.Compiled) -> float:
    """Issue cycles over tensor-core cycles of the loop over the boxes."""
    blocks = sass.blocks_of(program.listing.instructions)
    found = []
    for loop in sass.loops_of(blocks):
        opcodes = [i.opcode for b in loop.blocks for i in blocks[b].instructions]
        sizes = [op.split(".")[1].split("x") for op in opcodes if op.startswith("HGMMA")]
        macs = sum(int(m) * int(n) * int(k) for m, n, k in sizes) * program.warps / 4
        if macs:
            found.append((macs, len(opcodes) * program.warps / 4))
    macs, issued = max(found)
    return issued / (macs / codegen.MACS_PER_CYCLE[90])


@pytest.mark.parametrize(
    ("shape", "kind", "normalised", "summed", "most"),
    [
        (SMALL, "none", False, False, 0.5),
        (SMALL, "none", True, False, 0.6),
        (LARGE, "none", False, False, 0.4),
        (LARGE, "none", True, False, 0.6),
        (LARGE, "bn", True, True, None),
        (STRIDED, "none", True, False, 0.6),
        (STRIDED, "mask", True, False, None),
        (CIFAR, "none", True, False, None),
        (WIDE, "mask", True, True, None),
        (EXPAND, "mask", True, True, None),
        (REDUCE, "bn", False, False, None),
    ],
    ids=str,
)
def test_programs(shape: ConvShape, kind: str, normalised: bool, summed: bool, most: float | None) -> None:
    """Nothing spills and all products are warp groups' that do not wait for one another; 1x1 are bound by memory."""
    for i, config in enumerate(wgrad_configs(shape, 2, normalised, kind != "none")):
        program = compiled(shape, config, kind, normalised, summed)
        listing = program.listing
        assert not listing.stack_bytes and not listing.count(sass.LOCAL), config
        assert program.shared_bytes <= codegen.SHARED_LIMIT[90], config
        products = listing.count("HGMMA")
        waits = [
            j for j in listing.instructions if j.opcode.startswith("WARPGROUP.DEPBAR") and j.operands.endswith("0x0")
        ]
        assert products and len(waits) <= products // 4, config
        assert listing.count("UTMALDG") and program.repeats == 1
        if i == 0 and most is not None:
            assert loop_pressure(program) <= most


def test_overhanging_rows() -> None:
    """Pixels outside of the image are masked one by one where a row of boxes reaches beyond it."""
    config = wgrad_configs(OVERHANG, 2, True)[0]
    program = compiled(OVERHANG, config, "none", True, False)
    assert config.kernel == "wgrad_rolling" and OVERHANG.w % config.box[2]
    assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL)


@pytest.mark.parametrize(("c", "normalised", "stride"), [(64, True, 1), (256, True, 1), (256, False, 2)])
def test_gram_programs(c: int, normalised: bool, stride: int) -> None:
    shape = ConvShape(256, 28, 28, c, c, stride=stride)
    for config in gram_configs(shape, 2):
        program = compiled(shape, config, "gram", normalised, True)
        assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL), config
        assert program.listing.count("HGMMA")


@pytest.mark.parametrize(("shape", "kind"), [(SMALL, "none"), (REDUCE, "bn")], ids=str)
def test_fp32_programs(shape: ConvShape, kind: str) -> None:
    for config in wgrad_configs(shape, 4, True, kind != "none"):
        program = compiled(shape, config, kind, True, True, torch.float32)
        assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL), config
        assert program.shared_bytes <= codegen.SHARED_LIMIT[90], config
        assert program.listing.count(sass.TENSOR_CORE)

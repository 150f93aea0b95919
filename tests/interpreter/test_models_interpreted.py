"""Whole networks on this package's kernels, in the interpreter: logits, and that what ``explain`` lists really ran."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet as tv
from torchvision.models._utils import IntermediateLayerGetter

from resnet_triton import convert, explain, fold, use_backend
from resnet_triton.explain import Row
from tests.comparers import GRADIENT, no_worse_than
from tests.networks import basics, bottlenecks, images, randomise


def launches(row: Row) -> list[str]:
    """The kernels behind one row of a plan, by the names under which they are counted."""
    tile = row.config.split()[0] if row.config else ""
    if row.op.startswith("stem+pool"):
        return ["space_to_depth", "pack_stem_weight", "stem_pool"]
    if row.op.startswith("stem"):  # a TMA box has three sides
        return ["space_to_depth", "pack_stem_weight", *(["conv_tma"] * 2 if "x" in tile else ["conv_pointer"])]
    if row.op.startswith("head"):  # of one pixel: the average came before
        return ["head"]
    return [row.realisation]


def run(model: nn.Module, x: Tensor, counts: Counter[str]) -> Tensor:
    """The output on kernels alone, launched as ``explain`` lists them."""
    counts.clear()
    with torch.no_grad(), use_backend("triton"):
        out = model(x)
        ran = Counter(counts)
        plan = explain(model, x.shape)
    planned = Counter(kernel for row in plan.rows for kernel in launches(row))
    if "head" in planned:  # a matrix product: a row of logits of no multiple of 16 bytes has no tensor map
        described = out.shape[1] * out.element_size() % 16 == 0
        planned["conv1x1" if described else "conv_pointer"] += planned.pop("head")
    assert ran == planned and not planned.keys() & {"cudnn", "onednn", "aten"}
    return out


def check(model: nn.Module, x: Tensor, counts: Counter[str], make=convert) -> Counter[str]:
    """The logits of ``make(model)`` are no worse than eager's; returns the launches."""
    eager = copy.deepcopy(model).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, exact = eager(x), eager.double()(x.double())
    assert exact.std() > 1e-3
    no_worse_than(run(make(model), x, counts), expected, exact)
    return counts


def test_bottlenecks_in_fp32(counts) -> None:
    ran = check(
        randomise(tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], num_classes=12)), images(1, dtype=torch.float32), counts
    )
    once = ("space_to_depth", "pack_stem_weight", "global_avg_pool")
    assert [ran.pop(kernel) for kernel in once] == [1] * 3
    assert ran.pop("max_pool") == 1 + 3, "and the pixels that the projections of three stages read"
    assert ran.keys() == {"conv_tma", "conv1x1"}
    assert ran.total() == 2 + 16 + 1, "the stem's two phases, each convolution of a block, and the head"


def test_bottlenecks_in_fp16_on_chains(counts) -> None:
    model = tv.ResNet(tv.Bottleneck, [2, 2, 2, 1], num_classes=16)
    ran = check(randomise(model).half(), images(1).half(), counts)
    assert ran["stem_pool"] == 1 and ran["conv_chain"] + ran["chain_rolling"] == 6, "every block of three stages"
    assert ran["conv_tma"] + ran["conv1x1"] < 15, "the fourth stage, and what does not fit a chain"


def test_basic_blocks_in_fp16(counts) -> None:
    model = tv.ResNet(tv.BasicBlock, [1, 2, 1, 1], num_classes=10)
    ran = check(randomise(model).half(), images(1).half(), counts)
    assert ran["conv_pointer"] == 1, "the head, of ten classes"
    assert ran["conv_tma"] == 13 and ran["stem_pool"] == 1


def test_a_folded_stage_of_odd_sizes(counts) -> None:
    x = torch.randn(2, 64, 9, 7)
    ran = check(basics((1, 2, 1, 1), torch.float32).layer2, x, counts, fold)
    assert ran["conv_pointer"] == 2, "strides of two on odd rows"
    assert ran["conv_tma"] == 3


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_a_getter_with_taps(dtype: torch.dtype, counts) -> None:
    taps = {"relu": "stem", "layer1": "out"}
    getter = IntermediateLayerGetter(bottlenecks(dtype=torch.float32).to(dtype), taps)
    x = images(1).to(dtype)
    with torch.no_grad():
        eager = copy.deepcopy(getter).to(memory_format=torch.channels_last)
        expected, exact = eager(x), eager.double()(x.double())
    with torch.no_grad(), use_backend("triton"):
        out = convert(getter)(x)
    assert list(out) == ["stem", "out"]
    assert counts["conv_chain"] + counts["chain_rolling"] == 2, "a kernel for each block of the stage"
    assert counts.total() == 4 + 2, "the stem, tapped before the pooling, is not one kernel with it"
    for name, value in out.items():
        no_worse_than(value, expected[name], exact[name])


def test_gradients_of_a_stage(counts) -> None:
    """The forward runs on kernels and what it keeps for the backward is right."""
    stage = bottlenecks(dtype=torch.float32).layer1
    x = torch.randn(1, 64, 8, 8)

    def gradients(m: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        m(x).square().sum().backward()
        return [x.grad, *(p.grad for p in m.parameters())]

    exact = gradients(copy.deepcopy(stage).double(), x.double())
    eager = gradients(copy.deepcopy(stage).to(memory_format=torch.channels_last), x)
    with use_backend("triton"):
        ours = gradients(convert(stage), x)
    assert counts["conv1x1"] + counts["conv_tma"] >= 7
    for a, b, c in zip(ours, eager, exact, strict=True):
        no_worse_than(a, b, c, GRADIENT)


def test_a_hooked_block_runs_on_pytorch_and_the_others_on_kernels(counts) -> None:
    model, x = bottlenecks(dtype=torch.float32).layer1, torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        eager = copy.deepcopy(model).to(memory_format=torch.channels_last)
        expected, exact = eager(x), eager.double()(x.double())
    stage, seen = convert(model), []
    stage[1].conv2.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    with torch.no_grad(), use_backend("triton"):
        no_worse_than(stage(x), expected, exact)
    assert counts["conv1x1"] + counts["conv_tma"] == counts.total() == 4
    assert seen == [(1, 64, 8, 8)]


def test_a_block_with_attention_runs_its_convolutions_on_kernels(counts) -> None:
    timm = pytest.importorskip("timm")
    stage = randomise(timm.create_model("seresnet18").layer2)  # a projection, and attention before the addition
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        expected, exact = stage(x), copy.deepcopy(stage).double()(x.double())
    with torch.no_grad(), use_backend("triton"):
        no_worse_than(convert(stage)(x), expected, exact)
    assert counts["conv1x1"] + counts["conv_tma"] + counts["conv_pointer"] == 5 and counts["add_relu"] == 2

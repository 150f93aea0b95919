"""The paper's shortcuts, plain blocks and strides on the kernels, in the interpreter: inference and training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnet_triton import convert, use_backend
from resnet_triton.models import BasicBlock, Bottleneck, PlainBlock, ZeroPad
from resnet_triton.models.blocks import make_shortcut
from tests.comparers import identical, no_worse_than
from tests.interpreter.test_training_interpreted import check, inputs, lively
from tests.networks import randomise

BLOCKS = {
    "zeros behind": lambda: BasicBlock(16, 32, 2, ZeroPad(16, 32, 2)),
    "zeros on both sides": lambda: BasicBlock(16, 32, 2, ZeroPad(16, 32, 2, both=True)),
    "plain": lambda: PlainBlock(16, 32, 2),
    "first 1x1 strides": lambda: Bottleneck(32, 16, 2, make_shortcut("B", 32, 64, 2), stride_in_1x1=True),
    "first 1x1 strides, zeros": lambda: Bottleneck(32, 16, 2, ZeroPad(32, 64, 2), stride_in_1x1=True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_training(name: str, counts) -> None:
    """Its convolutions run on kernels, forward and backward."""
    torch.manual_seed(2)
    block = lively(BLOCKS[name]())
    ran = check(block, *inputs(block, torch.bfloat16), "gram", counts)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in block.modules())
    grams = ran.get("gram_stats", 0)
    assert ran["conv_stats"] == convolutions - grams and ran["wgrad"] == convolutions + grams
    assert (grams > 0) == ("1x1" in name)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_in_inference(name: str, counts) -> None:
    torch.manual_seed(2)
    block = randomise(BLOCKS[name]()).half()
    x = torch.randn(2, block.conv1.in_channels, 7, 6).relu().half()  # odd: the last row and column count
    eager = copy.deepcopy(block).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, exact = eager(x), copy.deepcopy(eager).double()(x.double())
        counts.clear()
        with use_backend("triton"):
            out, again = convert(block)(x), convert(block)(x)
    identical(out, again)
    no_worse_than(out, expected, exact)
    assert counts.total() >= 4 and not counts.keys() & {"cudnn", "aten"}


def test_a_stage_stores_what_the_next_one_reads(counts) -> None:
    """Two blocks, the second of which strides first: bit by bit what they give one by one."""
    torch.manual_seed(2)
    first = Bottleneck(32, 8, 1)
    second = Bottleneck(32, 16, 2, make_shortcut("B", 32, 64, 2), stride_in_1x1=True)
    stage = randomise(nn.Sequential(first, second)).bfloat16()
    x = torch.randn(1, 32, 7, 5).relu().bfloat16()
    converted = convert(stage)
    with torch.no_grad(), use_backend("triton", chains=False):
        together = converted(x)
        single = converted[1](converted[0](x))
    no_worse_than(together, single, copy.deepcopy(stage).double()(x.double()))

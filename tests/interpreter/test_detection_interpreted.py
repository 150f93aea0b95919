"""The head of a C4 detector on this package's kernels, in the interpreter: few channels, regions of 4x4."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from resnet_triton import convert, explain, unconvert, use_backend
from resnet_triton.detection import Conv5Head
from resnet_triton.models import Bottleneck
from tests.comparers import GRADIENT, no_worse_than
from tests.networks import randomise


def head() -> Conv5Head:
    norm = {"norm_layer": FrozenBatchNorm2d}
    project = nn.Sequential(nn.Conv2d(32, 64, 1, 2, bias=False), FrozenBatchNorm2d(64))
    blocks = nn.Sequential(Bottleneck(32, 16, 2, project, **norm), Bottleneck(64, 16, **norm))
    return convert(randomise(Conv5Head(blocks)), inplace=True)


def test_detections_of_a_head_on_kernels(counts) -> None:
    ours = head()
    x = torch.randn(5, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = unconvert(ours)
        expected, exact = plain(x), plain.double()(x.double())
        counts.clear()
        with use_backend("triton"):
            out = ours(x)
            plan = explain(ours, x.shape)
    assert out.shape == (5, 64)
    no_worse_than(out, expected, exact)
    assert set(counts) == {row.realisation for row in plan.rows}, "kernels alone, those that explain lists"
    assert counts["conv1x1"] + counts["conv_tma"] == 7, "each convolution of two blocks, the first one's by two"


def test_gradients_of_a_head_on_kernels() -> None:
    """Statistics are constants in training too: forward on kernels, gradients of weights and features."""
    ours = head().train()
    x = torch.randn(3, 32, 4, 4)
    plain = unconvert(ours)
    exact = copy.deepcopy(plain).double()
    grads = []
    for model, features in ((ours, x), (plain, x), (exact, x.double())):
        features = features.detach().clone().requires_grad_()
        with use_backend("triton" if model is ours else "auto"):
            model(features).square().sum().backward()
        grads.append([features.grad, *(p.grad for p in model.parameters())])
    for mine, eager, reference in zip(*grads, strict=True):
        no_worse_than(mine, eager, reference, GRADIENT)

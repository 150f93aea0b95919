"""Pre-activation networks: their sizes, their meaning, and that they run the same converted."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_triton import models
from resnet_triton.models import PreActBasicBlock, PreActBottleneck, PreActCifarResNet, PreActResNet

SIZES = {  # PAPER's table: parameters, multiply-adds
    110: (1_727_962, 252_887_680),
    164: (1_703_258, 244_500_992),
    1001: (10_327_706, 1_487_849_984),
}


def multiply_adds(model: nn.Module, size: int) -> int:
    """Of convolutions and the classifier; counted on shapes, without the BN, which have none."""
    total = []
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.register_forward_hook(lambda m, _, out: total.append(m.weight.numel() * out[0, 0].numel()))
    for m in model.modules():
        for name, child in m.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(m, name, nn.Identity())
    model(torch.empty(1, 3, size, size, device="meta"))
    return sum(total)


@pytest.mark.parametrize("depth", SIZES)
def test_cifar_networks_have_the_papers_sizes(depth):
    model = PreActCifarResNet(depth).to("meta")
    assert sum(p.numel() for p in model.parameters()) == SIZES[depth][0]
    assert multiply_adds(model, 32) == SIZES[depth][1]


@pytest.mark.parametrize(("stride_in_1x1", "macs"), [(False, 15_007_481_856), (True, 14_776_270_848)])
def test_resnet_200_has_the_papers_sizes(stride_in_1x1, macs):
    with torch.device("meta"), patch("resnet_triton.models.preact.initialise"):
        model = PreActResNet(PreActBottleneck, (3, 24, 36, 3), stride_in_1x1=stride_in_1x1)
    assert sum(p.numel() for p in model.parameters()) == 64_666_152
    assert multiply_adds(model, 224) == macs


def bn_relu(x, state, name):
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.relu(F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys), training=False))


def independent(state, x, depth_of_layers, bottleneck, first="both"):
    """The network as the follow-up paper says it, from a state_dict alone."""
    convs = 3 if bottleneck else 2
    for layer, blocks in enumerate(depth_of_layers, 1):
        for i in range(blocks):
            at = f"layer{layer}.{i}"
            stride = 2 if layer > 1 and i == 0 else 1
            shares, bare = i == 0, first == "none" and layer == 1 and i == 0
            h = x if bare else bn_relu(x, state, f"{at}.bn1")
            shortcut = h if shares else x
            if f"{at}.downsample.0.weight" in state:
                shortcut = F.conv2d(shortcut, state[f"{at}.downsample.0.weight"], stride=stride)
            elif stride > 1:
                shortcut = F.pad(shortcut[:, :, ::2, ::2], (0, 0, 0, 0, 0, shortcut.shape[1]))
            strided = 2 if bottleneck and first == "none" else 1  # ImageNet's stride is in the 3x3
            for j in range(1, convs + 1):
                w = state[f"{at}.conv{j}.weight"]
                t = h if j == 1 else bn_relu(t, state, f"{at}.bn{j}")  # noqa: F821
                t = F.conv2d(t, w, stride=stride if j == strided else 1, padding=w.shape[2] // 2)
            x = t + shortcut
    x = bn_relu(x, state, "bn").mean((2, 3))
    return F.linear(x, state["fc.weight"], state["fc.bias"])


def randomised(model):
    """Statistics and parameters of BN that are not the initial ones."""
    for name, t in model.state_dict().items():
        if "running_var" in name or ("bn" in name and name.endswith("weight")):
            t.uniform_(0.5, 1.5)
        elif "running_mean" in name or ("bn" in name and name.endswith("bias")):
            t.normal_(0, 0.2)
    return model


@pytest.mark.parametrize(("depth", "bottleneck"), [(14, False), (20, True)])
def test_a_cifar_network_is_what_the_paper_says(depth, bottleneck):
    torch.manual_seed(0)
    model = randomised(PreActCifarResNet(depth, bottleneck=bottleneck)).double().eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.double)
    blocks = (depth - 2) // (9 if bottleneck else 6)
    want = independent(model.state_dict(), F.conv2d(x, model.conv1.weight, padding=1), [blocks] * 3, bottleneck)
    torch.testing.assert_close(model(x), want)


def test_an_imagenet_network_is_what_the_paper_says():
    torch.manual_seed(0)
    model = randomised(PreActResNet(PreActBottleneck, (2, 1, 1, 1), num_classes=5)).double().eval()
    x = torch.randn(2, 3, 40, 40, dtype=torch.double)
    state = model.state_dict()
    stem = F.max_pool2d(bn_relu(F.conv2d(x, model.conv1.weight, stride=2, padding=3), state, "bn1"), 3, 2, 1)
    torch.testing.assert_close(model(x), independent(state, stem, (2, 1, 1, 1), True, first="none"))


@pytest.mark.parametrize("depth", [True, 21, 7, "20"])
def test_other_depths_are_refused(depth):
    with pytest.raises(ValueError, match=r"depth must be 6n\+2"):
        PreActCifarResNet(depth)


def test_blocks_follow_the_depth():
    assert type(PreActCifarResNet(20).layer1[0]) is PreActBasicBlock
    assert type(PreActCifarResNet(29).layer1[0]) is PreActBottleneck
    assert type(PreActCifarResNet(20, bottleneck=True).layer1[0]) is PreActBottleneck
    with pytest.raises(ValueError, match="bottleneck=False"):
        PreActCifarResNet(29, bottleneck=False)
    with pytest.raises(ValueError, match="preact must be one of"):
        PreActBasicBlock(16, 16, preact="all")
    with pytest.raises(ValueError, match="has no 1x1"):
        PreActResNet(PreActBasicBlock, (1, 1, 1, 1), stride_in_1x1=True)
    with pytest.raises(ValueError, match="depth must be one of"):
        models.preact_resnet(20)


def test_the_deepest_network_trains():
    torch.manual_seed(0)
    model = PreActCifarResNet(1001, num_classes=3)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())

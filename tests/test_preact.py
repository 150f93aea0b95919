"""Pre-activation networks: their sizes, their meaning, and that they run the same converted."""

import copy
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnet_triton import convert, explain, fold, models, use_backend
from resnet_triton.explain import reasons_not_fused
from resnet_triton.models import PreActBasicBlock, PreActBottleneck, PreActCifarResNet, PreActResNet, ZeroPad
from resnet_triton.models.preact import _projection
from tests.comparers import GRADIENT, identical, no_worse_than, same_math
from tests.test_training_blocks import agree, image, lively

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


# Converted


BLOCKS = {
    "basic": lambda: PreActBasicBlock(8, 8),
    "basic, padded": lambda: PreActBasicBlock(8, 16, 2, ZeroPad(8, 16, 2), "both"),
    "bottleneck": lambda: PreActBottleneck(16, 4),
    "bottleneck, first": lambda: PreActBottleneck(8, 4, 2, _projection(8, 16, 2), "both", stride_in_1x1=True),
    "bottleneck, stride in the 3x3": lambda: PreActBottleneck(8, 4, 2, _projection(8, 16, 2), "both"),
    "bottleneck, no lead": lambda: PreActBottleneck(16, 4, 1, None, "none"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_trains_as_autograd_does(name):
    """Outputs, gradients and running statistics, and what runs is this package's operator."""
    block = lively(BLOCKS[name]())
    x = image(block.conv1.in_channels).requires_grad_()
    runs = "train_preact" if block.preact == "branch" else "train_block"
    agree(block, x, memory="stored", times=2, runs=runs)


@pytest.mark.parametrize("frozen", ["bn1", "bn2", "bn3"])
def test_frozen_bn_among_batch_statistics(frozen):
    block = lively(PreActBottleneck(16, 4))
    getattr(block, frozen).eval()
    agree(block, image(16).requires_grad_(), runs="train_preact")


def test_only_what_is_asked_for_gets_a_gradient():
    block = lively(PreActBottleneck(16, 4))
    block.bn1.requires_grad_(False)
    block.conv1.weight.requires_grad_(False)
    agree(block, image(16), runs="train_preact")
    block.requires_grad_(False)
    block.conv3.weight.requires_grad_(True)
    agree(block, image(16), runs="train_preact")


def test_bn_without_affine_and_with_an_average():
    block = lively(PreActBottleneck(16, 4))
    block.bn1 = nn.BatchNorm2d(16, affine=False, momentum=None).double()
    block.bn2 = nn.BatchNorm2d(4, track_running_stats=False).double()
    agree(block, image(16).requires_grad_(), times=2, runs="train_preact")


NETWORKS = {
    "cifar": (lambda: PreActCifarResNet(14, num_classes=4), (3, 3, 10, 10)),
    "cifar, bottlenecks": (lambda: PreActCifarResNet(20, num_classes=4, bottleneck=True), (3, 3, 10, 10)),
    "imagenet": (lambda: PreActResNet(PreActBottleneck, (2, 1, 1, 1), num_classes=4), (2, 3, 40, 40)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_the_same_converted(name):
    make, shape = NETWORKS[name]
    plain = randomised(make()).double()
    x = torch.randn(shape, dtype=torch.double)
    agree(plain.train(), x.requires_grad_(), runs="train_preact")
    plain.eval().zero_grad()
    ours = convert(plain)
    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        same_math(ours(x), plain(x))
        folded = fold(plain)
        same_math(folded(x), plain(x))
    leads = [block.bn1 for stage in ("layer1", "layer2") for block in getattr(folded, stage) if block.bn1 is not None]
    assert all(type(norm) is nn.BatchNorm2d for norm in leads), "a ReLU is between them and the next convolution"
    assert type(folded.layer1[0].bn2) is nn.Identity and folded.layer1[0].conv1.bias is not None
    for m in (plain, ours):  # constant statistics, with gradients
        m(x).square().sum().backward()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        same_math(p.grad, q.grad)


def test_autocast_and_16_bits():
    model = randomised(PreActCifarResNet(20, num_classes=4, bottleneck=True)).eval()
    ours, x = convert(model), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            no_worse_than(ours(x), model(x), exact, GRADIENT)
            ours.train(), model.train()
            with use_backend("auto", memory="stored"):
                y = ours(x)
            no_worse_than(y, model(x), copy.deepcopy(model).double()(x.double()), GRADIENT)


@pytest.mark.parametrize("train", [False, True])
def test_blocks_compile_to_one_graph(train):
    first = PreActBottleneck(8, 4, 2, _projection(8, 16, 2), "both", stride_in_1x1=True)
    ours = convert(nn.Sequential(first, PreActBottleneck(16, 4))).train(train)
    x = torch.randn(2, 8, 8, 8)
    with use_backend("auto", memory="stored"):
        expected = copy.deepcopy(ours)(x)
        compiled = torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True)
        y = compiled(x)
        identical(y, expected)
        y.sum().backward()
    assert all(p.grad is not None for p in compiled.parameters())


def test_hooks_and_patches_run_the_blocks_own_forward():
    model = randomised(PreActCifarResNet(14, num_classes=4)).eval()
    ours, x, seen = convert(model), torch.randn(2, 3, 8, 8), []
    with torch.no_grad():
        expected = model(x)
        for m in (ours.layer1[1].bn1, ours.layer2[0].conv2, ours.layer3[0].downsample, ours.bn):
            m.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(ours(x), expected)
    assert len(seen) == 4
    reasons = reasons_not_fused(ours)
    assert "hook" in reasons["layer1.1"] and "hook" in reasons["layer2.0"] and "hook" in reasons["layer3.0"]
    assert "layer1.0" not in reasons


def test_other_modules_in_a_block_are_named():
    model = PreActCifarResNet(20, bottleneck=True)
    model.layer1[1].relu = nn.GELU()
    model.layer2[1].bn1 = nn.Identity()
    model.layer3[1].bn1 = nn.GroupNorm(4, 256)
    with pytest.raises(ValueError, match=r"1\.1: relu is GELU.*2\.1: bn1 is Identity.*3\.1: bn1 is GroupNorm"):
        convert(model, strict=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(convert(model).eval()(x), model.eval()(x))


def test_explain_says_what_each_step_is():
    model = convert(PreActCifarResNet(20, bottleneck=True)).eval()
    rows = explain(model, (128, 3, 32, 32), dtype=torch.bfloat16, device="NVIDIA H200").rows
    by_op = {op: [row for row in rows if row.op.split()[0] == op] for op in ("bn+relu", "bn+relu+conv")}
    assert [row.name for row in by_op["bn+relu"]] == ["layer2.0.bn1", "layer3.0.bn1", "bn"]
    assert [row.name for row in by_op["bn+relu+conv"]] == [f"layer{i}.1.conv1" for i in (1, 2, 3)]
    assert {row.realisation for row in by_op["bn+relu+conv"]} == {"conv1x1"}
    assert all("BN and ReLU on load" in row.reason for row in by_op["bn+relu+conv"])
    plan = explain(model.train(), (128, 3, 32, 32), dtype=torch.bfloat16, device="NVIDIA H200")
    ops = [row.op.split()[0] for row in plan.rows]
    assert ops.count("wgrad") == 1 + 6 * 3 + 3

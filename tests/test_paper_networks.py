"""The paper's networks converted: shortcuts, plain nets, strides on the first 1x1, Caffe's pooling, and depth."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from resnet_triton import convert, explain, fold, unconvert, use_backend
from resnet_triton.cli.convert import parts_of
from resnet_triton.models import BasicBlock, Bottleneck, CifarResNet, ResNet
from tests import comparers, networks

H200 = "NVIDIA H200"
V1 = {"stride_in_1x1": True, "caffe_pool": True, "conv1_bias": True}


def imagenet(block: type[nn.Module], layers: list[int], **kwargs) -> ResNet:
    return ResNet(block, layers, num_classes=5, **kwargs)  # type: ignore[arg-type]


NETWORKS = {
    "cifar A": lambda: CifarResNet(14),
    "cifar A-both": lambda: CifarResNet(8, shortcut="A-both"),
    "cifar C": lambda: CifarResNet(8, shortcut="C"),
    "cifar plain": lambda: CifarResNet(14, shortcut="none"),
    "basic A": lambda: imagenet(BasicBlock, [1, 1, 1, 1], shortcut="A"),
    "plain": lambda: imagenet(BasicBlock, [1, 1, 1, 1], shortcut="none"),
    "bottleneck A": lambda: imagenet(Bottleneck, [1, 1, 1, 1], shortcut="A"),
    "bottleneck C": lambda: imagenet(Bottleneck, [2, 1, 1, 1], shortcut="C"),
    "v1": lambda: imagenet(Bottleneck, [1, 2, 1, 1], **V1),
    "v1 A": lambda: imagenet(Bottleneck, [1, 1, 1, 1], shortcut="A", **V1),
}


@pytest.fixture(params=NETWORKS)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A network in fp64, and converted; every block of it must run fused."""
    torch.manual_seed(4)
    model = networks.randomise(NETWORKS[request.param]().double())
    return model, convert(model, strict=True)


def test_logits_and_gradients_are_those_of_the_network(pair) -> None:
    model, converted = pair
    x = networks.images(2, 33, 25)
    with torch.no_grad():
        comparers.same_math(converted(x), model(x))
        comparers.same_math(fold(model)(x), model(x))
    restored = unconvert(converted)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert list(restored.state_dict()) == list(model.state_dict())
    frozen = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (converted, model)]
    for a, b in zip(*frozen, strict=True):
        comparers.same_math(a, b)


def test_a_training_step_is_that_of_the_network(pair) -> None:
    memory = "gram" if any(isinstance(m, Bottleneck) for m in pair[0].modules()) else "stored"
    model, converted = (m.train() for m in pair)
    x = networks.images(3, 37, 33)
    with use_backend("auto", memory=memory):
        out, counter = converted(x), networks.Calls()
        with torch.no_grad(), counter:
            converted(x)
    assert "aten" not in counter.counts, "every convolution runs in a fused step"
    expected = model(x)
    model(x)
    comparers.same_math(out, expected)
    names = [name for name, _ in model.named_parameters()]
    grads = [
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in ((converted, out), (model, expected))
    ]
    for name, a, b in zip(names, *grads, strict=True):
        if name == "conv1.bias":  # BN takes it away: exactly zero here, rounding errors in PyTorch
            assert not a.any() and b.abs().max() < 1e-9
        else:
            comparers.same_math(a, b)
    for a, b in zip(converted.buffers(), model.buffers(), strict=True):
        comparers.same_math(a.double(), b.double())


def test_blocks_between_stages_store_what_the_next_reads() -> None:
    """With the stride on the first 1x1, three quarters of a stage's output are read by nobody."""
    plan = explain(convert(imagenet(Bottleneck, [1, 1, 1, 1], **V1).eval()), (8, 3, 64, 64), device=H200)
    ops = {row.name: row.op for row in plan.rows}
    assert ops["layer2.0.conv1"].startswith("conv 1x1/1 8x8x8x256->128")
    assert "1x1/1 8x8x8x256->512" in ops["layer2.0.downsample.0"]
    padded = explain(
        convert(imagenet(Bottleneck, [1, 1, 1, 1], stride_in_1x1=True, shortcut="A").eval()),
        (8, 3, 64, 64),
        device=H200,
    )
    assert any(row.op.startswith("conv 1x1/2 8x16x16x256->128") for row in padded.rows), "option A reads all of it"


def test_explain_names_what_is_not_fused() -> None:
    def beside(model: nn.Module) -> dict[str, str]:
        rows = explain(convert(model.eval()), (8, 3, 64, 64), device=H200, dtype=torch.bfloat16).rows
        return {row.name: f"{row.op}: {row.reason}" for row in rows if row.realisation == "aten"}

    pads = beside(CifarResNet(14))
    assert list(pads) == ["layer2.0.downsample", "layer3.0.downsample"]
    assert all(
        reason.startswith("pad: zero padding is a pass of its own; the block's last") for reason in pads.values()
    )
    assert beside(CifarResNet(14, shortcut="none")) == beside(CifarResNet(14, shortcut="C")) == {}
    v1 = beside(imagenet(Bottleneck, [1, 1, 1, 1], **V1))
    assert list(v1) == ["maxpool"] and "padding=0, ceil_mode=True; the fused stem pools" in v1["maxpool"]
    parts = parts_of(convert(imagenet(Bottleneck, [1, 1, 1, 1], **V1).eval()))
    assert [(part.name, part.fused) for part in parts if part.fused != "yes"] == [("maxpool", "no")]
    assert {part.fused for part in parts_of(convert(CifarResNet(8, shortcut="none").eval()))} == {"yes"}


def test_a_hooked_pad_or_plain_block_runs_as_it_is() -> None:
    model = networks.randomise(CifarResNet(8).double())
    converted = convert(model)
    seen: list[str] = []
    converted.layer2[0].downsample.register_forward_hook(lambda *_: seen.append("pad"))
    x = networks.images(2, 16, 16)
    with torch.no_grad():
        comparers.same_math(converted(x), model(x))
    assert seen == ["pad"]
    plain = networks.randomise(CifarResNet(8, shortcut="none").double())
    converted = convert(plain)
    converted.layer1[0].bn1.register_forward_hook(lambda *_: seen.append("bn"))
    converted.layer3[0].conv2 = converted.layer3[0].conv2.requires_grad_(False)
    with torch.no_grad():
        comparers.same_math(converted(x), plain(x))
    assert seen == ["pad", "bn"]
    assert networks.calls(converted, x) == {"aten": 2, "conv_bn_act": 5, "head": 1}


def test_1202_layers() -> None:
    """They build, convert, and run forward and backward: nothing recurses."""
    model = convert(CifarResNet(1202), inplace=True, strict=True)
    x = torch.randn(2, 3, 12, 12)
    with use_backend("auto", memory="stored"):
        loss = model(x).square().mean()
        loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(model.conv1.weight.grad).all()
    assert len(model.layer3) == 200 and model.layer3[199].conv2.weight.grad.any()
    with torch.no_grad():
        assert torch.isfinite(model.eval()(x)).all()


def test_explain_grows_with_depth_alone() -> None:
    def seconds(depth: int) -> float:
        with torch.device("meta"):
            model = convert(CifarResNet(depth)).eval()
        began = time.process_time()
        plan = explain(model, (2, 3, 32, 32), device=H200)
        assert sum(row.op.startswith("conv") for row in plan.rows) == depth - 1
        return time.process_time() - began

    seconds(8)  # imports what tracing needs
    assert seconds(158) < 6 * seconds(56)

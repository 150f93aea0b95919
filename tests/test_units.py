"""VGG and GoogLeNet converted: convolution, BN and ReLU as one, everything else as it is."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn
from torchvision.models import vgg

from resnet_triton import convert, explain, fold, unconvert, use_backend
from resnet_triton.cli.convert import parts_of
from resnet_triton.convert import is_converted
from tests import comparers, networks

googlenet = importlib.import_module("torchvision.models.googlenet")  # hidden by the function of that name
inception = importlib.import_module("torchvision.models.inception")


def small_vgg(norm: bool = True) -> vgg.VGG:
    """Five convolutions, two of them without a pool between, and one fully connected layer."""
    with torch.device("meta"):
        model = vgg.VGG(nn.Sequential(), num_classes=5, init_weights=False)
    model.features = vgg.make_layers([8, 8, "M", 16, 16, "M", 16], norm)  # type: ignore[list-item]
    model.classifier = nn.Sequential(nn.Linear(784, 5))
    return model


NETWORKS = {
    "vgg with BN": small_vgg,
    "vgg": lambda: small_vgg(False),
    "inception": lambda: nn.Sequential(
        googlenet.BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3), googlenet.Inception(16, 8, 8, 16, 8, 8, 8)
    ),
}


@pytest.fixture(params=NETWORKS)
def pair(request) -> tuple[nn.Module, nn.Module]:
    """A network in fp64, and converted; every convolution must run fused."""
    torch.manual_seed(4)
    model = networks.randomise(NETWORKS[request.param]().double())
    return model, convert(model, strict=True)


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in model.modules())


def test_outputs_and_gradients_are_those_of_the_network(pair) -> None:
    model, converted = pair
    x = networks.images(2, 33, 40)
    assert networks.calls(converted, x) == {"conv_bn_act": convolutions(model)}
    folded = fold(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert networks.calls(folded, x) == {"conv_bn_act": convolutions(model)}
    with torch.no_grad():
        expected = model(x)
        comparers.same_math(converted(x), expected)
        comparers.same_math(folded(x), expected)
    gradients = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (converted, model)]
    for a, b in zip(*gradients, strict=True):
        comparers.same_math(a, b)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [type(m) for m in unconvert(converted).modules()] == [type(m) for m in model.modules()]
    comparers.same_math(torch.fx.symbolic_trace(converted)(x), expected)


def test_a_training_step_is_that_of_the_network(pair) -> None:
    model, converted = (m.train() for m in pair)
    x = networks.images(3, 33, 40)
    with use_backend("auto", memory="stored"):
        out = converted(x)
    expected = model(x)
    comparers.same_math(out, expected)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in ((converted, out), (model, expected))
    ]
    for (name, _), a, b in zip(model.named_parameters(), *gradients, strict=True):
        if a.abs().max() == 0:  # a bias that BN takes away: exactly zero here, rounding errors in PyTorch
            assert name.endswith("bias") and b.abs().max() < 1e-9
        else:
            comparers.same_math(a, b)
    for a, b in zip(converted.buffers(), model.buffers(), strict=True):
        comparers.same_math(a.double(), b.double())


def test_consecutive_units_are_one_operator_in_training() -> None:
    """So BN and ReLU between them run while the next convolution loads its input."""
    converted = convert(small_vgg()).train()
    with torch.no_grad(), networks.Calls() as counter, use_backend("auto", memory="stored"):
        converted(torch.randn(2, 3, 32, 32))
    assert dict(counter.counts) == {"train_block": 3}


def test_hooks_are_called_and_only_their_units_fall_back() -> None:
    converted = convert(small_vgg()).double().eval()
    seen: list[str] = []
    converted.features[4].register_forward_hook(lambda *_: seen.append("bn"))
    x = networks.images(1)
    assert networks.calls(converted, x) == {"aten": 1, "conv_bn_act": 4} and seen == ["bn"]
    converted.features.register_forward_hook(lambda *_: seen.append("features"))
    assert networks.calls(converted, x) == {"aten": 5} and seen == ["bn", "bn", "features"]
    unit = convert(googlenet.BasicConv2d(3, 4, kernel_size=1)).double().eval()
    unit.bn.register_forward_hook(lambda *_: seen.append("unit"))
    assert networks.calls(unit, x) == {"aten": 1} and seen[-1] == "unit"


def test_what_is_not_fused_is_named() -> None:
    model = small_vgg()
    model.features[0] = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
    model.features[5] = nn.GELU()
    converted = convert(model).eval()
    (part,) = parts_of(converted)
    assert (part.name, part.kind, part.fused) == ("", "VGG", "in part")
    assert part.reason == "its convolution has padding_mode='reflect'; fused blocks pad with zeros, and 1 more"
    reasons = {row.name: row.reason for row in explain(converted, (2, 3, 32, 32), device="NVIDIA H200").rows}
    assert "padding_mode='reflect'" in reasons["features.0"] and "GELU follows it" in reasons["features.3"]
    with pytest.raises(ValueError, match=r"features\.0: its convolution has padding_mode.*features\.3: GELU follows"):
        convert(model, strict=True)
    wide = inception.InceptionC(16, channels_7x7=8)
    with pytest.raises(ValueError, match=r"branch7x7_2: conv has padding=\(0, 3\); fused blocks need one number"):
        convert(wide, strict=True)
    parts = {part.name: part.fused for part in parts_of(convert(wide.eval()))}
    assert parts["branch1x1"] == "yes" and parts["branch7x7_2"] == "no" and len(parts) == 10


def test_googlenet_and_vgg_are_known() -> None:
    with torch.device("meta"):
        for model, units in ((googlenet.googlenet(init_weights=False, aux_logits=False), 57), (vgg.vgg16_bn(), 1)):
            assert sum(is_converted(m) for m in convert(model, strict=True).modules()) == units

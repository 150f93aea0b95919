"""``fold``: BN goes into the convolutions for good, the logits stay, and what cannot be folded keeps its BN."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet as tv
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops.misc import FrozenBatchNorm2d

from resnet_triton import convert, fold, ops, unconvert
from tests.comparers import identical, no_worse_than, same_math
from tests.networks import basics, bottlenecks, calls, images, randomise

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, NORMS)]


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("make", (basics, bottlenecks))
@pytest.mark.parametrize("converted", (False, True), ids=("plain", "converted"))
def test_bn_is_gone_and_the_logits_stay(make, converted: bool) -> None:
    model, x = make(), images()
    expected, state = logits(model, x), copy.deepcopy(model.state_dict())
    folded = fold(convert(model) if converted else model)
    assert norms(folded) == []
    assert sum(type(m) is nn.Identity for m in folded.modules()) == len(norms(model)) > 10
    assert all(m.bias is not None for m in folded.modules() if isinstance(m, nn.Conv2d))
    same_math(logits(folded, x), expected)
    assert calls(folded, x) == calls(convert(model), x)
    assert type(model) is tv.ResNet and list(model.state_dict()) == list(state)
    for key, value in state.items():
        identical(model.state_dict()[key], value)
    same_math(logits(unconvert(folded), x), expected)


def test_the_folded_weight_is_the_formula() -> None:
    model = bottlenecks()
    conv, bn = model.layer2[0].downsample
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    folded = fold(model).layer2[0].downsample
    same_math(folded[0].weight.detach(), (conv.weight * scale[:, None, None, None]).detach())
    same_math(folded[0].bias.detach(), (bn.bias - bn.running_mean * scale).detach())
    assert type(folded[1]) is nn.Identity
    assert fold(model).conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_inplace_and_twice() -> None:
    model, x = bottlenecks(), images()
    expected = logits(model, x)
    assert fold(model, inplace=True) is model
    same_math(logits(model, x), expected)
    state = copy.deepcopy(model.state_dict())
    again = fold(model)
    assert list(again.state_dict()) == list(state)
    for key, value in state.items():
        identical(again.state_dict()[key], value)


def test_frozen_bn_and_convolution_biases() -> None:
    model, x = bottlenecks(norm_layer=FrozenBatchNorm2d), images()
    for conv in (model.conv1, model.layer1[0].conv2, model.layer2[0].downsample[0]):
        conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels, dtype=torch.float64))
    folded = fold(model)
    assert norms(folded) == [] != norms(model)
    same_math(logits(folded, x), logits(model, x))


def test_bn_without_affine_parameters_and_with_another_eps() -> None:
    model, x = bottlenecks(), images()
    for block in model.layer1:
        block.bn2 = nn.BatchNorm2d(64, eps=0.1, affine=False).double().eval()
        block.bn2.running_mean.fill_(0.2)
    folded = fold(model)
    assert norms(folded) == []
    same_math(logits(folded, x), logits(model, x))


@pytest.mark.parametrize("norm", (nn.BatchNorm2d, nn.SyncBatchNorm))
def test_training_mode_is_an_error_that_changes_nothing(norm: type[nn.Module]) -> None:
    model = bottlenecks(norm_layer=norm)
    model.layer3[0].bn2.train()
    before = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=r"layer3\.0\.bn2 is in training mode; call model\.eval\(\) first"):
        fold(model, inplace=True)
    assert [(name, type(m)) for name, m in model.named_modules()] == before
    assert norms(fold(model.eval())) == []


def test_requires_grad_is_kept_and_gradients_flow() -> None:
    model, x = bottlenecks(), images()
    model.conv1.requires_grad_(False)
    model.layer1.requires_grad_(False)
    folded = fold(model)
    for name, p in folded.named_parameters():
        assert p.requires_grad == (not name.startswith(("conv1", "layer1"))), name
        assert p.is_leaf, name
    folded.train()  # no BN is left, so that nothing depends on the mode
    same_math(folded(x).detach(), logits(model, x))
    folded(x).square().sum().backward()
    model(x).square().sum().backward()
    same_math(folded.fc.weight.grad, model.fc.weight.grad)
    # d folded weight = d weight / scale
    conv, bn = model.layer4[0].conv3, model.layer4[0].bn3
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    same_math(folded.layer4[0].conv3.weight.grad * scale[:, None, None, None], conv.weight.grad)
    same_math(folded.layer4[0].conv3.bias.grad, bn.bias.grad)


@pytest.mark.parametrize("make", (basics, bottlenecks))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_folding_then_casting_errs_no_more_than_eager(make, dtype: torch.dtype) -> None:
    exact_model = make().float().double()  # values of fp32
    model = copy.deepcopy(exact_model).to(dtype)
    x = images(4, 64, 64).to(dtype)
    folded = fold(copy.deepcopy(exact_model).float()).to(dtype)
    assert folded.conv1.bias.dtype == dtype
    eager = model.to(memory_format=torch.channels_last)
    no_worse_than(logits(folded, x), logits(eager, x), logits(exact_model, x.double()))


def test_onednn_runs_bias_and_relu_of_a_folded_convolution() -> None:
    class Inside(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.add(func._opname)
            return func(*args, **(kwargs or {}))

    folded = fold(bottlenecks(dtype=torch.float32).layer1[0])
    weight, bias = folded.conv1.weight, folded.conv1.bias
    with torch.no_grad(), Inside() as inside:  # the implementation itself, whose steps are seen
        out = ops.conv_bn_act(torch.randn(1, 64, 8, 8), weight, bias, None, None, None, None, None, 0.0, True, 1, 0, 1)
    assert "_convolution_pointwise" in inside.seen, inside.seen
    assert not inside.seen & {"convolution", "relu", "relu_", "native_batch_norm"}
    assert out.min() == 0


def test_grouped_convolutions_are_folded_too() -> None:
    model, x = randomise(tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4).double()), images()
    folded = fold(model)
    assert norms(folded) == []
    same_math(logits(folded, x), logits(model, x))


@pytest.mark.parametrize("place", ("layer2.0.bn2", "layer2.0.conv1", "layer2.0.downsample.0", "layer2.0.relu"))
def test_a_hooked_block_keeps_its_bn_and_its_hook(place: str) -> None:
    model, x = bottlenecks(), images()
    seen: list[Tensor] = []
    model.get_submodule(place).register_forward_hook(lambda m, args, out: seen.append(out.clone()))
    folded = fold(model)
    assert norms(folded) == [name for name in norms(model) if name.startswith("layer2.0")]
    expected = logits(model, x)
    theirs, seen[:] = list(seen), []
    same_math(logits(folded, x), expected)
    assert len(seen) == len(theirs) > 0
    for a, b in zip(seen, theirs, strict=True):
        same_math(a, b)


def test_a_pruned_convolution_stays_pruned() -> None:
    model, x = bottlenecks(), images()
    prune.random_unstructured(model.layer1[1].conv2, "weight", 0.5)
    expected = logits(model, x)
    with pytest.raises(ValueError, match=r"fold cannot copy the ResNet: .*deepcopy.*; pass inplace=True"):
        fold(bottlenecks_pruned())
    folded = fold(model, inplace=True)
    assert norms(folded) == ["layer1.1.bn1", "layer1.1.bn2", "layer1.1.bn3"]
    same_math(logits(folded, x), expected)


def bottlenecks_pruned() -> tv.ResNet:
    """A model that PyTorch cannot copy: the pruned weight is the result of a multiplication."""
    model = bottlenecks((1, 1, 1, 1))
    prune.random_unstructured(model.layer1[0].conv2, "weight", 0.5)
    return model


def test_an_unknown_stem_or_a_foreign_part_is_left_alone() -> None:
    model, x = bottlenecks(), images()
    model.relu = nn.SiLU()
    model.extra = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).double().eval()
    folded = fold(model)
    assert norms(folded) == ["bn1", "extra.1"]
    same_math(logits(folded, x), logits(model, x))


def test_taps_of_a_layer_getter_keep_their_values() -> None:
    taps = ({"conv1": "c", "layer1": "f"}, {"bn1": "b", "layer1": "f"}, {"relu": "r", "layer2": "f"})
    for names in taps:
        model, x = bottlenecks(), images()
        getter = IntermediateLayerGetter(model, names)
        folded = fold(getter)
        expected, out = logits(getter, x), logits(folded, x)
        assert list(out) == list(expected)
        for name, value in expected.items():
            same_math(out[name], value)
        assert norms(folded) == (["bn1"] if "conv1" in names else [])


def test_a_getter_of_another_network_is_left_alone() -> None:
    layers = {"relu": nn.ReLU(), "conv1": nn.Conv2d(3, 8, 3), "bn1": nn.BatchNorm2d(8)}
    net = nn.ModuleDict(layers).double().eval()
    net.bn1.running_mean.fill_(0.3)
    getter, x = IntermediateLayerGetter(net, {"bn1": "out"}), images()
    folded = fold(getter)
    assert norms(folded) == ["bn1"]
    same_math(logits(folded, x)["out"], logits(getter, x)["out"])


class AliasedStem(nn.Module):
    """Holds a network, and its stem a second time, as an encoder does that kept what it was cut from."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bottlenecks()
        self.stem = nn.Sequential(self.net.conv1, self.net.bn1, self.net.relu, self.net.maxpool)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net.layer1(self.stem(x)), self.net(x)


class NetworkAndGetter(nn.Module):
    """A network, and a getter of the same modules."""

    def __init__(self) -> None:
        super().__init__()
        self.net = bottlenecks()
        self.body = IntermediateLayerGetter(self.net, {"layer2": "out"})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x)["out"], self.net(x)


@pytest.mark.parametrize("make", (AliasedStem, NetworkAndGetter))
def test_a_convolution_that_sits_at_two_places_is_folded_at_each_or_left(make) -> None:
    model, x = make().eval(), images()
    for ours, theirs in zip(logits(fold(model), x), logits(model, x), strict=True):
        same_math(ours, theirs)


def test_one_convolution_with_two_bns_is_folded_into_two() -> None:
    model, x = bottlenecks(), images()
    model.layer1[1].conv2 = model.layer1[0].conv2
    folded = fold(model)
    assert norms(folded) == []
    same_math(logits(folded, x), logits(model, x))

"""Features of stages in one fused pass, and frozen stages that cost nothing in training."""

from __future__ import annotations

import copy
import io
import json
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import resnet_triton
from resnet_triton import convert, features, fold, freeze, models, unconvert, unfreeze, use_backend
from resnet_triton.cli import main
from resnet_triton.convert import is_converted
from resnet_triton.runs import build
from tests.comparers import identical, same_math
from tests.networks import basics, bottlenecks, calls, images, randomise

STAGES = ("layer1", "layer2", "layer3", "layer4")


def timm_net() -> nn.Module:
    timm = pytest.importorskip("timm")
    block = timm.models.resnet.Bottleneck
    return randomise(timm.models.resnet.ResNet(block, [1, 2, 1, 1], num_classes=10).double())


def cifar_net() -> nn.Module:
    return randomise(models.CifarResNet(14).double())


NETS = {"torchvision": lambda: bottlenecks(), "basic": lambda: basics(), "timm": timm_net, "cifar": cifar_net}


def hooked(model: nn.Module, names: list[str], x: Tensor) -> dict[str, Tensor]:
    """Outputs of children as hooks of the unconverted network see them."""
    found = {}
    for name in names:
        getattr(model, name).register_forward_hook(lambda m, inputs, out, name=name: found.update({name: out.clone()}))
    with torch.no_grad():
        model(x)
    return found


@pytest.mark.parametrize("net", NETS)
def test_features_are_the_outputs_of_the_stages(net):
    model, x = NETS[net](), images()
    names = [name for name, _ in model.named_children() if name in ("relu", "act1", "maxpool", *STAGES)]
    expected = hooked(copy.deepcopy(model), names, x)
    getter = features(model, names[::-1])
    assert not is_converted(model)  # it was copied
    with torch.no_grad():
        found = getter(x)
    assert type(found) is OrderedDict and list(found) == names  # in the order of the network
    for name in names:
        same_math(found[name], expected[name])


def test_features_stop_after_the_last_layer_and_run_stages_together():
    model = convert(bottlenecks((2, 1, 1, 1)))
    getter = features(model, ["layer2"])
    assert [name for name, _ in getter.named_children()] == ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2"]
    assert calls(getter, images()) == {"stem": 1, "conv_bn_act": 1, "block_tail": 3}
    assert calls(unconvert(getter), images()) == {"aten": 1 + 4 + 3 + 4}
    both = features(model, ("layer1", "layer2"))
    assert calls(both, images()) == {"stem": 1, "conv_bn_act": 2, "block_tail": 3}  # layer1 is asked for, and read


def test_features_share_the_modules_of_a_converted_network():
    model = convert(basics())
    getter = features(model, "layer3")
    assert getter.layer1 is model.layer1
    state = getter.state_dict()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    assert {key.partition(".")[0] for key in state} == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    getter.load_state_dict({key: value + 1 for key, value in state.items()})
    assert torch.equal(model.conv1.weight, state["conv1.weight"])  # the same storage
    copied, x = copy.deepcopy(getter), images()
    identical(copied(x)["layer3"], getter(x)["layer3"])


def test_features_follow_the_mode_and_differentiate():
    x = images()
    for train in (False, True):
        model = basics().train(train)
        eager = copy.deepcopy(model)
        with use_backend("auto", memory="stored"):
            getter = features(convert(model, inplace=True), ["layer1", "layer3"])
            assert getter.training is train
            sum(out.square().mean() for out in getter(x).values()).backward()
        t = eager.layer1(eager.maxpool(eager.relu(eager.bn1(eager.conv1(x)))))
        (t.square().mean() + eager.layer3(eager.layer2(t)).square().mean()).backward()
        for name, p in eager.named_parameters():
            grad = dict(model.named_parameters())[name].grad
            assert (grad is None) == (p.grad is None)
            if grad is not None:
                same_math(grad, p.grad)
        same_math(model.layer3[0].bn1.running_mean, eager.layer3[0].bn1.running_mean)


def test_features_fold_explain_and_script():
    model, x = basics(dtype=torch.float32), images(dtype=torch.float32)
    getter = features(model, ("layer1", "layer2"))
    same_math(fold(getter.double())(x.double())["layer2"], features(model.double(), "layer2")(x.double())["layer2"])
    getter = features(model.float(), ("layer1", "layer2"))
    rows = resnet_triton.explain(getter, tuple(x.shape)).rows
    assert {row.name.partition(".")[0] for row in rows} == {"conv1", "layer1", "layer2"}
    traced = torch.jit.trace(getter, x, strict=False)(x)
    with torch.no_grad():
        assert torch.allclose(traced["layer2"], getter(x)["layer2"], rtol=1e-4, atol=1e-4)


def test_features_refuse():
    model = basics()
    for layers in ("layer5", ["layer1", "fc"], "bn1"):
        with pytest.raises(
            ValueError, match=r"takes layers of the ResNet: conv1, relu, maxpool, layer1, .* is none of"
        ):
            features(model, layers)
    with pytest.raises(ValueError, match="got none"):
        features(model, ())
    with pytest.raises(
        ValueError, match="features takes a ResNet of this package, torchvision or timm, got Sequential"
    ):
        features(nn.Sequential(model), "layer1")
    with pytest.raises(TypeError, match=r"takes an nn\.Module"):
        features(None, "layer1")


# Frozen stages


def saved_by(step) -> list[tuple[int, ...]]:
    """Shapes of what a forward keeps for its backward, parameters and vectors left out."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        step()
    return [tuple(t.shape) for t in kept if t.dim() == 4 and not isinstance(t, nn.Parameter)]


@pytest.mark.parametrize("net", ("torchvision", "basic", "timm", "cifar"))
@pytest.mark.parametrize("train", (False, True))
def test_frozen_stages_keep_nothing_and_have_no_backward(net, train):
    model, x = convert(NETS[net]()), images()
    freeze(model, ("conv1", "layer1", "layer2"))
    model.train(train)
    with use_backend("auto", memory="stored"):
        kept = saved_by(lambda: model(x))
        with torch.no_grad():
            front = features(model, "layer2")(x)["layer2"]
        behind = nn.Sequential(*(getattr(model, name) for name in STAGES[2:] if hasattr(model, name)))
        alone = saved_by(lambda: behind(front).mean((2, 3)))
        assert len(kept) <= len(alone) + 1  # the pooled output
        largest = max(shape[2] for shape in kept)
        assert largest == front.shape[2]  # nothing of a frozen stage, whose images are larger
        model(x).sum().backward()
    frozen = ("conv1", "bn1", "layer1", "layer2")
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name.partition(".")[0] in frozen), name


def test_gradients_behind_frozen_stages_are_right():
    x = images(4, 64, 64)  # the last stage's statistics are of 16 values
    for make in (bottlenecks, basics):
        model = freeze(make(), ("conv1", "layer1", "layer2.0")).train()
        eager = copy.deepcopy(model)
        with use_backend("auto", memory="stored"):
            convert(model, inplace=True)(x).square().sum().backward()
        eager(x).square().sum().backward()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None)
            if ours.grad is not None:
                same_math(ours.grad, theirs.grad)


def test_frozen_norms_stay_in_eval_mode_through_train_copies_and_pickles():
    model = freeze(basics((1, 1, 1, 1)).train())
    frozen = {"bn1", "layer1.0.bn1", "layer1.0.bn2"}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)  # written above
    for m in (model, convert(model), copy.deepcopy(convert(model)), loaded):
        m.eval()
        m.train()
        m.layer1.train()
        m.layer1[0].bn1.eval()
        for name, norm in m.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.training == (name not in frozen), name
        assert m.bn1.train() is m.bn1
        before = m.bn1.running_mean.clone(), m.layer1[0].bn2.running_mean.clone(), m.layer2[0].bn1.running_mean.clone()
        m(images())
        assert torch.equal(m.bn1.running_mean, before[0]) and torch.equal(m.layer1[0].bn2.running_mean, before[1])
        assert not torch.equal(m.layer2[0].bn1.running_mean, before[2])
    assert list(model.state_dict()) == list(basics((1, 1, 1, 1)).state_dict())


def test_norms_may_go_on_and_stages_learn_again():
    model = freeze(convert(basics((1, 1, 1, 1))), "layer1", norms=False).train()
    assert model.layer1[0].bn1.training and not model.layer1[0].bn1.weight.requires_grad
    freeze(model, ["conv1", "layer1"])
    assert not model.layer1[0].bn1.training and not model.bn1.training and not model.bn1.weight.requires_grad
    assert model.layer2[0].bn1.training
    unfreeze(model, ["layer1"])
    assert model.layer1[0].bn1.training and model.layer1[0].bn1.weight.requires_grad and not model.bn1.training
    model.eval()
    assert not model.layer1[0].bn1.training
    unfreeze(model)
    assert not model.bn1.training and model.train().bn1.training and all(p.requires_grad for p in model.parameters())


def test_freeze_takes_any_module_and_names_what_it_does_not_know():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).train()
    freeze(net, ["0"]).train()
    assert [p.requires_grad for p in net.parameters()] == [False] * 4 + [True] * 4
    assert (net[1].training, net[4].training) == (False, True)
    assert freeze(nn.Sequential(net), "0.3").training
    assert not net[4].weight.requires_grad
    with pytest.raises(ValueError, match="freeze knows no stage 'layer9' of the ResNet; its children are conv1, bn1"):
        freeze(convert(basics()), ["layer1", "layer9"])
    with pytest.raises(ValueError, match="unfreeze knows no stage"):
        unfreeze(net, "")


NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes=10):
        super().__init__(nn.Conv2d(1, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, classes))
"""


def test_a_run_begins_with_weights_and_freezes_stages(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "users_frozen_net.py").write_text(NET)
    train = ["train", "--data", "digits", "--model", "users_frozen_net:Net", "--size", "8", "--batch-size", "256"]
    train += ["--device", "cpu", "--json"]
    assert main([*train, "--epochs", "1", "--output", "a"]) == 0
    first = json.loads(capsys.readouterr().out)["last"]
    begin = [*train, "--epochs", "2", "--output", "b", "--weights", first]
    assert main([*begin, "--freeze", "0", "--ema", "0.5"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = load_file(Path(report["last"]).with_name("model.safetensors"))
    for name, value in load_file(first).items():
        assert torch.equal(found[name], value) == name.startswith(("0.", "1.")), name
    assert main([*begin, "--freeze", "0", "--ema", "0.5", "--resume"]) == 0  # it is done
    assert json.loads(capsys.readouterr().out)["resumed_from"] == "epoch-0002-step-0000000"
    assert main([*begin, "--ema", "0.5"]) == 2
    assert "freeze = ['0'] instead of nothing" in capsys.readouterr().err
    torch.save({name: value * 2 for name, value in load_file(first).items()}, "other.pth")
    assert main([*begin[:-1], "other.pth", "--freeze", "0", "--ema", "0.5"]) == 2
    assert "weights = " in capsys.readouterr().err
    sys.modules.pop("users_frozen_net", None)


def test_new_classes_get_a_new_classifier(tmp_path):
    for depth, name in ((8, "ten"), (14, "deep")):
        save_file(models.CifarResNet(depth).state_dict(), tmp_path / f"{name}.safetensors")
    expected = load_file(tmp_path / "ten.safetensors")
    model = build.build("cifar_resnet8", 3, 3)
    own = model.fc.weight.clone()
    digest, new = build.begin_with(model, "cifar_resnet8", str(tmp_path / "ten.safetensors"))
    assert new == ["fc.weight", "fc.bias"] and torch.equal(model.fc.weight, own) and len(digest) == 16
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items() if not k.startswith("fc."))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"differ from the model in more than its classifier|depth|does not fit"):
        build.begin_with(model, "cifar_resnet8", str(tmp_path / "deep.safetensors"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_frozen_network_scripts():
    model = freeze(convert(basics((1, 1, 1, 1))))
    x = images()
    scripted = torch.jit.script(unconvert(model))
    same_math(scripted(x), model(x))

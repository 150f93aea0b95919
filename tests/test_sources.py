"""Models by name: what each form gives, that nothing is downloaded unasked, and what wrong names answer."""

from __future__ import annotations

import inspect
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from resnet_triton import fold, models
from resnet_triton.cli import main
from resnet_triton.convert import is_converted
from resnet_triton.sources import builders, load_model

USERS_MODULE = """
import torch
from resnet_triton import models

instance = torch.nn.Sequential(torch.nn.Flatten())
number = 3

class Net(torch.nn.Sequential):
    pass

class Made:
    @staticmethod
    def build():
        return models.cifar_resnet(8)

def build():
    torch.manual_seed(3)
    return models.CifarResNet(8).train()

def broken():
    inner = build()
    return inner.layer9

def needs(argument):
    return argument

def none():
    return None

def leaves():
    raise SystemExit("usage: nothing")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the present one, for modules of the user; they are forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def users(folder: Path) -> Path:
    (folder / "users_net.py").write_text(USERS_MODULE)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def plain(model: nn.Module) -> bool:
    return not model.training and not any(is_converted(m) for m in model.modules())


def test_every_builder_that_needs_no_argument_is_a_name():
    named = builders()
    assert {"resnet18", "resnet50", "mnist5k_resnet20"} <= set(named)
    assert all(getattr(models, name) is build for name, build in named.items())
    assert not [name for name in named if inspect.isclass(named[name])]
    assert "cifar_resnet" not in named  # needs a depth


@pytest.mark.parametrize("spec", ("resnet18", "torchvision:resnet18", "timm:resnet18"))
def test_a_name_gives_an_unconverted_model(spec, offline):
    if spec.startswith("timm"):
        pytest.importorskip("timm")
    model = load_model(spec)
    assert plain(model)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512


def test_a_backbone_is_not_downloaded(offline):
    assert plain(load_model("torchvision:lraspp_mobilenet_v3_large"))


@pytest.mark.parametrize("spec", ("users_net:build", "users_net.py:build", "users_net:Made.build", "users_net:Net"))
def test_a_function_or_class_of_the_present_folder(spec, users):
    assert plain(load_model(spec))
    assert sys.path[0] == str(users)


def test_a_module_of_a_package_and_an_instance(folder):
    (folder / "nets").mkdir()
    (folder / "nets" / "__init__.py").touch()
    (folder / "nets" / "inner.py").write_text(USERS_MODULE)
    assert isinstance(load_model("nets.inner:build"), models.CifarResNet)
    assert isinstance(load_model("nets.inner:instance"), nn.Sequential)
    assert isinstance(load_model(f"{folder}/nets/inner.py:build"), models.CifarResNet)


@pytest.mark.parametrize(
    ("spec", "message"),
    (
        ("", "model is empty"),
        ("resnet5", r"'resnet5' is not known; did you mean .*resnet50.*; allowed: .*resnet18"),
        ("densenet121", "did you mean torchvision:densenet121"),
        ("torchvision:", "ends with a colon"),
        ("torchvision:resnet5", "torchvision has no model 'resnet5'; did you mean torchvision:resnet50"),
        ("tv:resnet50", "no module 'tv' in .* allowed: torchvision:NAME"),
        ("users_net.deeper:f", "users_net.deeper"),
        ("missing.py:f", "there is no file 'missing.py'"),
        ("users_net:biuld", "users_net has no 'biuld'; did you mean users_net:build"),
        ("users_net:number", "is of type int; allowed: a function or class"),
        ("users_net:none", "gave NoneType; it must return a torch.nn.Module"),
        ("users_net:needs", "missing 1 required positional argument: 'argument'; it is called without arguments"),
        ("users_net:broken", r"AttributeError: .*layer9.*users_net.py, line 22: return inner.layer9"),
        ("users_net:leaves", r"SystemExit: usage: nothing \(.*users_net.py, line 31"),
        ("hf:no/such", "no such folder, and nothing is downloaded here.*hf download no/such"),
    ),
)
def test_wrong_names(spec, message, users):
    if spec.startswith("hf"):
        pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    (
        ("def f(:\n", r"SyntaxError: .*\(.*wrong_net.py, line 1\)"),
        ("x = 1\nimport no_such_library\n", "No module named 'no_such_library'.*wrong_net.py, line 2"),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3.*wrong_net.py, line 2"),
    ),
)
def test_a_module_that_cannot_be_imported(source, message, folder):
    (folder / "wrong_net.py").write_text(source)
    with pytest.raises(ValueError, match=message):
        load_model("wrong_net:f")


def test_timm_names(monkeypatch, offline):
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="timm has no model 'resnet5'; did you mean timm:resnet50"):
        load_model("timm:resnet5")
    with pytest.raises(ValueError, match="would be downloaded"):
        load_model("timm:hf-hub:timm/resnet18.a1_in1k")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        load_model("timm:resnet18")


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_model("torchvision:resnet18")
    with pytest.raises(ImportError, match="pip install transformers"):
        load_model(f"hf:{tmp_path}")


def test_named_weights_are_the_only_download(monkeypatch):
    from torchvision.models import _api, mobilenet_v3_small

    asked: list[str] = []
    state = mobilenet_v3_small().state_dict()

    def fetch(url, *args, **kwargs):
        asked.append(url)
        if len(asked) > 1:
            raise urllib.error.URLError("no route")
        return state

    monkeypatch.setattr(_api, "load_state_dict_from_url", fetch)
    model = load_model("torchvision:mobilenet_v3_small", weights="IMAGENET1K_V1")
    assert torch.equal(model.features[0][0].weight, state["features.0.0.weight"])
    with pytest.raises(OSError, match=r"could not be downloaded .*no route.*Fetch https://.*mobilenet"):
        load_model("torchvision:mobilenet_v3_small", weights="DEFAULT")
    with pytest.raises(ValueError, match=r"neither a file nor a name.*allowed: IMAGENET1K_V1, DEFAULT"):
        load_model("torchvision:mobilenet_v3_small", weights="IMAGENET1K_V9")
    assert len(asked) == 2


def test_hugging_face_folders(tmp_path, offline):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    saved = transformers.ResNetForImageClassification(config).eval()
    whole, bare, bad = (tmp_path / name for name in ("whole", "bare", "bad"))
    for path in (whole, bad):
        saved.save_pretrained(path)
    config.save_pretrained(bare)
    (bad / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:3000])
    model = load_model(f"hf:{whole}")
    assert plain(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.state_dict().values(), strict=True))
    for spec, weights in ((f"hf:{bare}/config.json", None), (f"hf:{bare}", str(whole / "model.safetensors"))):
        assert plain(load_model(spec, weights=weights))
    with pytest.raises(ValueError, match=r"no \.safetensors file; .*config.json"):
        load_model(f"hf:{bare}")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*SafetensorError"):
        load_model(f"hf:{bad}")


def test_a_folded_file_gives_the_folded_model(users):
    assert main(["fold", "--model", "users_net:build", "--output", "folded.safetensors"]) == 0
    model = load_model("users_net:build", weights="folded.safetensors")
    expected = fold(load_model("users_net:build")).state_dict()
    assert plain(model)
    assert isinstance(model.bn1, nn.Identity)
    assert set(model.state_dict()) == set(expected) == set(load_file("folded.safetensors"))
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_arguments_of_a_network_come_behind_its_name(offline) -> None:
    model = load_model("cifar_resnet8 shortcut=C num_classes=3", arguments={"in_channels": 1})
    assert (model.shortcut, model.fc.out_features, model.conv1.in_channels) == ("C", 3, 1)
    assert load_model("resnet50 stride_in_1x1=true").layer2[0].conv1.stride == (2, 2)
    for spec, message in (
        ("cifar_resnet8 shortcut", "must be NAME=VALUE, got 'shortcut'"),
        ("cifar_resnet8 shortcut=D", "shortcut must be one of"),
        ("resnet18 stride=2", "unexpected keyword argument 'stride'"),
        ("torchvision:resnet18 shortcut=A", "torchvision has no model 'resnet18 shortcut=A'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(spec)


def test_every_command_with_a_model_takes_its_arguments(capsys) -> None:
    options = ["--model", "cifar_resnet8", "--model-kwargs", "shortcut=none", "in_channels=1"]
    assert main(["convert", *options, "--strict"]) == 0
    assert "PlainBlock" in capsys.readouterr().out
    assert main(["explain", *options, "--size", "16"]) == 0
    assert "downsample" not in capsys.readouterr().out
    for command in ("bench", "convert", "eval", "explain", "fold", "train", "tune", "verify"):
        assert main([command, "--help"]) == 0
        assert "--model-kwargs" in capsys.readouterr().out, command
    assert main(["explain", "--model-kwargs", "A"]) == 2
    assert "--model-kwargs: must be NAME=VALUE, got 'A'" in capsys.readouterr().err


def test_a_folded_file_knows_how_its_network_was_built(tmp_path: Path, capsys) -> None:
    file = tmp_path / "v1.safetensors"
    options = ["--model", "cifar_resnet8", "--model-kwargs", "shortcut=A-both"]
    assert main(["fold", *options, "--output", str(file)]) == 0
    capsys.readouterr()
    assert load_model("cifar_resnet8", weights=str(file)).shortcut == "A-both"

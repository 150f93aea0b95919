"""``tools/peer_tests.py``: a peer's own tests get converted models, and what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from resnet_triton.convert import is_converted
from tools import peer_plugin, peer_tests

torchvision = pytest.importorskip("torchvision")

#: In place of torchvision's tests: one case that builds a model, one that does not, one that is not picked.
TESTS = """
import pytest
import torch
from torchvision.models import get_model_builder

@pytest.mark.parametrize("model_fn", [get_model_builder(name) for name in ("resnet18", "alexnet")])
@pytest.mark.parametrize("dev", ["cpu", "cuda"])
def test_classification_model(model_fn, dev):
    assert model_fn(num_classes=3).eval()(torch.rand(1, 3, 32, 32)).shape == (1, 3)

def test_resnet_dilation():
    pass

def test_another():
    raise AssertionError
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_models.py").write_text(TESTS)
    return tmp_path


@pytest.mark.parametrize(
    ("peer", "folder", "message"),
    [
        (
            "timm",
            "absent",
            "is not a folder; it should be a checkout of timm: make one with: git clone --depth 1 https://",
        ),
        ("timm", ".", "is not a checkout of timm: it has no tests/test_models.py; make one with: git clone"),
        ("torchvision", "test", "is not a checkout of torchvision: it has no test/test_models.py; make one with"),
        ("keras", ".", "invalid choice: 'keras'"),
    ],
)
def test_what_is_no_checkout_is_named(peer: str, folder: str, message: str, checkout: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        peer_tests.main([peer, str(checkout / folder)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_model_is_named(checkout: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        peer_tests.main(["torchvision", str(checkout), "--models", "resnet50", "vgg16"])
    assert stop.value.code == 2
    assert "--models vgg16: allowed are resnet18, " in capsys.readouterr().err


def test_a_missing_peer_is_named(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peer_tests.importlib, "import_module", absent)
    with pytest.raises(SystemExit):
        peer_tests.main(["torchvision", str(checkout)])
    assert "torchvision cannot be imported (No module named 'torchvision'); install it: pip install" in (
        capsys.readouterr().err
    )


def test_builders_are_patched_wherever_tests_find_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models
    from torchvision.models import _api

    original = models.resnet18
    monkeypatch.setattr(_api, "BUILTIN_MODELS", dict(_api.BUILTIN_MODELS))
    monkeypatch.setattr(models, "resnet18", original)
    peer_plugin.COUNTER.clear()
    peer_plugin.patch_torchvision(["resnet18"])
    with torch.device("meta"):
        built = [models.resnet18(), models.get_model("resnet18"), models.get_model_builder("resnet18")(num_classes=2)]
    assert all(is_converted(model) and is_converted(model.layer1[0]) for model in built)
    assert (peer_plugin.COUNTER.models, peer_plugin.COUNTER.blocks) == (3, 3 * 8)
    assert models.get_model_builder("resnet18").__name__ == "resnet18", "the tests read their parameters by it"
    assert models.list_models(models) and "resnet18" in models.list_models(models)


def test_timm_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    timm, factory = pytest.importorskip("timm"), pytest.importorskip("timm.models._factory")
    for module in (timm, timm.models, factory):
        monkeypatch.setattr(module, "create_model", module.create_model)
    peer_plugin.patch_timm()
    with torch.device("meta"):
        assert is_converted(timm.create_model("resnet18").layer1[0])
        assert is_converted(timm.models.create_model("resnet18", features_only=True).layer1[0])


@pytest.mark.parametrize(
    ("function", "parameters", "picked"),
    [
        ("test_model_forward", {"model_name": "resnet18"}, True),
        ("test_model_forward", {"model_name": "resnet18.a1_in1k"}, True),
        ("test_model_forward", {"model_name": "resnet18.other"}, False),
        ("test_model_forward", {"model_name": "resnet180"}, False),
        ("test_model_load_pretrained", {"model_name": "resnet18"}, False),
        ("test_model_forward", {}, True),
    ],
)
def test_the_cases_that_are_picked(function: str, parameters: dict, picked: bool) -> None:
    item = SimpleNamespace(originalname=function, callspec=SimpleNamespace(params=parameters))
    names = {"resnet18", "resnet18.a1_in1k"}
    assert peer_plugin._is_picked(item, peer_tests.PEERS["timm"].cases, names) is picked


def test_a_case_without_a_converted_model_fails(checkout: Path, capfd) -> None:
    quiet = ["--", "-q", "-p", "no:benchmark", "-p", "no:xdist"]
    assert peer_tests.main(["torchvision", str(checkout), "--models", "resnet18", *quiet]) == 1
    lines = capfd.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("test_")}
    assert rows["test_classification_model"] == ["1", "0", "1", "8", "8"]
    assert rows["test_resnet_dilation"] == ["0", "1", "0", "0", "0"]
    assert "test_another" not in rows
    assert any("built no model with a converted residual block" in line for line in lines)

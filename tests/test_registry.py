"""``register``: names, arguments, weights and pretrained configurations in torchvision's and timm's registries."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest
import timm
import torch
import torchvision
from timm.models import _registry as timm_registry
from torch import nn
from torchvision.models import _api as torchvision_registry

import resnet_triton
from resnet_triton import models, registry
from resnet_triton.convert import is_converted
from tests import comparers

NAMES = [f"triton_{name}" for name in models.BUILDERS]


@pytest.fixture(autouse=True)
def _clean_registries() -> Iterator[None]:
    _forget()
    yield
    _forget()


def _forget() -> None:
    for name in NAMES:
        torchvision_registry.BUILTIN_MODELS.pop(name, None)
        if timm_registry._model_entrypoints.pop(name, None):
            timm_registry._clear_model_entries(name)


def converted(model: nn.Module) -> bool:
    return any(is_converted(m) for m in model.modules())


def test_register_twice_gives_the_same_names_and_builders() -> None:
    assert resnet_triton.register() == NAMES
    builders = [torchvision.models.get_model_builder(name) for name in NAMES]
    entries = [timm.models.model_entrypoint(name) for name in NAMES]
    assert resnet_triton.register() == NAMES
    assert builders == [torchvision.models.get_model_builder(name) for name in NAMES]
    assert entries == [timm.models.model_entrypoint(name) for name in NAMES]
    assert [build.__name__ for build in builders] == [build.__name__ for build in entries] == NAMES
    assert not hasattr(registry, "__all__") and not hasattr(registry, "default_cfgs")


def test_torchvisions_reference_script_builds_a_model() -> None:
    resnet_triton.register()
    model = torchvision.models.get_model("triton_resnet18", weights=None, num_classes=7)
    assert converted(model) and model.fc.out_features == 7
    for name in NAMES:
        enum = torchvision.models.get_model_weights(name)
        assert enum is torchvision.models.get_model_weights(name.removeprefix("triton_"))
    assert not set(NAMES) & set(torchvision.models.list_models(module=torchvision.models))
    with pytest.raises(ValueError, match=r"IMAGENET1K_V3.*allowed: ResNet18_Weights"):
        torchvision.models.get_model("triton_resnet18", weights="IMAGENET1K_V3")
    with pytest.raises(ValueError, match="num_classes"):
        torchvision.models.get_model("triton_resnet18", weights="DEFAULT", num_classes=7)


def test_timm_creates_its_own_network_converted() -> None:
    resnet_triton.register()
    torch.manual_seed(1)
    ours = timm.create_model("triton_resnet18", num_classes=5, in_chans=1).double().eval()
    torch.manual_seed(1)
    theirs = timm.create_model("resnet18", num_classes=5, in_chans=1).double().eval()
    assert isinstance(ours, timm.models.resnet.ResNet) and converted(ours)
    assert ours.pretrained_cfg == theirs.pretrained_cfg
    x = torch.randn(2, 1, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        comparers.same_math(ours(x), theirs(x))
    ours.reset_classifier(3)
    assert ours.double()(x).shape == (2, 3)


def test_timms_helpers_know_the_configurations() -> None:
    resnet_triton.register()
    for name in NAMES:
        plain = name.removeprefix("triton_")
        theirs = timm.models.get_pretrained_cfg(plain)
        ours = timm.models.get_pretrained_cfg(name)
        assert (ours.tag, ours.hf_hub_id, ours.url) == (theirs.tag, theirs.hf_hub_id, theirs.url), name
        assert timm.models.is_model_pretrained(name)
        assert name in timm.list_models("triton_*") and f"{name}.{ours.tag}" in timm.list_pretrained("triton_*")
    with torch.device("meta"):
        model = timm.create_model("triton_resnet50.a1_in1k")
    assert model.pretrained_cfg["tag"] == "a1_in1k"
    assert timm.data.resolve_data_config({}, model=model)["input_size"] == (3, 224, 224)


def test_timms_feature_network() -> None:
    resnet_triton.register()
    model = timm.create_model("triton_resnet18", features_only=True, out_indices=(1, 4)).double().eval()
    plain = resnet_triton.unconvert(model)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = model(x), plain(x)
    assert model.feature_info.channels() == [64, 512] and converted(model)
    for a, b in zip(ours, theirs, strict=True):
        comparers.same_math(a, b)


@pytest.mark.parametrize(("absent", "present"), [("timm", "torchvision"), ("torchvision", "timm")])
def test_one_library_is_enough(absent: str, present: str, monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, f"{absent}.models", None)
    with caplog.at_level(logging.INFO, "resnet_triton"):
        assert resnet_triton.register() == NAMES
    assert any(absent in record.message and "left out" in record.message for record in caplog.records)
    in_torchvision = NAMES[0] in torchvision_registry.BUILTIN_MODELS
    in_timm = NAMES[0] in timm_registry._model_entrypoints
    assert (in_torchvision, in_timm) == (present == "torchvision", present == "timm")


def test_no_library_is_an_error(monkeypatch) -> None:
    for library in ("torchvision", "timm"):
        monkeypatch.setitem(sys.modules, f"{library}.models", None)
    with pytest.raises(ImportError, match=r"torchvision or timm, and neither.*pip install"):
        resnet_triton.register()


def test_a_name_of_somebody_else_is_not_taken_over() -> None:
    def triton_resnet50(**kwargs):
        return None

    torchvision_registry.register_model()(triton_resnet50)
    with pytest.raises(ValueError, match=r"torchvision already has a model 'triton_resnet50'.*resnet50\(\)"):
        resnet_triton.register()
    assert "triton_resnet18" not in torchvision_registry.BUILTIN_MODELS
    assert torchvision.models.get_model_builder("triton_resnet50") is triton_resnet50

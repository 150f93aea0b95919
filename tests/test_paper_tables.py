"""Parameters and multiply-adds of every network, to the digit, as the definitions in the papers give them."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import nn

from resnet_triton.macs import multiply_adds, parameters
from resnet_triton.models import build_by_name

V1 = {"stride_in_1x1": True}

#: name, arguments, parameters, multiply-adds of one image; None where the papers' definitions give no other figure.
IMAGENET: list[tuple[str, dict, int, int | None]] = [
    ("plain18", {}, 11_515_688, 1_794_805_760),
    ("resnet18", {"shortcut": "A"}, 11_515_688, 1_794_805_760),
    ("resnet18", {}, 11_689_512, 1_814_073_344),
    ("resnet18", {"shortcut": "C"}, 12_043_816, None),
    ("plain34", {}, 21_623_848, 3_644_493_824),
    ("resnet34", {"shortcut": "A"}, 21_623_848, 3_644_493_824),
    ("resnet34", {}, 21_797_672, 3_663_761_408),
    ("resnet34", {"shortcut": "C"}, 22_716_840, None),
    ("resnet50", {}, 25_557_032, 4_089_184_256),
    ("resnet50", V1, 25_557_032, 3_857_973_248),
    ("resnet50", {"conv1_bias": True, "caffe_pool": True, **V1}, 25_557_096, 3_857_973_248),
    ("resnet50", {"shortcut": "C"}, 40_128_552, None),
    ("resnet101", {}, 44_549_160, 7_801_405_440),
    ("resnet101", V1, 44_549_160, 7_570_194_432),
    ("resnet152", {}, 60_192_808, 11_513_626_624),
    ("resnet152", V1, 60_192_808, 11_282_415_616),
    ("preact_resnet200", {}, 64_666_152, 15_007_481_856),
    ("preact_resnet200", V1, 64_666_152, 14_776_270_848),
]
CIFAR = [
    (20, 269_722, 40_551_040),
    (32, 464_154, 68_862_592),
    (44, 658_586, 97_174_144),
    (56, 853_018, 125_485_696),
    (110, 1_727_962, 252_887_680),
    (1202, 19_421_274, 2_829_238_912),
]
#: Multiply-adds known to four or five digits: the value, and its unit.
ROUNDED = {
    ("resnet18", "C"): (1_878, 1e6),
    ("resnet34", "C"): (3_831, 1e6),
    ("resnet50", "C"): (6_555, 1e6),
    ("preact_cifar_resnet164", ""): (2_445, 1e5),
}


def check(build: Callable[[], nn.Module], size: int, learned: int, products: int | None) -> int:
    with torch.device("meta"), patch("torch.Tensor.normal_", lambda self, *_, **__: self):  # there is nothing to draw
        model = build()
    assert parameters(model) == learned
    found = multiply_adds(model, (1, 3, size, size))
    assert products is None or found == products
    return found


@pytest.mark.parametrize(("name", "arguments", "learned", "products"), IMAGENET, ids=str)
def test_imagenet(name: str, arguments: dict, learned: int, products: int | None) -> None:
    found = check(lambda: build_by_name(name, **arguments), 224, learned, products)
    if products is None:
        value, unit = ROUNDED[name, arguments["shortcut"]]
        assert round(found / unit) == value


@pytest.mark.parametrize(("depth", "learned", "products"), CIFAR)
def test_cifar(depth: int, learned: int, products: int) -> None:
    """The plain nets cost what the residual ones do: shortcuts are no parameters."""
    for name in (f"cifar_resnet{depth}", f"cifar_plain{depth}")[: 2 if depth < 200 else 1]:
        check(lambda name=name: build_by_name(name), 32, learned, products)


@pytest.mark.parametrize(("depth", "learned", "products"), [(110, 1_727_962, 252_887_680), (164, 1_703_258, None)])
def test_preactivation(depth: int, learned: int, products: int | None) -> None:
    """1001 layers are in ``test_preact.py``, to the digit."""
    found = check(lambda: build_by_name(f"preact_cifar_resnet{depth}"), 32, learned, products)
    if products is None:
        value, unit = ROUNDED[f"preact_cifar_resnet{depth}", ""]
        assert round(found / unit) == value


@pytest.mark.parametrize(
    ("name", "learned", "rounded", "of_linear"),
    [("vgg16", 138_357_544, 1_547, 123_633_664), ("vgg19", 143_667_240, 1_963, 123_633_664)],
)
def test_vgg(name: str, learned: int, rounded: int, of_linear: int) -> None:
    """What the paper compares with; it gives VGG-16 without and VGG-19 with its fully connected layers."""
    torchvision = pytest.importorskip("torchvision")
    found = check(lambda: getattr(torchvision.models, name)(), 224, learned, None)
    assert round(found / 1e7) == rounded
    assert round((found - of_linear) / 1e7) == {"vgg16": 1_535, "vgg19": 1_951}[name]


def test_counting_leaves_a_model_alone_and_counts_shared_weights_once() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, shared, nn.Conv2d(4, 8, 1, bias=False)).train()
    before = [(name, value.clone()) for name, value in model.state_dict().items()]
    assert parameters(model) == 4 * 4 * 9 + 4 + 32
    assert multiply_adds(model, (2, 4, 5, 5)) == 2 * 25 * (2 * 4 * 4 * 9 + 32)
    assert model.training and model[0] is model[1]
    for (name, old), new in zip(before, model.state_dict().values(), strict=True):
        assert torch.equal(old, new), name

"""``FromUint8``: bytes as a decoder gives them against torchvision's preprocessing in front of the plain model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as transforms

import resnet_triton
from resnet_triton import convert, fold
from resnet_triton.images import MEAN, STD, FromUint8
from tests.comparers import identical, no_worse_than, same_math
from tests.networks import basics, bottlenecks, calls, randomise


def pixels(n: int = 2, h: int = 40, w: int = 32, channels: int = 3) -> Tensor:
    """``[n, h, w, channels]``, every byte value among them."""
    return torch.randint(0, 256, (n, h, w, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def expected(model: nn.Module, x: Tensor, mean=MEAN, std=STD) -> Tensor:
    """The plain model behind torchvision's transforms of NHWC bytes, in float64."""
    image = transforms.to_dtype(x.permute(0, 3, 1, 2), torch.float64, scale=True)
    # the statistics as float32, in which models keep them
    mean, std = (torch.tensor(v, dtype=torch.float32).double().tolist() for v in (mean, std))
    with torch.no_grad():
        return copy.deepcopy(model).double()(transforms.normalize(image, mean, std))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("prepare", [convert, fold, lambda model: model])
def test_equals_torchvisions_preprocessing(layout: str, prepare) -> None:
    plain = bottlenecks()
    model = FromUint8(prepare(plain), layout=layout)
    assert (model.why_not_fused() is None) == (prepare in (convert, fold))
    x = pixels()
    entering = x if layout == "NHWC" else x.permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        same_math(model(entering), expected(plain, x))
    assert calls(model, entering).get("stem", 0) == (model.why_not_fused() is None)


def test_own_statistics_and_channels() -> None:
    mean, std = (0.1, 0.5, 0.9), (0.5, 1.0, 2.0)
    plain = basics()
    with torch.no_grad():
        same_math(FromUint8(convert(plain), mean, std)(pixels()), expected(plain, pixels(), mean, std))
    grey = resnet_triton.models.cifar_resnet(8, in_channels=1).double().eval()
    model = FromUint8(grey, (0.1307,), (0.3081,))
    assert "CifarResNet is not a converted ImageNet ResNet" in str(model.why_not_fused())
    with torch.no_grad():
        same_math(model(pixels(channels=1)), expected(grey, pixels(channels=1), (0.1307,), (0.3081,)))


def test_float32_is_as_exact_as_normalising_first() -> None:
    plain = basics(dtype=torch.float32)
    x = pixels()
    with torch.no_grad():
        fused, first = FromUint8(convert(plain))(x), FromUint8(plain)(x)
    no_worse_than(fused, first, expected(plain, x))


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_timms_networks(name: str) -> None:
    plain = randomise(timm.create_model(name, num_classes=10).double())
    model = FromUint8(convert(plain))
    assert (model.why_not_fused() is None) == (name == "resnet18")  # a d-network's stem is three convolutions
    with torch.no_grad():
        same_math(model(pixels()), expected(plain, pixels()))


NOT_FUSED = {
    "hook on the model": lambda m: m.register_forward_hook(lambda *_: None),
    "hook on the stem": lambda m: m.conv1.register_forward_hook(lambda *_: None),
    "patched": lambda m: setattr(m, "forward", m.forward),
    "training": lambda m: m.bn1.train(),
    "activation": lambda m: setattr(m, "relu", nn.ReLU6()),
    "pool": lambda m: setattr(m, "maxpool", nn.Identity()),
}


@pytest.mark.parametrize("case", NOT_FUSED)
def test_what_is_not_known_is_normalised_first(case: str) -> None:
    plain = basics()
    NOT_FUSED[case](plain)
    other = basics()
    wrapped = convert(other, inplace=True)
    NOT_FUSED[case](wrapped)
    model = FromUint8(wrapped)
    assert model.why_not_fused()
    with torch.no_grad():
        same_math(model(pixels()), expected(plain, pixels()))


def test_gradients_reach_the_weights() -> None:
    plain = basics()
    model = FromUint8(convert(plain))
    model(pixels()).square().sum().backward()
    image = (pixels().permute(0, 3, 1, 2).double() / 255 - model.mean[:, None, None]) / model.std[:, None, None]
    plain(image).square().sum().backward()
    same_math(model.model.conv1.weight.grad, plain.conv1.weight.grad)


def test_casting_the_model_keeps_the_statistics_exact() -> None:
    model = FromUint8(convert(basics(dtype=torch.float32))).bfloat16()
    assert model.mean.dtype == torch.float32 and model.model.fc.weight.dtype == torch.bfloat16
    identical(model.mean, torch.tensor(MEAN))
    assert model.to("meta").std.is_meta
    assert all(key.startswith("model.") for key in model.state_dict())


def test_autocast_and_compile() -> None:
    plain, x = basics(dtype=torch.float32), pixels(2, 64, 64)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            no_worse_than(FromUint8(convert(plain))(x), FromUint8(plain)(x), expected(plain, x))
        compiled = torch.compile(FromUint8(convert(basics())), fullgraph=True, backend="aot_eager")
        same_math(compiled(x), expected(basics(), x))


def test_explain_shows_who_normalises() -> None:
    shape = (8, 224, 224, 3)
    fused = resnet_triton.explain(
        FromUint8(resnet_triton.resnet18().eval()), shape, dtype=torch.bfloat16, device="NVIDIA H200"
    )
    assert fused.rows[0].op.startswith("stem") and fused.rows[0].name == "model.conv1"
    plain = resnet_triton.unconvert(resnet_triton.resnet18().eval())
    rows = resnet_triton.explain(FromUint8(plain), shape, dtype=torch.bfloat16, device="NVIDIA H200").rows
    assert [row.op for row in rows[:5]] == ["cast", "div", "sub", "div", "cast"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": torch.relu}, TypeError, "takes an nn.Module"),
        ({"layout": "HWC"}, ValueError, r"'NHWC' or 'NCHW', got 'HWC'"),
        ({"mean": (0.5,)}, ValueError, r"one value a channel each, got mean=\(0.5,\)"),
        ({"std": (0.2, 0.2, 0.0)}, ValueError, r"std positive, got .*0.0\)"),
        ({"mean": (0.2, 0.2, float("nan"))}, ValueError, r"mean must be finite"),
    ],
)
def test_wrong_arguments(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        FromUint8(**{"model": basics(), **arguments})


@pytest.mark.parametrize(
    ("x", "came"),
    [
        (pixels().float(), r"torch.float32 \(2, 40, 32, 3\)"),
        (pixels().permute(0, 3, 1, 2), r"torch.uint8 \(2, 3, 40, 32\)"),
        (pixels()[0], r"torch.uint8 \(40, 32, 3\)"),
    ],
)
def test_wrong_images(x: Tensor, came: str) -> None:
    with pytest.raises(ValueError, match=rf"x must be uint8 images NHWC with 3 channels, got {came}"):
        FromUint8(basics())(x)

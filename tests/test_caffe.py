"""The authors' Caffe models: their layer names, their file format, and their arithmetic, written out layer by layer."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton import fold
from resnet_triton.caffe import (
    STAGES,
    caffe_names,
    caffe_resnet,
    caffe_state_dict,
    depth_of,
    read_caffemodel,
)
from resnet_triton.evaluation import CAFFE
from resnet_triton.models import Bottleneck, ResNet
from resnet_triton.weights import load_weights
from tests.comparers import identical, same_math

#: Layers of each deploy file that have weights: convolutions, BatchNorm, Scale and fc1000.
LAYERS = {50: 160, 101: 313, 152: 466}


def blobs_of(depth: int, classes: int = 10, shrink: int = 1) -> dict[str, list[np.ndarray]]:
    """Random arrays for every layer, with Caffe's sums of statistics and their factor; ``shrink`` divides widths."""
    rng = np.random.default_rng(7)
    with torch.device("meta"):
        model = ResNet(Bottleneck, STAGES[depth], num_classes=classes, conv1_bias=depth == 50)
    state, blobs = model.state_dict(), {}
    for layer, module in caffe_names(depth).items():
        shape = tuple(max(size // shrink, 1) for size in state[f"{module}.weight"].shape)
        width = shape[0]
        if layer.startswith("bn"):
            factor = rng.uniform(100, 1000)
            mean, var = rng.normal(0, 0.2, width), rng.uniform(0.5, 1.5, width)
            arrays = [mean * factor, var * factor, np.array([factor])]
        elif layer.startswith("scale"):
            arrays = [rng.uniform(0.2, 1, width), rng.normal(0, 0.2, width)]
        else:
            arrays = [rng.standard_normal(shape, dtype=np.float32) * np.float32(2 / np.prod(shape[1:])) ** 0.5]
            if f"{module}.bias" in state:
                arrays.append(rng.normal(0, 0.5, width))
        blobs[layer] = [np.asarray(array, np.float32) for array in arrays]
    return blobs


def caffe_forward(blobs: dict[str, list[np.ndarray]], x: Tensor) -> Tensor:
    """The deploy file of ResNet-50, layer by layer, in fp64."""

    def conv(x: Tensor, layer: str, stride: int = 1, pad: int = 0) -> Tensor:
        weight, *bias = (torch.from_numpy(array).double() for array in blobs[layer])
        return F.conv2d(x, weight, *bias, stride=stride, padding=pad)

    def bn_scale(x: Tensor, layer: str) -> Tensor:
        mean, var, factor = (torch.from_numpy(array).double() for array in blobs[f"bn{layer}"])
        gamma, beta = (torch.from_numpy(array).double().view(-1, 1, 1) for array in blobs[f"scale{layer}"])
        x = (x - (mean / factor).view(-1, 1, 1)) / (var / factor + 1e-5).sqrt().view(-1, 1, 1)
        return x * gamma + beta

    x = bn_scale(conv(x, "conv1", 2, 3), "_conv1").relu()
    # Caffe's pool1: no padding, and a last window that may hang over the edge.
    right = -(x.shape[-1] - 3) % 2
    below = -(x.shape[-2] - 3) % 2
    x = F.max_pool2d(F.pad(x, (0, right, 0, below), value=-torch.inf), 3, 2)
    for stage in "2345":
        for letter in (a for a in "abcdef" if f"res{stage}{a}_branch2a" in blobs):
            block = f"{stage}{letter}_branch"
            stride = 2 if stage != "2" and letter == "a" else 1
            h = bn_scale(conv(x, f"res{block}2a", stride), f"{block}2a").relu()
            h = bn_scale(conv(h, f"res{block}2b", 1, 1), f"{block}2b").relu()
            h = bn_scale(conv(h, f"res{block}2c"), f"{block}2c")
            if letter == "a":
                x = bn_scale(conv(x, f"res{block}1", stride), f"{block}1")
            x = (h + x).relu()
    weight, bias = (torch.from_numpy(array).double() for array in blobs["fc1000"])
    return F.linear(x.mean((2, 3)), weight, bias)


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def message(number: int, content: bytes) -> bytes:
    """A field of bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def blob_proto(array: np.ndarray, old: bool = False, packed: bool = True, doubles: bool = False) -> bytes:
    """BlobProto of caffe.proto: today's shape (field 7) or num, channels, height, width (1 to 4); fp32 or fp64."""
    if old:
        shape = b"".join(varint(i << 3) + varint(n) for i, n in enumerate((1,) * (4 - array.ndim) + array.shape, 1))
    elif packed:
        shape = message(7, message(1, b"".join(map(varint, array.shape))))
    else:
        shape = message(7, b"".join(varint(1 << 3) + varint(n) for n in array.shape))
    if doubles:
        return shape + message(8, array.astype("<f8").tobytes())
    if not packed:
        return shape + b"".join(varint(5 << 3 | 5) + struct.pack("<f", value) for value in array.ravel())
    return shape + message(5, array.astype("<f4").tobytes())


def caffemodel(blobs: dict[str, list[np.ndarray]], v1: bool = False, **options: bool) -> bytes:
    """NetParameter: a name, and layers in field 100, or V1 layers in field 2."""
    name, kind, arrays, layer = (4, 5, 6, 2) if v1 else (1, 2, 7, 100)
    net = message(1, b"ResNet-50") + message(3, b"data") + varint(4 << 3) + varint(224)
    for key, values in {"input": [], **blobs, "relu": []}.items():
        content = message(name, key.encode()) + (varint(kind << 3) + varint(4) if v1 else message(kind, b"Type"))
        content += varint(10 << 3) + varint(1) + varint(42 << 3 | 5) + bytes(4) + varint(43 << 3 | 1) + bytes(8)
        net += message(layer, content + b"".join(message(arrays, blob_proto(a, **options)) for a in values))
    return net


@pytest.mark.parametrize("depth", STAGES)
def test_names_cover_the_network(depth: int) -> None:
    names = caffe_names(depth)
    assert len(names) == LAYERS[depth]
    with torch.device("meta"):
        model = ResNet(Bottleneck, STAGES[depth])
    modules = {key.rpartition(".")[0] for key in model.state_dict()}
    assert set(names.values()) == modules
    assert names["res2a_branch1"] == "layer1.0.downsample.0" and names["bn2a_branch1"] == "layer1.0.downsample.1"
    last = {50: ("res4f_branch2c", "layer3.5.conv3"), 101: ("res4b22_branch2c", "layer3.22.conv3")}
    layer, module = last.get(depth, ("res3b7_branch2c", "layer2.7.conv3"))
    assert names[layer] == module and names["scale5c_branch2b"] == "layer4.2.bn2"
    assert depth_of({layer: [1] for layer in names}) == depth


def test_other_depths_have_no_names() -> None:
    with pytest.raises(ValueError, match=r"depth=34: .* 50, 101, 152"):
        caffe_names(34)
    with pytest.raises(ValueError, match="depth=18"):
        caffe_resnet(18)


@pytest.fixture
def blobs(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """ResNet-50 with fewer blocks of each kind: its last stages have most of its 25 million weights."""
    monkeypatch.setitem(STAGES, 50, (2, 2, 1, 1))
    return blobs_of(50)


def test_parameters_are_those_of_the_deploy_file() -> None:
    with torch.device("meta"):
        counts = {depth: sum(p.numel() for p in caffe_resnet(depth).parameters()) for depth in STAGES}
    # torchvision's, and 64 for the bias of ResNet-50's conv1
    assert counts == {50: 25_557_032 + 64, 101: 44_549_160, 152: 60_192_808}


def test_resnet_50_is_the_deploy_file_layer_by_layer(blobs: dict[str, list[np.ndarray]], tmp_path: Path) -> None:
    path = tmp_path / "ResNet-50-model.caffemodel"
    path.write_bytes(caffemodel(blobs))
    model = caffe_resnet(50, path).eval()
    assert model.fc.out_features == 10
    images = torch.randint(0, 256, (1, 3, 46, 63), dtype=torch.uint8)
    x = CAFFE(images).double()
    expected = caffe_forward(blobs, x)
    model = model.double()
    # Statistics are divided in fp32 when they are read, so they are compared as they were stored.
    for layer, module in caffe_names(50).items():
        if layer.startswith("bn"):
            mean, var, factor = (torch.from_numpy(array) for array in blobs[layer])
            bn = model.get_submodule(module)
            identical(bn.running_mean.float(), mean / factor)
            identical(bn.running_var.float(), var / factor)
            bn.running_mean.copy_(mean.double() / factor.double())
            bn.running_var.copy_(var.double() / factor.double())
    with torch.no_grad():
        same_math(model(x), expected)
        same_math(fold(model)(x), expected)


def test_a_state_dict_is_taken_too(blobs: dict[str, list[np.ndarray]]) -> None:
    model = caffe_resnet(50, caffe_state_dict(blobs), num_classes=10)
    identical(model.conv1.bias.detach(), torch.from_numpy(blobs["conv1"][1]))


SMALL = {
    "conv1": [np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2), np.array([0.5, -1.5], np.float32)],
    "bn_conv1": [np.array([2.0, 4.0], np.float32), np.array([6.0, 8.0], np.float32), np.array([2.0], np.float32)],
    "fc1000": [np.arange(6, dtype=np.float32).reshape(3, 2), np.zeros(3, np.float32)],
}


@pytest.mark.parametrize("v1", [False, True])
@pytest.mark.parametrize("options", [{}, {"old": True}, {"packed": False}, {"doubles": True}], ids=str)
def test_every_form_of_the_file(v1: bool, options: dict[str, bool], tmp_path: Path) -> None:
    path = tmp_path / "small.caffemodel"
    path.write_bytes(caffemodel(SMALL, v1, **options))
    found = read_caffemodel(path)
    assert list(found) == list(SMALL)
    for layer, arrays in SMALL.items():
        for got, expected in zip(found[layer], arrays, strict=True):
            assert got.dtype == np.float32
            shape = (1,) * (4 - expected.ndim) + expected.shape if options.get("old") else expected.shape
            assert np.array_equal(got, expected.reshape(shape))


def test_old_shapes_of_four_dimensions_are_flattened() -> None:
    blobs = blobs_of(50, shrink=64)
    for layer, arrays in blobs.items():
        blobs[layer] = [a.reshape((1,) * (4 - a.ndim) + a.shape) for a in arrays]
    state = caffe_state_dict(blobs)
    assert state["fc.weight"].dim() == 2 and state["layer1.0.bn1.running_var"].dim() == 1
    assert {len(value.shape) for key, value in state.items() if key.endswith("bias")} == {1}


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    whole, path, random = caffemodel(SMALL), tmp_path / "w.caffemodel", Random(0)
    for share in (0.2, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=r"w\.caffemodel.*truncated, corrupt or no \.caffemodel"):
            read_caffemodel(path)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.randrange(len(whole))] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            read_caffemodel(path)
        except ValueError as error:
            assert "w.caffemodel" in str(error)


@pytest.mark.parametrize(
    "content",
    [
        b"\x00" * 64,
        b"<!DOCTYPE html><html>404</html>",
        varint(100 << 3 | 2) + varint(1 << 62) + b"x",  # a length beyond the file
        b"\xff" * 40,  # a number that does not end
        message(100, message(1, b"a") + message(7, message(7, message(1, varint(1 << 40))) + message(5, bytes(40)))),
        message(100, message(1, b"a") + varint(7 << 3) + b"\x01"),  # a number where an array must be
        message(100, message(1, b"\xff\xfe") + message(7, message(7, b"") + message(5, b""))),
    ],
    ids=("zeros", "html", "length", "varint", "shape", "kind", "text"),
)
def test_something_else_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.caffemodel"):
        read_caffemodel(path)


def test_no_file_and_no_layers(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        caffe_resnet(50, tmp_path / "none.caffemodel")
    (tmp_path / "empty.caffemodel").write_bytes(caffemodel({}))
    with pytest.raises(ValueError, match="holds no layer with weights"):
        read_caffemodel(tmp_path / "empty.caffemodel")
    (tmp_path / "twice.caffemodel").write_bytes(caffemodel(SMALL) + caffemodel(SMALL))
    with pytest.raises(ValueError, match="two layers 'conv1'"):
        read_caffemodel(tmp_path / "twice.caffemodel")


@pytest.fixture(scope="module")
def narrow() -> dict[str, list[np.ndarray]]:
    """Every layer of ResNet-50 with few filters: enough for what is checked before a network is built."""
    return blobs_of(50, shrink=64)


MISFITS = {
    "missing": (
        lambda b: {k: v for k, v in b.items() if k != "res3b_branch2a"},
        r"1 missing layers \(res3b_branch2a\)",
    ),
    "unknown": (lambda b: {**b, "fc_new": b["fc1000"]}, r"1 unknown layers with weights \(fc_new\)"),
    "empty_layer": (lambda b: {**b, "bn5c_branch2c": []}, r"missing layers \(bn5c_branch2c\)"),
    "two_arrays": (lambda b: {**b, "bn2a_branch1": b["bn2a_branch1"][:2]}, "'bn2a_branch1' has 2 arrays.*factor"),
    "no_beta": (lambda b: {**b, "scale_conv1": b["scale_conv1"][:1]}, "'scale_conv1' has 1 arrays.*gamma and beta"),
    "three": (lambda b: {**b, "conv1": b["conv1"] * 2}, "'conv1' has 4 arrays.*a weight"),
    "factor": (
        lambda b: {**b, "bn_conv1": [*b["bn_conv1"][:2], np.zeros(1, np.float32)]},
        "'bn_conv1' has a factor of 0",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused(case: str, narrow: dict[str, list[np.ndarray]]) -> None:
    change, error = MISFITS[case]
    with pytest.raises(ValueError, match=error):
        caffe_resnet(50, change(narrow))


def test_other_depths_and_shapes_are_refused(narrow: dict[str, list[np.ndarray]]) -> None:
    with pytest.raises(ValueError, match="depth=101, but the weights are of the Caffe ResNet-50"):
        caffe_resnet(101, narrow)
    with pytest.raises(ValueError, match=r"does not fit ResNet: .*conv1.weight \(1, 1, 1, 1\) instead of"):
        caffe_resnet(50, narrow)


def test_load_weights_reads_the_file_too(blobs: dict[str, list[np.ndarray]], tmp_path: Path) -> None:
    path = tmp_path / "w.caffemodel"
    options = {"stride_in_1x1": True, "caffe_pool": True, "conv1_bias": True}
    path.write_bytes(caffemodel(blobs))
    model = ResNet(Bottleneck, STAGES[50], num_classes=10, **options)
    report = load_weights(model, path)
    assert report is not None and set(report.state) == {k for k in model.state_dict() if not k.endswith("tracked")}
    identical(model.conv1.bias.detach(), torch.from_numpy(blobs["conv1"][1]))
    for wrong in ({**options, "stride_in_1x1": False}, {**options, "caffe_pool": False}):
        with pytest.raises(ValueError, match=r"w\.caffemodel.*caffe_resnet, or with stride_in_1x1=True"):
            load_weights(ResNet(Bottleneck, STAGES[50], num_classes=10, **wrong), path)

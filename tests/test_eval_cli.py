"""``resnet-triton eval`` as a user meets it: the networks, images and protocols that it takes, and what it refuses.

Each test runs in an empty folder that holds one module of the user and a few images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from resnet_triton.cli import main
from resnet_triton.evaluation import Dense, OneCrop, Pixels, TenCrop, evaluate
from resnet_triton.evaluation.images import load_images
from resnet_triton.runs import data
from resnet_triton.sources import load_model

USERS_MODULE = """
import torch
from torch import nn
from resnet_triton import models

def net(classes=2, channels=3):
    torch.manual_seed(3)
    model = models.CifarResNet(8, classes, channels)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model

def grey():
    return net(10, 1)

def ten():
    return net(10)

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(16, 10))
"""
NET = ("--model", "users_eval_net:net")
FILES = ("--data", "imagefolder:photos", "--device", "cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with one module of the user, which is forgotten after the test, and photos/val."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "users_eval_net.py").write_text(USERS_MODULE)
    random = np.random.RandomState(0)
    for i in range(6):
        path = tmp_path / "photos" / "val" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (40 + 3 * i, 50, 3), dtype=np.uint8)).save(path)
    yield tmp_path
    sys.modules.pop("users_eval_net", None)


def answered(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Runs a command with --json; what it printed."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs what must be refused: exit code 2, nothing on stdout, and a last line on stderr that says why."""
    assert main(["eval", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "protocol"),
    (
        ((), OneCrop(32, 37)),
        (("--resize", "32"), OneCrop(32, 32)),
        (("--protocol", "10-crop", "--resize", "40", "--batch", "7"), TenCrop(32, 40)),
        (("--protocol", "dense", "--scales", "32", "48"), Dense((32, 48), 32)),
        (("--protocol", "dense", "--average", "logits", "--dtype", "bf16"), Dense((32, 37, 55, 69, 91), 32)),
    ),
)
def test_protocols(options, protocol, capsys):
    found = answered(capsys, "eval", *NET, *FILES, "--size", "32", *options, "--workers", "0")
    model = load_model("users_eval_net:net")
    if "bf16" in options:
        model.bfloat16()
    images = load_images("imagefolder:photos")
    expected = evaluate(model, images.images, protocol, average=found["average"]).errors
    assert found["top1_error"] == expected.top1 and found["top5_error"] is None
    assert (found["images"], found["classes"], found["protocol"]) == (6, 2, protocol.name)
    assert found["views"] == str(protocol) and found["views_per_image"] == protocol.count
    assert found["source"] == "the 6 images in 2 folders of photos/val"


def test_text_of_an_ensemble(folder, capsys):
    torch.save(load_model("users_eval_net:net").state_dict(), "a.pth")
    state = {
        key: value.flip(0).contiguous()
        for key, value in load_model("users_eval_net:net").state_dict().items()
        if value.dim()
    }
    save_file({**load_model("users_eval_net:net").state_dict(), **state}, "b.safetensors")
    weights = ("--weights", "a.pth", "--weights", "b.safetensors")
    assert main(["eval", *NET, *weights, *FILES, "--size", "32", "--workers", "0"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[:3] == [
        "the 6 images in 2 folders of photos/val, fp32 on cpu",
        "1-crop: shorter side 37, centre crop of 32; softmax, averaged",
        "pixels: RGB, 0 to 1, minus (0.485, 0.456, 0.406), over (0.229, 0.224, 0.225)",
    ]
    assert [line.partition("  ")[0] for line in lines[5:]] == [
        "users_eval_net:net, a.pth",
        "users_eval_net:net, b.safetensors",
        "ensemble of 2",
    ]
    both = answered(
        capsys, "eval", *NET, "--weights", "a.pth", *NET, "--weights", "b.safetensors", *FILES, "--size", "32"
    )
    assert [net["weights"] for net in both["networks"]] == ["a.pth", "b.safetensors"]
    one = answered(capsys, "eval", *NET, "--weights", "b.safetensors", *FILES, "--size", "32")
    assert one["top1_error"] == both["networks"][1]["top1_error"]


def test_arguments_of_a_network_belong_to_the_model_before_them(capsys):
    arguments = (
        "--model",
        "cifar_resnet8",
        "--model-kwargs",
        "num_classes=2",
        "shortcut=B",
        *NET,
        *FILES,
        "--size",
        "32",
    )
    found = answered(capsys, "eval", *arguments)
    names = [net["model"] for net in found["networks"]]
    assert names == ["cifar_resnet8 num_classes=2 shortcut=B", "users_eval_net:net"]
    assert main(["eval", *arguments]) == 0
    out, err = capsys.readouterr()
    assert f"{names[0]}  " in out
    assert err == f"{names[0]} has random weights (--weights loads real ones)\n"


def test_caffe_pixels_and_a_limit(capsys):
    found = answered(
        capsys, "eval", *NET, *FILES, "--size", "32", "--caffe", "--mean", "100", "110", "120", "--limit", "2"
    )
    assert found["pixels"] == "BGR, 0 to 255, minus (100, 110, 120), over (1, 1, 1)"
    assert (found["images"], found["source"]) == (2, "2 of the 6 images in 2 folders of photos/val")
    images = load_images("imagefolder:photos").images
    pixels = Pixels((100, 110, 120), (1, 1, 1), bgr=True, scale=1)
    pair = [images[0], images[3]]
    assert (
        found["top1_error"]
        == evaluate(load_model("users_eval_net:net"), pair, OneCrop(32, 37), pixels=pixels).errors.top1
    )


def test_small_data_are_tested_as_they_are(capsys):
    pytest.importorskip("sklearn")
    found = answered(capsys, "eval", "--model", "users_eval_net:grey", "--data", "digits", "--device", "cpu")
    assert (found["images"], found["protocol"], found["pixels"]) == (359, "plain", "normalised by the data")
    assert 0.5 < found["top1_error"] <= 1 and found["top5_error"] < found["top1_error"]
    assert "allowed: plain" in refused(capsys, *NET, "--data", "digits", "--protocol", "dense")
    assert "normalised already" in refused(capsys, *NET, "--data", "digits", "--mean", "0.5")


def test_bytes_of_small_images_are_normalised_as_the_weights_need_it(monkeypatch, capsys):
    pixels = torch.arange(4 * 8 * 8 * 3).remainder(251).byte().view(4, 8, 8, 3)
    labels = torch.tensor([1, 2, 3, 4])

    class Split:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, request: data.Request) -> tuple[Tensor, Tensor]:
            return pixels[list(request.indices)], labels[list(request.indices)]

        def set_channels(self, channels: int) -> None:
            assert channels == 3

    normalisation = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    found = data.Data("cifar10", Split(), Split(), tuple("0123456789"), "", normalisation)
    monkeypatch.setattr(data, "load_data", lambda spec, size, seed, recipe, uint8: found)
    arguments = ("eval", "--model", "users_eval_net:ten", "--data", "cifar10:files", "--device", "cpu")
    model = load_model("users_eval_net:ten")
    for options, (mean, std) in (
        ((), normalisation),
        (
            ("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"),
            ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ),
    ):
        report = answered(capsys, *arguments, *options)
        x = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            wrong = model(x).argmax(1) != labels
        assert report["top1_error"] == wrong.float().mean()
        assert f"minus ({mean[0]:g}, " in report["pixels"]


def test_a_run_is_evaluated_as_it_was_tested(folder, capsys):
    pytest.importorskip("sklearn")
    train = ("train", "--data", "digits", "--model", "users_eval_net:Small", "--size", "8", "--batch-size", "256")
    trained = answered(capsys, *train, "--epochs", "2", "--output", "run", "--device", "cpu")
    found = answered(capsys, "eval", "--run", "run", "--device", "cpu")
    assert found["top1_error"] == trained["test_error"]
    network = found["networks"][0]
    assert (network["checkpoint"], network["averaged_weights"]) == ("epoch-0002-step-0000000", False)
    best = answered(capsys, "eval", "--run", "run", "--best", "--device", "cpu")
    assert best["top1_error"] == trained["best"]["test_error"]
    averaged = answered(capsys, *train, "--epochs", "1", "--ema", "0.5", "--output", "ema", "--device", "cpu")
    assert main(["eval", "--run", "run", "--run", "ema", "--device", "cpu"]) == 0
    rows = capsys.readouterr().out.splitlines()[5:]
    assert rows[1].startswith("ema at epoch-0001-step-0000000, averaged weights")
    assert f"{averaged['ema_test_error']:.2%}" in rows[1]
    assert rows[2].startswith("ensemble of 2")
    assert "have 3 channels, the model takes 1" in refused(capsys, "--run", "run", *FILES)
    assert "follows --run run; it belongs behind its --model" in refused(capsys, "--run", "run", "--weights", "a.pth")


def test_what_is_refused(folder, capsys):
    for message, arguments in (
        ("--data is missing; allowed: digits", NET),
        ("'cifar' is not known", (*NET, "--data", "cifar")),
        ("allowed: 1-crop, 10-crop, dense", (*NET, *FILES, "--protocol", "plain")),
        ("--protocol dense does not take --resize", (*NET, *FILES, "--protocol", "dense", "--resize", "40")),
        ("--protocol 1-crop does not take --scales", (*NET, *FILES, "--scales", "40")),
        ("a crop of 32 pixels is not in an image", (*NET, *FILES, "--size", "32", "--resize", "30")),
        ("scales of at least size=32", (*NET, *FILES, "--size", "32", "--protocol", "dense", "--scales", "30")),
        ("one number a channel each", (*NET, *FILES, "--mean", "0.5")),
        ("scores 10 classes, the images have 2", ("--model", "users_eval_net:ten", *FILES, "--size", "32")),
        ("have 3 channels, the model takes 1", ("--model", "users_eval_net:grey", *FILES)),
        ("take images of 1 and 3 channels", (*NET, "--model", "users_eval_net:grey", *FILES)),
        ("there is no checkpoint in", ("--run", "nothing")),
        ("must be NAME=VALUE, got 'A'", ("--model", "cifar_resnet8", "--model-kwargs", "A", *FILES)),
        ("no such file", (*NET, "--weights", "none.pth", *FILES)),
    ):
        assert message in refused(capsys, *arguments)
    (folder / "photos" / "val" / "cat" / "0.png").write_bytes(b"no image")
    assert "0.png' cannot be read" in refused(capsys, *NET, *FILES, "--size", "32", "--workers", "1")

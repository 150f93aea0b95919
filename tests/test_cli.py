"""The command line as a user meets it: exit codes, what goes to stdout and stderr, JSON, and hostile files.

Each test runs in an empty folder that holds one module of the user, a small residual network.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from resnet_triton import __version__, cli, convert, fold
from resnet_triton.cli import common, image_files, main, verify
from resnet_triton.results import FAILED, WRONG
from resnet_triton.sources import load_model

USERS_MODULE = """
import torch
from torch import nn
from resnet_triton import models

def net():
    torch.manual_seed(3)
    model = models.CifarResNet(8)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_mean, -0.3, 0.3)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model

def grouped():
    return models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=3, groups=32, width_per_group=1)

def extra():
    model = net()
    model.fc = nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 3))
    return model

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

class Detector(nn.Module):
    def forward(self, x):
        return {"boxes": x.mean((0, 2, 3)), "scores": x.mean()}

class Branching(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else -x
"""
NET = ("--model", "users_cli_net:net")
SMALL = (*NET, "--size", "32", "--limit", "4", "--device", "cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with one module of the user, which is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "users_cli_net.py").write_text(USERS_MODULE)
    yield tmp_path
    sys.modules.pop("users_cli_net", None)


def photos(folder: Path, count: int = 5) -> Path:
    """A folder like torchvision's ImageFolder, with grey, transparent and hidden files too."""
    random = np.random.RandomState(0)
    for i in range(count):
        path = folder / "photos" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
    Image.new("L", (40, 60), 90).save(folder / "photos" / "grey.png")
    Image.new("RGBA", (64, 40), (9, 99, 199, 50)).save(folder / "photos" / "transparent.webp")
    (folder / "photos" / "._0.jpg").write_bytes(b"left by a file manager")
    (folder / "photos" / "notes.txt").write_text("not an image")
    return folder / "photos"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs what must be refused: exit code 2, nothing on stdout, and a last line on stderr that says why."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


# The root


def test_commands_have_help_with_an_example_that_is_accepted(capsys):
    order = ["info", "explain", "tune", "bench", "verify", "fold", "convert", "train", "eval", "detect", "experiment"]
    assert list(cli.COMMANDS) == order
    for name in order:
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        module = sys.modules[f"resnet_triton.cli.{name}"]
        assert f"example:\n  {module.EXAMPLE}\n" in out
        assert "--json" in out
        program, *words = shlex.split(module.EXAMPLE)
        assert program == "resnet-triton"
        assert cli.parser().parse_args(words).command == name


def test_version_and_wrong_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"resnet-triton {__version__}\n"
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "explain" in err and err.startswith("usage:")
    assert refused(capsys, "verfy") == "resnet-triton: no command 'verfy'; did you mean verify?"
    assert "--nonsense" in refused(capsys, "info", "--nonsense")
    assert "must be an integer above 0, got '0'" in refused(capsys, "explain", "--batch", "0")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    (
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"), 2, "use a smaller --batch"),
        (NotImplementedError("not so"), 2, "not so"),
    ),
)
def test_what_ends_a_command(error, code, message, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr("resnet_triton.cli.common.load_model", fails)
    assert main(["explain", *NET]) == code
    assert message in capsys.readouterr().err


def test_the_module_runs_from_an_empty_folder_into_a_pipe_that_closes(folder):
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "resnet_triton", "explain", *NET, "--size", "32", "--batch", "2"]
    env = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "80"}
    child = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait(60) == cli.BROKEN_PIPE


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("resnet_triton.cli.common.load_model", lambda *a, **k: [].pop())
    with pytest.raises(IndexError):
        main(["explain"])


# info, explain


def test_info_as_text_and_json(capsys):
    assert main(["info"]) == 0
    assert "kernels" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["resnet-triton"] == __version__


def test_explain_shapes(capsys):
    assert main(["explain", *NET, "--size", "32", "48", "--batch", "3", "--dtype", "bf16", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["input_shape"] == [3, 3, 32, 48]
    assert plan["dtype"] == "bfloat16"
    assert main(["explain", "--model", "mnist5k_resnet20", "--input-size", "28", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_shape"] == [1, 1, 28, 28]
    assert "height and a width, got 3" in refused(capsys, "explain", *NET, "--size", "1", "2", "3")
    assert "known" in refused(capsys, "explain", *NET, "--device", "NVIDIA H2000")
    assert "x has 4 channels" in refused(capsys, "explain", *NET, "--channels", "4")


def test_explain_draws(folder, capsys):
    pytest.importorskip("matplotlib")
    assert main(["explain", *NET, "--size", "32", "--plot", "plan.png"]) == 0
    assert "layer3.0" in capsys.readouterr().out
    assert Image.open(folder / "plan.png").size[0] > 100
    assert ".gif" in refused(capsys, "explain", *NET, "--size", "32", "--plot", "plan.gif")


# verify


def test_verify_agrees_on_images_of_the_user(folder, capsys):
    photos(folder)
    assert main(["verify", *SMALL, "--images", "photos", "--batch", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert facts["agrees"] and facts["top1_changed"] == []
    assert (facts["images"], facts["size"], facts["source"]) == (4, [32, 32], "4 of the 7 images in photos")
    assert [row["name"] for row in facts["rows"]] == ["eager", "ours", "ours folded"]
    for row in facts["rows"]:
        assert 0 < row["rms_error"] <= row["largest_error"] < 1e-5
        assert row["top1_float64"] == row["top1_eager"] == 1
    assert err == ""


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_verify_needs_no_images(dtype, capsys):
    assert main(["verify", *SMALL, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    assert "the outputs agree" in out
    assert "photographs" in out or "smooth patterns" in out


def test_verify_without_scikit_learn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert main(["verify", *SMALL]) == 0
    assert "smooth patterns" in capsys.readouterr().out


def test_verify_says_that_weights_are_random_and_leaves_given_ones(capsys):
    arguments = ["verify", "--model", "users_cli_net:grouped", "--size", "32", "--limit", "2", "--batch", "2"]
    assert main(arguments) == 0
    assert "has random weights" in capsys.readouterr().err
    torch.save(load_model("users_cli_net:grouped").state_dict(), "given.pth")
    assert main([*arguments, "--weights", "given.pth"]) == 0
    assert capsys.readouterr().err == ""


def test_verify_takes_grey_images_and_models_without_blocks(capsys):
    for model, size in (("mnist5k_resnet20", "28"), ("users_cli_net:plain", "16")):
        assert main(["verify", "--model", model, "--size", size, "--limit", "3", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["size"] == [int(size)] * 2


def wrong(model: nn.Module) -> nn.Module:
    """A conversion with a fault: one logit is too large in the second image."""
    model = convert(model)

    def hook(module, args, out):
        out[1:2, 0] += 9

    model.register_forward_hook(hook)
    return model


def test_verify_finds_a_wrong_output(monkeypatch, capsys):
    monkeypatch.setattr(verify, "convert", wrong)
    assert main(["verify", *SMALL, "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert [row["status"] == "ok" for row in facts["rows"]] == [True, False, True]
    assert facts["rows"][1]["status"].startswith(f"{WRONG}: RMS error")
    assert facts["top1_changed"] == ["image 1"]
    assert facts["rows"][1]["top1_eager"] == 0.75
    assert main(["verify", *SMALL]) == 1
    assert "the outputs differ by more than rounding explains" in capsys.readouterr().out


def test_verify_reports_a_conversion_that_fails_or_overflows(monkeypatch, capsys):
    def fails(model):
        raise RuntimeError("no kernel\nlong story")

    monkeypatch.setattr(verify, "convert", fails)
    monkeypatch.setattr(verify, "fold", lambda model: nn.Sequential(fold(model), nn.Threshold(1e9, float("nan"))))
    assert main(["verify", *SMALL, "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[1]["status"] == f"{FAILED}: RuntimeError: no kernel"
    assert rows[2]["status"].startswith(f"{WRONG}: NaN")
    assert rows[2]["rms_error"] is None


def test_verify_refuses_what_it_cannot_compare(folder, capsys):
    photos(folder)
    (folder / "empty").mkdir()
    bad = folder / "photos" / "class1" / "9.jpg"
    bad.write_bytes((folder / "photos" / "class0" / "0.jpg").read_bytes()[:700])
    message = refused(capsys, "verify", *SMALL, "--images", "photos", "--limit", "99")
    assert "9.jpg' cannot be read (image file is truncated" in message
    bad.write_text("not a JPEG")
    assert "9.jpg' cannot be read" in refused(capsys, "verify", *SMALL, "--images", "photos", "--limit", "99")
    assert "holds no image; looked for .jpg" in refused(capsys, "verify", *SMALL, "--images", "empty")
    assert "there is no such folder" in refused(capsys, "verify", *SMALL, "--images", "nowhere")
    assert "entry an image" in refused(capsys, "verify", "--model", "users_cli_net:Detector", "--size", "16")
    assert "fails on these images: RuntimeError" in refused(capsys, "verify", *SMALL, "--channels", "1")
    assert "3 channels or 1, the model takes 4" in refused(capsys, "verify", *SMALL, "--channels", "4")
    assert "is no device; allowed: cpu" in refused(capsys, "verify", *NET, "--device", "tpu7")
    if not torch.cuda.is_available():
        assert "there are 0 CUDA devices" in refused(capsys, "verify", *NET, "--device", "cuda")


def test_an_original_that_overflows_is_not_compared(monkeypatch, capsys):
    def large(*args, **kwargs):
        model = load_model("users_cli_net:net")
        nn.init.constant_(model.fc.bias, 1e6)
        return model

    monkeypatch.setattr(common, "load_model", large)
    assert "overflows in torch.float16" in refused(capsys, "verify", *SMALL, "--dtype", "fp16")


def test_images_are_prepared_as_torchvision_does(folder):
    from torchvision import transforms

    for size, crop in (((70, 50), 32), ((133, 500), 64), ((48, 48), 33)):
        image = Image.fromarray(np.random.RandomState(1).randint(0, 256, (*size, 3), dtype=np.uint8))
        steps = (transforms.Resize(round(crop * 256 / 224)), transforms.CenterCrop(crop), transforms.ToTensor())
        normalise = transforms.Normalize(image_files.MEAN, image_files.STD)
        expected = transforms.Compose([*steps, normalise])(image)
        assert torch.equal(image_files.evaluated(image, 3, crop, crop), expected)
    assert image_files.evaluated(image, 3, 20, 40).shape == (3, 20, 40)


def test_built_in_images_differ_and_repeat():
    for make in (image_files.photographs, image_files.waves):
        images = make(20, 3, 16, 24)
        if images is not None:
            assert images.shape == (20, 3, 16, 24)
            assert len({tuple(image.flatten().tolist()) for image in images}) == 20
            assert torch.equal(images, make(20, 3, 16, 24))


def test_a_limit_spreads_over_the_folder():
    assert image_files.spread([*range(10)], 4) == [0, 2, 5, 7]
    assert image_files.spread([1, 2], 4) == [1, 2]


# Weights that must be refused, by every command alike


def test_hostile_weights(folder, capsys):
    torch.save(load_model("users_cli_net:net"), "whole.pth")
    main(["fold", *NET, "--output", "folded.safetensors"])
    capsys.readouterr()
    (folder / "cut.safetensors").write_bytes((folder / "folded.safetensors").read_bytes()[:999])
    (folder / "empty.pth").touch()
    (folder / "folder.safetensors").mkdir()
    for name, message in (
        ("whole.pth", "safetensors.torch.save_file(state_dict"),
        ("cut.safetensors", "truncated, corrupt"),
        ("empty.pth", "truncated, corrupt"),
        ("missing.pth", "no such file"),
        ("folder.safetensors", "not a file"),
        ("weights.onnx", "extension"),
    ):
        assert message in refused(capsys, "convert", *NET, "--weights", name)


# fold


def test_fold_writes_weights_that_load(folder, capsys):
    assert main(["fold", *NET, "--output", "folded.safetensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["folded"]) == 7 and facts["not_folded"] == {}
    assert [path.name for path in folder.glob("*folded*")] == ["folded.safetensors"]
    assert facts["bytes"] == (folder / "folded.safetensors").stat().st_size
    mode = (folder / "folded.safetensors").stat().st_mode
    (folder / "other").touch()
    assert mode == (folder / "other").stat().st_mode
    expected = fold(load_model("users_cli_net:net")).state_dict()
    for name, value in load_file("folded.safetensors").items():
        assert torch.equal(value, expected[name])
    assert main(["verify", *SMALL, "--weights", "folded.safetensors"]) == 0


def test_fold_says_what_it_left(capsys):
    assert main(["fold", "--model", "users_cli_net:extra", "--output", "folded.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "folded 7 of 8 BNs" in out
    assert "not fc.0: " in out
    assert "it has no BN" in refused(capsys, "fold", "--model", "users_cli_net:plain", "--output", "no.safetensors")
    assert not Path("no.safetensors").exists()


@pytest.mark.parametrize("command", ("fold", "convert"))
def test_outputs_are_checked_before_any_work(command, folder, monkeypatch, capsys):
    suffix = {"fold": ".safetensors", "convert": ".pt2"}[command]
    monkeypatch.setattr("resnet_triton.cli.common.load_model", None)
    (folder / f"there{suffix}").write_text("kept")
    (folder / f"folder{suffix}").mkdir()
    for output, message in (
        ("model.pth", f"suffix '.pth'; allowed: {suffix}"),
        (f"there{suffix}", "exists; pass --force"),
        (f"folder{suffix}", "is a folder"),
        (f"nowhere/model{suffix}", "there is no folder 'nowhere'"),
    ):
        assert message in refused(capsys, command, *NET, "--output", output)
    assert (folder / f"there{suffix}").read_text() == "kept"


def test_a_disk_that_is_full_is_one_line(monkeypatch, capsys):
    def full(state, path, metadata):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "No space left" in refused(capsys, "fold", *NET, "--output", "folded.safetensors")


def test_an_interrupted_write_leaves_what_was_there(folder, monkeypatch, capsys):
    def interrupted(state, path, metadata):
        Path(path).write_text("half")
        raise KeyboardInterrupt

    (folder / "folded.safetensors").write_text("kept")
    monkeypatch.setattr("safetensors.torch.save_file", interrupted)
    assert main(["fold", *NET, "--output", "folded.safetensors", "--force"]) == 130
    assert [path.read_text() for path in folder.glob("*folded*")] == ["kept"]


# convert


def test_convert_lists_blocks(capsys):
    assert main(["convert", *NET, "--strict"]) == 0
    out = capsys.readouterr().out
    assert "layer3.0  BasicBlock  yes" in out
    assert "3 run fused, 0 in part, 0 not" in out
    assert main(["convert", "--model", "users_cli_net:grouped", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert not facts["fused"]
    assert [part["fused"] for part in facts["parts"]] == ["in part"] * 4
    assert all("groups=32" in part["reason"] for part in facts["parts"])


@pytest.mark.parametrize("model", ("users_cli_net:grouped", "users_cli_net:extra", "users_cli_net:plain"))
def test_convert_strict_is_1_where_something_does_not_fuse(model, folder, capsys):
    assert main(["convert", "--model", model, "--strict", "--output", "model.pt2"]) == 1
    out, err = capsys.readouterr()
    assert "nothing was written" in err
    assert list(folder.glob("*.pt2")) == []
    assert "fc is Sequential" in out or "groups=32" in out or "no residual block" in out


def test_convert_exports_for_any_batch(folder, capsys):
    arguments = ("--size", "32", "--device", "cpu", "--output", "net.pt2")
    assert main(["convert", *NET, *arguments]) == 0
    assert "torch.export.load('net.pt2')" in capsys.readouterr().out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch, about its own buffers
        program = torch.export.load("net.pt2").module()
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(program(x), convert(load_model("users_cli_net:net"))(x))
    size = (folder / "net.pt2").stat().st_size
    assert main(["convert", "--model", "users_cli_net:Branching", *arguments, "--force"]) == 2
    assert "the model cannot be exported: " in capsys.readouterr().err
    assert (folder / "net.pt2").stat().st_size == size


# Helpers


def test_progress_is_silent_in_json_and_pipes(capsys):
    for as_json in (True, False):
        args = argparse.Namespace(json=as_json)
        assert list(common.progress([1, 2], "counting", args)) == [1, 2]
    assert capsys.readouterr().err == ""

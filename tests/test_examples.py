"""Every script of docs/examples runs, and does what it says."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import resnet_triton
from tests.networks import randomise

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


def example(name: str) -> Callable:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights of a ResNet-18 and a ResNet-50, and two classes of small photographs."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("resnet18", "resnet50"):
        torch.manual_seed(0)
        model = randomise(getattr(resnet_triton, name)())
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()}, folder / f"{name}.safetensors"
        )
    rng = np.random.default_rng(0)
    for label in ("bright", "dark"):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 100, (64, 80, 3)) + (155 if label == "bright" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / label / f"{i}.png")
    return folder


def test_the_readme_lists_every_example() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"({path.name})" in listed for path in EXAMPLES.glob("*.py"))


def test_classify(folder: Path, capsys) -> None:
    photographs = [str(folder / "data" / label / "0.png") for label in ("bright", "dark")]
    names = example("classify")([*photographs, "--weights", str(folder / "resnet50.safetensors")])
    assert len(names) == 2 and capsys.readouterr().out.count(" %") == 6


def test_serve(folder: Path, capsys) -> None:
    answers = example("serve")(["--weights", str(folder / "resnet50.safetensors"), "--batch", "4", "--size", "32"])
    assert len(answers) == 4
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "4"]


def test_fine_tune(folder: Path) -> None:
    options = ["--weights", str(folder / "resnet18.safetensors"), "--epochs", "3", "--size", "32"]
    losses = example("fine_tune")([str(folder / "data"), *options])
    assert losses[-1] < losses[0]


def test_detect(folder: Path, capsys) -> None:
    found = example("detect")([str(folder / "data/bright/0.png"), "--size", "64"])
    out = capsys.readouterr().out
    assert "body.layer4.2.conv3" in out and f"{len(found[0]['boxes'])} boxes" in out


def test_export(tmp_path: Path, capsys) -> None:
    assert example("export")([str(tmp_path / "digits.pt2")]).shape == (5, 10)
    assert capsys.readouterr().out.endswith("largest difference 0\n")


def test_export_compiles_ahead_of_time(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network of 8 layers: the C++ compiler takes its time for each."""
    small = resnet_triton.models.cifar_resnet(8, in_channels=1).eval()
    monkeypatch.setattr(resnet_triton.models, "mnist5k_resnet20", lambda: small)
    if shutil.which("g++") is None:
        pytest.skip("torch.compile for the CPU needs a C++ compiler")
    assert example("export")([str(tmp_path / "digits.pt2"), "--aot"]).shape == (5, 10)
    assert capsys.readouterr().out.strip().rsplit(" ", 1)[0].endswith("largest difference")


def test_from_uint8(folder: Path, capsys) -> None:
    options = ["--weights", str(folder / "resnet50.safetensors")]
    logits = example("from_uint8")([str(folder / "data/dark/0.png"), *options])
    assert logits.shape == (1, 1000) and "the stem normalises: yes" in capsys.readouterr().out

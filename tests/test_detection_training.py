"""A small C4 detector learns drawn shapes; runs go on from their checkpoints; the detect command."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resnet_triton.cli import main
from resnet_triton.detection import Fit, Recipe, detect, fit_detector, shapes
from resnet_triton.detection.fit import _Batches
from resnet_triton.runs.checkpoint import Checkpoints

pytest.importorskip("torchvision")


class Toy(nn.Module):
    """Answers as a detector does: a loss that the brightness under the boxes gives, and one box for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> object:
        if self.training:
            noise = torch.rand(3)
            losses = [
                ((self.weight * x.mean((1, 2)) - t["boxes"].mean() / 64 * noise) ** 2).sum()
                for x, t in zip(images, targets, strict=True)
            ]
            return {"loss_a": torch.stack(losses).mean(), "loss_b": 0.1 * self.weight.square().sum()}
        return [
            {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.tensor([1]), "scores": self.weight[:1]}
            for _ in images
        ]


SHORT = Recipe(steps=7, lr=0.1, drops=(5,), warmup=2, batch_size=2)


def test_rates_of_the_recipe() -> None:
    assert [round(SHORT.rate(step), 6) for step in range(7)] == [0.033333, 0.066667, 0.1, 0.1, 0.1, 0.01, 0.01]
    paper = Recipe()
    assert (paper.rate(0), paper.rate(59_999), paper.rate(60_000)) == (1e-3, 1e-3, 1e-4) and paper.steps == 80_000
    assert (paper.momentum, paper.weight_decay, paper.flip) == (0.9, 5e-4, True)


def test_each_epoch_shows_each_image_once_and_half_of_them_mirrored() -> None:
    data = shapes(9)
    batches = _Batches(data, replace(SHORT, steps=100))
    ids = [target["image_id"].item() for step in range(8) for target in batches[step][1]]
    assert len(set(ids[:8])) == len(set(ids[8:])) == 8 and ids[:8] != ids[8:]
    same = [
        torch.equal(image, data[i][0])
        for step in range(40)
        for image, i in ((x, t["image_id"].item()) for x, t in zip(*batches[step], strict=True))
    ]
    assert 20 < sum(same) < 60
    unflipped = _Batches(data, replace(SHORT, flip=False))
    assert all(torch.equal(x, data[t["image_id"].item()][0]) for x, t in zip(*unflipped[3], strict=True))


def test_a_run_that_goes_on_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole, data = Toy(), shapes(6)
    rows: list[dict[str, float]] = []
    history = fit_detector(whole, data, SHORT, watch=rows.append)
    assert [row["step"] for row in rows] == list(range(1, 8)) and history == rows[-1:]
    assert rows[0]["loss"] == pytest.approx(rows[0]["loss_a"] + rows[0]["loss_b"])
    assert torch.equal(whole.fixed, torch.ones(3)) and rows[-1]["loss"] < rows[0]["loss"]

    checkpoints = Checkpoints(tmp_path)
    first = Fit(Toy(), data, SHORT)
    assert len(list(first.run(4))) == 4
    first.save(checkpoints, {"about": "this"})
    torch.manual_seed(5)  # the state of PyTorch's generator does not matter
    again = Fit(Toy(), data, SHORT)
    again.restore(checkpoints.load(checkpoints.names()[-1]))
    assert [row["step"] for row in again.run()] == [5, 6, 7]
    assert torch.equal(again.model.weight, whole.weight)


def test_what_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="batch_size 2 is more than the 1 images with objects"):
        Fit(Toy(), shapes(1), SHORT)
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        Fit(Toy().requires_grad_(False), shapes(4), SHORT)
    with pytest.raises(ValueError, match="the loss is nan in step 1: the training diverged"):
        model = Toy()
        nn.init.constant_(model.weight, float("nan"))
        fit_detector(model, shapes(4), SHORT)


def test_detect_gives_an_entry_for_each_image() -> None:
    found = detect(Toy().train(), shapes(5), batch_size=2)
    assert len(found) == 5 and found[4].boxes.shape == (1, 4) and found[4].scores.tolist() == [1]


TINY = (
    "--data",
    "shapes",
    "--train-set",
    "6",
    "--test-set",
    "2",
    "--size",
    "32",
    "--max-size",
    "32",
    "--device",
    "cpu",
)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["detect", "train", *TINY, "--output", str(tmp_path), "--steps", "2", "--batch-size", "2"]
    assert main([*run, "--lr", "0.001"]) == 0
    out, err = capsys.readouterr()
    assert "mAP@[.5:.95]" in out and "BN is set from 16 images" in err and "2 steps" in err
    with (tmp_path / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2"] and float(rows[0]["loss_classifier"]) > 0
    assert main(["detect", "eval", *TINY, "--output", str(tmp_path), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["images"] == 2
        and 0 <= figures["mAP@.5"] <= 1
        and set(figures["classes"]) <= {"rectangle", "disc", "triangle"}
    )
    assert f"{figures['mAP@.5']:.1%}" in out, "eval repeats what train has found"
    assert main(["detect", "eval", *TINY, "--output", str(tmp_path), "--refine", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["mAP@.5"] <= 1
    assert main([*run, "--lr", "0.002"]) == 2
    assert "recipe" in capsys.readouterr().err
    assert main([*run, "--lr", "0.001", "--json"]) == 0  # nothing is left to do but the test
    assert json.loads(capsys.readouterr().out)["mAP@.5"] == figures["mAP@.5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "voc"], "--data 'voc' is not known; allowed: voc:PATH, coco:PATH, shapes"),
        (["train", "--data", "shapes:here"], "is not known"),
        (["train", "--data", "shapes"], "detect train needs --output DIR"),
        (["eval", "--data", "shapes"], "either --output DIR of a run, or --weights FILE"),
        (["eval", "--data", "shapes", "--test-set", "many", "--weights", "x.pth"], "a set of shapes is a number"),
        (["eval", "--data", "shapes", "--weights", "x.pth"], "there is no such file"),
        (["train", "--data", "voc:nowhere", "--output", "run"], "must hold VOC2007/ImageSets"),
        (["eval", "--data", "coco:nowhere", "--weights", "x.pth"], "instances_val2014.json"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["detect", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_eval_of_a_folder_without_a_run(tmp_path: Path, capsys) -> None:
    assert main(["detect", "eval", *TINY, "--output", str(tmp_path)]) == 2
    assert "has no checkpoint" in capsys.readouterr().err

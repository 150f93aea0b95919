"""Recipes: their values are the papers', their learning rates change at the stated steps, and runs with them resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_triton.cli import main
from resnet_triton.models import build_by_name
from resnet_triton.runs import config, recipes
from resnet_triton.runs.config import Settings
from resnet_triton.runs.loop import LOOK, Trainer
from resnet_triton.runs.recipes import RECIPES
from resnet_triton.runs.schedule import Reached, learning_rate
from tests.test_cifar_files import binary, of_python_2, write
from tests.test_train_cli import SMALL, folder, names, refused, rows, same_runs, stopped_at, train
from tests.test_train_data import image_folder

__all__ = ["folder"]  # a fixture: each test runs in an empty folder with a small network of the user

IMAGENET, CIFAR = 1_281_167, 50_000  # training images


def of_recipe(name: str, layers: int = 20, **said: object) -> Settings:
    """The settings of a recipe for a network of so many layers."""
    found = {"data": RECIPES[name].data[0], "model": "m", "size": 32} | RECIPES[name].settings(layers) | said
    if found["iterations"] is not None:
        images = IMAGENET if "imagenet" in name else CIFAR
        found["epochs"] = math.ceil(found["iterations"] / (images // found["batch_size"]))
    return Settings(**found, recipe=name)


# Values: sections 1.2, 1.4 and 1.7 of the figures that were collected from the papers and their code


def test_every_recipe_trains_with_sgd_as_the_papers():
    for recipe in RECIPES.values():
        assert (recipe.lr, recipe.momentum, recipe.weight_decay) == (0.1, 0.9, 1e-4)
        assert recipe.settings(20)["warmup"] == 0 and (recipe.iterations is None) != (recipe.epochs is None)
        assert recipe.augmentation in recipes.AUGMENTATIONS
    assert list(RECIPES) == ["paper-imagenet", "paper-cifar", "preact-cifar", "torchvision"]


def test_paper_imagenet():
    recipe = RECIPES["paper-imagenet"]
    assert (recipe.batch_size, recipe.iterations, recipe.schedule) == (256, 600_000, "plateau")
    assert (recipe.init, recipe.augmentation, recipe.data) == ("fan_in", "scale-crop-colour", ("imagefolder",))
    assert of_recipe("paper-imagenet").epochs == 120


def test_paper_cifar():
    recipe = RECIPES["paper-cifar"]
    assert (recipe.batch_size, recipe.iterations, recipe.milestones) == (128, 64_000, (32_000, 48_000))
    assert (recipe.init, recipe.augmentation, recipe.per_pixel_mean) == ("fan_in", "pad-crop", True)
    assert (recipe.warmup_lr, recipe.warmup_error, recipe.warmup_layers) == (0.01, 0.8, 110)
    assert of_recipe("paper-cifar", 56).warmup_lr is None
    deep = of_recipe("paper-cifar", 110)
    assert (deep.warmup_lr, deep.warmup_error) == (0.01, 0.8)


def test_preact_cifar():
    recipe = RECIPES["preact-cifar"]
    assert (recipe.batch_size, recipe.iterations, recipe.milestones) == (128, 64_000, (32_000, 48_000))
    assert (recipe.warmup_lr, recipe.warmup_iterations, recipe.warmup_error) == (0.01, 400, None)
    assert of_recipe("preact-cifar", 20).warmup_lr == 0.01
    assert recipes.layers(build_by_name(recipe.model)) == 110


def test_torchvision():
    recipe = RECIPES["torchvision"]
    assert (recipe.batch_size, recipe.epochs, recipe.milestones, recipe.init) == (256, 90, (30, 60), "fan_out")
    assert recipe.augmentation == "resized-crop" and recipe.warmup_lr is None


@pytest.mark.parametrize("name", ("resnet18", "resnet50", "cifar_resnet20", "cifar_plain110", "preact_cifar_resnet164"))
def test_layers_are_counted_as_in_the_networks_names(name):
    with torch.device("meta"):
        assert recipes.layers(build_by_name(name)) == int("".join(filter(str.isdecimal, name)))


def test_a_recipe_is_refused_for_other_data():
    with pytest.raises(
        ValueError, match="paper-imagenet is for --data imagefolder, got cifar10; allowed with cifar10: p"
    ):
        recipes.recipe_for("paper-imagenet", "cifar10")
    with pytest.raises(ValueError, match="'x' is not known; allowed: paper-imagenet, paper-cifar"):
        recipes.recipe_for("x", "cifar10")
    assert recipes.recipe_for(None, "digits") is None


# Learning rates


def rate(settings: Settings, step: int, steps_per_epoch: int, reached: Reached | None = None) -> float:
    """The learning rate without the last bit of a product."""
    return round(learning_rate(settings, step, steps_per_epoch, reached), 9)


def changes(settings: Settings, steps_per_epoch: int, steps: int) -> dict[int, float]:
    """At which steps the learning rate changes, and to what."""
    found: dict[int, float] = {}
    last = None
    for step in range(steps):
        if (new := rate(settings, step, steps_per_epoch)) != last:
            found[step] = last = new
    return found


def test_the_papers_milestones_are_met_to_the_step():
    thirds = {0: 0.1, 32_000: 0.01, 48_000: 0.001}
    for images in (CIFAR, 45_000):
        assert changes(of_recipe("paper-cifar"), images // 128, 64_000) == thirds
    assert changes(of_recipe("preact-cifar"), CIFAR // 128, 64_000) == {0: 0.01, 400: 0.1, 32_000: 0.01, 48_000: 0.001}
    assert changes(of_recipe("torchvision"), 10, 900) == {0: 0.1, 300: 0.01, 600: 0.001}
    for steps in (*range(1, 400), IMAGENET // 256):  # a third is rounded, epochs are not
        assert rate(of_recipe("torchvision"), 30 * steps - 1, steps) == 0.1
        assert rate(of_recipe("torchvision"), 30 * steps, steps) == 0.01


def test_a_shorter_run_goes_through_the_whole_schedule():
    assert changes(of_recipe("paper-cifar", iterations=100), 7, 100) == {0: 0.1, 50: 0.01, 75: 0.001}
    assert changes(of_recipe("paper-cifar", iterations=None, epochs=4), 10, 40) == {0: 0.1, 20: 0.01, 30: 0.001}
    assert changes(of_recipe("torchvision", epochs=3), 5, 15) == {0: 0.1, 5: 0.01, 10: 0.001}
    assert changes(of_recipe("torchvision", epochs=3, drops=(0.2,)), 5, 15) == {0: 0.1, 3: 0.01}


def test_the_warm_up_ends_when_the_error_says_so():
    settings = of_recipe("paper-cifar", 110)
    assert rate(settings, 31_000, 390) == 0.01
    assert rate(settings, 31_000, 390, Reached(warm=True)) == 0.1
    assert rate(settings, 32_000, 390, Reached(warm=True)) == 0.01


def test_a_plateau_divides_by_ten():
    settings, reached, rates = of_recipe("paper-imagenet"), Reached(), []
    errors = [0.9, 0.5, 0.4995, 0.51, 0.6, 0.7, 0.8, 0.4, *[0.3999] * 10]
    for error in errors:
        reached.tested(error, patience=5)
        rates.append(rate(settings, 0, 5004, reached))
    assert rates == [0.1] * 6 + [0.01] * 6 + [0.001] * 5 + [1e-4]
    assert reached == Reached(divisions=3, lowest=0.4, waited=0)
    slow = Reached()
    for epoch in range(50):  # little by little is progress, too
        slow.tested(0.5 - 0.0003 * epoch, patience=5)
    assert slow.divisions == 0


# Initialisation


def test_weights_are_drawn_as_the_recipes_say():
    model = nn.Sequential(nn.Conv2d(64, 256, 3, bias=True), nn.BatchNorm2d(256), nn.Linear(256, 1000))
    nn.init.constant_(model[1].weight, 7)
    fc = model[2].weight.clone()
    recipes.initialise(model, "fan_out")
    assert torch.equal(model[2].weight, fc)
    deviations = {"fan_out": (2 / (256 * 9)) ** 0.5}
    assert model[0].weight.std().item() == pytest.approx(deviations["fan_out"], rel=0.02)
    recipes.initialise(model, "fan_in")
    assert model[0].weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert model[2].weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert model[0].weight.mean().abs() < 1e-3
    assert not model[0].bias.any() and not model[2].bias.any() and (model[1].weight == 1).all()
    with pytest.raises(ValueError, match="init must be one of fan_in, fan_out, got 'x'"):
        recipes.initialise(model, "x")


# Runs


def test_runs_of_before_keep_their_configuration_id():
    settings = Settings(data="digits", model="m", size=8, epochs=8, batch_size=4, lr=0.4)
    found = config.configuration(settings, "data", nn.Linear(2, 3))
    assert config.digest(found) == "dd1f77545dd01eb8"
    listed = config.configuration(Settings(**(vars(settings) | {"patience": 6})), "data", nn.Linear(2, 3))
    assert config.differences(found, listed) == ["patience = nothing instead of 6"]
    with_recipe = config.configuration(of_recipe("paper-cifar", 110), "data", nn.Linear(2, 3))
    assert {"recipe", "iterations", "init", "warmup_lr", "warmup_error"} < with_recipe.keys()
    assert config.differences(json.loads(json.dumps(with_recipe)), with_recipe) == []


def configuration(output: str = "run") -> dict[str, object]:
    return json.loads(Path(output, "checkpoints", names(output)[-1], "state.json").read_text())["configuration"]


def test_two_epochs_on_cifar_and_what_was_said_is_kept(folder, capsys):
    for version in (binary, of_python_2):
        write(folder / version.__name__, version)
    few = ("--model", "resnet8", "--epochs", "2", "--batch-size", "6", "--device", "cpu", "--workers", "0")
    assert train("--data", "cifar10:binary", "--recipe", "paper-cifar", *few) == 0
    err = capsys.readouterr().err
    assert "30 training and 6 test images, 10 classes, 2 epochs" in err
    assert "recipe paper-cifar: 10 iterations of 6 images, learning rate 0.1 divided by 10 at 5 and 8, " in err
    assert [row["lr"] for row in rows()] == ["0.1", "0.001"]
    found = configuration()
    assert (found["recipe"], found["data"], found["init"], found["lr"]) == ("paper-cifar", "cifar10", "fan_in", 0.1)
    assert "iterations" not in found and found["batch_size"] == 6
    # the same images from the other version of the files, by the same command
    assert train("--data", "cifar10:of_python_2", "--recipe", "paper-cifar", *few) == 0
    assert "going on from epoch-0002" in capsys.readouterr().err
    said = ("--lr", "0.05", "--momentum", "0.8", "--weight-decay", "0", "--init", "built", "--drops", "0.9")
    more = (*said, "--schedule", "step", "--validation", "12", "--json")
    assert train("--data", "cifar10:binary", "--recipe", "preact-cifar", *few, *more, output="other") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["recipe"], facts["tested_with"], facts["test_images"]) == ("preact-cifar", "validation", 12)
    found = configuration("other")
    keys = ("lr", "momentum", "weight_decay", "drops", "validation", "warmup_lr")
    assert [found[key] for key in keys] == [0.05, 0.8, 0.0, [0.9], 12, 0.01] and "init" not in found
    assert [row["lr"] for row in rows("other")] == ["0.01", "0.01"]  # the first 400 steps
    text = refused(capsys, "--data", "cifar10:binary", "--recipe", "torchvision", *few)
    assert "torchvision is for --data imagefolder, got cifar10; allowed with cifar10: paper-cifar, preact-cifar" in text


def test_a_recipe_on_folders_goes_on_to_the_same_bits(folder, capsys):
    """With uint8 batches, an average of the weights, and the error of a plateau."""
    pytest.importorskip("torchvision")
    image_folder(folder / "images")
    few = ("--data", "imagefolder:images", "--model", "users_train_net:coloured", "--size", "16", "--device", "cpu")
    more = (*few, "--recipe", "paper-imagenet", "--iterations", "7", "--batch-size", "2", "--ema", "0.9")
    assert train(*more, "--workers", "0", output="whole") == 0
    assert "7 iterations of 2 images, learning rate 0.1 divided by 10 where the error" in capsys.readouterr().err
    assert len(rows("whole")) == 2 and rows("whole")[0]["ema_test_error"]
    assert stopped_at(4, 2, *more, "--workers", "0") == 130
    assert train(*more, "--workers", "1") == 0
    same_runs("whole", "run")


def test_recipes_are_listed(capsys):
    assert main(["train", "--recipe", "help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{out}" for name in RECIPES)
    assert "0.01, until the training error is below 80%, networks of 110 layers or more" in out
    assert main(["train", "--recipe", "paper"]) == 2
    assert "'paper' is not known; allowed: paper-imagenet, paper-cifar" in capsys.readouterr().err
    assert main(["train", *SMALL, "--output", "run", "--epochs", "1", "--iterations", "3"]) == 2
    assert "not allowed with argument" in capsys.readouterr().err
    text = refused(capsys, *SMALL, "--epochs", "1", "--download")
    assert "--download is for --data cifar10:PATH and cifar100:PATH, got 'digits'" in text


def test_iterations_end_within_an_epoch_and_go_on(capsys):
    twelve = (*SMALL, "--iterations", "12", "--save-every", "2")  # of 5 steps an epoch
    assert train(*twelve, output="whole") == 0
    found = rows("whole")
    assert len(found) == 3 and names("whole")[-1] == "epoch-0003-step-0000000"
    assert round(float(found[2]["train_error"]) * 512, 6).is_integer()
    assert stopped_at(17, 2, *twelve) == 130  # 1 pass to begin with, then 7 an epoch
    assert "stopped in epoch 3, step 2 of 2" in capsys.readouterr().err
    assert train(*twelve) == 0
    same_runs("whole", "run")


def test_a_plateau_is_counted_on_after_a_stop():
    idle = (*SMALL, "--epochs", "4", "--lr", "1e-9", "--schedule", "plateau", "--patience", "1", "--warmup", "0")
    assert train(*idle, output="whole") == 0
    lower = [float(row["lr"]) for row in rows("whole")]
    assert lower[:2] == [1e-9, 1e-9] and lower[2] == pytest.approx(1e-10) and lower[3] == pytest.approx(1e-11)
    assert stopped_at(15, 2, *idle) == 130
    assert train(*idle) == 0
    same_runs("whole", "run")


def test_a_warm_up_that_waits_for_the_error_goes_on_to_the_same_bits(monkeypatch, capsys):
    """44 steps an epoch and 12 of its test; the error is looked at every 20 steps, also across epochs."""
    monkeypatch.setattr(recipes, "layers", lambda model: 110)
    waits = (
        *SMALL,
        "--recipe",
        "paper-cifar",
        "--batch-size",
        "32",
        "--epochs",
        "3",
        "--lr",
        "0.02",
        "--schedule",
        "constant",
    )
    rates, wrong = [], []
    chosen, warm_up = Trainer._lr, Trainer._warm_up
    monkeypatch.setattr(Trainer, "_lr", lambda self: rates.append(chosen(self)) or rates[-1])
    monkeypatch.setattr(Trainer, "_warm_up", lambda self, n: (wrong.append(n.item()), warm_up(self, n)))
    assert train(*waits, output="whole") == 0
    assert "0.01 until the training error is below 80%" in capsys.readouterr().err
    errors = [sum(wrong[i : i + LOOK]) / (LOOK * 32) for i in range(0, len(wrong) - LOOK + 1, LOOK)]
    low = next(i for i, error in enumerate(errors) if error < 0.8)
    steps = LOOK * (low + 1)
    assert 44 < steps < 3 * 44, errors  # it waits, into another epoch, and the error does fall
    assert rates == [0.01] * steps + [0.02] * (3 * 44 - steps)
    for passes in (31, 20):  # between two looks
        assert stopped_at(passes, 2, *waits) == 130
        state = json.loads(Path("run/checkpoints", names()[-1], "state.json").read_text())
        assert state["processes"][0]["recent"][0] > 0 and not state["reached"]["warm"]
    assert train(*waits) == 0
    same_runs("whole", "run")

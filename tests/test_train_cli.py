"""``resnet-triton train`` as a user meets it: results, exact resume after any end, refusals, several processes.

Each test runs in an empty folder with one module of the user: a network of a few thousand parameters with BN and
dropout, on digits of 8x8 pixels, five steps an epoch.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from resnet_triton import __version__
from resnet_triton.cli import main
from resnet_triton.runs import build, config, curves, data
from resnet_triton.runs.config import Settings
from resnet_triton.runs.data import Request, load_data
from resnet_triton.runs.schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent
USERS_MODULE = """
import os, signal
import numpy as np
import torch
from torch import nn

class Net(nn.Sequential):
    passes, stop_at, by = 0, None, None

    def forward(self, x):
        Net.passes += 1
        if Net.passes == Net.stop_at:
            os.kill(os.getpid(), Net.by)
        if self.training:
            x = x + 0.01 * np.random.random()
        return super().forward(x)

def net(channels=1, width=8, classes=10):
    return Net(nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.2),
               nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))

def wide():
    return net(width=16)

def coloured():
    return net(channels=3, classes=2)

def two_channels():
    return net(channels=2)

def eleven():
    return net(classes=11)

class Fails(nn.Conv2d):
    def forward(self, x):
        raise RuntimeError("no such convolution")

def fails():
    return Fails(1, 2, 3)
"""
SMALL = ("--data", "digits", "--model", "users_train_net:net", "--size", "8", "--batch-size", "256", "--device", "cpu")
THREE = (*SMALL, "--epochs", "3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with one module of the user, which is forgotten after the test."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "users_train_net.py").write_text(USERS_MODULE)
    yield tmp_path
    sys.modules.pop("users_train_net", None)


def train(*arguments: str, output: str = "run") -> int:
    return main(["train", "--output", output, *arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, output: str = "run") -> str:
    """Runs what must be refused: exit code 2, nothing on stdout, and a last line on stderr that says why."""
    capsys.readouterr()
    assert train(*arguments, output=output) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.splitlines()[-1]


def rows(output: str = "run") -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with Path(output, "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    assert all(float(row.pop("seconds")) > 0 for row in found)
    return found


def names(output: str = "run") -> list[str]:
    return sorted(path.name for path in Path(output, "checkpoints").iterdir())


def same_runs(a: str, b: str) -> None:
    """Losses, weights, optimizer, average and random states are equal bit for bit."""
    assert rows(a) == rows(b)
    last = names(a)[-1]
    assert last == names(b)[-1]
    files = sorted(path.name for path in Path(a, "checkpoints", last).glob("*.safetensors"))
    assert "optimizer.safetensors" in files and "random.safetensors" in files
    for file in files:
        one, other = (load_file(Path(run, "checkpoints", last, file)) for run in (a, b))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), file


# What a run gives


def test_a_run_and_its_summary(capsys):
    assert train(*THREE, "--ema", "0.9") == 0
    out, err = capsys.readouterr()
    assert "epoch 3: training loss" in err and "1438 training and 359 test images, 10 classes" in err
    assert out.startswith("test error ") and "lowest test error" in out
    found = rows()
    assert [row["epoch"] for row in found] == ["1", "2", "3"]
    assert list(found[0]) == [name for name in curves.COLUMNS if name != "seconds"]
    assert float(found[2]["train_loss"]) < float(found[0]["train_loss"])
    for row in found:
        assert 0 < float(row["test_error"]) < 1 and round(float(row["test_error"]) * 359, 6).is_integer()
        assert round(float(row["train_error"]) * 1280, 6).is_integer()
    # the same command is done at once, and says the same in JSON
    assert train(*THREE, "--ema", "0.9", "--json") == 0
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert err == ""
    assert facts["resumed_from"] == "epoch-0003-step-0000000" and facts["epochs"] == 3
    assert [float(found[2][key]) for key in ("test_error", "ema_test_error")] == [
        facts["test_error"],
        facts["ema_test_error"],
    ]
    best = min(float(row["ema_test_error"]) for row in found)
    assert facts["best"]["test_error"] == best
    assert Path(facts["last"]).is_file() and Path(facts["best"]["weights"]).is_file()
    assert len(names()) == 1 + (facts["best"]["epoch"] != 3)


def test_the_saved_weights_have_the_error_that_is_reported(capsys):
    assert train(*THREE, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    module = __import__("users_train_net")
    model = module.net().eval()
    model.load_state_dict(load_file(facts["last"]))
    images, labels = load_data("digits", 8, 0).test[Request(None, range(359))]
    with torch.no_grad():
        wrong = (model(images).argmax(1) != labels).sum().item()
    assert wrong / 359 == facts["test_error"]


def test_the_curves_are_drawn_or_their_absence_is_said(capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    assert train(*SMALL, "--epochs", "1") == 0
    assert Image.open("run/curves.png").size[0] > 100
    assert "curves.png" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train(*SMALL, "--epochs", "1", output="other") == 0
    out, err = capsys.readouterr()
    assert "no curves.png: drawing needs matplotlib" in err and "curves.png" not in out


def test_tensorboard_gets_every_epoch_once_where_it_is_installed(monkeypatch, capsys):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((folder, purge_step))

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

        def flush(self):
            pass

        close = flush

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    assert train(*THREE) == 0
    assert "TensorBoard is not installed" not in capsys.readouterr().err
    assert written[0] == ("run/tensorboard", 1)
    errors = [entry[1:] for entry in written if entry[0] == "test_error"]
    assert errors == [(float(row["test_error"]), int(row["epoch"])) for row in rows()]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train(*THREE, output="other") == 0
    assert "TensorBoard is not installed" in capsys.readouterr().err


def test_a_cifar_resnet_on_folders_of_images(capsys):
    pytest.importorskip("torchvision")
    draws = np.random.RandomState(0)
    for name, low in (("dark", 0), ("light", 128)):
        for split, count in (("train", 6), ("val", 2)):
            Path("images", split, name).mkdir(parents=True)
            for i in range(count):
                pixels = draws.randint(low, low + 128, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path("images", split, name, f"{i}.png"))
    few = ("--data", "imagefolder:images", "--size", "16", "--batch-size", "4", "--device", "cpu", "--json")
    assert train(*few, "--model", "resnet8", "--epochs", "1", "--workers", "2") == 0
    assert json.loads(capsys.readouterr().out)["test_images"] == 4
    assert train(*few, "--model", "users_train_net:coloured", "--epochs", "1", "--workers", "0", output="other") == 0


def test_models_get_the_outputs_that_the_data_need():
    assert build.build("resnet20", 7, 1).fc.out_features == 7
    assert build.build("resnet20", 7, 1).conv1.in_channels == 1
    assert build.build("resnet18", 5, 3).fc.out_features == 5
    with pytest.raises(ValueError, match="depth must be 6n"):
        build.build("cifar_resnet21", 10, 1)
    with pytest.raises(ValueError, match="not known"):
        build.build("resnet_50", 10, 1)


# Schedules and configurations


def settings(**changes: object) -> Settings:
    return Settings(**{"data": "digits", "model": "m", "size": 8, "epochs": 8, "batch_size": 4, "lr": 0.4} | changes)


def test_schedules():
    def rates(**changes: object) -> list[float]:
        return [round(learning_rate(settings(**changes), step, 10), 6) for step in range(80)]

    assert rates(schedule="constant") == [0.4] * 80
    assert rates(schedule="step") == [0.4] * 40 + [0.04] * 20 + [0.004] * 20
    cosine = rates(schedule="cosine")
    assert cosine[0] == 0.4 and cosine[40] == 0.2 and 0 < cosine[79] < 0.001 and cosine == sorted(cosine, reverse=True)
    warm = rates(schedule="cosine", warmup=1)
    assert warm[:10] == [round(0.04 * (i + 1), 6) for i in range(10)] and warm[10] == 0.4


def test_the_configuration_id_changes_with_whatever_determines_the_run():
    model = nn.Linear(2, 3)
    first = config.configuration(settings(), "data", model)
    others = [
        config.configuration(settings(lr=0.3), "data", model),
        config.configuration(settings(processes=2), "data", model),
        config.configuration(settings(), "other", model),
        config.configuration(settings(), "data", nn.Linear(2, 4)),
    ]
    assert len({config.digest(found) for found in (first, *others)}) == 5
    assert config.digest(first) == config.digest(config.configuration(settings(), "data", nn.Linear(2, 3)))
    assert config.differences(others[0], first) == ["lr = 0.3 instead of 0.4"]
    assert config.differences({}, {"a": 1}) == ["a = nothing instead of 1"]
    assert config.differences(json.loads(json.dumps(first)), first) == []


# Going on


def stopped_at(passes: int, number: int, *arguments: str) -> int:
    """A run whose model gets a signal in its n-th forward pass (of steps and evaluations)."""
    module = __import__("users_train_net")
    module.Net.passes, module.Net.stop_at, module.Net.by = 0, passes, number
    try:
        return train(*arguments)
    finally:
        module.Net.stop_at = None


@pytest.mark.parametrize(
    ("options", "signals"),
    (
        ((), ((3, 2), (9, 15))),  # Ctrl-C within the first epoch, then SIGTERM within the second
        (("--ema", "0.9", "--amp", "bf16", "--nesterov"), ((7, 2), (2, 2))),  # in the evaluation, then at once
        (("--amp", "fp16", "--schedule", "step", "--save-every", "2"), ((6, 15),)),  # after an epoch's last step
    ),
)
def test_a_stopped_run_goes_on_to_the_same_bits(options, signals, capsys):
    assert train(*THREE, *options, output="whole") == 0
    for passes, number in signals:
        capsys.readouterr()
        assert stopped_at(passes, number, *THREE, *options) == 130
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1] == "resnet-triton train: interrupted"
        assert "; the same command goes on from there" in err.splitlines()[-2]
    assert train(*THREE, *options) == 0
    assert "going on from epoch-" in capsys.readouterr().err
    same_runs("whole", "run")


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_counts(monkeypatch, capsys):
    from resnet_triton.runs.loop import Trainer

    assert train(*THREE, output="whole") == 0
    real = Trainer._tested

    def twice(self, model, stop):
        if self.epoch == 1:
            os.kill(os.getpid(), 2)
            os.kill(os.getpid(), 2)
        return real(self, model, stop)

    monkeypatch.setattr(Trainer, "_tested", twice)
    assert train(*THREE) == 130
    assert names() == ["epoch-0001-step-0000000"]
    monkeypatch.setattr(Trainer, "_tested", real)
    assert train(*THREE, "--resume", "--workers", "1") == 0
    same_runs("whole", "run")


def test_what_may_change_the_last_bits_is_said(monkeypatch, capsys):
    assert train(*THREE) == 0
    monkeypatch.setattr("resnet_triton.cli.train.__version__", "9.9")
    assert train(*THREE) == 0
    assert f"the run was begun with resnet-triton {__version__}: losses may differ in their" in capsys.readouterr().err


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import sklearn.datasets, torch
import resnet_triton.convert, resnet_triton.sources
from resnet_triton.cli import main
from resnet_triton.runs.checkpoint import Checkpoints

rand, kills, checkpoints = random.Random(3), 0, Checkpoints(Path("run/checkpoints"))
torch.set_num_threads(1)
while True:
    before = checkpoints.names()
    pid = os.fork()
    if pid == 0:
        os._exit(main(sys.argv[1:]))
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if checkpoints.names() != before and kills < 4:
            time.sleep(rand.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills += 1
            if checkpoints.names():
                checkpoints.load(checkpoints.names()[-1])
            break
        time.sleep(0.001)
    else:
        break
print(kills)
"""


def test_a_killed_run_goes_on_to_the_same_bits(folder):
    more = (*THREE, "--save-every", "1")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, "train", "--output", "run", *more]
    child = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert child.stdout.splitlines()[-1] == "4"
    assert child.stderr.count("going on from epoch-") == 4
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train(*more, output="whole") == 0
    finally:
        torch.set_num_threads(threads)
    same_runs("whole", "run")


def test_torchrun_trains_in_two_processes_and_goes_on(folder):
    """A learning rate of almost nothing: the first epoch stays the best, and its checkpoint is there to go on from."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    two = (*SMALL, "--epochs", "2", "--lr", "1e-9", "--weight-decay", "0", "--json")

    def run() -> dict[str, object]:
        command = [*launch, "resnet_triton", "train", "--output", "run", *two]
        child = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, child.stderr
        return json.loads(child.stdout)  # of one process only

    first = run()
    assert first["resumed_from"] is None and first["best"]["epoch"] == 1
    assert names() == ["epoch-0001-step-0000000", "epoch-0002-step-0000000"]
    facts = json.loads(Path("run/checkpoints", names()[-1], "state.json").read_text())
    assert facts["configuration"]["processes"] == len(facts["processes"]) == 2
    shutil.copytree("run", "whole")
    shutil.rmtree(Path("run/checkpoints", names()[-1]))
    second = run()
    assert second["resumed_from"] == "epoch-0001-step-0000000"
    same_runs("whole", "run")


# Refusals


def test_another_configuration_is_refused(capsys, monkeypatch):
    assert train(*THREE) == 0
    before = names(), rows()

    def check(what: str, *changed: str) -> None:
        text = refused(capsys, *THREE, *changed)
        assert what in text and "has configuration id" in text
        assert "choose another --output, or pass --no-resume" in text

    check("the checkpoint has lr = 0.1 instead of 0.2.", "--lr", "0.2")
    check(
        "epochs = 3 instead of 4; warmup = 0.15 instead of 0.2; seed = 0 instead of 1", "--epochs", "4", "--seed", "1"
    )
    wide = "users_train_net:wide"
    check(f"model = users_train_net:net instead of {wide}; the names and shapes", "--model", wide)
    with monkeypatch.context() as patch:
        patch.setattr(data, "SHARE", 0.79)
        check("the images of --data (digest")
    assert (names(), rows()) == before
    assert train(*THREE, "--lr", "0.2", "--no-resume") == 0
    assert rows() != before[1]


def test_a_damaged_checkpoint_is_refused_and_deleting_it_goes_on(capsys):
    assert train(*THREE, "--lr", "1e-9") == 0
    assert names() == ["epoch-0001-step-0000000", "epoch-0003-step-0000000"]
    path = Path("run/checkpoints", names()[-1], "model.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    text = refused(capsys, *THREE, "--lr", "1e-9")
    assert str(path) in text and "is damaged" in text and "resume from epoch-0001-step-0000000" in text
    shutil.rmtree(path.parent)
    assert train(*THREE, "--lr", "1e-9") == 0
    assert "going on from epoch-0001" in capsys.readouterr().err
    assert len(rows()) == 3


def test_what_cannot_be_trained_is_refused(capsys, folder):
    assert "there is no checkpoint in 'run/checkpoints'" in refused(capsys, *THREE, "--resume")
    assert "SyncBatchNorm runs on GPUs only" in refused(capsys, *THREE, "--sync-bn")
    assert "--batch-size 2000 is more than the 1438" in refused(capsys, *SMALL, "--batch-size", "2000")
    assert "must give (2, 10)" in refused(capsys, *SMALL, "--model", "users_train_net:eleven")
    assert "no such convolution" in refused(capsys, *SMALL, "--model", "users_train_net:fails")
    assert "have 1 channel, or 3 equal ones; the model takes 2" in refused(
        capsys, *SMALL, "--model", "users_train_net:two_channels"
    )
    assert "allowed: digits, mnist5k" in refused(capsys, *SMALL, "--data", "cifar10")
    assert "must be a number from 0 to 1000, got 'much'" in refused(capsys, *SMALL, "--lr", "much")
    assert "--nesterov needs a --momentum" in refused(capsys, *SMALL, "--nesterov", "--momentum", "0")
    (folder / "file").write_text("")
    assert "file" in refused(capsys, *SMALL, output="file")


def test_a_training_that_diverges_ends_and_keeps_its_last_checkpoint(capsys):
    text = refused(capsys, *THREE, "--lr", "1000", "--weight-decay", "1", "--momentum", "0.99", "--warmup", "0")
    assert "the training diverged. Choose a lower --lr than 1000.0" in text


def test_two_runs_do_not_share_a_folder(capsys):
    fcntl = pytest.importorskip("fcntl")
    Path("run").mkdir()
    with Path("run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is writing there" in refused(capsys, *THREE)
    assert train(*SMALL, "--epochs", "1") == 0

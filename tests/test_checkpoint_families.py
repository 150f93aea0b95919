"""Checkpoints as other repositories write them: loaded through ``cifar_resnet``, their logits are those of a network
written out here, unfolded and folded. Which network it is follows from the file, and what does not fit says why."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from resnet_triton import fold
from resnet_triton.checkpoints import FAMILIES
from resnet_triton.cli import main
from resnet_triton.models import CifarResNet, cifar_resnet
from resnet_triton.sources import load_model
from resnet_triton.weights import inspect, load_weights, shortcut_of
from tests.comparers import identical, no_worse_than, same_math

#: How a family writes the names of stem, block, convolution and BN in it, projection and head: {s} is the stage from
#: 1, {b} and {b1} the block from 0 and from 1, {i} the convolution from 1, {l} its letter.
PLAIN = ("conv1", "bn1", "layer{s}.{b}.", "conv{i}", "bn{i}", "downsample.0", "downsample.1", "fc")
SHORTCUT = ("conv1", "bn1", "layer{s}.{b}.", "conv{i}", "bn{i}", "shortcut.0", "shortcut.1", "linear")
LETTERS = ("conv_1_3x3", "bn_1", "stage_{s}.{b}.", "conv_{l}", "bn_{l}", "-", "-", "classifier")
BLOCKS = ("conv", "bn", "stage{s}.block{b1}.", "conv{i}", "bn{i}", "shortcut.conv", "shortcut.bn", "fc")
FEATURES = (
    "features.init_block.conv",
    "features.init_block.bn",
    "features.stage{s}.unit{b1}.",
    "body.conv{i}.conv",
    "body.conv{i}.bn",
    "identity_conv.conv",
    "identity_conv.bn",
    "output",
)


def checkpoint(names: tuple[str, ...], shortcut: str, depth: int = 20, classes: int = 10, **options: Any) -> dict:
    """A state_dict of random values in the names of a family, in the order in which it has its modules."""
    counters, channels, widths = options.get("counters", True), options.get("channels", 3), options.get("widths")
    state: dict[str, Tensor] = {}

    def conv(name: str, filters: int, inputs: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(filters, inputs, size, size) * (2 / (inputs * size * size)) ** 0.5

    def bn(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = torch.rand(width) + 0.2, torch.randn(width) * 0.3
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.randn(width) * 0.2, torch.rand(width) + 0.5
        if counters:
            state[f"{name}.num_batches_tracked"] = torch.tensor(64_000)

    widths = widths or (16, 32, 64)
    conv(names[0], widths[0], channels, 3)
    bn(names[1], widths[0])
    inputs = widths[0]
    for s, width in enumerate(widths, start=1):
        for b in range((depth - 2) // 6):
            block = names[2].format(s=s, b=b, b1=b + 1)
            for i in (1, 2):
                conv(block + names[3].format(i=i, l="ab"[i - 1]), width, inputs if i == 1 else width, 3)
                bn(block + names[4].format(i=i, l="ab"[i - 1]), width)
            if shortcut == "C" or (shortcut == "B" and inputs != width):
                conv(block + names[5], width, inputs, 1)
                bn(block + names[6], width)
            inputs = width
    state[f"{names[7]}.weight"] = torch.randn(classes, widths[-1]) * 0.2
    state[f"{names[7]}.bias"] = torch.randn(classes)
    return state


def logits(state: Mapping[str, Tensor], names: tuple[str, ...], shortcut: str, x: Tensor) -> Tensor:
    """The paper's section 4.2 in PyTorch's functions, with a checkpoint's values, in the dtype of ``x``."""

    def conv(x: Tensor, name: str, stride: int, padding: int = 1) -> Tensor:
        return F.conv2d(x, state[f"{name}.weight"].to(x.dtype), stride=stride, padding=padding)

    def bn(x: Tensor, name: str) -> Tensor:
        mean, var, gamma, beta = (
            state[f"{name}.{k}"].to(x.dtype) for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, gamma, beta)

    x = F.relu(bn(conv(x, names[0], 1), names[1]))
    for s in (1, 2, 3):
        b = 0
        while any(name.startswith(names[2].format(s=s, b=b, b1=b + 1)) for name in state):
            block = names[2].format(s=s, b=b, b1=b + 1)
            first, second = ([block + n.format(i=i + 1, l="ab"[i]) for n in names[3:5]] for i in (0, 1))
            stride = 2 if s > 1 and b == 0 else 1
            h = bn(conv(F.relu(bn(conv(x, first[0], stride), first[1])), second[0], 1), second[1])
            if f"{block}{names[5]}.weight" in state:
                x = bn(conv(x, block + names[5], stride, 0), block + names[6])
            elif stride == 2:
                width = x.shape[1]
                before, after = {"A": (0, width), "A-both": (width // 2, width // 2)}[shortcut]
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, after))
            x, b = F.relu(h + x), b + 1
    head = names[7]
    return F.linear(x.mean((2, 3)), state[f"{head}.weight"].to(x.dtype), state[f"{head}.bias"].to(x.dtype))


def module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As nn.DataParallel names them."""
    return {f"module.{name}": tensor for name, tensor in state.items()}


#: Family: names, shortcut, classes, depth, counters, what its script stores, and the repository that it is known by.
FILES: dict[str, tuple[tuple[str, ...], str, int, int, bool, Callable[[dict], Any], str]] = {
    "akamaster": (
        SHORTCUT, "A-both", 10, 20, False,
        lambda s: {"state_dict": module(s), "best_prec1": 91.78}, "akamaster/pytorch_resnet_cifar10",
    ),
    "akamaster_56": (
        SHORTCUT, "A-both", 10, 56, False,
        lambda s: {"best_prec1": 93.62, "state_dict": module(s)}, "akamaster/pytorch_resnet_cifar10",
    ),
    "akamaster_epoch": (
        SHORTCUT, "A-both", 10, 20, True,
        lambda s: {"epoch": 11, "state_dict": module(s), "best_prec1": torch.tensor(80.0)},
        "akamaster/pytorch_resnet_cifar10",
    ),
    "akamaster_b": (
        SHORTCUT, "B", 10, 20, True, lambda s: {"state_dict": module(s)}, "akamaster/pytorch_resnet_cifar10",
    ),
    "loss_landscape": (
        SHORTCUT, "B", 10, 56, True,
        lambda s: {"acc": 94.1, "epoch": 300, "state_dict": s}, "akamaster/pytorch_resnet_cifar10",
    ),
    "kuangliu_wrapper": (
        SHORTCUT, "B", 10, 20, True,
        lambda s: {"net": module(s), "acc": 91.0, "epoch": 7}, "akamaster/pytorch_resnet_cifar10",
    ),
    "chenyaofo_cifar10": (PLAIN, "B", 10, 20, True, dict, "torchvision"),
    "chenyaofo_cifar100": (PLAIN, "B", 100, 56, True, dict, "torchvision"),
    "bearpaw": (
        PLAIN, "B", 100, 20, False,
        lambda s: {"epoch": 164, "state_dict": module(s), "acc": 70.1, "best_acc": 70.4, "optimizer": {"state": {}}},
        "torchvision",
    ),
    "resnext_densenet": (
        LETTERS, "A", 10, 20, False,
        lambda s: {"epoch": 3, "arch": "resnet20", "state_dict": module(s)}, "D-X-Y/ResNeXt-DenseNet",
    ),
    "resnext_densenet_56": (LETTERS, "A", 100, 56, True, dict, "D-X-Y/ResNeXt-DenseNet"),
    "hysts": (
        BLOCKS, "B", 10, 20, False,
        lambda s: {"config": {"depth": 20}, "state_dict": s, "optimizer": {"lr": 0.1}, "epoch": 160, "accuracy": 0.9},
        "hysts/pytorch_resnet",
    ),
    "pytorchcv": (FEATURES, "B", 10, 20, True, dict, "osmr/imgclsmob (pytorchcv)"),
    "pytorchcv_56": (FEATURES, "B", 100, 56, False, dict, "osmr/imgclsmob (pytorchcv)"),
    "ours_a": (PLAIN, "A", 10, 20, True, dict, "torchvision"),
    "ours_c": (PLAIN, "C", 10, 20, True, lambda s: {"model_state": s}, "torchvision"),
    "compiled": (
        SHORTCUT, "A-both", 10, 20, True,
        lambda s: {"model": {f"_orig_mod.{k}": v for k, v in module(s).items()}}, "akamaster/pytorch_resnet_cifar10",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FILES)
def test_logits_are_those_of_the_network_written_out(family: str, tmp_path: Path) -> None:
    names, shortcut, classes, depth, counters, wrapped, repository = FILES[family]
    state = checkpoint(names, shortcut, depth, classes, counters=counters)
    path = tmp_path / "model.th"
    torch.save(wrapped(state), path, _use_new_zipfile_serialization=counters)
    report = inspect(path)
    assert report.family is not None and report.family.name == repository
    model = cifar_resnet(depth, weights=path).eval().double()
    assert model.shortcut == shortcut == shortcut_of(wrapped(state))
    x = torch.randn(2, 3, 17, 16, dtype=torch.float64)
    expected = logits(state, names, shortcut, x)
    assert expected.shape == (2, classes) and expected.std() > 0.1
    with torch.no_grad():
        same_math(model(x), expected)
        same_math(fold(model)(x), expected)


@pytest.mark.parametrize("family", ["akamaster", "chenyaofo_cifar10"])
def test_single_precision(family: str) -> None:
    names, shortcut, classes, depth, *_ = FILES[family]
    state = checkpoint(names, shortcut, depth, classes)
    x = torch.randn(4, 3, 32, 32)
    model = cifar_resnet(depth, weights=state).eval()
    reference, eager = logits(state, names, shortcut, x.double()), logits(state, names, shortcut, x)
    with torch.no_grad():
        no_worse_than(model(x), eager, reference)
        no_worse_than(fold(model)(x), eager, reference)


def files(state: dict[str, Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One checkpoint as every kind of file in which they come."""
    for name in ("resnet8-12fca82f.th", "m.pt", "m.pth", "model_best.pth.tar", "pytorch_model.bin", "m.ckpt", "m.t7"):
        for zipped in (True, False):
            torch.save({"state_dict": module(state)}, folder / name, _use_new_zipfile_serialization=zipped)
            yield folder / name
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        for zipped in (True, False):
            torch.save(module(state), folder / "cuda.th", _use_new_zipfile_serialization=zipped)
            yield folder / "cuda.th"
    save_file(state, folder / "m.safetensors")
    yield folder / "m.safetensors"


def test_every_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = checkpoint(SHORTCUT, "A-both", 8)
    expected = cifar_resnet(8, weights=state).state_dict()
    for path in files(state, tmp_path, monkeypatch):
        model = cifar_resnet(8, weights=str(path))
        assert model.shortcut == "A-both"
        for name, value in model.state_dict().items():
            identical(value, expected[name])


def test_half_precision_files() -> None:
    state = checkpoint(SHORTCUT, "A-both", 8)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    loaded = cifar_resnet(8, weights=half)
    assert loaded.fc.weight.dtype == torch.float32
    identical(loaded.fc.weight.detach(), half["linear.weight"].float())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("core", ["core", "_core"])
def test_numbers_of_numpy_beside_the_weights(zipped: bool, core: str, tmp_path: Path) -> None:
    """Scripts store accuracies that numpy computed; numpy 1 and 2 pickle them under two names."""
    state = checkpoint(SHORTCUT, "A-both", 8)
    numbers = {"acc": np.float64(93.1), "f": np.float32(1.5), "epoch": np.int64(3), "best": np.bool_(True)}
    path = tmp_path / "m.pth"
    torch.save({"net": state, **numbers}, path, _use_new_zipfile_serialization=zipped)
    other = "_core" if core == "core" else "core"
    if zipped:
        with zipfile.ZipFile(path) as archive:
            entries = {entry: archive.read(entry) for entry in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, content.replace(f"numpy.{other}.m".encode(), f"numpy.{core}.m".encode()))
    else:
        path.write_bytes(path.read_bytes().replace(f"numpy.{other}.m".encode(), f"numpy.{core}.m".encode()))
    report = inspect(path)
    assert report.ignored == tuple(numbers) and report.wrappers == ("net",)
    identical(cifar_resnet(8, weights=path).fc.bias.detach(), state["linear.bias"])


def test_arrays_of_numpy_stay_refused(tmp_path: Path) -> None:
    for i, extra in enumerate((np.ones(3), np.array([object()], dtype=object))):
        torch.save({"net": checkpoint(PLAIN, "A", 8), "extra": extra}, tmp_path / f"{i}.pth")
        with pytest.raises(ValueError, match=r"is refused: .*run code"):
            inspect(tmp_path / f"{i}.pth")


def test_the_report_says_what_was_found_and_done(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    state = checkpoint(SHORTCUT, "B", 8, 100, counters=False)
    state["layer1.0.conv1.total_ops"] = state["layer1.0.total_params"] = torch.zeros(1)
    torch.save({"state_dict": module(state), "best_prec1": 1.0, "optimizer": {}}, tmp_path / "m.th")
    with caplog.at_level(logging.INFO, "resnet_triton"):
        model = cifar_resnet(8, weights=tmp_path / "m.th")
    report = inspect(tmp_path / "m.th")
    assert report.family is not None and report.family.name == "akamaster/pytorch_resnet_cifar10"
    assert (report.wrappers, report.prefix) == (("state_dict",), "module.")
    assert report.renamed["linear.bias"] == "fc.bias"
    assert report.renamed["layer2.0.shortcut.0.weight"] == "layer2.0.downsample.0.weight"
    assert len(report.renamed) == 2 + 2 * 5, "the head, and two projections with their BN"
    assert report.ignored == ("best_prec1", "optimizer", "2 of a profiler (layer1.0.conv1.total_ops, ...)")
    assert report.network == "cifar_resnet(8, num_classes=100, shortcut='B')"
    assert set(report.state) == {key for key in model.state_dict() if not key.endswith("tracked")}
    (line,) = [record.getMessage() for record in caplog.records if record.name == "resnet_triton.weights"]
    assert line.endswith(str(report)) and "\n" not in line
    for words in (
        "m.th",
        "under state_dict",
        "'module.' removed",
        "linear -> fc",
        "layer2.0.shortcut.0 -> layer2.0.downs",
    ):
        assert words in line
    assert "no num_batches_tracked" in line and "ignored best_prec1, optimizer" in line


def test_nothing_is_said_where_nothing_was_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "resnet_triton"):
        model = CifarResNet(8)
        report = load_weights(model, checkpoint(PLAIN, "A", 8))
    assert report is not None and not report.mapped and not report.renamed
    assert not [record for record in caplog.records if record.name == "resnet_triton.weights"]
    assert load_weights(model, None) is None


def test_zeros_on_other_sides_than_the_file_needs_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "resnet_triton"):
        load_weights(CifarResNet(8, shortcut="A"), checkpoint(SHORTCUT, "A-both", 8))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "shortcut='A-both', but this model has shortcut='A'" in line and "cifar_resnet(" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING, "resnet_triton"):
        load_weights(CifarResNet(8, shortcut="A-both"), checkpoint(SHORTCUT, "A-both", 8))
        load_weights(CifarResNet(8, shortcut="A-both"), checkpoint(PLAIN, "A", 8))
    assert not caplog.records


def test_the_file_gives_classes_and_channels() -> None:
    state = checkpoint(SHORTCUT, "A-both", 8, 7, channels=1)
    model = cifar_resnet(8, weights=state)
    assert (model.fc.out_features, model.conv1.in_channels, model.shortcut) == (7, 1, "A-both")
    model = cifar_resnet(8, 7, 1, weights=state, shortcut="A-both")
    assert model.fc.out_features == 7
    assert cifar_resnet(8).fc.out_features == 10
    # Files of option A do not tell on which side the zeros are, and have the tensors of plain nets.
    assert cifar_resnet(8, weights=state, shortcut="A").shortcut == "A"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((20,), {}, r"depth=20.*holds cifar_resnet\(8, num_classes=10, shortcut='A-both'\)"),
        ((8, 100), {}, r"num_classes=100.*holds cifar_resnet\(8, num_classes=10"),
        ((8, 10, 1), {}, r"in_channels=1.*holds cifar_resnet\(8"),
        ((8,), {"shortcut": "B"}, r"shortcut='B'.*no projections.*shortcut='A-both'"),
        ((8,), {"shortcut": "C"}, r"shortcut='C'.*no projections"),
    ],
)
def test_contradictions_are_refused(arguments: tuple, options: dict, message: str, tmp_path: Path) -> None:
    torch.save({"state_dict": module(checkpoint(SHORTCUT, "A-both", 8))}, tmp_path / "m.th")
    with pytest.raises(ValueError, match=message) as error:
        cifar_resnet(*arguments, weights=tmp_path / "m.th", **options)
    assert "m.th" in str(error.value)


def test_projections_need_an_option_that_has_them() -> None:
    state = checkpoint(PLAIN, "B", 8)
    for shortcut in ("A", "A-both", "C"):
        with pytest.raises(ValueError, match=rf"shortcut='{shortcut}'.*projections where the width changes.*'B'"):
            cifar_resnet(8, weights=state, shortcut=shortcut)


def renamed(state: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in state.items()}


def four_stages() -> dict[str, Tensor]:
    """kuangliu/pytorch-cifar's ResNet-18."""
    state = checkpoint(SHORTCUT, "B", 14, widths=(64, 128, 256))
    more = {name.replace("layer3", "layer4"): t for name, t in state.items() if name.startswith("layer3")}
    return {**state, **more}


def bottlenecks() -> dict[str, Tensor]:
    """bearpaw's ResNet of depth 44 or more."""
    state = checkpoint(PLAIN, "B", 8)
    return {**state, **{f"layer{s}.0.conv3.weight": torch.randn(64, 16, 1, 1) for s in (1, 2, 3)}}


OTHERS = {
    "four_stages": (four_stages, r"a ResNet of 2, 2, 2, 2 basic blocks \(stem 3x3, 64 filters, 10 classes\).*convert"),
    "bottlenecks": (bottlenecks, r"a ResNet of 1, 1, 1 bottlenecks.*convert"),
    "wide": (lambda: checkpoint(SHORTCUT, "B", 8, widths=(160, 320, 640)), "stem 3x3, 160 filters"),
    "pre_activation": (
        lambda: {k: v for k, v in checkpoint(PLAIN, "A", 8).items() if not k.startswith("bn1")},
        "a pre-activation ResNet of 1, 1, 1 basic blocks.*preact_cifar_resnet",
    ),
    "imagenet": (
        lambda: {**four_stages(), "conv1.weight": torch.zeros(64, 3, 7, 7)},
        r"stem 7x7, 64 filters.*resnet18",
    ),
    "no_head": (lambda: {k: v for k, v in checkpoint(PLAIN, "A", 8).items() if "fc" not in k}, "a ResNet of 1, 1, 1"),
    "other": (lambda: renamed(checkpoint(PLAIN, "A", 8), "layer", "features.stage"), "no residual network whose names"),
    "sequential": (
        lambda: {"conv1.0.weight": torch.ones(64, 3, 3, 3), "conv2_x.0.residual_function.0.weight": torch.ones(1)},
        "no residual network whose names",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_networks_are_named(case: str) -> None:
    make, message = OTHERS[case]
    state = make()
    for refuse in (lambda: cifar_resnet(8, weights=state), lambda: shortcut_of(state)):
        with pytest.raises(ValueError, match=message) as error:
            refuse()
        assert "three equal stages of basic blocks" in str(error.value)


def test_a_model_with_the_names_of_the_file_keeps_them() -> None:
    class Linear(CifarResNet):
        """A user's network whose head is called ``linear``, as in the file."""

        def __init__(self) -> None:
            super().__init__(8, shortcut="A-both")
            self.linear = self.fc
            del self.fc

    model, state = Linear(), checkpoint(SHORTCUT, "A-both", 8)
    report = load_weights(model, state)
    assert report is not None and not report.renamed
    identical(model.linear.weight.detach(), state["linear.weight"])


def test_a_misfit_says_what_the_file_holds() -> None:
    with pytest.raises(ValueError, match=r"does not fit CifarResNet.*It holds cifar_resnet\(14, .*shortcut='A-both'"):
        load_weights(CifarResNet(8, shortcut="A-both"), checkpoint(SHORTCUT, "A-both", 14))


def test_the_documented_path_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs/checkpoints.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    state = checkpoint(SHORTCUT, "A-both", 20, counters=False)
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": module(state), "best_prec1": 91.78}, "resnet20-12fca82f.th")
    found: dict[str, Any] = {}
    exec(code, found)
    mean, std = (found[key].view(3, 1, 1) for key in ("mean", "std"))
    x = (found["images"] - mean) / std
    eager, reference = (logits(state, SHORTCUT, "A-both", v) for v in (x, x.double()))
    no_worse_than(found["logits"].detach(), eager, reference)
    line = next(line for line in page.splitlines() if line.startswith("    'resnet20"))
    assert line.strip() == str(inspect("resnet20-12fca82f.th"))


def test_the_page_has_a_row_for_each_family() -> None:
    page = (Path(__file__).parent.parent / "docs/checkpoints.md").read_text()
    assert [
        family.name for family in FAMILIES if f"| {family.name}" not in page and family.mark != r"^fc\.weight$"
    ] == []


@pytest.mark.parametrize(
    ("name", "shortcut", "names", "classes"),
    [
        ("cifar_resnet8", "A-both", SHORTCUT, 10),
        ("resnet8", "A", LETTERS, 7),
        ("cifar_resnet8", "B", PLAIN, 100),
        ("cifar_plain8", "none", PLAIN, 10),
    ],
)
def test_commands_build_what_the_file_holds_and_say_so(
    name: str, shortcut: str, names: tuple[str, ...], classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": module(checkpoint(names, shortcut, 8, classes))}, tmp_path / "m.th")
    original, folded = str(tmp_path / "m.th"), str(tmp_path / "folded.safetensors")
    assert main(["fold", "--model", name, "--weights", original, "--output", folded]) == 0
    said = capsys.readouterr().err
    assert (
        "m.th': names of" in said and "'module.' removed" in said and f"cifar_resnet(8, num_classes={classes}" in said
    )
    model, again = load_model(name, weights=original), load_model(name, weights=folded)
    assert isinstance(model, CifarResNet) and isinstance(again, CifarResNet)
    assert model.shortcut == again.shortcut == shortcut and again.fc.out_features == classes
    assert not any(key.endswith("running_var") for key in again.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        unfolded = model(x)
        reference = model.double()(x.double())
        no_worse_than(again(x), unfolded, reference)
    assert main(["convert", "--model", name, "--weights", folded]) == 0


def test_arguments_of_the_builder(tmp_path: Path) -> None:
    state = checkpoint(PLAIN, "A", 8)
    torch.save(state, tmp_path / "m.pth")
    model = load_model("cifar_resnet8", weights=str(tmp_path / "m.pth"), arguments={"shortcut": "A-both"})
    assert isinstance(model, CifarResNet) and model.shortcut == "A-both"
    with pytest.raises(ValueError, match=r"shortcut='B', but .*m\.pth.* has no projections"):
        load_model("cifar_resnet8", weights=str(tmp_path / "m.pth"), arguments={"shortcut": "B"})
    with pytest.raises(ValueError, match="'torchvision:resnet18' takes no arguments here"):
        load_model("torchvision:resnet18", arguments={"num_classes": 3})

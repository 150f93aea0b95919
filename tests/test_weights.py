"""Every form of weights that is accepted, every form that is refused, and that a refusal changes nothing."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from resnet_triton import models
from resnet_triton.models import BasicBlock, Bottleneck, CifarResNet, ResNet
from resnet_triton.weights import load_weights, named_weights

SEEN_BY_PICKLE: list[str] = []


def small(seed: int = 0, **kwargs) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1, 1], **{"num_classes": 5, **kwargs})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    now = model.state_dict()
    assert list(now) == list(state)
    for key, value in state.items():
        assert torch.equal(now[key], value.to(now[key].dtype)), key


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A checkpoint whose every entry differs from a fresh model's."""
    generator = torch.Generator().manual_seed(9)
    return {
        key: torch.tensor(17) if key.endswith("tracked") else torch.rand(value.shape, generator=generator) + 0.5
        for key, value in small().state_dict().items()
    }


@pytest.fixture
def model() -> ResNet:
    return small(1)


WRAPPED = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1}, "epoch": 90},
    "ddp": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "compiled_ddp": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "without_counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "other_order": lambda s: dict(reversed(s.items())),
    "parameters": lambda s: {k: nn.Parameter(v, requires_grad=v.is_floating_point()) for k, v in s.items()},
}


@pytest.mark.parametrize("form", ["mapping", ".pth", ".pt", ".PTH"])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_state_dicts_and_pickles(form: str, wrapped: str, state, model: ResNet, tmp_path: Path) -> None:
    checkpoint = WRAPPED[wrapped](state)
    expected = dict(state)
    if wrapped == "without_counters":
        expected = {k: model.state_dict()[k].clone() if k.endswith("tracked") else v for k, v in state.items()}
    if form != "mapping":
        path = tmp_path / f"checkpoint{form}"
        torch.save(checkpoint, path)
        checkpoint = path
    load_weights(model, checkpoint)
    assert_holds(model, expected)


@pytest.mark.parametrize("as_text", [False, True])
def test_safetensors(as_text: bool, state, model: ResNet, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_file(state, path)
    load_weights(model, str(path) if as_text else path)
    assert_holds(model, state)


def test_paths_may_be_relative_or_start_at_home(state, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(state, tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for path in ("w.safetensors", "~/w.safetensors", os.path.join(".", "w.safetensors")):
        model = small(1)
        load_weights(model, path)
        assert_holds(model, state)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_saved_on_cuda_loads_without_cuda(
    zipped: bool, state, model: ResNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cuda.pth"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert b"cuda:0" in path.read_bytes()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    load_weights(model, path)
    assert_holds(model, state)


def test_dtype_format_and_aliasing_of_the_model_are_kept(state) -> None:
    model = small(1).to(torch.bfloat16).to(memory_format=torch.channels_last)
    before = [(p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()]
    mine = {key: value.clone() for key, value in state.items()}
    load_weights(model, mine)
    assert [(p.data_ptr(), p.dtype, p.stride()) for p in model.parameters()] == before
    assert_holds(model, state)
    for value in mine.values():
        value.zero_()
    assert_holds(model, state)
    eighth = {key: v.to(torch.float8_e4m3fn) if v.is_floating_point() else v for key, v in state.items()}
    load_weights(model, eighth)
    assert_holds(model, eighth)


def test_other_kinds_of_models(state) -> None:
    for seed, make in enumerate((lambda: CifarResNet(8), lambda: torchvision.models.resnet18(num_classes=3))):
        torch.manual_seed(seed)
        source, target = make(), make()
        load_weights(target, source.state_dict())
        assert_holds(target, source.state_dict())
    # A wrapped model names its parameters as its own checkpoints do.
    wrapped = nn.Sequential(OrderedDict(module=small(1)))
    load_weights(wrapped, {f"module.{key}": value for key, value in state.items()})
    assert_holds(wrapped.module, state)
    # FrozenBatchNorm2d has no counters.
    frozen = small(1, norm_layer=FrozenBatchNorm2d)
    load_weights(frozen, state)
    assert_holds(frozen, {key: value for key, value in state.items() if not key.endswith("tracked")})


def test_none_loads_nothing(model: ResNet) -> None:
    before = snapshot(model)
    load_weights(model, None)
    assert_holds(model, before)


def without(key: str):
    return lambda s: {k: v for k, v in s.items() if k != key}


MISFITS = {
    "missing": (without("layer2.0.bn1.weight"), "1 missing keys \\(layer2.0.bn1.weight\\)"),
    "missing_many": (
        lambda s: {"fc.weight": s["fc.weight"]},
        r"missing keys \(conv1.weight, .*, and \d+ more\)",
    ),
    "empty": (lambda s: {}, "missing keys"),
    "one_counter_missing": (without("bn1.num_batches_tracked"), "1 missing keys"),
    "unexpected": (lambda s: {**s, "fc2.weight": torch.ones(1)}, "1 unexpected keys \\(fc2.weight\\)"),
    "other_classes": (
        lambda s: {**s, "fc.weight": torch.ones(9, 512), "fc.bias": torch.ones(9)},
        r"2 other shapes \(fc.weight \(9, 512\) instead of \(5, 512\).*num_classes=9",
    ),
    "shape": (
        lambda s: {**s, "conv1.weight": torch.ones(64, 1, 7, 7)},
        r"\(64, 1, 7, 7\) instead of \(64, 3, 7, 7\)",
    ),
    "scalar": (lambda s: {**s, "bn1.bias": torch.tensor(1.0)}, r"bn1.bias \(\) instead of \(64,\)"),
    "integers": (
        lambda s: {**s, "bn1.bias": torch.ones(64, dtype=torch.int8)},
        "cannot be copied.*bn1.bias torch.int8",
    ),
    "fractions": (
        lambda s: {**s, "bn1.num_batches_tracked": torch.tensor(1.5)},
        "bn1.num_batches_tracked torch.float32",
    ),
    "complex": (lambda s: {**s, "bn1.bias": torch.ones(64, dtype=torch.complex64)}, "torch.complex64"),
    "meta": (lambda s: {**s, "bn1.bias": torch.ones(64, device="meta")}, "on meta"),
    "sparse": (lambda s: {**s, "bn1.bias": torch.ones(64).to_sparse()}, "cannot be copied"),
    "nan": (
        lambda s: {**s, "bn1.bias": torch.full((64,), torch.nan)},
        r"holds NaN or infinity in 1 of \d+ tensors \(bn1.bias\).*model.load_state_dict",
    ),
    "all_nan": (
        lambda s: {k: v * torch.nan if v.is_floating_point() else v for k, v in s.items()},
        r"holds NaN or infinity in \d+ of \d+ tensors \(conv1.weight, .* more\)",
    ),
    "infinity": (
        lambda s: {**s, "fc.bias": torch.tensor([1.0, 2.0, -torch.inf, 4.0, 5.0])},
        r"holds NaN or infinity in 1 .*\(fc.bias\)",
    ),
    "not_a_tensor": (lambda s: {**s, "fc.bias": [1.0]}, "holds list under 'fc.bias'"),
    "not_a_name": (lambda s: {**s, 3: torch.ones(1)}, "holds Tensor under 3"),
    "optimizer": (
        lambda s: {"optimizer": {}, "epoch": 3},
        "holds dict under 'optimizer'.*'state_dict', 'model'",
    ),
    "other_prefix": (
        lambda s: {f"backbone.{k}": v for k, v in s.items()},
        "unexpected keys.*backbone.conv1.weight",
    ),
    "half_prefixed": (
        lambda s: {("module." + k if "layer1" in k else k): v for k, v in s.items()},
        "module.layer1",
    ),
    "bottleneck": (lambda s: ResNet(Bottleneck, [1, 1, 1, 1], 5).state_dict(), "layer1.0.conv3.weight"),
    "deeper": (lambda s: ResNet(BasicBlock, [2, 1, 1, 1], 5).state_dict(), "layer1.1.conv1.weight"),
}


@pytest.mark.parametrize("form", ["mapping", ".pth"])
@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused_whole(case: str, form: str, state, model: ResNet, tmp_path: Path) -> None:
    change, message = MISFITS[case]
    checkpoint = change(state)
    if form != "mapping":
        torch.save(checkpoint, tmp_path / "misfit.pth")
        checkpoint = tmp_path / "misfit.pth"
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(model, checkpoint)
    assert "weights" in str(error.value)
    assert form == "mapping" or "misfit.pth" in str(error.value)
    assert_holds(model, before)


def test_a_list_of_tensors_is_refused(state, model: ResNet, tmp_path: Path) -> None:
    torch.save(list(state.values()), tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds list; allowed: a state_dict"):
        load_weights(model, tmp_path / "list.pth")


def test_a_model_without_memory_is_refused(state) -> None:
    with torch.device("meta"):
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    with pytest.raises(ValueError, match=r"instead of torch.float32 on meta"):
        load_weights(model, state)


def refused(model: nn.Module, weights, message: str, kind: type[Exception] = ValueError) -> None:
    before = snapshot(model)
    with pytest.raises(kind, match=message) as error:
        load_weights(model, weights)
    assert os.path.basename(weights) in str(error.value) and "weights=" in str(error.value)
    assert_holds(model, before)


@pytest.mark.parametrize("name", ["none.pth", "none.pt", "none.safetensors", "no/such/folder/none.pth"])
def test_missing_file(name: str, model: ResNet, tmp_path: Path) -> None:
    refused(model, str(tmp_path / name), "no such file", FileNotFoundError)
    refused(model, tmp_path / name, "no such file", FileNotFoundError)


@pytest.mark.parametrize("name", ["w.npz", "w.h5", "w.tar.gz", "w.onnx", "weights"])
@pytest.mark.parametrize("exists", [True, False])
def test_unknown_extension(name: str, exists: bool, model: ResNet, tmp_path: Path) -> None:
    if exists:
        (tmp_path / name).write_bytes(b"x")
    refused(model, str(tmp_path / name), r"allowed: \.pth, \.pt, .*, \.safetensors")


def test_folder(model: ResNet, tmp_path: Path) -> None:
    (tmp_path / "folder.pth").mkdir()
    refused(model, tmp_path / "folder.pth", "not a file")


def test_pipe(model: ResNet, tmp_path: Path) -> None:
    for name in ("pipe.pth", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)  # opening one would wait for a writer
        refused(model, tmp_path / name, "not a file")


def test_links(state, model: ResNet, tmp_path: Path) -> None:
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match=r"loop\.pth"):
        load_weights(model, loop)
    (tmp_path / "null.pth").symlink_to("/dev/null")
    refused(model, tmp_path / "null.pth", "not a file")
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "link.safetensors").symlink_to("w.safetensors")
    load_weights(model, tmp_path / "link.safetensors")
    assert_holds(model, state)


def test_an_archive_that_unpacks_to_far_more_than_its_size(state, model: ResNet, tmp_path: Path) -> None:
    torch.save({key: torch.zeros_like(value) for key, value in state.items()}, tmp_path / "plain.pth")
    bomb = tmp_path / "bomb.pth"
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert bomb.stat().st_size * 20 < (tmp_path / "plain.pth").stat().st_size
    refused(model, bomb, r"is refused: its \d+ bytes unpack to \d+.*safetensors")


def header(fields: dict, length: int | None = None, data: bytes = bytes(40)) -> bytes:
    """A safetensors file, with any length written for its header."""
    text = json.dumps(fields).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(*offsets: int, shape: tuple = (10,), dtype: str = "F32") -> dict:
    return {"bn1.bias": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


LIES = {
    "length_of_the_header": header(entry(0, 40), length=1 << 60),
    "length_beyond_the_file": header(entry(0, 40), length=10_000),
    "length_too_short": header(entry(0, 40), length=9),
    "no_json": (8).to_bytes(8, "little") + b"\xff" * 8,
    "deep_json": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "end_beyond_the_file": header(entry(0, 4000, shape=(1000,))),
    "negative_offset": header(entry(-40, 40)),
    "more_values_than_bytes": header(entry(0, 40, shape=(1 << 40,))),
    "overflowing_shape": header(entry(0, 40, shape=(1 << 62, 1 << 62))),
    "negative_shape": header(entry(0, 40, shape=(-10,))),
    "unknown_dtype": header(entry(0, 40, dtype="OBJECT")),
    "overlap": header({**entry(0, 40), "bn1.weight": entry(0, 40)["bn1.bias"]}),
    "hole": header(entry(20, 40, shape=(5,))),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies(lie: str, model: ResNet, tmp_path: Path) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(LIES[lie])
    refused(model, path, "truncated, corrupt or no .safetensors file")


@pytest.mark.parametrize("extension", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_anywhere_is_an_error_or_harmless(extension: str, tmp_path: Path) -> None:
    """Random bytes change: never another exception than ValueError, never a model that is changed in part."""
    model, path = CifarResNet(8), tmp_path / f"w{extension}"
    before = snapshot(model)
    (save_file if extension == ".safetensors" else torch.save)(before, path)
    whole, random = path.read_bytes(), Random(0)
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 5))):
            place = random.choice((random.randrange(3000), random.randrange(len(whole)), -random.randrange(1, 3000)))
            damaged[place] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            load_weights(model, path)
        except ValueError as error:
            assert path.name in str(error)
            assert_holds(model, before)
        model.load_state_dict(before)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_file(kind: str, share: float, state, model: ResNet, tmp_path: Path) -> None:
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(model, path, "truncated, corrupt or no")


@pytest.mark.parametrize("extension", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"hello", b"\x00" * 4096, b"PK\x03\x04" * 99])
def test_something_else(extension: str, content: bytes, model: ResNet, tmp_path: Path) -> None:
    path = tmp_path / f"w{extension}"
    path.write_bytes(content)
    refused(model, path, "truncated, corrupt or no")


class RunsCode:
    """An object whose pickle calls a function when it is read."""

    def __reduce__(self):
        return SEEN_BY_PICKLE.append, ("ran",)


def write_code(path: Path, kind: str, state: dict[str, Tensor]) -> None:
    if kind == "zip":
        torch.save({**state, "extra": RunsCode()}, path)
    elif kind == "legacy":
        torch.save({**state, "extra": RunsCode()}, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"extra": RunsCode()}))
    elif kind == "module":
        torch.save(small(), path)
    elif kind == "namespace":
        torch.save({"model": state, "args": argparse.Namespace(lr=0.1)}, path)
    elif kind == "numpy":
        torch.save({"a": np.ones(3)}, path)
    else:
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "module", "namespace", "numpy", "torchscript"])
@pytest.mark.filterwarnings("ignore:.*TorchScript archive", "ignore:.*pickle protocol")
def test_code_is_refused_and_never_run(kind: str, state, model: ResNet, tmp_path: Path) -> None:
    path = tmp_path / "code.pth"
    write_code(path, kind, state)
    SEEN_BY_PICKLE.clear()
    refused(model, path, "is refused: .*run code.*safetensors.torch.save_file")
    assert not SEEN_BY_PICKLE
    if kind == "namespace":
        with pytest.raises(ValueError, match=r"argparse\.Namespace"):
            load_weights(model, path)
        # The user can vouch for a type with torch's own means.
        with torch.serialization.safe_globals([argparse.Namespace]):
            load_weights(model, path)
        assert_holds(model, state)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the network: every address serves a ResNet-18 under seed 4, and is noted."""
    torch.manual_seed(4)
    served = torchvision.models.resnet18().state_dict()
    asked: list[str] = []

    def serve(url, *args, **kwargs):
        asked.append(url)
        assert kwargs == {"progress": False, "check_hash": True}
        return served

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", serve)
    return asked


ENUM = torchvision.models.ResNet18_Weights


@pytest.mark.parametrize(
    "weights", [ENUM.IMAGENET1K_V1, ENUM.DEFAULT, "IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.DEFAULT"]
)
def test_names(weights, downloads: list[str]) -> None:
    model = models.resnet18(weights=weights, progress=False)
    assert model.fc.out_features == 1000
    assert downloads == [ENUM.IMAGENET1K_V1.url]
    torch.manual_seed(4)
    assert_holds(model, torchvision.models.resnet18().state_dict())
    load_weights(model, weights, progress=False)
    assert len(downloads) == 2


def test_named_weights_fix_the_number_of_classes(downloads: list[str]) -> None:
    kwargs = {"weights": "DEFAULT", "progress": False}
    assert models.resnet18(num_classes=1000, **kwargs).fc.out_features == 1000
    for build in (models.resnet18, torchvision.models.resnet18):
        with pytest.raises(ValueError, match="'num_classes' expected value 1000 but got 10 instead"):
            build(num_classes=10, **kwargs)
    assert len(downloads) == 1


WRONG_NAMES = [
    torchvision.models.ResNet50_Weights.DEFAULT,
    torchvision.models.quantization.ResNet18_QuantizedWeights.DEFAULT,
    torchvision.models.VGG16_Weights.DEFAULT,
    "ResNet50_Weights.DEFAULT",
    "resnet18_Weights.DEFAULT",
    "IMAGENET1K_V9",
    "ResNet18_Weights.IMAGENET1K_V9",
    "imagenet",
    "",
    True,
    3,
    [1],
]


@pytest.mark.parametrize("weights", WRONG_NAMES, ids=repr)
def test_wrong_names_are_refused(weights, downloads: list[str]) -> None:
    model = models.resnet18()
    before = snapshot(model)
    for refuse in (lambda: load_weights(model, weights), lambda: models.resnet18(weights=weights)):
        with pytest.raises(ValueError, match="weights") as error:
            refuse()
        came = type(weights).__name__ if isinstance(weights, int | list) else repr(weights)
        assert came in str(error.value) and "allowed" in str(error.value)
        assert not str(error.value).startswith(("'", '"')), "KeyError prints its message quoted"
    if weights != "" and not isinstance(weights, int | list):
        with pytest.raises((TypeError, KeyError)) as theirs:
            torchvision.models.resnet18(weights=weights)
        assert isinstance(error.value, theirs.type), "code written for torchvision catches it"
        assert "ResNet18_Weights.IMAGENET1K_V1" in str(error.value)
    assert_holds(model, before)
    assert not downloads


def test_names_follow_the_architecture_of_the_model() -> None:
    with torch.device("meta"):
        known = {
            "ResNet34_Weights": ResNet(BasicBlock, [3, 4, 6, 3]),
            "ResNet50_Weights": torchvision.models.resnet50(),
            "ResNet152_Weights": ResNet(Bottleneck, [3, 8, 36, 3]),
            "ResNeXt50_32X4D_Weights": ResNet(Bottleneck, [3, 4, 6, 3], groups=32, width_per_group=4),
            "Wide_ResNet50_2_Weights": ResNet(Bottleneck, [3, 4, 6, 3], width_per_group=128),
        }
    for enum, model in known.items():
        with pytest.raises(ValueError, match=f"allowed: {enum}.IMAGENET1K_V1"):
            load_weights(model, "NO_SUCH_NAME")
    for model in (small(), CifarResNet(8), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="torchvision has no weights for this architecture"):
            load_weights(model, "DEFAULT")
    with pytest.raises(ValueError, match="torchvision has no weights for this architecture"):
        models.cifar_resnet(8, weights="DEFAULT")


def test_named_weights_leaves_files_and_mappings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for weights in (None, {}, Path("DEFAULT"), "DEFAULT.pth", "a/DEFAULT", "./DEFAULT"):
        assert named_weights("ResNet18_Weights", weights) is None
    assert named_weights("ResNet18_Weights", "DEFAULT") is ENUM.DEFAULT
    # A file of that name is a file: it is refused for its extension, not taken for a download.
    monkeypatch.chdir(tmp_path)
    Path("DEFAULT").write_bytes(b"x")
    assert named_weights("ResNet18_Weights", "DEFAULT") is None


def test_without_torchvision(state, model: ResNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match=r"weights='DEFAULT'.*Install torchvision, or pass the path"):
        models.resnet18(weights="DEFAULT")
    load_weights(model, state)
    assert_holds(model, state)


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args, **kwargs):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match=r"could not be downloaded.*https://download.pytorch.org/.*path of the file"):
        models.resnet18(weights="DEFAULT")


def test_builders_load_files_and_state_dicts(tmp_path: Path) -> None:
    torch.manual_seed(4)
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    for weights in (state, tmp_path / "w.safetensors", str(tmp_path / "w.safetensors")):
        assert_holds(models.resnet18(weights=weights, num_classes=7), state)
    with pytest.raises(ValueError, match=r"does not fit ResNet: .*num_classes=7"):
        models.resnet18(weights=state)
    cifar = CifarResNet(8, 3, 1).state_dict()
    assert_holds(models.cifar_resnet(8, 3, 1, weights=cifar), cifar)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        models.resnet50(weights="nowhere.pth")

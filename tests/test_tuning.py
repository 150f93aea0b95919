"""``tuning``: the store of measured configurations. Files are data that may be old, foreign or broken."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_triton import plan, tuning
from resnet_triton.devices import Target
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.tuning import ChainEntry, Entry

DEVICE = "NVIDIA Test GPU"
SHAPE = ConvShape(32, 14, 14, 64, 64, 3, 3, 1, 1)
CONFIG = ConvConfig("conv_tma", (32, 2, 2), 64, 64, 8, 4)
ENTRY = Entry(SHAPE, "float16", True, CONFIG, 12.5, 20.0, versions={"torch": "2.11.0"})


def chain(n: int = 32, **changes: Any) -> ChainShape:
    """The 3x3, the 1x1 behind it, the projection and the next 1x1 of a block at a batch size."""
    parts = {"conv": ConvShape(n, 14, 14, 64, 64, 3, 3, 1, 1), "project": ConvShape(n, 14, 14, 64, 256)}
    return ChainShape(**{"expand": ConvShape(n, 14, 14, 64, 256), **parts, **changes})


CHAIN = ChainEntry(
    chain(reduce=ConvShape(32, 14, 14, 256, 64)), "float16", ConvConfig("chain_rolling", (4, 700, 16), 64, 64, 4, 3),
    30.0, 70.0, {"torch": "2.11.0"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty folders in place of the user's, and no memory of files read before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RESNET_TRITON_CONFIG_DIR", raising=False)
    forget()
    yield {"cache": tmp_path / "xdg" / "resnet_triton", "named": tmp_path / "named"}
    forget()


def forget() -> None:
    plan.forget()


def store(folder: Path, *entries: Entry | ChainEntry, device: str = DEVICE) -> Path:
    path = folder / tuning.file_name(device)
    tuning.save(path, device, list(entries), 90)
    forget()
    return path


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(
        r.getMessage() for r in caplog.records if r.name == "resnet_triton" and r.levelno == logging.WARNING
    )


def test_round_trip(folders) -> None:
    other = replace(
        ENTRY, shape=replace(SHAPE, stride=2), dtype="float32", precision="ieee", residual=False,
        versions=tuning.versions(),
    )  # fmt: skip
    path = store(folders["cache"], ENTRY, other)
    assert tuning.load(path) == [ENTRY, other]
    data = json.loads(path.read_text())
    assert data["format"] == tuning.FORMAT and data["device"] == DEVICE and data["sm"] == 90
    assert tuning.load(path)[1].versions["torch"] == torch.__version__


def test_chains_come_back_as_written(folders) -> None:
    """A strip may be longer than any tile."""
    other = replace(CHAIN, shape=chain(conv=None, project=None, subsample=2), dtype="bfloat16")
    path = store(folders["cache"], CHAIN, ENTRY, other)
    assert tuning.load(path) == [ENTRY, CHAIN, other]
    assert tuning.read(path).chains == (CHAIN, other)
    data = json.loads(path.read_text())
    del data["chains"]  # a file from before there were any
    path.write_text(json.dumps(data))
    assert tuning.load(path) == [ENTRY]


def test_split_and_dependent_launch(folders) -> None:
    """They come back as written; files from before they existed mean one program a tile, launched in order."""
    config = replace(CONFIG, split=9, pdl=True)
    path = store(folders["cache"], replace(ENTRY, config=config))
    assert tuning.load(path)[0].config == config
    data = json.loads(path.read_text())
    for name in ("split", "pdl"):
        del data["entries"][0]["config"][name]
    path.write_text(json.dumps(data))
    assert tuning.load(path)[0].config == CONFIG


def test_saving_replaces_the_file_and_leaves_nothing_else(folders) -> None:
    store(folders["cache"], ENTRY)
    path = store(folders["cache"], replace(ENTRY, us=1.0))
    assert [e.us for e in tuning.load(path)] == [1.0]
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_save_keeps_the_old_file(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(folders["cache"], ENTRY)

    def fail(*arguments) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.save(path, DEVICE, [replace(ENTRY, us=1.0)])
    monkeypatch.undo()
    assert tuning.load(path) == [ENTRY]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H200", "NVIDIA_H200.json"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA_H100_80GB_HBM3.json"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA_A100-SXM4-80GB.json"),
        ("../../etc/passwd", ".._.._etc_passwd.json"),
    ],
)
def test_file_names_stay_in_their_folder(name: str, file: str) -> None:
    assert tuning.file_name(name) == file
    assert (Path("folder") / file).parent == Path("folder")


def test_search_order(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Path(tuning.__file__).parent / "tuned"
    assert tuning.search_path() == [folders["cache"], shipped]
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folders["named"]))
    assert tuning.search_path() == [folders["named"], folders["cache"], shipped]


def test_without_xdg_the_cache_lies_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.cache_dir() == tmp_path / ".cache" / "resnet_triton"


def test_the_named_folder_wins_over_the_cache(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(SHAPE, c=128)
    store(folders["cache"], replace(ENTRY, us=1.0), replace(ENTRY, us=1.0, shape=other))
    store(folders["named"], replace(ENTRY, us=2.0))
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True).us == 1.0
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folders["named"]))
    forget()
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True).us == 2.0
    assert tuning.lookup(DEVICE, other, torch.half, True).us == 1.0, "the next folder answers what the first cannot"


def test_no_file_is_no_entry(folders, caplog: pytest.LogCaptureFixture) -> None:
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True) is None
    assert not warnings_of(caplog)


def test_a_file_is_for_its_own_device(folders) -> None:
    store(folders["cache"], ENTRY)
    assert tuning.lookup("NVIDIA Other GPU", SHAPE, torch.half, True) is None


GOOD: dict[str, Any] = ENTRY.to_dict()
FORMAT = tuning.FORMAT


def file_with(entry: Any, **more: Any) -> str:
    """A file whose second entry is this one."""
    return json.dumps({"format": FORMAT, "device": DEVICE, "sm": 90, "entries": [GOOD, entry], **more})


def entry_with(value: Any, *path: str) -> str:
    """A file whose second entry has another value there."""
    entry = json.loads(json.dumps(GOOD))
    place = entry
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return file_with(entry)


def chain_with(value: Any, *path: str) -> str:
    """A file with a chain that has another value there."""
    entry = json.loads(json.dumps(CHAIN.to_dict()))
    place = entry
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return file_with(GOOD, chains=[entry])


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


#: Content, and what the message says besides the file's name.
BROKEN: dict[str, tuple[str | bytes, str]] = {
    "not JSON": ("{", r"is not JSON .*delete it, or measure again with `resnet-triton tune`"),
    "empty": ("", r"is not JSON"),
    "binary": (b"\xff\xfe\x00", r"is not JSON"),
    "nested deeply": ("[" * 100_000, r"nested too deeply"),
    "a number of 10,000 digits": (entry_with(0, "us").replace(": 0,", ": 1" + "0" * 10_000 + ","), r"is not JSON"),
    "NaN": (entry_with(float("nan"), "us"), r"NaN is no number"),
    "infinity": (entry_with(0, "us").replace('"us": 0', '"us": 1e999'), r"entries\[1\].us is inf"),
    "a list": ("[]", r"has format None; this version reads formats 2 and 3"),
    "no format": ('{"entries": []}', r"has format None"),
    "an older format": ('{"format": 1, "entries": []}', r"has format 1; this version reads formats 2 and 3: delete it"),
    "a newer format": (
        file_with(GOOD, format=FORMAT + 1),
        r"has format 4, of a newer resnet-triton; this version reads up to format 3: upgrade resnet-triton, or delete",
    ),
    "a format in words": (file_with(GOOD, format="2"), r"has format '2'"),
    "no entries": (json.dumps({"format": FORMAT, "device": DEVICE, "sm": 90}), r"the file lacks 'entries'"),
    "an unknown key": (file_with(GOOD, hook="os.system"), r"the file has unknown keys 'hook'"),
    "entries that are no list": (file_with(GOOD, entries={}), r"entries is \{\}, allowed: a list"),
    "too many entries": (
        file_with(GOOD, entries=[0] * 50_001),
        r"entries is '50001 of them', allowed: a list of at most",
    ),
    "no device": (file_with(GOOD, device=""), r"device is '', allowed: a device name"),
    "another device": (file_with(GOOD, device="NVIDIA Other"), r"is of 'NVIDIA Other', not of 'NVIDIA Test GPU'"),
    "an architecture in words": (file_with(GOOD, sm="sm_90"), r"sm is 'sm_90', allowed: an integer"),
    "an entry that is no object": (file_with(3), r"entries\[1\] is 3, allowed: an object with 'shape'"),
    "no time": (file_with(without("us")), r"entries\[1\] lacks 'us'"),
    "a negative time": (entry_with(-1, "us"), r"entries\[1\].us is -1, allowed: positive microseconds"),
    "a word for a time": (entry_with("fast", "us"), r"us is 'fast', allowed: positive microseconds"),
    "true for a time": (entry_with(True, "us"), r"us is True, allowed: positive microseconds"),
    "an unknown dtype": (
        entry_with("float8", "dtype"),
        r"dtype is 'float8', allowed: 'float32', 'float16', 'bfloat16'",
    ),
    "fp32 without a precision": (entry_with("float32", "dtype"), r"precision is '', allowed: 'tf32', 'ieee'"),
    "fp16 with a precision": (entry_with("tf32", "precision"), r"precision is 'tf32', allowed: ''"),
    "a number for a truth": (entry_with(1, "residual"), r"residual is 1, allowed: true or false"),
    "an unknown kernel": (
        entry_with("winograd", "config", "kernel"),
        r"entries\[1\].config.kernel is 'winograd', allowed: 'conv_tma'",
    ),
    "a kernel that names code": (entry_with("os:system", "config", "kernel"), r"kernel is 'os:system', allowed"),
    "a tile of 48": (entry_with(48, "config", "bn"), r"entries\[1\].config: bn must be a power of two"),
    "a tile of a million": (
        entry_with(1 << 20, "config", "bn"),
        r"config.bn is 1048576, allowed: an integer from 16 to 512",
    ),
    "a huge box": (entry_with([512, 512, 1], "config", "box"), r"its product\) is 262144"),
    "a box of words": (entry_with(["1", "8", "8"], "config", "box"), r"config.box is '1', allowed: an integer"),
    "a box of two": (entry_with([8, 8], "config", "box"), r"config.box is \[8, 8\], allowed: three integers"),
    "1024 warps": (entry_with(1024, "config", "warps"), r"config.warps is 1024, allowed: an integer from 1 to 32"),
    "a split of 17": (entry_with(17, "config", "split"), r"config.split is 17, allowed: an integer from 1 to 16"),
    "true for a split": (entry_with(True, "config", "split"), r"config.split is True, allowed: an integer from 1"),
    "a number for a dependent launch": (entry_with(1, "config", "pdl"), r"config.pdl is 1, allowed: true or false"),
    "an unknown field of a configuration": (
        entry_with("import os", "config", "code"),
        r"entries\[1\].config has unknown keys 'code'",
    ),
    "an unknown size": (entry_with(2, "shape", "groups"), r"entries\[1\].shape has unknown keys 'groups'"),
    "a size missing": (entry_with({"n": 1}, "shape"), r"entries\[1\].shape lacks 'c', 'dilation'"),
    "an absurd size": (entry_with(10**30, "shape", "n"), r"shape.n is 10+, allowed: an integer from 1 to 1048576"),
    "a fraction for a size": (entry_with(32.0, "shape", "n"), r"shape.n is 32.0, allowed: an integer"),
    "a window that does not fit": (entry_with(31, "shape", "r"), r"shape is .*allowed: a window that fits"),
    "chains that are no list": (file_with(GOOD, chains={}), r"chains is \{\}, allowed: a list"),
    "a convolution among the chains": (file_with(GOOD, chains=[GOOD]), r"chains\[0\] has unknown keys 'precision'"),
    "a chain without its sum": (chain_with(None, "shape", "expand"), r"shape.expand is None, allowed: an object"),
    "a chain of other images": (chain_with(8, "shape", "conv", "n"), r"chains\[0\].shape: expand must read"),
    "a shortcut of other images": (chain_with(8, "shape", "project", "n"), r"shape: project must compute"),
    "an absurd size in a chain": (chain_with(0, "shape", "reduce", "k"), r"shape.reduce.k is 0, allowed: an integer"),
    "a chain that keeps a third": (chain_with(3, "shape", "subsample"), r"subsample is 3, allowed: an integer from 1"),
    "a chain in fp32": (chain_with("float32", "dtype"), r"dtype is 'float32', allowed: 'float16', 'bfloat16'"),
    "a chain by a convolution's kernel": (
        chain_with("conv_tma", "config", "kernel"),
        r"chains\[0\].config.kernel is 'conv_tma', allowed: 'conv_chain', 'chain_rolling'",
    ),
    "a chain without a time": (chain_with(None, "library_us"), r"library_us is None, allowed: positive"),
    "a chain with a long box": (chain_with([1, 8, 513], "config", "box"), r"box is 513, allowed: an integer from 1"),
    "a chain that names code": (chain_with("os", "shape", "hook"), r"shape has unknown keys 'hook'"),
    "versions in numbers": (entry_with(2, "versions", "torch"), r"versions.torch is 2, allowed: a short text"),
    "a long version": (entry_with("9" * 1000, "versions", "torch"), r"allowed: a short text"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_and_ignored(
    kind: str, folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content, message = BROKEN[kind]
    store(folders["cache"], ENTRY)
    folders["named"].mkdir()
    path = folders["named"] / tuning.file_name(DEVICE)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folders["named"]))
    forget()
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True) == ENTRY, "the next folder serves"
    tuning.lookup(DEVICE, replace(SHAPE, n=33), torch.half, True)
    said = warnings_of(caplog)
    assert said.count(str(path)) == 1, "one warning, however often it is looked up"
    assert re.search(message, said) and "resnet-triton tune" in said
    with pytest.raises(ValueError, match=re.escape(str(path))):
        tuning.merge(path, DEVICE, [ENTRY])
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode()), "left as it is"


def test_the_file_that_the_broken_ones_come_from_is_good(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(file_with(GOOD))
    assert tuning.load(path) == [ENTRY, ENTRY]


@pytest.mark.parametrize("kind", ["pipe", "symlink loop", "folder", "huge", "no permission"])
def test_what_is_no_readable_file_is_named_and_ignored(
    kind: str, folders, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders["cache"].mkdir(parents=True)
    path = folders["cache"] / tuning.file_name(DEVICE)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "symlink loop":
            path.symlink_to(path)
        case "folder":
            path.mkdir()
        case "huge":
            with path.open("wb") as file:
                file.truncate(1 << 40)
        case "no permission":
            path.touch()

            def denied(*arguments) -> int:
                raise PermissionError(13, "Permission denied", str(path))

            monkeypatch.setattr(os, "open", denied)
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True) is None
    assert str(path) in warnings_of(caplog)


def test_a_named_folder_that_is_not_there_is_named(folders, monkeypatch, caplog) -> None:
    store(folders["cache"], ENTRY)
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folders["named"]))
    forget()
    for _ in range(2):
        assert tuning.lookup(DEVICE, SHAPE, torch.half, True) == ENTRY
    assert warnings_of(caplog).count("RESNET_TRITON_CONFIG_DIR=") == 1


def test_without_a_home_the_shipped_files_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert tuning.search_path() == [tuning.shipped_dir()]
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME or HOME"):
        tuning.cache_dir()


# Merging


def test_merging_replaces_the_same_and_keeps_the_others(folders) -> None:
    other = replace(ENTRY, shape=replace(SHAPE, n=8))
    path = store(folders["cache"], ENTRY, other)
    tuning.merge(path, DEVICE, [replace(ENTRY, us=1.0), replace(ENTRY, residual=False)])
    assert {e.key: e.us for e in tuning.load(path)} == {
        ENTRY.key: 1.0,
        other.key: other.us,
        replace(ENTRY, residual=False).key: ENTRY.us,
    }


def test_merging_keeps_convolutions_and_chains(folders) -> None:
    path = store(folders["cache"], ENTRY, CHAIN)
    half = replace(CHAIN, dtype="bfloat16")
    tuning.merge(path, DEVICE, [half, replace(CHAIN, us=1.0)])
    assert {e.key: e.us for e in tuning.load(path)} == {ENTRY.key: ENTRY.us, CHAIN.key: 1.0, half.key: CHAIN.us}
    tuning.merge(path, DEVICE, [replace(ENTRY, us=2.0)])
    assert {e.key: e.us for e in tuning.load(path)} == {ENTRY.key: 2.0, CHAIN.key: 1.0, half.key: CHAIN.us}


def test_merging_refuses_the_file_of_another_device(folders) -> None:
    path = store(folders["cache"], ENTRY)
    with pytest.raises(ValueError, match=r"is of 'NVIDIA Test GPU', these entries are of 'NVIDIA Other GPU'"):
        tuning.merge(path, "NVIDIA Other GPU", [ENTRY])


def test_merging_nothing_only_checks(folders) -> None:
    path = folders["cache"] / tuning.file_name(DEVICE)
    tuning.merge(path, DEVICE, [])
    assert not path.exists()


def test_two_processes_do_not_tune_into_one_folder(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with tuning.locked(lock), pytest.raises(BlockingIOError), tuning.locked(lock, wait=False):
        pass
    with tuning.locked(lock, wait=False):
        pass


# Other GPUs of the architecture


def sibling(sm: int, shape: ConvShape = SHAPE) -> tuple[str, Entry] | None:
    return tuning.lookup_sibling(Target("NVIDIA Other GPU", sm), shape, torch.half, True)


def test_another_gpu_of_the_architecture_answers(folders) -> None:
    store(folders["cache"], ENTRY)
    assert sibling(90) == (DEVICE, ENTRY)
    assert sibling(80) is None
    assert sibling(90, replace(SHAPE, c=128)) is None
    assert tuning.lookup_sibling(Target(DEVICE, 90), SHAPE, torch.half, True) is None, "it is no sibling of its own"


def test_the_architecture_is_that_of_the_devices_record(folders) -> None:
    path = folders["cache"] / "x.json"
    tuning.save(path, "NVIDIA A100-SXM4-80GB", [ENTRY])
    assert tuning.read(path).sm == 80
    tuning.save(path, "NVIDIA Unheard", [ENTRY])
    assert tuning.read(path).sm == 0


def test_other_files_of_the_folder_are_passed_over_in_silence(folders, caplog: pytest.LogCaptureFixture) -> None:
    store(folders["cache"], ENTRY)
    for name, text in (("summary.json", "{}"), ("a.json", "[" * 10_000), ("copy.json", file_with(GOOD))):
        (folders["cache"] / name).write_text(text)
    assert sibling(90) == (DEVICE, ENTRY)
    assert not warnings_of(caplog)


def test_precision_of_fp32_is_told_apart(folders) -> None:
    tf32, exact = (replace(ENTRY, dtype="float32", precision=p, us=us) for p, us in (("tf32", 1.0), ("ieee", 9.0)))
    store(folders["cache"], tf32, exact)
    assert tuning.lookup(DEVICE, SHAPE, torch.float32, True) == tf32
    assert tuning.lookup(DEVICE, SHAPE, torch.float32, True, "ieee") == exact
    with pytest.raises(ValueError, match="precision is '', allowed for float32: 'tf32', 'ieee'"):
        replace(ENTRY, dtype="float32")


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(32, 32), (40, 32), (47, 32), (49, 64), (64, 64), (128, 64), (129, None), (16, 32), (15, None)],
)
def test_nearest_batch_within_a_factor_of_two(batch: int, expected: int | None, folders) -> None:
    store(folders["cache"], replace(ENTRY, shape=replace(SHAPE, n=64)), ENTRY)
    found = tuning.lookup(DEVICE, replace(SHAPE, n=batch), torch.half, True)
    assert (found.shape.n if found else None) == expected


@pytest.mark.parametrize(("batch", "expected"), [(40, 32), (60, 64), (128, 64), (129, None), (15, None)])
def test_a_chain_is_looked_up_at_the_nearest_batch(batch: int, expected: int | None, folders) -> None:
    plain = replace(CHAIN, shape=chain())
    store(folders["cache"], CHAIN, replace(plain, shape=chain(64)), plain)
    found = tuning.lookup_chain(DEVICE, chain(batch), torch.half)
    assert (found.batch if found else None) == expected
    assert tuning.lookup_chain(DEVICE, chain(batch), torch.bfloat16) is None
    assert tuning.lookup_chain(DEVICE, chain(batch, subsample=2), torch.half) is None
    assert tuning.lookup_chain(DEVICE, chain(batch, project=None), torch.half) is None
    near = tuning.lookup_sibling_chain(Target("NVIDIA Other GPU", 90), chain(batch), torch.half)
    assert near == (found and (DEVICE, found))
    assert tuning.lookup_sibling_chain(Target("NVIDIA Other GPU", 80), chain(batch), torch.half) is None


@pytest.mark.parametrize(
    "change",
    [{"h": 15}, {"w": 15}, {"c": 128}, {"k": 128}, {"r": 1}, {"s": 1}, {"stride": 2}, {"padding": 0}, {"dilation": 2}],
    ids=str,
)
def test_everything_but_the_batch_must_match(change: dict[str, int], folders) -> None:
    store(folders["cache"], ENTRY)
    assert tuning.lookup(DEVICE, replace(SHAPE, **change), torch.half, True) is None


def test_dtype_and_residual_must_match(folders) -> None:
    store(folders["cache"], ENTRY)
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True) == ENTRY
    assert tuning.lookup(DEVICE, SHAPE, torch.bfloat16, True) is None
    assert tuning.lookup(DEVICE, SHAPE, torch.half, False) is None

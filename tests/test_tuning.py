"""``tuning``: the store of measured configurations. Files are data that may be old, foreign or broken."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_triton import plan, tuning
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.tuning import Entry

DEVICE = "NVIDIA Test GPU"
SHAPE = ConvShape(32, 14, 14, 64, 64, 3, 3, 1, 1)
ENTRY = Entry(SHAPE, "float16", True, ConvConfig("conv_tma", (32, 2, 2), 64, 64, 8, 4), 12.5, 20.0)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty folders in place of the user's, and no memory of files read before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RESNET_TRITON_CONFIG_DIR", raising=False)
    forget()
    yield {"cache": tmp_path / "xdg" / "resnet_triton", "named": tmp_path / "named"}
    forget()


def forget() -> None:
    tuning.entries_for.cache_clear()
    plan.choose_conv.cache_clear()


def store(folder: Path, *entries: Entry, device: str = DEVICE) -> Path:
    path = folder / tuning.file_name(device)
    tuning.save(path, device, list(entries))
    forget()
    return path


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(
        r.getMessage() for r in caplog.records if r.name == "resnet_triton" and r.levelno == logging.WARNING
    )


def test_round_trip(folders) -> None:
    other = replace(ENTRY, shape=replace(SHAPE, stride=2, dilation=1), dtype="bfloat16", residual=False)
    path = store(folders["cache"], ENTRY, other)
    assert tuning.load(path) == [ENTRY, other]
    assert tuning.entries_for(DEVICE) == (ENTRY, other)
    data = json.loads(path.read_text())
    assert data["format"] == tuning.FORMAT and data["device"] == DEVICE
    assert data["versions"]["torch"] == torch.__version__


def test_saving_replaces_the_file_and_leaves_nothing_else(folders) -> None:
    store(folders["cache"], ENTRY)
    path = store(folders["cache"], replace(ENTRY, us=1.0))
    assert [e.us for e in tuning.load(path)] == [1.0]
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_save_keeps_the_old_file(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    path = store(folders["cache"], ENTRY)

    def fail(self: Path, text: str) -> None:
        self.write_bytes(text[: len(text) // 2].encode())
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.save(path, DEVICE, [replace(ENTRY, us=1.0)])
    monkeypatch.undo()
    assert tuning.load(path) == [ENTRY]


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
    store(folders["cache"], replace(ENTRY, us=1.0))
    store(folders["named"], replace(ENTRY, us=2.0))
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True).us == 1.0
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folders["named"]))
    forget()
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True).us == 2.0


def test_no_file_is_no_entry(folders, caplog: pytest.LogCaptureFixture) -> None:
    assert tuning.entries_for(DEVICE) == ()
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True) is None
    assert not warnings_of(caplog)


def test_a_file_is_for_its_own_device(folders) -> None:
    store(folders["cache"], ENTRY)
    assert tuning.lookup("NVIDIA Other GPU", SHAPE, torch.half, True) is None


GOOD: dict[str, Any] = ENTRY.to_dict()
BROKEN = {
    "not JSON": ("{", r"is not JSON .*delete it or tune again"),
    "binary": (b"\xff\xfe\x00", r"is not JSON .*delete it or tune again"),
    "a list": ([], r"has format None; this version reads format 1: tune again"),
    "no format": ({"entries": []}, r"has format None; this version reads format 1"),
    "a newer format": ({"format": 2, "entries": [GOOD]}, r"has format 2; this version reads format 1"),
    "no entries": ({"format": 1}, r"malformed entry \(KeyError: 'entries'\)"),
    "an entry that is no dict": ({"format": 1, "entries": [3]}, r"malformed entry \(TypeError"),
    "no time": (
        {"format": 1, "entries": [{k: v for k, v in GOOD.items() if k != "us"}]},
        r"malformed entry \(KeyError: 'us'",
    ),
    "a negative time": (
        {"format": 1, "entries": [{**GOOD, "us": -1}]},
        r"us and library_us must be positive microseconds",
    ),
    "NaN": ({"format": 1, "entries": [{**GOOD, "library_us": float("nan")}]}, r"must be positive microseconds"),
    "a word for a time": ({"format": 1, "entries": [{**GOOD, "us": "fast"}]}, r"could not convert string to float"),
    "an unknown kernel": (
        {"format": 1, "entries": [GOOD, {**GOOD, "config": {**GOOD["config"], "kernel": "winograd"}}]},
        r"kernel='winograd' is unknown",
    ),
    "a tile of 48": (
        {"format": 1, "entries": [{**GOOD, "config": {**GOOD["config"], "bn": 48}}]},
        r"bn must be a power of two",
    ),
    "an unknown field": (
        {"format": 1, "entries": [{**GOOD, "config": {**GOOD["config"], "code": "x"}}]},
        r"a configuration needs",
    ),
    "an unknown size": ({"format": 1, "entries": [{**GOOD, "shape": {**GOOD["shape"], "groups": 2}}]}, r"TypeError"),
    "a size missing": ({"format": 1, "entries": [{**GOOD, "shape": {"n": 1}}]}, r"TypeError"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_and_ignored(
    kind: str, folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content, message = BROKEN[kind]
    store(folders["cache"], ENTRY)
    folders["named"].mkdir()
    path = folders["named"] / tuning.file_name(DEVICE)
    path.write_bytes(
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    with pytest.raises(ValueError, match=message) as error:
        tuning.load(path)
    assert str(path) in str(error.value)
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folders["named"]))
    forget()
    assert tuning.lookup(DEVICE, SHAPE, torch.half, True) == ENTRY, "the next folder serves"
    tuning.lookup(DEVICE, SHAPE, torch.half, True)
    said = warnings_of(caplog)
    assert said.count(str(path)) == 1, "one warning, however often it is looked up"


def test_an_unreadable_file_is_ignored(
    folders, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(folders["cache"], ENTRY)

    def denied(self: Path) -> str:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_text", denied)
    assert tuning.entries_for(DEVICE) == ()
    assert str(path) in warnings_of(caplog)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(32, 32), (40, 32), (47, 32), (49, 64), (64, 64), (128, 64), (129, None), (16, 32), (15, None)],
)
def test_nearest_batch_within_a_factor_of_two(batch: int, expected: int | None, folders) -> None:
    store(folders["cache"], replace(ENTRY, shape=replace(SHAPE, n=64)), ENTRY)
    found = tuning.lookup(DEVICE, replace(SHAPE, n=batch), torch.half, True)
    assert (found.shape.n if found else None) == expected


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

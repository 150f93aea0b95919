"""Checkpoints: complete or not there after a crash anywhere, and refused when they are damaged."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_triton.runs import files, rng
from resnet_triton.runs.checkpoint import STATE, Checkpoints, name_of

ROOT = Path(__file__).resolve().parent.parent
OPERATIONS = ("make_folder", "write_file", "rename", "sync_folder", "remove_folder")


def content(n: int) -> tuple[dict[str, object], dict[str, dict[str, torch.Tensor]]]:
    """Facts and tensors that tell which checkpoint they are of."""
    return {"n": n, "loss": 0.1 * n}, {
        "model": {"w": torch.full((3, 2), float(n)), "count": torch.tensor(n)},
        "optimizer": {} if n == 0 else {"0.momentum_buffer": torch.full((5,), -float(n), dtype=torch.bfloat16)},
    }


def save(checkpoints: Checkpoints, n: int, keep: tuple[int, ...] = ()) -> None:
    checkpoints.save(name_of(n, 0), *content(n), keep=[name_of(k, 0) for k in keep])


def check_last(folder: Path, allowed: set[int]) -> int:
    """The last checkpoint is one of the allowed ones, whole; which one."""
    checkpoints = Checkpoints(folder)
    found = checkpoints.load(checkpoints.names()[-1])
    n = found.facts["n"]
    facts, tensors = content(n)
    assert n in allowed
    assert found.facts["loss"] == facts["loss"]
    assert found.tensors.keys() == tensors.keys()
    for stem, named in tensors.items():
        assert found.tensors[stem].keys() == named.keys()
        for key, value in named.items():
            assert found.tensors[stem][key].dtype == value.dtype
            assert torch.equal(found.tensors[stem][key], value)
    return n


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_the_last_and_the_kept_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.names() == []
    for n in range(12):
        save(checkpoints, n, keep=(2,))
    assert checkpoints.names() == [name_of(2, 0), name_of(11, 0)]
    assert check_last(checkpoints.folder, {11}) == 11
    checkpoints.clear()
    assert list(checkpoints.folder.iterdir()) == []


def test_names_sort_by_epoch_and_step():
    positions = [(0, 0), (0, 9), (0, 10), (1, 0), (9, 123456), (10, 0), (999, 5), (1000, 0)]
    assert sorted(name_of(*p) for p in positions) == [name_of(*p) for p in positions]


class Crash(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("half", (False, True), ids=("before", "within"))
def test_a_crash_between_or_within_any_two_file_operations_leaves_a_whole_checkpoint(half, tmp_path, monkeypatch):
    done: list[str] = []
    crash_at = None

    def crashing(name):
        real = getattr(files, name)

        def operation(*args):
            if len(done) == crash_at:
                if half and name == "write_file":
                    args[0].write_bytes(args[1][: len(args[1]) // 2])
                if half and name == "remove_folder":
                    sorted(args[0].iterdir())[0].unlink()
                raise Crash
            done.append(name)
            return real(*args)

        return operation

    for name in OPERATIONS:
        monkeypatch.setattr(files, name, crashing(name))
    seen, crash = set(), 0
    while True:
        folder = tmp_path / str(crash)
        checkpoints = Checkpoints(folder)
        crash_at = None
        save(checkpoints, 1)
        save(checkpoints, 2, keep=(1,))
        done.clear()
        crash_at = crash
        try:
            save(checkpoints, 3, keep=(2,))
        except Crash:
            seen.add(check_last(folder, {2, 3}))
        else:
            break
        crash_at = None
        save(Checkpoints(folder), 3, keep=(2,))  # what the next process does
        save(Checkpoints(folder), 4, keep=(2,))
        assert check_last(folder, {4}) == 4
        assert Checkpoints(folder).names() == [name_of(2, 0), name_of(4, 0)]
        assert hidden(folder) == []
        crash += 1
    assert seen == {2, 3}
    assert crash == len(done)
    # each file is on the disk before the folder gets its name, and the name before anything older goes
    assert done == [
        "make_folder",
        *["write_file"] * 3,
        "sync_folder",
        "rename",
        "sync_folder",
        "rename",
        "remove_folder",
    ]


def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    save(Checkpoints(folder), 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(full))
    with pytest.raises(OSError, match=r"No space left on device: '.*model.safetensors'"):
        save(Checkpoints(folder), 2)
    assert [path.name for path in folder.iterdir()] == [name_of(1, 0)]
    monkeypatch.undo()
    save(Checkpoints(folder), 2)
    check_last(folder, {2})


def test_files_and_folders_are_synced(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), real(handle)))
    files.write_file(tmp_path / "a", b"text")
    files.sync_folder(tmp_path)
    assert synced == [(tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino]
    files.replace_file(tmp_path / "a", b"other")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"other"
    assert len(synced) == 3


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from tests.test_checkpoint import check_last, save
from resnet_triton.runs.checkpoint import Checkpoints, name_of

folder, rand, last = Path(sys.argv[1]), random.Random(5), 0
checkpoints = Checkpoints(folder)
save(checkpoints, last)
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        for n in range(last + 1, last + 10000):
            save(checkpoints, n, keep=(max(0, n - 3),))
        os._exit(0)
    while checkpoints.names()[-1] == name_of(last, 0):
        time.sleep(0.0005)
    time.sleep(rand.uniform(0, 0.02))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    last = check_last(folder, set(range(last, last + 10000)))
print(last)
"""


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "checkpoints")]
    child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) >= 20


# Damage


def damaged(folder: Path) -> str:
    with pytest.raises(ValueError) as raised:
        check_last(folder, {1, 2})
    return str(raised.value)


def change(path: Path, position: int, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] = byte
    path.write_bytes(content)


@pytest.mark.parametrize("earlier", (False, True))
def test_damage_is_named_with_a_way_out(earlier, tmp_path):
    def fresh() -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        checkpoints = Checkpoints(folder)
        if earlier:
            save(checkpoints, 1)
        save(checkpoints, 2, keep=(1,))
        return folder / name_of(2, 0)

    def check(path: Path, what: str) -> None:
        text = damaged(path.parent.parent)
        assert what in text
        assert repr(str(path)) in text
        assert f"delete the folder {str(path.parent)!r}" in text
        assert ("resume from epoch-0001" if earlier else "start from the beginning") in text
        assert "--no-resume" in text

    for file in ("model.safetensors", "optimizer.safetensors"):
        path = fresh() / file
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-7])
        check(path, f"it has {size - 7} bytes, {size} were written")
        path = fresh() / file
        change(path, -1, 0x7F)
        check(path, "SHA-256")
        path = fresh() / file
        path.unlink()
        check(path, "there is no such file")
    path = fresh() / STATE
    path.write_text(path.read_text().replace('"loss": 0.2', '"loss": 0.3'))
    check(path, "SHA-256")
    for text in ("", '{"sha256": "', "[]", "{}", "\x00" * 100, "[" * 100000):
        path = fresh() / STATE
        path.write_text(text)
        check(path, f"it is no {STATE}")
    path = fresh() / STATE
    path.unlink()
    check(path, "there is no such file")


def forged(folder: Path, file: str, inside: bytes, **facts: object) -> Path:
    """A checkpoint whose sums are right, but which holds something else."""
    save(Checkpoints(folder), 2)
    path = folder / name_of(2, 0)
    (path / file).write_bytes(inside)
    body = json.loads((path / STATE).read_text()) | facts
    del body["sha256"]
    body["files"][file] = {"bytes": len(inside), "sha256": hashlib.sha256(inside).hexdigest()}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / STATE).write_text(json.dumps(body))
    return path


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("pickle_ran"),))


def test_nothing_pickled_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    torch.save({"w": Exploit()}, pickled)
    forged(tmp_path / "a", "model.safetensors", pickled.getvalue())
    assert "model.safetensors" in damaged(tmp_path / "a")
    forged(tmp_path / "b", "../../outside.pth", pickled.getvalue())
    assert STATE in damaged(tmp_path / "b")
    assert not (tmp_path / "pickle_ran").exists()


def test_another_format_is_refused(tmp_path):
    forged(tmp_path, "model.safetensors", b"", format=99)
    text = damaged(tmp_path)
    assert "has format 99; this version reads 1" in text and "--no-resume" in text


# Random states


def test_random_states_come_back_through_json():
    def draws():
        return torch.rand(3).tolist(), np.random.normal(size=3).tolist(), random.random(), random.gauss(0, 1)

    rng.seed_all(3)
    np.random.normal()  # an odd number of them leaves one cached
    random.gauss(0, 1)
    facts, tensors = rng.state(torch.device("cpu"))
    expected = draws()
    assert draws() != expected
    rng.restore(json.loads(json.dumps(facts)), tensors, torch.device("cpu"))
    assert draws() == expected

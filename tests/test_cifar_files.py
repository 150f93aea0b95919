"""CIFAR's standard files: both versions read to the same images, damage is named, and no pickle runs code."""

from __future__ import annotations

import copyreg
import pickle
import re
import struct
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_triton.runs import cifar, data
from resnet_triton.runs.data import Request

ROWS = 6  # of each file
FILES = {
    "cifar10": ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
    "cifar100": (["train"], ["test"]),
}


def images(name: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels that belong to a file; the mean of an image grows with its label."""
    draws = np.random.RandomState(sum(name.encode()))
    labels = draws.randint(0, classes, ROWS)
    pixels = draws.randint(0, 100, (ROWS, 3072)) + (labels * 150 // classes)[:, None]
    return pixels.astype(np.uint8), labels


def of_python_2(pixels: np.ndarray, labels: np.ndarray, key: str) -> bytes:
    """A dictionary as Python 2 pickled it for the published files: text as bytes, names of numpy of before 1.x."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    shape = b"M" + struct.pack("<H", len(pixels)) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2
    content = b"T" + struct.pack("<i", pixels.size) + pixels.tobytes()
    state = b"(K\x01" + shape + dtype + b"K\x00tb" + b"\x89" + content + b"tb"
    pairs = text(b"batch_label") + text(b"training batch") + text(key.encode()) + b"](" + numbers + b"e"
    return b"\x80\x02}(" + pairs + text(b"data") + array + state + b"u."


def of_python_3(pixels: np.ndarray, labels: np.ndarray, key: str, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": pixels, key.encode(): labels.tolist()}, protocol=protocol)


def binary(pixels: np.ndarray, labels: np.ndarray, key: str) -> bytes:
    heads = [labels.astype(np.uint8)[:, None]]
    if key == "fine_labels":
        heads.insert(0, np.full((len(labels), 1), 255, np.uint8))  # coarse labels are not looked at
    return np.concatenate([*heads, pixels], 1).tobytes()


def write(folder: Path, version=binary, kind: str = "cifar10") -> Path:
    """A data set of the test, written as one of the versions."""
    folder.mkdir(parents=True, exist_ok=True)
    key, classes = ("labels", 10) if kind == "cifar10" else ("fine_labels", 100)
    for names in FILES[kind]:
        for name in names:
            file = folder / (f"{name}.bin" if version is binary else name)
            file.write_bytes(version(*images(name, classes), key))
    return folder


@pytest.mark.parametrize("kind", ("cifar10", "cifar100"))
def test_all_versions_hold_the_same_images(kind, tmp_path):
    found = []
    for version in (binary, of_python_2, of_python_3):
        write(tmp_path / version.__name__, version, kind)
        found.append(data.load_data(f"{kind}:{tmp_path / version.__name__}", 32, 0))
    assert len({one.id for one in found}) == 1
    train, _ = FILES[kind]
    first = found[0]
    assert (len(first.train), len(first.test)) == (ROWS * len(train), ROWS)
    assert len(first.classes) == (10 if kind == "cifar10" else 100)
    expected = [images(name, len(first.classes)) for name in train]
    pixels, labels = cifar.read(kind, tmp_path / "of_python_2")[0]
    assert np.array_equal(pixels, np.concatenate([p for p, _ in expected]).reshape(-1, 3, 32, 32))
    assert np.array_equal(labels, np.concatenate([numbers for _, numbers in expected]))


def test_the_folder_of_the_archive_is_found(tmp_path):
    for folder, version in (("cifar-10-batches-py", of_python_2), ("cifar-10-batches-bin", binary)):
        write(tmp_path / version.__name__ / folder, version)
        assert len(cifar.read("cifar10", tmp_path / version.__name__)[0][1]) == 5 * ROWS


def test_what_is_missing_is_named_with_where_it_is_found(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        data.load_data(f"cifar10:{tmp_path}", 32, 0)
    text = str(raised.value)
    assert "neither data_batch_1.bin nor data_batch_1" in text and str(tmp_path) in text
    assert "Unpack https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz there, or pass --download" in text
    (write(tmp_path) / "data_batch_4.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"there is no file '.*data_batch_4.bin' beside the others; unpack http"
    ):
        data.load_data(f"cifar10:{tmp_path}", 32, 0)
    with pytest.raises(ValueError, match="--size 28: the images of --data cifar10 have 32 pixels"):
        data.load_data(f"cifar10:{tmp_path}", 28, 0)


@pytest.mark.parametrize("version", (binary, of_python_2, of_python_3))
def test_damaged_files_are_named(version, tmp_path):
    path = write(tmp_path, version) / ("data_batch_2.bin" if version is binary else "data_batch_2")
    whole = path.read_bytes()
    pixels, labels = images("data_batch_2", 10)
    wrong = [b"", whole[:-1], whole[:3000], b"\x00" * 100, version(pixels, labels + 10, "labels")]
    if version is not binary:
        wrong += [
            version(pixels, labels[:-1], "labels"),
            version(pixels, labels, "fine_labels"),
            version(pixels[:, :-2], labels, "labels"),
            pickle.dumps({b"data": pixels.astype(np.int16), b"labels": labels.tolist()}, protocol=2),
            pickle.dumps({b"data": np.asfortranarray(pixels), b"labels": labels.tolist()}, protocol=2),
            pickle.dumps([1, 2], protocol=2),
        ]
    for content in wrong:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or no file of cifar10") as raised:
            cifar.read("cifar10", tmp_path)
        assert repr(str(path)) in str(raised.value) and "\n" not in str(raised.value)


class Exploit:
    """Calls a function while it is read."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_a_pickle_that_names_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, of_python_2) / "test_batch"
    ran = Path("pickle_ran")
    hostile = [
        *(pickle.dumps({"data": Exploit(Path.touch, ran)}, protocol=protocol) for protocol in range(6)),
        pickle.dumps({"data": Exploit(eval, "open('pickle_ran', 'w')")}, protocol=2),
        pickle.dumps(np.array([Exploit(Path.touch, ran)], dtype=object), protocol=2),
        pickle.dumps(OrderedDict(data=1), protocol=2),
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cos\nsystem\n(S'touch pickle_ran'\ntR.",
        b"(S'touch pickle_ran'\nios\nsystem\n.",
        # the attributes of what is allowed are not allowed
        b"\x80\x04\x8c\x15numpy.core.multiarray\x8c\x1b_reconstruct.__globals__.os\x93.",
    ]
    for content in hostile:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is refused: it names") as raised:
            cifar.read("cifar10", tmp_path)
        assert "reading it would run code" in str(raised.value)
    assert not ran.exists()
    copyreg.add_extension("os", "system", 240)
    try:
        path.write_bytes(b"\x80\x02\x82\xf0(X\x10\x00\x00\x00touch pickle_rantR.")
        with pytest.raises(ValueError, match=r"it names os\.system"):
            cifar.read("cifar10", tmp_path)
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert not ran.exists()


def test_numpy_sees_nothing_of_a_pickle(tmp_path):
    """Names that are allowed stand for classes that keep what they get, whatever that is."""
    assert all(known.__module__ == cifar.__name__ for known in cifar.STANDS_FOR.values())
    path = write(tmp_path, of_python_2) / "test_batch"
    for content in (
        b"\x80\x02}(U\x04datacnumpy\nndarray\nJ\xff\xff\xff\x7f\x85RU\x06labels]u.",
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n)R(K\x01tbU\x06labels]u.",
        b"\x80\x02c_codecs\nencode\nK\x01K\x02\x86R.",
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            cifar.read("cifar10", tmp_path)


def test_downloads_are_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    import torchvision.datasets.utils as theirs

    asked = []

    def fetch(url: str, root: str, filename: str, md5: str) -> None:
        asked.append((url, filename, md5))
        write(Path(root) / "cifar-10-batches-py", of_python_2)

    monkeypatch.setattr(theirs, "download_and_extract_archive", fetch)
    data.download(f"cifar10:{tmp_path}")
    data.download(f"cifar10:{tmp_path}")  # it is there now
    ((url, filename, md5),) = asked
    assert re.fullmatch(r"https://.*/cifar-10-python.tar.gz", url) and url.endswith(filename)
    assert re.fullmatch(r"[0-9a-f]{32}", md5)
    assert data.load_data(f"cifar10:{tmp_path}", 32, 0).id
    with pytest.raises(ValueError, match="--download is for --data cifar10:PATH and cifar100:PATH, got 'digits'"):
        data.download("digits")


# What is made of them


def test_images_are_normalised_by_their_own_mean(tmp_path):
    found = data.load_data(f"cifar10:{write(tmp_path)}", 32, 0)
    batch, _ = found.train[Request(None, range(5 * ROWS))]
    assert batch.shape == (30, 3, 32, 32) and batch.dtype == torch.float32 and found.normalisation is None
    assert batch.mean((0, 2, 3)).abs().max() < 1e-4
    assert (batch.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-4
    with pytest.raises(ValueError, match="have 3 channels, the model takes 1"):
        found.set_channels(1)


def test_the_papers_mean_is_of_each_pixel(tmp_path):
    found = data.load_data(f"cifar10:{write(tmp_path)}", 32, 0, recipe="paper-cifar", uint8=True)
    assert found.normalisation is None  # no mean a channel that a device could subtract
    still, _ = found.train[Request(None, range(5 * ROWS))]
    assert still.shape == (30, 3, 32, 32)
    assert still.mean(0).abs().max() < 1e-6
    pixels, _ = cifar.read("cifar10", tmp_path)[0]
    assert torch.allclose(
        still[3] - still[4], (torch.from_numpy(pixels[3]) - torch.from_numpy(pixels[4]).float()) / 255
    )
    moved, labels = found.train[Request(0, [3, 4])]
    again, _ = found.train[Request(0, [4])]
    assert torch.equal(moved[1:], again) and labels.tolist() == images("data_batch_1", 10)[1][3:5].tolist()
    assert not torch.equal(found.train[Request(1, [4])][0], again)
    other = data.load_data(f"cifar10:{tmp_path}", 32, 1, recipe="paper-cifar").train[Request(0, range(8))][0]
    assert not torch.equal(other, found.train[Request(0, range(8))][0])


def test_uint8_batches_become_the_same_images_on_the_device(tmp_path):
    spec = f"cifar10:{write(tmp_path)}"
    whole, raw = (data.load_data(spec, 32, 0, recipe="preact-cifar", uint8=uint8) for uint8 in (False, True))
    identity = torch.nn.Identity()
    assert whole.taken_by(identity) is identity
    for request in (Request(2, [5, 1, 9]), Request(None, [2])):
        (images, labels), (pixels, numbers) = whole.train[request], raw.train[request]
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(request.indices), 32, 32, 3)
        assert torch.equal(raw.taken_by(identity)(pixels), images) and torch.equal(labels, numbers)


def test_images_are_held_out_for_validation(tmp_path):
    spec = f"cifar10:{write(tmp_path)}"
    whole, part = data.load_data(spec, 32, 0), data.load_data(spec, 32, 0, validation=10)
    assert (len(part.train), len(part.test), part.id) == (20, 10, whole.id)
    everything = whole.train[Request(None, range(30))][0]
    split = torch.cat([part.train[Request(None, range(20))][0], part.test[Request(None, range(10))][0]])
    assert torch.equal(split.flatten(1).sum(1).sort().values, everything.flatten(1).sum(1).sort().values)
    assert len(split.flatten(1).unique(dim=0)) == 30
    assert torch.equal(
        part.test[Request(None, [4])][0], data.load_data(spec, 32, 7, validation=10).test[Request(None, [4])][0]
    )
    with pytest.raises(ValueError, match="--validation 30 leaves none of the 30 training images"):
        data.load_data(spec, 32, 0, validation=30)

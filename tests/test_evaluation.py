"""The paper's test protocols against a slow computation of each, one crop and one window at a time, with PIL."""

from __future__ import annotations

import copy
import functools
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from resnet_triton import convert, models, unconvert
from resnet_triton.errors import tensors_of
from resnet_triton.evaluation import CAFFE, IMAGENET, Dense, Errors, OneCrop, Pixels, Plain, TenCrop, evaluate
from resnet_triton.evaluation.errors import ranks
from resnet_triton.evaluation.images import load_images
from resnet_triton.evaluation.protocols import FullyConvolutional
from resnet_triton.runs.data import Request, load_data
from tests.comparers import identical, same_math
from tests.networks import basics, bottlenecks, calls, randomise

SIZES = ((50, 70), (64, 48), (50, 70), (90, 61), (40, 40))


def pictures(sizes=SIZES, classes: int = 10) -> list[tuple[Image.Image, int]]:
    """Smooth images of several shapes (width, height), and labels."""
    random = np.random.RandomState(0)
    found = []
    for i, size in enumerate(sizes):
        small = Image.fromarray(random.randint(0, 256, (6, 7, 3), dtype=np.uint8))
        found.append((small.resize(size, Image.Resampling.BICUBIC), i % classes))
    return found


def normalised(image: Image.Image) -> Tensor:
    """``[1, 3, H, W]``, computed in float32, given as float64."""
    x = np.asarray(image, dtype=np.float32) / np.float32(255)
    x = (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return torch.from_numpy(x.transpose(2, 0, 1)).double()[None]


def shorter(image: Image.Image, side: int) -> Image.Image:
    w, h = image.size
    new = (side, int(side * h / w)) if w <= h else (int(side * w / h), side)
    return image.resize(new, Image.Resampling.BILINEAR)


def crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def centre(image: Image.Image, size: int) -> Image.Image:
    return crop(image, round((image.width - size) / 2), round((image.height - size) / 2), size)


def probabilities(model: nn.Module, image: Image.Image) -> Tensor:
    return model(normalised(image)).softmax(1)[0]


def one_crop(model: nn.Module, image: Image.Image) -> Tensor:
    return probabilities(model, centre(shorter(image, 40), 32))


def ten_crop(model: nn.Module, image: Image.Image) -> Tensor:
    image = shorter(image, 40)
    right, bottom = image.width - 32, image.height - 32
    crops = [crop(image, x, y, 32) for x in (0, right) for y in (0, bottom)] + [centre(image, 32)]
    return sum(probabilities(model, c) + probabilities(model, ImageOps.mirror(c)) for c in crops) / 10


def dense(model: nn.Module, image: Image.Image, stride: int, logits: bool = False) -> Tensor:
    """Windows cut out of the last feature map, pooled and classified one by one."""
    window, total, maps = 32 // stride, [], []
    handle = model.avgpool.register_forward_pre_hook(lambda m, inputs: maps.append(inputs[0][0]))
    for side in (32, 40, 64):
        view = shorter(image, side)
        for x in (normalised(view), normalised(ImageOps.mirror(view))):
            model(x)
            y = maps.pop()
            rows, columns = (range(length - window + 1) for length in y.shape[1:])
            scores = [model.fc(y[:, i : i + window, j : j + window].mean((1, 2))) for i in rows for j in columns]
            total.append(sum(scores if logits else (s.softmax(0) for s in scores)) / len(scores))
    handle.remove()
    return sum(total) / 6


def averaged(monkeypatch: pytest.MonkeyPatch, *arguments, **options) -> Tensor:
    """The averaged scores of every image that an evaluation judged, its result checked against them."""
    seen, labels = [], []
    add = Errors.add

    def spy(self, scores, its):
        seen.append((id(self), scores))
        labels.append(its)
        add(self, scores, its)

    monkeypatch.setattr(Errors, "add", spy)
    result = evaluate(*arguments, **options)
    monkeypatch.undo()
    scores = torch.cat([scores for who, scores in seen if who == id(result.errors)])
    truth = torch.tensor([label for _, label in arguments[1]])
    wrong = scores.argmax(1) != truth
    assert result.errors.images == len(truth) and result.errors.top1 == wrong.double().mean().item()
    among = [label in s.topk(5).indices for s, label in zip(scores, truth, strict=True)]
    assert result.errors.top5 == pytest.approx(1 - np.mean(among))
    return scores


def slowly(reference, model: nn.Module, images, **options) -> Tensor:
    with torch.no_grad():
        return torch.stack([reference(model, image, **options) for image, _ in images])


# A trunk of stride 32, and one of stride 4.
NETS = {"imagenet": (lambda: basics((1, 1, 1, 1)), 32), "cifar": (lambda: randomise(models.CifarResNet(8).double()), 4)}
DENSE = Dense((32, 40, 64), 32)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("protocol", (OneCrop(32, 40), TenCrop(32, 40), DENSE), ids=lambda p: p.name)
def test_protocols_are_what_they_are_defined_to_be(net, protocol, monkeypatch):
    build, stride = NETS[net]
    model, images = build(), pictures()
    reference = {"1-crop": one_crop, "10-crop": ten_crop, "dense": functools.partial(dense, stride=stride)}
    expected = slowly(reference[protocol.name], model, images)
    same_math(averaged(monkeypatch, convert(model), images, protocol, batch=3), expected)
    same_math(averaged(monkeypatch, model, images, protocol, batch=32), expected)  # not converted


def test_workers_and_batches_change_nothing(monkeypatch):
    model, images = randomise(models.CifarResNet(8).double()), pictures()
    for protocol in (TenCrop(32, 40), DENSE):
        alone = averaged(monkeypatch, model, images, protocol, batch=1)
        for batch, workers in ((7, 0), (20, 2)):
            same_math(averaged(monkeypatch, model, images, protocol, batch=batch, workers=workers), alone)


def test_logits_may_be_averaged_instead(monkeypatch):
    model, images = randomise(models.CifarResNet(8).double()), pictures()
    expected = slowly(dense, model, images, stride=4, logits=True)
    same_math(averaged(monkeypatch, convert(model), images, DENSE, average="logits"), expected)
    assert not torch.allclose(expected.softmax(1), slowly(dense, model, images, stride=4))


def test_an_ensemble_averages_scores(monkeypatch):
    nets = [randomise(models.CifarResNet(8).double()) for _ in range(2)]
    images = pictures()
    expected = [slowly(one_crop, net, images) for net in nets]
    found = averaged(monkeypatch, [nets[0], convert(nets[1])], images, OneCrop(32, 40))
    same_math(found, sum(expected) / 2)
    result = evaluate(nets, images, OneCrop(32, 40))
    assert [single.top1 for single in result.single] == [
        evaluate(net, images, OneCrop(32, 40)).errors.top1 for net in nets
    ]
    # each may take pixels of its own: a network whose first filters are mirrored in colour
    nets[1] = copy.deepcopy(nets[0])
    nets[1].conv1.weight.data = nets[1].conv1.weight.data.flip(1)
    other = Pixels((0.406, 0.456, 0.485), (0.225, 0.224, 0.229), bgr=True)
    same_math(averaged(monkeypatch, nets, images, OneCrop(32, 40), pixels=[IMAGENET, other]), expected[0])


def test_views_are_where_they_should_be():
    image = Image.fromarray(np.arange(6 * 8, dtype=np.uint8).reshape(6, 8, 1) * np.ones(3, np.uint8))
    (crops,) = TenCrop(4, 6).views(image)
    assert crops.shape == (10, 3, 4, 4) and crops.dtype == torch.uint8
    corners = [0, 4, 16, 20, 10]  # left top, right top, left bottom, right bottom, centre
    assert crops[:5, 0, 0, 0].tolist() == corners
    assert crops[5:, 0, 0, -1].tolist() == corners
    assert torch.equal(crops[5:], crops[:5].flip(3))
    assert OneCrop(4, 6).views(image)[0].shape == (1, 3, 4, 4) and OneCrop(4, 6).views(image)[0][0, 0, 0, 0] == 10
    whole = Dense((6, 12), 4).views(image.convert("L"))
    assert [tuple(view.shape) for view in whole] == [(2, 3, 6, 8), (2, 3, 12, 16)]
    assert torch.equal(whole[0][1], whole[0][0].flip(2))


def timm_net() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.resnet.ResNet(timm.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10)


def hugging_face_net() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(hidden_sizes=[8, 16, 16, 16], depths=[1] * 4, embedding_size=8, num_labels=10)
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize(
    "build",
    (lambda: bottlenecks((1, 1, 1, 1)), timm_net, hugging_face_net, lambda: models.preact_cifar_resnet(20)),
    ids=("torchvision", "timm", "transformers", "preact"),
)
def test_dense_is_the_network_itself_on_its_own_size_and_runs_fused(build):
    model = convert(randomise(build().double()))
    net = FullyConvolutional(model, 64).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = tensors_of(model(x))[0]
        same_math(net(x)[:, :, 0, 0], expected)
        same_math(FullyConvolutional(unconvert(model), 64)(x)[:, :, 0, 0], expected)
        wide = net(torch.cat([x, x], 3))
        assert wide.shape == (2, 10, 1, 1 + net.pool.window[1])
        same_math(tensors_of(model(x))[0], expected)  # the network itself is as it was
    ours, theirs = calls(net, x), calls(model, x)
    ours.pop("head", None), theirs.pop("head", None)  # the network's pool and classifier
    assert ours == theirs and sum(ours.values()) > 3
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))


def test_dense_needs_one_global_pool():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    with pytest.raises(ValueError, match="needs one global average pool to slide, Sequential has none; choose 1-crop"):
        FullyConvolutional(net)
    with pytest.raises(ValueError, match=r"Sequential has 1\.avgpool, 2; choose"):
        FullyConvolutional(nn.Sequential(nn.Identity(), basics((1, 1, 1, 1)), nn.AdaptiveAvgPool2d((1, 1))))


class Given(nn.Module):
    """Scores that are known: the first values of an image."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.classes]


def test_ranks_count_ties_and_what_is_no_number_against_the_label():
    scores = torch.tensor(
        [[1.0, 3, 2, 3], [0, 0, 0, 0], [1, 2, 3, 4], [float("nan"), 1, 0, 0], [1, float("nan"), 0, 0]]
    )
    assert ranks(scores, torch.tensor([1, 2, 3, 0, 0])).tolist() == [1, 3, 0, 3, 1]
    errors = Errors()
    errors.add(torch.eye(6)[[0, 1]] + torch.tensor([[0.0, 1, 2, 3, 4, 5]]), torch.tensor([0, 5]))
    assert (errors.top1, errors.top5) == (0.5, 0.5)
    errors.add(torch.zeros(2, 6), torch.tensor([0, 5]))
    assert (errors.images, errors.top1, errors.top5) == (4, 0.75, 0.75)
    errors = Errors()
    errors.add(torch.eye(5), torch.arange(5))
    assert (errors.top1, errors.top5) == (0, None)


def test_small_softmaxes_are_no_ties():
    scores = torch.tensor([[200.0, 10, 9, 8, 7, 6, 5, 4]])  # in float32 all but the first would be zero
    for average in ("softmax", "logits"):
        for label, wrong in ((0, (0, 0)), (4, (1, 0)), (5, (1, 1))):
            found = evaluate(Given(8).eval(), [(scores.view(1, 2, 4), label)], Plain(), average=average).errors
            assert (found.top1, found.top5) == wrong


def test_memory_is_bounded_by_the_batch():
    net, images, shapes = randomise(models.CifarResNet(8).double()), pictures(), []
    net.conv1.register_forward_pre_hook(lambda m, inputs: shapes.append(tuple(inputs[0].shape)))
    evaluate(net, images, TenCrop(32, 40), batch=4)
    assert {shape[0] for shape in shapes} == {4, 2}
    shapes.clear()
    evaluate(net, images, Dense((32, 64), 32), batch=4)
    assert shapes.pop(0) == (1, 3, 32, 32)  # which shows how large the window is
    assert sum(n for n, *_ in shapes) == 4 * len(images)
    assert max(n for n, *_ in shapes) > 1
    assert all(n == 1 or n * h * w <= 4 * 32 * 32 for n, _, h, w in shapes)


def test_pixels():
    x = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    torchvision = pytest.importorskip("torchvision")
    normalise = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    identical(IMAGENET(x), normalise(x.float().div(255)))
    blue = CAFFE(x)
    identical(blue[:, 0], x[:, 2].float() - 103.939)
    identical(blue[:, 2], x[:, 0].float() - 123.68)
    assert str(CAFFE) == "BGR, 0 to 255, minus (103.939, 116.779, 123.68), over (1, 1, 1)"
    assert IMAGENET(blue) is blue
    for wrong in (((0.5,), (1.0, 1.0)), ((0.5,), (0.0,)), ((float("nan"),), (1.0,)), ((), ())):
        with pytest.raises(ValueError, match="one number a channel each"):
            Pixels(*wrong)


def test_what_cannot_be_evaluated():
    images, net = pictures(), randomise(models.CifarResNet(8).double())
    small = [(torch.zeros(3, 8, 8).double(), 3)]
    for message, arguments, options in (
        ("0 networks on 5 images", ([], images, OneCrop(32, 40)), {}),
        ("1 networks on 0 images", (net, [], OneCrop(32, 40)), {}),
        ("softmax, logits, got 'mean'", (net, images, OneCrop(32, 40)), {"average": "mean"}),
        ("one for all networks or one each, got 2 for 1", (net, small, Plain()), {"pixels": [CAFFE, IMAGENET]}),
        ("scores 10 classes, the images have 12", (net, small, Plain()), {"classes": 12}),
        ("label 3 is none of the 2 classes", (Given(2), small, Plain()), {}),
        ("must score the same classes, got [2, 10]", ([Given(2), net], small, Plain()), {}),
        ("plain takes tensors, got Image; choose 1-crop", (net, images, Plain()), {}),
        ("one score an image and class; the network gives (1, 16, 8, 8, 1)", (Odd(), small, Plain()), {}),
        ("scores are not finite", (Given(), [(torch.full((3, 8, 8), float("inf")), 0)], Plain()), {}),
    ):
        for module in arguments[0] if isinstance(arguments[0], list) else [arguments[0]]:
            module.eval()
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluate(*arguments, **options)
    with pytest.raises(ValueError, match=r"eval mode: call model\.eval\(\)"):
        evaluate(net.train(), images, OneCrop(32, 40))
    with pytest.raises(ValueError, match="a crop of 48 pixels is not in an image whose shorter side is resized to 40"):
        TenCrop(48, 40)
    for scales in ((), (224, 200)):
        with pytest.raises(ValueError, match="scales of at least size=224 pixels"):
            Dense(scales)


class Odd(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 16, 8, 8, 1)


# Images by name


def test_images_of_small_data_are_those_of_the_test_split():
    pytest.importorskip("sklearn")
    found = load_images("digits", size=24)
    assert (len(found.images), len(found.classes), found.files, found.pixels) == (359, 10, False, None)
    images, labels = load_data("digits", 24, 0).test[Request(None, range(359))]
    image, label = found.images[17]
    assert torch.equal(image, images[17]) and label == labels[17]
    found.set_channels(3)
    assert torch.equal(found.images[17][0], images[17].expand(3, -1, -1))


def test_images_of_folders_need_no_training_images(tmp_path):
    pytest.importorskip("torchvision")
    for name in ("cat", "dog"):
        (tmp_path / "data" / "val" / name).mkdir(parents=True)
        Image.new("L", (9, 7), 77).save(tmp_path / "data" / "val" / name / "0.png")
    for folder in ("data", "data/val"):
        found = load_images(f"imagefolder:{tmp_path / folder}")
        assert (len(found.images), found.classes, found.files) == (2, ("cat", "dog"), True)
        image, label = found.images[1]
        assert (image.size, image.mode, label) == ((9, 7), "RGB", 1)
    (tmp_path / "data" / "val").rename(tmp_path / "data" / "train")
    with pytest.raises(FileNotFoundError, match="has no folder val or test beside train"):
        load_images(f"imagefolder:{tmp_path / 'data'}")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_images(f"imagefolder:{tmp_path / 'none'}")
    with pytest.raises(ValueError, match="have 3 channels, the model takes 1"):
        found.set_channels(1)
    (tmp_path / "data" / "train" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"dog/0.png' cannot be read"):
        load_images(f"imagefolder:{tmp_path / 'data/train'}").images[1]

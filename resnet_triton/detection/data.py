"""Images with boxes: VOC and COCO from the folders that they unpack to, and drawn shapes.

``voc:PATH``   PATH/VOC2007/{ImageSets/Main/*.txt, Annotations/*.xml, JPEGImages/*.jpg}, VOC2012 likewise
``coco:PATH``  PATH/annotations/instances_SPLIT.json and PATH/SPLIT/*.jpg (or PATH/images/SPLIT)
``shapes``     rectangles, discs and triangles on noise, drawn from a seed

Nothing is downloaded. Boxes are ``x1 y1 x2 y2`` in pixels, with x2 and y2 just outside.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..runs.data import UnreadableImage, mixed

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SHAPES = ("rectangle", "disc", "triangle")
MAX_XML = 1 << 20  # bytes; VOC's largest annotation has some 30 kB


class Truth(NamedTuple):
    """The objects of one image.

    Args:
        boxes: float64 ``[N, 4]``.
        labels: int64 ``[N]``, from 1.
        ignore: bool ``[N]``; VOC's difficult objects and COCO's crowds, which are neither found nor missed.
        area: float64 ``[N]``, in pixels; COCO's is of the mask.
    """

    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    area: np.ndarray


class Sample(NamedTuple):
    """An image: its name in the data set, how to read it as ``[3, H, W]`` from 0 to 1, and its objects."""

    id: str | int
    read: Callable[[], Tensor]
    truth: Truth


class DetectionData(Dataset):
    """Images and targets as torchvision's detectors take them.

    An item is ``(image, target)``: fp32 ``[3, H, W]`` from 0 to 1, and ``boxes`` fp32 ``[N, 4]``, ``labels`` int64
    ``[N]``, ``area`` fp32 ``[N]``, ``iscrowd`` int64 ``[N]`` (what is ignored) and ``image_id`` (the position).

    Args:
        kind: ``"voc"``, ``"coco"`` or ``"shapes"``: which figures are customary.
        samples: the images.
        classes: names of the classes 1, 2, ...
    """

    def __init__(self, kind: str, samples: Sequence[Sample], classes: Sequence[str]) -> None:
        self.kind, self.samples, self.classes = kind, list(samples), tuple(classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        sample = self.samples[index]
        truth = sample.truth
        target = {
            "boxes": torch.from_numpy(truth.boxes).float().reshape(-1, 4),
            "labels": torch.from_numpy(truth.labels),
            "area": torch.from_numpy(truth.area).float(),
            "iscrowd": torch.from_numpy(truth.ignore).long(),
            "image_id": torch.tensor(index),
        }
        return sample.read(), target

    @property
    def truths(self) -> list[Truth]:
        """The objects of every image."""
        return [sample.truth for sample in self.samples]

    def for_training(self) -> DetectionData:
        """The same without ignored objects, boxes without an inside, and images that then have no object."""
        kept = []
        for sample in self.samples:
            boxes, _, ignore, _ = sample.truth
            good = ~ignore & (boxes[:, 2:] > boxes[:, :2]).all(1)
            if good.any():
                kept.append(sample._replace(truth=Truth(*(values[good] for values in sample.truth))))
        return DetectionData(self.kind, kept, self.classes)


def _truth(boxes: Any, labels: Any, ignore: Any, area: Any = None) -> Truth:
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    if area is None:
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Truth(
        boxes, np.asarray(labels, dtype=np.int64), np.asarray(ignore, dtype=bool), np.asarray(area, dtype=np.float64)
    )


class _File:
    """Reads an image file; a class, so that the processes of a loader can have it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> Tensor:
        from PIL import Image

        try:
            with Image.open(self.path) as image:
                pixels = np.array(image.convert("RGB"))
        except Exception as error:  # each decoder has exceptions of its own
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnreadableImage(f"image {str(self.path)!r} cannot be read ({first}); remove or replace it") from error
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)


# VOC


def voc(root: str | Path, sets: str = "2007-trainval") -> DetectionData:
    """PASCAL VOC.

    Args:
        root: the folder that holds VOC2007 (and VOC2012), often called VOCdevkit.
        sets: ``YEAR-SPLIT``, several joined by ``+``: ``"2007-trainval+2012-trainval"`` is the paper's "07+12".

    Raises:
        ValueError: for other ``sets``, and annotations that cannot be read; names the file.
        OSError: a folder or file is not there.
    """
    root = Path(root).expanduser()
    samples = []
    for part in sets.split("+"):
        match = re.fullmatch(r"(\d{4})-(\w+)", part)
        if match is None:
            raise ValueError(
                f"sets must be YEAR-SPLIT, several joined by '+' (2007-trainval+2012-trainval), got {sets!r}"
            )
        year, split = match.groups()
        folder = root / f"VOC{year}"
        listing = folder / "ImageSets" / "Main" / f"{split}.txt"
        if not listing.is_file():
            raise FileNotFoundError(
                f"voc:{root}: there is no file {str(listing)!r}; the folder must hold VOC{year}/ImageSets, Annotations "
                "and JPEGImages, as VOC's archives unpack under VOCdevkit"
            )
        for line in listing.read_text(encoding="utf-8").splitlines():
            if not line.strip():
                continue
            name = line.split()[0]
            if re.fullmatch(r"[\w.-]+", name) is None:
                raise ValueError(f"{str(listing)!r} names {name!r}, which is no image of VOC")
            truth = _voc_truth(folder / "Annotations" / f"{name}.xml")
            samples.append(Sample(name, _File(folder / "JPEGImages" / f"{name}.jpg"), truth))
    return DetectionData("voc", samples, VOC_CLASSES)


def _voc_truth(path: Path) -> Truth:
    boxes, labels, difficult = [], [], []
    try:
        for found in _xml(path).findall("object"):
            name = (found.findtext("name") or "").strip()
            if name not in VOC_CLASSES:
                raise ValueError(f"object {name!r} is no class of VOC ({', '.join(VOC_CLASSES)})")
            corners = [float(found.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax")]
            # pixels are counted from 1, and the last one belongs to the object
            x1, y1, x2, y2 = corners[0] - 1, corners[1] - 1, corners[2], corners[3]
            if not (x2 > x1 and y2 > y1):
                raise ValueError(f"object {name!r} has box {corners}, which is not xmin ymin xmax ymax")
            boxes.append((x1, y1, x2, y2))
            labels.append(VOC_CLASSES.index(name) + 1)
            difficult.append(int(found.findtext("difficult") or 0) != 0)
    except ValueError as error:
        raise ValueError(f"annotation {str(path)!r}: {error}") from error
    return _truth(boxes, labels, difficult)


def _xml(path: Path) -> ElementTree.Element:
    """The root of an XML file without a document type: entities could expand to any size.

    Raises:
        ValueError: it is no such file.
    """
    if path.stat().st_size > MAX_XML:
        raise ValueError(f"{path.stat().st_size} bytes are no annotation of VOC; allowed: {MAX_XML}")
    text = path.read_bytes().decode("utf-8")  # a str: an encoding that the file declares is not used
    if "<!" in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL):
        raise ValueError("it has a document type or an entity, which VOC's annotations do not have")
    try:
        return ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"it is no XML ({error})") from error


# COCO


def coco(root: str | Path, split: str = "val2017") -> DetectionData:
    """COCO's instances; classes are numbered in the order of their ids, without gaps.

    Args:
        root: the folder that holds ``annotations`` and the folders of images.
        split: such as ``train2014``.

    Raises:
        ValueError: the annotations cannot be read; names the file and what is wrong.
        OSError: a folder or file is not there.
    """
    root = Path(root).expanduser()
    file = root / "annotations" / f"instances_{split}.json"
    if re.fullmatch(r"\w+", split) is None:
        raise ValueError(f"split must be a name such as train2014, got {split!r}")
    if not file.is_file():
        raise FileNotFoundError(
            f"coco:{root}: there is no file {str(file)!r}; it comes with COCO's annotations archive"
        )
    folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"coco:{root}: there is no folder {str(root / split)!r} of images")
    try:
        body = json.loads(file.read_bytes())
        categories = {entry["id"]: entry["name"] for entry in sorted(body["categories"], key=lambda c: c["id"])}
        numbers = {key: i + 1 for i, key in enumerate(categories)}
        objects: dict[Any, list[tuple[list[float], int, bool, float]]] = {entry["id"]: [] for entry in body["images"]}
        for entry in body["annotations"]:
            x, y, w, h = map(float, entry["bbox"])
            if not (w >= 0 and h >= 0 and math.isfinite(x + y + w + h)):
                raise ValueError(
                    f"annotation {entry.get('id')} has bbox {entry['bbox']}, which is not x y width height"
                )
            area = float(entry.get("area", w * h))
            found = ([x, y, x + w, y + h], numbers[entry["category_id"]], bool(entry.get("iscrowd", 0)), area)
            objects[entry["image_id"]].append(found)
        samples = []
        for entry in body["images"]:
            name = PurePosixPath(entry["file_name"])
            if name.is_absolute() or ".." in name.parts or "\\" in entry["file_name"]:
                raise ValueError(f"file_name {entry['file_name']!r} leads out of the folder of images")
            columns = zip(*objects[entry["id"]], strict=True) if objects[entry["id"]] else ((), (), (), ())
            samples.append(Sample(entry["id"], _File(folder / name), _truth(*columns)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"annotations {str(file)!r} are no instances file of COCO: {what}") from error
    return DetectionData("coco", samples, tuple(categories.values()))


# Shapes


def shapes(count: int, seed: int = 0, size: int = 64) -> DetectionData:
    """Red rectangles, green discs and blue triangles on noise, one to three an image, that hardly overlap.

    Args:
        count: images.
        seed: two data sets of one seed and size have their first images in common.
        size: height and width in pixels, at least 32.

    Raises:
        ValueError: for a ``size`` below 32.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    samples = []
    for i in range(count):
        image = _Shapes(mixed(seed, i), size)
        samples.append(Sample(i, image, image.draw()[1]))
    return DetectionData("shapes", samples, SHAPES)


class _Shapes:
    """Draws one image, the same each time."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __call__(self) -> Tensor:
        return torch.from_numpy(self.draw()[0])

    def draw(self) -> tuple[np.ndarray, Truth]:
        """Pixels fp32 ``[3, size, size]`` and the objects."""
        random, size = np.random.default_rng(self.seed), self.size
        pixels = random.uniform(0, 0.4, (3, size, size)).astype(np.float32)
        rows, columns = np.mgrid[:size, :size] + 0.5
        boxes: list[tuple[float, ...]] = []
        labels: list[int] = []
        for _ in range(int(random.integers(1, 4))):
            label = int(random.integers(len(SHAPES)))
            h = w = int(random.integers(size // 4, size // 2))
            if label != 1:
                w = int(random.integers(size // 4, size // 2))
            y, x = int(random.integers(0, size - h + 1)), int(random.integers(0, size - w + 1))
            if any(min(x + w, b[2]) - max(x, b[0]) > 2 and min(y + h, b[3]) - max(y, b[1]) > 2 for b in boxes):
                continue
            down, across = (rows - y) / h, (columns - x) / w  # 0 to 1 inside the box
            inside = (down >= 0) & (down <= 1) & (across >= 0) & (across <= 1)
            if label == 1:
                inside &= (down - 0.5) ** 2 + (across - 0.5) ** 2 <= 0.25
            if label == 2:
                inside &= np.abs(across - 0.5) <= down / 2
            colour = random.uniform(0, 0.4, (3, 1)).astype(np.float32)
            colour[label] += 0.6  # each class has a colour of its own, so that few steps of training show
            pixels[:, inside] = colour
            boxes.append((x, y, x + w, y + h))
            labels.append(label + 1)
        return pixels, _truth(boxes, labels, [False] * len(labels))

"""VOC and COCO are read from the folders that they unpack to; what is damaged is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_triton.detection import coco, shapes, voc
from resnet_triton.detection.data import VOC_CLASSES
from resnet_triton.detection.fit import mirrored

OBJECT = """<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def picture(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def voc_image(root: Path, name: str, objects: list[tuple], year: str = "2007", split: str = "trainval") -> Path:
    folder = root / f"VOC{year}"
    picture(folder / "JPEGImages" / f"{name}.jpg")
    body = "".join(OBJECT.format(name=label, box=box, difficult=int(difficult)) for label, box, difficult in objects)
    xml = folder / "Annotations" / f"{name}.xml"
    xml.parent.mkdir(exist_ok=True)
    xml.write_text(f"<annotation><folder>VOC{year}</folder>{body}</annotation>")
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    listing.parent.mkdir(parents=True, exist_ok=True)
    with listing.open("a") as file:
        file.write(f"{name}\n")
    return xml


def test_voc(tmp_path: Path) -> None:
    voc_image(tmp_path, "000005", [("chair", (1, 2, 40, 30), False), ("person", (5.5, 6, 7, 8), True)])
    voc_image(tmp_path, "000007", [])
    voc_image(tmp_path, "2008_000002", [("tvmonitor", (3, 3, 9, 9), True)], "2012")
    data = voc(tmp_path, "2007-trainval+2012-trainval")
    assert len(data) == 3 and data.classes == VOC_CLASSES and len(VOC_CLASSES) == 20
    assert [sample.id for sample in data.samples] == ["000005", "000007", "2008_000002"]
    image, target = data[0]
    assert image.shape == (3, 30, 40) and image.dtype == torch.float32 and 0 <= image.min() <= image.max() <= 1
    assert target["boxes"].tolist() == [[0, 1, 40, 30], [4.5, 5, 7, 8]], "pixels of VOC are counted from 1"
    assert target["labels"].tolist() == [9, 15] and target["labels"].dtype == torch.int64
    assert target["iscrowd"].tolist() == [0, 1] and target["area"].tolist() == [40 * 29, 2.5 * 3]
    assert data[1][1]["boxes"].shape == (0, 4)
    training = data.for_training()
    assert len(training) == 1, "without objects, or with difficult ones alone, there is nothing to learn"
    assert training[0][1]["labels"].tolist() == [9]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "it is no XML"),
        ('<!DOCTYPE a [<!ENTITY b "bbb">]><annotation>&b;</annotation>', "it has a document type or an entity"),
        ("<annotation>" + OBJECT.format(name="unicorn", box=(1, 1, 2, 2), difficult=0) + "</annotation>", "'unicorn'"),
        ("<annotation>" + OBJECT.format(name="cat", box=(5, 1, 2, 2), difficult=0) + "</annotation>", "not xmin ymin"),
        ("<annotation><object><name>cat</name></object></annotation>", "which is not xmin ymin xmax ymax"),
        ("<annotation>" + OBJECT.format(name="cat", box=("x", 1, 2, 2), difficult=0) + "</annotation>", "'x'"),
        ("<annotation>" + " " * (1 << 20) + "</annotation>", "are no annotation of VOC"),
    ],
    ids=("truncated", "entities", "class", "corners", "no box", "no number", "large"),
)
def test_an_annotation_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    voc_image(tmp_path, "000001", []).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        voc(tmp_path)
    assert "000001.xml" in str(raised.value)


def test_entities_are_refused_in_every_encoding(tmp_path: Path) -> None:
    text = '<?xml version="1.0" encoding="UTF-16"?><!DOCTYPE a [<!ENTITY b "bbb">]><annotation>&b;</annotation>'
    voc_image(tmp_path, "000001", []).write_bytes(text.encode("utf-16"))
    with pytest.raises(ValueError, match=r"000001\.xml"):
        voc(tmp_path)


def test_folders_and_names_of_voc(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must hold VOC2007/ImageSets"):
        voc(tmp_path)
    with pytest.raises(ValueError, match="sets must be YEAR-SPLIT"):
        voc(tmp_path, "trainval")
    listing = voc_image(tmp_path, "000001", []).parents[1] / "ImageSets/Main/trainval.txt"
    listing.write_text("../../secret\n")
    with pytest.raises(ValueError, match="which is no image of VOC"):
        voc(tmp_path)
    listing.write_text("000002\n")
    with pytest.raises(FileNotFoundError, match=r"000002\.xml"):
        voc(tmp_path)


def coco_file(root: Path, **changes) -> Path:
    body = {
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "images": [
            {"id": 9, "file_name": "000009.jpg", "width": 40, "height": 30},
            {"id": 25, "file_name": "000025.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 9, "category_id": 90, "bbox": [1, 2, 10, 5], "area": 30.5, "iscrowd": 0},
            {"id": 2, "image_id": 9, "category_id": 1, "bbox": [0, 0, 40, 30], "area": 900, "iscrowd": 1},
            {"id": 3, "image_id": 9, "category_id": 3, "bbox": [3, 3, 0, 4], "area": 0.0, "iscrowd": 0},
        ],
    }
    file = root / "annotations" / "instances_val2017.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({**body, **changes}))
    for image in body["images"]:
        picture(root / "val2017" / image["file_name"])
    return file


def test_coco(tmp_path: Path) -> None:
    coco_file(tmp_path)
    data = coco(tmp_path, "val2017")
    assert data.classes == ("person", "car", "toothbrush") and [sample.id for sample in data.samples] == [9, 25]
    image, target = data[0]
    assert image.shape == (3, 30, 40)
    assert target["boxes"].tolist() == [[1, 2, 11, 7], [0, 0, 40, 30], [3, 3, 3, 7]]
    assert target["labels"].tolist() == [3, 1, 2] and target["iscrowd"].tolist() == [0, 1, 0]
    assert target["area"].tolist() == [30.5, 900, 0]
    assert data[1][1]["boxes"].shape == (0, 4)
    training = data.for_training()
    assert len(training) == 1 and training[0][1]["labels"].tolist() == [3], "neither crowds nor boxes without an inside"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "no instances file of COCO"),
        ({"annotations": [{"image_id": 9}]}, "KeyError 'bbox'"),
        ({"annotations": [{"image_id": 9, "category_id": 2, "bbox": [0, 0, 1, 1]}]}, "KeyError 2"),
        ({"annotations": [{"image_id": 8, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "KeyError 8"),
        ({"annotations": [{"id": 7, "image_id": 9, "category_id": 1, "bbox": [0, 0, -1, 1]}]}, "annotation 7 has bbox"),
        ({"annotations": [{"image_id": 9, "category_id": 1, "bbox": [float("nan"), 0, 1, 1]}]}, "x y width height"),
        ({"images": [{"id": 9, "file_name": "../../x.jpg"}], "annotations": []}, "leads out of the folder"),
        ({"images": [{"id": 9, "file_name": "/x.jpg"}], "annotations": []}, "leads out of the folder"),
    ],
    ids=("null", "no box", "category", "image", "width", "nan", "parent", "absolute"),
)
def test_annotations_that_are_none(tmp_path: Path, changes: dict, message: str) -> None:
    coco_file(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as raised:
        coco(tmp_path)
    assert "instances_val2017.json" in str(raised.value)


def test_folders_of_coco(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"instances_val2017\.json"):
        coco(tmp_path)
    coco_file(tmp_path)
    (tmp_path / "val2017").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no folder .*val2017' of images"):
        coco(tmp_path)
    with pytest.raises(ValueError, match="split must be a name"):
        coco(tmp_path, "../val2017")
    (tmp_path / "images").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "images" / "val2017")
    data = coco(tmp_path)
    (tmp_path / "images" / "val2017" / "000025.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image '.*000025\.jpg' cannot be read"):
        data[1]


def test_shapes_are_where_their_boxes_are() -> None:
    data, again = shapes(20, seed=3), shapes(4, seed=3)
    assert torch.equal(data[2][0], again[2][0]) and not torch.equal(data[2][0], shapes(4, seed=4)[2][0])
    seen = set()
    for image, target in (data[i] for i in range(len(data))):
        assert image.shape == (3, 64, 64) and len(target["boxes"]) > 0
        for (x1, y1, x2, y2), label in zip(target["boxes"].long().tolist(), target["labels"].tolist(), strict=True):
            inside = image[label - 1, y1:y2, x1:x2] > 0.55
            # a disc fills pi/4 of its box, a triangle half; another shape may cover two pixels of an edge
            assert inside.float().mean() > {1: 0.85, 2: 0.65, 3: 0.4}[label]
            assert inside.any(0).float().mean() > 0.8 and inside.any(1).float().mean() > 0.8
            seen.add(label)
    assert seen == {1, 2, 3}
    with pytest.raises(ValueError, match="size must be at least 32"):
        shapes(1, size=16)


def test_a_mirrored_image_shows_the_same_objects() -> None:
    image, target = shapes(1)[0]
    other, moved = mirrored(image, target)
    for before, after in zip(target["boxes"].long().tolist(), moved["boxes"].long().tolist(), strict=True):
        part = image[:, before[1] : before[3], before[0] : before[2]]
        assert torch.equal(other[:, after[1] : after[3], after[0] : after[2]].flip(-1), part)

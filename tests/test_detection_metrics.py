"""Average precision by hand, and against COCO's own code where it is installed."""

from __future__ import annotations

import importlib.util
import math
from fractions import Fraction

import numpy as np
import pytest

from resnet_triton.detection import Found, Truth, average_precision, coco_map, summary, voc_map
from resnet_triton.detection.metrics import COCO_OVERLAPS, overlaps

BOX, HALF, AWAY = (0, 0, 10, 10), (0, 0, 10, 5), (50, 50, 60, 60)


def truth(*objects: tuple[tuple, int], ignore: tuple[int, ...] = ()) -> Truth:
    boxes = np.array([box for box, _ in objects], dtype=np.float64).reshape(-1, 4)
    labels = np.array([label for _, label in objects], dtype=np.int64)
    flags = np.array([i in ignore for i in range(len(objects))], dtype=bool)
    return Truth(boxes, labels, flags, (boxes[:, 2:] - boxes[:, :2]).prod(1))


def found(*detections: tuple[tuple, int, float]) -> Found:
    boxes = np.array([box for box, *_ in detections], dtype=np.float64).reshape(-1, 4)
    labels = np.array([label for _, label, _ in detections], dtype=np.int64)
    return Found(boxes, labels, np.array([score for *_, score in detections]))


def test_overlaps() -> None:
    a = np.array([BOX, HALF, AWAY], dtype=np.float64)
    b = np.array([BOX, (5, 0, 15, 10), (3, 3, 3, 9)], dtype=np.float64)
    assert overlaps(a, b).tolist() == [[1, 50 / 150, 0], [0.5, 25 / 125, 0], [0, 0, 0]]
    crowd = np.array([True, False, False])
    assert overlaps(a, b, crowd)[:, 0].tolist() == [1, 1, 0], "of a crowd, the share of the detection"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # right, wrong, right, wrong, right of 4 objects: precision 1, 2/3, 3/5 from recall 1/4, 1/2, 3/4 on
        ("area", Fraction(1, 4) * (1 + Fraction(2, 3) + Fraction(3, 5))),
        ("11-point", Fraction(1, 11) * (3 * 1 + 3 * Fraction(2, 3) + 2 * Fraction(3, 5))),
        ("101-point", Fraction(1, 101) * (26 * 1 + 25 * Fraction(2, 3) + 25 * Fraction(3, 5))),
    ],
)
def test_average_precision_by_hand(method: str, expected: Fraction) -> None:
    hits = np.array([1, 1, 2, 2, 3])
    value = average_precision(hits / 4, hits / np.arange(1, 6), method)
    assert math.isclose(value, expected, rel_tol=1e-12)
    assert average_precision(np.array([]), np.array([]), method) == 0


def test_recall_of_three_tenths_reaches_the_fourth_of_eleven_points() -> None:
    hits = np.array([1, 2, 3])
    assert math.isclose(average_precision(hits / 10, hits / hits, "11-point"), 4 / 11)
    with pytest.raises(ValueError, match="method must be one of '11-point', 'area', '101-point', got 'mean'"):
        average_precision(hits / 10, hits / hits, "mean")


def test_voc_counts_each_object_once_and_difficult_ones_never() -> None:
    truths = [truth((BOX, 1), (AWAY, 1), ignore=(1,)), truth((BOX, 1), (BOX, 2))]
    detections = [
        # a hit, the same object again, and a difficult one found twice
        found((BOX, 1, 0.9), (BOX, 1, 0.8), (AWAY, 1, 0.95), (AWAY, 1, 0.7)),
        found((HALF, 1, 0.6), (AWAY, 2, 0.5)),
    ]
    # of class 1: right .9, wrong .8, right .6 (an overlap of exactly one half) of two objects
    expected = 0.5 * 1 + 0.5 * 2 / 3
    result = voc_map(detections, truths, 3, method="area")
    assert result.keys() == {1, 2}, "a class without objects has no AP"
    assert math.isclose(result[1], expected) and result[2] == 0
    assert voc_map(detections, truths, 3, method="area", overlap=0.6)[1] == 0.5


def test_voc_takes_the_object_of_largest_overlap_alone() -> None:
    """A second detection of it is wrong, also where another object would still be free."""
    near = (1, 0, 11, 10)
    truths = [truth((BOX, 1), (near, 1))]
    detections = [found((BOX, 1, 0.9), (BOX, 1, 0.8))]
    assert voc_map(detections, truths, 1, method="area")[1] == 0.5
    assert coco_map(detections, truths, 1, [0.5])[1].item() == 1, "by COCO's rules it takes the free one"


def test_coco_lets_a_crowd_hold_any_number() -> None:
    crowd = truth((BOX, 1), ((0, 0, 100, 100), 1), ignore=(1,))
    inside = [((20 + i, 20, 30 + i, 30), 1, 0.95) for i in range(3)]
    assert coco_map([found(*inside, (BOX, 1, 0.9))], [crowd], 1, [0.5])[1].item() == 1
    assert coco_map([found(*inside)], [truth(((0, 0, 100, 100), 1), ignore=(0,))], 1) == {}


def test_coco_averages_over_overlaps_and_takes_100_detections() -> None:
    eighty = (0, 0, 10, 8)
    values = coco_map([found((eighty, 1, 0.9))], [truth((BOX, 1))], 1)[1]
    assert values.tolist() == [1] * 7 + [0] * 3, "an overlap of 0.8 is right up to 0.8"
    many = [(AWAY, 1, 0.9)] * 100 + [(BOX, 1, 0.5)]
    assert coco_map([found(*many)], [truth((BOX, 1))], 1, [0.5])[1].item() == 0


def test_summaries() -> None:
    detections, truths = [found((BOX, 1, 0.9), (AWAY, 2, 0.3))], [truth((BOX, 1), (BOX, 2))]
    names = ("cat", "dog", "cow")
    assert summary("voc", detections, truths, names) == {
        "mAP@.5": 0.5, "mAP@.5 (area)": 0.5, "classes": {"cat": 1.0, "dog": 0.0},
    }  # fmt: skip
    assert summary("coco", detections, truths, names)["mAP@[.5:.95]"] == 0.5
    assert math.isnan(summary("coco", [found()], [truth()], names)["mAP@.5"])
    with pytest.raises(ValueError, match="found has 1 images and truths 2"):
        summary("voc", detections, truths * 2, names)


def drawn(seed: int) -> tuple[list[Found], list[Truth]]:
    """Objects, and detections near them, with crowds, misses, doubles and equal scores."""
    random = np.random.default_rng(seed)
    all_found, truths = [], []
    for _ in range(12):
        n = int(random.integers(0, 7))
        corner, size = random.integers(0, 60, (n, 2)), random.integers(4, 40, (n, 2))
        boxes = np.concatenate([corner, corner + size], 1).astype(np.float64)
        labels, crowd = random.integers(1, 4, n), random.random(n) < 0.2
        truths.append(Truth(boxes, labels, crowd, (boxes[:, 2:] - boxes[:, :2]).prod(1)))
        m = int(random.integers(0, 12))
        near = random.integers(0, max(n, 1), m) if n else np.zeros(0, dtype=int)
        moved = boxes[near] + random.integers(-3, 4, (len(near), 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        right = random.random(len(near)) < 0.8
        guessed = np.where(right, labels[near], random.integers(1, 4, len(near)))
        all_found.append(Found(moved, guessed, random.integers(1, 20, len(near)) / 20))
    return all_found, truths


def by_definition(detections: list[Found], truths: list[Truth], label: int, overlap: float) -> Fraction | None:
    """VOC's area, one detection after the other, in fractions."""
    rows = [
        (float(score), image, tuple(box))
        for image, one in enumerate(detections)
        for score, box, kind in zip(one.scores, one.boxes, one.labels, strict=True)
        if kind == label
    ]
    total = sum(int(k == label and not hard) for t in truths for k, hard in zip(t.labels, t.ignore, strict=True))
    if not total:
        return None
    taken, curve, right, wrong = set(), [], 0, 0
    for _, image, box in sorted(rows, key=lambda row: -row[0]):
        best, which = 0.0, None
        for i, (other, kind) in enumerate(zip(truths[image].boxes, truths[image].labels, strict=True)):
            if kind == label:
                w = max(0, min(box[2], other[2]) - max(box[0], other[0]))
                h = max(0, min(box[3], other[3]) - max(box[1], other[1]))
                area = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1])
                if w * h / (area - w * h) > best:
                    best, which = w * h / (area - w * h), i
        if best >= overlap and truths[image].ignore[which]:
            continue
        if best >= overlap and (image, which) not in taken:
            taken.add((image, which))
            right += 1
        else:
            wrong += 1
        curve.append((Fraction(right, total), Fraction(right, right + wrong)))
    area, before = Fraction(0), Fraction(0)
    for i, (recall, _) in enumerate(curve):
        area += (recall - before) * max(precision for _, precision in curve[i:])
        before = recall
    return area


def test_voc_against_its_definition() -> None:
    compared = 0
    for seed in range(8):
        detections, truths = drawn(seed)
        values = voc_map(detections, truths, 3, method="area")
        for label in (1, 2, 3):
            expected = by_definition(detections, truths, label, 0.5)
            assert (expected is None) == (label not in values)
            if expected is not None:
                assert math.isclose(values[label], expected, rel_tol=1e-12)
                compared += 1
    assert compared > 20


# COCO's code is no dependency: where it is absent, the cases by hand above remain.
SEEDS = range(6) if importlib.util.find_spec("pycocotools") else ()


@pytest.mark.parametrize("seed", [*SEEDS, None])
def test_coco_against_its_own_code(seed: int | None) -> None:
    if seed is None:  # by hand: one hit, then one miss, of two objects
        pair = [found((BOX, 1, 0.9), ((30, 30, 40, 40), 1, 0.8))], [truth((BOX, 1), (AWAY, 1))]
        assert math.isclose(coco_map(*pair, 1, [0.5])[1].item(), 51 / 101)
        return
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    detections, truths = drawn(seed)
    xywh = [np.concatenate([t.boxes[:, :2], t.boxes[:, 2:] - t.boxes[:, :2]], 1) for t in truths]
    annotations = [
        {"image_id": i + 1, "category_id": int(k), "bbox": box.tolist(), "area": float(a), "iscrowd": int(c)}
        for i, t in enumerate(truths)
        for box, k, a, c in zip(xywh[i], t.labels, t.area, t.ignore, strict=True)
    ]
    theirs = COCO()
    theirs.dataset = {
        "images": [{"id": i + 1} for i in range(len(truths))],
        "categories": [{"id": k} for k in (1, 2, 3)],
        "annotations": [{**a, "id": i + 1} for i, a in enumerate(annotations)],
    }
    theirs.createIndex()
    rows = [
        [i + 1, *box[:2], *(box[2:] - box[:2]), score, k]
        for i, one in enumerate(detections)
        for box, score, k in zip(one.boxes, one.scores, one.labels, strict=True)
    ]
    evaluation = COCOeval(theirs, theirs.loadRes(np.array(rows)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    expected = evaluation.eval["precision"][:, :, :, 0, -1].mean(1)  # overlaps, classes
    values = coco_map(detections, truths, 3)
    assert len(COCO_OVERLAPS) == 10 and len(values) > 0
    for label in (1, 2, 3):
        if label in values:
            np.testing.assert_allclose(values[label], expected[:, label - 1], rtol=0, atol=1e-12)
        else:
            assert (expected[:, label - 1] == -1).all()

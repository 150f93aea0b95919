"""Average precision of detections: PASCAL VOC's two definitions and COCO's, in numpy.

A detection is matched with an object of its class; sorted by score, the first n detections give one point of precision
and recall. Average precision (AP) is the area under that curve, mAP its mean over the classes that have objects.

========  ==========================================================================================================
VOC 2007  mean of the highest precision at recall 0, 0.1 .. 1 or more (``"11-point"``)
VOC 2010+ area under the curve made monotone (``"area"``)
COCO      mean over 101 recalls and the overlaps 0.5, 0.55 .. 0.95; 100 detections an image
========  ==========================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .data import Truth

COCO_OVERLAPS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100  # of an image and class, by COCO's rules
METHODS = ("11-point", "area", "101-point")


class Found(NamedTuple):
    """Detections of one image: boxes ``[N, 4]``, labels ``[N]`` from 1, scores ``[N]``."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


class _Class(NamedTuple):
    """One image's detections of one class, by falling score, and its objects of that class."""

    boxes: np.ndarray
    scores: np.ndarray
    truth: Truth


def overlaps(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """Intersection over union of boxes ``[A, 4]`` and ``[B, 4]`` as ``[A, B]``.

    Args:
        a, b: ``x1 y1 x2 y2``.
        crowd: bool ``[B]``; where it is set, intersection over the area of ``a`` instead.
    """
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clip(0).prod(2)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(1) for x in (a, b))
    union = area_a[:, None] + area_b[None, :] - inter
    if crowd is not None:
        union = np.where(crowd[None, :], area_a[:, None], union)
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


def average_precision(recall: np.ndarray, precision: np.ndarray, method: str) -> float:
    """AP of a curve, whose points are in the order of falling scores.

    Args:
        recall, precision: ``[N]``; recall never falls.
        method: one of :data:`METHODS`.

    Raises:
        ValueError: for another method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    # from each point on, the highest precision of any later one
    highest = np.maximum.accumulate(precision[::-1])[::-1]
    if method == "area":
        return float((np.diff(recall, prepend=0.0) * highest).sum())
    parts = 10 if method == "11-point" else 100
    # COCO's grid is linspace's; VOC's is in tenths
    grid = np.arange(parts + 1) / parts if method == "11-point" else np.linspace(0, 1, parts + 1)
    index = np.searchsorted(recall, grid, side="left")
    return float(np.append(highest, 0.0)[index].mean())


def voc_map(
    found: Sequence[Found], truths: Sequence[Truth], classes: int, *, overlap: float = 0.5, method: str = "11-point"
) -> dict[int, float]:
    """VOC's AP of each class that has objects, by its number.

    Difficult objects count neither as found nor as missed. Of several detections of one object, the one with the
    highest score is right and the others are wrong.

    Args:
        found: detections, an entry an image.
        truths: objects, an entry an image.
        classes: how many; they are numbered from 1.
        overlap: intersection over union from which on a detection is right.
        method: ``"11-point"`` or ``"area"``.
    """
    _check(found, truths)
    result = {}
    for label in range(1, classes + 1):
        images, total = _of_class(found, truths, label)
        if total:
            parts = [(image.scores, *_voc_match(image, overlap)) for image in images]
            result[label] = _ap(parts, total, method)
    return result


def coco_map(
    found: Sequence[Found],
    truths: Sequence[Truth],
    classes: int,
    thresholds: Sequence[float] | np.ndarray = COCO_OVERLAPS,
) -> dict[int, np.ndarray]:
    """COCO's AP of each class that has objects, by its number, one figure for each of ``thresholds``.

    Crowds may hold any number of detections, which then count neither as right nor as wrong.

    Args:
        found: detections, an entry an image.
        truths: objects, an entry an image.
        classes: how many; they are numbered from 1.
        thresholds: intersections over union from which on a detection is right.
    """
    _check(found, truths)
    result = {}
    for label in range(1, classes + 1):
        images, total = _of_class(found, truths, label)
        if total:
            images = [_Class(boxes[:MAX_DETECTIONS], scores[:MAX_DETECTIONS], truth) for boxes, scores, truth in images]
            shared = [overlaps(image.boxes, image.truth.boxes, image.truth.ignore) for image in images]
            values = []
            for threshold in map(float, thresholds):
                pairs = zip(images, shared, strict=True)
                parts = [(image.scores, *_coco_match(each, image.truth.ignore, threshold)) for image, each in pairs]
                values.append(_ap(parts, total, "101-point"))
            result[label] = np.array(values)
    return result


def summary(kind: str, found: Sequence[Found], truths: Sequence[Truth], classes: Sequence[str]) -> dict[str, object]:
    """The figures that are customary for a data set, as fractions: VOC's, or COCO's for all others.

    Returns:
        ``mAP@.5`` (and of VOC ``mAP@.5 (area)``, of the others ``mAP@[.5:.95]``), and ``classes``: AP by name.
    """
    if kind == "voc":
        points = voc_map(found, truths, len(classes))
        area = voc_map(found, truths, len(classes), method="area")
        named = {classes[label - 1]: value for label, value in points.items()}
        return {"mAP@.5": _mean(points), "mAP@.5 (area)": _mean(area), "classes": named}
    values = coco_map(found, truths, len(classes))
    named = {classes[label - 1]: float(value.mean()) for label, value in values.items()}
    half = {label: float(value[0]) for label, value in values.items()}
    return {"mAP@.5": _mean(half), "mAP@[.5:.95]": _mean(named), "classes": named}


def _mean(values: Mapping[Any, float]) -> float:
    return float(np.mean(list(values.values()))) if values else float("nan")


def _check(found: Sequence[Found], truths: Sequence[Truth]) -> None:
    if len(found) != len(truths):
        raise ValueError(f"found has {len(found)} images and truths {len(truths)}; pass one entry an image to both")


def _of_class(found: Sequence[Found], truths: Sequence[Truth], label: int) -> tuple[list[_Class], int]:
    """The images with detections or objects of a class, and how many objects are to be found."""
    images, total = [], 0
    for detections, truth in zip(found, truths, strict=True):
        mine, objects = detections.labels == label, truth.labels == label
        if mine.any() or objects.any():
            boxes, scores = detections.boxes[mine], detections.scores[mine]
            order = np.argsort(-scores, kind="stable")
            images.append(_Class(boxes[order], scores[order], Truth(*(values[objects] for values in truth))))
            total += int((~images[-1].truth.ignore).sum())
    return images, total


def _voc_match(image: _Class, overlap: float) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are right, and which do not count."""
    right, unused = np.zeros((2, len(image.scores)), dtype=bool)
    if not len(image.truth.labels):
        return right, unused
    shared = overlaps(image.boxes, image.truth.boxes)
    taken = np.zeros(len(image.truth.labels), dtype=bool)
    for i, row in enumerate(shared):
        best = int(row.argmax())
        if row[best] < overlap:
            continue
        if image.truth.ignore[best]:
            unused[i] = True
        else:
            right[i], taken[best] = not taken[best], True
    return right, unused


def _coco_match(shared: np.ndarray, crowd: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Which detections are right, and which do not count, from their overlaps with objects and crowds."""
    right, unused = np.zeros((2, len(shared)), dtype=bool)
    if not len(crowd):
        return right, unused
    free, close = ~crowd, shared >= min(threshold, 1 - 1e-10)
    for i in np.flatnonzero(close.any(1)):
        # an object that is still free comes before a crowd; of equal ones, the last
        for candidates in (free, crowd):
            choice = np.flatnonzero(candidates & close[i])
            if len(choice):
                best = choice[shared[i, choice] == shared[i, choice].max()][-1]
                right[i], unused[i] = free[best], crowd[best]
                free[best] = False
                break
    return right, unused


def _ap(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], total: int, method: str) -> float:
    """AP from scores, which are right, and which do not count, of each image, where there are ``total`` objects."""
    scores, right, unused = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(-scores, kind="stable")
    right = right[order][~unused[order]]
    hits = np.cumsum(right)
    return average_precision(hits / total, hits / np.arange(1, len(right) + 1), method)

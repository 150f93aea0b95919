"""Faster R-CNN as in the paper: the detector, its data, its training and its figures."""

from .c4 import Conv5Head, RoIPooling, faster_rcnn_c4, set_statistics
from .data import DetectionData, Truth, coco, shapes, voc
from .fit import Fit, Recipe, detect, fit_detector
from .metrics import Found, average_precision, coco_map, summary, voc_map
from .refine import refined, vote

__all__ = [
    "Conv5Head",
    "DetectionData",
    "Fit",
    "Found",
    "Recipe",
    "RoIPooling",
    "Truth",
    "average_precision",
    "coco",
    "coco_map",
    "detect",
    "faster_rcnn_c4",
    "fit_detector",
    "refined",
    "set_statistics",
    "shapes",
    "summary",
    "voc",
    "voc_map",
    "vote",
]

"""The error of classifiers on images, by the paper's test protocols; docs/evaluation.md defines them exactly.

pixels     from bytes to what a network takes: mean and deviation, RGB or BGR
protocols  which views of an image are tested, and how a network scores them: 1-crop, 10-crop, dense, plain
errors     top-1 and top-5
images     labelled images to test on, by name or from a run's data
evaluate   the loop: views, scores, averages, errors
"""

from .errors import Errors
from .evaluate import Result, evaluate
from .pixels import CAFFE, IMAGENET, Pixels
from .protocols import AVERAGES, Dense, OneCrop, Plain, TenCrop

__all__ = [
    "AVERAGES",
    "CAFFE",
    "IMAGENET",
    "Dense",
    "Errors",
    "OneCrop",
    "Pixels",
    "Plain",
    "Result",
    "TenCrop",
    "evaluate",
]

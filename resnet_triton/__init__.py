"""Residual networks on fused Triton kernels: a drop-in for PyTorch's ResNets, in one call.

model = resnet_triton.convert(torchvision.models.resnet50(weights="IMAGENET1K_V2").eval())
"""

from . import functional, images
from ._version import __version__
from .backend import use_backend
from .convert import convert, unconvert
from .explain import explain
from .fold import fold
from .graphs import graph
from .info import info
from .models import (
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .registry import register
from .transfer import features, freeze, unfreeze

__all__ = [
    "__version__",
    "convert",
    "explain",
    "features",
    "fold",
    "freeze",
    "functional",
    "graph",
    "images",
    "info",
    "register",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "unconvert",
    "unfreeze",
    "use_backend",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

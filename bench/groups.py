"""The networks and images that the bench compares providers on; :mod:`resnet_triton.compare` measures them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import compare
from resnet_triton.compare import PREDICT_FOR, Group, Watch, calibrate, predicted_ms
from resnet_triton.results import NO_CUDA, Row

from . import data

MNIST_MODEL = "mnist5k_resnet20"
SEED = 0


def images_of(model: str, batch: int, size: int) -> Tensor:
    """Float32 images for a model: real photographs, or test digits for :data:`MNIST_MODEL`."""
    if model == MNIST_MODEL:
        return data.mnist5k(train=False).images[:batch]
    return data.photo_batch(batch, size).contiguous()


@functools.cache
def build_model(name: str) -> nn.Module:
    """The float32 model on the CPU, unconverted, in eval mode. Shared: do not change it.

    :data:`MNIST_MODEL` has trained weights. Networks of torchvision have random ones, calibrated on the photographs.
    """
    if name == MNIST_MODEL:
        return resnet_triton.unconvert(resnet_triton.models.mnist5k_resnet20())
    import torchvision

    torch.manual_seed(SEED)
    return calibrate(torchvision.models.get_model(name), data.photo_batch(4, 128, seed=1))


@functools.cache
def size_of(model: str, size: int) -> tuple[float, float | None]:
    """Parameters in millions, and 10^9 multiply-adds of one image."""
    return compare.size_of(build_model(model), (1 if model == MNIST_MODEL else 3, size, size))


def unmeasured(group: Group) -> dict[tuple[str, str], Row]:
    """Rows of a group that cannot be measured for want of a GPU, ours with the cost model's prediction."""
    rows = {}
    for dtype, provider in group.entries():
        row = group.row(dtype, provider, NO_CUDA)
        if group.model != MNIST_MODEL:
            row.param_count, row.infer_gmacs = size_of(group.model, group.size)
            shape = (group.batch, 3, group.size, group.size)
            row.predicted_step_time = predicted_ms(build_model(group.model), shape, dtype, provider.name)
            row.predicted_for = None if row.predicted_step_time is None else PREDICT_FOR
        rows[dtype, provider.name] = row
    return rows


def measure(
    group: Group, finish: Callable[[Row, Tensor], None] | None = None, watch: Watch | None = None
) -> dict[tuple[str, str], Row]:
    """Every row of a group by ``(dtype, provider)``: built, checked, timed; see :func:`.compare.measure`."""
    images = images_of(group.model, group.batch, group.size)
    return compare.measure(group, build_model(group.model), images, finish=finish, watch=watch)

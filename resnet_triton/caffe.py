"""The original Caffe models of the paper: ResNet-50, 101 and 152 as published by its authors.

They differ from today's networks in three ways, which :func:`caffe_resnet` builds in: the stride of a stage is on its
first 1x1 convolution, the max-pool has no padding and rounds its output size up, and conv1 of ResNet-50 has a bias.
Their images are BGR, 0 to 255, minus the mean of the training images: :data:`resnet_triton.evaluation.CAFFE`.

A ``.caffemodel`` is a protobuf message. :func:`read_caffemodel` reads the few fields that hold names and numbers; what
it reads is data only, and every length is checked against the file before it is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .models import ResNet

#: Blocks of the four stages.
STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

#: Arrays of each layer: convolution weight (and bias); BatchNorm mean, variance and their common factor; Scale gamma
#: and beta; fully connected weight and bias.
Blobs = Mapping[str, Sequence[Any]]


def caffe_names(depth: int) -> dict[str, str]:
    """Name of each Caffe layer that has weights, and of the module of :class:`~resnet_triton.models.ResNet`.

    A BN of Caffe is two layers, BatchNorm (``bn...``) and Scale (``scale...``): both map to one module.

    Args:
        depth: 50, 101 or 152.

    Raises:
        ValueError: for another depth.
    """
    if depth not in STAGES:
        raise ValueError(f"depth={depth!r}: the authors' Caffe models have depth {', '.join(map(str, STAGES))}")
    names = {"conv1": "conv1", **_bn("_conv1", "bn1")}
    for stage, blocks in enumerate(STAGES[depth], start=1):
        for block in range(blocks):
            # Long stages of the deeper networks count their blocks: 3a, 3b1, 3b2, ...
            letter = "abcdef"[block] if depth == 50 or blocks == 3 else f"b{block}" if block else "a"
            for branch, conv, bn in (
                ("branch1", "downsample.0", "downsample.1"),
                ("branch2a", "conv1", "bn1"),
                ("branch2b", "conv2", "bn2"),
                ("branch2c", "conv3", "bn3"),
            ):
                if branch != "branch1" or block == 0:
                    layer = f"{stage + 1}{letter}_{branch}"
                    names[f"res{layer}"] = f"layer{stage}.{block}.{conv}"
                    names |= _bn(layer, f"layer{stage}.{block}.{bn}")
    names["fc1000"] = "fc"
    return names


def _bn(layer: str, module: str) -> dict[str, str]:
    return {f"bn{layer}": module, f"scale{layer}": module}


def depth_of(blobs: Blobs) -> int:
    """50, 101 or 152, by the layers of the third stage."""
    return 152 if "res4b35_branch2a" in blobs else 101 if "res4b1_branch2a" in blobs else 50


def caffe_state_dict(blobs: Blobs) -> dict[str, Tensor]:
    """The state_dict of :class:`~resnet_triton.models.ResNet` that holds the weights of a Caffe model.

    Caffe stores the sums that its statistics were averaged from, and their common factor: both are divided by it.

    Args:
        blobs: arrays (numpy, or whatever ``numpy.asarray`` takes) by layer name; layers without arrays may be absent.

    Raises:
        ValueError: for a missing or unknown layer, another number of arrays than the layer has, or a factor of 0.
    """
    names = caffe_names(depth_of(blobs))
    given = {layer: arrays for layer, arrays in blobs.items() if len(arrays)}
    problems = [
        f"{len(layers)} {what} ({', '.join(layers[:4])}{', ...' if len(layers) > 4 else ''})"
        for what, layers in (
            ("missing layers", [layer for layer in names if layer not in given]),
            ("unknown layers with weights", [layer for layer in given if layer not in names]),
        )
        if layers
    ]
    if problems:
        raise ValueError(f"blobs do not fit the Caffe ResNet-{depth_of(blobs)}: {'; '.join(problems)}")
    state: dict[str, Tensor] = {}
    for layer, module in names.items():
        for entry, value in _entries(layer, [np.asarray(array, np.float32) for array in given[layer]]):
            state[f"{module}.{entry}"] = torch.from_numpy(np.array(value, np.float32))
    return state


def _entries(layer: str, arrays: list[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Names and values that the arrays of one layer become."""
    if layer.startswith("bn"):
        wanted = "mean, variance and factor"
        if len(arrays) == 3 and arrays[2].size == 1:
            factor = arrays[2].item()
            if factor == 0:
                raise ValueError(f"layer {layer!r} has a factor of 0: no statistics were ever collected")
            return [("running_mean", arrays[0].reshape(-1) / factor), ("running_var", arrays[1].reshape(-1) / factor)]
    elif layer.startswith("scale"):
        wanted = "gamma and beta"
        if len(arrays) == 2:
            return [("weight", arrays[0].reshape(-1)), ("bias", arrays[1].reshape(-1))]
    else:
        wanted = "a weight, and a bias or none"
        if len(arrays) in (1, 2):
            weight = arrays[0]
            if layer == "fc1000":
                weight = weight.reshape(weight.shape[-2:])  # old files: four dimensions, the first two of them 1
            return list(zip(("weight", "bias"), [weight, *(a.reshape(-1) for a in arrays[1:])], strict=False))
    shapes = ", ".join(str(array.shape) for array in arrays)
    raise ValueError(f"layer {layer!r} has {len(arrays)} arrays ({shapes}); expected {wanted}")


def caffe_resnet(depth: int, weights: Any = None, **kwargs: Any) -> ResNet:
    """The network of the authors' Caffe model, converted; ResNet-50 has 25,557,096 parameters.

    Its images are prepared by :data:`resnet_triton.evaluation.CAFFE`, not as torchvision's.

    Args:
        depth: 50, 101 or 152.
        weights: path of a ``.caffemodel``; its arrays by layer name; a state_dict of this network or the path of one,
            as :func:`resnet_triton.weights.load_weights` takes; or None for random weights.
        **kwargs: arguments of :class:`~resnet_triton.models.ResNet`. ``num_classes`` follows ``fc1000``.

    Raises:
        ValueError: for another depth; for weights of another depth, or that do not fit.
        OSError: for a file that cannot be read.
    """
    from .models import Bottleneck, ResNet
    from .models.builders import finish

    if depth not in STAGES:
        caffe_names(depth)
    if isinstance(weights, str | os.PathLike) and Path(weights).suffix.lower() == ".caffemodel":
        weights = read_caffemodel(weights)
    if isinstance(weights, Mapping) and "conv1" in weights:
        if depth_of(weights) != depth:
            raise ValueError(f"depth={depth}, but the weights are of the Caffe ResNet-{depth_of(weights)}")
        state = caffe_state_dict(weights)
        kwargs.setdefault("num_classes", len(state["fc.weight"]))
        weights = state
    v1 = {"stride_in_1x1": True, "caffe_pool": True, "conv1_bias": depth == 50}
    model = ResNet(Bottleneck, STAGES[depth], **{**v1, **kwargs})
    return finish(model, weights)


class _Damaged(ValueError):
    """The bytes are not the protobuf message that they should be."""


def read_caffemodel(path: str | os.PathLike[str]) -> dict[str, list[np.ndarray]]:
    """The arrays of a ``.caffemodel`` file, by layer name, in fp32; layers without arrays are left out.

    Reads ``NetParameter`` of ``caffe.proto``, with layers of today (field 100) or of 2014 (field 2).

    Raises:
        FileNotFoundError: no file at the path.
        ValueError: a file that is no such message, or is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file (looked in {path.absolute().parent})")
    layers: dict[str, list[np.ndarray]] = {}
    try:
        for number, value in _fields(memoryview(path.read_bytes())):
            if number in (100, 2):
                name, arrays = _layer(_bytes(value), *((1, 7) if number == 100 else (4, 6)))
                if arrays and name in layers:
                    raise _Damaged(f"two layers {name!r}")
                if arrays:
                    layers[name] = arrays
    except (_Damaged, UnicodeDecodeError) as error:
        raise ValueError(
            f"weights={str(path)!r} ({path.stat().st_size} bytes) is truncated, corrupt or no .caffemodel file "
            f"({error}). Download or copy it again."
        ) from error
    if not layers:
        raise ValueError(f"weights={str(path)!r} holds no layer with weights; is it a .caffemodel?")
    return layers


def _layer(message: memoryview, name_field: int, blobs_field: int) -> tuple[str, list[np.ndarray]]:
    name, arrays = "", []
    for number, value in _fields(message):
        if number == name_field:
            name = bytes(_bytes(value)).decode()
        elif number == blobs_field:
            arrays.append(_blob(_bytes(value)))
    return name, arrays


def _blob(message: memoryview) -> np.ndarray:
    """One array: its shape in field 7, or as four numbers in fields 1 to 4; its values in field 5, or 8 as doubles."""
    shape: list[int] = []
    old = {1: 0, 2: 0, 3: 0, 4: 0}
    parts: dict[int, list[memoryview]] = {5: [], 8: []}
    for number, value in _fields(message):
        if number == 7:
            for dim, size in _fields(_bytes(value)):
                if dim == 1:
                    shape += [size] if isinstance(size, int) else _varints(size)
        elif number in old and isinstance(value, int):
            old[number] = value
        elif number in parts:
            parts[number].append(_bytes(value))
    kind, chunks = ("<f8", parts[8]) if parts[8] else ("<f4", parts[5])
    data = b"".join(chunks)
    shape = shape or list(old.values())
    count, width = 1, np.dtype(kind).itemsize
    for size in shape:
        count *= size
    if count * width != len(data):
        raise _Damaged(f"an array of shape {tuple(shape)} has {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape).astype(np.float32)


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Damaged("a number where a message must be")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: a varint as an integer, all else as the bytes that it takes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if number == 0 or kind not in (0, 1, 2, 5):
            raise _Damaged(f"no field at byte {at}")
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        size, at = _varint(message, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
        if size > len(message) - at:
            raise _Damaged(f"a field of {size} bytes where {len(message) - at} are left")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _Damaged("a number that does not end")


def _varints(message: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(message):
        value, at = _varint(message, at)
        values.append(value)
    return values

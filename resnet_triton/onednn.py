"""Convolution with bias, addition and ReLU in one oneDNN call: the CPU path of folded models.

oneDNN computes on a weight layout of its own. Reordering a weight on every call costs about a fifth of a ResNet's time,
so the reordered copy is kept beside the weight for as long as the weight lives and is unchanged. Changes are seen as
autograd sees them, by the tensor's version: in-place updates, ``load_state_dict`` and optimizers count, in-place writes
through ``.data`` do not.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_packed = WeakTensorKeyDictionary()  # weight -> (state, reordered weight)


@functools.cache
def available() -> bool:
    """Whether this PyTorch has oneDNN's convolution with post-ops."""
    names = ("_convolution_pointwise", "_convolution_pointwise_", "_reorder_convolution_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """``relu(conv(x, weight) + bias + residual)`` in channels_last; fp32 and bf16; arguments as ``conv_bn_act``."""
    layout = torch.channels_last
    x = x.contiguous(memory_format=layout)
    geometry = ([padding] * 2, [stride] * 2, [dilation] * 2, 1)
    packed = packed_weight(weight, geometry, tuple(x.shape))
    unary = "relu" if relu else None
    mkldnn = torch.ops.mkldnn
    if residual is None:
        y = mkldnn._convolution_pointwise(x, packed, bias, *geometry, unary or "none", [], "")
        return y.contiguous(memory_format=layout)
    # accumulating into a copy of the residual is faster than oneDNN's addition of a second input
    y = residual.clone(memory_format=layout)
    return mkldnn._convolution_pointwise_.binary(y, x, packed, bias, *geometry, "add", 1.0, unary, [], "")


def packed_weight(weight: Tensor, geometry: tuple, shape: tuple[int, ...]) -> Tensor:
    """The weight in oneDNN's layout for an input of this shape; kept until the weight or the shape changes."""
    if weight.is_inference():  # has no version
        return weight
    state = (weight.data_ptr(), weight._version, shape, geometry)
    found = _packed.get(weight)
    if found is None or found[0] != state:
        reordered = torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *geometry, list(shape))
        found = _packed[weight] = (state, reordered)
    return found[1]

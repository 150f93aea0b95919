"""The reordered weights of the CPU path: never older than the weight they come from."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from resnet_triton import functional, onednn, reference
from tests.comparers import no_worse_than


def conv(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    return functional.conv_bn_act(x, weight, residual=residual, padding=1)


def right(y: Tensor, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    wide = (t if t is None else t.double() for t in (x, weight, residual))
    exact = reference.conv_bn_act(*(part := list(wide))[:2], residual=part[2], padding=1)
    no_worse_than(y, reference.conv_bn_act(x, weight, residual=residual, padding=1), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_changed_weight_is_reordered_again(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 16, 7, 7, dtype=dtype), torch.randn(16, 16, 3, 3, dtype=dtype)
    for _ in range(3):
        right(conv(x, weight), x, weight)
        weight.mul_(-2)
    other = torch.nn.Conv2d(16, 16, 3, dtype=dtype)
    right(conv(x, other.weight), x, other.weight)
    other.load_state_dict({"weight": weight, "bias": other.bias})
    right(conv(x, other.weight), x, other.weight)
    other.weight.data = torch.randn_like(weight)
    right(conv(x, other.weight), x, other.weight)


@torch.no_grad()
def test_a_weight_is_reordered_once_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 16, 7, 7), torch.randn(16, 16, 3, 3)
    conv(x, weight)
    first = onednn._packed[weight][1]
    conv(x, weight)
    assert onednn._packed[weight][1] is first
    right(conv(x[:1], weight), x[:1], weight)
    right(conv(x, weight), x, weight)


def test_the_copy_goes_with_its_weight() -> None:
    weight = torch.randn(16, 16, 3, 3)
    conv(torch.randn(1, 16, 7, 7), weight)
    copy = weakref.ref(onednn._packed[weight][1])
    assert copy() is not None
    del weight
    gc.collect()
    assert copy() is None


def test_the_residual_is_not_written_to() -> None:
    x, weight = torch.randn(2, 16, 7, 7), torch.randn(16, 16, 3, 3)
    residual = torch.randn(2, 16, 7, 7).contiguous(memory_format=torch.channels_last)
    before = residual.clone()
    right(conv(x, weight, residual), x, weight, before)
    assert torch.equal(residual, before)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        x, weight = torch.randn(2, 16, 7, 7), torch.randn(16, 16, 3, 3)
        for _ in range(2):  # such tensors have no version that would tell a change
            right(conv(x, weight), x, weight)
            weight.mul_(-2)

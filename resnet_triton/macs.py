"""What a network costs on paper: its parameters, and the multiply-adds of one forward."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .convert import unconvert


def parameters(model: nn.Module) -> int:
    """The number of learned values: shared ones once, no running statistics."""
    return sum(p.numel() for p in model.parameters())


def multiply_adds(model: nn.Module, input_shape: Sequence[int]) -> int:
    """The multiply-adds of the convolutions and matrix products of one forward; nothing is computed.

    The paper calls these FLOPs. BN, additions, ReLU and pooling are not counted, nor are biases.

    Args:
        model: any module that takes one image batch, converted or not; it stays as it is.
        input_shape: ``(N, C, H, W)``.
    """
    # A copy without values: deepcopy takes what the memo holds.
    memo: dict[int, Any] = {id(t): _without_values(t) for t in chain(model.parameters(), model.buffers())}
    plain = unconvert(copy.deepcopy(model, memo), inplace=True).eval()  # PyTorch counts its own operators
    dtype = next((p.dtype for p in plain.parameters()), torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        plain(torch.empty(tuple(input_shape), dtype=dtype, device="meta"))
    return counter.get_total_flops() // 2


def _without_values(t: Tensor) -> Tensor:
    empty = torch.empty_like(t, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty

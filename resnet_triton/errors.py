"""How far a result is from float64, and whether that is as close as PyTorch comes: the rule of every comparison.

Both the root mean square deviation and the largest are taken over the largest value of the reference. The root mean
square may be twice that of eager in the same dtype, the largest four times: the largest of a few is a matter of luck.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .providers import DTYPES
from .results import OK, WRONG

OURS_LIMIT = 2.0  # our root mean square error in units of eager's
PEER_LIMIT = 10.0  # a peer beyond this was built wrongly by its provider
WORST = 2.0  # the largest error may be this many times as much again
CHUNK = 32  # images of one float64 forward


class Error(NamedTuple):
    """Deviations from float64 over the largest reference value; infinite for NaN or a wrong shape."""

    rms: float
    largest: float

    def or_worse(self, other: Error) -> Error:
        """The larger of each."""
        return Error(max(self.rms, other.rms), max(self.largest, other.largest))


EXACT, UNUSABLE = Error(0.0, 0.0), Error(math.inf, math.inf)


class Deviation:
    """Root mean square and largest of numbers that come in parts; infinite once there was a NaN."""

    def __init__(self) -> None:
        self.squares, self.count, self.largest = 0.0, 0, 0.0

    def add(self, difference: Tensor) -> None:
        """Takes in the numbers of a tensor."""
        if difference.numel():
            largest = difference.abs().max().item()
            self.largest = max(self.largest, math.inf if math.isnan(largest) else largest)
            self.squares += difference.square().sum().item()
            self.count += difference.numel()

    def over(self, scale: float) -> Error:
        """Relative to the largest reference value."""
        if self.largest == 0:
            return EXACT
        if math.isinf(self.largest) or not scale:
            return UNUSABLE
        return Error(math.sqrt(self.squares / self.count) / scale, self.largest / scale)


def relative_error(out: Tensor, reference: Tensor, scale: float | None = None) -> Error:
    """The error of a result against float64, over the largest reference value or ``scale``."""
    if out.shape != reference.shape:
        return UNUSABLE
    deviation = Deviation()
    deviation.add(out.double() - reference)
    return deviation.over(largest_of(reference) if scale is None else scale)


def largest_of(x: Tensor) -> float:
    """The largest magnitude in a tensor; 0 if it is empty."""
    return x.abs().max().item() if x.numel() else 0.0


def gate(error: Error, eager: Error, dtype: str, is_ours: bool) -> str:
    """``"ok"``, or ``"WRONG: ..."`` for an error beyond the limit (the rounding of the result is always allowed).

    Args:
        error, eager: of the result, and of eager in the same dtype.
        dtype: a name of :data:`.providers.DTYPES`, or ``"tf32"``.
        is_ours: whether the limit for this package counts, or the one for peers.
    """
    if math.isinf(error.largest):
        return f"{WRONG}: NaN, infinite, or of another shape"
    eps = 2.0**-11 if dtype == "tf32" else torch.finfo(DTYPES[dtype]).eps / 2
    factor = OURS_LIMIT if is_ours else PEER_LIMIT
    for kind, found, theirs, allowed in (
        ("RMS", error.rms, eager.rms, factor),
        ("largest", error.largest, eager.largest, factor * WORST),
    ):
        limit = max(allowed * theirs, eps)
        if found > limit:
            return f"{WRONG}: {kind} error {found:.1e}, eager {theirs:.1e}, limit {limit:.1e}"
    return OK


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output: a tensor, or tuples, lists and mappings of them.

    Raises:
        ValueError: there is none.
    """
    found = list(_tensors(output))
    if not found:
        raise ValueError(f"the model must return floating-point tensors to compare, got {type(output).__name__}")
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):  # dicts, and the outputs of transformers
        for part in output.values():
            yield from _tensors(part)


def reference_outputs(model: nn.Module, x: Tensor, chunk: int = CHUNK) -> list[Tensor]:
    """Float64 outputs of the model in eval mode, a few images at a time.

    Raises:
        ValueError: an output whose first size is not that of the batch.
    """
    exact = copy.deepcopy(model).double()
    parts = []
    with torch.no_grad():
        for images in x.split(chunk):
            outputs = tensors_of(exact(images.double()))
            for out in outputs:
                if out.dim() == 0 or out.shape[0] != images.shape[0]:
                    raise ValueError(
                        f"an output of the model has shape {tuple(out.shape)} for {images.shape[0]} images; outputs "
                        "must have one entry an image in their first dimension"
                    )
            parts.append(outputs)
    return [torch.cat(same) for same in zip(*parts, strict=True)]

"""Which convolutions have inputs whose second moments say too little about a variance, and take another way since.

The Gram form computes the variance of an output from sums of products of its inputs. Where an output is a small
difference of large inputs, rounding in these sums is no longer small beside its variance. The kernel that computes the
variance says so in a flag. Reading a flag of a GPU at once would make the host wait for the GPU, so there it is looked
at when the convolution runs next and the flag has arrived, and only every so many steps: a GPU is warned late, a CPU in
time. While a CUDA graph is captured nothing is looked at, and a replay never looks: run some steps before. From a
raised flag on, for as long as the weight lives, the raw outputs are computed again where they are needed, and not kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..steps import Recorder

logger = logging.getLogger("resnet_triton")


#: Calls of a convolution on a GPU from one look at its flag to the next.
PERIOD = 16


@dataclass
class _Flag:
    """What is known of a convolution: how often it ran, a flag on its way to the host, and whether one was raised."""

    calls: int = 0
    value: Tensor | None = None
    arrived: torch.cuda.Event | None = None
    raised: bool = False


_flags = WeakTensorKeyDictionary()  # weight -> _Flag


def remember(weight: Tensor, doubtful: Tensor) -> None:
    """Notes what a kernel said of a convolution's variances: an int32 ``[1]`` on its device."""
    if Recorder.active or doubtful.device.type == "meta":
        return
    flag = _flags.get(weight)
    if flag is None:
        flag = _flags[weight] = _Flag()
    if not doubtful.is_cuda:
        flag.value = doubtful
        return
    if flag.raised or flag.value is not None or torch.cuda.is_current_stream_capturing():
        return  # a graph would copy the flag whenever it is replayed
    if flag.calls % PERIOD == 0:
        flag.value = torch.empty(1, dtype=doubtful.dtype, pin_memory=True)  # a copy to other memory would be waited for
        flag.value.copy_(doubtful, non_blocking=True)
        flag.arrived = torch.cuda.Event()
        flag.arrived.record()
    flag.calls += 1


def doubts(weight: Tensor) -> bool:
    """Whether the Gram form was found to be too inexact for this convolution."""
    flag = _flags.get(weight)
    if flag is None:
        return False
    if flag.value is not None and not flag.raised and _has_arrived(flag):
        _look(flag, weight)
    return flag.raised


def _has_arrived(flag: _Flag) -> bool:
    if flag.arrived is None:
        return True
    return not torch.cuda.is_current_stream_capturing() and flag.arrived.query()


def _look(flag: _Flag, weight: Tensor) -> None:
    flag.raised = flag.value is not None and bool(int(flag.value))
    flag.value = None
    if flag.raised:
        logger.warning(
            "the inputs of a convolution %s are so correlated that their second moments do not give its batch "
            "variance; its raw output is computed again where it is needed from here on",
            tuple(weight.shape),
        )

"""Which convolutions have inputs whose second moments say too little about a variance, and take another way since.

The Gram form computes the variance of an output from sums of products of its inputs. Where an output is a small
difference of large inputs, rounding in these sums is no longer small beside its variance. The kernel that computes the
variance says so in a flag. Reading a flag of a GPU at once would make the host wait for the GPU, so there it is looked
at when the convolution runs next and the flag has arrived: a GPU is warned one step late, a CPU in time. From then on,
for as long as the weight lives, the raw outputs are computed again where they are needed, and not kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..steps import Recorder

logger = logging.getLogger("resnet_triton")


@dataclass
class _Flag:
    """A flag on its way to the host, and whether it was ever raised."""

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
    if flag.raised or (flag.arrived is not None and not flag.arrived.query()):
        return
    if not doubtful.is_cuda:
        flag.value = doubtful
    elif not torch.cuda.is_current_stream_capturing():  # a graph would copy the flag of another step
        _look(flag, weight)
        flag.value = doubtful.to("cpu", non_blocking=True)
        flag.arrived = torch.cuda.Event()
        flag.arrived.record()


def doubts(weight: Tensor) -> bool:
    """Whether the Gram form was found to be too inexact for this convolution."""
    flag = _flags.get(weight)
    if flag is None:
        return False
    if not flag.raised and (flag.arrived is None or flag.arrived.query()):
        _look(flag, weight)
    return flag.raised


def _look(flag: _Flag, weight: Tensor) -> None:
    if flag.value is not None and int(flag.value) and not flag.raised:
        flag.raised = True
        logger.warning(
            "the inputs of a convolution %s are so correlated that their second moments do not give its batch "
            "variance; its raw output is computed again where it is needed from here on",
            tuple(weight.shape),
        )
    flag.value = None

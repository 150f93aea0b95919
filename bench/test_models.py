"""Whole networks: images per second of each provider, after its logits were checked against float64."""

from __future__ import annotations

import pytest
import torch

from bench.conftest import SMOKE
from bench.groups import measure, unmeasured
from resnet_triton.compare import Group
from resnet_triton.providers import Provider

CUDA = torch.cuda.is_available()
BOTH = ("float32", "bfloat16")
CPU_GROUPS = (
    Group("cpu", "resnet50", 8, 224, BOTH, 60),
    Group("cpu", "resnet50", 1, 224, BOTH, 12, leave_out=("torch.compile",)),
    Group("cpu", "resnet18", 8, 224, BOTH, 25, leave_out=("torch.compile",)),
)
GPU_GROUPS = (
    Group("cuda", "resnet50", 256, 224, ("bfloat16",), 8),
    Group("cuda", "resnet50", 32, 224, ("bfloat16",), 5),
    Group("cuda", "resnet50", 1, 224, ("bfloat16",), 5),
    Group("cuda", "resnet50", 256, 224, ("float16",), 8, leave_out=("torch.compile max-autotune",)),
    Group("cuda", "resnet50", 256, 224, ("tf32",), 8, leave_out=("torch.compile max-autotune",)),
    *(
        Group("cuda", f"resnet{depth}", 256, 224, ("bfloat16",), 5, leave_out=("torch.compile max-autotune",))
        for depth in (18, 34, 101, 152)
    ),
)
SMOKE_GROUPS = (
    Group("cpu", "resnet18", 2, 64, ("float32",), 0.2),
    Group("cuda", "resnet18", 1, 64, ("bfloat16",), 0.2),
)
#: A GPU's visitor wants the GPU's rows; without one they say so, beside the CPU's.
GROUPS = SMOKE_GROUPS if SMOKE else (() if CUDA else CPU_GROUPS) + GPU_GROUPS


@pytest.mark.parametrize(
    ("group", "dtype", "provider"),
    [
        pytest.param(group, dtype, provider, id=f"{group.name}-{dtype}-{provider.name.replace(' ', '_')}")
        for group in GROUPS
        for dtype, provider in group.entries()
    ],
)
def test_model(group: Group, dtype: str, provider: Provider, lab, publish) -> None:
    """One provider on one network, batch and dtype."""
    here = group.device == "cpu" or CUDA
    rows = lab.once(group, lambda: measure(group, watch=lab) if here else unmeasured(group))
    publish(rows[dtype, provider.name])

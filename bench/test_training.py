"""Training steps: whole networks forward, backward and optimizer, and single steps of a training step on a GPU."""

from __future__ import annotations

import pytest
import torch

from bench import training_layers as layers
from bench.conftest import SMOKE
from bench.training import TrainGroup, measure, unmeasured
from resnet_triton.devices import target_of
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.providers import Provider
from resnet_triton.results import device_name
from resnet_triton.training.plan import Work

CUDA = torch.cuda.is_available()
BOTH = ("float32", "bfloat16")
SLOW_PEER = ("torch.compile max-autotune",)  # it compiles for minutes
CPU_GROUPS = (TrainGroup("cpu", "resnet50", 4, 160, BOTH, 8), TrainGroup("cpu", "resnet18", 4, 160, BOTH, 3))
GPU_GROUPS = (
    TrainGroup("cuda", "resnet50", 256, 224, ("bfloat16",), 10),
    TrainGroup("cuda", "resnet18", 256, 224, ("bfloat16",), 6),
    *(TrainGroup("cuda", f"resnet{depth}", 256, 224, ("bfloat16",), 6, SLOW_PEER) for depth in (34, 101, 152)),
)
SMOKE_GROUPS = (
    TrainGroup("cpu", "resnet18", 2, 64, ("float32",), 0.1),
    TrainGroup("cuda", "resnet18", 2, 64, ("bfloat16",), 0.1),
)
GROUPS = SMOKE_GROUPS if SMOKE else (() if CUDA else CPU_GROUPS) + GPU_GROUPS


@pytest.mark.parametrize(
    ("group", "dtype", "provider"),
    [
        pytest.param(group, dtype, provider, id=f"{group.name}-{dtype}-{provider.name.replace(' ', '_')}")
        for group in GROUPS
        for dtype, provider in group.entries()
    ],
)
def test_training_step(group: TrainGroup, dtype: str, provider: Provider, lab, publish) -> None:
    """One provider on one network, batch and dtype; a GPU's row says its predicted time where there is none."""
    here = group.device == "cpu" or CUDA
    rows = lab.once(group, lambda: measure(group, lab) if here else unmeasured(group))
    publish(rows[dtype, provider.name])


#: On a GPU all steps of ResNet-50 and -18, else one for each kernel.
STEPS = layers.all_steps(layers.h200()) if CUDA and not SMOKE else layers.one_each(layers.h200())


@pytest.mark.parametrize(
    ("work", "config"),
    [
        pytest.param(work, config, id=f"{layers.title(work)} {config.kernel}".replace(" ", "_"))
        for work, config in STEPS
    ],
)
def test_step_of_training(work: Work, config: ConvConfig, lab, record) -> None:
    """One step with products: ours with the plan's choice, what PyTorch runs instead, its convolution alone."""
    if not CUDA:
        record(layers.rows_of(work, config, "cuda", layers.h200(), None)[0])
        return
    ours, *others = layers.measured_rows(work, config, device_name(), target_of("cuda"))
    known = {row.key for row in lab.rows}
    lab.rows += [row for row in others if row.key not in known]
    record(ours)

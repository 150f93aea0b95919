"""Single steps: the fused ops against the same as separate PyTorch operators, and one row for each kernel."""

from __future__ import annotations

import pytest
import torch

from bench.conftest import SMOKE
from bench.layers import (
    CUDNN,
    EAGER,
    FEW,
    FOLDED,
    OURS,
    Layer,
    absent_rows,
    conv_layers,
    kernel_layers,
    measure,
    unmeasured,
)
from resnet_triton.providers import weak_dtype
from resnet_triton.results import Row

CUDA = torch.cuda.is_available()
CPU_BATCH = 1 if SMOKE else 4
CPU_DTYPES = ("float32",) if SMOKE else ("float32", "bfloat16")
GPU_BATCHES = (256, 32) if CUDA and not SMOKE else (256,)
BUDGET_S = 0.1 if SMOKE else 0.3 if CUDA else 0.7  # a step takes less than a millisecond on a GPU


def _name(layer: Layer) -> str:
    return layer.name.replace(" ", "_")


@pytest.mark.parametrize("provider", [EAGER, OURS, FOLDED])
@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("layer", [] if CUDA else conv_layers(CPU_BATCH, FEW[:1] if SMOKE else FEW), ids=_name)
def test_cpu_layer(layer: Layer, dtype: str, provider: str, lab, publish) -> None:
    """A convolution of ResNet-50 on the CPU, with and without folded BN."""
    if reason := weak_dtype("cpu", dtype):
        pytest.skip(reason)
    rows = lab.once((layer.name, dtype), lambda: measure(layer, "cpu", dtype, BUDGET_S, lab))
    publish(rows[provider])


ABSENT = absent_rows("bfloat16") if CUDA else []
GPU_PROVIDERS = (EAGER, OURS) if ABSENT else (EAGER, CUDNN, OURS)


@pytest.mark.parametrize(
    ("layer", "provider"),
    [
        pytest.param(layer, provider, id=f"{_name(layer)}-{provider.replace(' ', '_')}")
        for provider in (GPU_PROVIDERS if CUDA else (OURS,))
        for batch in GPU_BATCHES
        for layer in kernel_layers(batch, few=SMOKE or not CUDA)
        if provider != CUDNN or layer.unit is not None
    ],
)
def test_gpu_layer(layer: Layer, provider: str, lab, publish) -> None:
    """A step on this package's kernels: distinct convolutions and block ends of ResNet-50, and all around them."""
    if not CUDA:
        publish(unmeasured(layer, "bfloat16"))
        return
    rows = lab.once((layer.name, "cuda"), lambda: measure(layer, "cuda", "bfloat16", BUDGET_S, lab))
    publish(rows[provider])


@pytest.mark.parametrize("row", ABSENT, ids=lambda row: row.provider)
def test_a_peer_that_is_not_installed(row: Row, record) -> None:
    """A line that says how to get it."""
    record(row)

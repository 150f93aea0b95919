"""``explain`` of a model in training mode: forward and backward, on another device and on the CPU."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from torch import nn
from torchvision.models import resnet as tv

from resnet_triton import convert, explain, use_backend
from resnet_triton.explain import Plan

H200 = "NVIDIA H200"
SHAPE = (256, 3, 224, 224)


@functools.cache
def resnet50() -> nn.Module:
    with torch.device("meta"):
        return convert(tv.resnet50().train(), inplace=True)


@functools.cache
def planned(memory: str, backend: str = "auto") -> Plan:
    with use_backend(backend, memory=memory):
        return explain(resnet50(), SHAPE, dtype=torch.bfloat16, device=H200)


def ops(plan: Plan) -> list[str]:
    return [row.op.split()[0] for row in plan.rows]


def test_the_gram_form_is_what_an_h200_trains_in() -> None:
    plan = planned("auto")
    found = ops(plan)
    ends = 16 + 4  # a block's last convolution, and the projections
    assert found.count("gram") == found.count("gram_dgrad") == ends
    assert found.count("expand") + found.count("expand+fprop") == 16, "a projection is in its block's"
    assert found.count("wgrad") >= 32 + ends and found.count("dgrad") == 32
    for row in plan.rows:
        assert row.reason and row.bytes > 0 and row.predicted_us is not None, row
        kernel = row.op.split()[0].partition("+")[0]
        if kernel in ("gram", "expand", "gram_dgrad"):
            assert "Gram form" in row.reason and row.realisation == kernel and row.config
    assert {"wgrad", "dgrad"} <= {row.realisation for row in planned("auto", "triton").rows}


def test_backward_rows_come_behind_the_forwards_last_layer_first() -> None:
    plan = planned("auto")
    backward = ("gram_dgrad", "dgrad", "wgrad", "masked_sums", "bn_backward")
    first = min(i for i, op in enumerate(ops(plan)) if op in backward)
    last = max(i for i, op in enumerate(ops(plan)) if op in ("expand", "expand+fprop", "fprop", "gram"))
    assert last < first
    names = [row.name for row in plan.rows[first:]]
    assert names[0].startswith("layer4.2") and names[-1] == "conv1"


def test_stored_outputs_are_named_where_they_are_asked_for() -> None:
    plan = planned("stored")
    assert not {"gram", "expand", "expand+fprop", "gram_dgrad"} & {*ops(plan)}
    assert ops(plan).count("fprop") == 52 and ops(plan).count("dgrad") == 52 and ops(plan).count("wgrad") >= 52
    assert ops(plan).count("bn_apply") >= 16, "the ends of blocks"
    assert all(row.reason for row in plan.rows)


def test_bytes_of_a_step() -> None:
    """Of an image, forward and backward; the Gram form moves less."""
    gram, stored = planned("gram"), planned("stored")
    assert gram.bytes_per_image < 0.85 * stored.bytes_per_image
    activations = sum(row.bytes - row.weight_bytes for row in gram.rows)
    assert gram.bytes_per_image == activations / SHAPE[0]
    assert 60e6 < gram.bytes_per_image < 200e6, "about three times the forward's"
    assert f"{gram.bytes_per_image / 1e6:.1f} MB an image on {H200}" in str(gram)
    assert gram.predicted_us is not None and len(json.loads(gram.to_json())["rows"]) == len(gram.rows)


def test_on_the_cpu_training_runs_on_pytorchs_modules_and_says_so() -> None:
    model = convert(tv.resnet18().train())
    plan = explain(model, (2, 3, 64, 64), device="cpu")
    assert not any(row.op.startswith(("gram", "fprop", "dgrad")) for row in plan.rows)
    reasons = [row.reason for row in plan.rows if row.name.startswith("layer")]
    assert reasons and all("on a CPU run on PyTorch's modules" in reason for reason in reasons)
    with use_backend("auto", memory="gram"):
        asked = explain(model, (2, 3, 64, 64), device="cpu")
    assert any(row.op.startswith("fprop") for row in asked.rows)


@pytest.mark.parametrize("memory", ("gram", "stored"))
def test_the_model_is_left_as_it_was(memory: str) -> None:
    model = convert(tv.resnet18(num_classes=4).train())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with use_backend("auto", memory=memory):
        explain(model, (2, 3, 64, 64), dtype=torch.bfloat16, device=H200)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("size", [(64, 33), (97, 64)])
def test_odd_sizes_leave_to_the_library_what_no_tensor_map_describes(size: tuple[int, int]) -> None:
    """Forward and weight gradient of the 3x3 at stride 2; nothing is planned that a launch would refuse."""
    model = convert(tv.ResNet(tv.Bottleneck, [1, 1, 1, 1])).train()
    with use_backend("triton"):
        plan = explain(model, (8, 3, *size), dtype=torch.bfloat16, device="NVIDIA H200")
    theirs = {(row.name, row.op.split()[0]) for row in plan.rows if row.realisation == "cudnn"}
    assert {op for _, op in theirs} == {"fprop", "wgrad"} and all(name.endswith("conv2") for name, _ in theirs)

"""What is remembered of a stage between calls, and what makes it be read anew."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from resnet_triton import convert, explain
from resnet_triton import nn as fused
from resnet_triton.snapshot import Remembered
from tests.comparers import same_math
from tests.networks import basics, bottlenecks, images

CHANGES = {
    "eps": lambda s: setattr(s[0].bn1, "eps", 0.25),
    "geometry": lambda s: (setattr(s[0].conv1, "dilation", (2, 2)), setattr(s[0].conv1, "padding", (2, 2))),
    "weight": lambda s: setattr(s[1].conv2, "weight", nn.Parameter(-s[1].conv2.weight.data)),
    "mean": lambda s: setattr(s[1].bn2, "running_mean", torch.ones(64, dtype=torch.float64)),
    "deleted bias": lambda s: setattr(s[0].bn2, "bias", None),
    "child": lambda s: setattr(s[1], "bn1", nn.Identity()),
    "block": lambda s: s.__setitem__(1, copy.deepcopy(s[0])),
    "order": lambda s: s._modules.update({"0": s[1], "1": s[0]}),
    "appended": lambda s: s.append(copy.deepcopy(s[0])),
    "activation": lambda s: setattr(s[0], "relu", nn.SiLU()),
    "class": lambda s: setattr(s[0].relu, "__class__", nn.SiLU),
    "training": lambda s: s[0].bn1.train(),
    "hook": lambda s: s[0].bn1.register_forward_hook(lambda m, args, out: 2 * out),
    "all attributes": lambda s: setattr(s[0].bn1, "__dict__", {**vars(s[0].bn1), "eps": 0.25}),
    "new attribute": lambda s: setattr(s[0].conv2, "forward", torch.zeros_like),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen_at_the_next_call(change: str) -> None:
    plain = basics()
    model, x = convert(plain), images()
    with torch.no_grad():
        for _ in range(2):
            same_math(model(x), plain(x))
        before = plain(x)
        for m in (plain, model):
            CHANGES[change](m.layer1)
        expected = copy.deepcopy(plain)(x)  # running statistics of a BN in training mode move
        assert not torch.equal(expected, before)
        for _ in range(2):
            same_math(copy.deepcopy(model)(x), expected)
        same_math(model(x), expected)


def test_a_hook_that_is_gone_is_forgotten() -> None:
    model, x = convert(basics()), images()
    handle = model.layer1[0].register_forward_hook(lambda *_: None)
    with torch.no_grad():
        model(x)
        assert fused._stage_blocks(model.layer1) is None
        handle.remove()
        assert fused._stage_blocks(model.layer1) is not None


def test_a_stage_is_read_once() -> None:
    reads = []
    remembered = Remembered(lambda stage: reads.append(stage) or len(reads))
    stage = convert(bottlenecks()).layer1
    assert [remembered(stage) for _ in range(3)] == [1, 1, 1]
    stage.load_state_dict(stage.state_dict())  # in place
    assert remembered(stage) == 1
    stage.eval()
    assert remembered(stage) == 1
    assert remembered(copy.deepcopy(stage)) == 2
    stage.train()
    assert remembered(stage) == 3
    stage.eval().float()  # replaces the buffers
    assert remembered(stage) == 4


def test_nothing_is_kept_on_modules_or_alive() -> None:
    model = convert(basics())
    attributes = {name: set(m.__dict__) for name, m in model.named_modules()}
    explain(model, (1, 3, 32, 32))
    with torch.no_grad():
        model(images())
    assert {name: set(m.__dict__) for name, m in model.named_modules()} == attributes
    pickle.loads(pickle.dumps(model))
    known = len(fused._stage_blocks.known)
    alive = weakref.ref(model.layer1[0].conv1.weight)
    del model
    gc.collect()
    assert alive() is None and len(fused._stage_blocks.known) < known


def test_tensors_of_a_functional_call_are_not_remembered() -> None:
    model, x = convert(basics()), images()
    other = {name: value.detach() * 2 for name, value in model.named_parameters()}
    with torch.no_grad():
        before = model(x)
        torch.func.functional_call(model, other, (x,))
        kept = fused._stage_blocks.known.get(model.layer1)
        assert kept is None or kept[-1][0].first.weight is model.layer1[0].conv1.weight
        assert torch.equal(model(x), before)

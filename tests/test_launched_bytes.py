"""``explain``'s bytes are those of the arguments of the kernels that a forward really launches.

The forward runs on tensors without memory, planned for an H200; what it would launch is noted.
"""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet as tv

from resnet_triton import codegen, convert, explain, ops, steps, use_backend
from resnet_triton.codegen import Launch
from resnet_triton.devices import known_devices
from resnet_triton.explain import Plan, fused_steps
from resnet_triton.plan import ONE_PASS

TARGET = known_devices()["NVIDIA H200"]
LIBRARY = ("cudnn", "aten")


def converted(name: str) -> nn.Module:
    with torch.device("meta"):
        return convert(getattr(tv, name)().eval(), inplace=True).to(torch.bfloat16)


class _Implementations(TorchDispatchMode):
    """Runs the operators' implementations on tensors without memory, for which PyTorch would only ask their shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        own = func.namespace == "resnet_triton"
        return (ops.IMPLEMENTATIONS[func._opname] if own else func)(*args, **(kwargs or {}))


def launches_of(model: nn.Module, shape: tuple[int, ...]) -> list[Launch]:
    """What a forward of a model without memory would launch on an H200."""

    def forward() -> None:
        with torch.no_grad(), _Implementations(), patch.object(steps, "target_of", lambda *_: TARGET):
            model(torch.empty(shape, dtype=torch.bfloat16, device="meta"))

    return codegen.trace(forward, TARGET.multiprocessors)


def training_launches_of(model: nn.Module, shape: tuple[int, ...]) -> list[Launch]:
    """What a forward and its backward would launch on an H200; the gradients of the parameters stay with them."""

    def step() -> None:
        with _Implementations(), patch.object(steps, "target_of", lambda *_: TARGET):
            model(torch.empty(shape, dtype=torch.bfloat16, device="meta")).sum().backward()

    model.zero_grad(set_to_none=True)
    return codegen.trace(step, TARGET.multiprocessors)


def storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def bytes_of(launch: Launch, weights: set[int]) -> int:
    """Of the tensors of one launch but weights and vectors; one that comes in twice counts once."""
    sizes: dict[int, int] = {}
    constants = launch.kwargs
    window, stride = constants.get("R", constants.get("KERNEL")), constants.get("STRIDE", 1)
    for i, argument in enumerate((*launch.args, *constants.values())):
        t = getattr(argument, "base", argument)  # of a tensor descriptor
        if not isinstance(t, Tensor) or storage(t) in weights:
            continue
        # a map may cover pixels more than once, but a launch reads no more than there is
        elements = min(
            torch.Size(getattr(argument, "shape", t.shape)).numel(), t.untyped_storage().nbytes() // t.itemsize
        )
        if i == 0 and window == 1:  # a window of one pixel passes over the pixels between
            elements //= stride**2
        if i == 0 and launch.kernel.__name__ == "bn_act":  # in place: read and written
            elements *= 2
        sizes[storage(t)] = max(sizes.get(storage(t), 0), elements * t.itemsize)
    return sum(sizes.values())


def library_convs(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Bytes of the library's convolutions where only the pass behind them is this package's."""
    planned, _ = fused_steps(model, shape, device=TARGET.name)
    found = [step for _, step in planned if step.choice.realisation == ONE_PASS]
    return sum(step.shape.bytes_moved(2) - step.weight_bytes for step in found)


def activation_bytes(plan: Plan, ours: bool) -> int:
    rows = [row for row in plan.rows if (row.realisation not in LIBRARY) == ours]
    return sum(row.bytes - row.weight_bytes for row in rows)


@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize(("name", "batch"), (("resnet50", 256), ("resnet18", 256), ("resnet50", 2)))
def test_the_sum_over_the_launches_is_what_explain_says(name: str, batch: int, backend: str) -> None:
    model, shape = converted(name), (batch, 3, 224, 224)
    with use_backend(backend):
        found = launches_of(model, shape)
        plan = explain(model, shape, device=TARGET.name)
        beside = library_convs(model, shape)
    weights = {storage(t) for t in (*model.parameters(), *model.buffers())}
    packed = [launch for launch in found if launch.kernel.__name__ == "pack_stem_weight"]
    weights |= {storage(launch.args[1]) for launch in packed}
    moved = sum(bytes_of(launch, weights) for launch in found if launch not in packed)
    assert moved > 0 and moved == activation_bytes(plan, ours=True) - beside
    if backend == "triton":
        assert activation_bytes(plan, ours=False) == 0


def training_bytes(model: nn.Module, batch: int) -> tuple[int, int]:
    """Activation bytes of the launches of a step, and of the rows of ``explain``, without parameters and gradients."""
    shape = (batch, 3, 224, 224)
    found = training_launches_of(model, shape)
    parameters = (*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None))
    known = {storage(t) for t in (*parameters, *model.buffers())}
    moved = 0
    for launch in found:
        sizes: dict[int, int] = {}
        for argument in (*launch.args, *launch.kwargs.values()):
            t = getattr(argument, "base", argument)
            if isinstance(t, Tensor) and t.dtype != torch.float32 and storage(t) not in known:  # 16 bits, or pairs
                # a map may cover pixels more than once, but a launch reads no more than there is
                elements = torch.Size(getattr(argument, "shape", t.shape)).numel()
                elements = min(elements, t.untyped_storage().nbytes() // t.itemsize)
                sizes[storage(t)] = max(sizes.get(storage(t), 0), elements * t.itemsize)
        moved += sum(sizes.values())
    plan = explain(model, shape, device=TARGET.name)
    return moved, activation_bytes(plan, ours=True)


@pytest.mark.parametrize("memory", ("gram", "stored"))
@pytest.mark.parametrize("name", ("resnet50", "resnet18"))
def test_a_step_of_training_moves_what_explain_says(name: str, memory: str) -> None:
    """An image more moves as many bytes more in the launches as in the plan; what does not grow is of weights."""
    with torch.device("meta"):
        model = convert(getattr(tv, name)().train(), inplace=True).to(torch.bfloat16)
    with use_backend("triton", memory=memory):
        (few, planned_few), (many, planned_many) = (training_bytes(model, batch) for batch in (128, 256))
    assert many > few > 0 and many - few == planned_many - planned_few


def test_resnet50_moves_at_most_30_mb_an_image() -> None:
    plan = explain(converted("resnet50"), (256, 3, 224, 224), dtype=torch.bfloat16, device="NVIDIA H200")
    assert plan.bytes_per_image <= 30e6

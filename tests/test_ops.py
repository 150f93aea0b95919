"""The registered operators: opcheck, torch.compile, export, recorded plans. Realisations are tested elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from resnet_triton import functional, reference, use_backend
from resnet_triton.devices import target_of
from resnet_triton.functional import ConvBN
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.ops import IMPLEMENTATIONS, split_units
from resnet_triton.steps import Recorder, channels_last, nhwc
from tests.comparers import GRADCHECK, identical, same_math

ops = torch.ops.resnet_triton


def vectors(k: int, requires_grad: bool = False) -> list[Tensor]:
    """gamma, beta, mean, var."""
    gamma, beta = torch.rand(k) + 0.5, torch.randn(k)
    return [
        gamma.requires_grad_(requires_grad),
        beta.requires_grad_(requires_grad),
        torch.randn(k),
        torch.rand(k) + 0.5,
    ]


def unit(k: int, c: int, r: int = 1) -> list[Tensor | None]:
    return [torch.randn(k, c, r, r) / (c * r * r) ** 0.5, None, *vectors(k)]


def samples(grad: bool) -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Operator and arguments by name; with ``grad``, what can be differentiated requires gradients."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).requires_grad_(grad)

    x, image = leaf(2, 8, 6, 5), leaf(2, 3, 16, 15)
    samples = {
        "conv": ("conv_bn_act", (x, leaf(12, 8, 3, 3), None, None, None, None, None, None, 1e-5, False, 2, 1, 1)),
        "conv, everything": (
            "conv_bn_act",
            (x, leaf(12, 8, 3, 3), leaf(12), *vectors(12, grad), leaf(2, 12, 6, 5), 1e-5, True, 1, 1, 1),
        ),
        "conv, odd layouts": (
            "conv_bn_act",
            (
                x.transpose(2, 3),
                leaf(8, 12, 1, 1).transpose(0, 1),
                *[None] * 5,
                leaf(12, 5, 6).expand(2, 12, 5, 6),
                1e-5,
                True,
                1,
                0,
                1,
            ),
        ),
        "stem": ("stem", (image, leaf(4, 3, 7, 7), leaf(4), *vectors(4, grad), None, None, 1e-5, True)),
        "stem, normalised": (
            "stem",
            (image, leaf(4, 3, 7, 7), *[None] * 5, torch.rand(3), torch.rand(3) + 0.5, 1e-5, False),
        ),
        "head": ("head", (x, leaf(5, 8), leaf(5))),
        "fold": ("fold_bn", (leaf(4, 8, 3, 3), leaf(4), *vectors(4, grad), 1e-5)),
        "fold, transposed": ("fold_bn", (leaf(8, 4, 3, 3).transpose(0, 1), None, None, None, *vectors(4)[2:], 1e-5)),
        "add": ("add_relu", (x, leaf(2, 8, 6, 5))),
        "add, 2-D": ("add_relu", (leaf(4, 5), leaf(4, 5))),
    }
    if not grad:
        pixels = torch.randint(0, 256, (2, 3, 16, 15), dtype=torch.uint8)
        samples["bn, relu"] = ("bn_relu", (x, *vectors(8), 1e-5))
        samples["bn, relu, conv"] = (
            "bn_relu_conv",
            (x, *vectors(8), 1e-5, leaf(12, 8, 1, 1), None, *vectors(12), 1e-5, True, 1, 0, 1),
        )
        samples["stem of bytes"] = ("stem", (pixels, leaf(4, 3, 7, 7), *[None] * 7, 1e-5, True))
        conv2, conv3, down, after = unit(8, 8, 3), unit(16, 8), unit(16, 8), unit(4, 16)
        t = torch.randn(2, 8, 6, 5)
        samples["basic tail"] = ("block_tail", (t, x, conv2, [], [], [], [1e-5], [1, 1, 1]))
        samples["bottleneck tail"] = (
            "block_tail", (t, x, conv2, conv3, down, after, [1e-5] * 4, [2, 1, 1, 1, 0, 1, 2, 0, 1, 1, 0, 1]),
        )  # fmt: skip
        samples["bottleneck"] = (
            "bottleneck", (x, unit(8, 8), conv2, conv3, down, [], [1e-5] * 4, [1, 0, 1, 2, 1, 1, 1, 0, 1, 2, 0, 1])
        )  # fmt: skip
    return samples


def test_every_operator_has_a_sample() -> None:
    trained = {name for name in IMPLEMENTATIONS if name.startswith("train_")}  # sampled in test_training_blocks.py
    assert {name for name, _ in samples(False).values()} == set(IMPLEMENTATIONS) - trained


@pytest.mark.parametrize("name", samples(False))
def test_opcheck(name: str) -> None:
    """Schema (no hidden mutation or aliasing), shapes and strides of the fake, and tracing with dynamic shapes."""
    op, arguments = samples(False)[name]
    torch.library.opcheck(getattr(ops, op).default, arguments)


@pytest.mark.parametrize("name", samples(False))
def test_shapes_and_strides_are_known_before_running(name: str) -> None:
    """opcheck compares shapes only; Inductor and meta tensors rely on the strides too."""
    op, arguments = samples(False)[name]
    with FakeTensorMode() as mode:
        fakes = tree_map_only(Tensor, mode.from_tensor, arguments)
        expected = getattr(ops, op)(*fakes)
    out = getattr(ops, op)(*arguments)
    pairs = zip(tree_leaves(out), tree_leaves(expected), strict=True)
    for real, fake in pairs:
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("name", samples(True))
def test_opcheck_with_gradients(name: str) -> None:
    op, arguments = samples(True)[name]
    torch.library.opcheck(getattr(ops, op).default, arguments)


@pytest.mark.parametrize("name", samples(True))
def test_operators_called_directly_differentiate(name: str) -> None:
    """As an exported program does, which knows no autograd.Function."""
    op, arguments = samples(True)[name]
    arguments = tuple(
        a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments
    )
    torch.autograd.gradcheck(getattr(ops, op), arguments, fast_mode=True, **GRADCHECK)


@pytest.mark.parametrize("name", samples(False))
def test_results_are_channels_last_as_promised(name: str) -> None:
    op, arguments = samples(False)[name]
    out = getattr(ops, op)(*arguments)
    for y in (out,) if isinstance(out, Tensor) else out:
        if y.dim() == 4 and op != "fold_bn":
            assert y.is_contiguous(memory_format=torch.channels_last)


def test_units_must_be_complete() -> None:
    with pytest.raises(ValueError, match=r"1 units need 1 eps and 3 geometry values, got 2 and 3"):
        split_units([unit(4, 4), []], [1e-5, 1e-5], [1, 0, 1])
    with pytest.raises(
        ValueError, match=r"a unit is \[weight, bias, gamma, beta, mean, var\] with a weight, got 2 items"
    ):
        split_units([[torch.ones(1), None]], [1e-5], [1, 0, 1])
    parts = split_units([[], unit(4, 4), []], [1e-3], [2, 0, 1])
    assert parts[0] is None and parts[2] is None and parts[1][2:] == (1e-3, (2, 0, 1))


def test_layout_helpers_copy_only_when_they_must() -> None:
    x = torch.randn(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert channels_last(x) is x
    assert nhwc(x).data_ptr() == x.data_ptr() and nhwc(x).is_contiguous()
    identical(nhwc(x.contiguous()), x.permute(0, 2, 3, 1))
    shifted = torch.empty(x.numel() + 1)[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2).copy_(x)
    assert shifted.data_ptr() % 16 and nhwc(shifted).data_ptr() % 16 == 0
    identical(nhwc(shifted), nhwc(x))


# torch.compile


class Compiles:
    """A torch.compile backend that counts graphs and holds them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(graph)
        return aot_eager(graph, inputs)


class Tiny(nn.Module):
    """Stem, a bottleneck, a tail that computes the next block's reduction, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(8, 3, 7, 7) / 12)
        shapes = {"conv1": (4, 8, 1), "conv2": (4, 4, 3), "conv3": (8, 4, 1), "next": (6, 8, 1)}
        for name, (k, c, r) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(k, c, r, r) / (c * r * r) ** 0.5))
            self.register_parameter(f"{name}_gamma", nn.Parameter(torch.rand(k) + 0.5))
            self.register_parameter(f"{name}_beta", nn.Parameter(torch.randn(k) / 4))
            self.register_buffer(f"{name}_mean", torch.randn(k) / 4)
            self.register_buffer(f"{name}_var", torch.rand(k) + 0.5)
        self.head = nn.Parameter(torch.randn(5, 6))

    def unit(self, name: str) -> ConvBN:
        weight = getattr(self, name)
        rest = (getattr(self, f"{name}_{v}") for v in ("gamma", "beta", "mean", "var"))
        return ConvBN(weight, None, *rest, padding=weight.shape[2] // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.stem(x, self.stem)
        x = functional.bottleneck(x, self.unit("conv1"), self.unit("conv2"), self.unit("conv3"))
        t = functional.conv_bn_act(x, *self.unit("conv1").tensors)
        _, t = functional.block_tail(t, x, self.unit("conv2"), self.unit("conv3"), next=self.unit("next"))
        return functional.head(functional.add_relu(t, t), self.head)


@pytest.fixture
def fresh():
    """No compiled graphs from other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_and_gradients(model: nn.Module, function: Callable, x: Tensor) -> list[Tensor]:
    out = function(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


DUPLICATES = {
    "addition": lambda x, w: functional.add_relu(x, x),
    "residual": lambda x, w: functional.conv_bn_act(x, w, residual=x),
    "tail": lambda x, w: functional.block_tail(x, x, ConvBN(w))[0],
    "shared weight": lambda x, w: functional.bottleneck(x, ConvBN(w), ConvBN(w), ConvBN(w)),
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_a_tensor_passed_twice_gets_both_gradients(name: str, fresh) -> None:
    """Dynamo of torch 2.11 keeps one of them for an autograd.Function (pytorch/pytorch#181146)."""
    function = DUPLICATES[name]
    x, w = torch.randn(2, 4, 3, 3).double().requires_grad_(), torch.randn(4, 4, 1, 1).double().requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    ours, theirs = (
        torch.autograd.grad(f(x, w).square().sum(), (x, w), allow_unused=True) for f in (compiled, function)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same_math(a, b)


def test_batch_and_image_sizes_share_graphs(fresh) -> None:
    model, backend = Tiny().requires_grad_(False), Compiles()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for n, size in ((4, 32), (5, 32), (7, 32), (2, 32), (33, 32), (3, 48), (3, 40), (9, 64), (6, 34)):
        x = torch.randn(n, 3, size, size)
        identical(compiled(x), model(x))
    assert len(backend.graphs) <= 3, "one for the first size, one for any batch, one for any image"


def test_many_batch_sizes_compile_twice_in_training(fresh) -> None:
    """Up to 15 images: PyTorch's own convolution on the CPU takes another path from 16 on, and guards on it."""
    model, backend = Tiny(), Compiles()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for n in (2, 3, 4, 5, 8, 13):
        x = torch.randn(n, 3, 32, 32)
        for a, b in zip(loss_and_gradients(model, compiled, x), loss_and_gradients(model, model, x), strict=True):
            identical(a, b)
    assert len(backend.graphs) <= 2


def test_compiled_ops_obey_the_backend_at_run_time(fresh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph does not hold the choice: it is made inside the op."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = torch.randn(4, 8, 1, 1)
    compiled = torch.compile(lambda x: functional.conv_bn_act(x, weight), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 4, 4)
    compiled(x)
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot run 1x1/1 2x4x4x8->4"):
        compiled(x)


def test_compiled_autocast(fresh) -> None:
    model, x = Tiny(), torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        a, b = compiled(x), model(x)
    assert a.dtype == torch.bfloat16
    identical(a, b)


# torch.export

NAMES = ["stem", "bottleneck", "conv_bn_act", "block_tail", "add_relu", "head"]


def operators(graph: torch.fx.Graph) -> list[str]:
    return [n.target.name().split("::")[1] for n in graph.nodes if str(n.target).startswith("resnet_triton.")]


@pytest.mark.parametrize("grad", [False, True])
def test_export_with_a_dynamic_batch_keeps_the_operators(grad: bool) -> None:
    model = Tiny().requires_grad_(grad)
    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(model, (torch.randn(4, 3, 32, 32),), dynamic_shapes={"x": {0: batch}})
    assert operators(program.graph) == NAMES
    for n in (1, 2, 9):
        x = torch.randn(n, 3, 32, 32)
        identical(program.module()(x).detach(), model(x).detach())


def test_export_with_dynamic_image_sizes() -> None:
    model = Tiny().requires_grad_(False)
    dims = {
        0: torch.export.Dim("n", max=64),
        2: torch.export.Dim("h", min=16, max=512),
        3: torch.export.Dim("w", min=16, max=512),
    }
    program = torch.export.export(model, (torch.randn(4, 3, 32, 40),), dynamic_shapes={"x": dims})
    for size in ((1, 3, 64, 64), (3, 3, 33, 50)):
        x = torch.randn(size)
        identical(program.module()(x), model(x))


def test_an_exported_program_survives_saving() -> None:
    model, x = Tiny().requires_grad_(False), torch.randn(2, 3, 32, 32)
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    assert operators(loaded.graph) == NAMES
    identical(loaded.module()(x), model(x))


# Recorded plans


def test_recording_runs_nothing_and_reports_every_step() -> None:
    conv2, conv3 = unit(64, 64, 3), unit(256, 64)
    t, shortcut = torch.empty(32, 64, 56, 56, device="meta"), torch.empty(32, 256, 56, 56, device="meta")
    conv2, conv3 = ([None if v is None else v.to("meta") for v in u] for u in (conv2, conv3))
    with Recorder(target_of("NVIDIA H200")) as recorder, use_backend("auto", chains=False):
        # the implementations: the dispatcher would send meta tensors to the shape functions
        (y,) = IMPLEMENTATIONS["block_tail"](
            t.half(),
            shortcut.half(),
            *([None if v is None else v.half() for v in u] for u in (conv2, conv3)),
            [],
            [],
            [1e-5] * 2,
            [1, 1, 1, 1, 0, 1],
        )
    assert Recorder.active is None
    assert y.is_meta and y.shape == (32, 256, 56, 56)
    first, second = recorder.steps
    assert (first.op, second.op) == ("conv", "conv")
    assert first.shape == ConvShape(32, 56, 56, 64, 64, 3, 3, 1, 1) and second.shape == ConvShape(32, 56, 56, 64, 256)
    assert first.epilogue == Epilogue(bn=True, relu=True) and second.epilogue == Epilogue(
        bn=True, residual=True, relu=True
    )
    for step in recorder.steps:
        assert step.weight is not None and step.choice.reason
        expected = step.shape.bytes_moved(2, step.epilogue.residual)
        assert step.bytes == expected if step.choice.fused else step.bytes > expected


def test_an_exception_ends_the_recording() -> None:
    with pytest.raises(ValueError, match="add_relu takes two"), Recorder(target_of("NVIDIA H200")):
        ops.add_relu(torch.ones(2), torch.ones(3))
    assert Recorder.active is None
    identical(ops.add_relu(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))


@pytest.mark.parametrize("bn", [False, True])
def test_recording_and_running_choose_alike(bn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 1, 1)
    statistics = (torch.zeros(4), torch.ones(4)) if bn else (None, None)
    arguments = (x, weight, None, None, None, *statistics, None, 1e-5, True, 1, 0, 1)
    with Recorder(target_of("cpu")) as recorder:
        ops.conv_bn_act(*arguments)
    (step,) = recorder.steps
    called = []
    plain = reference.conv_bn_act
    monkeypatch.setattr(reference, "conv_bn_act", lambda *a, **k: called.append("aten") or plain(*a, **k))
    ops.conv_bn_act(*arguments)
    assert called == (["aten"] if step.choice.realisation == "aten" else [])

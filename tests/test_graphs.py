"""``graph``: errors, and what a replay sees. Without a GPU a stand-in for CUDA's graphs records operators instead of
kernel launches: like them it replays the same work on the same tensors, and runs no Python of the model."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_triton
from resnet_triton import convert, fold, graphs
from tests.comparers import identical, no_worse_than, same_math
from tests.networks import basics, bottlenecks, images


class FakeGraph:
    """Runs the recorded operators again and writes over their recorded results."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self.steps:
            for old, new in zip(pytree.tree_leaves(recorded), pytree.tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Capture(TorchDispatchMode):
    """``torch.cuda.graph``: refuses what makes the host wait."""

    def __init__(self, graph: FakeGraph, stream: object, capture_error_mode: str) -> None:
        super().__init__()
        assert capture_error_mode == "thread_local"
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        # as a kernel's arguments, the memory of the tensors: what they are pointed to later does not count
        args, kwargs = pytree.tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs or {}))
        self.graph.steps.append((func, args, kwargs, out))
        return out


class FakeStream:
    def wait_stream(self, other: FakeStream) -> None:
        assert isinstance(other, FakeStream)


@pytest.fixture
def fake_cuda(monkeypatch) -> Iterator[None]:
    """CPU tensors stand for CUDA tensors, operators for kernel launches."""
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    for name, value in (
        ("is_available", lambda: True),
        ("CUDAGraph", FakeGraph),
        ("graph", Capture),
        ("Stream", FakeStream),
        ("current_stream", FakeStream),
        ("stream", contextlib.nullcontext),
        ("device", contextlib.nullcontext),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    yield


def eager(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# What is refused


def test_graph_says_that_there_is_no_cuda_device(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"graph needs a CUDA device; there is none here.*resnet-triton info"):
        resnet_triton.graph(convert(basics()), images())


BAD = {
    "function": (lambda: (torch.relu, images()), TypeError, r"takes an nn.Module, got builtin_function"),
    "example": (lambda: (basics(), [images()]), TypeError, r"example must be a tensor.*got list"),
    "training": (lambda: (basics().train(), images()), ValueError, r"model is in training mode.*eval\(\)"),
    "child_training": (lambda: (_partly_training(), images()), ValueError, r"layer4.0.bn2 is in training mode"),
    "device": (lambda: (basics(), images().to("meta")), ValueError, r"example is on meta; graph needs a CUDA device"),
    "grad": (lambda: (basics(), images().requires_grad_()), ValueError, r"example requires grad.*example.detach\(\)"),
    "weights": (lambda: (_partly_meta(), images()), ValueError, r"fc.weight is on meta, example on cpu; move both"),
}


def _partly_training() -> nn.Module:
    model = basics()
    model.layer4[0].bn2.train()
    return model


def _partly_meta() -> nn.Module:
    model = basics()
    model.fc.to("meta")
    return model


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_captured_is_refused(case: str, fake_cuda) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=message):
        resnet_triton.graph(*make())


class Wraps(nn.Module):
    """Calls ``wrap`` with the model's output."""

    def __init__(self, wrap) -> None:
        super().__init__()
        self.body, self.wrap = convert(basics()), wrap

    def forward(self, x: Tensor):
        return self.wrap(self.body(x))


def test_a_forward_that_waits_for_the_gpu_is_refused(fake_cuda) -> None:
    with pytest.raises(RuntimeError, match=r"cannot capture the forward of Wraps: .*not permitted.*\.item\(\)"):
        resnet_triton.graph(Wraps(lambda y: y * y.sum().item()).eval(), images())


def test_an_output_that_cannot_be_replayed_is_refused(fake_cuda) -> None:
    with pytest.raises(TypeError, match=r"returns a object; a graph gives back tensors"):
        resnet_triton.graph(Wraps(lambda y: (y, object())).eval(), images())


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (images(3), ValueError, r"x has shape \(3, 3, 32, 32\), the graph was captured for \(2, 3, 32, 32\).*another"),
        (images().float(), ValueError, r"x has dtype torch.float32, the graph was captured for torch.float64"),
        (images().to("meta"), ValueError, r"x has device meta, the graph was captured for cpu"),
        (images().requires_grad_(), ValueError, r"x requires grad.*x.detach\(\)"),
        ("cat.jpg", TypeError, r"takes a tensor, got str"),
    ],
)
def test_other_inputs_are_refused(x, error, message, fake_cuda) -> None:
    replay = resnet_triton.graph(convert(basics()), images())
    with pytest.raises(error, match=message):
        replay(x)
    assert replay._graph.replays == 0


# What a replay sees


@pytest.mark.parametrize("make", [basics, bottlenecks])
def test_replays_compute_on_new_inputs(make, fake_cuda) -> None:
    model = convert(make())
    replay = resnet_triton.graph(model, images())
    seen = model.register_forward_pre_hook(lambda *_: pytest.fail("a replay runs no Python of the model"))
    for seed in range(2):
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        x = x.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            out = replay(x)
        plain = copy.deepcopy(model)
        plain._forward_pre_hooks.clear()
        identical(out, eager(plain, x))
        assert not out.requires_grad
    seen.remove()


def test_the_output_is_a_copy_unless_asked_otherwise(fake_cuda) -> None:
    model, x = convert(basics()), images()
    replay = resnet_triton.graph(model, x)
    first = replay(x)
    kept = first.clone()
    replay(2 * x)
    identical(first, kept)
    shared = resnet_triton.graph(model, x, clone=False)
    first = shared(x)
    second = shared(2 * x)
    assert first is second is shared.output
    identical(second, eager(model, 2 * x))
    shared.input.copy_(x)
    identical(shared.replay(), kept)


def test_outputs_may_be_dicts_and_tuples(fake_cuda) -> None:
    replay = resnet_triton.graph(Wraps(lambda y: {"logits": y, "twice": (2 * y, None, "name")}).eval(), images())
    x = images() + 1
    out = replay(x)
    expected = eager(replay.model, x)
    assert list(out) == ["logits", "twice"] and out["twice"][1:] == (None, "name")
    identical(out["logits"], expected["logits"])
    identical(out["twice"][0], expected["twice"][0])
    assert out["logits"] is not replay.output["logits"]


def test_weights_that_change_in_place_are_seen(fake_cuda) -> None:
    model, x = convert(basics()), images()
    replay = resnet_triton.graph(model, x)
    before = replay(x)
    other = {name: value * 0.9 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    model.load_state_dict(other)
    identical(replay(x), eager(model, x))
    assert not torch.equal(replay(x), before)


REPLACED = {
    "assign": (lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True), "conv1.weight"),
    "cast": (lambda m: m.float(), "conv1.weight"),
    "data": (lambda m: setattr(m.fc.weight, "data", m.fc.weight.data.clone()), "fc.weight"),
    "child": (lambda m: setattr(m, "fc", copy.deepcopy(m.fc)), "fc"),
    "statistics": (lambda m: setattr(m.bn1, "running_mean", torch.zeros(64)), "bn1.running_mean"),
    "folded": (lambda m: fold(m, inplace=True), ""),
}


@pytest.mark.parametrize("case", REPLACED)
def test_replaced_weights_are_an_error(case: str, fake_cuda) -> None:
    replace, name = REPLACED[case]
    model, x = convert(basics()), images()
    replay = resnet_triton.graph(model, x)
    replace(model)
    with pytest.raises(
        RuntimeError, match=rf"{name}.* was replaced since the capture.*resnet_triton.graph\(model, x\)"
    ):
        replay(x)


def test_training_after_the_capture_is_an_error(fake_cuda) -> None:
    model, x = convert(basics()), images()
    replay = resnet_triton.graph(model, x)
    model.train()
    with pytest.raises(RuntimeError, match=r"training mode since the capture; call model.eval\(\)"):
        replay(x)


# torch.compile's own graphs


def test_reduce_overhead_runs_on_the_cpu() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile for the CPU needs a C++ compiler")
    block, x = basics().layer1[0], torch.randn(2, 64, 6, 6, dtype=torch.float64)
    compiled = torch.compile(convert(block), mode="reduce-overhead", fullgraph=True)
    same_math(eager(compiled, x), eager(block, x))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_real_graph_equals_eager(dtype: torch.dtype) -> None:
    model = convert(bottlenecks()).to("cuda", dtype)
    x = images(2, 64, 64, dtype).cuda().to(memory_format=torch.channels_last)
    replay = resnet_triton.graph(model, torch.zeros_like(x))
    first = replay(x)
    identical(first, eager(model, x))
    identical(replay(2 * x), eager(model, 2 * x))
    identical(first, eager(model, x))
    with torch.no_grad():
        model.fc.bias.add_(1)
    identical(replay(x), eager(model, x))
    model.fc.bias.data = model.fc.bias.data.clone()
    with pytest.raises(RuntimeError, match=r"fc\.bias was replaced"):
        replay(x)


@pytest.mark.gpu
def test_a_real_graph_under_autocast() -> None:
    model = convert(bottlenecks(dtype=torch.float32)).cuda()
    x = images(2, 64, 64, torch.float32).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        replay = resnet_triton.graph(model, x)
        expected = eager(model, x)
    torch.cuda.empty_cache()
    identical(replay(x), expected)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    with torch.autocast("cuda", torch.bfloat16):
        identical(replay(x), eager(model, x))


@pytest.mark.gpu
def test_a_real_capture_that_waits_is_refused_and_harms_nothing() -> None:
    model, x = convert(basics()).cuda(), images().cuda()
    with pytest.raises(RuntimeError, match="cannot capture the forward of Wraps"):
        resnet_triton.graph(Wraps(lambda y: y * y.sum().item()).eval().cuda(), x)
    identical(resnet_triton.graph(model, x)(x), eager(model, x))


@pytest.mark.gpu
def test_reduce_overhead_on_a_converted_model() -> None:
    model = convert(bottlenecks(dtype=torch.float32)).cuda()
    x = images(2, 64, 64, torch.float32).cuda()
    exact = eager(copy.deepcopy(model).double(), x.double())
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(3):  # recorded at the second call
        torch.compiler.cudagraph_mark_step_begin()
        out = eager(compiled, x).clone()
    no_worse_than(out, eager(model, x), exact)

"""Residual blocks with batch statistics against plain autograd in fp64: shortcuts, frozen parts, BN options, errors.

On the CPU the steps run as their reference, so these tests see what is asked of which step and what becomes of it.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torchvision.models import resnet as tv
from torchvision.ops.misc import FrozenBatchNorm2d

from resnet_triton import convert, use_backend
from resnet_triton.training import guard, steps
from tests.comparers import GRADIENT, identical, no_worse_than, same_math
from tests.networks import Calls, basics, bottlenecks, images

ops = torch.ops.resnet_triton
MEMORY = ("gram", "stored")


def lively(m: nn.Module) -> nn.Module:
    """BN parameters that matter, in training mode and fp64."""
    m = m.double().train()
    for bn in m.modules():
        if isinstance(bn, (nn.BatchNorm2d, FrozenBatchNorm2d)) and bn.weight is not None:
            with torch.no_grad():
                bn.weight.uniform_(0.5, 1.5).mul_(torch.rand(bn.weight.shape) > 0.2)
                bn.bias.uniform_(-0.3, 0.3)
            if bn.running_mean is not None:
                bn.running_mean.uniform_(-0.3, 0.3)
                bn.running_var.uniform_(0.5, 1.5)
    return m


def projected(c: int, k: int, stride: int, pool: bool = False, bias: bool = False) -> nn.Sequential:
    """A projection shortcut, as timm's resnet50d has it with ``pool``."""
    before = [nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)] if pool else []
    return nn.Sequential(*before, nn.Conv2d(c, k, 1, 1 if pool else stride, bias=bias), nn.BatchNorm2d(k))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: tv.BasicBlock(8, 8),
    "basic, projection": lambda: tv.BasicBlock(8, 12, 2, projected(8, 12, 2)),
    "bottleneck": lambda: tv.Bottleneck(16, 4),
    "bottleneck, projection": lambda: tv.Bottleneck(8, 4, 1, projected(8, 16, 1)),
    "bottleneck, projection of stride 2": lambda: tv.Bottleneck(8, 4, 2, projected(8, 16, 2)),
    "bottleneck, average pool": lambda: tv.Bottleneck(8, 4, 2, projected(8, 16, 2, pool=True)),
    "bottleneck, dilated": lambda: tv.Bottleneck(16, 4, dilation=2),
}


def image(channels: int, n: int = 3, h: int = 6, w: int = 5) -> Tensor:
    return torch.randn(n, channels, h, w, dtype=torch.float64)


def channels_of(block: Any) -> int:
    return block.conv1.in_channels


def run(m: nn.Module, x: Tensor, upstream: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
    """A forward and a backward; the output and the gradient of ``x``."""
    x = x.detach().requires_grad_(x.requires_grad)
    y = m(x)
    torch.manual_seed(3)
    y.backward(torch.randn(y.shape).to(y.dtype) if upstream is None else upstream(y))
    return y.detach(), x.grad


def agree(
    plain: nn.Module,
    x: Tensor,
    memory: str = "gram",
    upstream: Callable[[Tensor], Tensor] | None = None,
    times: int = 1,
    runs: str = "train_block",
) -> nn.Module:
    """Asserts equal outputs, gradients and buffers of a module and its conversion, which ``runs`` an operator."""
    plain.zero_grad()
    ours = convert(plain)
    for _ in range(times):
        with use_backend("auto", memory=memory), Calls() as counter:
            y, dx = run(ours, x, upstream)
        expected, expected_dx = run(plain, x, upstream)
        same_math(y, expected)
        assert (dx is None) == (expected_dx is None)
        if dx is not None and expected_dx is not None:
            same_math(dx, expected_dx)
    assert counter.counts[runs] > 0, dict(counter.counts)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert p.grad.stride() == p.stride() and p.grad.dtype == p.dtype, name
            same_math(p.grad, q.grad)
    same_buffers(ours, plain)
    return ours


def same_buffers(ours: nn.Module, plain: nn.Module) -> None:
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert a.dtype == b.dtype, name
        same_math(a.double(), b.double())


# Blocks, units, stems


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_autograds(name: str, memory: str) -> None:
    block: Any = lively(BLOCKS[name]())
    agree(block, image(channels_of(block)).requires_grad_(), memory, times=2)


def test_only_expanding_ends_are_in_the_gram_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """And its raw output exists neither in the forward nor in the backward."""
    seen = spy(monkeypatch)
    for name, grams in (("basic", 0), ("bottleneck", 1), ("bottleneck, projection of stride 2", 2)):
        for memory in MEMORY:
            block: Any = lively(BLOCKS[name]())
            seen.clear()
            agree(block, image(channels_of(block)).requires_grad_(), memory)
            wanted = grams if memory == "gram" else 0
            convolutions = (2 if name == "basic" else 3) + ("projection" in name)
            assert (seen["gram"], seen["gram_dgrad"], seen["matrix_wgrad"]) == (wanted,) * 3, (name, memory)
            assert (seen["conv"], seen["dgrad"], seen["wgrad"]) == (convolutions - wanted,) * 3, (name, memory)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("make", (basics, bottlenecks))
def test_a_network_is_autograds(make, memory: str) -> None:
    """Stem, blocks one behind another whose masks are shared, pool and classifier; gradients of the images too."""
    guard._flags.clear()
    agree(lively(make((2, 1, 1, 1))), images(6, 33, 40).requires_grad_(), memory)


@pytest.mark.parametrize("change", ("activation", "grouped", "hook on the stage"))
def test_single_units_are_autograds(change: str) -> None:
    block: Any = lively(BLOCKS["bottleneck, projection of stride 2"]())
    if change == "activation":
        block.relu = nn.SiLU()
    elif change == "grouped":
        block.conv2 = nn.Conv2d(4, 4, 3, 2, 1, groups=2, bias=False).double()
    m = nn.Sequential(block, lively(BLOCKS["bottleneck"]()))
    if change == "hook on the stage":
        m[1].register_forward_hook(lambda *args: None)
    agree(m, image(8).requires_grad_(), times=2)


@pytest.mark.parametrize("images_need", (False, True))
def test_the_stem_is_autograds(images_need: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(basics((1, 1, 1, 1)))
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        stage.eval()
    seen = spy(monkeypatch)
    agree(model, images(3, 37, 30).requires_grad_(images_need), runs="train_stem")
    assert (seen["stem_wgrad"], seen["dgrad"]) == (1, images_need)


def test_ties_of_the_pool_and_channels_that_are_all_zero() -> None:
    model = lively(basics((1, 1, 1, 1)))
    with torch.no_grad():
        model.bn1.bias[:32] = -50  # nothing passes the ReLU
        model.conv1.weight[40:44] = 0  # a variance of zero
    agree(model, (images(4, 32, 32) * 2).round(), runs="train_stem")


@pytest.mark.parametrize("memory", MEMORY)
def test_convolutions_with_a_bias(memory: str) -> None:
    """Before batch statistics it moves nothing but the running mean; before constant ones it counts."""
    for evaluated in ((), ("bn1",), ("bn2", "bn3"), ("downsample.1",)):
        block: Any = tv.Bottleneck(8, 4, 1, projected(8, 16, 1, bias=True))
        for name in ("conv1", "conv2", "conv3"):
            conv = getattr(block, name)
            conv.bias = nn.Parameter(torch.randn(conv.out_channels))
        lively(block)
        for name in evaluated:
            block.get_submodule(name).eval()
        agree(block, image(8).requires_grad_(), memory, times=2)


def test_one_weight_in_two_places() -> None:
    block: Any = lively(tv.BasicBlock(8, 8))
    block.conv2.weight = block.conv1.weight
    block.bn2.weight = block.bn1.weight
    agree(block, image(8).requires_grad_())


# What is frozen


def spy(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the steps with products that run."""
    seen: Counter[str] = Counter()

    def counted(name: str, f: Callable) -> Callable:
        def step(*args, **kwargs):
            seen[name] += 1
            return f(*args, **kwargs)

        return step

    for name in ("conv", "gram", "wgrad", "matrix_wgrad", "dgrad", "gram_dgrad", "stem_wgrad"):
        monkeypatch.setattr(steps, name, counted(name, getattr(steps, name)))
    return seen


#: Parameters that are trained, whether the input needs a gradient, and products over pixels in the backward as
#: (wgrad, matrix_wgrad, dgrad, gram_dgrad): in the Gram form, with stored outputs. The block has a projection.
#: The Gram form's matrix product serves dW, dgamma and the gradient of the input.
FROZEN: dict[str, tuple[tuple[str, ...], bool, tuple[int, ...], tuple[int, ...]]] = {
    "images": (("conv", "bn", "downsample"), False, (2, 2, 1, 1), (4, 0, 2, 0)),
    "weights": (("bn",), True, (0, 2, 2, 2), (0, 0, 4, 0)),
    "everything": ((), True, (0, 2, 2, 2), (0, 0, 4, 0)),
    "all but the last gamma": (("bn3.weight",), False, (0, 1, 0, 0), (0, 0, 0, 0)),
    "all but the last weight": (("conv3",), False, (0, 1, 0, 0), (1, 0, 0, 0)),
    "all but the first beta": (("bn1.bias",), False, (0, 1, 1, 1), (0, 0, 2, 0)),
    "all but the second weight": (("conv2",), False, (1, 1, 0, 1), (1, 0, 1, 0)),
    "all but the projection": (("downsample",), False, (0, 1, 0, 0), (1, 0, 0, 0)),
    "all but the projection's beta": (("downsample.1.bias",), False, (0, 1, 0, 0), (0, 0, 0, 0)),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("frozen", FROZEN)
def test_no_product_runs_for_what_is_frozen(frozen: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, images_need, *products = FROZEN[frozen]
    block: Any = lively(BLOCKS["bottleneck, projection of stride 2"]())
    for name, p in block.named_parameters():
        p.requires_grad_(name.startswith(trained) if trained else False)
    seen = spy(monkeypatch)
    agree(block, image(8).requires_grad_(images_need), memory)
    found = tuple(seen[name] for name in ("wgrad", "matrix_wgrad", "dgrad", "gram_dgrad"))
    assert found == products[MEMORY.index(memory)]


def test_a_frozen_beginning_of_a_network_runs_no_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively(bottlenecks((1, 1, 1, 1)))
    for part in (model.conv1, model.bn1, model.layer1, model.layer2, model.layer3):
        part.requires_grad_(False)
    seen = spy(monkeypatch)
    agree(model, images(4, 64, 64), "stored")
    assert seen["stem_wgrad"] == 0 and seen["wgrad"] == 4 and seen["dgrad"] == 2


@pytest.mark.parametrize("memory", MEMORY)
def test_every_choice_of_bn_in_eval_mode(memory: str) -> None:
    names = ("bn1", "bn2", "bn3", "downsample.1")
    for chosen in range(1, 15):
        block: Any = lively(BLOCKS["bottleneck, projection of stride 2"]())
        for i, name in enumerate(names):
            if chosen >> i & 1:
                block.get_submodule(name).eval()
        agree(block, image(8).requires_grad_(), memory)


def test_frozen_batch_norm_inside_a_training_block() -> None:
    block: Any = tv.Bottleneck(8, 4, 1, projected(8, 16, 1))
    block.bn2, block.downsample[1] = FrozenBatchNorm2d(4, eps=0.01), FrozenBatchNorm2d(16)
    agree(lively(block), image(8).requires_grad_())
    block.bn1 = nn.Identity()  # as after folding
    agree(block.double(), image(8).requires_grad_())


# Options of BN, running statistics


BN: dict[str, Callable[[int], nn.Module]] = {
    "momentum": lambda k: nn.BatchNorm2d(k, eps=0.02, momentum=0.3),
    "average": lambda k: nn.BatchNorm2d(k, momentum=None),
    "no statistics": lambda k: nn.BatchNorm2d(k, track_running_stats=False),
    "no statistics, no affine": lambda k: nn.BatchNorm2d(k, affine=False, track_running_stats=False),
    "no affine": lambda k: nn.BatchNorm2d(k, affine=False),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("option", BN)
def test_options_of_bn(option: str, memory: str) -> None:
    block: Any = lively(tv.Bottleneck(16, 4, norm_layer=BN[option]))
    ours = agree(block, image(16).requires_grad_(), memory, times=3)
    assert all(bn.num_batches_tracked == 3 for bn in (ours.bn1, ours.bn3) if bn.track_running_stats)
    ours.eval(), block.eval()
    x = image(16)
    with torch.no_grad(), use_backend("auto", memory=memory):
        same_math(ours(x), block(x))


def test_different_momenta_and_a_bn_that_stops_tracking() -> None:
    block: Any = lively(tv.Bottleneck(16, 4))
    block.bn1.momentum, block.bn2.momentum, block.bn3.momentum = 0.5, None, 1.0
    agree(block, image(16), times=3)
    block.bn1.track_running_stats = False  # after construction: its running statistics stay, and are used in eval mode
    block.bn3.num_batches_tracked = None
    ours = agree(block, image(16), times=2)
    block.eval(), ours.eval()
    x = image(16)
    same_math(ours(x).detach(), block(x).detach())


@pytest.mark.parametrize("memory", MEMORY)
def test_a_forward_without_gradients_updates_running_statistics(memory: str) -> None:
    block: Any = lively(tv.Bottleneck(16, 4))
    ours, x = convert(block), image(16)
    with torch.no_grad(), use_backend("auto", memory=memory):
        y = ours(x)
        assert not y.requires_grad
        same_math(y, block(x))
    with torch.inference_mode(), use_backend("auto", memory=memory):
        same_math(ours(x).clone(), block(x).clone())
    assert ours.bn1.num_batches_tracked == 2
    same_buffers(ours, block)


# Gradients of any strides, weights of any strides and dtype


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda y: torch.tensor(0.7, dtype=y.dtype).expand(y.shape),
    "expanded rows": lambda y: torch.randn(y.shape[0], y.shape[1], 1, 1, dtype=y.dtype).expand(y.shape),
    "sliced": lambda y: torch.randn(*y.shape[:2], 2 * y.shape[2], 3 * y.shape[3], dtype=y.dtype)[:, :, ::2, 1::3],
    "NCHW": lambda y: torch.randn(y.shape, dtype=y.dtype),
    "channels_last": lambda y: torch.randn(y.shape, dtype=y.dtype).to(memory_format=torch.channels_last),
    "transposed": lambda y: torch.randn(*y.shape[:2], y.shape[3], y.shape[2], dtype=y.dtype).transpose(2, 3),
}


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("strides", GRADIENTS)
def test_gradients_of_any_strides(strides: str, memory: str) -> None:
    for name in ("bottleneck", "bottleneck, average pool"):
        block: Any = lively(BLOCKS[name]())
        x = image(channels_of(block), 3, 5, 6).transpose(2, 3)
        agree(block, x.requires_grad_(), memory, GRADIENTS[strides])


def test_the_gradient_that_came_in_is_not_changed_nor_handed_on() -> None:
    """A unit without ReLU hands its gradient on to a residual: as a tensor of its own."""
    block: Any = convert(lively(BLOCKS["bottleneck"]()))
    block.relu = nn.Identity()
    x = image(16).requires_grad_()
    with use_backend("auto", memory="gram"):
        y = block(x)
    grad = torch.randn_like(y)
    before = grad.clone()
    (dx,) = torch.autograd.grad(y, x, grad)
    dx.zero_()
    identical(grad, before)


@pytest.mark.parametrize("memory", MEMORY)
def test_gradients_have_their_parameters_strides_and_dtype(memory: str) -> None:
    def contiguous(t: Tensor) -> Tensor:
        return t.contiguous()

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    for layout in (contiguous, transposed):
        block: Any = convert(lively(BLOCKS["bottleneck, projection of stride 2"]()))
        plain = copy.deepcopy(block)
        for p in block.parameters():
            if p.dim() == 4:
                p.data = layout(p.data)
        x = image(8)
        with use_backend("auto", memory=memory):
            run(block, x)
        run(plain, x)
        for (name, p), q in zip(block.named_parameters(), plain.parameters(), strict=True):
            assert p.grad.stride() == p.stride() and p.grad.is_contiguous() == p.is_contiguous(), name
            same_math(p.grad, q.grad)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("vectors", (torch.float32, torch.bfloat16))
def test_bf16_errs_no_more_than_eager(vectors: torch.dtype, memory: str) -> None:
    """Parameters and vectors of one dtype, or BN's kept in fp32 as mixed precision does."""
    exact: Any = lively(tv.Bottleneck(64, 16))
    for p in exact.state_dict().values():
        p.copy_(p.bfloat16())
    low = copy.deepcopy(exact).bfloat16()
    if vectors == torch.float32:
        for m in low.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.float()
    x = image(64, 8, 8, 8).bfloat16()
    ours = convert(low)
    with use_backend("auto", memory=memory):
        y, dx = run(ours, x.requires_grad_())
    eager, eager_dx = run(low, x)
    expected, expected_dx = run(exact, x.detach().double().requires_grad_())
    no_worse_than(y, eager, expected)
    no_worse_than(dx, eager_dx, expected_dx, GRADIENT)
    for (name, p), q, r in zip(ours.named_parameters(), low.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == p.dtype and p.grad.stride() == p.stride(), name
        no_worse_than(p.grad, q.grad, r.grad, GRADIENT)
    for a, b in zip(ours.buffers(), low.buffers(), strict=True):
        assert a.dtype == b.dtype


# Errors


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("linear", (False, True))
def test_second_derivatives_raise(linear: bool, memory: str) -> None:
    """Also where the gradient that comes in does not require one: it must not silently be a constant."""
    block: Any = convert(lively(BLOCKS["bottleneck"]()))
    x = image(16).requires_grad_()
    with use_backend("auto", memory=memory):
        y = block(x)
    out = y.sum() if linear else y.square().sum()
    with pytest.raises(NotImplementedError, match=r"cannot be differentiated again.*unconvert"):
        torch.autograd.grad(out, x, create_graph=True)
    model = convert(lively(basics((1, 1, 1, 1))))
    model.layer1.eval(), model.layer2.eval(), model.layer3.eval(), model.layer4.eval()
    with use_backend("auto", memory=memory):
        out = model(images(2)).sum()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"differentiate"):
        torch.autograd.grad(out, model.conv1.weight, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("memory", MEMORY)
def test_one_value_per_channel_raises_as_pytorch(memory: str) -> None:
    """PyTorch finds it at the BN that has one value, when those before have changed already."""
    block: Any = lively(tv.Bottleneck(8, 4, 2, projected(8, 16, 2)))
    ours, x = convert(block), image(8, 1, 2, 2)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        block(x)
    with (
        use_backend("auto", memory=memory),
        pytest.raises(ValueError, match="Expected more than 1 value per channel when training"),
    ):
        ours(x)
    for name, t in ours.state_dict().items():
        identical(t, before[name])
    block.load_state_dict(before)
    block.bn2.eval(), block.bn3.eval(), block.downsample[1].eval()
    agree(block, x, memory)


@pytest.mark.parametrize("memory", MEMORY)
def test_bad_inputs_change_nothing(memory: str) -> None:
    block: Any = convert(lively(tv.Bottleneck(8, 4, 1, projected(8, 16, 1))))
    before = copy.deepcopy(block.state_dict())
    wrong_vector = copy.deepcopy(block)
    wrong_vector.bn3.weight = nn.Parameter(torch.ones(15).double())
    bad_projection = copy.deepcopy(block)
    bad_projection.downsample[0].stride = (2, 2)
    cases: list[tuple[nn.Module, Tensor, str]] = [
        (block, image(7), "7"),
        (block, image(8).float(), "dtype torch.float32"),
        (block, image(8)[0], r"x must be \[N, C, H, W\], got \(8, 6, 5\)"),
        (block, torch.zeros(2, 8, 4, 4, dtype=torch.int64), "dtype torch.int64"),
        (wrong_vector, image(8), r"gamma must be \[K\] = \[16\], got \(15,\)"),
        (bad_projection, image(8), "shortcut has shape"),
    ]
    for m, x, message in cases:
        with use_backend("auto", memory=memory), pytest.raises(ValueError, match=message):
            m(x)
        for name, t in m.state_dict().items():
            if name != "bn3.weight":
                identical(t, before[name])


# The guard of the Gram form


def test_correlated_channels_trip_the_guard_in_the_same_call(caplog: pytest.LogCaptureFixture) -> None:
    """The last convolution takes small differences of inputs that are large and nearly equal."""
    plain: Any = tv.Bottleneck(16, 4).train()
    with torch.no_grad():
        plain.conv2.weight.copy_(plain.conv2.weight[:1].expand_as(plain.conv2.weight))
        plain.conv2.weight.add_(torch.randn_like(plain.conv2.weight) * 1e-3)
        plain.bn2.bias.fill_(300.0)
        plain.conv3.weight.sub_(plain.conv3.weight.mean(1, keepdim=True))
    exact, ours, x = copy.deepcopy(plain).double(), convert(plain), torch.randn(4, 16, 6, 6).requires_grad_()
    with caplog.at_level(logging.WARNING, "resnet_triton"), use_backend("auto", memory="gram"):
        y, dx = run(ours, x)
        gradients = [p.grad.clone() for p in ours.parameters()]
        assert [record.name for record in caplog.records] == ["resnet_triton"] and "correlated" in caplog.text
        run(ours, x)
    assert len(caplog.records) == 1, "said once"
    assert guard.doubts(ours.conv3.weight)
    eager, eager_dx = run(plain, x)
    expected, expected_dx = run(exact, x.detach().double().requires_grad_())
    assert dx is not None and eager_dx is not None and expected_dx is not None
    no_worse_than(y, eager, expected)
    no_worse_than(dx, eager_dx, expected_dx, GRADIENT)
    for a, q, r in zip(gradients, plain.parameters(), exact.parameters(), strict=True):
        no_worse_than(a, q.grad, r.grad, GRADIENT)


def test_well_conditioned_channels_do_not() -> None:
    block: Any = convert(lively(BLOCKS["bottleneck, projection of stride 2"]()).float())
    with use_backend("auto", memory="gram"):
        run(block, image(8).float())
    assert not guard.doubts(block.conv3.weight) and not guard.doubts(block.downsample[0].weight)


# Operators


def unit(k: int, c: int, r: int, constant: bool = False) -> list[Tensor | None]:
    statistics = [torch.randn(k), torch.rand(k) + 0.5] if constant else [None, None]
    return [torch.randn(k, c, r, r) / (c * r * r) ** 0.5, torch.rand(k) + 0.5, torch.randn(k), *statistics]


def samples() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Operator and arguments by name; relu, own_shortcut, gram, masked_grad, mask_input, following: flags."""
    x = torch.randn(3, 8, 6, 5)
    bottleneck = [*unit(4, 8, 1), *unit(4, 4, 3, True), *unit(16, 4, 1), *unit(16, 8, 1)]
    geometry = [1, 0, 1, 2, 1, 1, 1, 0, 1, 2, 0, 1]
    forwards: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for gram in (False, True):
        flags = [True, True, gram, False, True, False]
        arguments = (x, None, bottleneck, [1e-5] * 4, geometry, True, flags, "")
        forwards[f"bottleneck, gram={gram}"] = ("train_block", arguments)
    basic = (x, torch.randn(3, 12, 3, 3), [*unit(12, 8, 3), *unit(12, 12, 3)], [1e-5] * 2, [2, 1, 1, 1, 1, 1])
    forwards["basic, a shortcut of its own"] = ("train_block", (*basic, False, [True, *[False] * 5], ""))
    one = (x.transpose(2, 3), None, unit(6, 8, 1), [1e-5], [1, 0, 1], False)
    forwards["unit"] = ("train_block", (*one, [False] * 6, ""))
    image = torch.randn(2, 3, 17, 14)
    forwards["stem"] = ("train_stem", (image, *unit(4, 3, 7), 1e-5, ""))
    forwards["stem, constant"] = ("train_stem", (image, *unit(4, 3, 7, True), 1e-5, ""))
    found: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for name, (op, arguments) in forwards.items():
        ahead = ([],) if op == "train_block" else ()
        found[name] = (op, (*arguments, *ahead))
        y, *rest = getattr(ops, op)(*found[name][1])
        grad = torch.randn(y.shape)
        if op == "train_stem":
            needs = [name == "stem", True, True, False]
            found[f"{name}, backward"] = (f"{op}_backward", (grad, *arguments[:6], [y, *rest], 1e-5, "", needs))
        else:
            n = len(arguments[3])
            needs = [True, True] + [True] * 3 + [True, False, True] * (n - 1)
            found[f"{name}, backward"] = (
                f"{op}_backward", (grad, *arguments[:3], [y, *rest], *arguments[3:], needs)
            )  # fmt: skip
    chained = [True, True, True, False, False, True]
    with_next = (x, None, [*bottleneck, *unit(6, 16, 1)], [1e-5] * 5, [*geometry, 1, 0, 1], True, chained, "", [])
    found["the next block's first"] = ("train_block", with_next)
    y, *_, raw, stats = ops.train_block(*with_next)
    end = [*unit(6, 16, 1), *unit(16, 6, 1)]
    identity = (y, None, end, [1e-5] * 2, [1, 0, 1] * 2, False, [True, True, *[False] * 4], "", [raw, stats])
    found["the first is known"] = ("train_block", identity)
    return found


NAMES = [f"{name}{way}" for name in (
    "bottleneck, gram=False", "bottleneck, gram=True", "basic, a shortcut of its own", "unit", "stem", "stem, constant"
) for way in ("", ", backward")] + ["the next block's first", "the first is known"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    op, arguments = samples()[name]
    torch.library.opcheck(getattr(ops, op).default, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_strides_are_known_before_running(name: str) -> None:
    op, arguments = samples()[name]
    with FakeTensorMode() as mode:
        expected = getattr(ops, op)(*tree_map_only(Tensor, mode.from_tensor, arguments))
    for real, fake in zip(tree_leaves(getattr(ops, op)(*arguments)), tree_leaves(expected), strict=True):
        assert (real.shape, real.dtype) == (fake.shape, fake.dtype)
        assert real.numel() == 0 or real.stride() == fake.stride()


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.randn(2, 8, 4, 4)
    flags = [True, True, *[False] * 4]
    with pytest.raises(ValueError, match="1 eps need 5 tensors"):
        ops.train_block(x, None, unit(8, 8, 1)[:4], [1e-5], [1, 0, 1], False, flags, "", [])
    with pytest.raises(ValueError, match="the only unit is the projection's"):
        ops.train_block(x, None, unit(8, 8, 1), [1e-5], [1, 0, 1], True, flags, "", [])
    with pytest.raises(ValueError, match="no shortcut to project"):
        off = [True, *[False] * 5]
        ops.train_block(x, None, [*unit(8, 8, 1), *unit(8, 8, 1)], [1e-5] * 2, [1, 0, 1] * 2, True, off, "", [])

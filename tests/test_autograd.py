"""Gradients of every op: finite differences, PyTorch's autograd of the reference, odd strides, frozen parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_triton import functional, reference, use_backend
from resnet_triton.functional import ConvBN
from tests.cases import sliced
from tests.comparers import GRADCHECK, GRADIENT, no_worse_than, same_math

Function = Callable[..., Tensor | tuple[Tensor, ...]]


class Build:
    """How the cases below make their tensors: values rounded to one dtype, held in another; factor of the channels."""

    rounding = torch.float64
    dtype = torch.float64
    width = 1


def values(t: Tensor) -> Tensor:
    return t.to(Build.rounding).to(Build.dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return values(normal(*shape) * scale).requires_grad_()


def positive(k: int) -> Tensor:
    return values(torch.rand(k, dtype=torch.float64) + 0.5)


def statistics(k: int) -> tuple[Tensor, Tensor]:
    return values(normal(k) / 4), positive(k)


def unit(k: int, c: int, r: int = 1, stride: int = 1, *, bias: bool = False, bn: bool = True) -> ConvBN:
    """A convolution with parameters that require gradients."""
    weight = leaf(k, c, r, r, scale=(c * r * r) ** -0.5)
    affine = (positive(k).requires_grad_(), leaf(k), *statistics(k)) if bn else (None,) * 4
    return ConvBN(weight, leaf(k) if bias else None, *affine, 1e-3, stride, r // 2)


def parameters(*units: ConvBN | None) -> list[Tensor]:
    return [t for u in units if u for t in u.tensors if t is not None and t.requires_grad]


def plain(x: Tensor, u: ConvBN, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    return reference.conv_bn_act(x, *u.tensors, residual, u.eps, relu, u.stride, u.padding, u.dilation)


class Case:
    """An op, the same in plain PyTorch, and the tensors to differentiate with respect to."""

    def __init__(self, ours: Function, theirs: Function, leaves: Sequence[Tensor]) -> None:
        self.ours, self.theirs, self.leaves = ours, theirs, tuple(leaves)


def conv_case(bn: bool, bias: bool, residual: bool, relu: bool, stride: int = 1, r: int = 3, dilation: int = 1) -> Case:
    c, k = 3 * Build.width, 4 * Build.width
    x, u = leaf(2, c, 5, 6), unit(k, c, r, stride, bias=bias, bn=bn)
    u = u._replace(dilation=dilation, padding=dilation * (r // 2))
    p, q = plain(x, u).shape[2:]
    addend = leaf(2, k, p, q) if residual else None
    geometry = {"eps": u.eps, "relu": relu, "stride": stride, "padding": u.padding, "dilation": dilation}

    def ours(*_: Tensor) -> Tensor:
        return functional.conv_bn_act(x, *u.tensors, residual=addend, **geometry)

    return Case(ours, lambda *_: plain(x, u, addend, relu), [x, *parameters(u), *([addend] if residual else [])])


def tail_case(kind: str, downsample: bool, following: bool) -> Case:
    a, b, k = (i * Build.width for i in (2, 3, 4))
    c, stride = (b, 2) if downsample else (k, 1)
    down, after = unit(k, c, 1, stride) if downsample else None, unit(b, k, bias=True) if following else None
    shortcut = leaf(2, c, 4, 4)
    if kind == "basic":
        t, conv2, conv3 = leaf(2, b, 4 // stride, 4 // stride), unit(k, b, 3), None
    else:
        t, conv2, conv3 = leaf(2, b, 4, 4), unit(a, b, 3, stride), unit(k, a)

    def ours(*_: Tensor) -> tuple[Tensor, ...]:
        out = functional.block_tail(t, shortcut, conv2, conv3, downsample=down, next=after)
        return out if after else (out[0],)

    def theirs(*_: Tensor) -> tuple[Tensor, ...]:
        s = plain(shortcut, down, None, False) if down else shortcut
        y = plain(plain(t, conv2), conv3, s) if conv3 else plain(t, conv2, s)
        return (y, plain(y, after)) if after else (y,)

    return Case(ours, theirs, [t, shortcut, *parameters(conv2, conv3, down, after)])


def bottleneck_case(downsample: bool) -> Case:
    a, b, k = (i * Build.width for i in (2, 3, 4))
    x, stride = leaf(2, k, 4, 4), 2 if downsample else 1
    units = (unit(a, k), unit(b, a, 3, stride), unit(k, b), unit(k, k, 1, stride) if downsample else None)

    def theirs(*_: Tensor) -> Tensor:
        conv1, conv2, conv3, down = units
        s = plain(x, down, None, False) if down else x
        return plain(plain(plain(x, conv1), conv2), conv3, s)

    return Case(lambda *_: functional.bottleneck(x, *units[:3], downsample=units[3]), theirs, [x, *parameters(*units)])


def stem_case(pool: bool, normalize: bool) -> Case:
    x, u = leaf(1, 3, 9, 8), unit(2 * Build.width, 3, 7, 2, bias=True)
    # multiples of 1/8: mean and std are handed over in fp32
    norm = ((0.5, 0.25, 0.375), (0.25, 0.5, 2.0)) if normalize else None
    mean, std = (torch.tensor(v).to(Build.dtype) for v in norm) if norm else (None, None)

    def theirs(*_: Tensor) -> Tensor:
        return reference.stem(x, *u.tensors, mean, std, u.eps, pool)

    return Case(
        lambda *_: functional.stem(x, *u.tensors, normalize=norm, eps=u.eps, pool=pool), theirs, [x, *parameters(u)]
    )


def head_case(bias: bool) -> Case:
    c, k = 4 * Build.width, 5 * Build.width
    x, weight, b = leaf(3, c, 3, 2), leaf(k, c), leaf(k) if bias else None
    leaves = [x, weight, *([b] if bias else [])]
    return Case(lambda *_: functional.head(x, weight, b), lambda *_: reference.head(x, weight, b), leaves)


def fold_case(bias: bool, affine: bool) -> Case:
    u = unit(4 * Build.width, 3, 3, bias=bias)
    if not affine:
        u = u._replace(gamma=None, beta=None)
    outputs = slice(None) if bias or affine else slice(1)  # the folded bias depends on constants only
    return Case(
        lambda *_: functional.fold_bn(*u.tensors, u.eps)[outputs],
        lambda *_: reference.fold_bn(*u.tensors, u.eps)[outputs],
        parameters(u),
    )


def add_case(size: tuple[int, ...]) -> Case:
    x, y = leaf(*size), leaf(*size)
    return Case(lambda *_: functional.add_relu(x, y), lambda *_: reference.add_relu(x, y), [x, y])


CASES: dict[str, Callable[[], Case]] = {
    "conv": lambda: conv_case(False, False, False, False),
    "conv+relu": lambda: conv_case(False, False, False, True),
    "conv+bias": lambda: conv_case(False, True, False, True),
    "conv+bn": lambda: conv_case(True, False, False, False, stride=2),
    "conv+bias+bn+add+relu": lambda: conv_case(True, True, True, True),
    "conv+add": lambda: conv_case(False, False, True, False, r=1),
    "conv+bn+add+relu, stride 2": lambda: conv_case(True, False, True, True, stride=2),
    "conv+bn+relu, dilation 2": lambda: conv_case(True, False, False, True, dilation=2),
    "basic tail": lambda: tail_case("basic", False, False),
    "basic tail, projection, next": lambda: tail_case("basic", True, True),
    "bottleneck tail": lambda: tail_case("bottleneck", False, False),
    "bottleneck tail, next": lambda: tail_case("bottleneck", False, True),
    "bottleneck tail, projection, next": lambda: tail_case("bottleneck", True, True),
    "bottleneck": lambda: bottleneck_case(False),
    "bottleneck, projection": lambda: bottleneck_case(True),
    "stem": lambda: stem_case(True, False),
    "stem without pool, normalised": lambda: stem_case(False, True),
    "head": lambda: head_case(True),
    "head without bias": lambda: head_case(False),
    "fold": lambda: fold_case(True, True),
    "fold without affine": lambda: fold_case(False, False),
    "add": lambda: add_case((2, 3, 4, 5)),
    "add, 2-D": lambda: add_case((3, 4)),
}
BACKENDS = ["auto", "cudnn"]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_finite_differences(name: str) -> None:
    case = CASES[name]()
    assert torch.autograd.gradcheck(case.ours, case.leaves, fast_mode=len(case.leaves) > 6, **GRADCHECK)


def as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def gradients(function: Function, leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    out = as_tuple(function(*leaves))
    return torch.autograd.grad(
        out, leaves, [g.expand_as(o) if g.dim() == 0 else g for g, o in zip(grads, out, strict=True)]
    )


GRADS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda y: torch.randn(y.shape).to(y.dtype),
    "channels_last": lambda y: torch.empty_like(y).normal_(),
    "expanded": lambda y: torch.randn((), dtype=y.dtype).expand_as(y),
    "expanded along the batch": lambda y: torch.randn(y.shape[1:], dtype=y.dtype).expand_as(y),
    "transposed": lambda y: torch.randn(y.shape[::-1], dtype=y.dtype).permute(*range(y.dim() - 1, -1, -1)),
    "sliced": lambda y: sliced(torch.randn(y.shape, dtype=y.dtype), -1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_plain_pytorch_for_grads_of_any_stride(name: str, backend: str) -> None:
    case = CASES[name]()
    with use_backend(backend):
        for kind, make in GRADS.items():
            with torch.no_grad():
                grads = [make(y) for y in as_tuple(case.ours(*case.leaves))]
            for ours, theirs in zip(
                gradients(case.ours, case.leaves, grads), gradients(case.theirs, case.leaves, grads), strict=True
            ):
                try:
                    same_math(ours, theirs)
                except AssertionError as error:
                    raise AssertionError(f"{kind} grad: {error}") from None


@pytest.mark.parametrize("name", CASES)
def test_the_sum_of_the_outputs(name: str) -> None:
    """The shortest test that users write: its gradient has stride 0 everywhere."""
    case = CASES[name]()
    ours, theirs = (
        torch.autograd.grad(sum(o.sum() for o in as_tuple(f(*case.leaves))), case.leaves)
        for f in (case.ours, case.theirs)
    )
    for a, b in zip(ours, theirs, strict=True):
        same_math(a, b)


@pytest.mark.parametrize("channels_last", ["nothing", "activations", "weights", "everything"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_have_the_sizes_dtype_and_strides_of_their_parameters(name: str, channels_last: str) -> None:
    """DDP's buckets warn and copy otherwise. The strides of an activation's gradient are free."""
    case = CASES[name]()
    kinds = ["activations" if t.shape[0] <= 3 and t.shape[2:] != (1, 1) else "weights" for t in case.leaves]
    for tensor, kind in zip(case.leaves, kinds, strict=True):
        if tensor.dim() == 4 and channels_last in (kind, "everything"):
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    # not .grad: accumulating changes the layout
    grads = torch.autograd.grad(sum(o.square().sum() for o in as_tuple(case.ours())), case.leaves)
    for tensor, kind, grad in zip(case.leaves, kinds, grads, strict=True):
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype
        if kind == "weights":
            assert grad.stride() == tensor.stride(), tuple(tensor.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kept", ["each alone", "each frozen"])
def test_any_subset_may_be_frozen(name: str, kept: str) -> None:
    case = CASES[name]()
    with torch.no_grad():
        grads = [torch.randn_like(y) for y in as_tuple(case.ours(*case.leaves))]
    everything = gradients(case.ours, case.leaves, grads)
    for i in range(len(case.leaves)):
        wanted = [(j == i) == (kept == "each alone") for j in range(len(case.leaves))]
        if not any(wanted):
            continue
        for tensor, want in zip(case.leaves, wanted, strict=True):
            tensor.requires_grad_(want)
        pairs = zip(as_tuple(case.ours(*case.leaves)), grads, strict=True)
        # a block's output does not depend on the next one's parameters
        torch.autograd.backward(*zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True))
        for tensor, want, expected in zip(case.leaves, wanted, everything, strict=True):
            if want:
                same_math(tensor.grad, expected)
            else:
                assert tensor.grad is None
            tensor.grad = None


class Convolutions(TorchDispatchMode):
    """Records which gradients every convolution backward computes, and how many convolutions run besides."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[tuple[bool, ...]] = []
        self.forwards = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(tuple(args[-1]))
        self.forwards += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("frozen", "masks"),
    [
        ((), [(True, True)] * 3),
        (("x",), [(True, True), (True, True), (False, True)]),
        (("weights",), [(True, False)] * 3),
        (("weights", "bn"), [(True, False)] * 3),
        (("x", "weights"), [(True, False), (True, False)]),
    ],
    ids=str,
)
def test_frozen_tensors_cost_no_work(frozen: tuple[str, ...], masks: list[tuple[bool, bool]]) -> None:
    x, units = leaf(2, 4, 4, 4), [unit(2, 4), unit(3, 2, 3), unit(4, 3)]
    x.requires_grad_("x" not in frozen)
    for u in units:
        u.weight.requires_grad_("weights" not in frozen)
        for vector in (u.gamma, u.beta):
            vector.requires_grad_("bn" not in frozen)
    out = functional.bottleneck(x, *units)
    with Convolutions() as seen:
        out.sum().backward()
    assert [mask[:2] for mask in seen.masks] == masks
    # only the gradient of gamma needs a convolution's raw output
    assert seen.forwards == (0 if "bn" in frozen else 3)


def test_nothing_to_differentiate_builds_no_graph() -> None:
    case = CASES["conv+bias+bn+add+relu"]()
    assert case.ours(*case.leaves).requires_grad
    with torch.no_grad():
        assert not case.ours(*case.leaves).requires_grad
    for tensor in case.leaves:
        tensor.requires_grad_(False)
    assert not case.ours(*case.leaves).requires_grad
    with torch.inference_mode():
        assert case.ours(*case.leaves).is_inference()


def test_one_of_two_outputs_may_go_unused() -> None:
    case = CASES["bottleneck tail, projection, next"]()
    for i in (0, 1):
        ours = torch.autograd.grad(case.ours()[i].square().sum(), case.leaves, allow_unused=True)
        theirs = torch.autograd.grad(case.theirs()[i].square().sum(), case.leaves, allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            # where autograd of separate operators says None, one op says zero
            same_math(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name: str) -> None:
    """As a gradient penalty takes them: the incoming gradient is a constant."""
    case = CASES[name]()

    def twice(function) -> Sequence[Tensor | None]:
        out = sum(o.square().sum() for o in as_tuple(function(*case.leaves)))
        grads = torch.autograd.grad(out, case.leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), case.leaves, allow_unused=True)

    for ours, theirs in zip(twice(case.ours), twice(case.theirs), strict=True):
        same_math(torch.zeros(()) if ours is None else ours, torch.zeros(()) if theirs is None else theirs)


def test_memory_holds_inputs_and_output_only() -> None:
    """A bottleneck keeps its input and output, however many tensors lie between."""
    x, units = leaf(2, 4, 4, 4), [unit(2, 4), unit(3, 2, 3), unit(4, 3)]
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = functional.bottleneck(x, *units)
    activations = [t for t in saved if t.dim() == 4 and t.shape[2:] == (4, 4)]
    assert sorted(t.data_ptr() for t in activations) == sorted([x.data_ptr(), y.data_ptr()])


def test_empty_batches_have_zero_gradients() -> None:
    u = unit(4, 3, 3)
    functional.conv_bn_act(torch.empty(0, 3, 5, 5).double(), *u.tensors, padding=1).sum().backward()
    assert u.weight.grad.count_nonzero() == 0 and u.weight.grad.shape == u.weight.shape
    assert u.gamma.grad.count_nonzero() == 0


def built(name: str, rounding: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case with the same values whatever the dtype."""
    monkeypatch.setattr(Build, "rounding", rounding)
    monkeypatch.setattr(Build, "dtype", dtype)
    monkeypatch.setattr(Build, "width", 8)
    torch.manual_seed(1)
    return CASES[name]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_low_precision_is_no_worse_than_eager(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, every tensor in one dtype."""
    exact = built(name, dtype, torch.float64, monkeypatch)
    low = built(name, dtype, dtype, monkeypatch)
    outputs = [as_tuple(f(*c.leaves)) for f, c in ((low.ours, low), (low.theirs, low), (exact.theirs, exact))]
    for ours, theirs, truth in zip(*outputs, strict=True):
        no_worse_than(ours.detach(), theirs.detach(), truth.detach())
    grads = [torch.randn(y.shape).to(dtype) for y in outputs[0]]
    results = [
        torch.autograd.grad(out, case.leaves, [g.to(case.leaves[0].dtype) for g in grads])
        for out, case in zip(outputs, (low, low, exact), strict=True)
    ]
    for ours, theirs, truth in zip(*results, strict=True):
        assert truth.count_nonzero() > truth.numel() / 8, "the case tests nothing"
        no_worse_than(ours, theirs, truth, GRADIENT)

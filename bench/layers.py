"""The single steps of a ResNet: each fused op of this package against the same as separate PyTorch operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_triton
from resnet_triton import chains, cost, functional, plan, reference, steps
from resnet_triton.chains import Tail, bottleneck_tails
from resnet_triton.compare import PREDICT_FOR, Watch, fill_times, halving, is_out_of_memory
from resnet_triton.devices import known_devices
from resnet_triton.errors import EXACT, UNUSABLE, Error, gate, relative_error, tensors_of
from resnet_triton.explain import Plan
from resnet_triton.functional import ConvBN
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.providers import DTYPES
from resnet_triton.results import FAILED, NO_CUDA, OK, Row, device_name
from resnet_triton.shapes import BN_ADD_RELU, BN_RELU, resnet_convs
from resnet_triton.timing import Bystanders, clock_for, interleave

from . import cudnn_graphs
from .cudnn_graphs import NotSupported

EPS = 1e-5
EAGER, OURS, FOLDED, CUDNN = "eager passes", "ours", "ours folded", cudnn_graphs.PROVIDER
#: Layers of ResNet-50 that stand for the others where time is short: 3x3, expand with shortcut, stride 2, reduce.
FEW = ("layer1.0.conv2", "layer1.0.conv3", "layer2.0.conv2", "layer3.1.conv1", "layer4.1.conv2")
#: The stages of ResNet-50 whose blocks may end in one kernel.
CHAINED = ("layer1", "layer2", "layer3")


Step = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Layer:
    """One step.

    Args:
        name: as in the tables.
        shapes: of the float tensors that it takes, activations first. 4-D ones are channels_last.
        ours, eager: the step on these tensors, which returns one tensor or several.
        batch: images, None for a step on weights.
        macs: multiply-adds.
        weights: which of the tensors are filters.
        folded: the step on the folded tensors, where ``_measure`` makes them.
        remake: the same step for another batch.
        kernel: the kernel that computes it, where ``ours`` is no operator that ``explain`` knows.
        predicted_us: its predicted microseconds in a dtype, then.
        unit: the convolution and what follows it, where that is the whole step: cuDNN may have a graph for it.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Step
    eager: Step
    batch: int | None
    macs: int = 0
    weights: tuple[int, ...] = (1,)
    folded: Step | None = None
    remake: Callable[[int], Layer] | None = None
    kernel: str | None = None
    predicted_us: Callable[[torch.dtype], float] | None = None
    unit: tuple[ConvShape, Epilogue] | None = None

    def tensors(self) -> list[Tensor]:
        """Float32 tensors on the CPU: random, with positive vectors."""
        out = []
        for i, shape in enumerate(self.shapes):
            x = _empty(shape)
            # vectors are scales, shifts and variances alike; weights keep the size of activations
            x = x.uniform_(0.5, 1.5) if len(shape) == 1 else x.normal_()
            out.append(x / (x[0].numel() ** 0.5) if i in self.weights else x)
        return out

    @functools.cached_property
    def kernels(self) -> tuple[str, ...]:
        """The kernels of this package that compute it on an H200, by the plan there; none without triton."""
        if self.kernel is not None:
            return (self.kernel,)
        if not plan.triton_importable():
            return ()
        return tuple(dict.fromkeys(row.realisation for row in planned(self, "bfloat16").rows))


def _empty(shape: Sequence[int], device: str = "cpu") -> Tensor:
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), memory_format=layout, device=device)


class _Module(nn.Module):
    """A step as a module, for ``explain``."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        for i, shape in enumerate(layer.shapes[1:]):
            self.register_buffer(f"t{i}", _empty(shape, "meta"))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.layer.ours(x, *self._buffers.values())


def planned(layer: Layer, dtype: str) -> Plan:
    """How this package's kernels would compute a step on an H200."""
    with resnet_triton.use_backend("triton"), plan.quiet():
        return resnet_triton.explain(_Module(layer), layer.shapes[0], dtype=DTYPES[dtype], device=PREDICT_FOR)


def _four(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gamma, beta, mean, variance."""
    return _five(tensors)[:4]


def _five(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gamma, beta, mean, variance, and the residual or None."""
    gamma, beta, mean, var = tensors[:4]
    return gamma, beta, mean, var, tensors[4] if len(tensors) > 4 else None


def conv_layer(name: str, shape: ConvShape, epilogue: Epilogue) -> Layer:
    """A convolution with BN, and what its epilogue has besides."""
    options: dict[str, Any] = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation}
    options["relu"] = epilogue.relu

    def ours(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        gamma, beta, mean, var, residual = _five(rest)
        return functional.conv_bn_act(x, w, None, gamma, beta, mean, var, residual=residual, eps=EPS, **options)

    def eager(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        gamma, beta, mean, var, residual = _five(rest)
        return reference.conv_bn_act(x, w, None, gamma, beta, mean, var, residual=residual, eps=EPS, **options)

    def folded(x: Tensor, w: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return functional.conv_bn_act(x, w, bias, residual=residual, **options)

    out = (shape.n, shape.k, shape.p, shape.q)
    shapes: tuple[tuple[int, ...], ...] = (
        (shape.n, shape.c, shape.h, shape.w),
        (shape.k, shape.c, shape.r, shape.s),
        *[(shape.k,)] * 4,
    )
    shapes += (out,) if epilogue.residual else ()
    title = f"{name} {shape} {epilogue}"

    def remake(batch: int) -> Layer:
        return conv_layer(name, replace(shape, n=batch), epilogue)

    unit = shape, epilogue
    return Layer(title, shapes, ours, eager, shape.n, shape.macs, folded=folded, remake=remake, unit=unit)


def conv_layers(batch: int, names: tuple[str, ...] | None = None) -> list[Layer]:
    """The distinct convolutions of ResNet-50 at 224 pixels, or those with the given names."""
    found: dict[tuple[ConvShape, Epilogue], Layer] = {}
    for name, shape, epilogue in resnet_convs(50, batch):
        if names is None or name in names:
            found.setdefault((shape, epilogue), conv_layer(name, shape, epilogue))
    return list(found.values())


def basic_layers(batch: int) -> list[Layer]:
    """The last convolutions of ResNet-18's blocks: 3x3 with the shortcut."""
    found: dict[ConvShape, Layer] = {}
    for name, shape, epilogue in resnet_convs(18, batch):
        if epilogue.residual:
            found.setdefault(shape, conv_layer(f"resnet18.{name}", shape, epilogue))
    return list(found.values())


def one_pass_layer(batch: int) -> Layer:
    """A convolution by the library with this package's single pass behind it."""
    *_, (name, shape, epilogue) = resnet_convs(18, batch)
    apart = conv_layer(f"one pass behind resnet18.{name}", shape, epilogue)

    def ours(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        gamma, beta, mean, var, residual = _five(rest)
        y = steps.channels_last(torch.conv2d(x, w, None, shape.stride, shape.padding))
        return steps.bn_act_step(y, (None, gamma, beta, mean, var), residual, EPS, epilogue.relu)

    def predicted_us(dtype: torch.dtype) -> float:
        return cost.predict_unfused(shape, epilogue, dtype, "tf32", known_devices()[PREDICT_FOR], one_pass=True).us

    changed: dict[str, Any] = {"ours": ours, "folded": None, "remake": one_pass_layer, "unit": None}
    return replace(apart, kernel="bn_act", predicted_us=predicted_us, **changed)


def lead_layer(batch: int) -> Layer:
    """A pre-activation bottleneck's first convolution, behind BN and ReLU and with those of the next one behind it."""
    shape = ConvShape(batch, 56, 56, 256, 64)

    def ours(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        behind, lead = _four(rest), _four(rest[4:])
        return torch.ops.resnet_triton.bn_relu_conv(x, *lead, EPS, w, None, *behind, EPS, True, 1, 0, 1)

    def eager(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        gamma, beta, mean, var = _four(rest[4:])
        h = F.relu(F.batch_norm(x, mean, var, gamma, beta, False, 0.0, EPS))
        return reference.conv_bn_act(h, w, None, *_four(rest), eps=EPS)

    shapes = ((batch, shape.c, shape.h, shape.w), (shape.k, shape.c, 1, 1), *[(shape.k,)] * 4, *[(shape.c,)] * 4)
    name = f"preact_resnet200.layer1.1.conv1 {shape} behind bn+relu, {BN_RELU}"
    return Layer(name, shapes, ours, eager, batch, shape.macs, remake=lead_layer)


def tail_layer(name: str, tail: Tail, pool: bool = False) -> Layer:
    """The end of a bottleneck up to the next block's first convolution; or its last convolution and the average over
    the image."""
    tail = replace(tail, conv=None, epilogues=(tail.epilogues[0], None, *tail.epilogues[2:])) if pool else tail
    names, first = list(tail.sites()), tail.first or tail.conv or tail.last
    shortcut = (tail.last.n, tail.last.k, tail.last.p, tail.last.q)
    if tail.project is not None:
        shortcut = (tail.project.n, tail.project.c, tail.project.h, tail.project.w)
    shapes: list[tuple[int, ...]] = [(first.n, first.c, first.h, first.w), *([] if tail.first else [shortcut])]
    inputs, weights = len(shapes), []
    for conv, _ in tail.sites().values():
        weights.append(len(shapes))
        shapes += [(conv.k, conv.c, conv.r, conv.s), *[(conv.k,)] * 4]

    def units(tensors: Sequence[Tensor]) -> dict[str, ConvBN]:
        found = {}
        for i, (unit, (conv, _)) in enumerate(tail.sites().items()):
            weight, gamma, beta, mean, var = tensors[5 * i : 5 * i + 5]
            places = (conv.stride, conv.padding, conv.dilation)
            found[unit] = ConvBN(weight, None, gamma, beta, mean, var, EPS, *places)
        return found

    def step(block: Callable[..., tuple[Tensor, Tensor | None]]) -> Step:
        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            found = units(tensors[inputs:])
            convs = [found[unit] for unit in ("first", "conv", "last") if unit in found]
            others = {"downsample": found.get("project"), "next": found.get("reduce")}
            y, after = block(*tensors[:inputs], *convs, **others, subsample=tail.subsample, pool=pool)
            return (y,) if after is None else (y, after)

        return run

    def remake(batch: int) -> Layer:
        return tail_layer(name, dict(bottleneck_tails(50, batch, 224))[name], pool)

    whole = chains.chain_shape(tail, frozenset(names) - {"last"})
    title = f"{name}.conv3 and average {tail.last} {BN_ADD_RELU}" if pool else f"{name} to the next conv1 {whole}"
    macs = sum(conv.macs for conv, _ in tail.sites().values())
    ours = step(functional.block_and_next if tail.first else functional.block_tail)
    eager = step(reference.block_and_next if tail.first else reference.block_tail)
    return Layer(title, tuple(shapes), ours, eager, tail.last.n, macs, tuple(weights), remake=remake)


def tail_layers(batch: int) -> list[Layer]:
    """The distinct ends of ResNet-50's blocks that may be one kernel, and the network's last convolution."""
    tails = dict(bottleneck_tails(50, batch, 224))
    distinct = {tail: name for name, tail in reversed(tails.items()) if name.startswith(CHAINED)}
    found = [tail_layer(name, tail) for tail, name in reversed(distinct.items())]
    last = list(tails)[-1]
    return [*found, tail_layer(last, tails[last], pool=True)]


def max_pool_layer(batch: int) -> Layer:
    """The stem's max-pool on its own, as behind other stems."""
    shape = (batch, 64, 112, 112)

    def predicted_us(dtype: torch.dtype) -> float:
        moved = 5 * prod(shape) // 4 * dtype.itemsize
        return cost.memory_us(moved, known_devices()[PREDICT_FOR]) or 0.0

    return Layer(
        "max_pool", (shape,), lambda x: steps.max_pool_step(x, 3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), batch,
        weights=(), kernel="max_pool", predicted_us=predicted_us,
    )  # fmt: skip


def other_layers(batch: int) -> list[Layer]:
    """What is no convolution of a block: stem, pooling, head, small ops, and a convolution that no TMA can describe."""
    cifar = ConvShape(batch, 32, 32, 3, 16, 3, 3, 1, 1)
    vectors = [(64,)] * 4
    layers = [
        Layer(
            "stem", ((batch, 3, 224, 224), (64, 3, 7, 7), *vectors),
            lambda x, w, *bn: functional.stem(x, w, None, *_four(bn), eps=EPS, pool=False),
            lambda x, w, *bn: reference.stem(x, w, None, *_four(bn), eps=EPS, pool=False),
            batch, batch * 112 * 112 * 64 * 147,
        ),
        Layer(
            "stem with max_pool", ((batch, 3, 224, 224), (64, 3, 7, 7), *vectors),
            lambda x, w, *bn: functional.stem(x, w, None, *_four(bn), eps=EPS),
            lambda x, w, *bn: reference.stem(x, w, None, *_four(bn), eps=EPS),
            batch, batch * 112 * 112 * 64 * 147,
        ),
        max_pool_layer(batch),
        Layer(
            "head", ((batch, 2048, 7, 7), (1000, 2048), (1000,)),
            functional.head, reference.head, batch, batch * 2048 * 1000,
        ),
        Layer(
            "add_relu", ((batch, 256, 56, 56),) * 2, functional.add_relu, reference.add_relu, batch, weights=(),
        ),
        Layer(
            "fold_bn", ((512, 512, 3, 3), *[(512,)] * 4),
            lambda w, *bn: functional.fold_bn(w, None, *_four(bn), EPS)[0],
            lambda w, *bn: reference.fold_bn(w, None, *_four(bn), EPS)[0],
            None, weights=(0,), kernel="fold_bn",
        ),
    ]  # fmt: skip

    def again(name: str) -> Callable[[int], Layer]:
        return lambda batch: next(layer for layer in other_layers(batch) if layer.name == name)

    layers = [replace(layer, remake=again(layer.name)) if layer.batch else layer for layer in layers]
    return [conv_layer("CIFAR stem", cifar, BN_RELU), *layers]


def kernel_layers(batch: int, few: bool) -> list[Layer]:
    """Steps for the GPU kernels: all, or (``few``) so many that every kernel is among them."""
    convs = conv_layers(batch, FEW if few else None)
    others = [*tail_layers(batch), one_pass_layer(batch), lead_layer(batch), *basic_layers(batch), *other_layers(batch)]
    if not few:
        return [*convs, *others]
    chosen: dict[str, Layer] = {}
    for layer in sorted([*convs, *others], key=lambda layer: len(layer.kernels)):
        for kernel in layer.kernels:
            chosen.setdefault(kernel, layer)
    return [layer for layer in (*convs, *others) if layer in chosen.values()]


def _row(layer: Layer, device: str, dtype: str, provider: str) -> Row:
    note = "" if device == "cpu" else " + ".join(layer.kernels)
    row = Row("layers", device, provider, layer.name, dtype, infer_batch_size=layer.batch, note=note)
    if layer.batch:
        row.infer_gmacs = layer.macs / layer.batch / 1e9 or None
    return row


def unmeasured(layer: Layer, dtype: str) -> Row:
    """The row of a GPU kernel without a GPU: the cost model's time, named so."""
    row = _row(layer, "cuda", dtype, OURS)
    row.status = NO_CUDA
    if layer.predicted_us is not None:
        us: float | None = layer.predicted_us(DTYPES[dtype])
    else:
        us = planned(layer, dtype).predicted_us
    if us is not None:
        row.predicted_step_time, row.predicted_for = us / 1e3, PREDICT_FOR
    return row


def measure(layer: Layer, device: str, dtype: str, budget_s: float, watch: Watch | None = None) -> dict[str, Row]:
    """Rows of one step by provider: checked against float64, then timed interleaved. Half the batch if it is too large.

    Args:
        layer: the step.
        device, dtype: ``"cpu"`` or ``"cuda"``, a name of :data:`resnet_triton.providers.DTYPES`.
        budget_s: seconds to spend on timing.
        watch: hears of a batch that was halved; the names of the rows show the new one.
    """
    remake = layer.remake
    if layer.batch is None or remake is None:
        return _measure(layer, device, dtype, budget_s)

    def tell(text: str) -> None:
        (watch or Watch()).say(f"{layer.name}: {text}")

    return halving(layer.batch, lambda batch: _measure(remake(batch), device, dtype, budget_s), tell)


def fused_call(layer: Layer, tensors: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """A step with a ``unit`` as a graph of cuDNN's.

    Raises:
        NotSupported: cuDNN refuses it.
    """
    assert layer.unit is not None
    x, w, *bn = tensors
    graph = cudnn_graphs.unit(*layer.unit, dtype, cudnn_graphs.this_gpu())
    return graph.bind(cudnn_graphs.unit_operands(x, w, tuple(bn), EPS))


def absent_rows(dtype: str) -> list[Row]:
    """One row that says why there are none of cuDNN's graphs; none where its frontend is installed."""
    step, status = cudnn_graphs.EVERY_STEP, cudnn_graphs.ABSENT
    return [] if cudnn_graphs.installed() else [Row("layers", device_name(), CUDNN, step, dtype, status)]


def _fused(layer: Layer, tensors: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], Any] | str:
    """:func:`fused_call`, run once, or why there is none."""
    try:
        call = fused_call(layer, tensors, dtype)
        call()
    except NotSupported as reason:
        return str(reason)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{FAILED}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
    return call


def _measure(layer: Layer, device: str, dtype: str, budget_s: float) -> dict[str, Row]:
    torch.manual_seed(0)
    tensors = [x.to(device, DTYPES[dtype]) for x in layer.tensors()]
    calls: dict[str, Callable[[], Any]] = {
        EAGER: lambda: layer.eager(*tensors),
        OURS: lambda: layer.ours(*tensors),
    }
    if layer.folded is not None and device == "cpu":
        x, w, *vectors = tensors
        weight, bias = functional.fold_bn(w.float(), None, *_four([v.float() for v in vectors]), EPS)
        weight, bias = (t.to(DTYPES[dtype]) for t in (weight, bias))
        operands = (x, weight.contiguous(memory_format=torch.channels_last), bias, *vectors[4:])
        folded = layer.folded
        calls[FOLDED] = lambda: folded(*operands)
    backend = "triton" if device == "cuda" else "auto"
    rows, timed, eager = {}, {}, EXACT
    if layer.unit is not None and device == "cuda" and cudnn_graphs.installed():
        fused = _fused(layer, tensors, DTYPES[dtype])
        if isinstance(fused, str):
            rows[CUDNN] = _row(layer, device_name(), dtype, CUDNN)
            rows[CUDNN].status = fused
        else:
            calls[CUDNN] = fused
    with torch.inference_mode(), resnet_triton.use_backend(backend):
        exact = tensors_of(layer.eager(*(t.double() for t in tensors)))
        for provider, call in calls.items():
            row = rows[provider] = _row(layer, "cpu" if device == "cpu" else device_name(), dtype, provider)
            error = _error(tensors_of(call()), exact)
            eager = error if provider == EAGER else eager
            row.error, row.eager_error = error.rms, eager.rms
            row.status = gate(error, eager, dtype, provider not in (EAGER, CUDNN))
            if row.status == OK:
                timed[provider] = call
        del exact
        with Bystanders() as bystanders:
            samples = interleave(timed, clock_for(device), budget_s)
    for provider, found in samples.items():
        rows[provider].others_cpu = bystanders.share
        fill_times(rows[provider], found)
    base = rows[EAGER].infer_step_time
    for row in rows.values():
        if base and row.infer_step_time:
            row.speedup = base / row.infer_step_time
    return rows


def _error(outputs: list[Tensor], exact: list[Tensor]) -> Error:
    """The worst of several results."""
    if len(outputs) != len(exact):
        return UNUSABLE
    return functools.reduce(Error.or_worse, map(relative_error, outputs, exact), EXACT)

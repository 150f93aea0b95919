"""The single steps of a ResNet: each fused op of this package against the same as separate PyTorch operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import functional, reference
from resnet_triton.compare import PREDICT_FOR, Watch, fill_times, halving
from resnet_triton.errors import EXACT, gate, relative_error
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.providers import DTYPES
from resnet_triton.results import NO_CUDA, OK, Row, device_name
from resnet_triton.shapes import BN_RELU, resnet_convs
from resnet_triton.timing import Bystanders, clock_for, interleave

EPS = 1e-5
EAGER, OURS, FOLDED = "eager passes", "ours", "ours folded"
#: Layers of ResNet-50 that stand for the others where time is short: 3x3, expand with shortcut, stride 2, reduce.
FEW = ("layer1.0.conv2", "layer1.0.conv3", "layer2.0.conv2", "layer3.1.conv1", "layer4.1.conv2")


@dataclass(frozen=True)
class Layer:
    """One step.

    Args:
        name: as in the tables.
        kernel: the kernel of this package that computes it on a recent GPU.
        shapes: of the float tensors that it takes, activations first. 4-D ones are channels_last.
        ours, eager: the step on these tensors. The last tensor of BN vectors is a variance.
        folded: the step on the folded tensors, where :attr:`fold` makes them.
        batch: images, None for a step on weights.
        macs: multiply-adds.
        remake: the same step for another batch.
    """

    name: str
    kernel: str
    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    batch: int | None
    macs: int = 0
    folded: Callable[..., Tensor] | None = None
    remake: Callable[[int], Layer] | None = None

    def tensors(self, fill: bool = True) -> list[Tensor]:
        """Float32 tensors on the CPU: random, with positive vectors, or (``fill=False``) not even touched memory."""
        out = []
        for shape in self.shapes:
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            x = torch.empty(shape, memory_format=layout)
            if fill:
                # vectors are scales, shifts and variances alike; weights keep the size of activations
                x = x.uniform_(0.5, 1.5) if len(shape) == 1 else x.normal_()
                x = x / (x[0].numel() ** 0.5) if len(shape) == 4 and shape[0] != self.batch else x
            out.append(x)
        return out


class _Module(nn.Module):
    """A step as a module, for ``explain``."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        for i, x in enumerate(layer.tensors(fill=False)[1:]):
            self.register_buffer(f"t{i}", x)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.ours(x, *self._buffers.values())


def _four(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gamma, beta, mean, variance."""
    return _five(tensors)[:4]


def _five(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gamma, beta, mean, variance, and the residual or None."""
    gamma, beta, mean, var = tensors[:4]
    return gamma, beta, mean, var, tensors[4] if len(tensors) > 4 else None


def conv_layer(name: str, shape: ConvShape, epilogue: Epilogue, kernel: str) -> Layer:
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
        return conv_layer(name, replace(shape, n=batch), epilogue, kernel)

    return Layer(title, kernel, shapes, ours, eager, shape.n, shape.macs, folded, remake)


def conv_layers(batch: int, names: tuple[str, ...] | None = None) -> list[Layer]:
    """The distinct convolutions of ResNet-50 at 224 pixels, or those with the given names."""
    found: dict[tuple[ConvShape, Epilogue], Layer] = {}
    for name, shape, epilogue in resnet_convs(50, batch):
        if names is None or name in names:
            kernel = "conv1x1" if shape.pointwise else "conv_tma"
            found.setdefault((shape, epilogue), conv_layer(name, shape, epilogue, kernel))
    return list(found.values())


def other_layers(batch: int) -> list[Layer]:
    """What is no convolution of a block: stem, pooling, head, small ops, and a convolution that no TMA can describe."""
    cifar = ConvShape(batch, 32, 32, 3, 16, 3, 3, 1, 1)
    vectors = [(64,)] * 4
    layers = [
        Layer(
            "stem", "stem", ((batch, 3, 224, 224), (64, 3, 7, 7), *vectors),
            lambda x, w, *bn: functional.stem(x, w, None, *_four(bn), eps=EPS, pool=False),
            lambda x, w, *bn: reference.stem(x, w, None, *_four(bn), eps=EPS, pool=False),
            batch, batch * 112 * 112 * 64 * 147,
        ),
        Layer(
            "stem with max_pool", "max_pool", ((batch, 3, 224, 224), (64, 3, 7, 7), *vectors),
            lambda x, w, *bn: functional.stem(x, w, None, *_four(bn), eps=EPS),
            lambda x, w, *bn: reference.stem(x, w, None, *_four(bn), eps=EPS),
            batch, batch * 112 * 112 * 64 * 147,
        ),
        Layer(
            "head", "head", ((batch, 2048, 7, 7), (1000, 2048), (1000,)),
            functional.head, reference.head, batch, batch * 2048 * 1000,
        ),
        Layer("add_relu", "add_relu", ((batch, 256, 56, 56),) * 2, functional.add_relu, reference.add_relu, batch),
        Layer(
            "fold_bn", "fold_bn", ((512, 512, 3, 3), *[(512,)] * 4),
            lambda w, *bn: functional.fold_bn(w, None, *_four(bn), EPS)[0],
            lambda w, *bn: reference.fold_bn(w, None, *_four(bn), EPS)[0],
            None,
        ),
    ]  # fmt: skip

    def again(name: str) -> Callable[[int], Layer]:
        return lambda batch: next(layer for layer in other_layers(batch) if layer.name == name)

    layers = [replace(layer, remake=again(layer.name)) if layer.batch else layer for layer in layers]
    return [conv_layer("CIFAR stem", cifar, BN_RELU, "conv_pointer"), *layers]


def kernel_layers(batch: int, few: bool) -> list[Layer]:
    """Steps for the GPU kernels: all, or (``few``) one for each kernel."""
    convs = conv_layers(batch, FEW if few else None)
    layers = [*convs, *other_layers(batch)]
    return list({layer.kernel: layer for layer in reversed(layers)}.values())[::-1] if few else layers


def _row(layer: Layer, device: str, dtype: str, provider: str) -> Row:
    row = Row("layers", device, provider, layer.name, dtype, infer_batch_size=layer.batch, note=layer.kernel)
    if layer.batch:
        row.infer_gmacs = layer.macs / layer.batch / 1e9 or None
    return row


def unmeasured(layer: Layer, dtype: str) -> Row:
    """The row of a GPU kernel without a GPU: the cost model's time, named so."""
    row = _row(layer, "cuda", dtype, OURS)
    row.status = NO_CUDA
    with resnet_triton.use_backend("triton"):
        plan = resnet_triton.explain(_Module(layer), layer.shapes[0], dtype=DTYPES[dtype], device=PREDICT_FOR)
    if plan.predicted_us is not None:
        row.predicted_step_time, row.predicted_for = plan.predicted_us / 1e3, PREDICT_FOR
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


def _measure(layer: Layer, device: str, dtype: str, budget_s: float) -> dict[str, Row]:
    torch.manual_seed(0)
    tensors = [x.to(device, DTYPES[dtype]) for x in layer.tensors()]
    calls: dict[str, Callable[[], Tensor]] = {
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
    with torch.inference_mode(), resnet_triton.use_backend(backend):
        exact = layer.eager(*(t.double() for t in tensors))
        for provider, call in calls.items():
            row = rows[provider] = _row(layer, "cpu" if device == "cpu" else device_name(), dtype, provider)
            error = relative_error(call(), exact)
            eager = error if provider == EAGER else eager
            row.error, row.eager_error = error.rms, eager.rms
            row.status = gate(error, eager, dtype, provider != EAGER)
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

"""The ``torch.ops.resnet_triton`` operators: schemas, shapes, and how each runs.

An operator says *what* is computed. How (one of our kernels, cuDNN, oneDNN) is decided inside, by ``plan``, where
shapes are concrete; so a traced graph never depends on the batch or image size. Every activation that an operator
returns is channels_last.

Several convolutions of one operator are passed as *units*: ``[weight, bias, gamma, beta, mean, var]`` lists, with one
``eps`` and one ``(stride, padding, dilation)`` each. An empty list is an absent unit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import backend, onednn, plan, reference
from .devices import Target, target_of
from .kernels.config import Epilogue
from .kernels.geometry import ConvShape, out_size

UNIT = ("weight", "bias", "gamma", "beta", "mean", "var")
#: bias, gamma, beta, mean, var
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
library = torch.library.Library("resnet_triton", "DEF")


@dataclass(frozen=True)
class Step:
    """One kernel or library call of an operator, as ``explain`` reports it.

    Args:
        op: what it computes, e.g. ``"conv"`` or ``"max_pool"``.
        weight: the weight whose module names the row, or None.
        shape, epilogue: of a convolution, else None.
        bytes: through device memory, including separate BN, add and ReLU passes where the library runs them.
        choice: how it runs.
    """

    op: str
    weight: Tensor | None
    shape: ConvShape | None
    epilogue: Epilogue | None
    bytes: int
    choice: plan.Choice


class Recorder:
    """While active, steps are recorded for one target instead of run."""

    active: Recorder | None = None

    def __init__(self, target: Target) -> None:
        self.target = target
        self.steps: list[Step] = []

    def __enter__(self) -> Recorder:
        Recorder.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Recorder.active = None


def _target(x: Tensor) -> Target:
    if Recorder.active:
        return Recorder.active.target
    if x.is_cuda:
        return target_of(x.device)
    return target_of(x.device, _interpreting())


def _interpreting() -> bool:
    if backend.current_backend() != "triton" or not plan.triton_importable():
        return False
    from .kernels.launch import interpreting

    return interpreting()


def _run(
    op: str,
    choice: plan.Choice,
    allocate: Callable[[], Tensor],
    launch: Callable[[Tensor], None],
    eager: Callable[[], Tensor],
    moved: Callable[[], int],
    *,
    weight: Tensor | None = None,
    shape: ConvShape | None = None,
    epilogue: Epilogue | None = None,
) -> Tensor:
    """Runs a step as chosen (``launch`` fills what ``allocate`` made; ``eager`` returns its own), or records it.

    ``moved`` says how many bytes it moves: only a record needs that.
    """
    if Recorder.active:
        Recorder.active.steps.append(Step(op, weight, shape, epilogue, moved(), choice))
        return allocate()
    if not choice.fused:
        return channels_last(eager())
    out = allocate()
    if out.numel() > 0:
        launch(out)
    return out


# Layout


def channels_last(x: Tensor) -> Tensor:
    """``x`` itself if a 4-D channels_last tensor (or not 4-D), else a channels_last copy."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def new_channels_last(x: Tensor, n: int, c: int, h: int, w: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised ``[n,c,h,w]`` channels_last tensor on the device of ``x``."""
    return torch.empty((n, c, h, w), dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def _new_conv_output(x: Tensor, n: int, k: int, p: int, q: int) -> Tensor:
    """:func:`new_channels_last` of a result with pixels, in a third of the host time."""
    return torch.empty_strided((n, k, p, q), (p * q * k, 1, q * k, k), dtype=x.dtype, device=x.device)


def nhwc(x: Tensor) -> Tensor:
    """The dense, 16-byte aligned ``[N,H,W,C]`` view of a channels_last tensor (a copy of anything else)."""
    dense = channels_last(x).permute(0, 2, 3, 1).contiguous()
    return aligned(dense)


def aligned(x: Tensor) -> Tensor:
    """``x``, copied if it starts off a 16-byte boundary (in a flat buffer of parameters), where no TMA can read it."""
    return x.clone() if x.data_ptr() % 16 else x


def dense_vectors(vectors: Vectors) -> Vectors:
    """The vectors as kernels read them: contiguous."""
    bias, gamma, beta, mean, var = (None if v is None else v.contiguous() for v in vectors)
    return bias, gamma, beta, mean, var


# One convolution


def _check_conv(x: Tensor, weight: Tensor, vectors: Vectors, residual: Tensor | None) -> None:
    """Raises ValueError naming the argument, what came, what is allowed, and the way out."""
    _check_sizes(x.shape, weight.shape)
    _check_types(x, weight)
    _check_operands(x, weight, vectors, residual)


def _check_sizes(x: Sequence[int], weight: Sequence[int]) -> None:
    if len(x) != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x)}; add a batch dimension with x[None]")
    if len(weight) != 4:
        raise ValueError(f"weight must be [K, C, R, S], got {tuple(weight)}")
    if x[1] != weight[1]:
        raise ValueError(
            f"x has {x[1]} channels, weight expects {weight[1]}; grouped convolutions are not fused: "
            f"use torch.nn.functional.conv2d for those"
        )


def _check_types(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(
            f"x has dtype {x.dtype}, weight has {weight.dtype}; both must be the same floating type: "
            f"convert one with .to(), or run under torch.autocast"
        )


def _check_operands(x: Tensor, weight: Tensor, vectors: Vectors, residual: Tensor | None) -> None:
    device, k = x.device, weight.shape[0]
    for v in vectors:  # on every call of every convolution: only what fails is looked at closely
        if v is not None and (v.device != device or v.dim() != 1 or v.shape[0] != k):
            _refuse_operands(x, weight, vectors, residual)
    if weight.device != device or (residual is not None and residual.device != device):
        _refuse_operands(x, weight, vectors, residual)
    bias, gamma, beta, mean, var = vectors
    if bias is not None and bias.dtype != weight.dtype:
        raise ValueError(f"bias has dtype {bias.dtype}, weight has {weight.dtype}; convert one with .to()")
    if (mean is None) != (var is None):
        raise ValueError("mean and var belong together; got only one of them")
    if var is None and (gamma is not None or beta is not None):
        raise ValueError("gamma or beta came without mean and var; pass all of a BatchNorm's statistics")


def _refuse_operands(x: Tensor, weight: Tensor, vectors: Vectors, residual: Tensor | None) -> None:
    for name, tensor in zip((*UNIT, "residual"), (weight, *vectors, residual), strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move both to one device")
    for name, vector in zip(UNIT[1:], vectors, strict=True):
        if vector is not None and tuple(vector.shape) != (weight.shape[0],):
            raise ValueError(f"{name} must be [K] = [{weight.shape[0]}], got {tuple(vector.shape)}")


def conv_out_shape(
    x: Sequence[int], weight: Sequence[int], stride: int, padding: int, dilation: int
) -> tuple[int, int, int, int]:
    """``(N, K, P, Q)`` for the shapes of x and weight; raises ValueError when the window does not fit."""
    n, _, h, w = x
    k, _, r, s = weight
    if min(stride, dilation) < 1 or padding < 0:
        raise ValueError(f"stride={stride}, dilation={dilation} must be at least 1, padding={padding} at least 0")
    out = (n, k, out_size(h, r, stride, padding, dilation), out_size(w, s, stride, padding, dilation))
    if out[2] < 1 or out[3] < 1:
        raise ValueError(f"a {r}x{s} filter (dilation {dilation}) does not fit x of {h}x{w} with padding {padding}")
    return out


def _check_residual(residual: Tensor | None, out: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    if residual is not None and (residual.shape != out or residual.dtype != dtype):
        raise ValueError(f"residual must be {out} {dtype}, got {tuple(residual.shape)} {residual.dtype}")


@functools.lru_cache(maxsize=4096)
def _conv_geometry(
    x: torch.Size, weight: torch.Size, stride: int, padding: int, dilation: int
) -> tuple[ConvShape, tuple[int, int, int, int]]:
    """The convolution and its output's shape, for the shapes of x and weight."""
    _check_sizes(x, weight)
    out = conv_out_shape(x, weight, stride, padding, dilation)
    n, c, h, w = x
    k, _, r, s = weight
    return ConvShape(n, h, w, c, k, r, s, stride, padding, dilation), out


_epilogue = functools.cache(Epilogue)


def conv_step(
    x: Tensor,
    weight: Tensor,
    vectors: Vectors,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """Runs one convolution with its epilogue as planned; ``vectors`` are bias, gamma, beta, mean, var."""
    shape, out_shape = _conv_geometry(x.shape, weight.shape, stride, padding, dilation)
    _check_types(x, weight)
    _check_operands(x, weight, vectors, residual)
    _check_residual(residual, out_shape, x.dtype)
    epilogue = _epilogue(vectors[4] is not None, vectors[0] is not None, residual is not None, relu)
    precision = backend.dot_precision(x.dtype)
    if shape.n == 0 and not Recorder.active:
        return new_channels_last(x, *out_shape)
    choice = plan.choose_conv(shape, epilogue, x.dtype, precision, _target(x), backend.current_backend())
    if choice.realisation == "onednn" and not Recorder.active:
        return onednn.convolution(x, weight, vectors[0], residual, relu, stride, padding, dilation)

    def launch(out: Tensor) -> None:
        from .kernels.dispatch import launch_conv
        from .kernels.epilogue import Operands

        addend = None if residual is None else nhwc(residual)
        operands = Operands(addend, *dense_vectors(vectors), eps=eps, relu=relu)
        launch_conv(nhwc(x), nhwc(weight), out.permute(0, 2, 3, 1), shape, operands, choice.tiling, precision)

    def eager() -> Tensor:
        return reference.conv_bn_act(channels_last(x), weight, *vectors, residual, eps, relu, stride, padding, dilation)

    def moved() -> int:
        if choice.fused or choice.realisation == "onednn":
            return shape.bytes_moved(x.element_size(), residual is not None)
        return plan.cost.unfused_bytes(shape, epilogue, x.element_size())

    def allocate() -> Tensor:
        return _new_conv_output(x, *out_shape)

    return _run("conv", choice, allocate, launch, eager, moved, weight=weight, shape=shape, epilogue=epilogue)


# Operators

library.define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, "
    "Tensor? residual, float eps, bool relu, int stride, int padding, int dilation) -> Tensor"
)
library.define(
    "block_tail(Tensor t, Tensor shortcut, Tensor?[] conv2, Tensor?[] conv3, Tensor?[] downsample, Tensor?[] next, "
    "float[] eps, int[] geometry) -> Tensor[]"
)
library.define(
    "bottleneck(Tensor x, Tensor?[] conv1, Tensor?[] conv2, Tensor?[] conv3, Tensor?[] downsample, "
    "float[] eps, int[] geometry) -> Tensor"
)
library.define(
    "stem(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, "
    "Tensor? norm_mean, Tensor? norm_std, float eps, bool pool) -> Tensor"
)
library.define("head(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
library.define(
    "fold_bn(Tensor weight, Tensor? bias, Tensor? gamma, Tensor? beta, Tensor mean, Tensor var, float eps) "
    "-> (Tensor, Tensor)"
)
library.define("add_relu(Tensor x, Tensor y) -> Tensor")


def conv_bn_act(x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation):
    """Implementation of ``torch.ops.resnet_triton.conv_bn_act``."""
    vectors = (bias, gamma, beta, mean, var)
    return conv_step(x, weight, vectors, residual, eps, relu, stride, padding, dilation)


def _fake_conv(x, weight, vectors, residual, stride, padding, dilation):
    _check_conv(x, weight, vectors, residual)
    out = conv_out_shape(x.shape, weight.shape, stride, padding, dilation)
    _check_residual(residual, out, x.dtype)
    return new_channels_last(x, *out)


def _fake_conv_bn_act(x, weight, bias, gamma, beta, mean, var, residual, eps, relu, stride, padding, dilation):
    return _fake_conv(x, weight, (bias, gamma, beta, mean, var), residual, stride, padding, dilation)


def split_units(units: Sequence[Sequence[Tensor | None]], eps: Sequence[float], geometry: Sequence[int]):
    """``(weight, vectors, eps, (stride, padding, dilation))`` of each unit, None for an absent one."""
    present = sum(1 for unit in units if unit)
    if len(eps) != present or len(geometry) != 3 * present:
        raise ValueError(
            f"{present} units need {present} eps and {3 * present} geometry values, got {len(eps)} and {len(geometry)}"
        )
    parts: list[Any] = []
    i = 0
    for unit in units:
        if not unit:
            parts.append(None)
            continue
        if len(unit) != len(UNIT) or unit[0] is None:
            raise ValueError(f"a unit is [{', '.join(UNIT)}] with a weight, got {len(unit)} items")
        parts.append((unit[0], tuple(unit[1:]), eps[i], tuple(geometry[3 * i : 3 * i + 3])))
        i += 1
    return parts


def _tail(conv, t, shortcut, conv2, conv3, downsample, next, eps, geometry):
    """The steps of ``block_tail`` through ``conv(x, weight, vectors, residual, eps, relu, *geometry)``."""
    second, third, project, reduce = split_units((conv2, conv3, downsample, next), eps, geometry)

    def step(x, part, residual=None, relu=True):
        weight, vectors, unit_eps, unit_geometry = part
        return conv(x, weight, vectors, residual, unit_eps, relu, *unit_geometry)

    if project is not None:
        shortcut = step(shortcut, project, relu=False)
    hidden, last = (t, second) if third is None else (step(t, second), third)
    y = step(hidden, last, residual=shortcut)
    return [y] if reduce is None else [y, step(y, reduce)]


def _fake_step(x, weight, vectors, residual, eps, relu, stride, padding, dilation):
    return _fake_conv(x, weight, vectors, residual, stride, padding, dilation)


def block_tail(t, shortcut, conv2, conv3, downsample, next, eps, geometry):
    """Implementation of ``torch.ops.resnet_triton.block_tail``."""
    return _tail(conv_step, t, shortcut, conv2, conv3, downsample, next, eps, geometry)


def _fake_block_tail(t, shortcut, conv2, conv3, downsample, next, eps, geometry):
    return _tail(_fake_step, t, shortcut, conv2, conv3, downsample, next, eps, geometry)


def _whole(conv, x, conv1, conv2, conv3, downsample, eps, geometry):
    ((weight, vectors, first_eps, first_geometry),) = split_units((conv1,), eps[:1], geometry[:3])
    t = conv(x, weight, vectors, None, first_eps, True, *first_geometry)
    return _tail(conv, t, x, conv2, conv3, downsample, [], eps[1:], geometry[3:])[0]


def bottleneck(x, conv1, conv2, conv3, downsample, eps, geometry):
    """Implementation of ``torch.ops.resnet_triton.bottleneck``."""
    return _whole(conv_step, x, conv1, conv2, conv3, downsample, eps, geometry)


def _fake_bottleneck(x, conv1, conv2, conv3, downsample, eps, geometry):
    return _whole(_fake_step, x, conv1, conv2, conv3, downsample, eps, geometry)


def _check_stem(x, weight, norm_mean, norm_std) -> tuple[int, int]:
    if x.dim() != 4 or tuple(weight.shape[1:]) != (3, 7, 7) or x.shape[1] != 3:
        raise ValueError(
            f"stem takes x [N, 3, H, W] and weight [K, 3, 7, 7], got {tuple(x.shape)} and {tuple(weight.shape)}; "
            f"an NHWC batch enters as x.permute(0, 3, 1, 2)"
        )
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}; convert it with .to()")
    if x.dtype != torch.uint8 and x.dtype != weight.dtype and norm_mean is None:
        raise ValueError(
            f"x must be uint8 or the weight's dtype {weight.dtype}, got {x.dtype}; convert it with .to(), "
            f"or run under torch.autocast"
        )
    if (norm_mean is None) != (norm_std is None):
        raise ValueError("norm_mean and norm_std belong together; got only one of them")
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x has no pixels: {tuple(x.shape)}")
    return out_size(x.shape[2], 7, 2, 3), out_size(x.shape[3], 7, 2, 3)


def stem(x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std, eps, pool):
    """Implementation of ``torch.ops.resnet_triton.stem``."""
    p, q = _check_stem(x, weight, norm_mean, norm_std)
    _check_operands(x, weight, (bias, gamma, beta, mean, var), None)
    n, k = x.shape[0], weight.shape[0]
    if n > 0 or Recorder.active:
        y = _stem_conv(x, weight, (bias, gamma, beta, mean, var), norm_mean, norm_std, eps, (n, k, p, q))
    else:
        y = new_channels_last(x, n, k, p, q, weight.dtype)
    return max_pool_step(y, 3, 2, 1) if pool else y


def _stem_conv(x, weight, vectors: Vectors, norm_mean, norm_std, eps, out_shape):
    n, k = out_shape[:2]
    _, _, h, w = x.shape
    shape = ConvShape(n, h, w, 3, k, 7, 7, 2, 3)
    epilogue = Epilogue(vectors[4] is not None, vectors[0] is not None, False, True)
    dtype, size = weight.dtype, weight.element_size()
    precision = backend.dot_precision(dtype)
    choice = plan.choose_stem(shape, epilogue, dtype, _target(x), backend.current_backend(), precision)

    def launch(y: Tensor) -> None:
        from .kernels import stem as kernels
        from .kernels.epilogue import Operands

        cells = kernels.stem_cells(h, w, choice.tiling.kernel == "conv_tma")
        xs = torch.empty((n, *cells, 16), dtype=dtype, device=x.device)
        norm = (None if v is None else v.contiguous() for v in (norm_mean, norm_std))
        kernels.launch_space_to_depth(x, xs, *norm)
        packed = torch.empty((k, 4, 4, 16), dtype=dtype, device=x.device)
        kernels.launch_pack_stem_weight(weight, packed)
        operands = Operands(None, *dense_vectors(vectors), eps=eps, relu=True)
        kernels.launch_stem_conv(xs, packed, y.permute(0, 2, 3, 1), operands, choice.tiling, precision)

    def eager() -> Tensor:
        image = channels_last(reference.normalise(x, norm_mean, norm_std, dtype))
        return reference.conv_bn_act(image, weight, *vectors, residual=None, eps=eps, relu=True, stride=2, padding=3)

    def moved() -> int:
        cost = plan.cost
        return cost.stem_bytes(shape, size) if choice.fused else cost.unfused_bytes(shape, epilogue, size)

    def allocate() -> Tensor:
        return new_channels_last(x, n, k, out_shape[2], out_shape[3], dtype)

    return _run("stem", choice, allocate, launch, eager, moved, weight=weight, shape=shape, epilogue=epilogue)


def max_pool_step(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Max-pools a channels_last activation."""
    n, c, h, w = x.shape
    p, q = out_size(h, kernel, stride, padding), out_size(w, kernel, stride, padding)
    pixels = n * c * p * q
    moved = (x.numel() + pixels) * x.element_size()
    theirs = moved + 8 * pixels  # PyTorch's also stores an int64 index per value
    choice = plan.choose_step("max_pool", _target(x), x.dtype, backend.current_backend(), (moved, 1), (theirs, 1))

    def launch(out: Tensor) -> None:
        from .kernels.pool import launch_max_pool

        launch_max_pool(nhwc(x), out.permute(0, 2, 3, 1), kernel, stride, padding)

    return _run(
        "max_pool",
        choice,
        lambda: new_channels_last(x, n, c, p, q),
        launch,
        lambda: torch.max_pool2d(x, kernel, stride, padding),
        lambda: moved if choice.fused else theirs,
    )


def _fake_stem(x, weight, bias, gamma, beta, mean, var, norm_mean, norm_std, eps, pool):
    p, q = _check_stem(x, weight, norm_mean, norm_std)
    _check_operands(x, weight, (bias, gamma, beta, mean, var), None)
    if pool:
        p, q = out_size(p, 3, 2, 1), out_size(q, 3, 2, 1)
    return new_channels_last(x, x.shape[0], weight.shape[0], p, q, weight.dtype)


def _check_head(x, weight, bias) -> None:
    if x.dim() != 4 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"head takes x [N, C, H, W] and weight [K, C], got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}, weight {weight.dtype}; both must be the same floating type")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move both to one device")


def head(x, weight, bias):
    """Implementation of ``torch.ops.resnet_triton.head``."""
    _check_head(x, weight, bias)
    n, c = x.shape[:2]
    k = weight.shape[0]
    choice = plan.choose_head(n, c, k, x.dtype, _target(x), backend.current_backend(), x.shape[2] * x.shape[3])

    def launch(out: Tensor) -> None:
        from .kernels.head import launch_head

        precision = backend.dot_precision(x.dtype)
        rows, addend = aligned(weight.contiguous()), None if bias is None else bias.contiguous()
        launch_head(nhwc(x), rows, addend, x.new_empty(n, c), out, choice.tiling, precision)

    return _run(
        "head",
        choice,
        lambda: x.new_empty(n, k),
        launch,
        lambda: reference.head(x, weight, bias),
        lambda: plan.cost.head_bytes(n, c, k, x.shape[2] * x.shape[3], x.element_size()),
        weight=weight,
    )


def _fake_head(x, weight, bias):
    _check_head(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def fold_bn(weight, bias, gamma, beta, mean, var, eps):
    """Implementation of ``torch.ops.resnet_triton.fold_bn``."""
    folded, shift = _fake_fold_bn(weight, bias, gamma, beta, mean, var, eps)
    moved = 2 * weight.numel() * weight.element_size()  # PyTorch: rsqrt, four vector steps, two passes over the weight
    choice = plan.choose_step(
        "fold_bn", _target(weight), weight.dtype, backend.current_backend(), (moved, 1), (3 * moved, 7)
    )
    if not choice.fused or Recorder.active:
        eager, shift = reference.fold_bn(weight, bias, gamma, beta, mean, var, eps)
        return (eager if eager.stride() == folded.stride() else folded.copy_(eager)), shift
    from .kernels.batch_norm import launch_fold_bn

    # both layouts keep K outermost and dense, which is all that the kernel asks for
    rows = weight if weight.stride() == folded.stride() else torch.empty_like(folded).copy_(weight)
    bias, gamma, beta, mean, var = dense_vectors((bias, gamma, beta, mean, var))
    launch_fold_bn(rows, bias, gamma, beta, mean, var, eps, folded, shift)
    return folded, shift


def _fake_fold_bn(weight, bias, gamma, beta, mean, var, eps):
    if not weight.is_floating_point():
        raise ValueError(f"weight must be floating point, got {weight.dtype}; convert it with .to()")
    for name, vector in zip(UNIT[1:], (bias, gamma, beta, mean, var), strict=True):
        if vector is not None and tuple(vector.shape) != (weight.shape[0],):
            raise ValueError(f"{name} must be [K] = [{weight.shape[0]}], got {tuple(vector.shape)}")
        if vector is not None and vector.device != weight.device:
            raise ValueError(f"{name} is on {vector.device}, weight on {weight.device}; move both to one device")
    # the weight's own layout if that keeps K outermost
    layout = torch.contiguous_format
    if weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return torch.empty_like(weight, memory_format=layout), weight.new_empty(weight.shape[0])


def _check_add(x, y) -> None:
    if x.shape != y.shape or x.dtype != y.dtype or x.device != y.device:
        raise ValueError(
            f"add_relu takes two tensors of one shape, dtype and device, got {tuple(x.shape)} {x.dtype} {x.device} "
            f"and {tuple(y.shape)} {y.dtype} {y.device}"
        )


def add_relu(x, y):
    """Implementation of ``torch.ops.resnet_triton.add_relu``."""
    _check_add(x, y)
    moved = 3 * x.numel() * x.element_size()
    theirs = moved + 2 * x.numel() * x.element_size()
    choice = plan.choose_step("add_relu", _target(x), x.dtype, backend.current_backend(), (moved, 1), (theirs, 2))

    def launch(out: Tensor) -> None:
        from .kernels.add_relu import launch_add_relu

        launch_add_relu(_dense(x), _dense(y), out)

    return _run(
        "add_relu",
        choice,
        lambda: _fake_add_relu(x, y),
        launch,
        lambda: _dense(reference.add_relu(x, y)),
        lambda: moved if choice.fused else theirs,
    )


def _dense(x: Tensor) -> Tensor:
    """In the layout that ``add_relu`` returns: channels_last for 4-D tensors, contiguous otherwise."""
    return channels_last(x) if x.dim() == 4 else x.contiguous()


def _fake_add_relu(x, y):
    _check_add(x, y)
    return new_channels_last(x, *x.shape) if x.dim() == 4 else x.new_empty(x.shape)


IMPLEMENTATIONS: dict[str, Callable] = {
    "conv_bn_act": conv_bn_act,
    "block_tail": block_tail,
    "bottleneck": bottleneck,
    "stem": stem,
    "head": head,
    "fold_bn": fold_bn,
    "add_relu": add_relu,
}
FAKES: dict[str, Callable] = {
    "conv_bn_act": _fake_conv_bn_act,
    "block_tail": _fake_block_tail,
    "bottleneck": _fake_bottleneck,
    "stem": _fake_stem,
    "head": _fake_head,
    "fold_bn": _fake_fold_bn,
    "add_relu": _fake_add_relu,
}
for _name, _implementation in IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_triton::{_name}", FAKES[_name], lib=library)

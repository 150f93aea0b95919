"""How each step of an operator runs: checked, planned, then launched, handed to the library, or recorded.

A step is one kernel, or the library calls that it replaces. Every activation is channels_last.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backend, onednn, plan, reference
from .devices import Target, target_of
from .kernels.config import Epilogue
from .kernels.geometry import ChainShape, ConvShape, out_size

if TYPE_CHECKING:
    from .chains import Tail
    from .training.plan import Work

UNIT = ("weight", "bias", "gamma", "beta", "mean", "var")
#: bias, gamma, beta, mean, var
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Step:
    """One kernel or library call of an operator, as ``explain`` reports it.

    Args:
        op: what it computes, e.g. ``"conv"`` or ``"max_pool"``.
        weight: the weight whose module names the row, or None.
        shape, epilogue: of a convolution, or the shape of a chain, else None.
        bytes: through device memory, including separate BN, add and ReLU passes where the library runs them.
        choice: how it runs.
        weight_bytes: the weights' share of ``bytes``.
    """

    op: str
    weight: Tensor | None
    shape: ConvShape | ChainShape | None
    epilogue: Epilogue | None
    bytes: int
    choice: plan.Choice
    weight_bytes: int = 0


class Recorder:
    """While active, steps are recorded for one target instead of run; and the ends of blocks, with the last weight.

    ``asked`` holds the :class:`.training.plan.Work` of which a step of training wanted to know how it runs.
    """

    active: Recorder | None = None

    def __init__(self, target: Target) -> None:
        self.target = target
        self.steps: list[Step] = []
        self.tails: list[tuple[Tensor, Tail]] = []
        self.asked: list[Work] = []

    def __enter__(self) -> Recorder:
        Recorder.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Recorder.active = None


def target_for(x: Tensor) -> Target:
    """Where the steps on a tensor run, or the recorder's target."""
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


def run(
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
    weight_bytes: int = 0,
) -> Tensor:
    """Runs a step as chosen (``launch`` fills what ``allocate`` made; ``eager`` returns its own), or records it.

    ``moved`` says how many bytes it moves, ``weight_bytes`` of them weights: only a record needs that.
    """
    if Recorder.active:
        Recorder.active.steps.append(Step(op, weight, shape, epilogue, moved(), choice, weight_bytes))
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


def check_conv(x: Tensor, weight: Tensor, vectors: Vectors, residual: Tensor | None) -> None:
    """Raises ValueError naming the argument, what came, what is allowed, and the way out."""
    check_sizes(x.shape, weight.shape)
    check_types(x, weight)
    check_operands(x, weight, vectors, residual)


def check_sizes(x: Sequence[int], weight: Sequence[int]) -> None:
    """Raises ValueError unless a convolution's input and weight have four sizes and agree in the channels."""
    if len(x) != 4:
        raise ValueError(f"x must be [N, C, H, W], got {tuple(x)}; add a batch dimension with x[None]")
    if len(weight) != 4:
        raise ValueError(f"weight must be [K, C, R, S], got {tuple(weight)}")
    if x[1] != weight[1]:
        raise ValueError(
            f"x has {x[1]} channels, weight expects {weight[1]}; grouped convolutions are not fused: "
            f"use torch.nn.functional.conv2d for those"
        )


def check_types(x: Tensor, weight: Tensor) -> None:
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(
            f"x has dtype {x.dtype}, weight has {weight.dtype}; both must be the same floating type: "
            f"convert one with .to(), or run under torch.autocast"
        )


def check_operands(x: Tensor, weight: Tensor, vectors: Vectors, residual: Tensor | None) -> None:
    """Raises ValueError for vectors or a residual on another device, or of another length or dtype."""
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


def check_slope(slope: Tensor | None, weight: Tensor, relu: bool) -> None:
    """Raises ValueError unless a PReLU has one slope a channel or one for all, and no ReLU comes before it."""
    if slope is None:
        return
    k = weight.shape[0]
    if slope.dim() != 1 or slope.shape[0] not in (1, k):
        raise ValueError(f"slope must be [K] = [{k}] or [1], got {tuple(slope.shape)}")
    if slope.device != weight.device or not slope.is_floating_point():
        raise ValueError(
            f"slope is {slope.dtype} on {slope.device}, weight is on {weight.device}; it must be floating point there"
        )
    if relu:
        raise ValueError("relu=True came with a slope; PReLU takes the place of the ReLU: pass relu=False")


def check_residual(residual: Tensor | None, out: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Raises ValueError unless the residual has the output's shape and dtype."""
    if residual is not None and (residual.shape != out or residual.dtype != dtype):
        raise ValueError(f"residual must be {out} {dtype}, got {tuple(residual.shape)} {residual.dtype}")


@functools.lru_cache(maxsize=4096)
def conv_geometry(
    x: torch.Size, weight: torch.Size, stride: int, padding: int, dilation: int
) -> tuple[ConvShape, tuple[int, int, int, int]]:
    """The convolution and its output's shape, for the shapes of x and weight."""
    check_sizes(x, weight)
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
    residual_bn: tuple[Vectors, float] | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """Runs one convolution with its epilogue as planned; ``vectors`` are bias, gamma, beta, mean, var.

    ``residual_bn`` normalises the residual by vectors and eps of its own, where :func:`.plan.postpones_bn` says so.
    ``slope`` is PReLU's, in place of the ReLU.
    """
    shape, out_shape = conv_geometry(x.shape, weight.shape, stride, padding, dilation)
    check_types(x, weight)
    check_operands(x, weight, vectors, residual)
    check_residual(residual, out_shape, x.dtype)
    normalised, prelu = residual_bn is not None, slope is not None
    epilogue = _epilogue(vectors[4] is not None, vectors[0] is not None, residual is not None, relu, normalised, prelu)
    precision = backend.dot_precision(x.dtype)
    if shape.n == 0 and not Recorder.active:
        return new_channels_last(x, *out_shape)
    choice = plan.choose_conv(shape, epilogue, x.dtype, precision, target_for(x), backend.current_backend())
    if choice.realisation == "onednn" and not Recorder.active:
        return onednn.convolution(x, weight, vectors[0], residual, relu, stride, padding, dilation)
    if choice.realisation == plan.ONE_PASS and not Recorder.active:
        y = torch.conv2d(channels_last(x), weight, None, stride, padding, dilation)
        return bn_act_step(channels_last(y), vectors, residual, eps, relu, slope)

    def launch(out: Tensor) -> None:
        from .kernels.dispatch import launch_conv
        from .kernels.epilogue import Operands

        addend = None if residual is None else nhwc(residual)
        later = None if residual_bn is None else (*dense_vectors(residual_bn[0]), residual_bn[1])
        slopes = None if slope is None else slope.contiguous()
        operands = Operands(addend, *dense_vectors(vectors), eps=eps, relu=relu, residual_bn=later, slope=slopes)
        launch_conv(nhwc(x), nhwc(weight), out.permute(0, 2, 3, 1), shape, operands, choice.tiling, precision)

    def eager() -> Tensor:
        return reference.conv_bn_act(
            channels_last(x), weight, *vectors, residual, eps, relu, stride, padding, dilation, slope
        )

    def moved() -> int:
        return plan.conv_bytes(shape, epilogue, choice, x.element_size())

    def allocate() -> Tensor:
        return _new_conv_output(x, *out_shape)

    weights = shape.weights * x.element_size()
    return run(
        "conv",
        choice,
        allocate,
        launch,
        eager,
        moved,
        weight=weight,
        shape=shape,
        epilogue=epilogue,
        weight_bytes=weights,
    )


def bn_act_step(
    y: Tensor, vectors: Vectors, residual: Tensor | None, eps: float, relu: bool, slope: Tensor | None = None
) -> Tensor:
    """What follows a library's convolution without bias, in place: bias, BN, residual and ReLU or PReLU on a
    channels_last y."""
    from .kernels.bn_act import launch_bn_act
    from .kernels.epilogue import Operands

    addend = None if residual is None else nhwc(residual)
    slopes = None if slope is None else slope.contiguous()
    launch_bn_act(y.permute(0, 2, 3, 1), Operands(addend, *dense_vectors(vectors), eps=eps, relu=relu, slope=slopes))
    return y


# Stem and pooling


def stem_step(x, weight, vectors: Vectors, norm_mean, norm_std, eps, out_shape, pool: bool):
    """Runs the stem's 7x7/2 convolution with BN and ReLU on images, normalised first if asked, and with ``pool`` the
    3x3/2 max-pool: in the same kernel or behind it."""
    n, k, p, q = out_shape
    _, _, h, w = x.shape
    shape = ConvShape(n, h, w, 3, k, 7, 7, 2, 3)
    epilogue = Epilogue(vectors[4] is not None, vectors[0] is not None, False, True)
    dtype, size = weight.dtype, weight.element_size()
    precision = backend.dot_precision(dtype)
    target = target_for(x)
    choice = plan.choose_stem(shape, epilogue, dtype, target, backend.current_backend(), precision, pool)
    pooled = choice.realisation == "stem_pool"

    def launch(y: Tensor) -> None:
        from .kernels import stem as kernels
        from .kernels.epilogue import Operands
        from .kernels.stem_pool import launch_stem_pool

        config = choice.tiling
        cells = kernels.stem_cells(h, w, config.kernel != "conv_pointer")
        xs = torch.empty((n, *cells, 16), dtype=dtype, device=x.device)
        norm = (None if v is None else v.contiguous() for v in (norm_mean, norm_std))
        kernels.launch_space_to_depth(x, xs, *norm)
        packed = torch.empty((k, 4, 4, 16), dtype=dtype, device=x.device)
        kernels.launch_pack_stem_weight(weight, packed)
        operands = Operands(None, *dense_vectors(vectors), eps=eps, relu=True)
        launch_conv = launch_stem_pool if pooled else kernels.launch_stem_conv
        launch_conv(xs, packed, y.permute(0, 2, 3, 1), operands, config, precision)

    def eager() -> Tensor:
        image = channels_last(reference.normalise(x, norm_mean, norm_std, dtype))
        return reference.conv_bn_act(image, weight, *vectors, residual=None, eps=eps, relu=True, stride=2, padding=3)

    def moved() -> int:
        cost = plan.cost
        return cost.stem_bytes(shape, size, pooled) if choice.fused else cost.unfused_bytes(shape, epilogue, size)

    def allocate() -> Tensor:
        height, width = (out_size(p, 3, 2, 1), out_size(q, 3, 2, 1)) if pooled else (p, q)
        return new_channels_last(x, n, k, height, width, dtype)

    op = "stem+pool" if pooled else "stem"
    try:
        y = run(op, choice, allocate, launch, eager, moved, weight=weight, shape=shape, epilogue=epilogue)
    except RuntimeError as error:
        if not pooled or not plan.refuses_overlap(target, error):
            raise
        return stem_step(x, weight, vectors, norm_mean, norm_std, eps, out_shape, pool)
    return max_pool_step(y, 3, 2, 1) if pool and not pooled else y


def max_pool_step(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Max-pools a channels_last activation."""
    n, c, h, w = x.shape
    p, q = out_size(h, kernel, stride, padding), out_size(w, kernel, stride, padding)
    choice = plan.choose_pool(x.numel(), n * c * p * q, x.dtype, target_for(x), backend.current_backend())
    (moved, _), (theirs, _) = plan.pool_work(x.numel(), n * c * p * q, x.element_size())

    def launch(out: Tensor) -> None:
        from .kernels.pool import launch_max_pool

        launch_max_pool(nhwc(x), out.permute(0, 2, 3, 1), kernel, stride, padding)

    return run(
        "max_pool",
        choice,
        lambda: new_channels_last(x, n, c, p, q),
        launch,
        lambda: torch.max_pool2d(x, kernel, stride, padding),
        lambda: moved if choice.fused else theirs,
    )

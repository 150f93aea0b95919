"""How each step of training runs: planned, then launched, handed to the library, or recorded.

Activations are ``[N,C,H,W]`` channels_last, vectors dense and wide (fp32, fp64 beside fp64). A step's meaning is the
function of the same name in :mod:`.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import backend
from ..kernels.geometry import ConvShape, cdiv
from ..plan import Choice
from ..steps import Recorder, Step, conv_geometry, new_channels_last, nhwc, target_for
from . import plan, reference, sync
from .reference import GramBackward, Lazy, wide

T = TypeVar("T")


class Gradient(NamedTuple):
    """The gradient of a raw output: ``dz`` itself, or ``g[0]*dz + g[1] + g[2]*c`` that is not stored."""

    dz: Tensor
    c: Tensor | None = None
    g: Tensor | None = None


def run(
    op: str,
    choice: Choice,
    x: Tensor,
    allocate: Callable[[], T],
    launch: Callable[[T], None],
    eager: Callable[[], T],
    moved: int,
    weight: Tensor | None = None,
    shape: ConvShape | None = None,
) -> T:
    """Runs a step as chosen (``launch`` fills what ``allocate`` made), or records it.

    ``moved`` counts bytes of activations; weights are read besides.
    """
    if Recorder.active:
        weights = 0 if shape is None else shape.weights * x.element_size()
        Recorder.active.steps.append(Step(op, weight, shape, None, moved + weights, choice, weights))
        return allocate()
    if not choice.fused or x.numel() == 0:
        return eager()
    out = allocate()
    launch(out)
    return out


def choose(step: plan.Work, x: Tensor) -> Choice:
    if Recorder.active:
        Recorder.active.asked.append(step)
    return plan.choose(step, x.dtype, backend.dot_precision(x.dtype), target_for(x), backend.current_backend())


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _vector(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=wide(x.dtype), device=x.device)


def _weight(weight: Tensor, x: Tensor) -> Tensor:
    """In the activations' dtype and as K,R,S,C."""
    return weight.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _krsc(weight: Tensor, x: Tensor) -> Tensor:
    return nhwc(_weight(weight.detach(), x))


def _prologue(h: Lazy) -> Any:
    from ..kernels.prologue import Normalised

    return None if h.stats is None else Normalised(h.stats[reference.SCALE], h.stats[reference.SHIFT])


def _precision(x: Tensor) -> str:
    return backend.dot_precision(x.dtype)


# Forward


def conv(
    h: Lazy, weight: Tensor, geometry: Sequence[int], moments: bool, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """A convolution's raw output, ``residual`` added to it, and the moments of that as ``parts`` if asked."""
    x = h.raw
    shape, out_shape = conv_geometry(x.shape, weight.shape, *geometry)
    lazy = h.stats is not None
    added = 0 if residual is None else 1
    choice = choose(plan.Work("conv_stats", shape, prologue=lazy, moments=moments, residual_stride=added), x)
    if not choice.fused:  # in passes of their own
        c = _library_conv(materialised(h), weight, geometry, choice)
        c = c if residual is None else _sum(c, residual)
        return c, moments_of(c) if moments else None
    rows = plan.parts_of("conv_stats", shape, choice, target_for(x))

    def allocate() -> tuple[Tensor, Tensor | None]:
        return new_channels_last(x, *out_shape), _vector(x, rows, 3, shape.k) if moments else None

    def launch(out: tuple[Tensor, Tensor | None]) -> None:
        from ..kernels.conv_stats import launch_conv_stats

        c, parts = out
        addend = None if residual is None else nhwc(residual)
        launch_conv_stats(
            nhwc(x), _krsc(weight, x), nhwc(c), parts, shape, _prologue(h), choice.tiling, _precision(x), addend
        )

    moved = plan.conv_bytes(shape, x.element_size()) + _bytes(residual)
    return run("fprop", choice, x, allocate, launch, allocate, moved, weight, shape)


def _library_conv(h: Lazy, weight: Tensor, geometry: Sequence[int], choice: Choice) -> Tensor:
    x = h.raw
    shape, out_shape = conv_geometry(x.shape, weight.shape, *geometry)
    return run(
        "fprop", _alone(plan.Work("conv_stats", shape), x, choice), x, lambda: new_channels_last(x, *out_shape),
        lambda out: None, lambda: _last(reference.conv(h, _weight(weight, x), geometry)),
        plan.conv_bytes(shape, x.element_size()), weight, shape,
    )  # fmt: skip


def _sum(x: Tensor, y: Tensor) -> Tensor:
    choice, moved = choose(plan.Work("aten", moved=3 * _bytes(x)), x), 3 * _bytes(x)
    return run(
        "add", choice, x, lambda: new_channels_last(x, *x.shape), lambda out: None, lambda: _last(x + y), moved
    )  # fmt: skip


def _alone(work: plan.Work, x: Tensor, choice: Choice) -> Choice:
    """A library's convolution without the passes with which it was compared, for the record."""
    return plan.alone(work, x.dtype, _precision(x), target_for(x), choice) if Recorder.active else choice


def materialised(h: Lazy) -> Lazy:
    """The same, stored."""
    if h.stats is None:
        return h
    return Lazy(bn_apply(h.raw, h.stats, None, None, True))


def moments_of(c: Tensor) -> Tensor:
    """``parts`` of a raw output in a pass of its own."""
    k = c.shape[1]
    moved = _bytes(c)
    choice = choose(plan.Work("moments", moved=moved), c)
    rows = plan.rows_of_parts("moments", c.shape, choice)

    def launch(parts: Tensor) -> None:
        from ..kernels.moments import launch_moments

        launch_moments(nhwc(c).view(-1, k), parts)

    return run("moments", choice, c, lambda: _vector(c, rows, 3, k), launch, lambda: reference.moments(c), moved)


def finalise(parts: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, group: str) -> Tensor:
    """``stats [5, K]`` of all pixels of ``parts``; with a group, of all its members, and the count in a sixth row."""
    k = parts.shape[2]
    if Recorder.active:
        return torch.empty((6 if group else 5, k), dtype=parts.dtype, device=parts.device)
    if group:
        merged = sync.gathered(_merged(parts), group)
        total = reference.merge(merged)
        return torch.cat([reference.stats_of(total, gamma, beta, eps), total[:1]])
    if _kernels_run(parts):
        from ..kernels.finalise import launch_finalise

        stats = torch.empty((5, k), dtype=parts.dtype, device=parts.device)
        launch_finalise(parts, _dense(gamma), _dense(beta), eps, stats, None)
        return stats
    return reference.stats_of(reference.merge(parts), gamma, beta, eps)


def _merged(parts: Tensor) -> Tensor:
    if not _kernels_run(parts):
        return reference.merge(parts)
    from ..kernels.finalise import launch_finalise

    moments = torch.empty_like(parts[0])
    launch_finalise(
        parts, None, None, 0.0, torch.empty((5, parts.shape[2]), dtype=parts.dtype, device=parts.device), moments
    )
    return moments


def _dense(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.detach().contiguous()


def _kernels_run(vector: Tensor) -> bool:
    """Whether the small kernels between the steps run: what has neither pixels nor choices."""
    return vector.dtype == torch.float32 and plan.kernels_run(target_for(vector), backend.current_backend())


def constant_stats(u: Any) -> Tensor:
    """``stats [5, K]`` of a BN whose statistics are constants."""
    return reference.stats_from(u.mean.to(wide(u.mean.dtype)), u.var.to(wide(u.var.dtype)), u.gamma, u.beta, u.eps)


def bn_apply(c: Tensor, stats: Tensor, residual: Tensor | None, residual_stats: Tensor | None, relu: bool) -> Tensor:
    """``[relu](bn(c) + [bn](residual))`` in one pass."""
    moved = 2 * _bytes(c) + _bytes(residual)
    choice = choose(plan.Work("bn_apply", moved=moved), c)

    def launch(y: Tensor) -> None:
        from ..kernels.bn_apply import launch_bn_apply

        addend = None if residual is None else nhwc(residual)
        launch_bn_apply(nhwc(c), stats, addend, residual_stats, relu, nhwc(y))

    return run(
        "bn_apply", choice, c, lambda: new_channels_last(c, *c.shape), launch,
        lambda: _last(reference.bn_apply(c, stats, residual, residual_stats, relu)), moved,
    )  # fmt: skip


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def gram(h: Lazy, stride: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments ``[C, C]`` and sums ``[C]`` of a convolution's input at multiples of its stride."""
    x = h.raw
    n, c, height, width = x.shape
    shape = ConvShape(n, height, width, c, c, stride=stride)
    choice = choose(plan.Work("gram", shape, prologue=h.stats is not None), x)

    def launch(out: tuple[Tensor, Tensor]) -> None:
        from ..kernels.wgrad import launch_gram

        launch_gram(nhwc(x), *out, stride, _prologue(h), choice.tiling, _precision(x))

    moved = shape.pixels_read * c * x.element_size()
    return run(
        "gram", choice, x, lambda: (_vector(x, c, c), _vector(x, c)), launch, lambda: reference.gram(h, stride), moved,
        weight, shape,
    )  # fmt: skip


def gram_stats(
    weight: Tensor, s2: Tensor, s1: Tensor, count: int, gamma: Tensor | None, beta: Tensor | None, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``stats [5, K]`` of a 1x1 convolution from its input's second moments, and an int32 ``[1]``: whether to doubt."""
    k = weight.shape[0]
    if Recorder.active:
        return s2.new_empty(5, k), s2.new_empty(1, dtype=torch.int32)
    rounded = weight.detach().to(dtype).flatten(1)  # what is multiplied with
    if not _kernels_run(s2):
        return reference.gram_stats(rounded, s2, s1, count, gamma, beta, eps)
    from ..kernels.gram_bn import launch_gram_stats

    stats, doubtful = s2.new_empty(5, k), torch.zeros(1, dtype=torch.int32, device=s2.device)
    launch_gram_stats(rounded.contiguous(), s2, s1, count, _dense(gamma), _dense(beta), eps, stats, doubtful)
    return stats, doubtful


def expand(
    h: Lazy,
    weight: Tensor,
    stats: Tensor,
    shortcut: Tensor | None,
    project: tuple[Any, Tensor] | None,
    following: Any = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``relu(bn(conv(h)) + shortcut)`` with statistics known before; ``project`` is a unit and its stats.

    Where one kernel for both is predicted to be faster, also the raw output of ``following``, a unit that reads the
    result, and its stats; else None.
    """
    x = h.raw
    shape, out_shape = conv_geometry(x.shape, weight.shape, 1, 0, 1)
    assert shortcut is not None
    projection = None
    if project is not None:
        projection, _ = conv_geometry(shortcut.shape, project[0].weight.shape, *project[0].geometry)
    work = plan.Work("expand", shape, project=projection)
    filters = 0 if following is None else following.weight.shape[0]
    asked = work, filters, x.dtype, _precision(x), target_for(x), backend.current_backend()
    if filters and backend.chains_allowed() and plan.chains(*asked):
        work = replace(work, following=filters)
    choice = choose(work, x)
    chained = choice.fused and work.following > 0
    n, _, p, q = out_shape

    def allocate() -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, None, None]:
        y = new_channels_last(x, *out_shape)
        if not chained:
            return y, None, None
        rows = plan.parts_of_following(shape, choice.tiling, target_for(x))
        return y, new_channels_last(x, n, filters, p, q), _vector(x, rows, 3, filters)

    def launch(out: tuple[Tensor, Tensor | None, Tensor | None]) -> None:
        from ..kernels.expand import Following, Project, launch_expand

        y, c, parts = out
        then = None
        if c is not None and parts is not None:
            then = Following(_krsc(following.weight, x).view(filters, shape.k), nhwc(c), parts)

        flat = _krsc(weight, x).view(shape.k, shape.c)
        addend: Any = nhwc(shortcut)
        if project is not None and projection is not None:
            u, its = project
            wd = _krsc(u.weight, x).view(shape.k, projection.c)
            addend = Project(addend, wd, its[reference.SCALE], its[reference.SHIFT], projection.stride)
        launch_expand(
            nhwc(x), _prologue(h), flat, _prologue(Lazy(x, stats)), addend, nhwc(y), choice.tiling, _precision(x), then
        )

    def eager() -> tuple[Tensor, None, None]:
        through = None
        if project is not None:
            through = (_weight(project[0].weight, x), project[1], project[0].geometry[0])
        return _last(reference.expand(h, _weight(weight, x), stats, shortcut, through)), None, None

    moved = plan.expand_bytes(shape, x.element_size(), projection) + shape.m * work.following * x.element_size()
    op = "expand+fprop" if chained else "expand"
    y, c, parts = run(op, choice, x, allocate, launch, eager, moved, weight, shape)
    if c is None or parts is None:
        return y, None
    return y, (c, finalise(parts, following.gamma, following.beta, following.eps, ""))


# Backward


def masked(dy: Tensor, y: Tensor | None) -> Tensor:
    """``dy`` where ``y > 0``, else 0; ``dy`` itself without ``y``."""
    if y is None:
        return dy
    choice = choose(plan.Work("aten", moved=3 * _bytes(dy)), dy)
    return run(
        "mask", choice, dy, lambda: new_channels_last(dy, *dy.shape), lambda out: None,
        lambda: _last(reference.masked(dy, y)), 3 * _bytes(dy),
    )  # fmt: skip


def masked_sums(dy: Tensor, y: Tensor | None, c: Tensor, stats: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``dz = dy where y > 0``, and ``[P, 2, C]`` sums of dz and dz * c.

    With ``stats`` instead of ``y``, where ``relu(bn(c)) > 0``; with neither, ``dz`` is ``dy``.
    """
    through = y is not None or stats is not None
    moved = (2 + through) * _bytes(dy) + _bytes(y)
    k = c.shape[1]
    choice = choose(plan.Work("masked_sums", moved=moved), dy)
    rows = plan.rows_of_parts("masked_sums", c.shape, choice)

    def allocate() -> tuple[Tensor, Tensor]:
        return new_channels_last(dy, *dy.shape) if through else dy, _vector(dy, rows, 2, k)

    def launch(out: tuple[Tensor, Tensor]) -> None:
        from ..kernels.train_passes import launch_masked_sums

        dz, parts = (nhwc(out[0]) if through else None), out[1]
        sign = nhwc(y) if y is not None else _prologue(Lazy(c, stats))
        launch_masked_sums(nhwc(dy), sign, nhwc(c), dz, parts)

    def eager() -> tuple[Tensor, Tensor]:
        sign = reference.affine(c, stats) if stats is not None else y
        dz = dy if sign is None else _last(reference.masked(dy, sign))
        return dz, reference.sums(dz, c)

    return run("masked_sums", choice, dy, allocate, launch, eager, moved)


def bn_gradients(parts: Tensor, stats: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """``(g [3, C], dgamma, dbeta)`` from sums ``[P, 2, C]``; ``count`` 0 means constant statistics.

    With a group, the gradient of the input takes the sums of all its members, that of the parameters this one's.
    """
    if Recorder.active:
        c = parts.shape[2]
        return parts.new_empty(3, c), parts.new_empty(c), parts.new_empty(c)
    if group:
        total = parts.sum(0)
        _, dgamma, dbeta = reference.bn_gradients(total, stats, count)
        everywhere = sync.summed(total, group)
        _, all_gamma, all_beta = reference.bn_gradients(everywhere, stats, count)
        return reference.gradient_vectors(stats, all_gamma, all_beta, stats[5]), dgamma, dbeta
    if not _kernels_run(parts):
        return reference.bn_gradients(parts.sum(0), stats, count)
    from ..kernels.train_passes import launch_bn_gradients

    c = parts.shape[2]
    g, dgamma, dbeta = parts.new_empty(3, c), parts.new_empty(c), parts.new_empty(c)
    launch_bn_gradients(parts, stats, count, g, dgamma, dbeta)
    return g, dgamma, dbeta


def settled(
    dc: Gradient, h: Lazy, weight: Tensor, geometry: Sequence[int], wants: Sequence[bool], residual_stride: int
) -> Gradient:
    """The gradient as its readers want it: stored once, unless all of them form it as they load it.

    ``wants`` says whether a dgrad and a wgrad follow, ``residual_stride`` what the dgrad adds (0 for nothing).
    """
    x = h.raw
    shape, _ = conv_geometry(x.shape, weight.shape, *geometry)
    lazy = h.stats is not None
    works = (
        plan.Work("dgrad", shape, prologue=lazy, backward=True, moments=lazy, residual_stride=residual_stride),
        plan.Work("wgrad", shape, prologue=lazy, backward=True),
    )
    pointwise = shape.r == shape.s == 1 and shape.padding == 0  # else each tap would repeat it
    readers = [choose(work, x).fused for work, wanted in zip(works, wants, strict=True) if wanted and pointwise]
    return dc if pointwise and all(readers) else bn_backward(dc)


def bn_backward(dc: Gradient) -> Gradient:
    """The gradient of a raw output, stored."""
    dz, c, g = dc
    if c is None or g is None:
        return dc
    moved = 3 * _bytes(dz)
    choice = choose(plan.Work("bn_backward", moved=moved), dz)

    def launch(out: Tensor) -> None:
        from ..kernels.train_passes import launch_bn_backward

        launch_bn_backward(nhwc(dz), nhwc(c), g, nhwc(out))

    def eager() -> Tensor:
        return _last(reference.bn_backward(dz, c, g))

    return Gradient(run("bn_backward", choice, dz, lambda: new_channels_last(dz, *dz.shape), launch, eager, moved))


def _backward_prologue(dc: Gradient) -> Any:
    if dc.c is None or dc.g is None:
        return None
    from ..kernels.prologue import BNBackward

    return BNBackward(nhwc(dc.c), dc.g)


def wgrad(dc: Gradient, h: Lazy, weight: Tensor, geometry: Sequence[int]) -> Tensor:
    """Gradient of a convolution's weight, in its shape and the wide dtype."""
    x = h.raw
    shape, _ = conv_geometry(x.shape, weight.shape, *geometry)
    choice = choose(plan.Work("wgrad", shape, prologue=h.stats is not None, backward=dc.c is not None), x)
    if not choice.fused:
        dc, h, choice = bn_backward(dc), materialised(h), _alone(plan.Work("wgrad", shape), x, choice)

    def allocate() -> Tensor:
        k, c, r, s = weight.shape
        return _vector(x, k, r, s, c).permute(0, 3, 1, 2)

    def launch(out: Tensor) -> None:
        from ..kernels.wgrad import launch_wgrad

        launch_wgrad(
            nhwc(dc.dz), nhwc(x), out.permute(0, 2, 3, 1), None, shape, _backward_prologue(dc), _prologue(h),
            choice.tiling, _precision(x),
        )  # fmt: skip

    moved = plan.wgrad_bytes(shape, x.element_size(), dc.c is not None)
    return run(
        "wgrad", choice, x, allocate, launch,
        lambda: _last(reference.wgrad(dc.dz, h, _weight(weight, x), geometry)), moved, weight, shape,
    )  # fmt: skip


def matrix_wgrad(dz: Tensor, h: Lazy, stride: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``(dz^T a [K, C], sums of dz [K])`` of a 1x1 convolution, wide."""
    x = h.raw
    shape, _ = conv_geometry(x.shape, weight.shape, stride, 0, 1)
    choice = choose(plan.Work("wgrad", shape, prologue=h.stats is not None, moments=True), x)

    def allocate() -> tuple[Tensor, Tensor]:
        return _vector(x, shape.k, shape.c), _vector(x, shape.k)

    def launch(out: tuple[Tensor, Tensor]) -> None:
        from ..kernels.wgrad import launch_wgrad

        launch_wgrad(
            nhwc(dz), nhwc(x), out[0].view(shape.k, 1, 1, shape.c), out[1], shape, None, _prologue(h), choice.tiling,
            _precision(x),
        )  # fmt: skip

    moved = plan.wgrad_bytes(shape, x.element_size(), False)
    return run(
        "wgrad", choice, x, allocate, launch, lambda: reference.matrix_wgrad(dz, h, stride), moved, weight, shape
    )


def gram_backward(
    weight: Tensor, g: Tensor, sdz: Tensor, s2: Tensor, s1: Tensor, count: int, stats: Tensor, dtype: torch.dtype
) -> GramBackward:
    """Gradients of the parameters in the Gram form, and the matrices of its dgrad."""
    rounded = weight.detach().to(dtype).flatten(1)
    k, c = rounded.shape
    if Recorder.active or _kernels_run(s2):
        new, low = s2.new_empty, rounded.new_empty
        out = GramBackward(new(k, c), new(k), new(k), low(k, c), low(c, c), new(c), new(c))
        if not Recorder.active:
            from ..kernels.gram_bn import launch_gram_backward

            launch_gram_backward(rounded.contiguous(), g, sdz, s2, s1, count, stats, *out)
        return out
    return reference.gram_backward(rounded, g, sdz, s2, s1, count, stats)


def gram_dgrad(
    dz: Tensor, back: GramBackward, h: Lazy, stride: int, mask: bool, sums: bool, weight: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradient of a 1x1 convolution's input in the Gram form (compact where it has a stride), and sums of it."""
    x = h.raw
    n, _, p, q = dz.shape
    shape, _ = conv_geometry(x.shape, weight.shape, stride, 0, 1)
    choice = choose(plan.Work("gram_dgrad", shape, prologue=h.stats is not None), x)
    rows = plan.parts_of("gram_dgrad", shape, choice, target_for(x))

    def allocate() -> tuple[Tensor, Tensor | None]:
        return new_channels_last(x, n, shape.c, p, q), _vector(x, rows, 2, shape.c) if sums else None

    def launch(out: tuple[Tensor, Tensor | None]) -> None:
        from ..kernels.gram_dgrad import launch_gram_dgrad

        d, parts = out
        launch_gram_dgrad(
            nhwc(dz).view(shape.m, shape.k), None, back.wp, nhwc(x), _prologue(h), back.mm, back.rho, back.v,
            nhwc(d).view(shape.m, shape.c), parts, mask, stride, choice.tiling, _precision(x),
        )  # fmt: skip

    moved = plan.gram_dgrad_bytes(shape, x.element_size())
    return run(
        "gram_dgrad", choice, x, allocate, launch,
        lambda: _lasts(reference.gram_dgrad(dz, back, h, stride, mask, sums)), moved, weight, shape,
    )  # fmt: skip


def _lasts(pair: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    return _last(pair[0]), pair[1]


def dgrad(
    dc: Gradient, weight: Tensor, geometry: Sequence[int], h: Lazy, residual: Tensor | None, residual_stride: int,
    sign: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradient of a convolution's input behind the ReLU of ``h``, with ``[P, 2, C]`` sums of it and of it * raw.

    Where ``h`` is a stored input, there are no sums, and the gradient is zeroed where ``sign`` is not positive.
    """
    x = h.raw
    shape, _ = conv_geometry(x.shape, weight.shape, *geometry)
    lazy = h.stats is not None
    work = plan.Work(
        "dgrad", shape, prologue=lazy, backward=dc.c is not None, moments=lazy,
        residual_stride=0 if residual is None else residual_stride,
    )  # fmt: skip
    choice = choose(work, x)
    if not choice.fused:
        return _library_dgrad(bn_backward(dc), weight, geometry, h, residual, residual_stride, sign, choice, shape)
    rows = plan.parts_of("dgrad", shape, choice, target_for(x), work.residual_stride)

    def allocate() -> tuple[Tensor, Tensor | None]:
        return new_channels_last(x, *x.shape), _vector(x, rows, 2, shape.c) if lazy else None

    def launch(out: tuple[Tensor, Tensor | None]) -> None:
        from ..kernels.dgrad import launch_dgrad

        mask: Any = None if sign is None else nhwc(sign)
        if lazy:
            mask = (nhwc(x), _prologue(h))
        d, parts = out
        launch_dgrad(
            nhwc(dc.dz), _krsc(weight, x), nhwc(d), shape, _backward_prologue(dc), mask,
            None if residual is None else nhwc(residual), residual_stride, parts, choice.tiling, _precision(x),
        )  # fmt: skip

    added = 0 if residual is None else residual.numel()
    moved = plan.dgrad_bytes(shape, x.element_size(), dc.c is not None, added, lazy or sign is not None)
    return run("dgrad", choice, x, allocate, launch, allocate, moved, weight, shape)


def _library_dgrad(
    dc: Gradient, weight: Tensor, geometry: Sequence[int], h: Lazy, residual: Tensor | None, residual_stride: int,
    sign: Tensor | None, choice: Choice, shape: ConvShape,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    x = h.raw
    moved = plan.dgrad_bytes(shape, x.element_size(), False, 0, False) + 2 * _bytes(residual)
    alone = _alone(plan.Work("dgrad", shape, residual_stride=0 if residual is None else residual_stride), x, choice)
    d = run(
        "dgrad", alone, x, lambda: new_channels_last(x, *x.shape), lambda out: None,
        lambda: _last(reference.dgrad(dc.dz, _weight(weight, x), geometry, x, residual, residual_stride)),
        moved, weight, shape,
    )  # fmt: skip
    if h.stats is None:
        return masked(d, sign), None
    return masked_sums(d, None, x, h.stats)


# Stem


def stem_conv(x: Tensor, weight: Tensor, moments: bool) -> tuple[Tensor, Tensor | None]:
    """The 7x7/2 convolution's raw output on images of any layout, and its moments if asked."""
    shape, (n, k, p, q) = conv_geometry(x.shape, weight.shape, 2, 3, 1)
    choice = choose(plan.Work("stem_conv_stats", shape, moments=moments), x)
    rows = plan.parts_of("stem_conv_stats", shape, choice, target_for(x))

    def allocate() -> tuple[Tensor, Tensor | None]:
        return new_channels_last(x, n, k, p, q), _vector(x, rows, 3, k) if moments else None

    def launch(out: tuple[Tensor, Tensor | None]) -> None:
        from ..kernels.stem_train import launch_stem_conv_stats

        c, parts = out
        packed = _packed(weight, x)
        launch_stem_conv_stats(_cells(x, shape), packed, nhwc(c), parts, choice.tiling, _precision(x))

    def eager() -> tuple[Tensor, Tensor | None]:
        c = _last(reference.conv(Lazy(_last(x)), _weight(weight, x), (2, 3, 1)))
        return c, (moments_of(c) if moments else None)

    moved = (plan.stem_bytes if choice.fused else plan.conv_bytes)(shape, x.element_size())
    return run("stem", choice, x, allocate, launch, eager, moved, weight, shape)


def _cells(x: Tensor, shape: ConvShape) -> Tensor:
    from ..kernels.stem import launch_space_to_depth, stem_cells

    cells = torch.empty((shape.n, *stem_cells(shape.h, shape.w, True), 16), dtype=x.dtype, device=x.device)
    launch_space_to_depth(x, cells)
    return cells


def _packed(weight: Tensor, x: Tensor) -> Tensor:
    from ..kernels.stem import launch_pack_stem_weight

    packed = torch.empty((weight.shape[0], 4, 4, 16), dtype=x.dtype, device=x.device)
    launch_pack_stem_weight(weight.detach(), packed)
    return packed


def bn_relu_pool(h: Lazy) -> Tensor:
    """3x3/2 max-pool of BN and ReLU in one pass."""
    c = h.raw
    n, k, height, width = c.shape
    out = (n, k, cdiv(height, 2), cdiv(width, 2))
    moved = _bytes(c) + n * k * out[2] * out[3] * c.element_size()
    choice = choose(plan.Work("bn_relu_pool", moved=moved), c)

    def launch(y: Tensor) -> None:
        from ..kernels.bn_relu_pool import launch_bn_relu_pool

        assert h.stats is not None
        launch_bn_relu_pool(nhwc(c), h.stats[reference.SCALE], h.stats[reference.SHIFT], nhwc(y))

    return run(
        "bn_relu_pool", choice, c, lambda: new_channels_last(c, *out), launch,
        lambda: _last(reference.bn_relu_pool(h)), moved,
    )  # fmt: skip


def bn_relu_pool_backward(dy: Tensor, h: Lazy) -> tuple[Tensor, Tensor]:
    """The gradient of the BN's output behind max-pool and ReLU, and ``[P, 2, C]`` sums of it and of it * raw."""
    c = h.raw
    k = c.shape[1]
    moved = _bytes(dy) + 2 * _bytes(c)
    choice = choose(plan.Work("bn_relu_pool_backward", moved=moved), c)
    rows = plan.rows_of_parts("bn_relu_pool_backward", c.shape, choice)

    def launch(out: tuple[Tensor, Tensor]) -> None:
        from ..kernels.bn_relu_pool import launch_bn_relu_pool_backward

        assert h.stats is not None
        scale, shift = h.stats[reference.SCALE], h.stats[reference.SHIFT]
        launch_bn_relu_pool_backward(nhwc(dy), nhwc(c), scale, shift, nhwc(out[0]), out[1])

    def eager() -> tuple[Tensor, Tensor]:
        dz = _last(reference.bn_relu_pool_backward(dy, h))
        return dz, reference.sums(dz, c)

    return run(
        "bn_relu_pool_backward", choice, c, lambda: (new_channels_last(c, *c.shape), _vector(c, rows, 2, k)), launch,
        eager, moved,
    )  # fmt: skip


def stem_wgrad(dc: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the stem's weight, in its shape and the wide dtype."""
    shape, _ = conv_geometry(x.shape, weight.shape, 2, 3, 1)
    choice = choose(plan.Work("stem_wgrad", shape), x)

    def launch(out: Tensor) -> None:
        from ..kernels.stem_train import launch_stem_wgrad

        launch_stem_wgrad(nhwc(dc), _cells(x, shape), out, choice.tiling, _precision(x))

    moved = (plan.stem_wgrad_bytes if choice.fused else plan.conv_bytes)(shape, x.element_size())
    return run(
        "stem_wgrad", choice, x,
        lambda: torch.empty_strided(weight.shape, weight.stride(), dtype=wide(x.dtype), device=x.device), launch,
        lambda: _last(reference.wgrad(dc, Lazy(_last(x)), _weight(weight, x), (2, 3, 1))), moved, weight, shape,
    )  # fmt: skip

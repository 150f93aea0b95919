"""The ``torch.ops.resnet_triton`` operators of training: a block's forward and backward, and the stem's.

As in :mod:`resnet_triton.ops`, a graph never depends on the plan. What depends on it is what a kernel does, not which
tensors there are: that follows from :class:`.block.Form`, which is part of the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..functional import autocast_dtype
from ..ops import FAKES, IMPLEMENTATIONS, library
from ..steps import channels_last, check_sizes, conv_out_shape, new_channels_last
from . import block, stem
from .block import Ahead, Form, Needs, Saved, Unit
from .reference import wide

UNIT = ("weight", "gamma", "beta", "mean", "var")
FLAGS = ("relu", "own_shortcut", "gram", "masked_grad", "mask_input", "following")

library.define(
    "train_block(Tensor x, Tensor? shortcut, Tensor?[] tensors, float[] eps, int[] geometry, bool project, "
    "bool[] flags, str group, Tensor[] ahead) -> Tensor[]"
)
library.define(
    "train_block_backward(Tensor grad, Tensor x, Tensor? shortcut, Tensor?[] tensors, Tensor[] saved, float[] eps, "
    "int[] geometry, bool project, bool[] flags, str group, bool[] needs) -> Tensor[]"
)
library.define(
    "train_stem(Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, float eps, str group) "
    "-> Tensor[]"
)
library.define(
    "train_stem_backward(Tensor grad, Tensor x, Tensor weight, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? var, "
    "Tensor[] saved, float eps, str group, bool[] needs) -> Tensor[]"
)


def units_of(tensors: Sequence[Tensor | None], eps: Sequence[float], geometry: Sequence[int]) -> list[Unit]:
    """The units of flat lists: five tensors, an eps and three integers each."""
    n = len(eps)
    if n == 0 or len(tensors) != len(UNIT) * n or len(geometry) != 3 * n:
        raise ValueError(
            f"{n} eps need {len(UNIT) * n} tensors ({', '.join(UNIT)} each) and {3 * n} geometry values, "
            f"got {len(tensors)} and {len(geometry)}"
        )
    units = []
    for i in range(n):
        weight, gamma, beta, mean, var = tensors[5 * i : 5 * i + 5]
        if weight is None or (mean is None) != (var is None):
            raise ValueError(f"unit {i} needs a weight, and mean and var both or neither")
        stride, padding, dilation = geometry[3 * i : 3 * i + 3]
        units.append(Unit(weight, gamma, beta, mean, var, eps[i], (stride, padding, dilation)))
    return units


def _parts(tensors, eps, geometry, project: bool, flags, group: str) -> tuple[list[Unit], Unit | None, Form]:
    units = units_of(tensors, eps, geometry)
    shortcut = units.pop() if project else None
    if not units:
        raise ValueError("project is set, but the only unit is the projection's")
    return units, shortcut, Form(**dict(zip(FLAGS, flags, strict=True)), group=group)


def _check(x: Tensor, shortcut: Tensor | None, units: Sequence[Unit], project: Unit | None, form: Form) -> list[tuple]:
    """The shape of each raw output, the projection's last; raises ValueError naming what does not fit."""
    shapes, size = [], tuple(x.shape)
    for i, u in enumerate(units):
        shapes.append(check_unit(f"unit {i}", size, u, x))
        size = shapes[-1]
    added: tuple | None = tuple(x.shape) if form.own_shortcut else None if shortcut is None else tuple(shortcut.shape)
    if project is not None:
        if added is None:
            raise ValueError("there is a projection, but no shortcut to project; pass shortcut, or set own_shortcut")
        shapes.append(check_unit("the projection", added, project, x))
        added = shapes[-1]
    if added is not None and added != shapes[len(units) - 1]:
        raise ValueError(f"the shortcut has shape {added}, the block computes {shapes[len(units) - 1]}")
    if shortcut is not None and (shortcut.dtype != x.dtype or shortcut.device != x.device):
        raise ValueError(f"shortcut is {shortcut.dtype} on {shortcut.device}, x is {x.dtype} on {x.device}")
    every = [*units, project] if project is not None else units
    for u, (n, k, p, q) in zip(every, shapes, strict=True):
        if u.by_batch and form.group == "" and isinstance(n * p * q, int) and n * p * q <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {(n, k, p, q)}")
    return shapes


def check_unit(name: str, size: tuple, u: Unit, x: Tensor) -> tuple:
    check_sizes(size, u.weight.shape)
    if not x.is_floating_point() or not u.weight.is_floating_point():
        raise ValueError(f"{name}: x is {x.dtype}, the weight {u.weight.dtype}; both must be floating point")
    k = u.weight.shape[0]
    for what, tensor in zip(UNIT, u[:5], strict=True):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: {what} is on {tensor.device}, x on {x.device}; move both to one device")
        if what != "weight" and tensor is not None and tuple(tensor.shape) != (k,):
            raise ValueError(f"{name}: {what} must be [K] = [{k}], got {tuple(tensor.shape)}")
    return conv_out_shape(size, u.weight.shape, *u.geometry)


def uncast(f: Callable) -> Callable:
    """An implementation in which autocast is off: products of vectors and moments stay in their wide dtype."""

    @functools.wraps(f)
    def run(x: Tensor, *arguments):
        if autocast_dtype(x) is None:
            return f(x, *arguments)
        with torch.autocast(x.device.type, enabled=False):
            return f(x, *arguments)

    return run


@uncast
def train_block(x, shortcut, tensors, eps, geometry, project, flags, group, ahead):
    """Implementation of ``torch.ops.resnet_triton.train_block``.

    The output and what the backward needs besides the inputs, which :func:`.block.given` puts together; then, with the
    flag ``following``, raw output and stats of the last of ``tensors``' units, which reads this block's output.
    """
    units, following, projection, form = _forward_parts(tensors, eps, geometry, project, flags, group)
    shapes = _check(x, shortcut, units, projection, form)
    _check_ahead(ahead, units, shapes, following)
    x = channels_last(x)
    shortcut = None if shortcut is None else channels_last(shortcut)
    known = Ahead(*ahead) if ahead else None
    saved, then = block.forward(x, shortcut, units, projection, form, known, following)
    flat = saved.flat()
    if known is not None:  # an operator's results are its own
        stored = len(units) - form.gram
        flat = [flat[0], *flat[2 : 1 + stored], *flat[2 + stored :]]
    return flat if then is None else [*flat, *then]


def _forward_parts(tensors, eps, geometry, project, flags, group):
    """Units, what follows them or None, projection or None, and form."""
    if not flags[FLAGS.index("following")]:
        units, projection, form = _parts(tensors, eps, geometry, project, flags, group)
        return units, None, projection, form
    following = units_of(tensors[-5:], eps[-1:], geometry[-3:])[0]
    units, projection, form = _parts(tensors[:-5], eps[:-1], geometry[:-3], project, flags, group)
    return units, following, projection, form


def _check_ahead(ahead, units: Sequence[Unit], shapes: Sequence[tuple], following: Unit | None) -> None:
    if ahead and (len(ahead) != 2 or tuple(ahead[0].shape) != shapes[0]):
        raise ValueError(f"ahead must be the first raw output {shapes[0]} and its stats, got {len(ahead)} tensors")
    if following is None:
        return
    k, last = following.weight.shape[1], shapes[len(units) - 1][1]
    if not following.pointwise or following.geometry[0] != 1 or not following.by_batch or k != last:
        raise ValueError(
            f"what follows must be a 1x1 convolution of stride 1 on {last} channels with batch statistics, "
            f"got a weight {tuple(following.weight.shape)} with stride, padding, dilation {following.geometry}"
        )


def backward_arguments(grad: Tensor, forward: Sequence, out: Sequence[Tensor], need_x: bool) -> tuple:
    """Arguments of ``train_block_backward`` that ask for every gradient, from the forward's arguments and results."""
    x, shortcut, tensors, eps, geometry, project, flags, group, ahead = forward
    form = Form(**dict(zip(FLAGS, flags, strict=True)))
    n = len(eps) - form.following
    saved = block.given(out, ahead, n - project, form)
    needs = [need_x, shortcut is not None] + [True] * (3 * n)
    return (grad, x, shortcut, tensors[: 5 * n], saved, eps[:n], geometry[: 3 * n], project, flags, group, needs)


def _fake_train_block(x, shortcut, tensors, eps, geometry, project, flags, group, ahead):
    units, following, projection, form = _forward_parts(tensors, eps, geometry, project, flags, group)
    shapes = _check(x, shortcut, units, projection, form)
    _check_ahead(ahead, units, shapes, following)
    n, vector = len(units), wide(x.dtype)
    projections = [] if projection is None else [projection]

    def new(*shape):
        return x.new_empty(shape, dtype=vector)

    raws = [new_channels_last(x, *shape) for shape in shapes]
    rows = 6 if group else 5
    stats = [new(rows if u.by_batch else 5, u.weight.shape[0]) for u in (*units, *projections)]
    ends = [units[-1], *projections] if form.gram else []
    grams = [(new(u.weight.shape[1], u.weight.shape[1]), new(u.weight.shape[1])) for u in ends]
    saved = Saved(
        new_channels_last(x, *shapes[n - 1]), raws[: n - form.gram], raws[n] if project and not form.gram else None,
        grams, stats[:n], stats[n] if project else None,
    )  # fmt: skip
    flat = saved.flat()
    if ahead:
        stored = n - form.gram
        flat = [flat[0], *flat[2 : 1 + stored], *flat[2 + stored :]]
    if following is not None:
        k = following.weight.shape[0]
        size, _, p, q = shapes[n - 1]
        flat += [new_channels_last(x, size, k, p, q), new(rows, k)]
    return flat


def _needs(flat: Sequence[bool], shortcut: Tensor | None) -> Needs:
    units = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(2, len(flat), 3)]
    return Needs(flat[0], flat[1] and shortcut is not None, tuple(units))


@uncast
def train_block_backward(grad, x, shortcut, tensors, saved, eps, geometry, project, flags, group, needs):
    """Implementation of ``torch.ops.resnet_triton.train_block_backward``; what is not needed is an empty tensor."""
    units, projection, form = _parts(tensors, eps, geometry, project, flags, group)
    wanted = _needs(needs, shortcut)
    kept = block.saved_of(saved, len(units), project, form.gram)
    x = channels_last(x)
    shortcut = None if shortcut is None else channels_last(shortcut)
    grads = block.backward(channels_last(grad), x, shortcut, units, projection, kept, form, wanted)
    every = [*units, *([projection] if projection is not None else [])]
    through = grads.shortcut.clone() if grads.shortcut is grad else grads.shortcut  # an operator's result is its own
    out = [or_empty(grads.x, x), or_empty(through, x)]
    for u, (dw, dgamma, dbeta) in zip(every, grads.units, strict=True):
        out += [as_parameter(dw, u.weight, x), as_parameter(dgamma, u.gamma, x), as_parameter(dbeta, u.beta, x)]
    return out


def or_empty(grad: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if grad is None else channels_last(grad)


def as_parameter(grad: Tensor | None, parameter: Tensor | None, x: Tensor) -> Tensor:
    """A gradient with its parameter's dtype and strides, as DDP's buckets expect; empty where there is none."""
    if grad is None or parameter is None:
        return x.new_empty(0)
    if grad.dtype == parameter.dtype:
        strides = zip(grad.shape, grad.stride(), parameter.stride(), strict=True)
        if all(ours == theirs for size, ours, theirs in strides if size > 1):
            return grad.as_strided(parameter.shape, parameter.stride())
    return torch.empty_strided(grad.shape, parameter.stride(), dtype=parameter.dtype, device=grad.device).copy_(grad)


def _fake_train_block_backward(grad, x, shortcut, tensors, saved, eps, geometry, project, flags, group, needs):
    units, projection, form = _parts(tensors, eps, geometry, project, flags, group)
    wanted = _needs(needs, shortcut)
    out = [new_channels_last(x, *x.shape) if wanted.x else x.new_empty(0)]
    given = wanted.shortcut and not form.own_shortcut
    out.append(new_channels_last(shortcut, *shortcut.shape) if given else x.new_empty(0))
    every = [*units, *([projection] if projection is not None else [])]
    for u, flags_of_unit in zip(every, wanted.units, strict=True):
        out += [empty_of(t if need else None, x) for t, need in zip(u[:3], flags_of_unit, strict=True)]
    return out


def empty_of(parameter: Tensor | None, x: Tensor) -> Tensor:
    """Uninitialised, as a parameter's gradient; empty where there is none."""
    if parameter is None:
        return x.new_empty(0)
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=x.device)


@uncast
def train_stem(x, weight, gamma, beta, mean, var, eps, group):
    """Implementation of ``torch.ops.resnet_triton.train_stem``: ``[y, c, stats]``."""
    u = Unit(weight, gamma, beta, mean, var, eps, stem.GEOMETRY)
    _check(x, None, [u], None, Form(group=group))
    return stem.forward(x, u, group)


def _fake_train_stem(x, weight, gamma, beta, mean, var, eps, group):
    u = Unit(weight, gamma, beta, mean, var, eps, stem.GEOMETRY)
    ((n, k, p, q),) = _check(x, None, [u], None, Form(group=group))
    pooled = new_channels_last(x, n, k, (p - 1) // 2 + 1, (q - 1) // 2 + 1)
    stats = x.new_empty((6 if group and mean is None else 5, k), dtype=wide(x.dtype))
    return [pooled, new_channels_last(x, n, k, p, q), stats]


@uncast
def train_stem_backward(grad, x, weight, gamma, beta, mean, var, saved, eps, group, needs):
    """Implementation of ``torch.ops.resnet_triton.train_stem_backward``: gradients of x, weight, gamma, beta."""
    u = Unit(weight, gamma, beta, mean, var, eps, stem.GEOMETRY)
    _, raw, stats = saved
    dx, dw, dgamma, dbeta = stem.backward(channels_last(grad), x, u, raw, stats, group, needs)
    vectors = (as_parameter(dgamma, gamma, x), as_parameter(dbeta, beta, x))
    return [or_empty(dx, x), as_parameter(dw, weight, x), *vectors]


def _fake_train_stem_backward(grad, x, weight, gamma, beta, mean, var, saved, eps, group, needs):
    out = [new_channels_last(x, *x.shape) if needs[0] else x.new_empty(0)]
    return out + [empty_of(t if need else None, x) for t, need in zip((weight, gamma, beta), needs[1:], strict=True)]


_IMPLEMENTATIONS: dict[str, Callable] = {
    "train_block": train_block,
    "train_block_backward": train_block_backward,
    "train_stem": train_stem,
    "train_stem_backward": train_stem_backward,
}
_FAKES: dict[str, Callable] = {
    "train_block": _fake_train_block,
    "train_block_backward": _fake_train_block_backward,
    "train_stem": _fake_train_stem,
    "train_stem_backward": _fake_train_stem_backward,
}
IMPLEMENTATIONS.update(_IMPLEMENTATIONS)
FAKES.update(_FAKES)
for _name, _implementation in _IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_triton::{_name}", _FAKES[_name], lib=library)

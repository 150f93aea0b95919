"""A pre-activation block in training mode, forward and backward, and its operators.

    h_0 = relu(bn_0(x));   c_i = conv_i(h_{i-1});   h_i = relu(bn_i(c_i)), never stored
    y = c_n + x

The last convolution adds x before it stores its output, and takes the statistics of the sum, which the block behind
begins with; where none is in front, a pass takes them. What is kept for the backward is x and the raw outputs but the
last. Without convolutions, ``y = relu(bn_0(x))``. The steps are those of :mod:`.steps`, their meaning as in
:mod:`.block`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..functional import ConvBN, differentiating, distinct
from ..ops import FAKES, IMPLEMENTATIONS, library
from ..steps import channels_last, new_channels_last, nhwc
from ..structure import eps_of, uses_batch_statistics
from . import block, plan, reference, steps
from .block import Form, Unit
from .functions import refuse_second_derivatives
from .modules import Norm, cast_input, group_of, pixels_of, tensors_of, update_running
from .ops import as_parameter, check_unit, empty_of, or_empty, uncast, units_of
from .reference import Lazy, wide

ops = torch.ops.resnet_triton

library.define(
    "train_preact(Tensor x, Tensor?[] lead, float lead_eps, Tensor?[] tensors, float[] eps, int[] geometry, str group, "
    "Tensor? known, Tensor?[] following, float following_eps) -> Tensor[]"
)
library.define(
    "train_preact_backward(Tensor grad, Tensor x, Tensor?[] lead, float lead_eps, Tensor?[] tensors, Tensor[] saved, "
    "float[] eps, int[] geometry, str group, bool[] needs) -> Tensor[]"
)


class Lead(NamedTuple):
    """The BN in front: gamma and beta ``[C]`` or None, constant mean and var or None for those of the batch, eps."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


def forward(
    x: Tensor,
    lead: Lead,
    units: Sequence[Unit],
    group: str,
    known: Tensor | None = None,
    following: Lead | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output; the raw outputs of all convolutions but the last; and the stats of each BN, that in front first.

    Args:
        x: ``[N, C, H, W]``.
        lead: the BN in front.
        units: convolutions with the BN behind each; the last, whose statistics are the constants 0 and 1, has none.
        group: name of the process group that shares batch statistics, or ``""``.
        known: stats of the BN in front, if the block before took them.
        following: the BN behind this block, whose stats come last then; it has batch statistics.
    """
    if known is not None:
        its = known
    elif lead.mean is None:
        its = steps.finalise(steps.moments_of(x), lead.gamma, lead.beta, lead.eps, group)
    else:
        its = steps.constant_stats(lead)
    if not units:
        return steps.bn_apply(x, its, None, None, True), [], [its]
    h, raws, stats = Lazy(x, its), [], [its]
    for u in units[:-1]:
        c, its = block.unit_forward(h, u, group)
        raws.append(c)
        stats.append(its)
        h = Lazy(c, its)
    last = units[-1]
    if last.beta is None:
        y, parts = steps.conv(h, last.weight, last.geometry, following is not None, x)
    else:  # the bias of a folded convolution
        c, _ = steps.conv(h, last.weight, last.geometry, False)
        y = steps.bn_apply(c, steps.constant_stats(last), x, None, False)
        parts = None if following is None else steps.moments_of(y)
    if following is not None and parts is not None:
        stats.append(steps.finalise(parts, following.gamma, following.beta, following.eps, group))
    return y, raws, stats


class Gradients(NamedTuple):
    """Of x, of gamma and beta of the BN in front, and of weight, gamma and beta of each unit."""

    x: Tensor | None
    lead: tuple[Tensor | None, Tensor | None]
    units: list[tuple[Tensor | None, Tensor | None, Tensor | None]]


def backward(
    grad: Tensor,
    x: Tensor,
    lead: Lead,
    units: Sequence[Unit],
    raws: Sequence[Tensor],
    stats: Sequence[Tensor],
    group: str,
    needs: Sequence[bool],
) -> Gradients:
    """Gradients of :func:`forward`; ``needs``: of x, gamma, beta, and of weight, gamma, beta of each unit."""
    n = len(units)
    wanted = [(needs[i], needs[i + 1], needs[i + 2]) for i in range(3, 3 + 3 * n, 3)]
    below = [any(needs[:3]) or any(any(three) for three in wanted[:i]) for i in range(n)]  # is h_i's gradient wanted?
    grads: list[Any] = [(None, None, None)] * n
    inputs = [Lazy(c, its) for c, its in zip((x, *raws), stats, strict=True)]
    if not units:
        dz, total = steps.masked_sums(grad, None, x, stats[0])
    else:
        last = units[-1]
        dc = steps.Gradient(grad)
        dw = steps.wgrad(dc, inputs[-1], last.weight, last.geometry) if wanted[-1][0] else None
        dbeta = grad.sum((0, 2, 3), dtype=wide(grad.dtype)) if wanted[-1][2] else None
        grads[-1] = (dw, None, dbeta)
        dz, total = grad, None
        if below[-1]:
            dz, total = steps.dgrad(dc, last.weight, last.geometry, inputs[-1], None, 1, None)
        form = Form(group=group)
        for i in range(n - 2, -1, -1):
            if total is None:
                break
            dz, total, grads[i] = block.unit_backward(
                dz, total, raws[i], stats[i + 1], inputs[i], units[i], form, wanted[i], below[i], None, 1, None
            )
    if total is None or not any(needs[:3]):
        return Gradients(None, (None, None), grads)
    count = x.shape[0] * x.shape[2] * x.shape[3] if lead.mean is None else 0
    g, dgamma, dbeta = steps.bn_gradients(total, stats[0], count, group if lead.mean is None else "")
    d_x = bn_backward_add(dz, x, g, grad if units else None) if needs[0] else None
    return Gradients(d_x, (dgamma, dbeta), grads)


def bn_backward_add(dz: Tensor, c: Tensor, g: Tensor, added: Tensor | None) -> Tensor:
    """``g[0]*dz + g[1] + g[2]*c``, and the gradient that the shortcut carries, in one pass."""
    moved = sum(t.numel() * t.element_size() for t in (dz, c, c, added) if t is not None)
    choice = steps.choose(plan.Work("bn_backward", moved=moved), dz)

    def launch(out: Tensor) -> None:
        from ..kernels.train_passes import launch_bn_backward

        launch_bn_backward(nhwc(dz), nhwc(c), g, nhwc(out), None if added is None else nhwc(added))

    def eager() -> Tensor:
        d = reference.bn_backward(dz, c, g)
        return channels_last(d if added is None else d + added)

    return steps.run("bn_backward", choice, dz, lambda: new_channels_last(dz, *dz.shape), launch, eager, moved)


# Operators


def _parts(x: Tensor, lead, lead_eps, tensors, eps, geometry) -> tuple[Lead, list[Unit], list[tuple]]:
    """The BN in front, the units, and the shapes of their outputs; raises ValueError naming what does not fit."""
    if len(lead) != 4 or (lead[2] is None) != (lead[3] is None):
        raise ValueError("lead is [gamma, beta, mean, var] of the BN in front, mean and var both or neither")
    for name, v in zip(("gamma", "beta", "mean", "var"), lead, strict=True):
        if v is not None and (tuple(v.shape) != (x.shape[1],) or v.device != x.device):
            raise ValueError(
                f"{name} of the BN in front must be [C] = [{x.shape[1]}] on {x.device}, got {tuple(v.shape)} on "
                f"{v.device}"
            )
    units = units_of(tensors, eps, geometry) if len(eps) > 0 else []
    shapes, size = [], tuple(x.shape)
    for i, u in enumerate(units):
        size = check_unit(f"unit {i}", size, u, x)
        shapes.append(size)
    if units and size != tuple(x.shape):
        raise ValueError(f"x of {tuple(x.shape)} is added to the block's output, which is {size}")
    for n, _, p, q in (tuple(x.shape), *shapes[:-1]):
        if isinstance(n * p * q, int) and n * p * q <= 1 and lead[2] is None:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    gamma, beta, mean, var = lead
    return Lead(gamma, beta, mean, var, lead_eps), units, shapes


def _following(vectors, eps: float, units: Sequence[Unit]) -> Lead | None:
    """The BN behind the block, of ``[gamma, beta]``; None of an empty list."""
    if len(vectors) == 0:
        return None
    if len(vectors) != 2 or not units:
        raise ValueError(f"following is [gamma, beta] of the BN behind a block, got {len(vectors)} tensors")
    gamma, beta = vectors
    return Lead(gamma, beta, None, None, eps)


@uncast
def train_preact(x, lead, lead_eps, tensors, eps, geometry, group, known, following, following_eps):
    """Implementation of ``torch.ops.resnet_triton.train_preact``.

    ``[y, *raws, *stats]``: of the BN in front unless they are ``known``, of the units', and last of what is
    ``following``, unless that is an empty list.
    """
    front, units, _ = _parts(x, lead, lead_eps, tensors, eps, geometry)
    behind = _following(following, following_eps, units)
    y, raws, stats = forward(channels_last(x), front, units, group, known, behind)
    return [y, *raws, *(stats if known is None else stats[1:])]  # an operator's results are its own


def preact_backward_arguments(grad: Tensor, arguments: Sequence[Any], out: Sequence[Tensor]) -> tuple:
    """Arguments of ``train_preact_backward`` that ask for every gradient, from the forward's arguments and results."""
    x, lead, lead_eps, tensors, eps, geometry, group, known, following, _ = arguments
    saved = saved_of(out, known, len(eps), len(following) > 0)
    return (grad, x, lead, lead_eps, tensors, saved, eps, geometry, group, [True] * (3 + 3 * len(eps)))


def saved_of(out: Sequence[Tensor], known: Tensor | None, n: int, follows: bool) -> list[Tensor]:
    """Raw outputs and stats that the backward reads, of what ``train_preact`` returned for ``n`` units."""
    between = max(0, n - 1)
    rest = list(out[1 : len(out) - follows])
    return rest if known is None else [*rest[:between], known, *rest[between:]]


def _fake_train_preact(x, lead, lead_eps, tensors, eps, geometry, group, known, following, following_eps):
    front, units, shapes = _parts(x, lead, lead_eps, tensors, eps, geometry)
    vector = wide(x.dtype)
    shared = 6 if group else 5
    raws = [new_channels_last(x, *shape) for shape in shapes[:-1]]
    stats = [x.new_empty((shared if front.mean is None else 5, x.shape[1]), dtype=vector)]
    stats += [x.new_empty((shared if u.by_batch else 5, u.weight.shape[0]), dtype=vector) for u in units[:-1]]
    if _following(following, following_eps, units) is not None:
        stats.append(x.new_empty((shared, x.shape[1]), dtype=vector))
    return [new_channels_last(x, *x.shape), *raws, *(stats if known is None else stats[1:])]


@uncast
def train_preact_backward(grad, x, lead, lead_eps, tensors, saved, eps, geometry, group, needs):
    """Implementation of ``torch.ops.resnet_triton.train_preact_backward``; what is not needed is an empty tensor."""
    front, units, _ = _parts(x, lead, lead_eps, tensors, eps, geometry)
    between = max(0, len(units) - 1)
    raws, stats = saved[:between], saved[between:]
    found = backward(channels_last(grad), channels_last(x), front, units, raws, stats, group, needs)
    dgamma, dbeta = found.lead
    out = [or_empty(found.x, x)]
    pairs = [(dgamma, front.gamma), (dbeta, front.beta)]
    for u, three in zip(units, found.units, strict=True):
        pairs += zip(three, u[:3], strict=True)
    return out + [
        as_parameter(d if need else None, parameter, x) for (d, parameter), need in zip(pairs, needs[1:], strict=True)
    ]


def _fake_train_preact_backward(grad, x, lead, lead_eps, tensors, saved, eps, geometry, group, needs):
    front, units, _ = _parts(x, lead, lead_eps, tensors, eps, geometry)
    out = [new_channels_last(x, *x.shape) if needs[0] else x.new_empty(0)]
    parameters = [front.gamma, front.beta, *(t for u in units for t in u[:3])]
    return out + [empty_of(t if need else None, x) for t, need in zip(parameters, needs[1:], strict=True)]


class TrainPreAct(Function):
    """``(x, lead_eps, eps, geometry, group, known, following_eps, *lead, *tensors, *following) -> (y, ...)``.

    Arguments and results as of ``torch.ops.resnet_triton.train_preact``. Only y is differentiable: the statistics of
    what follows are values here, and part of the next block's backward.
    """

    @staticmethod
    def forward(x, lead_eps, eps, geometry, group, known, following_eps, *tensors):
        end = 4 + 5 * len(eps)
        return tuple(
            ops.train_preact(
                x, list(tensors[:4]), lead_eps, list(tensors[4:end]), list(eps), list(geometry), group, known,
                list(tensors[end:]), following_eps,
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.lead_eps, ctx.eps, ctx.geometry, ctx.group, known, _, *tensors = inputs
        end = 4 + 5 * len(ctx.eps)
        ctx.follows = len(tensors) > end
        ctx.save_for_backward(x, *tensors[:end], *saved_of(output, known, len(ctx.eps), ctx.follows))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, *_):
        refuse_second_derivatives()
        n = len(ctx.eps)
        x, *rest = ctx.saved_tensors
        lead, tensors, saved = rest[:4], rest[4 : 4 + 5 * n], rest[4 + 5 * n :]
        if grad is None:
            return (None,) * (11 + 5 * n + 2 * ctx.follows)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[7:9]]
        for i in range(n):
            needs += ctx.needs_input_grad[11 + 5 * i : 14 + 5 * i]
        found = ops.train_preact_backward(
            grad, x, lead, ctx.lead_eps, tensors, saved, list(ctx.eps), list(ctx.geometry), ctx.group, needs
        )
        dx, dgamma, dbeta, *units = (g if need else None for g, need in zip(found, needs, strict=True))
        grads: list[Tensor | None] = []
        for i in range(n):
            grads += [*units[3 * i : 3 * i + 3], None, None]
        return (dx, *[None] * 6, dgamma, dbeta, None, None, *grads, *[None] * (2 * ctx.follows))


_IMPLEMENTATIONS: dict[str, Any] = {"train_preact": train_preact, "train_preact_backward": train_preact_backward}
_FAKES: dict[str, Any] = {"train_preact": _fake_train_preact, "train_preact_backward": _fake_train_preact_backward}
IMPLEMENTATIONS.update(_IMPLEMENTATIONS)
FAKES.update(_FAKES)
for _name, _implementation in _IMPLEMENTATIONS.items():
    library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"resnet_triton::{_name}", _FAKES[_name], lib=library)


# Modules


def run(
    x: Tensor,
    norm: Norm,
    units: Sequence[ConvBN] = (),
    norms: Sequence[Norm] = (),
    *,
    known: Tensor | None = None,
    following: Norm = None,
) -> tuple[Tensor, Tensor | None]:
    """A pre-activation block, or BN and ReLU alone, some of whose BN have batch statistics; updates their buffers.

    Args:
        x: ``[N, C, H, W]``.
        norm: the module of the BN in front.
        units: the convolutions with the BN behind each, the last with none; or nothing.
        norms: the modules of these BN.
        known: what the block before returned.
        following: the module of the BN behind, if the statistics of its input are to be taken here.

    Returns:
        The output; and what is ``known`` then to what follows, or None.
    """
    x = cast_input(x)
    mean = var = None
    if not uses_batch_statistics(norm):
        mean, var = norm.running_mean, norm.running_var
    front = [norm.weight, norm.bias, mean, var]
    tensors = [t for u, its in zip(units, norms, strict=True) for t in tensors_of(u, its, x)]
    eps, geometry = [u.eps for u in units], [g for u in units for g in (u.stride, u.padding, u.dilation)]
    group = group_of((norm, *norms))
    behind: list[Tensor | None] = []
    if following is not None and uses_batch_statistics(following) and units and group_of((following,)) == group:
        behind = [following.weight, following.bias]
    every = [*distinct([*front, *tensors])]
    behind_eps = eps_of(following) if behind else 0.0
    lead_eps = eps_of(norm)
    if differentiating((x, *every)):
        out = TrainPreAct.apply(x, lead_eps, eps, geometry, group, known, behind_eps, *every, *behind)
    else:
        out = ops.train_preact(x, every[:4], lead_eps, every[4:], eps, geometry, group, known, behind, behind_eps)
    saved, between = saved_of(out, known, len(units), len(behind) > 0), max(0, len(units) - 1)
    raws, stats = saved[:between], saved[between:]
    biases = [None, *(u.bias for u in units[:-1])]
    update_running((norm, *norms[:-1]), stats, [pixels_of(c) for c in (x, *raws)], biases)
    return out[0], out[-1] if behind else None

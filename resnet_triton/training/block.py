"""A residual block in training mode, forward and backward, as steps.

    h_0 = x;   c_i = conv_i(h_{i-1});   h_i = relu(bn_i(c_i)), never stored
    y = relu(bn_n(c_n) + shortcut)

A *block* here is also a single convolution with its BN (n = 1, with or without ReLU and shortcut). Three things differ
from block to block: which BN have batch statistics (the others are constant), whether the shortcut is absent, identity
or a projection, and the *form* of the last convolution. In the Gram form neither its output nor the projection's ever
exists: their statistics follow from the second moments of their inputs, and their gradients from products with those.
``docs/training.md`` derives it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import guard, steps
from .reference import GramBackward, Lazy

#: Channels of the input up to which second moments are taken: their product grows with the square.
MOST_GRAM_CHANNELS = 1024


class Unit(NamedTuple):
    """A convolution without bias and its BN.

    Args:
        weight: ``[K, C, R, S]``, of any floating dtype: it is computed with in the activations' dtype.
        gamma, beta: ``[K]`` or None.
        mean, var: constant statistics ``[K]``, or None for those of the batch.
        eps: BN's epsilon.
        geometry: stride, padding, dilation.
    """

    weight: Tensor
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    geometry: tuple[int, int, int]

    @property
    def pointwise(self) -> bool:
        """A 1x1 convolution without padding, of any stride."""
        return self.weight.shape[2:] == (1, 1) and self.geometry[1] == 0

    @property
    def by_batch(self) -> bool:
        """Whether its statistics are those of the batch."""
        return self.mean is None


@dataclass(frozen=True)
class Form:
    """What is static about a block.

    Args:
        relu: whether a ReLU comes last.
        own_shortcut: the shortcut is the block's input.
        gram: the last convolution and the projection are in the Gram form.
        following: the next block's first convolution is computed as well, from the output while it is at hand.
        masked_grad: the gradient that comes in is zero wherever the output is.
        mask_input: the gradient that goes out may be zeroed wherever the input is zero: the input came from a ReLU.
        group: name of the process group that shares batch statistics, or ``""``.
    """

    relu: bool = True
    own_shortcut: bool = False
    gram: bool = False
    masked_grad: bool = False
    mask_input: bool = False
    following: bool = False
    group: str = ""


def may_be_gram(units: Sequence[Unit], project: Unit | None, form: Form) -> bool:
    """Whether a block's end can be in the Gram form: 1x1 convolutions to more channels, with batch statistics."""
    last = units[-1]
    if len(units) < 2 or not form.relu or form.group:
        return False
    expands = last.pointwise and last.geometry[0] == 1 and last.weight.shape[0] >= 2 * last.weight.shape[1]
    ends = [last] if project is None else [last, project]
    small = all(u.pointwise and u.by_batch and u.weight.shape[1] <= MOST_GRAM_CHANNELS for u in ends)
    return expands and small and all(u.geometry[0] in (1, 2) for u in ends)


class Ahead(NamedTuple):
    """What the block before computed of a block: the raw output of its first convolution, and its stats."""

    raw: Tensor
    stats: Tensor


class Saved(NamedTuple):
    """What the backward needs besides the inputs; :meth:`flat` and :func:`saved_of` convert it.

    Args:
        y: the output.
        raws: of the convolutions whose raw output is stored: all, or all but the last in the Gram form.
        raw_project: of the projection, unless there is none or it is in the Gram form.
        grams: ``(S, s)`` of the last convolution's input, and of the projection's.
        stats: of each BN, ``[5, K]`` (``[6, K]`` with the count last, where a group shares them).
        stats_project: of the projection's.
    """

    y: Tensor
    raws: list[Tensor]
    raw_project: Tensor | None
    grams: list[tuple[Tensor, Tensor]]
    stats: list[Tensor]
    stats_project: Tensor | None

    def flat(self) -> list[Tensor]:
        """As one list, the output first."""
        projection = [t for t in (self.raw_project, self.stats_project) if t is not None]
        return [self.y, *self.raws, *self.stats, *projection, *(t for pair in self.grams for t in pair)]


def saved_of(flat: Sequence[Tensor], n: int, project: bool, gram: bool) -> Saved:
    """Inverse of :meth:`Saved.flat` for a block of ``n`` units."""
    y, *rest = flat
    stored = n - gram
    raws, stats, rest = rest[:stored], rest[stored : stored + n], rest[stored + n :]
    raw_project = rest.pop(0) if project and not gram else None
    stats_project = rest.pop(0) if project else None
    return Saved(
        y, list(raws), raw_project, [(rest[i], rest[i + 1]) for i in range(0, len(rest), 2)], list(stats), stats_project
    )


def given(saved: Sequence[Tensor], ahead: Sequence[Tensor], n: int, form: Form) -> list[Tensor]:
    """What :meth:`Saved.flat` lists, of what an operator returned for a block of ``n`` units and was given ahead."""
    flat = list(saved[: len(saved) - 2 * form.following])
    if not ahead:
        return flat
    stored = n - form.gram
    return [flat[0], ahead[0], *flat[1:stored], ahead[1], *flat[stored:]]


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    units: Sequence[Unit],
    project: Unit | None,
    form: Form,
    ahead: Ahead | None = None,
    following: Unit | None = None,
) -> tuple[Saved, Ahead | None]:
    """A block's output and what its backward needs, and what can be computed ahead of the next block.

    Args:
        x: ``[N, C, H, W]``.
        shortcut: what is added, or what ``project`` reads; None with ``form.own_shortcut``, or without shortcut.
        units: of the main path.
        project: of the shortcut.
        form: see :class:`Form`.
        ahead: what the block before computed of this one, or None.
        following: the next block's first convolution, pointwise and with batch statistics, or None.
    """
    added = x if form.own_shortcut else shortcut
    h, raws, stats = Lazy(x), [], []
    for i, u in enumerate(units[: len(units) - form.gram]):
        c, its = ahead if i == 0 and ahead is not None else unit_forward(h, u, form.group)
        raws.append(c)
        stats.append(its)
        h = Lazy(c, its)
    if not form.gram:
        raw_project = stats_project = None
        if project is not None:
            assert added is not None
            raw_project, stats_project = unit_forward(Lazy(added), project, form.group)
            added = raw_project
        y = steps.bn_apply(raws[-1], stats[-1], added, stats_project, form.relu)
        then = None if following is None else Ahead(*unit_forward(Lazy(y), following, form.group))
        return Saved(y, raws, raw_project, [], stats, stats_project), then
    assert added is not None
    last = units[-1]
    s2, s1, its = _gram(h, last)
    stats.append(its)
    grams, through = [(s2, s1)], None
    if project is not None:
        x2, x1, stats_project = _gram(Lazy(added), project)
        grams.append((x2, x1))
        through = (project, stats_project)
    if guard.doubts(last.weight) or (project is not None and guard.doubts(project.weight)):
        stats[-1], through, y = _recomputed(h, added, last, project)
        then = None
    else:
        y, found = steps.expand(h, last.weight, stats[-1], added, through, following)
        then = None if found is None else Ahead(*found)
    if following is not None and then is None:
        then = Ahead(*unit_forward(Lazy(y), following, form.group))
    return Saved(y, raws, None, grams, stats, None if through is None else through[1]), then


def unit_forward(h: Lazy, u: Unit, group: str) -> tuple[Tensor, Tensor]:
    """Raw output and stats of a convolution."""
    c, parts = steps.conv(h, u.weight, u.geometry, u.by_batch)
    if parts is None:
        return c, steps.constant_stats(u)
    return c, steps.finalise(parts, u.gamma, u.beta, u.eps, group)


def _gram(h: Lazy, u: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments, sums, and the stats of a 1x1 convolution on ``h``."""
    s2, s1 = steps.gram(h, u.geometry[0], u.weight)
    its, doubtful = steps.gram_stats(
        u.weight, s2, s1, _count(h.raw, u.geometry[0]), u.gamma, u.beta, u.eps, h.raw.dtype
    )
    guard.remember(u.weight, doubtful)
    return s2, s1, its


def _count(x: Tensor, stride: int) -> int:
    return x.shape[0] * -(-x.shape[2] // stride) * -(-x.shape[3] // stride)


def _recomputed(h: Lazy, added: Tensor | None, last: Unit, project: Unit | None):
    """The end of a block whose second moments are in doubt: the raw outputs exist, for as long as this takes."""
    c, its = unit_forward(h, last, "")
    through = None
    if project is not None:
        assert added is not None
        added, stats_project = unit_forward(Lazy(added), project, "")
        through = (project, stats_project)
    return its, through, steps.bn_apply(c, its, added, None if through is None else through[1], True)


class Needs(NamedTuple):
    """Which gradients are wanted: of x, shortcut, and of weight, gamma and beta of each unit, the projection's last."""

    x: bool
    shortcut: bool
    units: tuple[tuple[bool, bool, bool], ...]


class Gradients(NamedTuple):
    """Gradients of x, shortcut, and of weight, gamma and beta of each unit, the projection's last."""

    x: Tensor | None
    shortcut: Tensor | None
    units: list[tuple[Tensor | None, Tensor | None, Tensor | None]]


def backward(
    grad: Tensor,
    x: Tensor,
    shortcut: Tensor | None,
    units: Sequence[Unit],
    project: Unit | None,
    saved: Saved,
    form: Form,
    needs: Needs,
) -> Gradients:
    """Gradients of :func:`forward`; weights' are in their shape and the wide dtype, vectors' in the wide dtype."""
    if form.gram and (guard.doubts(units[-1].weight) or (project is not None and guard.doubts(project.weight))):
        saved = _with_raws(saved, x, shortcut, units, project, form)
        form = replace(form, gram=False)
    n = len(units)
    grads: list[tuple[Tensor | None, Tensor | None, Tensor | None]] = [(None, None, None)] * (n + (project is not None))
    inputs = [Lazy(x), *(Lazy(c, s) for c, s in zip(saved.raws, saved.stats, strict=False))][:n]
    wants_x = needs.x or (form.own_shortcut and needs.shortcut)
    wants_shortcut = needs.x if form.own_shortcut else needs.shortcut
    below = [wants_x or any(any(u) for u in needs.units[:i]) for i in range(n)]  # whether h_i's gradient is wanted
    mask = saved.y if form.relu and not form.masked_grad else None
    d_shortcut, stride = None, 1
    if form.gram:
        dz = steps.masked(grad, mask) if mask is not None else grad
        added = x if form.own_shortcut else shortcut
        if project is not None and (wants_shortcut or any(needs.units[n])):
            assert added is not None and saved.stats_project is not None
            back = _gram_backward(dz, Lazy(added), project, saved.grams[1], saved.stats_project)
            grads[n] = _wanted(_in_shape(back, project), needs.units[n])
            if wants_shortcut:
                stride = project.geometry[0]
                d_shortcut, _ = steps.gram_dgrad(dz, back, Lazy(added), stride, False, False, project.weight)
        elif project is None and wants_shortcut:
            d_shortcut = dz
        total = None
        if below[n - 1] or any(needs.units[n - 1]):
            back = _gram_backward(dz, inputs[-1], units[-1], saved.grams[0], saved.stats[-1])
            grads[n - 1] = _wanted(_in_shape(back, units[-1]), needs.units[n - 1])
            if below[n - 1]:
                dz, total = steps.gram_dgrad(dz, back, inputs[-1], 1, True, True, units[-1].weight)
        first = n - 2
    else:
        dz, total = steps.masked_sums(grad, mask, saved.raws[-1])
        if project is not None and (wants_shortcut or any(needs.units[n])):
            assert saved.raw_project is not None and saved.stats_project is not None
            added = x if form.own_shortcut else shortcut
            assert added is not None
            _, its = steps.masked_sums(dz, None, saved.raw_project)
            d_shortcut, _, grads[n] = unit_backward(
                dz, its, saved.raw_project, saved.stats_project, Lazy(added), project, form, needs.units[n],
                wants_shortcut, None, 1, None,
            )  # fmt: skip
        elif project is None and wants_shortcut:
            d_shortcut = dz
        first = n - 1
    for i in range(first, -1, -1):
        if not (below[i] or any(needs.units[i])):
            break
        assert total is not None
        residual = d_shortcut if i == 0 and form.own_shortcut else None
        sign = x if i == 0 and form.mask_input else None
        dz, total, grads[i] = unit_backward(
            dz, total, saved.raws[i], saved.stats[i], inputs[i], units[i], form, needs.units[i], below[i],
            residual, 1 if residual is None else stride, sign,
        )  # fmt: skip
    d_x = dz if wants_x else None
    if form.own_shortcut or d_shortcut is None:
        return Gradients(d_x, None, grads)
    return Gradients(d_x, _scattered(d_shortcut, stride, shortcut), grads)


def unit_backward(
    dz, total, c, stats, h: Lazy, u: Unit, form: Form, needs: tuple[bool, bool, bool], wants_input: bool, residual,
    residual_stride: int, sign,
):  # fmt: skip
    """Gradients of one unit from that of its BN's output: of its input, with sums of it, and of its parameters."""
    count = _count(c, 1) if u.by_batch else 0
    g, dgamma, dbeta = steps.bn_gradients(total, stats, count, form.group if u.by_batch else "")
    added = 0 if residual is None else residual_stride
    dc = steps.settled(steps.Gradient(dz, c, g), h, u.weight, u.geometry, (wants_input, needs[0]), added)
    dw = steps.wgrad(dc, h, u.weight, u.geometry) if needs[0] else None
    d, total = None, None
    if wants_input:
        d, total = steps.dgrad(dc, u.weight, u.geometry, h, residual, residual_stride, sign)
    return d, total, _wanted((dw, dgamma, dbeta), needs)


def _gram_backward(dz: Tensor, h: Lazy, u: Unit, gram: tuple[Tensor, Tensor], stats: Tensor) -> GramBackward:
    g, sdz = steps.matrix_wgrad(dz, h, u.geometry[0], u.weight)
    return steps.gram_backward(u.weight, g, sdz, *gram, _count(dz, 1), stats, dz.dtype)


def _in_shape(back: GramBackward, u: Unit) -> tuple[Tensor, Tensor, Tensor]:
    return back.dw.view(u.weight.shape), back.dgamma, back.dbeta


def _wanted(grads: Sequence[Tensor | None], needs: Sequence[bool]):
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _scattered(compact: Tensor, stride: int, like: Tensor | None) -> Tensor:
    """A gradient at every ``stride``-th row and column, and zeros between."""
    if stride == 1:
        return compact
    assert like is not None
    full = torch.zeros_like(like, memory_format=torch.channels_last)
    full[:, :, ::stride, ::stride] = compact
    return full


def _with_raws(
    saved: Saved, x: Tensor, shortcut: Tensor | None, units: Sequence[Unit], project: Unit | None, form: Form
) -> Saved:
    """Of the Gram form to that of stored outputs, which are computed again."""
    h = Lazy(saved.raws[-1], saved.stats[-2])
    raw, _ = steps.conv(h, units[-1].weight, units[-1].geometry, False)
    raw_project = None
    if project is not None:
        added = x if form.own_shortcut else shortcut
        assert added is not None
        raw_project, _ = steps.conv(Lazy(added), project.weight, project.geometry, False)
    return saved._replace(raws=[*saved.raws, raw], raw_project=raw_project, grams=[])

"""Every step of training in plain PyTorch, for any float dtype: what the steps mean, and how they run without kernels.

Activations are ``[N,C,H,W]`` tensors, vectors ``[K]`` in at least fp32. *Raw* is a convolution's output before its BN.
``stats`` are the rows mean, variance (biased), 1/sqrt(variance + eps), scale and shift of a BN, ``[5, K]``, with
``bn(c) = c * scale + shift``. ``parts`` are moments of disjoint sets of pixels, ``[P, 3, K]``: count, mean, and the sum
of squared deviations from that mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN, VAR, RSTD, SCALE, SHIFT = range(5)
#: The guard of the Gram form: rounding in sums of products in fp32 may put this relative error into a variance.
DOUBTFUL = 1e-3
#: Units in the last place that such a sum may be off: found by simulation of sums that are cut off, not rounded.
ROUNDINGS = 64


class Lazy(NamedTuple):
    """``relu(raw * scale + shift)`` that is not stored; ``raw`` itself where ``stats`` is None."""

    raw: Tensor
    stats: Tensor | None = None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and vectors beside activations of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def affine(c: Tensor, stats: Tensor) -> Tensor:
    """``c * scale + shift``, not rounded to the dtype of ``c``."""
    return torch.addcmul(_per_channel(stats[SHIFT]), c.to(stats.dtype), _per_channel(stats[SCALE]))


def value(h: Lazy) -> Tensor:
    """What a :class:`Lazy` stands for, rounded to the dtype of its raw tensor."""
    return h.raw if h.stats is None else F.relu(affine(h.raw, h.stats)).to(h.raw.dtype)


def moments(c: Tensor) -> Tensor:
    """``parts [1, 3, K]`` of a raw output."""
    dims = (0, 2, 3)
    var, mean = torch.var_mean(c.to(wide(c.dtype)), dims, correction=0)
    count = c.numel() // max(1, c.shape[1])
    return torch.stack([torch.full_like(mean, count), mean, var * count])[None]


def merge(parts: Tensor) -> Tensor:
    """The moments ``[3, K]`` of all pixels of ``parts`` together."""
    count, mean, m2 = parts.double().unbind(1)
    total = count.sum(0)
    mean = torch.where(count > 0, mean, torch.zeros_like(mean))
    middle = (count * mean).sum(0) / total
    m2 = torch.where(count > 0, m2, torch.zeros_like(m2)).sum(0) + (count * (mean - middle) ** 2).sum(0)
    return torch.stack([total, middle, m2]).to(parts.dtype)


def stats_of(moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """``stats [5, K]`` of the moments ``[3, K]``."""
    count, mean, m2 = moments
    return stats_from(mean, (m2 / count).clamp_min(0), gamma, beta, eps)


def stats_from(mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """``stats [5, K]`` of a mean and a biased variance."""
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else rstd * gamma.to(rstd.dtype)
    shift = -mean * scale
    if beta is not None:
        shift = shift + beta.to(shift.dtype)
    return torch.stack([mean, var, rstd, scale, shift])


def conv(h: Lazy, weight: Tensor, geometry: Sequence[int]) -> Tensor:
    """The raw output of a convolution; geometry is stride, padding, dilation."""
    stride, padding, dilation = geometry
    return F.conv2d(value(h), weight, None, stride, padding, dilation)


def bn_apply(c: Tensor, stats: Tensor, residual: Tensor | None, residual_stats: Tensor | None, relu: bool) -> Tensor:
    """``[relu](bn(c) + [bn](residual))``, rounded once."""
    y = affine(c, stats)
    if residual is not None:
        y = y + (residual.to(y.dtype) if residual_stats is None else affine(residual, residual_stats))
    return (F.relu(y) if relu else y).to(c.dtype)


# Gram form


def rows_of(h: Lazy, stride: int = 1) -> Tensor:
    """Its values at multiples of ``stride`` as a matrix ``[M, C]`` in the wide dtype."""
    a = value(h)[:, :, ::stride, ::stride]
    return a.permute(0, 2, 3, 1).reshape(-1, a.shape[1]).to(wide(a.dtype))


def gram(h: Lazy, stride: int = 1) -> tuple[Tensor, Tensor]:
    """``(S, s)``: second moments ``[C, C]`` and sums ``[C]`` over the pixels at multiples of ``stride``."""
    a = rows_of(h, stride)
    return a.t() @ a, a.sum(0)


def gram_stats(
    weight: Tensor, s2: Tensor, s1: Tensor, count: int, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``stats [5, K]`` of the output of a 1x1 convolution from the moments of its input, and whether to doubt them.

    The doubt is an int32 tensor ``[1]``: fp32 sums have rounding errors that are large beside some variance.
    """
    w, mu = weight.flatten(1).double(), s1.double() / count
    second = s2.double() / count
    var = torch.einsum("kc,kc->k", w @ (second - torch.outer(mu, mu)), w).clamp_min(0)
    mean, squares = w @ mu, w * w
    error = torch.einsum("kc,kc->k", squares @ (second * second), squares).sqrt() + mean * mean
    error = ROUNDINGS * torch.finfo(torch.float32).eps * error
    doubtful = (error > DOUBTFUL * (var + eps)).any().to(torch.int32)[None]
    stats = stats_from(mean, var, None if gamma is None else gamma.double(), beta, eps)
    return stats.to(s2.dtype), doubtful


def expand(
    h: Lazy,
    weight: Tensor,
    stats: Tensor,
    shortcut: Tensor | None,
    project: tuple[Tensor, Tensor, int] | None,
    relu: bool = True,
) -> Tensor:
    """``relu(bn(conv(h)) + shortcut)`` of a 1x1 convolution whose statistics are known; nothing between is rounded.

    ``project`` is weight, stats and stride of a 1x1 convolution on the shortcut.
    """
    n, _, p, q = h.raw.shape
    flat = weight.flatten(1)
    y = (rows_of(h) @ flat.t().to(stats.dtype)) * stats[SCALE] + stats[SHIFT]
    if shortcut is not None and project is None:
        y = y + shortcut.permute(0, 2, 3, 1).reshape(-1, flat.shape[0]).to(y.dtype)
    elif shortcut is not None and project is not None:
        w, its, stride = project
        y = y + (rows_of(Lazy(shortcut), stride) @ w.flatten(1).t().to(its.dtype)) * its[SCALE] + its[SHIFT]
    y = (F.relu(y) if relu else y).to(h.raw.dtype)
    return y.view(n, p, q, flat.shape[0]).permute(0, 3, 1, 2)


class GramBackward(NamedTuple):
    """Gradients of the parameters of a 1x1 convolution with BN, and what its dgrad multiplies with.

    Args:
        dw: ``[K, C]`` wide; dgamma, dbeta: ``[K]``.
        wp: ``[K, C]`` in the activations' dtype; mm: ``[C, C]`` likewise, times ``rho [C]`` per column; v: ``[C]``.
    """

    dw: Tensor
    dgamma: Tensor
    dbeta: Tensor
    wp: Tensor
    mm: Tensor
    rho: Tensor
    v: Tensor


def gram_backward(
    weight: Tensor, g: Tensor, sdz: Tensor, s2: Tensor, s1: Tensor, count: int, stats: Tensor
) -> GramBackward:
    """The part of the Gram form's backward that has no pixels.

    Args:
        weight: ``[K, C]``.
        g: ``dz^T a``, ``[K, C]``.
        sdz: sums of dz, ``[K]``.
        s2, s1: of :func:`gram`.
        count: pixels.
        stats: of the output.
    """
    w, mu = weight.to(s2.dtype), s1 / count
    centred = (s2.double() - count * torch.outer(mu.double(), mu.double())).to(s2.dtype)
    gc = g - torch.outer(sdz, mu)
    dgamma = stats[RSTD] * (w * gc).sum(1)
    g3 = -stats[SCALE] * stats[RSTD] * dgamma / count
    dw = stats[SCALE][:, None] * gc + g3[:, None] * (w @ centred)
    wp = stats[SCALE][:, None] * w
    middle = w.t() @ (g3[:, None] * w)
    rho = torch.exp2(torch.frexp(middle.abs().amax(0)).exponent.to(middle.dtype))
    held = (middle.diagonal() / rho).to(weight.dtype).to(middle.dtype)
    counts = (held.abs() >= 2.0**-10) & (held.abs() <= 1)
    rho = torch.where(counts, middle.diagonal() / torch.where(counts, held, torch.ones_like(held)), rho)
    wp, mm = wp.to(weight.dtype), (middle / rho).to(weight.dtype)
    v = -(sdz @ wp.to(rho.dtype) + rho * (s1 @ mm.to(rho.dtype))) / count  # of what is multiplied with
    return GramBackward(dw, dgamma, sdz, wp, mm, rho, v)


def gram_dgrad(
    dz: Tensor, back: GramBackward, h: Lazy, stride: int, masked: bool, want_sums: bool
) -> tuple[Tensor, Tensor | None]:
    """``da`` of the Gram form, behind the ReLU of ``h`` if ``masked``; with ``[1, 2, C]`` sums of it and it * raw."""
    n, _, p, q = dz.shape
    rows = dz.permute(0, 2, 3, 1).reshape(-1, dz.shape[1]).to(back.v.dtype)
    d = (rows_of(h, stride) @ back.mm.to(back.v.dtype)) * back.rho + rows @ back.wp.to(back.v.dtype) + back.v
    d = d.view(n, p, q, -1).permute(0, 3, 1, 2)
    if masked and h.stats is not None:
        d = torch.where(affine(h.raw, h.stats) > 0, d, 0.0)
    d = d.to(dz.dtype)
    return d, sums(d, h.raw) if want_sums else None


# Backward


def masked(dy: Tensor, y: Tensor) -> Tensor:
    """``dy`` where ``y > 0``, else 0."""
    return torch.where(y > 0, dy, 0.0)


def sums(dz: Tensor, c: Tensor) -> Tensor:
    """``[1, 2, C]``: sums of ``dz`` and of ``dz * c`` over the pixels."""
    d = dz.to(wide(dz.dtype))
    return torch.stack([d.sum((0, 2, 3)), (d * c.to(d.dtype)).sum((0, 2, 3))])[None]


def bn_gradients(total: Tensor, stats: Tensor, count: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
    """``(g [3, C], dgamma, dbeta)`` with ``dc = g[0]*dz + g[1] + g[2]*c``.

    Args:
        total: sums of ``dz`` and ``dz * c``, ``[2, C]``.
        stats: of the BN.
        count: pixels over which its statistics were taken; 0 for constant statistics.
    """
    dbeta, product = total
    dgamma = (product - stats[MEAN] * dbeta) * stats[RSTD]
    scale = stats[SCALE]
    if isinstance(count, int) and count == 0:
        return torch.stack([scale, torch.zeros_like(scale), torch.zeros_like(scale)]), dgamma, dbeta
    return gradient_vectors(stats, dgamma, dbeta, count), dgamma, dbeta


def gradient_vectors(stats: Tensor, dgamma: Tensor, dbeta: Tensor, count: Tensor | int) -> Tensor:
    """``g [3, C]`` from the gradients of BN's parameters, both summed over the ``count`` pixels."""
    scale = stats[SCALE]
    g3 = -scale * stats[RSTD] * dgamma / count
    return torch.stack([scale, -scale * dbeta / count - g3 * stats[MEAN], g3])


def bn_backward(dz: Tensor, c: Tensor, g: Tensor) -> Tensor:
    """``g[0]*dz + g[1] + g[2]*c``, the gradient of a raw output."""
    d = torch.addcmul(_per_channel(g[1]), c.to(g.dtype), _per_channel(g[2]))
    return torch.addcmul(d, dz.to(g.dtype), _per_channel(g[0])).to(dz.dtype)


def _conv_backward(dc: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[int], which: list[bool]):
    stride, padding, dilation = geometry
    return torch.ops.aten.convolution_backward(
        dc, x, weight, None, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1, [*which, False]
    )


def wgrad(dc: Tensor, h: Lazy, weight: Tensor, geometry: Sequence[int]) -> Tensor:
    """Gradient of a convolution's weight, in the weight's shape and the wide dtype."""
    d = _conv_backward(dc, value(h), weight, geometry, [False, True])[1]
    return d.to(wide(d.dtype))


def matrix_wgrad(dz: Tensor, h: Lazy, stride: int) -> tuple[Tensor, Tensor]:
    """``(dz^T a [K, C], sums of dz [K])`` of a 1x1 convolution, in the wide dtype."""
    rows = dz.permute(0, 2, 3, 1).reshape(-1, dz.shape[1]).to(wide(dz.dtype))
    return rows.t() @ rows_of(h, stride), rows.sum(0)


def dgrad(
    dc: Tensor, weight: Tensor, geometry: Sequence[int], like: Tensor, residual: Tensor | None, residual_stride: int
) -> Tensor:
    """Gradient of a convolution's input, whose shape ``like`` has, plus a residual.

    With ``residual_stride`` 2 the residual belongs to every second row and column.
    """
    d = _conv_backward(dc, like, weight, geometry, [True, False])[0]
    if residual is None:
        return d
    if residual_stride == 1:
        return d + residual
    d = d.clone(memory_format=torch.channels_last)
    d[:, :, ::residual_stride, ::residual_stride] += residual
    return d


# Stem


def bn_relu_pool(h: Lazy) -> Tensor:
    """3x3 max-pool of stride 2 and padding 1."""
    return F.max_pool2d(value(h), 3, 2, 1)


def bn_relu_pool_backward(dy: Tensor, h: Lazy) -> Tensor:
    """The gradient behind the ReLU, of the BN's output; ties as PyTorch's max-pool decides them."""
    a = value(h)
    window = ([3, 3], [2, 2], [1, 1])
    _, argmax = torch.ops.aten.max_pool2d_with_indices(a, *window)
    d = torch.ops.aten.max_pool2d_with_indices_backward(dy, a, *window, [1, 1], False, argmax)
    assert h.stats is not None
    return torch.where(affine(h.raw, h.stats) > 0, d, 0.0)

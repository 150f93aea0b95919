"""The 7x7/2 stem convolution of a training step, on the cells of ``stem``: its statistics, and its weight's gradient.

    c[n,p,q,k]  = sum over a < 4 of cells[n, p + a, q..q+3] . packed[k, a]                  raw, rounded
    parts       = count, mean and sum of squared deviations of each program's share of c
    dw[k,a,b,e] = sum over n,p,q of dc[n,p,q,k] * cells[n, p + a, q + b, e]                 then back to 7x7x3

Both read the cells in pairs, as ``stem.launch_stem_conv`` does: pairs start at even cells for the even columns of the
output, and at odd cells for the odd ones. Even and odd programs of one launch take the one and the other, so that
neighbours read the same cells while these are in the L2. Programs walk over boxes of pixels in a fixed order, whatever
the device, and keep what they sum in registers.

An image needs no gradient; where one is asked for, the convolution is the library's.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig, least_waste_box, next_power_of_two
from .geometry import ConvShape, cdiv
from .launch import count
from .stem import CELL_CHANNELS
from .tiles import box_origin

#: Most programs of one launch: two for each multiprocessor of an H200. Each leaves one row of sums.
PROGRAMS = 264
#: Channels of a pair of cells: the reduction of one product, or the columns of one.
PAIR = 2 * CELL_CHANNELS
#: Elements of a packed filter.
PACKED = 16 * CELL_CHANNELS


@triton.jit
def conv_stats_walk(
    xs, w, c, part, first, stride, N, P, Q, k0, K, CROPPED: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The boxes ``first, first + stride, ...`` of one phase of the columns; ``Q`` counts its columns."""
    BM: tl.constexpr = TN * TH * TW
    boxes = tl.cdiv(N, TN) * tl.cdiv(P, TH) * tl.cdiv(Q, TW)
    seen = 0.0
    mean = tl.zeros((BN,), tl.float32)
    m2 = tl.zeros((BN,), tl.float32)
    pixel = tl.arange(0, BM)
    for box in range(first, boxes, stride):
        n0, p0, q0 = box_origin(box, P, Q, TN, TH, TW)
        acc = tl.zeros((BN, BM), tl.float32)
        for step in range(8):
            a = xs.load([n0, p0 + step // 2, q0 + step % 2, 0]).reshape(BM, BK).T
            b = w.load([k0, step * BK])
            acc = tl.dot(b, a, acc, input_precision=PRECISION)
        out = acc.to(c.dtype)
        c.store([n0, p0, q0, k0], out.T.reshape(TN, TH, TW, BN))
        # the box's own mean and squares, then merged with those of the boxes before (Chan)
        value = out.to(tl.float32)
        here = BM * 1.0
        if CROPPED:
            inside = (n0 + pixel // (TH * TW) < N) & (p0 + pixel // TW % TH < P) & (q0 + pixel % TW < Q)
            value = tl.where(inside[None, :], value, 0.0)
            here = tl.minimum(TN, N - n0) * tl.minimum(TH, P - p0) * tl.minimum(TW, Q - q0) * 1.0
        box_mean = tl.sum(value, 1) * (1.0 / here)
        deviation = value - box_mean[:, None]
        if CROPPED:
            deviation = tl.where(inside[None, :], deviation, 0.0)
        difference = box_mean - mean
        both = seen + here
        mean += difference * (here / both)
        m2 += tl.sum(deviation * deviation, 1) + difference * difference * (seen * here / both)
        seen = both
    k = k0 + tl.arange(0, BN)
    tl.store(part + k, tl.zeros((BN,), tl.float32) + seen, mask=k < K)
    tl.store(part + K + k, mean, mask=k < K)
    tl.store(part + 2 * K + k, m2, mask=k < K)


@triton.jit
def stem_conv_stats(
    xs_even, xs_odd, w, c_even, c_odd, parts, N, P, Q, K, PHASES: tl.constexpr, CROPPED: tl.constexpr,
    PRECISION: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One share of the pixels times BN filters. ``xs_*``, ``w`` and ``c_*`` are tensor descriptors."""
    column_blocks = tl.cdiv(K, BN)
    share = tl.program_id(0) // column_blocks
    shares = tl.num_programs(0) // column_blocks // PHASES
    k0 = tl.program_id(0) % column_blocks * BN
    part = parts + share * 3 * K
    if share % PHASES == 0:
        conv_stats_walk(
            xs_even, w, c_even, part, share // PHASES, shares, N, P, (Q + 1) // 2, k0, K, CROPPED, PRECISION,
            TN, TH, TW, BN, BK,
        )  # fmt: skip
    else:
        conv_stats_walk(
            xs_odd, w, c_odd, part, share // PHASES, shares, N, P, Q // 2, k0, K, CROPPED, PRECISION,
            TN, TH, TW, BN, BK,
        )  # fmt: skip


@triton.jit
def wgrad_row(d, xs, left, right, n0, row, q0, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Adds the products of some pixels' gradients ``d [K, BM]`` with one row of their windows."""
    left = tl.dot(d, xs.load([n0, row, q0, 0]).reshape(BM, BK), left, input_precision=PRECISION)
    right = tl.dot(d, xs.load([n0, row, q0 + 1, 0]).reshape(BM, BK), right, input_precision=PRECISION)
    return left, right


@triton.jit
def wgrad_walk(
    dc, xs, part, first, stride, N, P, Q, k0, K, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The boxes ``first, first + stride, ...`` of one phase of the columns; ``Q`` counts its columns."""
    BM: tl.constexpr = TN * TH * TW
    boxes = tl.cdiv(N, TN) * tl.cdiv(P, TH) * tl.cdiv(Q, TW)
    zero = tl.zeros((BN, BK), tl.float32)
    l0, l1, l2, l3 = zero, zero, zero, zero  # the left pair of each row of a window, and the right one
    r0, r1, r2, r3 = zero, zero, zero, zero
    for box in range(first, boxes, stride):
        n0, p0, q0 = box_origin(box, P, Q, TN, TH, TW)
        d = dc.load([n0, p0, q0, k0]).reshape(BM, BN).T  # zero outside, so that an overhanging pixel adds nothing
        l0, r0 = wgrad_row(d, xs, l0, r0, n0, p0 + 0, q0, PRECISION, BM, BK)
        l1, r1 = wgrad_row(d, xs, l1, r1, n0, p0 + 1, q0, PRECISION, BM, BK)
        l2, r2 = wgrad_row(d, xs, l2, r2, n0, p0 + 2, q0, PRECISION, BM, BK)
        l3, r3 = wgrad_row(d, xs, l3, r3, n0, p0 + 3, q0, PRECISION, BM, BK)
    k = (k0 + tl.arange(0, BN))[:, None]
    target = part + k * (8 * BK) + tl.arange(0, BK)[None, :]
    tl.store(target, l0, mask=k < K)
    tl.store(target + 1 * BK, r0, mask=k < K)
    tl.store(target + 2 * BK, l1, mask=k < K)
    tl.store(target + 3 * BK, r1, mask=k < K)
    tl.store(target + 4 * BK, l2, mask=k < K)
    tl.store(target + 5 * BK, r2, mask=k < K)
    tl.store(target + 6 * BK, l3, mask=k < K)
    tl.store(target + 7 * BK, r3, mask=k < K)


@triton.jit
def stem_wgrad(
    dc_even, dc_odd, xs_even, xs_odd, parts, N, P, Q, K, PHASES: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One share of the pixels times BN filters, all of the packed window. ``parts [shares, K, 4, 4, 16]``."""
    column_blocks = tl.cdiv(K, BN)
    share = tl.program_id(0) // column_blocks
    shares = tl.num_programs(0) // column_blocks // PHASES
    k0 = tl.program_id(0) % column_blocks * BN
    part = parts + share * K * 8 * BK
    if share % PHASES == 0:
        wgrad_walk(
            dc_even, xs_even, part, share // PHASES, shares, N, P, (Q + 1) // 2, k0, K, PRECISION, TN, TH, TW, BN, BK
        )
    else:
        wgrad_walk(dc_odd, xs_odd, part, share // PHASES, shares, N, P, Q // 2, k0, K, PRECISION, TN, TH, TW, BN, BK)


@triton.jit
def unpack_stem_wgrad(parts, dw, SHARES, K, stride_k, stride_c, stride_r, stride_s, ROWS: tl.constexpr):
    """Sums the partial gradients of one filter in a fixed order, and takes the packing back (``pack_stem_weight``)."""
    k = tl.program_id(0)
    element = tl.arange(0, 256)
    row = tl.arange(0, ROWS)
    acc = tl.zeros((ROWS, 256), tl.float32)
    for start in range(0, SHARES, ROWS):
        source = parts + ((start + row) * K + k)[:, None] * 256 + element[None, :]
        acc += tl.load(source, mask=(start + row < SHARES)[:, None], other=0.0)
    channel = element % 16
    r = element // 64 * 2 + channel // 6 - 1
    s = element // 16 % 4 * 2 + channel // 3 % 2 - 1
    inside = (channel < 12) & (r >= 0) & (s >= 0)
    target = dw + k * stride_k + channel % 3 * stride_c + r * stride_r + s * stride_s
    tl.store(target, tl.sum(acc, 0).to(dw.dtype.element_ty), mask=inside)


def _phases(xs: torch.Tensor, c: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of cells and the columns of the output that read them: the even columns, then the odd ones if there are."""
    n, hs, ws, cell = xs.shape
    views = []
    for phase in range(min(c.shape[2], 2)):
        columns = c[:, :, phase::2]
        sizes = n, hs, columns.shape[2] + 1, 2 * cell
        strides = hs * ws * cell, ws * cell, 2 * cell, 1
        views.append((xs.as_strided(sizes, strides, xs.storage_offset() + phase * cell), columns))
    return views


def _shares(n: int, p: int, q: int, config: ConvConfig) -> int:
    """Programs along the pixels: an equal number of each phase of the columns."""
    tn, th, tw = config.box
    phases = min(q, 2)
    boxes = cdiv(n, tn) * cdiv(p, th) * cdiv(cdiv(q, phases), tw)
    return phases * min(boxes, PROGRAMS // phases)


def stem_stats_configs(n: int, p: int, q: int, k: int, itemsize: int) -> list[ConvConfig]:
    """Configurations for :func:`launch_stem_conv_stats` from the sizes of its output; boxes count every second column."""
    pairs = ConvShape(n, p + 3, cdiv(q, 2) + 1, PAIR, k, 4, 2)
    bn = min(64, max(16, next_power_of_two(k)))
    sizes = ((256, 4, 2), (128, 4, 3)) if itemsize == 2 else ((64, 4, 2),)
    return [ConvConfig("conv_stats", least_waste_box(pairs, bm), bn, PAIR, warps, s) for bm, warps, s in sizes]


def stem_wgrad_configs(n: int, p: int, q: int, k: int, itemsize: int) -> list[ConvConfig]:
    """Configurations for :func:`launch_stem_wgrad` from the sizes of its ``dc``; boxes count every second column."""
    pairs = ConvShape(n, p + 3, cdiv(q, 2) + 1, PAIR, k, 4, 2)
    bn = min(64, max(16, next_power_of_two(k)))
    sizes = ((128, 4, 2), (64, 4, 3)) if itemsize == 2 else ((64, 4, 2),)
    return [ConvConfig("wgrad", least_waste_box(pairs, bm), bn, PAIR, warps, s) for bm, warps, s in sizes]


def stem_stats_parts(n: int, p: int, q: int, config: ConvConfig) -> int:
    """Rows of the statistics that :func:`launch_stem_conv_stats` writes for an output ``[n, p, q, k]``."""
    return _shares(n, p, q, config)


def launch_stem_conv_stats(
    xs: torch.Tensor,
    packed_w: torch.Tensor,
    c: torch.Tensor,
    parts: torch.Tensor,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`stem_conv_stats`. Without statistics, ``stem.launch_stem_conv`` computes the same ``c``.

    Args:
        xs: ``[N,HS,WS,16]`` dense from :func:`.stem.launch_space_to_depth`; ``HS, WS`` from :func:`.stem.stem_cells`.
        packed_w: ``[K,4,4,16]`` dense from :func:`.stem.launch_pack_stem_weight`, dtype of ``xs``.
        c: ``[N,P,Q,K]`` dense: the convolution's output, rounded. K is a multiple of 8 (of 4 in fp32).
        parts: dense fp32 ``[stem_stats_parts(N, P, Q, config), 3, K]``, all written: count, mean and sum of squared
            deviations from it, of the rounded outputs that one program computed; the count may be 0.

    Raises:
        ValueError: ``parts`` or the configuration does not fit.
    """
    n, p, q, k = c.shape
    shares = _shares(n, p, q, config)
    _check(config)
    if parts.shape != (shares, 3, k):
        raise ValueError(f"parts must be {(shares, 3, k)}, got {tuple(parts.shape)}; see stem_stats_parts")
    if n == 0:
        return
    box, bn = list(config.box), config.bn
    tn, th, tw = box
    views = _phases(xs, c)
    cells = [TensorDescriptor.from_tensor(pairs, [*box, PAIR]) for pairs, _ in views]
    columns = [TensorDescriptor.from_tensor(view, [*box, bn]) for _, view in views]
    w_box = TensorDescriptor.from_tensor(packed_w.flatten(1), [bn, PAIR])
    cropped = bool(n % tn or p % th or any(view.shape[2] % tw for _, view in views))
    count("stem_conv_stats")
    stem_conv_stats[(shares * cdiv(k, bn),)](
        cells[0], cells[-1], w_box, columns[0], columns[-1], parts, n, p, q, k, PHASES=len(views), CROPPED=cropped,
        PRECISION=precision, TN=tn, TH=th, TW=tw, BN=bn, BK=PAIR, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def launch_stem_wgrad(dc: torch.Tensor, xs: torch.Tensor, dw: torch.Tensor, config: ConvConfig, precision: str) -> None:
    """Launches :func:`stem_wgrad` and :func:`unpack_stem_wgrad`, which sums the shares in a fixed order.

    Args:
        dc: ``[N,P,Q,K]`` dense: the gradient of the convolution's output. K is a multiple of 8 (of 4 in fp32).
        xs: ``[N,HS,WS,16]`` dense, as in the forward.
        dw: fp32 ``[K,3,7,7]`` of any strides, all written.

    Raises:
        ValueError: the configuration does not fit.
    """
    n, p, q, k = dc.shape
    _check(config)
    if n == 0:
        dw.zero_()
        return
    box, bn = list(config.box), config.bn
    tn, th, tw = box
    shares = _shares(n, p, q, config)
    parts = torch.empty((shares, k, PACKED), dtype=torch.float32, device=dc.device)
    views = _phases(xs, dc)
    cells = [TensorDescriptor.from_tensor(pairs, [*box, PAIR]) for pairs, _ in views]
    columns = [TensorDescriptor.from_tensor(view, [*box, bn]) for _, view in views]
    count("stem_wgrad")
    stem_wgrad[(shares * cdiv(k, bn),)](
        columns[0], columns[-1], cells[0], cells[-1], parts, n, p, q, k, PHASES=len(views), PRECISION=precision,
        TN=tn, TH=th, TW=tw, BN=bn, BK=PAIR, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    count("unpack_stem_wgrad")
    unpack_stem_wgrad[(k,)](parts, dw, shares, k, *dw.stride(), ROWS=32, num_warps=8)


def _check(config: ConvConfig) -> None:
    """Refuses a configuration that splits a pair of cells, or makes a box that the TMA does not take."""
    if config.bk != PAIR or max(*config.box, config.bn) > 256:
        raise ValueError(f"the stem's training kernels need bk={PAIR}, and sides and bn of at most 256, got {config}")

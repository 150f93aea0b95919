"""Gradient of a pointwise convolution's input, through its BN, in the Gram form: the raw output is never needed.

    out = relu'(h) * ((h mm) * rho + d wp + v)          h = relu(a * scale + shift), or a
                                                        d = dz, or dz where y > 0 and 0 elsewhere

BN's backward is ``dc = g1 * d + g2 + g3 * c`` with ``c = h w^T``, so the gradient ``dc w`` of h is
``d (g1 w) + h (w^T diag(g3) w) + g2 w``: ``wp``, ``mm`` and ``v``, made from the second moments (``gram_bn.py``).
``rho`` is a power of two for each column that keeps ``mm`` within fp16's range.

    one tile      acc[BM, BN]  = h[BM, BK] mm[BK, BN]      C / BK steps, the prologue on the short reduction only
                  acc         *= rho
                  acc         += d[BM, BK] wp[BK, BN]      K / BK steps
                  out          = (acc + v) where affine(a, scale, shift) > 0

A program walks over several tiles of BM rows of one block of BN columns and keeps the sums of out and out * a in
registers, so that BN's backward of the layer before gets a few partial sums instead of one a tile. Which rows a program
has depends on sizes alone, so that repeats are equal bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig, least_waste_box, next_power_of_two
from .expand import chunk, halves, normalised, pixels
from .geometry import ConvShape, cdiv
from .launch import count
from .prologue import Normalised, affine
from .tiles import box_origin


@triton.jit
def own_rows(x, BM: tl.constexpr, BN: tl.constexpr):
    """``[BM // 16, 8, BN]``: sums of the rows 8 apart, which one thread holds: without any exchange."""
    return tl.sum(x.reshape(BM // 16, 2, 8, BN), 1)


@triton.jit
def finish(
    acc, raw, sum_out, sum_product, k0, columns, scale, shift, v, out, n0, p0, q0, Q,
    C: tl.constexpr, MASKED: tl.constexpr, SUMS: tl.constexpr, FLAT: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """Shift and mask of the columns from ``k0`` on, which are stored; the sums with theirs.

    ``raw`` is what the mask and the sums are about; None where it is to be loaded from ``columns``.
    """
    BM: tl.constexpr = TN * TH * TW
    BN: tl.constexpr = acc.shape[1]
    k = k0 + tl.arange(0, BN)
    inside = k < C
    acc += tl.load(v + k, mask=inside, other=0.0)[None, :]
    if raw is None and (MASKED or SUMS):
        raw = pixels(columns, n0, p0, q0, k0, BM, FLAT)
    if MASKED:
        s = tl.load(scale + k, mask=inside, other=0.0)
        t = tl.load(shift + k, mask=inside, other=0.0)
        acc = tl.where(affine(raw, s[None, :], t[None, :]) > 0, acc, 0.0)
    if SUMS:  # rows behind the last are not stored, but would be summed
        acc = tl.where((q0 + tl.arange(0, BM) < Q)[:, None], acc, 0.0)
    rounded = acc.to(out.dtype)
    if FLAT:
        out.store([q0, k0], rounded)
    else:
        out.store([n0, p0, q0, k0], rounded.reshape(TN, TH, TW, BN))
    if SUMS:
        sum_out += own_rows(rounded.to(tl.float32), BM, BN)
        sum_product += own_rows(rounded.to(tl.float32) * raw.to(tl.float32), BM, BN)
    return sum_out, sum_product


@triton.jit
def store_sums(parts, sum_out, sum_product, part, k0, C: tl.constexpr):
    """Adds up the rows of a program's sums and stores them as part ``part``."""
    k = k0 + tl.arange(0, sum_out.shape[2])
    tl.store(parts + part * (2 * C) + k, tl.sum(tl.sum(sum_out, 0), 0), mask=k < C)
    tl.store(parts + part * (2 * C) + C + k, tl.sum(tl.sum(sum_product, 0), 0), mask=k < C)


@triton.jit
def one_tile(
    tile, left_out, left_product, right_out, right_product,
    dz, y, wp, a, columns, scale, shift, mm, square, rho, v, out, P, Q, k0,
    C: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BC: tl.constexpr, HALVED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Box ``tile`` of pixels times the BN columns from ``k0`` on; the sums with its own."""
    BM: tl.constexpr = TN * TH * TW
    n0, p0, q0 = box_origin(tile, P, Q, TN, TH, TW)
    if square is not None:
        raw = pixels(a, n0, p0, q0, 0, BM, FLAT)
        acc = tl.dot(normalised(raw, scale, shift, 0, C), square, input_precision=PRECISION)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        for c0 in range(0, C, BC):
            h = normalised(pixels(a, n0, p0, q0, c0, BM, FLAT), scale, shift, c0, C)
            acc = tl.dot(h, mm.load([c0, k0]), acc, input_precision=PRECISION)
    k = k0 + tl.arange(0, BN)
    acc *= tl.load(rho + k, mask=k < C, other=0.0)[None, :]
    for c0 in range(0, K, BK):
        d = pixels(dz, n0, p0, q0, c0, BM, FLAT)
        if y is not None:
            d = tl.where(pixels(y, n0, p0, q0, c0, BM, FLAT) > 0, d, 0.0).to(d.dtype)
        acc = tl.dot(d, wp.load([c0, k0]), acc, input_precision=PRECISION)
    if HALVED:
        left, right = halves(acc)
        left_raw, right_raw = halves(raw) if KEPT else (None, None)
        left_out, left_product = finish(
            left, left_raw, left_out, left_product, k0, columns, scale, shift, v, out, n0, p0, q0, Q,
            C, MASKED, SUMS, FLAT, TN, TH, TW,
        )  # fmt: skip
        right_out, right_product = finish(
            right, right_raw, right_out, right_product, k0 + BN // 2, columns, scale, shift, v, out, n0, p0, q0, Q,
            C, MASKED, SUMS, FLAT, TN, TH, TW,
        )  # fmt: skip
    else:
        left_out, left_product = finish(
            acc, raw if KEPT else None, left_out, left_product, k0, columns, scale, shift, v, out, n0, p0, q0, Q,
            C, MASKED, SUMS, FLAT, TN, TH, TW,
        )  # fmt: skip
    return left_out, left_product, right_out, right_product


@triton.jit
def gram_dgrad(
    dz, y, wp, a, columns, scale, shift, mm, rho, v, out, parts, N, P, Q, PROGRAMS,
    C: tl.constexpr, K: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
    HALVED: tl.constexpr, KEPT: tl.constexpr, WALKS: tl.constexpr,
):  # fmt: skip
    """One part: every ``PROGRAMS``-th box of pixels times BN columns. Tensors of rank 2 or more are descriptors.

    ``columns`` is ``a`` again, for what the mask and the sums are about; with KEPT, that is still in registers. With
    HALVED, a tile is finished in two halves, for which there are registers where for the whole there are not. Without
    WALKS, a program has one box.
    """
    BM: tl.constexpr = TN * TH * TW
    SUMS: tl.constexpr = parts is not None
    WIDTH: tl.constexpr = BN // 2 if HALVED else BN
    blocks = tl.cdiv(C, BN)
    part = tl.program_id(0) // blocks
    k0 = tl.program_id(0) % blocks * BN
    zero = tl.zeros((BM // 16, 8, WIDTH), tl.float32)
    left_out = zero
    left_product = zero
    right_out = zero
    right_product = zero
    square = mm.load([0, k0]) if C <= BC else None
    if WALKS:
        for tile in range(part, tl.cdiv(N, TN) * tl.cdiv(P, TH) * tl.cdiv(Q, TW), PROGRAMS):
            left_out, left_product, right_out, right_product = one_tile(
                tile, left_out, left_product, right_out, right_product,
                dz, y, wp, a, columns, scale, shift, mm, square, rho, v, out, P, Q, k0,
                C, K, MASKED, SUMS, PRECISION, FLAT, TN, TH, TW, BN, BK, BC, HALVED, KEPT,
            )  # fmt: skip
    else:
        left_out, left_product, right_out, right_product = one_tile(
            part, left_out, left_product, right_out, right_product,
            dz, y, wp, a, columns, scale, shift, mm, square, rho, v, out, P, Q, k0,
            C, K, MASKED, SUMS, PRECISION, FLAT, TN, TH, TW, BN, BK, BC, HALVED, KEPT,
        )  # fmt: skip
    if SUMS:
        store_sums(parts, left_out, left_product, part, k0, C)
        if HALVED:
            store_sums(parts, right_out, right_product, part, k0 + WIDTH, C)


def gram_dgrad_parts(m: int, c: int, config: ConvConfig, multiprocessors: int) -> int:
    """Partial sums that :func:`launch_gram_dgrad` makes best.

    About two programs a multiprocessor where the short reduction is one step (``c <= config.bk``). Where it is not, a
    program has one tile: it computes long enough, and has no registers left for sums of several.

    Args:
        m, c: rows and columns of ``out``.
        config: the configuration.
        multiprocessors: of the GPU.
    """
    tiles = cdiv(m, config.bm)
    if c > config.bk:
        return tiles
    wanted = cdiv(2 * multiprocessors, cdiv(c, config.bn))
    return cdiv(tiles, cdiv(tiles, wanted))


def launch_gram_dgrad(
    dz: torch.Tensor,
    y: torch.Tensor | None,
    wp: torch.Tensor,
    a: torch.Tensor,
    prologue: Normalised | None,
    mm: torch.Tensor,
    rho: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    parts: torch.Tensor | None,
    masked: bool,
    stride: int,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`gram_dgrad`.

    Args:
        dz: ``[M,K]`` dense, M = N*P*Q, gradient of the convolution's normalised output.
        y: ``[M,K]`` dense or None: ``dz`` counts where ``y > 0``.
        wp: ``[K,C]`` dense, dtype of ``dz``.
        a: ``[N,H,W,C]`` dense, the convolution's input, raw where ``prologue`` is given; its pixels at multiples of
            ``stride`` are read.
        prologue: BN's vectors of ``a``, or None.
        mm: ``[C,C]`` dense, dtype of ``dz``.
        rho, v: dense fp32 ``[C]``.
        out: ``[M,C]`` dense.
        parts: dense fp32 ``[P,2,C]`` or None: sums of ``out`` and of ``out * a`` (the raw a), over the rows of each of
            P programs a block of columns; :func:`gram_dgrad_parts` says which P is good, any is right.
        masked: whether ``out`` is zero where the prologue's ReLU was.
        stride: 1, or 2 without ``parts``; sizes may be odd.
        config: one of :func:`gram_dgrad_configs`.
        precision: of fp32 products, ``"tf32"`` or ``"ieee"``.

    Raises:
        ValueError: ``masked`` without a prologue, ``parts`` with a stride, another stride, or sizes that do not fit.
    """
    if masked and prologue is None:
        raise ValueError("masked=True needs the prologue whose ReLU is the mask; give it, or masked=False")
    if stride not in (1, 2) or (stride == 2 and parts is not None):
        raise ValueError(f"stride must be 1, or 2 with parts=None, got stride={stride}")
    m, k = dz.shape
    a = a[:, ::stride, ::stride]  # as a tensor map: the pixels that are read, whatever lies between them
    n, p, q, c = a.shape
    if m != n * p * q:
        raise ValueError(f"dz must have a row for each of the {n}x{p}x{q} pixels of a at stride {stride}, got {m} rows")
    flat = stride == 1
    (tn, th, tw), bn = config.box, config.bn
    if flat:
        tn, th, tw, n, p, q = 1, 1, config.bm, 1, 1, m
    box = [tw] if flat else [tn, th, tw]
    bk, bc = chunk(k, config), chunk(c, config)

    def describe(t: torch.Tensor, channels: int) -> TensorDescriptor:
        if flat:
            t = t.view(m, t.shape[-1])
        elif t.dim() == 2:
            t = t.view(n, p, q, t.shape[-1])
        return TensorDescriptor.from_tensor(t, [*box, channels])

    stored = bn // 2 if (halved := bn >= 128) else bn
    kept = c <= bc == bn and config.warps >= 8  # with four warps there are no registers for it
    tiles = cdiv(n, tn) * cdiv(p, th) * cdiv(q, tw)
    programs = tiles if parts is None else parts.shape[0]
    filters = TensorDescriptor.from_tensor
    count("gram_dgrad")
    gram_dgrad[(programs * cdiv(c, bn),)](
        describe(dz, bk), None if y is None else describe(y, bk), filters(wp, [bk, bn]), describe(a, bc),
        None if parts is None and not masked else describe(a, stored), prologue.scale if prologue else None,
        prologue.shift if prologue else None, filters(mm, [bc, bn]), rho, v, describe(out, stored), parts,
        n, p, q, programs, C=c, K=k, MASKED=masked, PRECISION=precision, FLAT=flat,
        TN=tn, TH=th, TW=tw, BN=bn, BK=bk, BC=bc, HALVED=halved, KEPT=kept,
        WALKS=programs != tiles, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def gram_dgrad_configs(shape: ConvShape, itemsize: int, relu: bool = False) -> list[ConvConfig]:
    """Configurations for :func:`launch_gram_dgrad`, none of which spills on sm_90 in bf16; the first is the heuristic.

    Args:
        shape: of the forward convolution, 1x1 of stride 1 or 2.
        itemsize: bytes of an element.
        relu: whether ``y`` is given, which takes registers.
    """

    def config(bm: int, bn: int, bk: int, warps: int, stages: int) -> ConvConfig:
        box = (1, 1, bm) if shape.stride == 1 else least_waste_box(shape, bm)
        return ConvConfig("gram_dgrad", box, bn, bk, warps, stages)

    bn = min(128, max(16, next_power_of_two(shape.c)))
    if itemsize == 4:
        return [config(128, min(64, bn), 32, 8, 2)]
    if relu:
        return [config(64 if bn < 128 else 128, bn, 64, 4, 3)]
    narrow = config(128, min(64, bn), 64, 4, 3)
    if bn < 128:
        return [narrow, config(128, bn, 128, 8, 2), config(64, bn, 64, 4, 3)]
    wide = [config(128, 128, 64, 4, 3), config(128, 128, 64, 8, 3), narrow]
    return [config(128, 128, 128, 8, 2), *wide] if shape.c <= 128 else wide

"""The end of a bottleneck in training: BN and ReLU of the 3x3's output, 1x1 convolution, BN, shortcut and ReLU at once.

    a = relu(c2 * scale + shift)                                 rounded to the tensors' dtype, never stored
    y = relu((a w3^T) * scale3 + shift3 + shortcut)              shortcut = x, or (x wd^T) * scaled + shiftd

The statistics of BN3 are those of a linear map, known from the second moments of ``a`` before this kernel runs
(``gram_bn.py``), so its raw output need not exist. A projection has an accumulator of its own: nothing is divided by a
scale that may be zero.

A program owns BM pixels. Where a chunk of BK channels holds all of them, ``a`` (and the projected pixels) are made once
and stay in registers, as left operand, while the program walks over blocks of BN output channels:

    a[BM, C]           = relu(bn2(c2))                           once
    for BN of the program's channels at a time:
        y[BM, BN]      = relu(bn3(a w3[BN, C]^T) + shortcut[BM, BN])

More channels come chunk by chunk, normalised as they are loaded, and a program has one block of BN output channels.

Where a program has all output channels, it can compute the next block's first 1x1 from them as well, so that nothing
reads ``y`` for that: ``after[BM, CN] += y[BM, BN] w[CN, BN]^T``, stored raw, with the statistics of its BN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig, least_waste_box, next_power_of_two
from .epilogue import relu
from .geometry import ConvShape, cdiv
from .launch import count, multiprocessors
from .moments import from_pivot, quotient
from .prologue import Normalised, bn_relu
from .tiles import box_origin


@dataclass(frozen=True)
class Project:
    """A projection shortcut: 1x1 convolution and BN.

    Args:
        x: ``[N,H,W,Cx]`` dense, the block's input.
        wd: ``[K,Cx]`` dense, dtype of ``x``.
        scale, shift: dense fp32 ``[K]``, of the projection's BN.
        stride: 1 or 2; sizes may be odd.
    """

    x: torch.Tensor
    wd: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    stride: int = 1


@dataclass(frozen=True)
class Following:
    """The next block's first 1x1, raw, with its statistics.

    Args:
        w: ``[CN,K]`` dense, dtype of ``y``; CN a power of two from 16 to 256.
        c: ``[N,P,Q,CN]`` dense, the raw output.
        parts: dense fp32 ``[P,3,CN]``: count, mean and M2 of the pixels of each of P programs; about two a
            multiprocessor are best, any number is right.
    """

    w: torch.Tensor
    c: torch.Tensor
    parts: torch.Tensor


@triton.jit
def pixels(x, n0, p0, q0, c0, BM: tl.constexpr, FLAT: tl.constexpr):
    """``[BM, channels]`` of a box of pixels; ``FLAT``: ``x`` is ``[M, C]`` and ``q0`` the first row."""
    if FLAT:
        return x.load([q0, c0])
    else:
        t = x.load([n0, p0, q0, c0])
        return t.reshape(BM, t.shape[-1])


@triton.jit
def normalised(c2, scale, shift, c0, C: tl.constexpr):
    """Channels from ``c0`` on of raw pixels behind BN and ReLU, or as they are where ``scale`` is None."""
    if scale is not None:
        c = c0 + tl.arange(0, c2.shape[1])
        s = tl.load(scale + c, mask=c < C, other=0.0)
        t = tl.load(shift + c, mask=c < C, other=0.0)
        c2 = bn_relu(c2, s[None, :], t[None, :])
    return c2


@triton.jit
def halves(acc):
    """Left and right half of the columns; they lie in different registers already."""
    return acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def finish(
    acc, projected, k0, scale3, shift3, shortcut, scaled, shiftd, y, n0, p0, q0, K,
    PROJECT: tl.constexpr, FLAT: tl.constexpr, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
):  # fmt: skip
    """BN, shortcut and ReLU of the columns from ``k0`` on, which are stored."""
    BN: tl.constexpr = acc.shape[1]
    k = k0 + tl.arange(0, BN)
    inside = k < K
    shift = tl.load(shift3 + k, mask=inside, other=0.0)
    if PROJECT:
        shift += tl.load(shiftd + k, mask=inside, other=0.0)
    out = tl.fma(acc, tl.load(scale3 + k, mask=inside, other=0.0)[None, :], shift[None, :])
    if PROJECT:
        out = tl.fma(projected, tl.load(scaled + k, mask=inside, other=0.0)[None, :], out)
    else:
        out += pixels(shortcut, n0, p0, q0, k0, TN * TH * TW, FLAT).to(tl.float32)
    out = relu(out).to(y.dtype)
    if FLAT:
        y.store([q0, k0], out)
    else:
        y.store([n0, p0, q0, k0], out.reshape(TN, TH, TW, BN))
    return out


@triton.jit
def one_box(
    box, first, c2, scale, shift, w3, scale3, shift3, shortcut, wd, scaled, shiftd, y, next_w, P, Q, K, COLUMNS,
    C: tl.constexpr, CX: tl.constexpr, CN: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
    HALVED: tl.constexpr,
):  # fmt: skip
    """``COLUMNS`` blocks of BN output channels from ``first`` on; with ``next_w``, what they add to the next 1x1."""
    BM: tl.constexpr = TN * TH * TW
    PROJECT: tl.constexpr = wd is not None
    n0, p0, q0 = box_origin(box, P, Q, TN, TH, TW)
    after = tl.zeros((BM, CN), tl.float32)
    if C <= BK:
        a = normalised(pixels(c2, n0, p0, q0, 0, BM, FLAT), scale, shift, 0, C)
    if PROJECT and CX <= BX:
        x = pixels(shortcut, n0, p0, q0, 0, BM, FLAT)
    for k0 in range(first, tl.minimum(first + COLUMNS * BN, K), BN):
        if C <= BK:
            acc = tl.dot(a, w3.load([k0, 0]).T, input_precision=PRECISION)
        else:
            acc = tl.zeros((BM, BN), tl.float32)
            for c0 in range(0, C, BK):
                chunk = normalised(pixels(c2, n0, p0, q0, c0, BM, FLAT), scale, shift, c0, C)
                acc = tl.dot(chunk, w3.load([k0, c0]).T, acc, input_precision=PRECISION)
        projected = acc
        if PROJECT:
            if CX <= BX:
                projected = tl.dot(x, wd.load([k0, 0]).T, input_precision=PRECISION)
            else:
                projected = tl.zeros((BM, BN), tl.float32)
                for c0 in range(0, CX, BX):
                    chunk = pixels(shortcut, n0, p0, q0, c0, BM, FLAT)
                    projected = tl.dot(chunk, wd.load([k0, c0]).T, projected, input_precision=PRECISION)
        if HALVED:
            left, right = halves(acc)
            projected_left, projected_right = halves(projected)
            finish(
                left, projected_left, k0, scale3, shift3, shortcut, scaled, shiftd, y, n0, p0, q0, K,
                PROJECT, FLAT, TN, TH, TW,
            )  # fmt: skip
            finish(
                right, projected_right, k0 + BN // 2, scale3, shift3, shortcut, scaled, shiftd, y, n0, p0, q0, K,
                PROJECT, FLAT, TN, TH, TW,
            )  # fmt: skip
        else:
            out = finish(
                acc, projected, k0, scale3, shift3, shortcut, scaled, shiftd, y, n0, p0, q0, K,
                PROJECT, FLAT, TN, TH, TW,
            )  # fmt: skip
            if next_w is not None:
                after = tl.dot(out, next_w.load([0, k0]).T, after, input_precision=PRECISION)
    return after


@triton.jit
def expand(
    c2, scale, shift, w3, scale3, shift3, shortcut, wd, scaled, shiftd, y, next_w, next_c, next_parts,
    N, P, Q, K, COLUMNS, GROUPS,
    C: tl.constexpr, CX: tl.constexpr, CN: tl.constexpr, PRECISION: tl.constexpr, FLAT: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BX: tl.constexpr,
    HALVED: tl.constexpr,
):  # fmt: skip
    """A box of pixels times ``COLUMNS`` blocks of BN output channels. Tensors of rank 2 or more are descriptors.

    With ``wd``, ``shortcut`` is the projection's input; BX is the width of its chunks. With HALVED, a block is finished
    in two halves, for which there are registers where for the whole there are not. With ``next_w``, a program walks
    over boxes and all their channels, and ``next_parts`` gets count, mean and M2 of its pixels of ``next_c``.
    """
    if next_w is None:
        box = tl.program_id(0) // GROUPS
        first = tl.program_id(0) % GROUPS * COLUMNS * BN
        one_box(
            box, first, c2, scale, shift, w3, scale3, shift3, shortcut, wd, scaled, shiftd, y, next_w, P, Q, K, COLUMNS,
            C, CX, CN, PRECISION, FLAT, TN, TH, TW, BN, BK, BX, HALVED,
        )  # fmt: skip
    else:
        BM: tl.constexpr = TN * TH * TW
        number = 0.0
        pivot = tl.zeros((CN,), tl.float32)
        total = tl.zeros((CN,), tl.float32)
        squares = tl.zeros((CN,), tl.float32)
        i = tl.arange(0, BM)
        channel = tl.arange(0, CN)  # an identity gather leaves a channel's sums in one thread: few registers
        for box in range(tl.program_id(0), tl.cdiv(N, TN) * tl.cdiv(P, TH) * tl.cdiv(Q, TW), tl.num_programs(0)):
            after = one_box(
                box, 0, c2, scale, shift, w3, scale3, shift3, shortcut, wd, scaled, shiftd, y, next_w, P, Q, K, COLUMNS,
                C, CX, CN, PRECISION, FLAT, TN, TH, TW, BN, BK, BX, HALVED,
            ).to(next_c.dtype)  # fmt: skip
            n0, p0, q0 = box_origin(box, P, Q, TN, TH, TW)
            if FLAT:
                next_c.store([q0, 0], after)
            else:
                next_c.store([n0, p0, q0, 0], after.reshape(TN, TH, TW, CN))
            stored = (n0 + i // (TH * TW) < N) & (p0 + i // TW % TH < P) & (q0 + i % TW < Q)
            here = (tl.minimum(TN, N - n0) * tl.minimum(TH, P - p0) * tl.minimum(TW, Q - q0)).to(tl.float32)
            values = after.to(tl.float32)
            if number == 0:
                pivot = quotient(tl.gather(tl.sum(tl.where(stored[:, None], values, 0.0), 0), channel, 0), here)
            deviation = tl.where(stored[:, None], values - pivot[None, :], 0.0)
            number += here
            total += tl.gather(tl.sum(deviation, 0), channel, 0)
            squares += tl.gather(tl.sum(deviation * deviation, 0), channel, 0)
        mean, m2 = from_pivot(number, pivot, total, squares)
        offset = tl.program_id(0) * 3 * CN + channel
        tl.store(next_parts + offset, tl.zeros((CN,), tl.float32) + number)
        tl.store(next_parts + offset + CN, mean)
        tl.store(next_parts + offset + 2 * CN, m2)


def launch_expand(
    c2: torch.Tensor,
    prologue: Normalised | None,
    w3: torch.Tensor,
    third: Normalised,
    shortcut: torch.Tensor | Project,
    y: torch.Tensor,
    config: ConvConfig,
    precision: str,
    following: Following | None = None,
) -> None:
    """Launches :func:`expand`.

    Args:
        c2: ``[N,P,Q,C]`` dense, the 3x3's raw output; C a multiple of 16 bytes, as every channel count here.
        prologue: BN2's vectors, or None where ``c2`` is multiplied as it is.
        w3: ``[K,C]`` dense, dtype of ``c2``.
        third: BN3's vectors.
        shortcut: ``[N,P,Q,K]`` dense, or the projection.
        y: ``[N,P,Q,K]`` dense.
        config: one of :func:`expand_configs`.
        precision: of fp32 products, ``"tf32"`` or ``"ieee"``.
        following: the next block's first 1x1, computed from ``y`` in the same pass.

    Raises:
        ValueError: the projection's sizes do not fit, its stride is neither 1 nor 2, or ``following`` cannot be
            computed with this configuration.
    """
    n, p, q, c = c2.shape
    k = w3.shape[0]
    project = shortcut if isinstance(shortcut, Project) else None
    source = project.x if project else shortcut
    assert isinstance(source, torch.Tensor)
    stride = project.stride if project else 1
    if stride not in (1, 2):
        raise ValueError(f"the projection's stride must be 1 or 2, got {stride}; project with a convolution of its own")
    source = source[:, ::stride, ::stride]  # as a tensor map: the pixels that are read, whatever lies between them
    if source.shape[:3] != c2.shape[:3]:
        raise ValueError(
            f"shortcut must have the pixels {n}x{p}x{q} of c2, got {tuple(source.shape[:3])} at stride {stride}"
        )
    flat = stride == 1
    (tn, th, tw), bn = config.box, config.bn
    if flat:
        tn, th, tw, n, p, q = 1, 1, config.bm, 1, 1, n * p * q
    box = [tw] if flat else [tn, th, tw]

    def describe(t: torch.Tensor, channels: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(t.flatten(0, 2) if flat else t, [*box, channels])

    cx = source.shape[-1] if project else 0
    bk, bx = chunk(c, config), chunk(cx, config) if project else 0
    whole = c <= bk and cx <= bx
    halved = not whole and bn >= 128
    stored = bn // 2 if halved else bn
    rows = cdiv(n, tn) * cdiv(p, th) * cdiv(q, tw)
    blocks = cdiv(k, bn)
    columns = 1
    if whole:  # split the columns only to occupy the device
        columns = cdiv(blocks, min(blocks, cdiv(2 * multiprocessors(c2.device), rows)))
    cn = 16
    if following is not None:
        cn = following.w.shape[0]
        if not whole or cn & (cn - 1) or not 16 <= cn <= 256:
            raise ValueError(
                f"following needs all of {max(c, cx)} channels in one chunk and a power of two from 16 to 256 filters, "
                f"got bk={config.bk} and {cn} filters; take another configuration, or launch_conv_stats on y"
            )
        columns = blocks
    groups = cdiv(blocks, columns)
    programs = rows * groups if following is None else following.parts.shape[0]
    filters = TensorDescriptor.from_tensor
    count("expand")
    expand[(programs,)](
        describe(c2, bk), prologue.scale if prologue else None, prologue.shift if prologue else None,
        filters(w3, [bn, bk]), third.scale, third.shift, describe(source, bx if project else stored),
        filters(project.wd, [bn, bx]) if project else None, project.scale if project else None,
        project.shift if project else None, describe(y, stored),
        filters(following.w, [cn, bn]) if following else None, describe(following.c, cn) if following else None,
        following.parts if following else None, n, p, q, k, columns, groups,
        C=c, CX=cx, CN=cn, PRECISION=precision, FLAT=flat, TN=tn, TH=th, TW=tw, BN=bn, BK=bk, BX=bx,
        HALVED=halved, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def chunk(channels: int, config: ConvConfig) -> int:
    """Channels of one chunk of the reduction."""
    return min(config.bk, max(16, next_power_of_two(channels)))


def expand_configs(
    shape: ConvShape, itemsize: int, project: ConvShape | None = None, following: int = 0, precision: str = "tf32"
) -> list[ConvConfig]:
    """Configurations for :func:`launch_expand`, none of which spills on sm_90; the first is the heuristic.

    Args:
        shape: of the expanding convolution, pointwise.
        itemsize: bytes of an element.
        project: of the projection, or None for an identity shortcut.
        following: filters of the next block's first 1x1 where that is computed as well, else 0. The list is empty
            where registers do not suffice for it, or they are no power of two from 16 on.
        precision: of fp32 products.
    """
    flat = project is None or project.stride == 1

    def config(bm: int, bn: int, bk: int, warps: int, stages: int) -> ConvConfig:
        box = (1, 1, bm) if flat else least_waste_box(shape, bm)
        return ConvConfig("expand", box, min(bn, max(16, next_power_of_two(shape.k))), bk, warps, stages)

    if following:
        largest = max(shape.c, following, project.c if project else 0)
        described = following >= 16 and not following & (following - 1)
        if not described or itemsize == 4 or largest > 128 or (project and largest > 64):
            return []
        return [config(128, 64, 64 if shape.c <= 64 else 128, 8, 2)]
    if itemsize == 4:  # two exact accumulators of 128 rows would spill
        return [config(64 if project and precision == "ieee" else 128, 64, 32, 8, 2)]
    chunks = [config(128, 128, 64, 8, 3), config(128, 64, 64, 4, 3)]
    if project is None:
        if shape.c <= 64:
            return [config(128, 64, 64, 4, 3), config(128, 64, 64, 8, 3), config(128, 128, 64, 8, 2)]
        if shape.c <= 128:
            return [config(128, 64, 128, 8, 3), config(128, 64, 128, 4, 2), *chunks]
        wide = config(128, 256, 64, 8, 3)
        return [config(128, 64, 256, 8, 3), wide, *chunks] if shape.c <= 256 else [wide, *chunks]
    if max(shape.c, project.c) <= 64:
        return [config(64, 64, 64, 4, 3), config(128, 64, 64, 8, 3)]
    if shape.c <= 128 and project.c <= 256:
        return [config(128, 64, 256, 8, 2), *chunks]
    return chunks

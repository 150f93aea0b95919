"""Gradient of a convolution's weights, and the Gram matrix of an activation: products of pixels with pixels.

    dw[k,r,s,c] = sum over n,p,q of d[n,p,q,k] * h[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c]
    sums[k]     = sum over n,p,q of d[n,p,q,k]
    gram        : s2 = sum of h h^T, s1 = sum of h: the same with both operands equal

d is the gradient behind its prologue, h the input behind its own. A program owns a block of output channels, a block of
input channels and a group of filter taps, walks over its share of the boxes of pixels and keeps one accumulator for
each tap in registers. Boxes and padding are those of ``conv_tma``.

With stride 1, tap (r, s) needs pairs of pixels that are (r, s) apart, whichever of the two is shifted. So the input's
box moves with r and the gradient's box with s: RT x ST taps need RT + ST boxes. With stride 2, a tap reads every second
pixel of a row: either those of even columns or those of odd ones, at one shift of the gradient or another. So the three
taps of a filter row need two boxes of each, none of which has padding. Otherwise the input's box moves with both.

The shares are added in a fixed order by ``sum_parts``: no atomics, results repeat bitwise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import MOST_WGRAD_SPLITS, ConvConfig, least_waste_box, next_power_of_two
from .geometry import ConvShape, cdiv
from .launch import count
from .prologue import BNBackward, Normalised, bn_backward_of, bn_relu
from .sum_parts import MOST_PART_BYTES, launch_sum_parts
from .tiles import box_origin
from .wgrad_rolling import launch_wgrad_rolling, rolling_wgrad_configs

#: Accumulators of a thread; the rest of its 255 registers holds operands and addresses.
MOST_ACCUMULATORS = 192


@triton.jit
def load_box(t, n0, p0, q0, c0, BM: tl.constexpr, BN: tl.constexpr, FLAT: tl.constexpr):
    """A box of pixels times channels as ``[BM, BN]``."""
    if FLAT:
        return t.load([q0, c0])
    else:
        return t.load([n0, p0, q0, c0]).reshape(BM, BN)


@triton.jit
def replaced(values, i: tl.constexpr, value):
    """A tuple with another i-th element."""
    return values[:i] + (value,) + values[i + 1 :]  # noqa: RUF005  the compiler knows no starred elements


@triton.jit
def gradient_box(
    dy, other, g1, g2, g3, inside, n0, p0, q0, k0,
    BM: tl.constexpr, BN: tl.constexpr, FLAT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """``d`` of one box, zero where it reaches outside."""
    d = load_box(dy, n0, p0, q0, k0, BM, BN, FLAT)
    if KIND == "mask":
        d = tl.where(load_box(other, n0, p0, q0, k0, BM, BN, FLAT) > 0, d, tl.zeros_like(d))
    elif KIND == "bn_backward":
        d = bn_backward_of(d, load_box(other, n0, p0, q0, k0, BM, BN, FLAT), g1, g2, g3)
        d = tl.where(inside, d, tl.zeros_like(d))
    elif KIND == "bn_relu":
        d = tl.where(inside, bn_relu(d, g1, g2), tl.zeros_like(d))
    return d


@triton.jit
def wgrad(
    x, dy, other, g1, g2, g3, scale, shift, parts, sums, N, H, W, P, Q, C, K, BOXES, ACROSS, PART,
    R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    RT: tl.constexpr, ST: tl.constexpr, CENTRE: tl.constexpr, CENTRE_ROW: tl.constexpr, SHIFTED: tl.constexpr,
    SHIFTS: tl.constexpr, FLAT: tl.constexpr, KIND: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, ROW_PADDING: tl.constexpr, COLUMN_PADDING: tl.constexpr,
    SKIP: tl.constexpr,
):  # fmt: skip
    """One share of the pixels for BN output channels, BC input channels and RT x ST taps.

    ``x, dy, other`` are tensor descriptors: of rank 2 where ``FLAT``, and of rank 5 for a strided x. With ``SHIFTED``
    the boxes tile the columns of x, else those of dy; ``ACROSS`` is their number. Of a strided x they tile either half
    of rows and columns, and RT is 1. ``sums`` comes from the taps of filter column ``CENTRE``, whose boxes of dy cover
    each pixel once. With ``SKIP``, in rows of padding the gradient is zeroed and not x, and the sums come from filter
    row ``CENTRE_ROW``, which meets none.
    """
    HALVES: tl.constexpr = SHIFTED and STRIDE == 2
    BOXES_OF_ROW: tl.constexpr = 2 if HALVES else 1 if SHIFTED else ST
    BM: tl.constexpr = TN * TH * TW
    column_blocks = tl.cdiv(K, BN)
    row_blocks = tl.cdiv(C, BC)
    blocks = column_blocks * row_blocks
    program = tl.program_id(0)
    k0 = program % column_blocks * BN
    c0 = program // column_blocks % row_blocks * BC
    group = program // blocks % (R // RT * (S // ST))
    part = program // (blocks * (R // RT * (S // ST)))
    r0 = group // (S // ST) * RT
    s0 = group % (S // ST) * ST
    k = k0 + tl.arange(0, BN)
    c = c0 + tl.arange(0, BC)
    pixel = tl.arange(0, BM)
    column, row, image = pixel % TW, pixel // TW % TH, pixel // (TW * TH)
    v1, v2, v3 = 0.0, 0.0, 0.0
    if g1 is not None:
        v1 = tl.load(g1 + k, mask=k < K, other=0.0)[None, :]
        v2 = tl.load(g2 + k, mask=k < K, other=0.0)[None, :]
    if g3 is not None:
        v3 = tl.load(g3 + k, mask=k < K, other=0.0)[None, :]
    if scale is not None:
        x_scale = tl.load(scale + c, mask=c < C, other=0.0)[None, :]
        x_shift = tl.load(shift + c, mask=c < C, other=0.0)[None, :]
    accs = ()
    for _ in tl.static_range(RT * ST):
        accs += (tl.zeros((BC, BN) if SHIFTED else (BN, BC), tl.float32),)
    total = tl.zeros((ROWS, BN), tl.float32)
    first = (part.to(tl.int64) * BOXES // SPLIT).to(tl.int32)
    end = ((part + 1).to(tl.int64) * BOXES // SPLIT).to(tl.int32)
    tl.assume(end > first)  # else the products of the first round wait for one another
    if FLAT:
        n0, p0, q0 = 0, 0, first * BM
    else:
        n0, p0, q0 = box_origin(first, P, ACROSS, TN, TH, TW)
    for _ in range(first, end):
        # All loads before the first product: a wait between two products would make each of them wait.
        d_n0 = n0
        d_p0 = p0
        if HALVES:
            d_p0 -= (r0 * DIL - PAD) >> 1
        if SKIP:  # a row of padding meets a gradient of zeros: of an image that does not exist
            h_row = p0 + r0 * DIL - PAD
            d_n0 = tl.where((h_row >= 0) & (h_row < H), n0, N)
        ds = ()
        for s in tl.static_range(SHIFTS):
            d_q0 = q0
            if HALVES:
                d_q0 += s
            elif SHIFTED:
                d_q0 += PAD - (s0 + s) * DIL
            if FLAT:
                inside = q0 + pixel < Q
            else:
                d_column = d_q0 + column
                inside = (image < N - d_n0) & (row < P - d_p0) & (d_column >= 0) & (d_column < Q)
            d = gradient_box(dy, other, v1, v2, v3, inside[:, None], d_n0, d_p0, d_q0, k0, BM, BN, FLAT, KIND)
            if sums is not None:
                if s == (CENTRE if SHIFTED and not HALVES and ST == S else 0):
                    total += tl.sum(d.to(tl.float32).reshape(BM // ROWS, ROWS, BN), 0)
            ds += (d,)
        raw = ()
        for box in tl.static_range(RT * BOXES_OF_ROW):
            dh = (r0 + box // BOXES_OF_ROW) * DIL - PAD
            dw = 0 if SHIFTED else (s0 + box % BOXES_OF_ROW) * DIL - PAD
            if SAME:
                h = ds[0]
            elif HALVES:
                h = x.load([n0, p0, dh & 1, q0, box * C + c0]).reshape(BM, BC)
            elif STRIDE == 1:
                h = load_box(x, n0, p0 + dh, q0 + dw, c0, BM, BC, FLAT)
            else:  # input row 2*p + dh is row p + dh//2 of half dh%2
                h = x.load([n0, p0 + (dh >> 1), dh & 1, q0 + (dw >> 1), (dw & 1) * C + c0]).reshape(BM, BC)
            raw += (h,)
        for box in tl.static_range(RT * BOXES_OF_ROW):  # normalised while the products of the one before are under way
            h = raw[box]
            if scale is not None and not SAME:
                bias = x_shift
                if (ROW_PADDING or COLUMN_PADDING) and not SKIP:
                    # The TMA reads zeros in the padding, and BN and ReLU of zero without a shift are zero.
                    dh = (r0 + box // BOXES_OF_ROW) * DIL - PAD
                    h_row = p0 * STRIDE + dh
                    padding = (h_row < 0) | (h_row >= H)
                    if COLUMN_PADDING or TH > 1:
                        dw = 0 if SHIFTED else (s0 + box % BOXES_OF_ROW) * DIL - PAD
                        h_row += row * STRIDE
                        h_column = (q0 + column) * STRIDE + dw
                        padding = (h_row < 0) | (h_row >= H) | (h_column < 0) | (h_column >= W)
                        padding = padding[:, None]
                    bias = tl.where(padding, 0.0, x_shift)
                h = bn_relu(h, x_scale, bias)
            # What several products share is the left operand: it passes through registers.
            for tap in tl.static_range(RT * ST):
                if HALVES:  # column 2*q + dw is column q + dw//2 of half dw%2
                    if ((tap * DIL - PAD) & 1) == box:
                        acc = tl.dot(h.T, ds[-((tap * DIL - PAD) >> 1)], accs[tap], input_precision=PRECISION)
                        accs = replaced(accs, tap, acc)
                elif SHIFTED:
                    if tap // ST == box:
                        acc = tl.dot(h.T, ds[tap % ST], accs[tap], input_precision=PRECISION)
                        accs = replaced(accs, tap, acc)
                elif tap == box:
                    acc = tl.dot(ds[0].T, h, accs[tap], input_precision=PRECISION)
                    accs = replaced(accs, tap, acc)
        q0 += TW  # counted, because divisions would cost more instructions than the products
        if not FLAT:
            p0 = tl.where(q0 < ACROSS, p0, p0 + TH)
            q0 = tl.where(q0 < ACROSS, q0, 0)
            n0 = tl.where(p0 < P, n0, n0 + TN)
            p0 = tl.where(p0 < P, p0, 0)
    out = parts + part.to(tl.int64) * PART
    if SHIFTED:
        out += k[None, :] * (R * S * C) + c[:, None]
        stored = (c < C)[:, None] & (k < K)[None, :]
    else:
        out += k[:, None] * (R * S * C) + c[None, :]
        stored = (k < K)[:, None] & (c < C)[None, :]
    for r in tl.static_range(RT):
        for s in tl.static_range(ST):
            tl.store(out + ((r0 + r) * S + s0 + s) * C, accs[r * ST + s], mask=stored)
    if sums is not None:
        if (c0 == 0) & (r0 == (0 if RT == R else CENTRE_ROW)) & (s0 == (0 if ST == S else CENTRE)):
            tl.store(sums + part.to(tl.int64) * PART + k, tl.sum(total, 0), mask=k < K)


def tap_group(shape: ConvShape, config: ConvConfig) -> tuple[int, int]:
    """Filter rows and columns whose taps share a program: all, one row, or a single tap, as the registers allow."""
    thread = config.bn * config.bk / (32 * config.warps)
    for rows, columns in ((1 if halves(shape, config) else shape.r, shape.s), (1, shape.s)):
        if rows * columns * thread <= MOST_ACCUMULATORS:
            return rows, columns
    return 1, 1


def shifts_gradient(shape: ConvShape) -> int | None:
    """The filter column at which boxes that tile the columns of x cover dy once, or None if there is none.

    Where it exists, the gradient's box can move with the filter's column.
    """
    if shape.stride != 1 or shape.padding % shape.dilation:
        return None
    centre = shape.padding // shape.dilation
    return centre if centre < shape.s and shape.q <= shape.w else None


def strided_3x3(shape: ConvShape) -> bool:
    """Whether the halves of x's columns meet no padding, each at one or two shifts of the gradient."""
    same = (shape.r, shape.s, shape.stride, shape.padding, shape.dilation) == (3, 3, 2, 1, 1)
    return same and shape.h % 2 == shape.w % 2 == 0


def halves(shape: ConvShape, config: ConvConfig) -> bool:
    """Whether boxes are of the halves of x's columns; with fewer channels, a box for each tap takes less."""
    return config.bk >= 128 and strided_3x3(shape)


def wgrad_configs(
    shape: ConvShape, itemsize: int, normalised: bool = False, prologue: bool = False, multiprocessors: int = 132
) -> list[ConvConfig]:
    """Configurations for a gradient, the best guess first; none where a tensor map cannot describe the input.

    Args:
        shape: of the forward convolution.
        itemsize: bytes of an element of x and dy.
        normalised: whether x has a prologue.
        prologue: whether dy has one. Both cost registers, and that of dy is repeated for each tap of a 3x3: better
            materialise such a gradient.
        multiprocessors: of the GPU; the shares of the pixels are chosen to fill it.
    """
    if _undescribable(shape):
        return []
    k, c = next_power_of_two(shape.k), next_power_of_two(shape.c)
    if itemsize == 4:  # no transposed operands in shared memory: the tensor cores of the generation before
        tiles = [(64, 64, 8, 2)]
    elif shape.r * shape.s == 1:
        tiles = [(128, 256, 8, 2), (128, 128, 8, 3), (128, 128, 4, 2)]
        if min(k, c) <= 64:
            tiles = [(256, 64, 8, 3), (64, 256, 8, 3), (64, 64, 4, 3)]
    elif prologue:
        tiles = [(64, 64, 4 if min(k, c) >= 64 else 8, 2)]
    elif shifts_gradient(shape) is None:
        tiles = [(128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2)]
        if normalised and not strided_3x3(shape):  # an input box for each tap
            tiles = tiles[1:]
    else:
        tiles = [(128, 128, 8, 3), (64, 64, 8, 2), (64, 64, 4, 2)]
    rolling = [] if prologue else rolling_wgrad_configs(shape, itemsize, multiprocessors)
    return rolling + _tiled(tiles, shape, k, c, 32 if itemsize == 4 else 64, multiprocessors, prologue)


def _undescribable(shape: ConvShape) -> bool:
    """Whether the boxes of a tap are strided in a way that no tensor map has; the pixels of a 1x1 are a slice."""
    if shape.r == shape.s == 1 and shape.padding == 0:
        return False
    return shape.stride > 2 or (shape.stride == 2 and (shape.h % 2 > 0 or shape.w % 2 > 0))


def gram_configs(shape: ConvShape, itemsize: int, multiprocessors: int = 132) -> list[ConvConfig]:
    """Configurations for :func:`launch_gram`, the best guess first; ``shape``: 1x1, as many filters as channels."""
    c = next_power_of_two(shape.c)
    tiles = [(64, 64, 4, 2)] if itemsize == 4 else [(128, 128, 8, 3), (64, 64, 4, 3)]
    return _tiled(tiles, shape, c, c, 32 if itemsize == 4 else 64, multiprocessors)


def _tiled(
    tiles: list[tuple[int, int, int, int]],
    shape: ConvShape,
    k: int,
    c: int,
    bm: int,
    multiprocessors: int,
    prologue: bool = False,
) -> list[ConvConfig]:
    """Those of ``(bn, bk, warps, stages)`` that fit the channels, clipped to them, with box and shares."""
    shifted = shifts_gradient(shape) is not None
    least = (16, 64) if shifted else (64, 16)  # wgmma has 64 rows, those of the left operand
    clipped = []
    for bn, bk, warps, stages in tiles:
        tile = (min(bn, max(k, least[0])), min(bk, max(c, least[1])), warps, stages)
        if (bn <= k and bk <= c) or (bn, bk) == (64, 64):
            clipped.append(tile)
    configs = []
    for bn, bk, warps, stages in dict.fromkeys(clipped or [tile]):
        box = _box(shape, bm)
        config = ConvConfig("wgrad", box, bn, bk, warps, stages)
        rt, st = tap_group(shape, config)
        if (
            warps == 4 and rt > 1 and rt * st * bn * bk > 96 * 128 and not prologue
        ):  # with a prologue's operands it would spill
            continue
        if (
            shifted and rt < shape.r and warps == 4 and not prologue
        ):  # what a step costs besides products weighs on a small tile
            box = _box(shape, 2 * bm)
            config = replace(config, box=box)
        blocks = cdiv(shape.k, bn) * cdiv(shape.c, bk) * (shape.r // rt) * (shape.s // st)
        resident = max(1, 8 // warps)
        most = min(_boxes(shape, box), MOST_PART_BYTES // (4 * shape.weights), MOST_WGRAD_SPLITS)
        split = max(1, min(most, multiprocessors * resident // blocks))
        configs.append(replace(config, split=split))
    if not configs:  # all taps of a few channels: registers for them take eight warps
        return _tiled([(64, 64, 8, 2)], shape, k, c, bm, multiprocessors, prologue)
    return configs


def _box(shape: ConvShape, bm: int) -> tuple[int, int, int]:
    """The box of ``bm`` pixels that wastes least. One row high where rows are padded: then they are as a whole."""
    if shape.pointwise:
        return (1, 1, bm)
    if shape.r == shape.s == 1 or shifts_gradient(shape) is None:
        return least_waste_box(shape, bm)
    boxes = [(bm >> log, 1, 1 << log) for log in range(bm.bit_length())]
    return min(boxes, key=lambda box: (cdiv(shape.n, box[0]) * cdiv(shape.w, box[2]), -box[2]))


def _boxes(shape: ConvShape, box: tuple[int, int, int]) -> int:
    """Boxes of pixels that the shares divide among them."""
    tn, th, tw = box
    if shape.pointwise:
        return cdiv(shape.m, tn * th * tw)
    shifted = shape.r * shape.s > 1 and shifts_gradient(shape) is not None
    across = shape.w if shifted else shape.q
    return cdiv(shape.n, tn) * cdiv(shape.p, th) * cdiv(across, tw)


def wgrad_workspace_bytes(shape: ConvShape, config: ConvConfig) -> int:
    """Bytes of the partial results, one fp32 gradient and K sums for each share; 0 where there is one share."""
    return 4 * config.split * (shape.weights + shape.k) if config.split > 1 else 0


def launch_wgrad(
    dy: torch.Tensor,
    x: torch.Tensor,
    dw: torch.Tensor,
    sums: torch.Tensor | None,
    shape: ConvShape,
    dy_prologue: BNBackward | torch.Tensor | None,
    x_prologue: Normalised | None,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`wgrad`, or ``wgrad_rolling`` where that is the configuration's kernel; then ``sum_parts``.

    Args:
        dy: ``[N,P,Q,K]``, channels dense, other strides multiples of 16 bytes; all dense for a pointwise convolution.
        x: ``[N,H,W,C]``, likewise; pixel-dense rows and even H and W for filters with stride 2.
        dw: fp32 ``[K,R,S,C]`` dense, written.
        sums: fp32 ``[K]``, written, or None.
        shape: of the forward convolution.
        dy_prologue: BN's backward, or a tensor y like dy: the gradient counts where y is positive. Or None.
        x_prologue: BN and ReLU of x; the padding is zero behind it. Or None.
        config: ``box`` of pixels, ``bn`` output channels, ``bk`` input channels, ``split`` shares; one share needs no
            ``sum_parts``. ``wgrad_rolling`` has neither sums nor a prologue of dy.
        precision: of fp32 products, "tf32" or "ieee".

    Raises:
        ValueError: no tensor map describes the strided x, ``config.split`` exceeds the boxes of pixels, or the
            configuration's kernel cannot compute this.
    """
    if config.kernel == "wgrad_rolling":
        if sums is not None or dy_prologue is not None:
            raise ValueError("wgrad_rolling has neither sums nor a prologue of dy. Take a configuration of wgrad.")
        launch_wgrad_rolling(dy, x, dw, shape, x_prologue, config)
        return
    other, g = None, (None, None, None)
    kind = "none"
    if isinstance(dy_prologue, BNBackward):
        kind, other, g = "bn_backward", dy_prologue.c, tuple(dy_prologue.g)
    elif dy_prologue is not None:
        kind, other = "mask", dy_prologue
    _launch(dy, other, g, kind, x, x_prologue, False, dw, sums, shape, config, precision)


def launch_gram(
    x: torch.Tensor,
    s2: torch.Tensor,
    s1: torch.Tensor,
    stride: int,
    prologue: Normalised | None,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`wgrad` on an activation h twice: ``s2 = sum of h h^T``, ``s1 = sum of h``.

    Args:
        x: ``[N,H,W,C]``, channels dense, other strides multiples of 16 bytes; all dense with stride 1.
        s2, s1: fp32 ``[C,C]`` and ``[C]`` dense, written.
        stride: 1, or 2 for the pixels with even rows and columns only.
        prologue: h is x behind BN and ReLU; None where h is x.
        config, precision: as for :func:`launch_wgrad`.

    Raises:
        ValueError: ``config.split`` exceeds the boxes of pixels.
    """
    n, h, w, c = x.shape
    shape = ConvShape(n, h, w, c, c, stride=stride)
    source = x if stride == 1 else x[:, ::stride, ::stride]
    kind, g = ("none", (None, None, None)) if prologue is None else ("bn_relu", (prologue.scale, prologue.shift, None))
    same = max(config.bn, config.bk) >= c and config.bn == config.bk
    _launch(source, None, g, kind, x, prologue, same, s2.view(c, 1, 1, c), s1, shape, config, precision)


def _launch(
    dy: torch.Tensor,
    other: torch.Tensor | None,
    g: tuple,
    kind: str,
    x: torch.Tensor,
    x_prologue: Normalised | None,
    same: bool,
    dw: torch.Tensor,
    sums: torch.Tensor | None,
    shape: ConvShape,
    config: ConvConfig,
    precision: str,
) -> None:
    if shape.r == shape.s == 1 and shape.padding == 0 and shape.stride > 1:  # the pixels that count are a slice
        x = x[:, :: shape.stride, :: shape.stride]
        shape = ConvShape(shape.n, shape.p, shape.q, shape.c, shape.k)
        flat = False
    else:
        flat = shape.pointwise
    if _undescribable(shape):
        raise ValueError(
            f"shape {shape} has stride {shape.stride} on {shape.h}x{shape.w} pixels; allowed: stride 1, and 2 for even "
            f"sizes, which a tensor map can describe. Take the library's gradient."
        )
    (tn, th, tw), bn, bk, split = config.box, config.bn, config.bk, config.split
    if flat:
        tn, th, tw = 1, 1, config.bm
    describe = TensorDescriptor.from_tensor

    def described(t: torch.Tensor | None, channels: int) -> TensorDescriptor | None:
        if t is None:
            return None
        return describe(t.view(-1, t.shape[-1]), [tw, channels]) if flat else describe(t, [tn, th, tw, channels])

    if shape.stride == 1:
        x_box = described(x, bk)
    else:
        image, row, pixel, _ = x.stride()
        sizes = [shape.n, shape.h // 2, 2, shape.w // 2, 2 * shape.c]
        x_box = TensorDescriptor(x, sizes, [image, 2 * row, row, 2 * pixel, 1], [tn, th, 1, tw, bk])
    centre = shifts_gradient(shape)
    rt, st = tap_group(shape, config)
    halved = halves(shape, config) and st == shape.s
    # where the gradient moves, x is the left operand, of which wgmma takes no fewer than 64 rows
    shifted = halved or (centre is not None and not (x.element_size() == 2 and bk < 64 <= bn))
    across = shape.w if shifted and not halved else shape.q
    boxes = cdiv(shape.m, tw) if flat else cdiv(shape.n, tn) * cdiv(shape.p, th) * cdiv(across, tw)
    blocks = cdiv(shape.k, bn) * cdiv(shape.c, bk) * (shape.r // rt) * (shape.s // st)
    if split > boxes:
        raise ValueError(f"split={split} shares {boxes} boxes of pixels; allowed: at most {boxes}. Take fewer shares.")
    parts, sum_out, length = dw, sums, dw.numel()
    if split > 1:
        length += 0 if sums is None else shape.k
        parts = torch.empty((split, length), dtype=torch.float32, device=dw.device)
        sum_out = None if sums is None else parts[0, dw.numel() :]
    scale, shift = (None, None) if x_prologue is None else (x_prologue.scale, x_prologue.shift)
    rows = min(config.bm, max(1, 512 * config.warps // x.element_size() // bn))
    # a pixel of x outside the image counts where it meets one of dy inside
    rows_outside = shape.padding > 0 and not halved
    columns_outside = shape.w % tw > 0 and not flat if shifted else shape.padding > 0
    columns_outside = columns_outside and not halved
    one_row = th == rt == 1 and shape.p <= shape.h and (centre or 0) < shape.r
    skip = shifted and one_row and x_prologue is not None and rows_outside and not columns_outside
    count("wgrad")
    wgrad[(blocks * split,)](
        x_box, described(dy, bn), described(other, bn), *g, scale, shift, parts, sum_out,
        shape.n, shape.h, shape.w, shape.p, shape.m if flat else shape.q, shape.c, shape.k, boxes, across, length,
        R=shape.r, S=shape.s, STRIDE=shape.stride, PAD=shape.padding, DIL=shape.dilation,
        RT=rt, ST=st, CENTRE=centre or 0, CENTRE_ROW=1 if halved else centre if skip else 0, SHIFTED=shifted,
        SHIFTS=2 if halved else st if shifted else 1,
        FLAT=flat, KIND=kind, SAME=same, PRECISION=precision,
        TN=tn, TH=th, TW=tw, BC=bk, BN=bn, SPLIT=split, ROWS=rows,
        ROW_PADDING=rows_outside, COLUMN_PADDING=columns_outside, SKIP=skip,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    if split > 1:
        launch_sum_parts(parts, dw, sums)

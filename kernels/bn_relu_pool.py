"""The end of a training stem in one pass each way: 3x3/2 max-pool of the normalised, rectified convolution output.

    h[n,r,s,k] = relu(c[n,r,s,k] * scale[k] + shift[k])                  rounded, never stored
    y[n,i,j,k] = max over r in 2i-1..2i+1, s in 2j-1..2j+1 of h[n,r,s,k]
    dz         = dy of each window, at the pixel that holds the window's maximum, where that is above 0

Forward: normalising is monotone, so the largest h of a window belongs to its largest c, or to its smallest where the
scale is negative. Two values of a window are normalised instead of nine.

Backward: no index is stored; the choice of each window is computed again. A pixel's value and place are one integer, so
that one maximum finds both: the bits of a positive float are ordered like integers, and the low bits, which are zero
behind the rounding to 16 bits, hold the place (fp32 takes 64-bit integers). PyTorch takes the first of equal pixels,
but the last NaN: a NaN carries its place inverted. Windows whose maximum is not above 0 send no gradient through the
ReLU, so the order of negative values does not matter, and a pixel outside the image may count as 0.

    row 2i-1   top      A program walks down the rows of an image with tiles of four columns. Step i loads the rows 2i
    row 2i     middle   and 2i+1, completes the windows of row i, and with them the rows 2i-1 (in the windows i-1 and i)
    row 2i+1   bottom   and 2i. The last bottom row lies below the image and separates it from the next, so that the
                        share of a program is any range of steps. It starts two steps early, for the windows in front.
"""

import torch
import triton
import triton.language as tl

from .config import next_power_of_two
from .geometry import cdiv
from .launch import count, needs_int64
from .prologue import affine, bn_relu

#: Columns of an image that belong to a thread, and groups of them that belong to a program: 16 divides 112.
GROUP, GROUPS = 4, 4
#: Most programs of the backward along the pixels (each leaves one row of sums), and fewest steps of one.
PROGRAMS, SHORTEST = 1056, 8


@triton.jit
def bn_relu_pool(
    c, scale, shift, y, H, W, P, Q, C: tl.constexpr, INT64: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A box of TH x TW output pixels times BC channels of one image."""
    channel_blocks = tl.cdiv(C, BC)
    box = tl.program_id(0) // channel_blocks
    across = tl.cdiv(Q, TW)
    down = tl.cdiv(P, TH)
    image = (box // (across * down)).to(tl.int64)
    k = tl.program_id(0) % channel_blocks * BC + tl.arange(0, BC)
    pixel = tl.arange(0, TH * TW)
    i = box // across % down * TH + pixel // TW
    j = box % across * TW + pixel % TW
    c += image * H * W * C
    y += image * P * Q * C
    highest = tl.full((TH * TW, BC), float("-inf"), c.dtype.element_ty)
    lowest = tl.full((TH * TW, BC), float("inf"), c.dtype.element_ty)
    for tap in tl.static_range(9):
        # clamping repeats a pixel of the window where it reaches past an edge: no mask
        row = tl.minimum(tl.maximum(i * 2 + (tap // 3 - 1), 0), H - 1)
        column = tl.minimum(tl.maximum(j * 2 + (tap % 3 - 1), 0), W - 1)
        offset = row * W + column
        if INT64:
            offset = offset.to(tl.int64)
        value = tl.load(c + (offset * C)[:, None] + k[None, :], mask=(k < C)[None, :], other=0.0)
        highest = tl.maximum(highest, value, propagate_nan=tl.PropagateNan.ALL)
        lowest = tl.minimum(lowest, value, propagate_nan=tl.PropagateNan.ALL)
    factor = tl.load(scale + k, mask=k < C, other=0.0)[None, :]
    offset_k = tl.load(shift + k, mask=k < C, other=0.0)[None, :]
    above = bn_relu(highest, factor, offset_k)
    below = bn_relu(lowest, factor, offset_k)
    best = tl.maximum(above, below, propagate_nan=tl.PropagateNan.ALL)
    offset = i * Q + j
    if INT64:
        offset = offset.to(tl.int64)
    stored = ((i < P) & (j < Q))[:, None] & (k < C)[None, :]
    tl.store(y + (offset * C)[:, None] + k[None, :], best, mask=stored)


@triton.jit
def load_pixel(c, column, W, row_inside, in_c):
    """One pixel of each group, and whether it lies in the image."""
    inside = ((column >= 0) & (column < W) & row_inside)[:, None]
    return tl.load(c, mask=inside & in_c, other=0.0), inside


@triton.jit
def place_key(c, scale, shift, inside, PLACE: tl.constexpr):
    """Orders the pixels of a window: rounded value first, then PLACE (0 to 63, the earlier the higher; NaN inverted).

    Above 63 exactly where the value is above 0 or NaN; a pixel outside counts as 0.
    """
    h = affine(c, scale, shift).to(c.dtype).to(tl.float32)
    number = (h == h) | ~inside
    if c.dtype == tl.float32:
        bits = tl.where(inside, h.to(tl.int32, bitcast=True), 0).to(tl.int64) * 64
        return tl.where(number, bits | PLACE, (0x7FF00000 * 64) + (63 - PLACE))
    else:
        bits = h.to(tl.int32, bitcast=True) & tl.where(inside, -64, 0)
        return tl.where(number, bits | PLACE, 0x7FF00000 + (63 - PLACE))  # above infinity's


@triton.jit
def largest3(a, b, c):
    """The largest of three integers."""
    return tl.maximum(tl.maximum(a, b), c)


@triton.jit
def chosen(key, best, gradient):
    """The gradient of a window for one of its pixels."""
    return tl.where(key == best, gradient, 0.0)


@triton.jit
def finish_pixel(dz, c, address, stored, sums, sums_c):
    """Stores a pixel's gradient and adds it to the sums of the channels."""
    rounded = dz.to(c.dtype)
    tl.store(address, rounded, mask=stored)
    rounded = rounded.to(tl.float32)
    return sums + rounded, tl.fma(rounded, c.to(tl.float32), sums_c)


@triton.jit
def bn_relu_pool_backward(
    dy, c, scale, shift, dz, parts, N, H, W, P, Q, STEPS, C: tl.constexpr, INT64: tl.constexpr,
    GROUPS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """STEPS steps of the walk times BC channels. ``parts [programs along the pixels, 2, C]``."""
    channel_blocks = tl.cdiv(C, BC)
    share = tl.program_id(0) // channel_blocks
    k = tl.program_id(0) % channel_blocks * BC + tl.arange(0, BC)
    group = tl.arange(0, GROUPS)
    in_c = (k < C)[None, :]
    factor = tl.load(scale + k, mask=k < C, other=0.0)[None, :]
    offset_k = tl.load(shift + k, mask=k < C, other=0.0)[None, :]
    across = tl.cdiv(W, 4 * GROUPS)
    steps = H // 2 + 1  # of one image and one tile of columns
    begin = share * STEPS
    end = tl.minimum(begin + STEPS, N * across * steps)
    zero = tl.zeros((GROUPS, BC), tl.float32)
    none = tl.full((GROUPS, BC), 0, tl.int64 if c.dtype.element_ty == tl.float32 else tl.int32)
    blank = tl.zeros((GROUPS, BC), c.dtype.element_ty)
    # the top row: maxima of the windows 2g, 2g+1, 2g+2, and of the pixels 4g..4g+3 key, c, and gradient so far
    top_a, top_b, top_d = none, none, none
    t1, t2, t3, t4 = none, none, none, none
    c1, c2, c3, c4 = blank, blank, blank, blank
    z1, z2, z3, z4 = zero, zero, zero, zero
    sums, sums_c = zero, zero
    for step in range(begin - 2, end):
        unit = tl.maximum(step, 0) // steps
        i = tl.maximum(step, 0) % steps
        image = (unit // across).to(tl.int64)
        cell = unit % across * GROUPS + group
        c_image = c + image * H * W * C
        dz_image = dz + image * H * W * C
        dy_image = dy + image * P * Q * C
        column = 4 * cell
        middle = 2 * i * W + column
        window = i * Q + 2 * cell
        if INT64:
            middle = middle.to(tl.int64)
            window = window.to(tl.int64)
        pixel = (middle * C)[:, None] + k[None, :]
        window = (window * C)[:, None] + k[None, :]
        m_in = 2 * i < H
        b_in = (2 * i + 1 < H) & (step >= 0)  # in front of the first image lies no row either
        source = c_image + pixel
        e0, e0_in = load_pixel(source - C, column - 1, W, m_in, in_c)
        e1, e1_in = load_pixel(source, column, W, m_in, in_c)
        e2, e2_in = load_pixel(source + C, column + 1, W, m_in, in_c)
        e3, e3_in = load_pixel(source + 2 * C, column + 2, W, m_in, in_c)
        e4, e4_in = load_pixel(source + 3 * C, column + 3, W, m_in, in_c)
        e5, e5_in = load_pixel(source + 4 * C, column + 4, W, m_in, in_c)
        e6, e6_in = load_pixel(source + 5 * C, column + 5, W, m_in, in_c)
        source += W * C
        o0, o0_in = load_pixel(source - C, column - 1, W, b_in, in_c)
        o1, o1_in = load_pixel(source, column, W, b_in, in_c)
        o2, o2_in = load_pixel(source + C, column + 1, W, b_in, in_c)
        o3, o3_in = load_pixel(source + 2 * C, column + 2, W, b_in, in_c)
        o4, o4_in = load_pixel(source + 3 * C, column + 3, W, b_in, in_c)
        o5, o5_in = load_pixel(source + 4 * C, column + 4, W, b_in, in_c)
        o6, o6_in = load_pixel(source + 5 * C, column + 5, W, b_in, in_c)
        exists = (i < P) & (2 * cell < Q)[:, None] & in_c
        ga = tl.load(dy_image + window, mask=exists, other=0.0).to(tl.float32)
        exists = (i < P) & (2 * cell + 1 < Q)[:, None] & in_c
        gb = tl.load(dy_image + window + C, mask=exists, other=0.0).to(tl.float32)
        exists = (i < P) & (2 * cell + 2 < Q)[:, None] & in_c
        gd = tl.load(dy_image + window + 2 * C, mask=exists, other=0.0).to(tl.float32)
        # places: top 16, middle 8, bottom 0, and columns from 7 down
        m0 = place_key(e0, factor, offset_k, e0_in, 15)
        m1 = place_key(e1, factor, offset_k, e1_in, 14)
        m2 = place_key(e2, factor, offset_k, e2_in, 13)
        m3 = place_key(e3, factor, offset_k, e3_in, 12)
        m4 = place_key(e4, factor, offset_k, e4_in, 11)
        m5 = place_key(e5, factor, offset_k, e5_in, 10)
        m6 = place_key(e6, factor, offset_k, e6_in, 9)
        b0 = place_key(o0, factor, offset_k, o0_in, 7)
        b1 = place_key(o1, factor, offset_k, o1_in, 6)
        b2 = place_key(o2, factor, offset_k, o2_in, 5)
        b3 = place_key(o3, factor, offset_k, o3_in, 4)
        b4 = place_key(o4, factor, offset_k, o4_in, 3)
        b5 = place_key(o5, factor, offset_k, o5_in, 2)
        b6 = place_key(o6, factor, offset_k, o6_in, 1)
        bottom_a = largest3(b0, b1, b2)
        bottom_b = largest3(b2, b3, b4)
        bottom_d = largest3(b4, b5, b6)
        best_a = largest3(top_a, largest3(m0, m1, m2), bottom_a)
        best_b = largest3(top_b, largest3(m2, m3, m4), bottom_b)
        best_d = largest3(top_d, largest3(m4, m5, m6), bottom_d)
        ga = tl.where(best_a > 63, ga, 0.0)
        gb = tl.where(best_b > 63, gb, 0.0)
        gd = tl.where(best_d > 63, gd, 0.0)
        z1 += chosen(t1, best_a, ga)
        z2 += chosen(t2, best_a, ga) + chosen(t2, best_b, gb)
        z3 += chosen(t3, best_b, gb)
        z4 += chosen(t4, best_b, gb) + chosen(t4, best_d, gd)
        own = step >= begin
        in1 = (column < W)[:, None] & in_c & own
        in2 = (column + 1 < W)[:, None] & in_c & own
        in3 = (column + 2 < W)[:, None] & in_c & own
        in4 = (column + 3 < W)[:, None] & in_c & own
        target = dz_image + pixel - W * C
        sums, sums_c = finish_pixel(z1, c1, target, in1 & (i > 0), sums, sums_c)
        sums, sums_c = finish_pixel(z2, c2, target + C, in2 & (i > 0), sums, sums_c)
        sums, sums_c = finish_pixel(z3, c3, target + 2 * C, in3 & (i > 0), sums, sums_c)
        sums, sums_c = finish_pixel(z4, c4, target + 3 * C, in4 & (i > 0), sums, sums_c)
        target += W * C
        y1 = chosen(m1, best_a, ga)
        y2 = chosen(m2, best_a, ga) + chosen(m2, best_b, gb)
        y3 = chosen(m3, best_b, gb)
        y4 = chosen(m4, best_b, gb) + chosen(m4, best_d, gd)
        sums, sums_c = finish_pixel(y1, e1, target, in1 & m_in, sums, sums_c)
        sums, sums_c = finish_pixel(y2, e2, target + C, in2 & m_in, sums, sums_c)
        sums, sums_c = finish_pixel(y3, e3, target + 2 * C, in3 & m_in, sums, sums_c)
        sums, sums_c = finish_pixel(y4, e4, target + 3 * C, in4 & m_in, sums, sums_c)
        sums = tl.where(own, sums, 0.0)
        sums_c = tl.where(own, sums_c, 0.0)
        z1 = chosen(b1, best_a, ga)
        z2 = chosen(b2, best_a, ga) + chosen(b2, best_b, gb)
        z3 = chosen(b3, best_b, gb)
        z4 = chosen(b4, best_b, gb) + chosen(b4, best_d, gd)
        c1, c2, c3, c4 = o1, o2, o3, o4
        # the bottom row becomes the top one; this bit is also right for a NaN's inverted place
        t1, t2, t3, t4 = b1 ^ 16, b2 ^ 16, b3 ^ 16, b4 ^ 16
        top_a, top_b, top_d = bottom_a ^ 16, bottom_b ^ 16, bottom_d ^ 16
    parts += share.to(tl.int64) * 2 * C + k
    tl.store(parts, tl.sum(sums, 0), mask=k < C)
    tl.store(parts + C, tl.sum(sums_c, 0), mask=k < C)


def launch_bn_relu_pool(c: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, y: torch.Tensor) -> None:
    """Launches :func:`bn_relu_pool`: what ``max_pool2d(relu(c * scale + shift), 3, 2, 1)`` gives; NaN propagates.

    Args:
        c: ``[N,H,W,C]`` dense.
        scale, shift: dense fp32 ``[C]``.
        y: ``[N,P,Q,C]`` dense, dtype of ``c``.
    """
    n, h, w, channels = c.shape
    p, q = y.shape[1:3]
    if y.numel() == 0:
        return
    th, tw, bc = 4, 8, min(64, next_power_of_two(channels))
    count("bn_relu_pool")
    bn_relu_pool[(n * cdiv(p, th) * cdiv(q, tw) * cdiv(channels, bc),)](
        c, scale, shift, y, h, w, p, q, C=channels, INT64=needs_int64(c[0], y[0]), TH=th, TW=tw, BC=bc, num_warps=4
    )  # fmt: skip


def bn_relu_pool_parts(n: int, h: int, w: int) -> int:
    """Rows of the sums that :func:`launch_bn_relu_pool_backward` writes for an input ``[n, h, w, C]``, at least one."""
    return _programs(n, h, w)[0]


def _programs(n: int, h: int, w: int) -> tuple[int, int]:
    """Programs along the pixels, and the steps of each."""
    total = n * cdiv(w, GROUP * GROUPS) * (h // 2 + 1)
    steps = max(SHORTEST, cdiv(total, PROGRAMS))
    return max(1, cdiv(total, steps)), steps


def launch_bn_relu_pool_backward(
    dy: torch.Tensor,
    c: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    dz: torch.Tensor,
    parts: torch.Tensor,
) -> None:
    """Launches :func:`bn_relu_pool_backward`: the gradient of :func:`launch_bn_relu_pool` before its BN.

    Args:
        dy: ``[N,P,Q,C]`` dense.
        c: ``[N,H,W,C]`` dense, as in the forward.
        scale, shift: dense fp32 ``[C]``, as in the forward.
        dz: ``[N,H,W,C]`` dense; zero where the ReLU is.
        parts: dense fp32 ``[bn_relu_pool_parts(N, H, W), 2, C]``, all written: sums of the rounded ``dz``, and of
            ``dz * c``.

    Raises:
        ValueError: ``parts`` has another shape.
    """
    n, h, w, channels = c.shape
    programs, steps = _programs(n, h, w)
    if parts.shape != (programs, 2, channels):
        raise ValueError(f"parts must be {(programs, 2, channels)}, got {tuple(parts.shape)}; see bn_relu_pool_parts")
    if c.numel() == 0:
        parts.zero_()
        return
    bc = min(64, next_power_of_two(channels))
    count("bn_relu_pool_backward")
    bn_relu_pool_backward[(programs * cdiv(channels, bc),)](
        dy, c, scale, shift, dz, parts, n, h, w, *dy.shape[1:3], steps, C=channels, INT64=needs_int64(c[0]),
        GROUPS=GROUPS, BC=bc, num_warps=2,
    )  # fmt: skip

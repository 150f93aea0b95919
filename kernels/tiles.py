"""Device helpers that place tiles: which output pixels and channels a program owns."""

import triton
import triton.language as tl


@triton.jit
def box_origin(pid, P, Q, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """First image, row and column of box ``pid``; boxes run along the columns, then the rows, then the images."""
    across = tl.cdiv(Q, TW)
    down = tl.cdiv(P, TH)
    return pid // (across * down) * TN, pid // across % down * TH, pid % across * TW


@triton.jit
def strip_origin(first, P, Q, TN: tl.constexpr, TW: tl.constexpr):
    """First image, row and column of the strip that begins with the row of tiles ``first``.

    All columns of tiles, TN images times TW pixels, are one sequence of rows; before each column's P rows comes row -1,
    which separates it from the column before.
    """
    across = tl.cdiv(Q, TW)
    column = first // (P + 1)
    return column // across * TN, first % (P + 1) - 1, column % across * TW


@triton.jit
def next_row(n0, row, q0, P, Q, TN: tl.constexpr, TW: tl.constexpr):
    """The row of tiles behind another: image, row and column. Row P of a column is row -1 of the next one."""
    bottom = row == P
    row = tl.where(bottom, 0, row + 1)
    q0 = tl.where(bottom, q0 + TW, q0)
    n0 = tl.where(q0 < Q, n0, n0 + TN)
    q0 = tl.where(q0 < Q, q0, 0)
    return n0, row, q0


@triton.jit
def nine_taps(filters, inside, C: tl.constexpr):
    """The weights of a 3x3's taps, row by row, from pointers to those of the first tap; taps are C elements apart."""
    taps = ()
    for tap in tl.static_range(9):
        taps += (tl.load(filters + tap * C, inside, 0.0),)
    return taps

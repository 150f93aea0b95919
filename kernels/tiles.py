"""Device helpers that place tiles: which output pixels and channels a program owns."""

import triton
import triton.language as tl


@triton.jit
def box_origin(pid, P, Q, TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """First image, row and column of box ``pid``; boxes run along the columns, then the rows, then the images."""
    across = tl.cdiv(Q, TW)
    down = tl.cdiv(P, TH)
    return pid // (across * down) * TN, pid // across % down * TH, pid % across * TW

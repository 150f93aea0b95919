"""Sizes of a convolution seen as a GEMM. Pure Python: no torch, no triton.

Legend used everywhere: activation ``N,H,W,C`` in, ``N,P,Q,K`` out, filter ``K,R,S,C``. The GEMM has
``M = N*P*Q`` rows, ``K`` columns and a reduction over ``R*S*C``.
"""

from __future__ import annotations

from dataclasses import dataclass

INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class ConvShape:
    """A square-strided 2-D convolution (groups = 1).

    Args:
        n, h, w, c: input images, height, width, channels.
        k, r, s: filters, filter height, filter width.
        stride, padding, dilation: the same in both directions.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int = 1
    s: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1

    @property
    def p(self) -> int:
        """Output height."""
        return out_size(self.h, self.r, self.stride, self.padding, self.dilation)

    @property
    def q(self) -> int:
        """Output width."""
        return out_size(self.w, self.s, self.stride, self.padding, self.dilation)

    @property
    def m(self) -> int:
        """GEMM rows: output pixels of the batch."""
        return self.n * self.p * self.q

    @property
    def reduction(self) -> int:
        """Length of the GEMM's reduction."""
        return self.r * self.s * self.c

    @property
    def macs(self) -> int:
        """Multiply-adds (one multiply-add is two FLOP)."""
        return self.m * self.k * self.reduction

    @property
    def pixels_read(self) -> int:
        """Distinct input pixels that the convolution reads (a 1x1 with stride 2 reads a quarter)."""
        if self.r == self.s == 1 and self.padding == 0:
            return self.m
        return self.n * self.h * self.w

    def bytes_moved(self, itemsize: int, residual: bool = False) -> int:
        """Bytes through device memory when every operand is read once and the output is written once."""
        out = self.m * self.k
        return itemsize * (self.pixels_read * self.c + self.k * self.reduction + out * (2 if residual else 1))

    @property
    def pointwise(self) -> bool:
        """A 1x1 convolution with stride 1 and no padding: a plain GEMM on ``[M, C]``."""
        return self.r == self.s == 1 and self.stride == 1 and self.padding == 0

    @property
    def fits_int32(self) -> bool:
        """Whether every element offset of input and output fits 32 bits."""
        return max(self.n * self.h * self.w * self.c, self.m * self.k) <= INT32_MAX

    def __str__(self) -> str:
        extra = f" d{self.dilation}" if self.dilation != 1 else ""
        return f"{self.r}x{self.s}/{self.stride}{extra} {self.n}x{self.h}x{self.w}x{self.c}->{self.k}"


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Output length of a convolution or pooling window along one axis (floor mode, as PyTorch)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)

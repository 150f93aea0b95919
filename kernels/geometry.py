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
    def weights(self) -> int:
        """Elements of the filters."""
        return self.k * self.reduction

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
        return itemsize * (self.pixels_read * self.c + self.weights + out * (2 if residual else 1))

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


@dataclass(frozen=True)
class ChainShape:
    """Consecutive convolutions of a residual block as one kernel.

    ``[[1x1 ->] 3x3 ->] 1x1 -> + shortcut -> ReLU [-> 1x1]``

    Every convolution ends with BN and ReLU, the ``expand`` one with the addition of the shortcut before its ReLU, and
    ``project`` has neither ReLU nor addition.

    Args:
        conv: the block's 3x3, or None where the chain begins behind it.
        expand: the block's last 1x1; it reads what ``conv`` computes.
        project: the 1x1 on the shortcut, or None where the shortcut is added as it is.
        reduce: the next block's first 1x1 on this block's output, or None.
        subsample: 1 where every output pixel of ``expand`` is stored, 2 for every second row and column.
        first: the block's first 1x1, which computes what ``conv`` reads, or None. The shortcut is then its input.
    """

    conv: ConvShape | None
    expand: ConvShape
    project: ConvShape | None = None
    reduce: ConvShape | None = None
    subsample: int = 1
    first: ConvShape | None = None

    def __post_init__(self) -> None:
        e = self.expand
        for name, conv in (("first", self.first), ("expand", e), ("reduce", self.reduce)):
            if conv is not None and not conv.pointwise:
                raise ValueError(f"{name} must be a 1x1 convolution of stride 1, got {conv}")
        if self.conv is not None and (self.conv.n, self.conv.p, self.conv.q, self.conv.k) != (e.n, e.h, e.w, e.c):
            raise ValueError(f"expand must read what conv computes, got {self.conv} and {e}")
        if self.project is not None and (self.project.n, self.project.p, self.project.q, self.project.k) != (
            e.n, e.p, e.q, e.k,
        ):  # fmt: skip
            raise ValueError(f"project must compute what is added to expand, got {self.project} and {e}")
        if self.reduce is not None and (self.reduce.n, self.reduce.h, self.reduce.w, self.reduce.c) != (
            e.n, e.p, e.q, e.k,
        ):  # fmt: skip
            raise ValueError(f"reduce must read what expand computes, got {e} and {self.reduce}")
        if self.subsample not in (1, 2):
            raise ValueError(f"subsample must be 1 or 2, got {self.subsample}")
        if self.first is not None:
            f, c = self.first, self.conv
            if c is None or (f.n, f.p, f.q, f.k) != (c.n, c.h, c.w, c.c):
                raise ValueError(f"conv must read what first computes, got {f} and {c}")
            if self.shortcut != self.source:
                raise ValueError(f"first must read the shortcut {self.shortcut} (N, H, W, C), got {f}")

    @property
    def named(self) -> dict[str, ConvShape]:
        """The convolutions by name, in the order first, conv, project, expand, reduce; none that is absent."""
        names = ("first", "conv", "project", "expand", "reduce")
        return {name: conv for name in names if (conv := getattr(self, name)) is not None}

    @property
    def convs(self) -> tuple[ConvShape, ...]:
        """The convolutions, as in :attr:`named`."""
        return tuple(self.named.values())

    @property
    def source(self) -> tuple[int, int, int, int]:
        """``(N, H, W, C)`` of the chain's first input."""
        first = self.first or self.conv or self.expand
        return first.n, first.h, first.w, first.c

    @property
    def shortcut(self) -> tuple[int, int, int, int]:
        """``(N, H, W, C)`` of the shortcut as it comes in."""
        if self.project is not None:
            return self.project.n, self.project.h, self.project.w, self.project.c
        return self.expand.n, self.expand.p, self.expand.q, self.expand.k

    @property
    def stored(self) -> tuple[int, int, int, int]:
        """``(N, P, Q, K)`` of the block's output as it is stored."""
        e, s = self.expand, self.subsample
        return e.n, cdiv(e.p, s), cdiv(e.q, s), e.k

    @property
    def macs(self) -> int:
        """Multiply-adds of all its convolutions, each pixel of each computed once."""
        return sum(c.macs for c in self.convs)

    def weight_bytes(self, itemsize: int) -> int:
        """Bytes of the weights."""
        return itemsize * sum(c.weights for c in self.convs)

    def bytes_moved(self, itemsize: int) -> int:
        """Bytes through device memory when every operand is read once and every result written once."""
        n, h, w, c = self.source
        shortcut = self.expand.m * self.expand.k
        if self.first is not None:  # the same tensor as the source
            shortcut = 0
        elif self.project is not None:
            shortcut = self.project.pixels_read * self.project.c
        stored = self.stored[0] * self.stored[1] * self.stored[2] * self.stored[3]
        after = self.reduce.m * self.reduce.k if self.reduce else 0
        return itemsize * (n * h * w * c + shortcut + stored + after) + self.weight_bytes(itemsize)

    def __str__(self) -> str:
        first = f"{self.conv} ->{self.expand.k}" if self.conv else f"{self.expand}"
        before = f"{self.first.c}-> " if self.first else ""
        added = f"+{self.project.r}x{self.project.s}/{self.project.stride} {self.project.c}" if self.project else "+x"
        after = f" ->{self.reduce.k}" if self.reduce else ""
        return f"{before}{first} {added}{f' keep 1/{self.subsample**2}' if self.subsample > 1 else ''}{after}"


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Output length of a convolution or pooling window along one axis (floor mode, as PyTorch)."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def cdiv(a: int, b: int) -> int:
    """Ceiling division of non-negative integers."""
    return -(-a // b)

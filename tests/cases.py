"""Inputs of the tests: small integers whose sums are exact in every dtype, and buffers that notice stray accesses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from resnet_triton import reference
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape

#: ``var + EPS`` is a power of four for each of these, so ``1/sqrt`` is exact: 4, 2, 1 and 0.5.
EPS = 0.0625
VARIANCES = (0.0, 0.1875, 0.9375, 3.9375)
GUARD = 64  # elements before and after a guarded tensor; keeps 16-byte alignment
SENTINEL = 1234.0  # representable in fp16 and fp32, and (as 1232) in bf16

PLAIN = Epilogue()
FULL = Epilogue(bn=True, residual=True, relu=True)
EPILOGUES = [
    Epilogue(bn, bias, residual, relu)
    for bn in (False, True)
    for bias in (False, True)
    for residual in (False, True)
    for relu in (False, True)
]


def integers(*shape: int, dtype: torch.dtype = torch.float32, low: int = -2, high: int = 2) -> Tensor:
    """Random integers in ``low..high`` (both included) as ``dtype``."""
    return torch.randint(low, high + 1, shape).to(dtype)


def sliced(t: Tensor, dim: int) -> Tensor:
    """The same values as every second element along ``dim`` of a larger tensor, whose rest is NaN."""
    size = list(t.shape)
    size[dim] *= 2
    index = [slice(None)] * t.dim()
    index[dim] = slice(None, None, 2)
    larger = torch.full(size, float("nan"), dtype=t.dtype)
    larger[tuple(index)] = t
    return larger[tuple(index)]


def misaligned(t: Tensor) -> Tensor:
    """The same values and strides one element after a 16-byte boundary, as in a flat buffer of parameters."""
    flat = torch.full((t.numel() + 1,), float("nan"), dtype=t.dtype)
    out = flat.as_strided(t.shape, t.stride(), 1)
    out.copy_(t)
    assert out.data_ptr() % 16 and out.stride() == t.stride()
    return out


@dataclass(frozen=True)
class ConvInputs:
    """Exactly representable inputs of one convolution, in NHWC and KRSC, and its expected output."""

    shape: ConvShape
    epilogue: Epilogue
    x: Tensor
    w: Tensor
    residual: Tensor | None = None
    bias: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    eps: float = field(default=EPS)

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """bias, gamma, beta, mean, var."""
        return self.bias, self.gamma, self.beta, self.mean, self.var

    def expected(self) -> Tensor:
        """``[N,P,Q,K]``: the fp64 reference, rounded once to the dtype of ``x``."""
        nchw = [None if t is None else t.permute(0, 3, 1, 2).double() for t in (self.x, self.w, self.residual)]
        s = self.shape
        y = reference.conv_bn_act(
            nchw[0], nchw[1], *(None if v is None else v.double() for v in self.vectors), nchw[2],
            self.eps, self.epilogue.relu, s.stride, s.padding, s.dilation,
        )  # fmt: skip
        return y.to(self.x.dtype).permute(0, 2, 3, 1)

    def replaced(self, **changes: object) -> ConvInputs:
        """The same with some fields changed."""
        return replace(self, **changes)


def conv_inputs(
    shape: ConvShape,
    epilogue: Epilogue = PLAIN,
    dtype: torch.dtype = torch.float16,
    affine: bool = True,
    vector_dtype: torch.dtype = torch.float32,
) -> ConvInputs:
    """Random :class:`ConvInputs`; ``affine`` is whether BN has gamma and beta."""
    k = shape.k
    bn, scaled = epilogue.bn, epilogue.bn and affine
    return ConvInputs(
        shape,
        epilogue,
        integers(shape.n, shape.h, shape.w, shape.c, dtype=dtype),
        integers(k, shape.r, shape.s, shape.c, dtype=dtype, low=-1, high=1),
        integers(shape.n, shape.p, shape.q, k, dtype=dtype, low=-9, high=9) if epilogue.residual else None,
        integers(k, dtype=vector_dtype, low=-5, high=5) if epilogue.bias else None,
        integers(k, dtype=vector_dtype, low=-1, high=2) if scaled else None,
        integers(k, dtype=vector_dtype, low=-7, high=7) if scaled else None,
        integers(k, dtype=vector_dtype, low=-4, high=4) if bn else None,
        torch.tensor(VARIANCES, dtype=vector_dtype)[torch.randint(0, 4, (k,))] if bn else None,
    )


class Guarded:
    """Dense tensors, each inside a larger buffer whose rest must never be read into a result nor be written.

    The rest of an input's buffer is NaN, so reading it shows; that of an output is :data:`SENTINEL`, and the output
    itself starts as NaN, so what is not written shows.
    """

    def __init__(self) -> None:
        self._inputs: list[tuple[Tensor, Tensor]] = []
        self._outputs: list[tuple[Tensor, int]] = []

    def input(self, t: Tensor | None) -> Tensor | None:
        """A guarded copy of ``t``."""
        if t is None:
            return None
        buffer = torch.full((t.numel() + 2 * GUARD,), float("nan"), dtype=t.dtype)
        buffer[GUARD : GUARD + t.numel()] = t.reshape(-1)
        self._inputs.append((buffer, buffer.clone()))
        return buffer[GUARD : GUARD + t.numel()].view(t.shape)

    def output(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A guarded NaN-filled tensor."""
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), SENTINEL, dtype=dtype)
        buffer[GUARD : GUARD + size] = float("nan")
        self._outputs.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    def verify(self) -> None:
        """Asserts that inputs and guard bands are as they were."""
        for i, (buffer, before) in enumerate(self._inputs):
            integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[buffer.element_size()]
            assert torch.equal(buffer.view(integer), before.view(integer)), f"input {i} or its guard band was written"
        for i, (buffer, size) in enumerate(self._outputs):
            expected = torch.full((2 * GUARD,), SENTINEL, dtype=buffer.dtype)
            around = torch.cat((buffer[:GUARD], buffer[GUARD + size :]))
            assert torch.equal(around, expected), f"the guard band of output {i} was written"

"""What is done to an operand as a kernel loads it, and the masks that must repeat it bit for bit.

    normalised   h  = relu(c * scale + shift)          a raw convolution output behind its BN and ReLU, never stored
    BN backward  dc = g1 * dz + g2 + g3 * c            the gradient of a raw convolution output, never stored

Both are computed in fp32 with one fused multiply-add per term and rounded to the operand's dtype, so that every kernel
that computes them gets the same bits: a mask (``h > 0``) that came out differently in the backward than in the forward
would lose or invent gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .epilogue import bn_scale_shift
from .geometry import cdiv
from .launch import count

#: Of a program of :func:`bn_vectors`.
CHANNELS = 128


@dataclass(frozen=True)
class Normalised:
    """``relu(c * scale + shift)`` of a raw convolution output ``c``; ``scale, shift``: dense fp32 ``[C]``."""

    scale: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True)
class BNBackward:
    """``g[0] * dz + g[1] + g[2] * c`` of the gradient ``dz`` that is loaded.

    Args:
        c: the raw convolution output that was normalised; shape, dtype and layout of ``dz``.
        g: dense fp32 ``[3, K]``.
    """

    c: torch.Tensor
    g: torch.Tensor


@triton.jit
def affine(c, scale, shift):
    """``c * scale + shift`` in fp32 with one rounding."""
    return tl.fma(c.to(tl.float32), scale, shift)


@triton.jit
def bn_relu(c, scale, shift):
    """``relu(c * scale + shift)``, keeping NaN, rounded to the dtype of ``c``; the vectors broadcast against ``c``."""
    h = tl.maximum(affine(c, scale, shift), 0.0, propagate_nan=tl.PropagateNan.ALL)
    return h.to(c.dtype)


@triton.jit
def bn_backward_of(dz, c, g1, g2, g3):
    """``g1 * dz + g2 + g3 * c`` in fp32, rounded to the dtype of ``dz``; the vectors broadcast against ``dz``."""
    return tl.fma(dz.to(tl.float32), g1, tl.fma(c.to(tl.float32), g3, g2)).to(dz.dtype)


@triton.jit
def bn_vectors(gamma, beta, mean, var, eps, scale, shift, C, BC: tl.constexpr):
    """BC channels of ``scale`` and ``shift``, dense fp32 ``[C]``, of a BN with constant statistics."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    a, b = bn_scale_shift(c, C, None, gamma, beta, mean, var, tl.cast(eps, tl.float32))
    tl.store(scale + c, a, mask=c < C)
    tl.store(shift + c, b, mask=c < C)


def launch_bn_vectors(
    gamma: torch.Tensor | None, beta: torch.Tensor | None, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> Normalised:
    """The scale and shift by which convolutions normalise what they load, of a BN with constant statistics.

    Args:
        gamma, beta, mean, var: ``[C]`` of any float dtype; gamma and beta may be None (1 and 0).
        eps: added to the variance.
    """
    c = mean.shape[0]
    gamma, beta = (None if v is None else v.contiguous() for v in (gamma, beta))
    out = torch.empty(2, c, dtype=torch.float32, device=mean.device)
    count("bn_vectors")
    bn_vectors[(cdiv(c, CHANNELS),)](
        gamma, beta, mean.contiguous(), var.contiguous(), eps, out[0], out[1], c, BC=CHANNELS, num_warps=4
    )
    return Normalised(out[0], out[1])

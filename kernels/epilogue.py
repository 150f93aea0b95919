"""Device helpers that run on a convolution's fp32 accumulator before it is stored.

    out = relu((acc + bias) * scale + shift + residual)
    scale = gamma / sqrt(var + eps),  shift = beta - mean * scale

or, with slopes, PReLU in place of the ReLU: a value below 0 is multiplied by its channel's slope.
Every operand is optional: an absent one is ``None`` at the launch and leaves no code behind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Operands:
    """The epilogue's tensors of one launch (device, not symbolic): vectors ``[K]`` of any float dtype.

    Args:
        residual: added after normalisation; same shape, dtype and layout as the output.
        bias: convolution bias.
        gamma, beta, mean, var, eps: batch normalisation; absent when ``var`` is None.
        relu: whether a ReLU comes last.
        residual_bn: batch normalisation of the residual as it is loaded, or None (``conv1x1`` only): what
            :attr:`vectors` gives.
        slope: of a PReLU that comes last, one a channel or ``[1]`` for all (kernels that take :attr:`with_slope`), or
            None.
    """

    residual: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    var: torch.Tensor | None = None
    eps: float = 0.0
    relu: bool = False
    residual_bn: tuple | None = None
    slope: torch.Tensor | None = None

    @property
    def vectors(self) -> tuple:
        """The arguments that every convolution kernel takes, in its order.

        Raises:
            ValueError: there is a slope, which would be lost.
        """
        if self.slope is not None:
            raise ValueError("operands.slope is set; PReLU is for conv_tma, conv1x1, conv_pointer and bn_act")
        return self.bias, self.gamma, self.beta, self.mean, self.var, self.eps

    @property
    def with_slope(self) -> tuple:
        """The same with the slope behind them, of the kernels that have PReLU."""
        return self.bias, self.gamma, self.beta, self.mean, self.var, self.eps, self.slope

    @property
    def one_slope(self) -> bool:
        """Whether all channels have the same slope."""
        return self.slope is not None and self.slope.numel() == 1

    def flat(self, m: int, k: int) -> Operands:
        """The same with the residual seen as ``[M, K]``."""
        return self if self.residual is None else replace(self, residual=self.residual.view(m, k))


@triton.jit
def bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps):
    """``scale, shift`` (fp32, shape of ``k``) that apply bias and batch normalisation of the channels ``k``."""
    inside = k < K
    scale = tl.full(k.shape, 1.0, tl.float32)
    shift = tl.zeros(k.shape, tl.float32)
    if var is not None:
        scale = tl.math.rsqrt(tl.load(var + k, mask=inside, other=1.0).to(tl.float32) + eps)
        if gamma is not None:
            scale *= tl.load(gamma + k, mask=inside, other=0.0).to(tl.float32)
        shift = -tl.load(mean + k, mask=inside, other=0.0).to(tl.float32) * scale
        if beta is not None:
            shift += tl.load(beta + k, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + k, mask=inside, other=0.0).to(tl.float32) * scale
    # An identity gather pins the work to one thread a channel: without it the layout pass repeats loads and
    # square roots in every thread that holds the channel (128 loads and 90 more registers at BN=128).
    index = tl.arange(0, k.shape[0])
    return tl.gather(scale, index, 0), tl.gather(shift, index, 0)


@triton.jit
def relu(x):
    """``max(x, 0)`` that keeps NaN, as PyTorch's does."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def slopes(k, K, slope, ONE_SLOPE: tl.constexpr):
    """PReLU's slopes (fp32, shape of ``k``) of the channels ``k``."""
    if ONE_SLOPE:
        return tl.zeros(k.shape, tl.float32) + tl.load(slope).to(tl.float32)
    # one thread a channel, as in bn_scale_shift
    return tl.gather(tl.load(slope + k, mask=k < K, other=0.0).to(tl.float32), tl.arange(0, k.shape[0]), 0)


@triton.jit
def prelu(x, slope):
    """``x`` where it is above 0, else ``slope * x``, so that NaN stays NaN."""
    return tl.where(x > 0.0, x, x * slope)

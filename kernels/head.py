"""The classifier head: global average pool, then the fully connected layer as a pointwise convolution.

    logits[n, k] = sum over c of mean over h,w of x[n,h,w,c] * weight[k, c] + bias[k]

The pooled features are rounded to the model's dtype in between, as PyTorch's are.
"""

import torch

from .config import ConvConfig, next_power_of_two, tma_describable
from .conv1x1 import launch_conv1x1
from .conv_pointer import launch_conv_pointer
from .epilogue import Operands
from .geometry import ConvShape, cdiv
from .pool import launch_global_avg_pool

#: Tiles wanted at least, for an H200's 132 multiprocessors: 128 tiles in one wave rather than 252 smaller ones in two.
PROGRAMS = 128


def head_config(n: int, c: int, k: int, itemsize: int, tma: bool) -> ConvConfig:
    """A configuration for :func:`launch_head` from the sizes alone: the largest tiles that keep the GPU busy.

    The layer is small (1000 classes, batch 256: 1 GFLOP) and its time is the latency of reading the weight, so the
    pipeline is deep and the tiles are smaller than a convolution's. A row of the features or of the logits that is no
    multiple of 16 bytes (10 classes in fp16) cannot be described to the TMA: ``conv_pointer`` computes it.
    """
    bm = min(64, max(16, next_power_of_two(n)))
    bn = 128
    while bn > 16 and cdiv(n, bm) * cdiv(k, bn) < PROGRAMS:
        bn //= 2
    bk = min(128 // itemsize, max(16, next_power_of_two(c)))
    if tma and tma_describable(ConvShape(n, 1, 1, c, k), itemsize):
        return ConvConfig("conv1x1", (1, 1, bm), bn, bk, stages=4)
    return ConvConfig("conv_pointer", (1, 1, bm), min(bn, 64), min(bk, 32), stages=4)


def launch_head(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    pooled: torch.Tensor,
    logits: torch.Tensor,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`.pool.global_avg_pool` and then ``conv1x1`` or ``conv_pointer``, as ``config`` says.

    Args:
        x: ``[N,H,W,C]`` dense; of one pixel, it is the average itself.
        weight: ``[K,C]`` dense, dtype of ``pooled``.
        bias: ``[K]`` of any float dtype, or None.
        pooled: ``[N,C]`` dense, written.
        logits: ``[N,K]`` dense, written.
    """
    (n, c), k = pooled.shape, weight.shape[0]
    if n == 0:
        return
    if x.shape[1] == x.shape[2] == 1:  # pooled already
        pooled = x.view(n, c)
    else:
        launch_global_avg_pool(x, pooled)
    operands = Operands(bias=bias)
    if config.kernel == "conv1x1":
        launch_conv1x1(pooled, weight, logits, operands, config, precision)
    else:
        launch_conv_pointer(pooled, weight, logits, ConvShape(n, 1, 1, c, k), operands, config, precision)

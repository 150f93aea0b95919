"""The last 1x1 convolution of a network with its whole epilogue, and the global average pool, in one kernel.

    y[m, k]      = relu(bn(sum over c of x[m, c] * w[k, c]) + residual[m, k])     rounded, never stored
    pooled[n, k] = sum over the P*Q pixels m of image n of y[m, k] / (P*Q)

A tile is BM consecutive pixels from the first one of an image on: as many whole images as fit, 5 of 7x7 in 256 pixels.
The rows behind them belong to the next tile and are left out of the sums. An image's sum lies in one program and has a
fixed order, so results repeat bit by bit.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig, next_power_of_two
from .epilogue import Operands, bn_scale_shift, relu
from .geometry import cdiv
from .launch import count


@triton.jit
def conv1x1_pool(
    x, w, pooled, residual, bias, gamma, beta, mean, var, eps, N, K, C: tl.constexpr, PIXELS: tl.constexpr,
    IMAGES: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """IMAGES images of PIXELS pixels times BN output channels. ``x, w, residual``: descriptors of rank 2.

    The product is computed transposed, as in ``conv_fwd.conv_tma``: the pixels then lie along the rows of the
    accumulator, where four threads share them, and a sum over pixels needs two exchanges between threads.
    """
    column_blocks = tl.cdiv(K, BN)
    n0 = tl.program_id(0) // column_blocks * IMAGES
    k0 = tl.program_id(0) % column_blocks * BN
    m0 = n0 * PIXELS
    acc = tl.zeros((BN, BM), tl.float32)
    for c0 in range(0, C, BK):
        acc = tl.dot(w.load([k0, c0]), x.load([m0, c0]).T, acc, input_precision=PRECISION)
    k = k0 + tl.arange(0, BN)
    scale, shift = bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps)
    out = acc * scale[:, None] + shift[:, None] + residual.load([m0, k0]).T.to(tl.float32)
    out = relu(out).to(x.dtype).to(tl.float32)
    image = tl.arange(0, BM) // PIXELS
    for i in tl.static_range(IMAGES):
        total = tl.sum(tl.where((image == i)[None, :], out, 0.0), 1)
        mean_value = total * tl.div_rn(1.0, tl.cast(PIXELS, tl.float32))
        stored = (k < K) & (n0 + i < N)
        tl.store(pooled + (n0 + i) * K + k, mean_value.to(pooled.dtype.element_ty), mask=stored)


def pool_config(n: int, pixels: int, c: int, k: int, itemsize: int) -> ConvConfig | None:
    """A configuration for :func:`launch_conv1x1_pool`, or None where images are too large or too small for a tile.

    256 pixels by 128 channels on 8 warps at 7x7 pixels; fewer pixels where a batch has few images.
    """
    fits = c * itemsize % 16 == 0 and k * itemsize % 16 == 0 and itemsize == 2
    if not fits or not 16 <= pixels <= 256:
        return None
    bm = 256
    while bm > 64 and bm // 2 >= n * pixels:
        bm //= 2
    if bm < pixels:
        return None
    bk = min(64, max(16, next_power_of_two(c)))
    bn = min(128, max(16, next_power_of_two(k)))
    return ConvConfig("conv1x1_pool", (1, 1, bm), bn, bk, 8 if bm * bn > 128 * 128 else 4)


def launch_conv1x1_pool(
    x: torch.Tensor, w: torch.Tensor, pooled: torch.Tensor, operands: Operands, config: ConvConfig, precision: str
) -> None:
    """Launches :func:`conv1x1_pool`.

    Args:
        x: ``[N,P,Q,C]`` dense.
        w: ``[K,C]`` dense.
        pooled: ``[N,K]`` dense, written.
        operands: with a residual ``[N,P,Q,K]``; a ReLU always follows.
    """
    n, p, q, c = x.shape
    k, pixels = w.shape[0], p * q
    if operands.residual is None or pixels > config.bm:
        raise ValueError(f"conv1x1_pool needs a residual and images of at most {config.bm} pixels, got {pixels}")
    images = config.bm // pixels
    bm, bn, bk = config.bm, config.bn, config.bk
    describe = TensorDescriptor.from_tensor
    count("conv1x1_pool")
    conv1x1_pool[(cdiv(n, images) * cdiv(k, bn),)](
        describe(x.view(n * pixels, c), [bm, bk]), describe(w, [bn, bk]), pooled,
        describe(operands.residual.view(n * pixels, k), [bm, bn]), *operands.vectors,
        n, k, C=c, PIXELS=pixels, IMAGES=images, PRECISION=precision, BM=bm, BN=bn, BK=bk,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

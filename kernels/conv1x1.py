"""Pointwise convolution (1x1, stride 1) and fully connected layer: a persistent GEMM with the fused epilogue.

    y[m, k] = epilogue(sum over c of x[m, c] * w[k, c]),   m = one of the M = N*H*W pixels

One program per multiprocessor walks over the tiles, the column blocks of one row block first, so that the
x tile is read from device memory once and then from L2. The loop over tiles and the reduction are flattened
into one, so the loads of the next tile are in flight while the epilogue of this one runs.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig
from .epilogue import Operands, bn_scale_shift, relu
from .geometry import cdiv
from .launch import count, multiprocessors


@triton.jit
def conv1x1(
    x, w, y, residual, bias, gamma, beta, mean, var, eps, M, K, C: tl.constexpr,
    RELU: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """BM pixels times BN output channels at a time. ``x, w, y, residual`` are tensor descriptors of rank 2."""
    column_blocks = tl.cdiv(K, BN)
    tiles = tl.cdiv(M, BM) * column_blocks
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        m0 = tile // column_blocks * BM
        k0 = tile % column_blocks * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for c0 in range(0, C, BK):
            acc = tl.dot(x.load([m0, c0]), w.load([k0, c0]).T, acc, input_precision=PRECISION)
        scale, shift = bn_scale_shift(k0 + tl.arange(0, BN), K, bias, gamma, beta, mean, var, eps)
        out = acc * scale[None, :] + shift[None, :]
        if residual is not None:
            out += residual.load([m0, k0]).to(tl.float32)
        if RELU:
            out = relu(out)
        y.store([m0, k0], out.to(y.dtype))


def launch_conv1x1(
    x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, operands: Operands, config: ConvConfig, precision: str
) -> None:
    """Launches :func:`conv1x1`: ``x [M, C]``, ``w [K, C]``, ``y`` and the residual ``[M, K]``, rows 16-byte strided."""
    (m, c), k = x.shape, w.shape[0]
    bm, bn, bk = config.bm, config.bn, config.bk
    describe = TensorDescriptor.from_tensor
    residual = operands.residual
    programs = min(multiprocessors(x.device), cdiv(m, bm) * cdiv(k, bn))
    count("conv1x1")
    conv1x1[(programs,)](
        describe(x, [bm, bk]), describe(w, [bn, bk]), describe(y, [bm, bn]),
        None if residual is None else describe(residual, [bm, bn]), *operands.vectors,
        m, k, C=c, RELU=operands.relu, PRECISION=precision, BM=bm, BN=bn, BK=bk, PROGRAMS=programs,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

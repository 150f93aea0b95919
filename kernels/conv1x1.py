"""Pointwise convolution (1x1, stride 1) and fully connected layer: a GEMM with the fused epilogue.

    y[m, k] = epilogue(sum over c of h[m, c] * w[k, c]),   m = one of the M = N*H*W pixels
    h       = x, or relu(x * scale + shift), which is never stored: the BN and ReLU in front of a pre-activation block

The column blocks of one row block come first, so that the x tile is read from device memory once and then from L2.
One program a tile, several programs on a multiprocessor: while one runs its epilogue, another loads and multiplies.
Or persistent: a few programs per multiprocessor walk over the tiles, the loop over tiles and the reduction flattened
into one, so that the loads of the next tile are in flight during the epilogue of this one. That costs registers and
shared memory for both at once, which a residual does not leave room for.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig
from .dependent import dependent_launch, wait_for_inputs
from .epilogue import Operands, bn_scale_shift, prelu, relu, slopes
from .geometry import cdiv
from .launch import count, multiprocessors
from .prologue import Normalised, bn_relu
from .split_k import launch_split_k_epilogue, new_parts, share


@triton.jit
def gemm_tile(
    tile, part, x, w, y, scale_in, shift_in, residual, residual_bn, bias, gamma, beta, mean, var, eps, slope, K,
    C: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, RESIDUAL_BN: tl.constexpr, ONE_SLOPE: tl.constexpr,
):  # fmt: skip
    """One tile of BM pixels times BN output channels, or its ``part`` of the reduction."""
    column_blocks = tl.cdiv(K, BN)
    m0 = tile // column_blocks * BM
    k0 = tile % column_blocks * BN
    first, end = share(part, (C + BK - 1) // BK, SPLIT)
    acc = tl.zeros((BM, BN), tl.float32)
    for c0 in range(first * BK, end * BK, BK):
        a = x.load([m0, c0])
        if scale_in is not None:  # beyond the last channel both are 0, and so is h
            c = c0 + tl.arange(0, BK)
            scale = tl.load(scale_in + c, mask=c < C, other=0.0)
            a = bn_relu(a, scale[None, :], tl.load(shift_in + c, mask=c < C, other=0.0)[None, :])
        acc = tl.dot(a, w.load([k0, c0]).T, acc, input_precision=PRECISION)
    if SPLIT > 1:
        y.store([part, m0, k0], acc.reshape(1, BM, BN))
    else:
        k = k0 + tl.arange(0, BN)
        scale, shift = bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps)
        out = acc * scale[None, :] + shift[None, :]
        if slope is not None:  # before the residual: see conv_tma
            below = slopes(k, K, slope, ONE_SLOPE)
        if residual is not None:
            added = residual.load([m0, k0]).to(tl.float32)
            if RESIDUAL_BN:
                scale, shift = bn_scale_shift(k, K, *residual_bn)
                added = added * scale[None, :] + shift[None, :]
            out += added
        if RELU:
            out = relu(out)
        if slope is not None:
            out = prelu(out, below[None, :])
        y.store([m0, k0], out.to(y.dtype))


@triton.jit
def conv1x1(
    x, w, y, scale_in, shift_in, residual, residual_bn, bias, gamma, beta, mean, var, eps, slope, M, K,
    C: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PROGRAMS: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr, RESIDUAL_BN: tl.constexpr,
    ONE_SLOPE: tl.constexpr,
):  # fmt: skip
    """``PROGRAMS`` persistent programs, or 0: ``SPLIT`` programs a tile. ``x, w, y, residual``: descriptors of rank 2.

    ``scale_in, shift_in``: fp32 ``[C]`` of the prologue, or None. With ``SPLIT`` above 1, ``y`` is what
    ``split_k.new_parts`` made. ``residual_bn`` is a tuple of BN's vectors, which count with ``RESIDUAL_BN``.
    """
    if PDL:
        wait_for_inputs()
    if PROGRAMS == 0:
        tile = tl.program_id(0) // SPLIT
        part = tl.program_id(0) % SPLIT if SPLIT > 1 else 0
        gemm_tile(
            tile, part, x, w, y, scale_in, shift_in, residual, residual_bn, bias, gamma, beta, mean, var, eps, slope, K,
            C, RELU, PRECISION, BM, BN, BK, SPLIT, RESIDUAL_BN, ONE_SLOPE,
        )  # fmt: skip
    else:
        tiles = tl.cdiv(M, BM) * tl.cdiv(K, BN)
        for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            gemm_tile(
                tile, 0, x, w, y, scale_in, shift_in, residual, residual_bn, bias, gamma, beta, mean, var, eps, slope,
                K, C, RELU, PRECISION, BM, BN, BK, 1, RESIDUAL_BN, ONE_SLOPE,
            )  # fmt: skip


def launch_conv1x1(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    operands: Operands,
    config: ConvConfig,
    precision: str,
    prologue: Normalised | None = None,
) -> None:
    """Launches :func:`conv1x1`: ``x [M, C]``, ``w [K, C]``, ``y`` and the residual ``[M, K]``, rows 16-byte strided.

    With a ``prologue``, x is normalised as it is loaded.

    Raises:
        ValueError: ``config.split`` exceeds the steps of the reduction, or ``y`` or the residual is not dense then, or
            the residual is to be normalised.
    """
    (m, c), k = x.shape, w.shape[0]
    bm, bn, bk = config.bm, config.bn, config.bk
    describe = TensorDescriptor.from_tensor
    split, pdl = config.split, dependent_launch(config, x.device)
    if split > 1 and operands.residual_bn is not None:
        raise ValueError(f"the second kernel of split={split} does not normalise the residual; take split=1")
    out, out_box, fused = y, [bm, bn], operands
    if split > 1:  # the second kernel has the epilogue
        out, out_box, fused = new_parts(y, split, cdiv(c, bk)), [1, bm, bn], Operands()
    residual = fused.residual
    tiles = cdiv(m, bm) * cdiv(k, bn)
    programs = config.persistent * multiprocessors(x.device)
    if programs >= tiles:  # every program would have one tile anyway
        programs = 0
    count("conv1x1")
    conv1x1[(programs or tiles * split,)](
        describe(x, [bm, bk]), describe(w, [bn, bk]), describe(out, out_box),
        None if prologue is None else prologue.scale, None if prologue is None else prologue.shift,
        None if residual is None else describe(residual, [bm, bn]), fused.residual_bn, *fused.with_slope,
        m, k, C=c, RELU=fused.relu, PRECISION=precision, BM=bm, BN=bn, BK=bk, PROGRAMS=programs, SPLIT=split, PDL=pdl,
        RESIDUAL_BN=fused.residual_bn is not None, ONE_SLOPE=fused.one_slope,
        num_warps=config.warps, num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip
    if split > 1:
        launch_split_k_epilogue(out, y, operands, pdl)

"""Forward convolution by shifted TMA boxes, with the whole epilogue in the same kernel.

    y[n,p,q,k] = epilogue(sum over r,s,c of x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c] * w[k,r,s,c])

A tile is a box of TN x TH x TW output pixels, the BM = TN*TH*TW rows of one GEMM block. For a filter tap
(r, s) the inputs of these pixels are again a box of the same size, shifted by the tap: one TMA load, whose
zero fill outside the tensor *is* the padding. With stride 2 the input is viewed as [N, H/2, 2, W/2, 2*C],
where the pixels of one tap are dense again and the tap's parity picks the half. See README.md, which
derives this on a 3x3 example; ``conv_tma`` mirrors its pseudocode line by line.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig, reduction_steps
from .dependent import dependent_launch, wait_for_inputs
from .epilogue import Operands, bn_scale_shift, prelu, relu, slopes
from .geometry import ConvShape, cdiv
from .launch import count
from .split_k import launch_split_k_epilogue, new_parts, share
from .tiles import box_origin


@triton.jit
def conv_tma(
    x, w, y, residual, bias, gamma, beta, mean, var, eps, slope,
    P, Q, K, C: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    STRIDE: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    TN: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr, ONE_SLOPE: tl.constexpr,
):  # fmt: skip
    """One box of output pixels times BN output channels. ``x, w, y, residual`` are tensor descriptors.

    With ``SPLIT`` above 1 it takes one share of the reduction, and ``y`` is what ``split_k.new_parts`` made.

    The product is computed transposed, filters times pixels: both operands then go from shared memory straight into the
    tensor core, where a reshaped box as left operand would pass through registers.
    """
    BM: tl.constexpr = TN * TH * TW
    CHUNKS: tl.constexpr = (C + BK - 1) // BK
    if PDL:
        wait_for_inputs()
    column_blocks = tl.cdiv(K, BN)
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT if SPLIT > 1 else 0
    n0, p0, q0 = box_origin(tile // column_blocks, P, Q, TN, TH, TW)
    k0 = tile % column_blocks * BN
    first, end = share(part, R * S * CHUNKS, SPLIT)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(first, end):
        tap = step // CHUNKS
        c0 = step % CHUNKS * BK
        dh = tap // S * DIL - PAD
        dw = tap % S * DIL - PAD
        if STRIDE == 1:
            a = x.load([n0, p0 + dh, q0 + dw, c0])
        else:  # input row 2*p + dh is row p + dh//2 of half dh%2
            a = x.load([n0, p0 + (dh >> 1), dh & 1, q0 + (dw >> 1), (dw & 1) * C + c0])
        b = w.load([k0, tap * C + c0])
        acc = tl.dot(b, a.reshape(BM, BK).T, acc, input_precision=PRECISION)
    if SPLIT > 1:
        y.store([part, n0, p0, q0, k0], acc.T.reshape(1, TN, TH, TW, BN))
    else:
        scale, shift = bn_scale_shift(k0 + tl.arange(0, BN), K, bias, gamma, beta, mean, var, eps)
        out = acc * scale[:, None] + shift[:, None]
        if slope is not None:  # before the residual: a barrier behind it would keep all of its values in registers
            below = slopes(k0 + tl.arange(0, BN), K, slope, ONE_SLOPE)
        if residual is not None:
            out += residual.load([n0, p0, q0, k0]).reshape(BM, BN).T.to(tl.float32)
        if RELU:
            out = relu(out)
        if slope is not None:
            out = prelu(out, below[:, None])
        y.store([n0, p0, q0, k0], out.to(y.dtype).T.reshape(TN, TH, TW, BN))


def launch_conv_tma(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    shape: ConvShape,
    operands: Operands,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`conv_tma`.

    Args:
        x: ``[N,H,W,C]``, channels dense, other strides multiples of 16 bytes; for stride 2 also pixel-dense rows,
            even H and W, and C a multiple of ``config.bk``.
        w: ``[K,R,S,C]`` dense. Where ``config.bk`` does not divide C, a chunk reaches into the next tap's weights and
            meets zeros of x there.
        y, operands.residual: ``[N,P,Q,K]``, channels dense, other strides multiples of 16 bytes (all dense where
            ``config.split`` is above 1).

    Raises:
        ValueError: ``config.split`` exceeds the steps of the reduction.
    """
    box, bn, bk = list(config.box), config.bn, config.bk
    tn, th, tw = box
    if shape.stride == 1:
        x_box = TensorDescriptor.from_tensor(x, [*box, bk])
    else:
        image, row, pixel, _ = x.stride()
        halves = [shape.n, shape.h // 2, 2, shape.w // 2, 2 * shape.c]
        x_box = TensorDescriptor(x, halves, [image, 2 * row, row, 2 * pixel, 1], [tn, th, 1, tw, bk])
    w_box = TensorDescriptor.from_tensor(w.flatten(1), [bn, bk])
    split, pdl = config.split, dependent_launch(config, x.device)
    out, out_box, fused = y, [*box, bn], operands
    if split > 1:  # the second kernel has the epilogue
        out, out_box, fused = new_parts(y, split, reduction_steps(config, shape)), [1, *box, bn], Operands()
    y_box = TensorDescriptor.from_tensor(out, out_box)
    residual = fused.residual
    r_box = None if residual is None else TensorDescriptor.from_tensor(residual, [*box, bn])
    boxes = cdiv(shape.n, tn) * cdiv(shape.p, th) * cdiv(shape.q, tw)
    count("conv_tma")
    conv_tma[(boxes * cdiv(shape.k, bn) * split,)](
        x_box, w_box, y_box, r_box, *fused.with_slope,
        shape.p, shape.q, shape.k, C=shape.c, R=shape.r, S=shape.s,
        STRIDE=shape.stride, PAD=shape.padding, DIL=shape.dilation, RELU=fused.relu, PRECISION=precision,
        TN=tn, TH=th, TW=tw, BN=bn, BK=bk, SPLIT=split, PDL=pdl, ONE_SLOPE=fused.one_slope,
        num_warps=config.warps, num_stages=config.stages, launch_pdl=pdl,
    )  # fmt: skip
    if split > 1:
        launch_split_k_epilogue(out, y, operands, pdl)

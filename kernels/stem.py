"""The 7x7 stride-2 stem convolution on three channels, as a 4x4 stride-1 convolution that tensor cores like.

Three channels fill neither a TMA row nor a tensor-core step, and stride 2 halves both. So the image is first
rearranged: padded by 4 on top and left, and every 2x2 cell of pixels becomes one pixel of 12 channels
(row in the cell, column in the cell, rgb), filled up to 16 with zeros. An output pixel (p, q) then reads the
4x4 cells from (p, q) on, at stride 1: an 8x8 window, whose first row and column get weight zero.

    padded image            cells, 16 channels each        y[p, q] = sum over a,b < 4 of
    . . . . . . . .         +---+---+---+---+                  cells[p + a, q + b] . packed[a, b]
    . 7 7 7 7 7 7 7         |   |   |   |   |
    . 7 7 7 7 7 7 7   -->   +---+---+---+---+              packed[a, b, (r, s, rgb)] = w[2a + r - 1, 2b + s - 1, rgb],
    ...                     |   |   |   |   |                  zero where that lies outside the 7x7 filter
                            ...

For the TMA two neighbouring cells are one pixel of 32 channels, and the filter is 4x2. Pairs start at even
cells for the even output columns and at odd cells for the odd ones: the same buffer read from its second
cell on, so the convolution is two launches of ``conv_fwd.conv_tma``, each storing every second column.

The rearranging pass also reads whatever the image is (uint8 or float, any strides), scales and normalises.
MLPerf's TPU submissions run this convolution on 2x2 space-to-depth too (``conv0_space_to_depth`` in their ResNet).
"""

import torch
import triton
import triton.language as tl

from .config import ConvConfig, heuristic, next_power_of_two, tma_describable
from .conv_fwd import launch_conv_tma
from .conv_pointer import launch_conv_pointer
from .epilogue import Operands
from .geometry import ConvShape, cdiv, out_size
from .launch import count, needs_int64

#: Channels of a cell: 2 rows x 2 columns x rgb, and 4 zeros.
CELL_CHANNELS = 16


def stem_cells(h: int, w: int, pair_aligned: bool) -> tuple[int, int]:
    """Rows and columns of cells for the stem of an ``h x w`` image: three more than its output has.

    ``conv_tma`` runs on any width from there on; an even one (``pair_aligned``) starts every row on a whole pair of
    cells, at 224 px even on a cache line. ``conv_pointer`` computes every column it is given: not aligned.
    """
    columns = out_size(w, 7, 2, 3) + 3
    return out_size(h, 7, 2, 3) + 3, columns + columns % 2 if pair_aligned else columns


@triton.jit
def channel_value(x, inside, norm_mean, norm_std, RGB: tl.constexpr):
    """One colour of some pixels in fp32: uint8 scaled to 0..1, normalised if asked, 0 outside the image."""
    ONE: tl.constexpr = 255 if x.dtype.element_ty == tl.uint8 else 1
    value = tl.load(x, mask=inside, other=0).to(tl.float32)
    if norm_mean is None:
        value *= 1 / ONE
    else:  # mean and standard deviation scaled instead of the pixel: exact integers stay exact
        inverse = tl.div_rn(1.0, tl.load(norm_std + RGB) * ONE)
        value = tl.where(inside, (value - tl.load(norm_mean + RGB) * ONE) * inverse, 0.0)
    return value


@triton.jit
def pixel_values(x, h, w, H, W, stride_c, stride_h, stride_w, norm_mean, norm_std, INT64: tl.constexpr):
    """Red, green and blue of the pixels ``(h, w)``; ``h`` is a 64-bit scalar."""
    # The comparison changes nothing compiled; of scalars and blocks, the interpreter makes integers, no mask.
    inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W)) != 0
    if INT64:
        w = w.to(tl.int64)
    x += h * stride_h + w * stride_w
    red = channel_value(x, inside, norm_mean, norm_std, 0)
    green = channel_value(x + stride_c, inside, norm_mean, norm_std, 1)
    # twice the stride may not fit the 32 bits of an argument
    blue = channel_value(x + stride_c + stride_c, inside, norm_mean, norm_std, 2)
    return red, green, blue


@triton.jit
def stack4(a, b, c, d):
    """Four equal shapes ``[...]`` to one ``[..., 4]``."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape + (4,))  # noqa: RUF005 - Triton knows no starred tuples


@triton.jit
def space_to_depth(
    x, out, norm_mean, norm_std, H, W, stride_n, stride_c, stride_h, stride_w, HS, WS,
    INT64: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """CELLS cells of one row of cells. ``x [N,3,H,W]`` of any strides, ``out [N,HS,WS,16]`` dense."""
    across = tl.cdiv(WS, CELLS)
    row = (tl.program_id(0) // across).to(tl.int64)  # of the N*HS rows of cells
    j = tl.program_id(0) % across * CELLS + tl.arange(0, CELLS)
    x += row // HS * stride_n
    h = row % HS * 2 - 4
    w = j * 2 - 4
    r0, g0, b0 = pixel_values(x, h, w, H, W, stride_c, stride_h, stride_w, norm_mean, norm_std, INT64)
    r1, g1, b1 = pixel_values(x, h, w + 1, H, W, stride_c, stride_h, stride_w, norm_mean, norm_std, INT64)
    r2, g2, b2 = pixel_values(x, h + 1, w, H, W, stride_c, stride_h, stride_w, norm_mean, norm_std, INT64)
    r3, g3, b3 = pixel_values(x, h + 1, w + 1, H, W, stride_c, stride_h, stride_w, norm_mean, norm_std, INT64)
    zero = tl.zeros((CELLS,), tl.float32)
    # A thread gathers whole cells: a [CELLS, 16] load needs twice the instructions, for addresses and masks.
    # Channels 0, 4, 8, 12 first, because stacking puts the last index innermost.
    cells = stack4(
        stack4(r0, g1, b2, zero), stack4(g0, b1, r3, zero), stack4(b0, r2, g3, zero), stack4(r1, g2, b3, zero)
    ).reshape(CELLS, 16)
    target = out + row * WS * 16 + (j * 16)[:, None] + tl.arange(0, 16)[None, :]
    tl.store(target, cells.to(out.dtype.element_ty), mask=(j < WS)[:, None])


@triton.jit
def pack_stem_weight(w, out, stride_k, stride_c, stride_r, stride_s):
    """The 4*4*16 weights of one output channel. ``w [K,3,7,7]`` of any strides, ``out [K,4,4,16]`` dense."""
    k = tl.program_id(0)
    element = tl.arange(0, 256)
    channel = element % 16
    r = element // 64 * 2 + channel // 6 - 1
    s = element // 16 % 4 * 2 + channel // 3 % 2 - 1
    inside = (channel < 12) & (r >= 0) & (s >= 0)
    source = w + k * stride_k + channel % 3 * stride_c + r * stride_r + s * stride_s
    value = tl.load(source, mask=inside, other=0.0)
    tl.store(out + k * 256 + element, value.to(out.dtype.element_ty))


def launch_space_to_depth(
    x: torch.Tensor,
    out: torch.Tensor,
    norm_mean: torch.Tensor | None = None,
    norm_std: torch.Tensor | None = None,
) -> None:
    """Launches :func:`space_to_depth`.

    Args:
        x: ``[N,3,H,W]`` of any strides (decoders hand out the permuted view of ``[N,H,W,3]``), uint8 or float. uint8
            is divided by 255.
        out: ``[N,HS,WS,16]`` dense, any float dtype; ``HS, WS`` from :func:`stem_cells`. Every element is written.
        norm_mean, norm_std: dense fp32 ``[3]``, both or neither: the values become ``(x - mean) / std``, and the
            padding is zero after that.
    """
    n, _, h, w = x.shape
    hs, ws = out.shape[1:3]
    if n == 0:
        return
    cells = min(128, max(32, next_power_of_two(ws)))
    count("space_to_depth")
    space_to_depth[(n * hs * cdiv(ws, cells),)](
        x, out, norm_mean, norm_std, h, w, *x.stride(), hs, ws,
        INT64=needs_int64(x[0]), CELLS=cells, num_warps=max(1, cells // 64),
    )  # fmt: skip


def launch_pack_stem_weight(w: torch.Tensor, out: torch.Tensor) -> None:
    """Launches :func:`pack_stem_weight`: ``w [K,3,7,7]`` of any strides to the dense ``out [K,4,4,16]``."""
    count("pack_stem_weight")
    pack_stem_weight[(w.shape[0],)](w, out, *w.stride(), num_warps=2)


def stem_config(n: int, p: int, q: int, k: int, itemsize: int, tma: bool) -> ConvConfig:
    """A configuration for :func:`launch_stem_conv` from the sizes of its output ``[n, p, q, k]`` alone.

    At 224 px this is a box of 2x16x8 pixels by 64 channels on 4 warps: 186 registers, no spills and issue pressure
    0.75 on sm_90 (8 warps: 1.31; 128 pixels: 1.31; 512 pixels: spills on 4 warps, 0.75 on 8). With 8 steps of the
    reduction the epilogue is most of that pressure, so a fourth stage (0.79) brings nothing.
    """
    pairs = ConvShape(n, p + 3, cdiv(q, 2) + 1, 2 * CELL_CHANNELS, k, 4, 2)
    if tma and tma_describable(pairs, itemsize):
        return heuristic(pairs, itemsize, tma=True)
    return heuristic(ConvShape(n, p + 3, q + 3, CELL_CHANNELS, k, 4, 4), itemsize, tma=False)


def launch_stem_conv(
    xs: torch.Tensor,
    packed_w: torch.Tensor,
    y: torch.Tensor,
    operands: Operands,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches the 7x7 stride-2 convolution on cells: two ``conv_tma`` or one ``conv_pointer``, as ``config`` says.

    Args:
        xs: ``[N,HS,WS,16]`` dense from :func:`space_to_depth`, sizes of :func:`stem_cells`.
        packed_w: ``[K,4,4,16]`` dense from :func:`pack_stem_weight`, dtype of ``xs``.
        y: ``[N,P,Q,K]`` dense.
        operands: no residual.
    """
    if operands.residual is not None:
        raise ValueError("operands.residual is set; the stem convolution has no residual")
    n, hs, ws, cell = xs.shape
    q, k = y.shape[2:]
    if n == 0:
        return
    if config.kernel == "conv_pointer":
        if ws != q + 3:
            raise ValueError(f"conv_pointer needs xs of {q + 3} columns for {q} of output, got {ws}; see stem_cells")
        launch_conv_pointer(xs, packed_w, y, ConvShape(n, hs, ws, cell, k, 4, 4), operands, config, precision)
        return
    w_pairs = packed_w.view(k, 4, 2, 2 * cell)
    for phase in range(min(q, 2)):
        y_phase = y[:, :, phase::2]
        pairs = y_phase.shape[2] + 1
        x_pairs = xs.as_strided(
            (n, hs, pairs, 2 * cell), (hs * ws * cell, ws * cell, 2 * cell, 1), xs.storage_offset() + phase * cell
        )
        shape = ConvShape(n, hs, pairs, 2 * cell, k, 4, 2)
        launch_conv_tma(x_pairs, w_pairs, y_phase, shape, operands, config, precision)

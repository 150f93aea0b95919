"""The whole ImageNet stem behind the cells of ``stem``: 7x7/2 convolution, BN, ReLU and 3x3/2 max-pool in one pass.

    conv[p, q, k] = (sum over a < 4 of cells[p + a, q..q+3] . packed[k, a]) * scale[k] + shift[k]
    y[i, j, k]    = relu(max over p in 2i-1..2i+1, q in 2j-1..2j+1 of conv[p, q, k])

The convolution's output, four times the pooled one, never visits memory. A program owns a strip of columns of a few
images and walks down its rows. Every row of cells is loaded once and feeds the four rows of the convolution that it
belongs to: four accumulators, one of which is finished by every row of cells.

    row of cells     c-3  c-2  c-1   c
    conv row c-3      0    1    2    3  <- a     finished with row c
    conv row c-2           0    1    2
    conv row c-1                0    1           pooled row i needs the conv rows 2i-1 (carried along), 2i and 2i+1
    conv row c                       0

An iteration walks two pooled rows, which are four rows of cells: by then each accumulator has been each of the four, so
that none is copied. A finished row is pooled along its columns at once, which leaves half of it (left until three are
there, all three would stay in registers). Columns 2j and 2j+1 lie in one thread; column 2j-1 is the odd one of the
pair to the left, which a ``tl.gather`` brings. The first pair of a strip has no pair to its left and is not stored (at
the image's edge it does not exist): neighbouring strips compute one pair twice.

Padding never wins: values are at least 0 behind the ReLU, so rows outside the image count as 0, and a column outside
repeats its neighbour. Rounding before the maximum gives what rounding after it does.

Filters are the left operand and pixels the right one, so that both are read from shared memory. One box holds, for each
column, the four cells of its window. Seen by the tensor map, windows overlap: each begins one cell after the other. The
hardware computes addresses from any strides; Triton's own ``triton.tools.ragged_tma`` relies on overlap too.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import ConvConfig
from .epilogue import Operands, bn_scale_shift, relu
from .geometry import cdiv
from .launch import count, needs_int64
from .stem import CELL_CHANNELS

#: Channels of the four cells in a row of a window: the reduction of one product.
WINDOW = 4 * CELL_CHANNELS
#: Boxes of one tile, as images and columns of the convolution. More images to a tile need fewer registers.
TILES = ((1, 64), (2, 32), (4, 16))


@triton.jit
def largest(a, b):
    """The larger of two values, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def next_row(
    xs, w0, w1, w2, w3, n0, row, q0, r1, r2, r3, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Adds a row of cells to the rows of the convolution that it belongs to; the last result is finished."""
    x = xs.load([n0, row, q0, 0]).reshape(BM, BK).T
    r0 = tl.dot(w0, x, input_precision=PRECISION)
    r1 = tl.dot(w1, x, r1, input_precision=PRECISION)
    r2 = tl.dot(w2, x, r2, input_precision=PRECISION)
    r3 = tl.dot(w3, x, r3, input_precision=PRECISION)
    return r0, r1, r2, r3


@triton.jit
def pooled_columns(
    acc, scale, shift, odd_inside, left, BN: tl.constexpr, TN: tl.constexpr, PAIRS: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """``[BN, TN, PAIRS]``: the largest of the columns 2j-1, 2j and 2j+1 of a row of the convolution, normalised."""
    even, odd = tl.split((acc * scale + shift).reshape(BN, TN, PAIRS, 2))
    odd = tl.where(odd_inside, odd, even)
    both = largest(even, odd).to(dtype)
    return largest(both, tl.gather(odd.to(dtype), left, 2)).to(dtype)


@triton.jit
def stem_pool(
    xs, w, y, bias, gamma, beta, mean, var, eps, N, P, Q, ROWS, K: tl.constexpr, INT64: tl.constexpr,
    PRECISION: tl.constexpr, TN: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """ROWS pooled rows of TW - 2 columns of the convolution of TN images. ``xs`` and ``w`` are tensor descriptors."""
    BM: tl.constexpr = TN * TW
    PAIRS: tl.constexpr = TW // 2
    dtype: tl.constexpr = y.dtype.element_ty
    pooled_h = (P + 1) // 2
    pooled_w = (Q + 1) // 2
    across = tl.cdiv(pooled_w, PAIRS - 1)
    down = tl.cdiv(pooled_h, ROWS)
    n0 = tl.program_id(0) // (across * down) * TN
    i0 = tl.program_id(0) // across % down * ROWS
    j0 = tl.program_id(0) % across * (PAIRS - 1) - 1
    k = tl.arange(0, BN)
    scale, shift = bn_scale_shift(k, K, bias, gamma, beta, mean, var, eps)
    scale = scale[:, None]
    shift = shift[:, None]
    pair = tl.arange(0, PAIRS)
    odd_inside = (2 * (j0 + pair) + 1 < Q)[None, None, :]
    # at the left edge of the image, the odd column of the first pair stands for column -1
    left = tl.maximum(pair - 1, (j0 < 0).to(tl.int32))
    left = tl.broadcast_to(left[None, None, :], (BN, TN, PAIRS))
    pixel = tl.arange(0, TN * PAIRS)
    image = n0 + pixel // PAIRS
    j = j0 + pixel % PAIRS
    stored = ((pixel % PAIRS > 0) & (j < pooled_w) & (image < N))[:, None] & (k < K)[None, :]
    if INT64:
        image = image.to(tl.int64)
    first_pixel = image * pooled_h * pooled_w + j
    w0 = w.load([0, 0 * BK])
    w1 = w.load([0, 1 * BK])
    w2 = w.load([0, 2 * BK])
    w3 = w.load([0, 3 * BK])
    zero = tl.zeros((BN, BM), tl.float32)
    r1 = zero  # rows of the convolution that have got one, two and three rows of cells
    r2 = zero
    r3 = zero
    carried = tl.zeros((BN, TN, PAIRS), dtype)
    end = tl.minimum(i0 + ROWS, pooled_h)
    for first in range(i0 - 2, end, 2):  # the accumulators fill over two pooled rows ahead of the strip
        for second in tl.static_range(2):
            i = first + second
            r1, r2, r3, row = next_row(xs, w0, w1, w2, w3, n0, 2 * i + 3, 2 * j0, r1, r2, r3, PRECISION, BM, BK)
            best = largest(carried, pooled_columns(row, scale, shift, odd_inside, left, BN, TN, PAIRS, dtype))
            r1, r2, r3, row = next_row(xs, w0, w1, w2, w3, n0, 2 * i + 4, 2 * j0, r1, r2, r3, PRECISION, BM, BK)
            carried = pooled_columns(row, scale, shift, odd_inside, left, BN, TN, PAIRS, dtype)
            carried = tl.where((i >= 0) & (2 * i + 1 < P), carried, 0.0)
            out = relu(largest(best, carried)).to(dtype).reshape(BN, TN * PAIRS).T
            target = y + ((first_pixel + i * pooled_w) * K)[:, None] + k[None, :]
            tl.store(target, out, mask=stored & (i >= i0) & (i < end))


def stem_pool_configs(p: int, k: int, itemsize: int) -> list[ConvConfig]:
    """Configurations for :func:`launch_stem_pool`, for ``p`` rows of the convolution and ``k`` filters.

    None of them spills on sm_90. Empty where registers do not suffice (more than 64 filters, or fp32).
    """
    if k > 64 or itemsize != 2:
        return []
    pooled = (p + 1) // 2
    strips = sorted({cdiv(pooled, 2**halvings) for halvings in range(pooled.bit_length())}, reverse=True)
    boxes = [(tn, 2 * rows, tw) for rows in strips for tn, tw in TILES]
    return [ConvConfig("stem_pool", box, 64, WINDOW, 4, 2) for box in boxes]


def launch_stem_pool(
    xs: torch.Tensor,
    packed_w: torch.Tensor,
    y: torch.Tensor,
    operands: Operands,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`stem_pool`.

    Args:
        xs: ``[N,HS,WS,16]`` dense from :func:`.stem.launch_space_to_depth`; ``HS, WS`` from :func:`.stem.stem_cells`.
        packed_w: ``[K,4,4,16]`` dense from :func:`.stem.launch_pack_stem_weight`, dtype of ``xs``.
        y: ``[N,I,J,K]`` dense, the pooled output.
        operands: with ReLU, without residual.
        config: its box is in pixels of the convolution: images, rows of a strip (even), columns (even).

    Raises:
        ValueError: the operands or the configuration do not fit.
    """
    if operands.residual is not None or not operands.relu:
        raise ValueError("stem_pool has a ReLU and no residual; launch_stem_conv and launch_max_pool do without")
    n, hs, ws, _ = xs.shape
    pooled_h, pooled_w, k = y.shape[1:]
    tn, rows, tw = config.box
    if k > config.bn or config.bk != WINDOW or rows % 2 or tw % 2:
        raise ValueError(f"stem_pool of {k} filters needs bn >= {k}, bk={WINDOW}, even rows and columns, got {config}")
    if n == 0:
        return
    p, q = hs - 3, min(ws - 3, 2 * pooled_w)  # rows of cells may end with one more than the windows need
    image, row, column, _ = xs.stride()
    windows = TensorDescriptor(xs, [n, hs, ws - 3, WINDOW], [image, row, column, 1], [tn, 1, tw, WINDOW])
    w_box = TensorDescriptor.from_tensor(packed_w.flatten(1), [config.bn, WINDOW])
    strips = cdiv(n, tn) * cdiv(pooled_h, rows // 2) * cdiv(pooled_w, tw // 2 - 1)
    count("stem_pool")
    stem_pool[(strips,)](
        windows, w_box, y, *operands.vectors, n, p, q, rows // 2, K=k, INT64=needs_int64(y),
        PRECISION=precision, TN=tn, TW=tw, BN=config.bn, BK=WINDOW, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

"""The 7x7/2 stem convolution of a training step, on the cells of ``stem``: its statistics, and its weight's gradient.

    c[n,p,q,k]  = sum over a < 4 of cells[n, p + a, q..q+3] . packed[k, a]                        raw, rounded
    parts       = count, mean and M2 of each program's share of c
    dw[k,a,b,e] = sum over n,p,q of dc[n,p,q,k] * cells[n, p + a, q + b, e]                       then back to 7x7x3

On cells both are plain convolutions of stride 1, which ``conv_stats`` and ``wgrad`` compute. They have two views of the
cells to choose from, by the channels ``config.bk`` that they reduce at a time:

    PAIR    two cells are a pixel of 32 channels, and the filter is 4x2. Pairs start at even cells for the even columns
            of the output, and at odd cells for the odd ones: two launches, as in ``stem.launch_stem_conv``.
    WINDOW  the four cells of a window's row are a pixel of 64 channels, and the filter is 4x1: one launch, which reads
            the cells once. The windows of a tensor map then overlap, see ``stem_pool``: a driver may refuse that.

An image needs no gradient; where one is asked for, the convolution is the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl

from .config import ConvConfig, least_waste_box, next_power_of_two
from .conv_stats import conv_stats_parts, launch_conv_stats
from .geometry import ConvShape, cdiv
from .launch import count
from .stem import CELL_CHANNELS
from .stem_pool import WINDOW
from .wgrad import launch_wgrad

#: Channels of a pair of cells.
PAIR = 2 * CELL_CHANNELS
#: Most programs of one launch that share the pixels: two for each multiprocessor of an H200, 17 MB of weight gradients.
SHARES = 264


@triton.jit
def unpack_stem_wgrad(packed, dw, PHASES, K, stride_k, stride_c, stride_r, stride_s):
    """Adds ``packed [PHASES,K,4,4,16]`` in order and takes ``pack_stem_weight`` back, for one filter."""
    k = tl.program_id(0)
    element = tl.arange(0, 256)
    acc = tl.zeros((256,), tl.float32)
    for phase in range(PHASES):
        acc += tl.load(packed + (phase * K + k) * 256 + element)
    channel = element % 16
    r = element // 64 * 2 + channel // 6 - 1
    s = element // 16 % 4 * 2 + channel // 3 % 2 - 1
    inside = (channel < 12) & (r >= 0) & (s >= 0)
    target = dw + k * stride_k + channel % 3 * stride_c + r * stride_r + s * stride_s
    tl.store(target, acc.to(dw.dtype.element_ty), mask=inside)


def _on_cells(n: int, p: int, columns: int, k: int, config: ConvConfig) -> ConvShape:
    """The convolution on cells that computes so many columns of the output, in the view that ``config.bk`` names."""
    s = WINDOW // config.bk
    return ConvShape(n, p + 3, columns + s - 1, config.bk, k, 4, s)


def _phases(q: int, config: ConvConfig) -> int:
    """Launches: one for every column of the output, or one for the even and one for the odd ones."""
    return min(q, WINDOW // config.bk)


def _views(
    xs: torch.Tensor, c: torch.Tensor, config: ConvConfig
) -> Iterator[tuple[torch.Tensor, torch.Tensor, ConvShape]]:
    """For each launch: the cells as its input, the columns of the output that it computes, and its convolution.

    Raises:
        ValueError: ``config.bk`` names no view.
    """
    if config.bk not in (PAIR, WINDOW):
        raise ValueError(f"the stem on cells needs bk={PAIR} or bk={WINDOW}, got {config}")
    image, row, cell, _ = xs.stride()
    n, p, q, k = c.shape
    phases = _phases(q, config)
    for phase in range(phases):
        columns = c[:, :, phase::phases]
        shape = _on_cells(n, p, columns.shape[2], k, config)
        # a pair is two cells on from the one before, a window one
        strides = (image, row, cell * (WINDOW // config.bk), 1)
        view = xs.as_strided((n, shape.h, shape.w, shape.c), strides, xs.storage_offset() + phase * cell)
        yield view, columns, shape


def _tiled(kernel: str, shape: ConvShape, tiles: list[tuple[int, int, int, int]]) -> list[ConvConfig]:
    """Configurations of ``(pixels, bk, warps, persistent)`` for the 7x7/2 convolution."""
    bn = min(64, max(16, next_power_of_two(shape.k)))
    configs = []
    for bm, bk, warps, resident in tiles:
        config = ConvConfig(kernel, (1, 1, bm), bn, bk, warps, 2, persistent=resident)
        columns = cdiv(shape.q, _phases(shape.q, config))
        configs.append(replace(config, box=least_waste_box(_on_cells(shape.n, shape.p, columns, shape.k, config), bm)))
    return configs


def stem_stats_configs(shape: ConvShape, itemsize: int) -> list[ConvConfig]:
    """Configurations for :func:`launch_stem_conv_stats`, the heuristic's first.

    Args:
        shape: the 7x7/2 convolution.
        itemsize: bytes of an element.
    """
    if itemsize == 4:
        return _tiled("conv_stats", shape, [(64, PAIR, 8, 1)])
    return _tiled("conv_stats", shape, [(256, PAIR, 4, 2), (128, PAIR, 4, 4), (256, WINDOW, 4, 1), (128, WINDOW, 4, 3)])


def stem_stats_config(shape: ConvShape, itemsize: int) -> ConvConfig:
    """The first of :func:`stem_stats_configs`."""
    return stem_stats_configs(shape, itemsize)[0]


def stem_wgrad_configs(shape: ConvShape, itemsize: int) -> list[ConvConfig]:
    """Configurations for :func:`launch_stem_wgrad`, the heuristic's first; the arguments of ``stem_stats_configs``."""
    configs = []
    tiles = [(32, PAIR, 8, 0)] if itemsize == 4 else [(64, PAIR, 4, 0), (128, PAIR, 4, 0), (64, WINDOW, 4, 0)]
    for config in _tiled("wgrad", shape, tiles):
        tn, th, tw = config.box
        columns = shape.q // _phases(shape.q, config)  # the fewer of the two phases
        boxes = cdiv(shape.n, tn) * cdiv(shape.p, th) * cdiv(columns, tw)
        configs.append(replace(config, split=max(1, min(boxes, SHARES // cdiv(shape.k, config.bn)))))
    return configs


def stem_wgrad_config(shape: ConvShape, itemsize: int) -> ConvConfig:
    """The first of :func:`stem_wgrad_configs`."""
    return stem_wgrad_configs(shape, itemsize)[0]


def stem_stats_parts(shape: ConvShape, config: ConvConfig) -> int:
    """Rows of the statistics of a 7x7/2 convolution for :func:`launch_stem_conv_stats`, on any GPU the same."""
    phases = _phases(shape.q, config)
    if shape.n == 0:
        return phases
    return phases * conv_stats_parts(_on_cells(shape.n, shape.p, cdiv(shape.q, phases), shape.k, config), config)


def launch_stem_conv_stats(
    xs: torch.Tensor,
    packed_w: torch.Tensor,
    c: torch.Tensor,
    parts: torch.Tensor | None,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches ``conv_stats`` on cells, once or for each phase of the columns.

    Args:
        xs: ``[N,HS,WS,16]`` dense from :func:`.stem.launch_space_to_depth`; ``HS, WS`` from :func:`.stem.stem_cells`.
        packed_w: ``[K,4,4,16]`` dense from :func:`.stem.launch_pack_stem_weight`, dtype of ``xs``.
        c: ``[N,P,Q,K]`` dense: the convolution's output, rounded. K is a multiple of 8 (of 4 in fp32).
        parts: dense fp32 ``[stem_stats_parts(shape, config), 3, K]``, all written: count, mean and M2 of the rounded
            outputs that one program computed, whose count may be 0. None for no statistics.

    Raises:
        ValueError: the configuration cannot compute it, or ``parts`` are not the same number for each launch.
    """
    phases = _phases(c.shape[2], config)
    if parts is not None and (parts.shape[0] == 0 or parts.shape[0] % phases):
        raise ValueError(f"parts must be a multiple of {phases}, got {tuple(parts.shape)}; see stem_stats_parts")
    if c.shape[0] == 0:
        if parts is not None:
            parts.zero_()
        return
    filters = packed_w.view(packed_w.shape[0], 4, WINDOW // config.bk, config.bk)
    shares = [None] * phases if parts is None else parts.chunk(phases)
    for (x, columns, shape), share in zip(_views(xs, c, config), shares, strict=True):
        launch_conv_stats(x, filters, columns, share, shape, None, config, precision)


def launch_stem_wgrad(dc: torch.Tensor, xs: torch.Tensor, dw: torch.Tensor, config: ConvConfig, precision: str) -> None:
    """Launches ``wgrad`` on cells, once or for each phase of the columns, and :func:`unpack_stem_wgrad`.

    Args:
        dc: ``[N,P,Q,K]`` dense: the gradient of the convolution's output. K is a multiple of 8 (of 4 in fp32).
        xs: ``[N,HS,WS,16]`` dense, as in the forward.
        dw: fp32 ``[K,3,7,7]`` of any strides, all written.

    Raises:
        ValueError: the configuration cannot compute it.
    """
    n, _, q, k = dc.shape
    if n == 0:
        dw.zero_()
        return
    phases = _phases(q, config)
    packed = torch.empty((phases, k, 4, WINDOW // config.bk, config.bk), dtype=torch.float32, device=dc.device)
    for (x, columns, shape), out in zip(_views(xs, dc, config), packed, strict=True):
        launch_wgrad(columns, x, out, None, shape, None, None, config, precision)
    count("unpack_stem_wgrad")
    unpack_stem_wgrad[(k,)](packed, dw, phases, k, *dw.stride(), num_warps=2)

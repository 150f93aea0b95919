"""Configurations for convolutions whose tiles are fewer than the multiprocessors of a GPU, as at batch 1 to 8."""

from __future__ import annotations

from dataclasses import replace

from .config import SPLIT_KERNELS, ConvConfig, count_tiles, least_waste_box, reduction_steps
from .geometry import ConvShape

SPLITS = (2, 4, 8, 16)


def small_grid_configs(config: ConvConfig, shape: ConvShape, multiprocessors: int) -> list[ConvConfig]:
    """What to consider besides ``config`` where its tiles leave multiprocessors idle, on sm_90 and later.

    Tiles within one wave are launched dependently: their time is mostly that of starting. Where they fill less than
    half of it, 2 to 16 programs share the reduction of a tile, as far as they fit one wave and have two steps each:
    small tiles are many without sharing, large ones read less through L2.

    Args:
        config: the best configuration without these.
        shape: of the convolution.
        multiprocessors: of the GPU.
    """
    tiles = count_tiles(config, shape)
    if tiles > multiprocessors:
        return []
    found = [replace(config, pdl=True)]
    if 2 * tiles > multiprocessors or config.kernel not in SPLIT_KERNELS:
        return found
    for bm, bn in ((64, min(64, config.bn)), (64, config.bn), (128, config.bn)):
        box = (1, 1, bm) if config.kernel == "conv1x1" else least_waste_box(shape, bm)
        # the few loads of a share are in flight together, and the next kernel's programs still find room
        stages = 4 if bm + bn < 256 else 3
        tile = replace(found[0], box=box, bn=bn, warps=4, stages=stages, persistent=0)
        programs, steps = count_tiles(tile, shape), reduction_steps(tile, shape)
        shares = (split for split in SPLITS if split * programs <= multiprocessors and 2 * split <= steps)
        found += [replace(tile, split=split) for split in (1, *shares)]
    return list(dict.fromkeys(found))

"""Chains of convolutions as one kernel: what goes in, which configurations there are, and who launches them.

    t      = relu(bn(first(x)))                      1x1, where the chain begins with the block; or t comes in
    h      = relu(bn(conv(t)))                       3x3, stride 1 or 2; or h = t where the chain begins behind it
    y      = relu(bn(expand(h)) + shortcut)          shortcut = x, or bn(project(x))
    t_next = relu(bn(reduce(y)))                     the next block's first 1x1

Everything behind the 3x3 is pointwise, so a tile of pixels needs no halo of it: ``h`` and the whole width of ``y`` pass
through a multiprocessor without visiting memory in between, and ``y`` is never read back for the next block's 1x1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .config import ConvConfig
from .epilogue import Operands
from .geometry import ChainShape


class Unit(NamedTuple):
    """One convolution of a chain: its weight ``[K,R,S,C]``, dense, and BN's vectors (never a residual)."""

    weight: torch.Tensor
    operands: Operands


@dataclass(frozen=True)
class ChainUnits:
    """The convolutions of a chain, as in :class:`.geometry.ChainShape`; None for those that are absent."""

    conv: Unit | None
    expand: Unit
    project: Unit | None = None
    reduce: Unit | None = None
    first: Unit | None = None


def chain_configs(shape: ChainShape, itemsize: int) -> list[ConvConfig]:
    """Configurations that compute a chain on sm_90 without spilling, the most promising of each kernel first.

    Empty where no kernel can: a chain's operands must fit registers and shared memory.
    """
    from .chain_rolling import chain_rolling_configs
    from .conv_chain import conv_chain_configs

    return [*chain_rolling_configs(shape, itemsize), *conv_chain_configs(shape, itemsize)]


def chain_refusal(config: ConvConfig, shape: ChainShape) -> str | None:
    """Why a chain cannot be computed with a configuration at all, in words; or None."""
    from .chain_rolling import refusal as rolling_refusal
    from .conv_chain import refusal

    return rolling_refusal(shape, config) if config.kernel == "chain_rolling" else refusal(shape, config)


def chain_shared_bytes(config: ConvConfig, shape: ChainShape, itemsize: int) -> int:
    """Shared memory of a program in bytes, at least what the compiled one needs."""
    from .chain_rolling import chain_rolling_shared_bytes
    from .conv_chain import conv_chain_shared_bytes

    count = chain_rolling_shared_bytes if config.kernel == "chain_rolling" else conv_chain_shared_bytes
    return count(config, shape, itemsize)


def launch_chain(
    t: torch.Tensor,
    shortcut: torch.Tensor,
    y: torch.Tensor,
    t_next: torch.Tensor | None,
    units: ChainUnits,
    shape: ChainShape,
    config: ConvConfig,
    precision: str,
) -> None:
    """Fills ``y`` and ``t_next`` with ``config.kernel``.

    Args:
        t: ``[N,H,W,C]`` dense, sizes ``shape.source``; with ``shape.first`` its input ``x``.
        shortcut: dense, sizes ``shape.shortcut``; may be the very ``t`` where the shapes agree, and is it with
            ``shape.first``.
        y: dense, sizes ``shape.stored``; must not overlap any input.
        t_next: ``[N,P,Q,K]`` of ``shape.reduce`` dense, or None without it; must not overlap any input.
        units: weights and vectors.
    """
    from .chain_rolling import launch_chain_rolling
    from .conv_chain import launch_conv_chain

    launch = launch_chain_rolling if config.kernel == "chain_rolling" else launch_conv_chain
    launch(t, shortcut, y, t_next, units, shape, config, precision)

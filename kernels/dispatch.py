"""Launches the kernel that a configuration names."""

import torch

from .config import ConvConfig, runs_on
from .conv1x1 import launch_conv1x1
from .conv_fwd import launch_conv_tma
from .conv_pointer import launch_conv_pointer
from .conv_rolling import launch_conv_rolling
from .epilogue import Operands
from .geometry import ConvShape


def launch_conv(
    x: torch.Tensor,
    w: torch.Tensor,
    y: torch.Tensor,
    shape: ConvShape,
    operands: Operands,
    config: ConvConfig,
    precision: str,
) -> None:
    """Fills ``y [N,P,Q,K]`` from ``x [N,H,W,C]`` and ``w [K,R,S,C]``, all dense, with ``config.kernel``.

    Raises:
        ValueError: the kernel cannot compute this shape.
    """
    if config.kernel == "conv_tma":
        launch_conv_tma(x, w, y, shape, operands, config, precision)
    elif config.kernel == "conv_pointer":
        launch_conv_pointer(x, w, y, shape, operands, config, precision)
    elif config.kernel == "conv_rolling":
        if not runs_on(config, shape, x.element_size()):
            raise ValueError(
                f"conv_rolling computes 3x3 convolutions of stride 1, padding 1 and dilation 1 with C = bk up to 128, "
                f"got {shape}, padding {shape.padding}, bk={config.bk}"
            )
        launch_conv_rolling(x, w, y, shape, operands, config, precision)
    elif config.kernel == "conv1x1":
        if not shape.pointwise:
            raise ValueError(f"conv1x1 computes 1x1 convolutions of stride 1, got {shape}")
        launch_conv1x1(
            x.view(shape.m, shape.c), w.view(shape.k, shape.c), y.view(shape.m, shape.k),
            operands.flat(shape.m, shape.k), config, precision,
        )  # fmt: skip

"""PReLU-nets, from "Delving Deep into Rectifiers" (https://arxiv.org/abs/1502.01852), with which the ResNets compare.

A 7x7 convolution of stride 2 and a 2x2 max-pool, three stages of 3x3 convolutions with 2x2 max-pools between them,
maxima over 7x7, 3x3, 2x2 and 1x1 cells of the image, and three fully connected layers. No BN; PReLU behind every layer
but the last::

    model   layers   stages at 56, 28 and 14 pixels (of 224)
    A       19       5 x 256   5 x 512   5 x 512
    B       22       6 x 256   6 x 512   6 x 512
    C       22       6 x 384   6 x 768   6 x 896

The tables of the ResNet paper quote model C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

#: Filters of the three stages and convolutions of each.
MODELS = {"A": ((256, 512, 512), 5), "B": ((256, 512, 512), 6), "C": ((384, 768, 896), 6)}
#: Cells on a side of the image at the levels of the pyramid.
LEVELS = (7, 3, 2, 1)
#: Slope at which PReLU begins.
SLOPE = 0.25


class SpatialPyramidPool(nn.Module):
    """Maxima over the cells of grids laid over the image: ``[N, C, H, W] -> [N, C * cells]`` for any H and W.

    Args:
        levels: cells on a side of each grid.
    """

    def __init__(self, levels: tuple[int, ...] = LEVELS) -> None:
        super().__init__()
        self.cells = sum(side * side for side in levels)
        self.pools = nn.ModuleList(nn.AdaptiveMaxPool2d(side) for side in levels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.flatten(pool(x), 1) for pool in self.pools], 1)


class PReLUNet(nn.Module):
    """A PReLU-net, initialised for its slopes: weights N(0, sqrt(2 / ((1 + 0.25^2) n))) of n inputs, biases 0.

    Args:
        model: ``"A"``, ``"B"`` or ``"C"``.
        num_classes: outputs.
        channelwise: whether each channel has a slope of its own, or each layer one.
        dropout: of the inputs of the second and third fully connected layer, in training.

    Raises:
        ValueError: for another ``model``.
    """

    def __init__(
        self, model: str = "C", num_classes: int = 1000, *, channelwise: bool = True, dropout: float = 0.5
    ) -> None:
        super().__init__()
        if model not in MODELS:
            raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
        widths, depth = MODELS[model]

        def prelu(channels: int) -> nn.PReLU:
            return nn.PReLU(channels if channelwise else 1, SLOPE)

        layers: list[nn.Module] = [nn.Conv2d(3, 96, 7, 2, 3), prelu(96)]
        inplanes = 96
        for width in widths:
            layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [nn.Conv2d(inplanes, width, 3, padding=1), prelu(width)]
                inplanes = width
        self.features = nn.Sequential(*layers)
        self.pool = SpatialPyramidPool()
        hidden = 4096
        self.classifier = nn.Sequential(
            nn.Linear(inplanes * self.pool.cells, hidden), prelu(hidden), nn.Dropout(dropout),
            nn.Linear(hidden, hidden), prelu(hidden), nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(m.weight, SLOPE)
                assert m.bias is not None
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)))


def prelu_net(model: str = "C", num_classes: int = 1000, *, weights: Any = None, **kwargs: Any) -> PReLUNet:
    """A PReLU-net, converted; ``weights`` is None, a state_dict or a path.

    Args:
        model, num_classes: of :class:`PReLUNet`.
        weights: None for random ones, a state_dict, or the path of a file.
        **kwargs: the other arguments of :class:`PReLUNet`.

    Raises:
        ValueError: for another ``model``.
        ValueError, FileNotFoundError: for ``weights`` that cannot be loaded, see :mod:`resnet_triton.weights`.
    """
    from .builders import finish

    return finish(PReLUNet(model, num_classes, **kwargs), weights)

"""The ImageNet stem in training mode: 7x7/2 convolution, BN, ReLU and 3x3/2 max-pool, forward and backward.

Its raw output is stored; neither what BN and ReLU make of it nor which pixel each window chose is.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import steps
from .block import Unit
from .reference import Lazy

GEOMETRY = (2, 3, 1)


def forward(x: Tensor, u: Unit, group: str) -> list[Tensor]:
    """``[y, raw, stats]``: the pooled output, and what the backward needs. ``x [N, 3, H, W]`` in any layout."""
    raw, parts = steps.stem_conv(x, u.weight, u.by_batch)
    stats = steps.constant_stats(u) if parts is None else steps.finalise(parts, u.gamma, u.beta, u.eps, group)
    return [steps.bn_relu_pool(Lazy(raw, stats)), raw, stats]


def backward(
    grad: Tensor, x: Tensor, u: Unit, raw: Tensor, stats: Tensor, group: str, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, gamma and beta, None where ``needs`` says that they are not wanted."""
    dz, total = steps.bn_relu_pool_backward(grad, Lazy(raw, stats))
    count = raw.shape[0] * raw.shape[2] * raw.shape[3] if u.by_batch else 0
    g, dgamma, dbeta = steps.bn_gradients(total, stats, count, group if u.by_batch else "")
    dx = dw = None
    if needs[0] or needs[1]:
        dc = steps.bn_backward(steps.Gradient(dz, raw, g))
        dw = steps.stem_wgrad(dc.dz, x, u.weight) if needs[1] else None
        if needs[0]:  # hardly ever: images need no gradient
            dx, _ = steps.dgrad(dc, u.weight, GEOMETRY, Lazy(x), None, 1, None)
    return dx, dw, dgamma if needs[2] else None, dbeta if needs[3] else None

"""Every distinct convolution of ResNet-18 to 152, scaled down, with its own configuration: output and weight gradient.

Bit by bit, as a training step runs them: BN and ReLU on load, and BN's backward on load of a 1x1's gradient. The
input's gradient is in ``test_dgrad.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.grad import conv2d_weight

from resnet_triton.kernels.conv_stats import conv_stats_configs, conv_stats_parts, launch_conv_stats
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import BNBackward, Normalised
from resnet_triton.kernels.wgrad import launch_wgrad, wgrad_configs
from tests.cases import Guarded, integers
from tests.comparers import identical
from tests.interpreter.test_dgrad import CIFAR, NETWORKS

HALF = torch.float16


@pytest.mark.parametrize("shape", NETWORKS + CIFAR, ids=str)
def test_output_statistics_and_weight_gradient(shape: ConvShape) -> None:
    s, guarded = shape, Guarded()
    x = integers(s.n, s.h, s.w, s.c, dtype=HALF, low=-1, high=1)
    w = integers(s.k, s.r, s.s, s.c, dtype=HALF, low=-1, high=1)
    scale, shift = integers(s.c, low=-1, high=1), torch.ones(s.c)
    h = (x.double() * scale + shift).relu()
    y, dw = guarded.output(s.n, s.p, s.q, s.k, dtype=HALF), guarded.output(s.k, s.r, s.s, s.c, dtype=torch.float32)
    normalised = Normalised(guarded.input(scale), guarded.input(shift))

    tiling = conv_stats_configs(s, 2, True)[0]
    parts = guarded.output(conv_stats_parts(s, tiling, 4), 3, s.k, dtype=torch.float32)
    launch_conv_stats(guarded.input(x), guarded.input(w), y, parts, s, normalised, tiling, "ieee")
    nchw = h.permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(nchw, w.double().permute(0, 3, 1, 2), None, s.stride, s.padding)
    identical(y, expected.permute(0, 2, 3, 1).to(HALF))
    assert parts[:, 0, 0].sum() == s.m

    dy, c = (integers(s.n, s.p, s.q, s.k, dtype=HALF) for _ in range(2))
    g = integers(3, s.k, low=-1, high=2)
    dc = g[0].double() * dy + g[1] + g[2] * c.double() if s.pointwise else dy.double()
    prologue = BNBackward(guarded.input(c), guarded.input(g)) if s.pointwise else None
    tiling = wgrad_configs(s, 2, True, s.pointwise, 4)[0]
    launch_wgrad(guarded.input(dy), guarded.input(x), dw, None, s, prologue, normalised, tiling, "ieee")
    found = conv2d_weight(nchw, (s.k, s.c, s.r, s.s), dc.permute(0, 3, 1, 2), s.stride, s.padding)
    assert found.count_nonzero()
    identical(dw, found.permute(0, 2, 3, 1).float())
    guarded.verify()

"""Networks for the tests, with BN that matters, and a counter of the operators that ran.

Behaviour is tested in fp64, where the fused path on the CPU is the reference implementation: two models that should
agree then differ by the order of sums alone, and ``comparers.same_math`` needs no tolerance for rounding.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet as tv
from torchvision.ops.misc import FrozenBatchNorm2d


def randomise(model: nn.Module) -> nn.Module:
    """Draws affine parameters and statistics of every BN, some of gamma zero; each block's last BN is small.

    The last one bounds the growth of activations in deep networks. Returns the model in eval mode.
    """
    generator = torch.Generator().manual_seed(1)

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.empty(like.shape, dtype=torch.float32).uniform_(low, high, generator=generator).to(like.dtype)

    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                m.weight.copy_(uniform(m.weight, 0.5, 1.5) * (uniform(m.weight, 0, 1) > 0.1))
                m.bias.copy_(uniform(m.bias, -0.3, 0.3))
                m.running_mean.copy_(uniform(m.running_mean, -0.3, 0.3))
                m.running_var.copy_(uniform(m.running_var, 0.5, 1.5))
        for m in model.modules():
            if hasattr(m, "bn2") and hasattr(m, "conv2"):
                getattr(m, "bn3", m.bn2).weight.mul_(0.3)
    return model.eval()


@functools.lru_cache(maxsize=4)
def _built(block: type[nn.Module], layers: tuple[int, ...], dtype: torch.dtype, **options) -> tv.ResNet:
    return randomise(tv.ResNet(block, list(layers), **{"num_classes": 10, **options}).to(dtype))


def bottlenecks(layers: tuple[int, ...] = (2, 1, 1, 1), dtype: torch.dtype = torch.float64, **options) -> tv.ResNet:
    """torchvision's bottleneck ResNet with few blocks and classes."""
    return copy.deepcopy(_built(tv.Bottleneck, layers, dtype, **options))


def basics(layers: tuple[int, ...] = (2, 1, 1, 1), dtype: torch.dtype = torch.float64, **options) -> tv.ResNet:
    """torchvision's ResNet of basic blocks with few blocks and classes."""
    return copy.deepcopy(_built(tv.BasicBlock, layers, dtype, **options))


def images(n: int = 2, h: int = 32, w: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal noise ``[n, 3, h, w]``, always the same."""
    return torch.randn(n, 3, h, w, generator=torch.Generator().manual_seed(7)).to(dtype)


class Calls(TorchDispatchMode):
    """Counts the operators that run within: this package's by their name, PyTorch's convolutions as ``"aten"``.

    A whole bottleneck counts as what it stands for, its first convolution and its tail. What an operator of this
    package runs inside is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "resnet_triton":
            self.counts.update(("conv_bn_act", "block_tail") if func._opname == "bottleneck" else (func._opname,))
        elif func._opname == "convolution":
            self.counts["aten"] += 1
        return func(*args, **(kwargs or {}))


def calls(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often each operator ran in one forward; those that did not are left out."""
    with torch.no_grad(), Calls() as counter:
        model(x)
    return dict(counter.counts)

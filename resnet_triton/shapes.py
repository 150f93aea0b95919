"""The convolutions of a ResNet as sizes alone, for planning, code generation checks and benchmarks without a model.

He et al. 2015 (arXiv:1512.03385), table 1, in the variant that torchvision calls v1.5: the stride of a
bottleneck sits on its 3x3 convolution. Pure Python: no torch, no triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .kernels.config import Epilogue
from .kernels.geometry import ConvShape, out_size

#: Residual blocks of each of the four stages, by depth.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STAGE_CHANNELS = (64, 128, 256, 512)
CLASSES = 1000

BN = Epilogue(bn=True)
BN_RELU = Epilogue(bn=True, relu=True)
BN_ADD_RELU = Epilogue(bn=True, residual=True, relu=True)


class ConvSite(NamedTuple):
    """One convolution of a network.

    Args:
        name: path of its module, as torchvision names it (``"layer1.0.conv1"``, ``"layer2.0.downsample.0"``).
        shape: its sizes.
        epilogue: what follows it: normalisation, then addition of the shortcut and ReLU where the block has them.
    """

    name: str
    shape: ConvShape
    epilogue: Epilogue


def expansion(depth: int) -> int:
    """Output channels of a block over its inner channels: 1 for basic blocks, 4 for bottlenecks."""
    return 4 if depth >= 50 else 1


def features(depth: int) -> int:
    """Channels that enter the classifier."""
    return STAGE_CHANNELS[-1] * expansion(depth)


def stem_conv(batch: int, size: int = 224) -> ConvSite:
    """The 7x7 stride-2 convolution on the image, ``size`` pixels high and wide."""
    return ConvSite("conv1", ConvShape(batch, size, size, 3, 64, 7, 7, 2, 3), BN_RELU)


def resnet_convs(depth: int, batch: int, size: int = 224) -> Iterator[ConvSite]:
    """Every convolution of the residual blocks, in the order of execution (a block's projection before its last one).

    Args:
        depth: 18, 34, 50, 101 or 152.
        batch: images.
        size: height and width of an image in pixels.

    Raises:
        ValueError: for another depth.
    """
    if depth not in BLOCKS:
        raise ValueError(f"depth={depth} is unknown; allowed: {', '.join(map(str, BLOCKS))}")
    pixels = out_size(stem_conv(batch, size).shape.p, 3, 2, 1)  # after the stem's max pool
    c = STAGE_CHANNELS[0]
    for stage, (blocks, inner) in enumerate(zip(BLOCKS[depth], STAGE_CHANNELS, strict=True)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            yield from _block(f"layer{stage + 1}.{block}", batch, pixels, c, inner, stride, expansion(depth))
            pixels = out_size(pixels, 3, stride, 1)
            c = inner * expansion(depth)


def _block(name: str, batch: int, pixels: int, c: int, inner: int, stride: int, widening: int) -> Iterator[ConvSite]:
    """The convolutions of one basic block (``widening`` 1) or bottleneck."""
    k = inner * widening

    def conv(c: int, k: int, pixels: int, kernel: int, stride: int) -> ConvShape:
        return ConvShape(batch, pixels, pixels, c, k, kernel, kernel, stride, kernel // 2)

    after = out_size(pixels, 3, stride, 1)
    if widening == 1:
        yield ConvSite(f"{name}.conv1", conv(c, inner, pixels, 3, stride), BN_RELU)
    else:
        yield ConvSite(f"{name}.conv1", conv(c, inner, pixels, 1, 1), BN_RELU)
        yield ConvSite(f"{name}.conv2", conv(inner, inner, pixels, 3, stride), BN_RELU)
    if stride != 1 or c != k:
        yield ConvSite(f"{name}.downsample.0", conv(c, k, pixels, 1, stride), BN)
    last = "conv2" if widening == 1 else "conv3"
    kernel = 3 if widening == 1 else 1
    yield ConvSite(f"{name}.{last}", conv(inner, k, after, kernel, 1), BN_ADD_RELU)

"""Residual networks in plain PyTorch, and builders that return them converted.

From "Deep Residual Learning for Image Recognition" (https://arxiv.org/abs/1512.03385): the ImageNet networks of table 1
(:class:`ResNet`, 18 to 152 layers), the CIFAR networks of section 4.2 (:class:`CifarResNet`, 6n+2 layers), each with
any of the paper's shortcuts or none; the pre-activation networks of its follow-up (:mod:`.preact`); and the PReLU-nets
that it compares with (:mod:`.prelu`)::

    stage         stem                layer1  layer2    layer3    layer4    head
    ResNet        7x7/2, max-pool/2   64      128, /2   256, /2   512, /2   mean, fc
    CifarResNet   3x3                 16      32, /2    64, /2    -         mean, fc

Attribute names, child order, state_dict keys, constructor arguments and the order of random draws are
torchvision's: a checkpoint or a seed gives the same model here and there. The forwards below are ordinary
eager operations; :func:`resnet_triton.convert` replaces what a block runs, never what it holds.
"""

from .blocks import SHORTCUTS, BasicBlock, Bottleneck, PlainBlock, ZeroPad
from .builders import (
    BUILDERS,
    Builder,
    Weights,
    cifar_plain,
    cifar_resnet,
    mnist5k_resnet20,
    plain18,
    plain34,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    resnext50_32x4d,
    resnext101_32x8d,
    resnext101_64x4d,
    wide_resnet50_2,
    wide_resnet101_2,
)
from .cifar import CifarResNet
from .imagenet import ResNet
from .names import build_by_name
from .preact import (
    PreActBasicBlock,
    PreActBottleneck,
    PreActCifarResNet,
    PreActResNet,
    preact_cifar_resnet,
    preact_resnet,
    preact_resnet200,
)
from .prelu import PReLUNet, prelu_net

__all__ = [
    "BUILDERS",
    "SHORTCUTS",
    "BasicBlock",
    "Bottleneck",
    "Builder",
    "CifarResNet",
    "PReLUNet",
    "PlainBlock",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActCifarResNet",
    "PreActResNet",
    "ResNet",
    "Weights",
    "ZeroPad",
    "build_by_name",
    "cifar_plain",
    "cifar_resnet",
    "mnist5k_resnet20",
    "plain18",
    "plain34",
    "preact_cifar_resnet",
    "preact_resnet",
    "preact_resnet200",
    "prelu_net",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

"""The networks that the experiments compare, by kind and depth."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .. import models

#: Kinds of networks for small images: the builder, and what it is called with.
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ("cifar_plain", {}),
    "residual": ("cifar_resnet", {"shortcut": "A"}),
    "residual-A-both": ("cifar_resnet", {"shortcut": "A-both"}),
    "residual-B": ("cifar_resnet", {"shortcut": "B"}),
    "residual-C": ("cifar_resnet", {"shortcut": "C"}),
    "preact": ("preact_cifar_resnet", {}),
}
#: Kinds with the same blocks, one after the other, in three stages ``layer1`` to ``layer3``.
STAGED = ("plain", "residual", "residual-A-both", "residual-B", "residual-C")


class Net(NamedTuple):
    """A network: one of :data:`KINDS`, and its depth."""

    kind: str
    depth: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.depth}"


def build(net: Net, classes: int, channels: int) -> nn.Module:
    """The converted network with random weights of the present random state.

    Raises:
        ValueError: for a kind that is not known or a depth that it does not have.
    """
    if net.kind not in KINDS:
        raise ValueError(f"kind {net.kind!r} is not known; allowed: {', '.join(KINDS)}")
    builder, arguments = KINDS[net.kind]
    return getattr(models, builder)(net.depth, classes, channels, **arguments)

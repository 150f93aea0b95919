"""Trained networks for other tasks: the outputs of their stages, and stages that do not learn.

:func:`features` runs a network up to the last stage that is asked for, in one fused pass; :func:`freeze` keeps stages
as they were trained, which saves their backward and what it would keep in memory.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .convert import check_module, convert, is_converted, original_class
from .structure import TrunkSpec

Norm = nn.modules.batchnorm._BatchNorm


class Features(nn.ModuleDict):
    """The children of a network up to the last one asked for, under their names; see :func:`features`.

    Args:
        children: the network's, in the order of its forward.
        layers: names of those whose outputs are wanted.
    """

    def __init__(self, children: OrderedDict[str, nn.Module], layers: Sequence[str]) -> None:
        super().__init__(children)
        self.return_layers = {name: name for name in children if name in layers}

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images ``[N, C, H, W]`` to the outputs of the layers, by name, in the order of the network."""
        outputs = OrderedDict()
        for name, m in self.items():
            x = m(x)
            if name in self.return_layers:
                outputs[name] = x
        return outputs


def features(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """A module that gives the outputs of named layers of a ResNet, computed in one fused pass up to the last of them.

    Its state_dict has the network's keys. BN, gradients and frozen parameters are those of the network.

    Args:
        model: a ResNet of this package (ImageNet, CIFAR), torchvision or timm. The modules of a converted one are
            shared, so that training one trains the other; one that is not converted is copied, as :func:`convert` does.
        layers: children of the network, such as ``("layer2", "layer4")``.

    Returns:
        A module from images ``[N, C, H, W]`` to an OrderedDict of outputs ``[N, K, P, Q]`` by name, in the order of
        the network.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: another network, no layer, or a layer that it does not have or whose output does not last.
    """
    check_module(model, "features", inplace=is_converted(model))
    trunk = _children_of(model if is_converted(model) else convert(model))
    wanted = [layers] if isinstance(layers, str) else list(layers)
    # a ReLU that works in place overwrites what comes before it
    lost = [name for name, behind in itertools.pairwise(trunk) if getattr(trunk[behind], "inplace", False)]
    unknown = [name for name in wanted if name not in trunk or name in lost]
    if unknown or not wanted:
        came = f"{unknown[0]!r} is none of them" if unknown else "got none"
        allowed = ", ".join(name for name in trunk if name not in lost)
        raise ValueError(f"features takes layers of the {original_class(model).__name__}: {allowed}; {came}")
    last = max(list(trunk).index(name) for name in wanted)
    getter = Features(OrderedDict(itertools.islice(trunk.items(), last + 1)), wanted)
    return convert(getter.train(model.training), inplace=True)


def _children_of(model: nn.Module) -> OrderedDict[str, nn.Module]:
    """The children of a converted network up to its pool.

    Raises:
        ValueError: the model is no network whose children are known.
    """
    marker: Any = getattr(type(model), "_resnet_triton", None)
    if marker is None or marker.kind != "container" or not isinstance(marker.spec, TrunkSpec):
        raise ValueError(
            f"features takes a ResNet of this package, torchvision or timm, got {original_class(model).__name__}; "
            "pass the network itself, not what holds it"
        )
    return OrderedDict((name, getattr(model, name)) for name in marker.spec.children)


def freeze(model: nn.Module, stages: Sequence[str] = ("conv1", "layer1"), norms: bool = True) -> nn.Module:
    """Keeps stages of a network as they are: their parameters get no gradient, their BN keeps its statistics.

    Frozen stages at the entrance have no backward and keep nothing in memory for it. Call it before the optimizer and
    DistributedDataParallel are made, with the parameters that are left:
    ``[p for p in model.parameters() if p.requires_grad]``.

    Args:
        model: any module; it is changed itself.
        stages: names of modules in it. A convolution takes the BN behind it along: ``"conv1"`` is conv1 and bn1.
        norms: BN of the stages stays in eval mode whatever ``model.train()`` says, until :func:`unfreeze`. False: it
            goes on taking, and running, the statistics of the batch in training mode.

    Returns:
        ``model``.

    Raises:
        ValueError: for a name that is not there.
    """
    for m in _stages(model, stages, "freeze"):
        m.requires_grad_(False)
        for norm in _norms(m) if norms else ():
            norm.train = _StaysInEval(norm)
            norm.train()
    return model


def unfreeze(model: nn.Module, stages: Sequence[str] = ("conv1", "layer1")) -> nn.Module:
    """Undoes :func:`freeze` of these stages: parameters learn again, BN follows the mode of the model.

    Args:
        model: the module; it is changed itself.
        stages: as of ``freeze``.

    Returns:
        ``model``.

    Raises:
        ValueError: for a name that is not there.
    """
    for m in _stages(model, stages, "unfreeze"):
        m.requires_grad_(True)
        for norm in _norms(m):
            if norm.__dict__.pop("train", None) is not None:
                norm.train(model.training)
    return model


class _StaysInEval:
    """``train`` of a BN that keeps its statistics. An object, not a closure: it is copied and pickled with its BN."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm

    def __call__(self, mode: bool = True) -> nn.Module:
        self.norm.training = False
        return self.norm


def _norms(stage: nn.Module) -> list[Any]:
    return [m for m in stage.modules() if isinstance(m, Norm)]


def _stages(model: nn.Module, stages: Sequence[str], function: str) -> list[nn.Module]:
    """The modules that the names stand for."""
    known, found = dict(model.named_modules(remove_duplicate=False)), []
    for name in [stages] if isinstance(stages, str) else stages:
        if not name or name not in known:
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(
                f"{function} knows no stage {name!r} of the {original_class(model).__name__}; its children are "
                f"{children}, and any module below them can be named, too (layer2.0)"
            )
        found.append(known[name])
        parent, _, last = name.rpartition(".")
        siblings = [*known[parent]._modules.items(), ("", None)]
        behind = next(after for (child, _), (_, after) in itertools.pairwise(siblings) if child == last)
        *_, leaf = known[name].modules()
        if isinstance(leaf, nn.Conv2d) and isinstance(behind, Norm):
            found.append(behind)
    return found

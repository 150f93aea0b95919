"""What a checkpoint holds: a state_dict under wrappers and prefixes, in the names of one of several families.

Residual networks of others have the layers of this package under other names. A :class:`Family` is one such naming;
:func:`read` finds which one a file has and gives its tensors torchvision's names, which are ours. The names also say
which CIFAR network it is (:func:`cifar_network`): depth, classes, and the kind of shortcut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

#: Keys under which training scripts store the state_dict, and prefixes that wrapped models put before its names.
WRAPPERS = ("state_dict", "model", "net", "model_state", "model_state_dict")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")

#: Ends of the names of entries that are not of the model: counters that the profiler thop leaves behind.
FOREIGN = ("total_ops", "total_params")

COUNTER = "num_batches_tracked"

Replacement = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class Family:
    """One way of naming the layers of a residual network.

    Args:
        name: the repository that is known for it.
        mark: pattern of a name that only this family has.
        renames: patterns and what takes their place, applied in this order.
        zeros: the shortcut where the file has no projections, ``"A"`` (zeros after the channels) or ``"A-both"`` (half
            of them on each side): it is in the code that trained the network, not in its file. None: not known.
    """

    name: str
    mark: str
    renames: tuple[tuple[str, Replacement], ...] = ()
    zeros: str | None = None


def _from_one(match: re.Match[str]) -> str:
    """A block counted from 1, in torchvision's names."""
    return f"layer{match[1]}.{int(match[2]) - 1}."


#: The first whose mark is found holds; the last one's names are those of this package.
FAMILIES = (
    Family(
        "osmr/imgclsmob (pytorchcv)",
        r"^features\.stage1\.unit1\.body\.",
        (
            (r"^features\.init_block\.(conv|bn)\.", r"\g<1>1."),
            (r"^features\.stage(\d)\.unit(\d+)\.", _from_one),
            (r"\.body\.conv(\d)\.(conv|bn)\.", r".\2\1."),
            (r"\.identity_conv\.conv\.", ".downsample.0."),
            (r"\.identity_conv\.bn\.", ".downsample.1."),
            (r"^output\.", "fc."),
        ),
    ),
    Family(
        "D-X-Y/ResNeXt-DenseNet",
        r"^conv_1_3x3\.",
        (
            (r"^conv_1_3x3\.", "conv1."),
            (r"^bn_1\.", "bn1."),
            (r"^stage_(\d)\.", r"layer\1."),
            (r"\.(conv|bn)_a\.", r".\g<1>1."),
            (r"\.(conv|bn)_b\.", r".\g<1>2."),
            (r"^classifier\.", "fc."),
        ),
        zeros="A",
    ),
    Family(
        "hysts/pytorch_resnet",
        r"^stage1\.block1\.",
        (
            (r"^(conv|bn)\.", r"\g<1>1."),
            (r"^stage(\d)\.block(\d+)\.", _from_one),
            (r"\.shortcut\.conv\.", ".downsample.0."),
            (r"\.shortcut\.bn\.", ".downsample.1."),
        ),
    ),
    Family(
        "akamaster/pytorch_resnet_cifar10",
        r"^linear\.weight$",
        ((r"^linear\.", "fc."), (r"\.shortcut\.([01])\.", r".downsample.\1.")),
        zeros="A-both",
    ),
    Family("torchvision", r"^fc\.weight$"),
)


@dataclass(frozen=True)
class CifarNetwork:
    """What :func:`resnet_triton.models.cifar_resnet` takes to build the network of a checkpoint."""

    depth: int
    num_classes: int
    in_channels: int
    shortcut: str

    def __str__(self) -> str:
        channels = "" if self.in_channels == 3 else f", in_channels={self.in_channels}"
        return f"cifar_resnet({self.depth}, num_classes={self.num_classes}{channels}, shortcut={self.shortcut!r})"


@dataclass(frozen=True)
class Report:
    """What was found in a checkpoint, and what was done to its names.

    Args:
        source: where it came from.
        state: its tensors under this package's names.
        family: whose names it had, or None where they are not known.
        wrappers: keys under which the state_dict lay, from the outside in.
        prefix: what every name began with, removed.
        renamed: name in the file, without the prefix, and our name, where these differ.
        ignored: entries that are not of the model: those beside the state_dict, and those of profilers.
    """

    source: str
    state: Mapping[str, Tensor] = field(repr=False)
    family: Family | None
    wrappers: tuple[str, ...]
    prefix: str
    renamed: Mapping[str, str] = field(repr=False)
    ignored: tuple[str, ...]

    @property
    def network(self) -> str | None:
        """The network in words, or as a call of :func:`~resnet_triton.models.cifar_resnet`; None if not known."""
        try:
            return str(cifar_network(self))
        except ValueError:
            return _in_words(self.state)

    @property
    def mapped(self) -> bool:
        """Whether anything but tensors under this package's names was found."""
        return bool(self.wrappers or self.prefix or self.renamed or self.ignored)

    def __str__(self) -> str:
        steps = [f"{len(self.state)} tensors"]
        if self.wrappers:
            steps[0] += f" under {'.'.join(self.wrappers)}"
        if self.prefix:
            steps.append(f"{self.prefix!r} removed")
        if self.renamed:
            steps.append("renamed " + ", ".join(f"{old} -> {new}" for old, new in _examples(self.renamed)))
        if not any(name.endswith(COUNTER) for name in self.state):
            steps.append(f"no {COUNTER}")
        if self.ignored:
            steps.append(f"ignored {', '.join(self.ignored)}")
        family = f"names of {self.family.name}" if self.family else "names of no known family"
        return f"{self.source}: {family}; {'; '.join(steps)}" + (f"; {self.network}" if self.network else "")


def _examples(renamed: Mapping[str, str]) -> list[tuple[str, str]]:
    """One layer of each kind whose name was changed: its name in the file and ours."""
    shown: dict[str, tuple[str, str]] = {}
    for old, new in renamed.items():
        layer = old.rpartition(".")[0]
        shown.setdefault(re.sub(r"\d+", "", layer), (layer, new.rpartition(".")[0]))
    return list(shown.values())


def read(state: Any, source: str, target: Iterable[str] = ()) -> Report:
    """What a checkpoint holds.

    Args:
        state: a state_dict, or what a training script stored around one.
        source: where it came from, for messages.
        target: names of the model that it is for. A prefix that all of them have is kept, and nothing is renamed
            where they are the file's names.

    Raises:
        ValueError: where it holds anything but names and tensors.
    """
    wrappers: list[str] = []
    ignored: list[str] = []
    while isinstance(state, Mapping):
        found = next((key for key in WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if found is None:
            break
        wrappers.append(found)
        ignored += [str(key) for key in state if key != found]
        state = state[found]
    came = type(state).__name__
    if isinstance(state, Mapping):
        pairs = ((k, v) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor)))
        came = next((f"{type(v).__name__} under {k!r}" for k, v in pairs), "")
    if came:
        raise ValueError(
            f"weights: {source} holds {came}; allowed: a state_dict (names and tensors), or one under "
            f"{', '.join(map(repr, WRAPPERS[:-1]))} or {WRAPPERS[-1]!r}"
        )
    target = set(target)
    names, prefix = _without_prefixes(dict(state), target)
    foreign = [name for name in names if name.endswith(FOREIGN) and name not in target]
    names = {name: tensor for name, tensor in names.items() if name not in foreign}
    family = next((f for f in FAMILIES if any(re.search(f.mark, name) for name in names)), None)
    renamed = {name: new for name in names if (new := _rename(name, family)) != name} if family else {}
    if target and len(target & set(renamed)) >= len(target & set(renamed.values())):
        renamed = {}  # the model has the file's names, as that of the script that wrote it
    ignored += [f"{len(foreign)} of a profiler ({foreign[0]}, ...)"] if foreign else []
    state = {renamed.get(name, name): tensor for name, tensor in names.items()}
    return Report(source, state, family, tuple(wrappers), prefix, renamed, tuple(ignored))


def _without_prefixes(names: dict[str, Tensor], target: set[str]) -> tuple[dict[str, Tensor], str]:
    """A wrapped model puts a prefix before all of its names; a compiled model inside DDP has two, in either order."""
    removed = ""
    while prefix := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), ""):
        if target and all(name.startswith(prefix) for name in target):
            break
        names = {name.removeprefix(prefix): tensor for name, tensor in names.items()}
        removed += prefix
    return names, removed


def _rename(name: str, family: Family) -> str:
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    return name


def cifar_network(report: Report) -> CifarNetwork:
    """The network of the paper's section 4.2 that a checkpoint holds.

    Raises:
        ValueError: where it holds another one; says which.
    """
    state = report.state
    stages = _stages(state)
    widths = [state[f"layer{k}.0.conv1.weight"].shape[0] for k in (1, 2, 3) if f"layer{k}.0.conv1.weight" in state]
    basic = "layer1.0.conv2.weight" in state and "layer1.0.conv3.weight" not in state
    fits = len(stages) == 3 and len(set(stages)) == 1 and widths == [16, 32, 64] and basic and "bn1.weight" in state
    if not (fits and _shape(state, "conv1.weight")[2:] == (3, 3) and len(_shape(state, "fc.weight")) == 2):
        raise ValueError(
            f"weights: {report.source} holds {_in_words(state) or 'no residual network whose names are known'}, not a "
            "CIFAR network of the paper (three equal stages of basic blocks with 16, 32 and 64 filters). "
            f"{_way_out(state)}"
        )
    projections = {name.split(".downsample.")[0] for name in state if ".downsample." in name}
    if not projections:
        shortcut = (report.family and report.family.zeros) or "A"
    else:
        shortcut = "C" if len(projections) == sum(stages) else "B"
    depth = 6 * stages[0] + 2
    return CifarNetwork(depth, state["fc.weight"].shape[0], state["conv1.weight"].shape[1], shortcut)


def cifar_arguments(
    report: Report,
    depth: int,
    num_classes: int | None = None,
    in_channels: int | None = None,
    shortcut: str | None = None,
) -> CifarNetwork:
    """The arguments of a caller, with what the checkpoint says in place of None.

    Raises:
        ValueError: where both say something, and not the same; where the checkpoint holds another network.
    """
    network = cifar_network(report)
    for name, given in (("depth", depth), ("num_classes", num_classes), ("in_channels", in_channels)):
        if given is not None and given != getattr(network, name):
            raise ValueError(f"{name}={given!r}, but weights: {report.source} holds {network}")
    # Between the sides of the zeros, and no shortcut at all, the file cannot decide: the caller may know better.
    if shortcut not in (None, network.shortcut) and {"B", "C"} & {shortcut, network.shortcut}:
        has = {"B": "projections where the width changes", "C": "a projection in every block"}
        raise ValueError(
            f"shortcut={shortcut!r}, but weights: {report.source} has {has.get(network.shortcut, 'no projections')}: "
            f"leave shortcut out, or pass shortcut={network.shortcut!r}"
        )
    return replace(network, shortcut=shortcut or network.shortcut)


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    return tuple(state[name].shape) if name in state else ()


def _stages(state: Mapping[str, Tensor]) -> list[int]:
    """Blocks of each stage."""
    found = {(int(m[1]), int(m[2])) for name in state if (m := re.match(r"layer(\d)\.(\d+)\.", name))}
    return [sum(stage == k for stage, _ in found) for k in sorted({stage for stage, _ in found})]


def _in_words(state: Mapping[str, Tensor]) -> str | None:
    stages, stem, head = _stages(state), _shape(state, "conv1.weight"), _shape(state, "fc.weight")
    if not stages or len(stem) != 4:
        return None
    block = "bottlenecks" if "layer1.0.conv3.weight" in state else "basic blocks"
    folded = "layer1.0.bn1.weight" not in state
    kind = "folded ResNet" if folded else "pre-activation ResNet" if _is_preact(state) else "ResNet"
    classes = f", {head[0]} classes" if len(head) == 2 else ""
    return f"a {kind} of {', '.join(map(str, stages))} {block} (stem {stem[2]}x{stem[3]}, {stem[0]} filters{classes})"


def _is_preact(state: Mapping[str, Tensor]) -> bool:
    return "bn1.weight" not in state and "layer1.0.bn1.weight" in state


def _way_out(state: Mapping[str, Tensor]) -> str:
    if _is_preact(state):
        return "For the pre-activation networks of the follow-up paper call preact_cifar_resnet."
    if _stages(state) and "layer1.0.bn1.weight" not in state:
        return "What `resnet-triton fold` wrote is read by resnet_triton.sources.load_model."
    if _shape(state, "conv1.weight")[2:] == (7, 7):
        return "For the ImageNet networks call resnet18, resnet34, resnet50, resnet101 or resnet152."
    return "Build it with the code that trained it, load the file there, and pass the model to resnet_triton.convert."

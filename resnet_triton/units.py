"""Runs convolution, BN and ReLU as one outside of residual blocks: in VGG's ``features``, in GoogLeNet's BasicConv2d.

Consecutive ones form a *run*, which is computed as a block without shortcut. With PReLU in place of ReLU, each is an
operator of its own; those run fused in any nn.Sequential. All other modules are called as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from . import nn as run
from .nn import Block, apply_modules, run_blocks, unit
from .snapshot import Remembered
from .structure import (
    ACTIVATIONS,
    NO_NORM,
    Converted,
    UnitSpec,
    is_bypassable,
    uses_batch_statistics,
    why_not_conv,
    why_not_norm,
    why_not_now,
    why_not_unit,
)


class Known(Protocol):
    """What is known of a class: ``"unit"`` with its attributes, or ``"sequence"`` with the attribute of one."""

    @property
    def kind(self) -> str: ...

    @property
    def spec(self) -> Any: ...


class Found(NamedTuple):
    """A convolution in a sequence of modules, what belongs to it, and why they do not run as one, or None.

    Args:
        place: position of the convolution.
        length: how many modules they are.
        conv, norm, act: the modules; the norm may be :data:`.structure.NO_NORM`.
    """

    place: int
    length: int
    conv: Converted
    norm: Converted
    act: Converted
    reason: str | None


def found_in(modules: Sequence[Converted], now: bool = True) -> list[Found]:
    """The convolutions of a sequence, in order; without ``now``, whatever hooks and modes are."""
    found = []
    for i, conv in enumerate(modules):
        if not isinstance(conv, nn.Conv2d):
            continue
        norm, act = [*modules[i + 1 : i + 3], None, None][:2]
        if isinstance(norm, ACTIVATIONS):
            norm, act = NO_NORM, norm
        own = [m for m in (conv, norm, act) if m is not None]
        found.append(Found(i, len(own) - (norm is NO_NORM), conv, norm, act, _why_not(conv, norm, act, now)))
    return found


def _why_not(conv: Converted, norm: Converted, act: Converted, now: bool) -> str | None:
    if reason := why_not_conv(conv):
        return f"its convolution {reason}"
    if reason := "is missing" if norm is None else why_not_norm(norm):
        return f"the normalisation behind it {reason}"
    if type(act) not in ACTIVATIONS:
        return f"{'nothing' if act is None else type(act).__name__} follows it; the kernels apply nn.ReLU and nn.PReLU"
    return why_not_now((conv, norm, act)) if now else None


def sequence_of(m: Converted, known: Known) -> Converted:
    """The sequence that a known module runs, or None: VGG's, or an nn.Sequential itself that has PReLU in it."""
    if known.kind == "sequence":
        return getattr(m, known.spec)
    return m if known.kind == "stage" and known.spec is None and has_prelu(m) else None


def is_known(m: Converted, known: Known) -> bool:
    """Whether a module is one of convolution, BN and ReLU, or of several."""
    return known.kind == "unit" or sequence_of(m, known) is not None


def has_prelu(sequence: Converted) -> bool:
    """Whether a sequence has a convolution with PReLU behind it, which may run as one."""
    modules = list(sequence._modules.values())
    if not any(type(m) is nn.PReLU for m in modules):
        return False
    return any(type(f.act) is nn.PReLU and f.reason is None for f in found_in(modules, now=False))


def reasons(m: Converted, known: Known, now: bool = True) -> dict[str, str | None]:
    """Of a module of units: why each of its convolutions does not run fused, or None, by path.

    Args:
        m: the module.
        known: its family, or what marks it as converted.
        now: whether hooks, patches and modes count.
    """
    if known.kind == "unit":
        return {"": _why_not_unit(m, known.spec, now)}
    sequence, path = sequence_of(m, known), ""
    if sequence is not m:
        if reason := why_not_sequence(sequence, now):
            return {known.spec: reason}
        path = f"{known.spec}."
    names = list(sequence._modules)
    return {path + names[f.place]: f.reason for f in found_in(list(sequence._modules.values()), now)}


def _why_not_unit(m: Converted, spec: UnitSpec, now: bool = True) -> str | None:
    """Why a module of one convolution, BN and ReLU runs its own forward, or None."""
    if "forward" in m.__dict__:
        return "its forward was replaced on the instance"
    conv, norm = spec.read(m)
    return why_not_unit(spec, conv, norm) or (why_not_now((conv, norm)) if now else None)


def why_not_sequence(sequence: Converted, now: bool = True) -> str | None:
    """Why a sequence is called as it is, or None."""
    marker = getattr(type(sequence), "_resnet_triton", None)
    if (type(sequence) if marker is None else marker.base) is not nn.Sequential:
        return f"is {type(sequence).__name__}, not nn.Sequential"
    if now and not is_bypassable(sequence):
        return "a hook is registered on it, or its forward was replaced"
    return None


def run_unit(m: Converted, x: Tensor) -> Tensor:
    """The forward of a converted module of one convolution, BN and ReLU."""
    spec = m._resnet_triton.spec
    return m._eager(x) if _why_not_unit(m, spec) is not None else run_blocks([_block([spec.read(m)])], x)


def _read(sequence: Converted) -> list[Block | Found | nn.Module]:
    modules = list(sequence._modules.values())
    begins = {f.place: f for f in found_in(modules) if f.reason is None}
    steps: list[Block | Found | nn.Module] = []
    pairs: list[tuple[Converted, Converted]] = []
    i = 0
    while i < len(modules):
        f = begins.get(i)
        together = f is not None and type(f.act) is nn.ReLU
        if pairs and (f is None or not together or _kind(f.norm) != _kind(pairs[-1][1])):
            steps.append(_block(pairs))
            pairs = []
        if f is None:
            steps.append(modules[i])
        elif together:
            pairs.append((f.conv, f.norm))
        else:
            steps.append(f)
        i += 1 if f is None else f.length
    return [*steps, _block(pairs)] if pairs else steps


def _kind(norm: Converted) -> tuple:
    """What BN of one operator have in common: whose statistics they take, and who shares these."""
    by_batch = uses_batch_statistics(norm)
    return (by_batch, type(norm), getattr(norm, "process_group", None)) if by_batch else (False,)


def _block(pairs: Sequence[Sequence[Converted]]) -> Block:
    first, *rest = [unit(conv, norm) for conv, norm in pairs]
    norms = tuple(norm for _, norm in pairs) if any(uses_batch_statistics(norm) for _, norm in pairs) else ()
    return Block(first, rest, (), None, 1, norms, residual=False)


_steps = Remembered(_read)


def run_sequence(sequence: Converted, x: Tensor) -> Tensor:
    """The modules of a sequence one after another, with its runs as one each."""
    if why_not_sequence(sequence) is not None or not x.is_floating_point():
        return sequence(x)
    return _run(sequence, x)


def _run(sequence: Converted, x: Tensor) -> Tensor:
    for step in _steps(sequence):
        if isinstance(step, Block):
            x = run_blocks([step], x)
        elif isinstance(step, Found):
            x = apply_modules(x, step.conv, step.norm, step.act)
        else:
            x = step(x)
    return x


def run_stage(stage: Converted, x: Tensor) -> Tensor:
    """The forward of a converted stage: its blocks, or as a sequence where convolutions have PReLU behind them."""
    y = run.run_stage(stage, x)
    if y is not None:
        return y
    sequence = stage._resnet_triton.spec is None and has_prelu(stage) and x.is_floating_point()
    return _run(stage, x) if sequence else stage._eager(x)


def run_vgg(model: Converted, x: Tensor) -> Tensor:
    """The forward of a converted VGG."""
    x = run_sequence(model.features, x)
    return model.classifier(model.avgpool(x).flatten(1))

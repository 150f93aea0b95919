"""The end of a residual block, as ``block_tail`` runs it: convolutions on their own, or several in one kernel.

:mod:`.chains` says which; whatever it says, the result is the same but for rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, chains, plan
from .chains import Chain, Tail
from .devices import Target
from .kernels.config import Epilogue
from .kernels.geometry import cdiv
from .steps import (
    Recorder,
    Step,
    Vectors,
    channels_last,
    check_conv,
    check_operands,
    check_residual,
    check_types,
    conv_geometry,
    conv_out_shape,
    conv_step,
    dense_vectors,
    new_channels_last,
    nhwc,
    run,
    target_for,
)


class Unit(NamedTuple):
    """One convolution of a block's end: weight, (bias, gamma, beta, mean, var), eps, (stride, padding, dilation)."""

    weight: Tensor
    vectors: Vectors
    eps: float
    geometry: tuple[int, int, int]


class Units(NamedTuple):
    """The convolutions of a block's end, as in :class:`.chains.Tail`."""

    last: Unit
    conv: Unit | None
    project: Unit | None
    reduce: Unit | None
    first: Unit | None = None


def tail_step(t: Tensor, shortcut: Tensor, units: Units, subsample: int = 1, pool: bool = False) -> list[Tensor]:
    """Runs the end of a block.

    Args:
        t: input of the first convolution; with ``units.first`` the block's input, as ``shortcut`` is.
        shortcut: the block's input.
        units: what to compute.
        subsample: every how many rows and columns of the block's output are wanted.
        pool: whether only the average of the block's output over the image is wanted, ``[N, K, 1, 1]``.

    Returns:
        The block's output; and that of ``units.reduce``, if it is there.
    """
    last, conv, project, reduce, first = units
    decision = _decision(t, shortcut, units, subsample, pool)
    chain = decision.chain if decision else None
    holds = chain.holds if chain else frozenset()
    residual_bn = None
    if first is not None and "first" not in holds:
        t = _conv(t, first)
    if project is not None and "project" not in holds:
        if decision is not None and decision.bn_waits:
            check_operands(shortcut, project.weight, project.vectors, None)
            residual_bn = project.vectors, project.eps
            project = project._replace(vectors=(None, None, None, None, None))
        shortcut = _conv(shortcut, project, relu=False)
    if conv is not None and "conv" not in holds:
        t = _conv(t, conv)
    after = None
    if pool:
        return [_pooled(t, last, shortcut)]
    if chain is None:
        y, step = _conv(t, last, shortcut, residual_bn=residual_bn), 1
    else:
        y, after = _run_chain(chain, t, shortcut, units)
        step = chain.shape.subsample
    if reduce is not None and "reduce" not in holds:
        after = _conv(y, reduce)
    if step != subsample:
        y = _subsample_step(y, subsample)
    return [y] if after is None else [y, after]


def tail_shapes(t: Tensor, shortcut: Tensor, units: Units, subsample: int = 1, pool: bool = False) -> list[Tensor]:
    """Empty tensors as :func:`tail_step` returns them, after all its checks."""

    def empty(x: Tensor, unit: Unit, residual: Tensor | None = None) -> Tensor:
        weight, vectors, _, geometry = unit
        check_conv(x, weight, vectors, residual)
        out = conv_out_shape(x.shape, weight.shape, *geometry)
        check_residual(residual, out, x.dtype)
        return new_channels_last(x, *out)

    if units.project is not None:
        shortcut = empty(shortcut, units.project)
    if units.first is not None:
        t = empty(t, units.first)
    if units.conv is not None:
        t = empty(t, units.conv)
    y = empty(t, units.last, shortcut)
    after = [] if units.reduce is None else [empty(y, units.reduce)]
    n, k, p, q = y.shape
    size = (1, 1) if pool else (cdiv(p, subsample), cdiv(q, subsample))
    return [new_channels_last(y, n, k, *size), *after]


def _conv(
    x: Tensor,
    unit: Unit,
    residual: Tensor | None = None,
    relu: bool = True,
    residual_bn: tuple[Vectors, float] | None = None,
) -> Tensor:
    weight, vectors, eps, (stride, padding, dilation) = unit
    return conv_step(x, weight, vectors, residual, eps, relu, stride, padding, dilation, residual_bn)


# Chains


def _has_bn_and_bias(unit: Unit) -> tuple[bool, bool]:
    return unit.vectors[4] is not None, unit.vectors[0] is not None


def _tail(
    t: torch.Size,
    shortcut: torch.Size,
    weights: tuple[torch.Size | None, ...],
    geometry: tuple[tuple[int, int, int] | None, ...],
    has: tuple[tuple[bool, bool], ...],
    subsample: int,
) -> Tail:
    """The sizes of a block's end, from those of its tensors; ``has`` says which convolutions have BN and bias."""

    def shaped(i: int, x: Sequence[int]):
        weight, places = weights[i], geometry[i]
        assert weight is not None and places is not None
        return conv_geometry(torch.Size(x), weight, *places)

    conv = project = reduce = first = None
    inner: Sequence[int] = t
    if weights[4] is not None:
        first, inner = shaped(4, t)
    if weights[1] is not None:
        conv, inner = shaped(1, inner)
    last, out = shaped(0, inner)
    added: Sequence[int] = shortcut
    if weights[2] is not None:
        project, added = shaped(2, shortcut)
    if tuple(added) != out:
        raise ValueError(f"the shortcut must be {out} as the block's output, got {tuple(added)}")
    if weights[3] is not None:
        reduce, _ = shaped(3, out)
    kinds = ((True, True), (False, True), (False, False), (False, True), (False, True))  # residual, ReLU
    epilogues = tuple(
        None if weight is None else Epilogue(bn, bias, *kind)
        for weight, (bn, bias), kind in zip(weights, has, kinds, strict=True)
    )
    return Tail(last, conv, project, reduce, epilogues[:4], subsample, first, epilogues[4])  # type: ignore[arg-type]


class _Decision(NamedTuple):
    """What was decided for the end of a block.

    Args:
        tail: its sizes.
        chain: the convolutions that share a kernel, or None.
        bn_waits: whether the projection is the library's and its BN is left to the kernel that adds it.
    """

    tail: Tail
    chain: Chain | None
    bn_waits: bool


@functools.lru_cache(maxsize=1024)
def _decide(sizes: tuple, pool: bool, chained: bool, dtype: torch.dtype, precision: str, target: Target, backend: str):
    """The decision for the sizes that :func:`_tail` takes."""
    tail = _tail(*sizes)
    chain = None
    if chained and not pool and tail.conv is not None:
        chain = chains.choose_chain(tail, dtype, precision, target, backend)
    sites = tail.sites()
    apart = chain is None and not pool and tail.project is not None
    waits = apart and plan.postpones_bn(sites["project"], sites["last"], dtype, precision, target, backend)
    return _Decision(tail, chain, waits)


plan.CLEARED.append(_decide.cache_clear)


def _decision(t: Tensor, shortcut: Tensor, units: Units, subsample: int, pool: bool) -> _Decision | None:
    """What is decided where something can be: None without TMA, and for an empty batch."""
    target = target_for(t)
    if not target.tma or (t.shape[0] == 0 and not Recorder.active):
        return None
    sizes = (
        t.shape,
        shortcut.shape,
        tuple(None if unit is None else unit.weight.shape for unit in units),
        tuple(None if unit is None else unit.geometry for unit in units),
        tuple((False, False) if unit is None else _has_bn_and_bias(unit) for unit in units),
        subsample,
    )
    precision, chained = backend.dot_precision(t.dtype), backend.chains_allowed()
    found = _decide(sizes, pool, chained, t.dtype, precision, target, backend.current_backend())
    if Recorder.active and found.tail.conv is not None:
        Recorder.active.tails.append((units.last.weight, found.tail))
    return found


def _run_chain(chain: Chain, t: Tensor, shortcut: Tensor, units: Units) -> tuple[Tensor, Tensor | None]:
    """Launches a chain, or records it."""
    shape, choice = chain.shape, chain.choice
    named = {name: unit for name, unit in units._asdict().items() if name == "last" or name in chain.holds}
    for unit in named.values():
        check_types(t, unit.weight)
        check_operands(t, unit.weight, unit.vectors, None)
    if shortcut.dtype != t.dtype or shortcut.device != t.device:
        raise ValueError(f"shortcut is {shortcut.dtype} on {shortcut.device}, t {t.dtype} on {t.device}")
    n, p, q, k = shape.stored
    y = new_channels_last(t, n, k, p, q)
    after = None
    if shape.reduce is not None:
        after = new_channels_last(t, shape.reduce.n, shape.reduce.k, shape.reduce.p, shape.reduce.q)
    if Recorder.active:
        size = t.element_size()
        first = named.get("first") or named.get("conv") or named["last"]
        Recorder.active.steps.append(
            Step("chain", first.weight, shape, None, shape.bytes_moved(size), choice, shape.weight_bytes(size))
        )
        return y, after
    from .kernels.chain import ChainUnits, launch_chain
    from .kernels.chain import Unit as Operand
    from .kernels.epilogue import Operands

    operands = {
        name: Operand(nhwc(unit.weight), Operands(None, *dense_vectors(unit.vectors), eps=unit.eps))
        for name, unit in named.items()
    }
    parts = ChainUnits(
        operands.get("conv"),
        operands["last"],
        operands.get("project"),
        operands.get("reduce"),
        operands.get("first"),
    )
    out, out_next = y.permute(0, 2, 3, 1), None if after is None else after.permute(0, 2, 3, 1)
    precision = backend.dot_precision(t.dtype)
    launch_chain(nhwc(t), nhwc(shortcut), out, out_next, parts, shape, choice.tiling, precision)
    return y, after


# What else becomes of a block's output


def _pooled(t: Tensor, last: Unit, shortcut: Tensor) -> Tensor:
    """The average over the image of a network's last convolution, in one kernel or in two."""
    weight, vectors, eps, places = last
    shape, out = conv_geometry(t.shape, weight.shape, *places)
    precision = backend.dot_precision(t.dtype)
    choice = None
    if backend.chains_allowed() and (shape.n > 0 or Recorder.active):
        epilogue = Epilogue(*_has_bn_and_bias(last), residual=True, relu=True)
        target = target_for(t)
        choice = chains.choose_pooled(shape, epilogue, t.dtype, precision, target, backend.current_backend())
    if choice is None:
        return _average_step(_conv(t, last, shortcut))
    check_conv(t, weight, vectors, shortcut)
    check_residual(shortcut, out, t.dtype)

    def launch(pooled: Tensor) -> None:
        from .kernels.conv1x1_pool import launch_conv1x1_pool
        from .kernels.epilogue import Operands

        operands = Operands(nhwc(shortcut), *dense_vectors(vectors), eps=eps, relu=True)
        rows = nhwc(weight).view(shape.k, shape.c)
        launch_conv1x1_pool(nhwc(t), rows, pooled.view(shape.n, shape.k), operands, choice.tiling, precision)

    size = t.element_size()
    return run(
        "conv+average",
        choice,
        lambda: new_channels_last(t, shape.n, shape.k, 1, 1),
        launch,
        lambda: _conv(t, last, shortcut).mean((2, 3), keepdim=True),
        lambda: plan.cost.pooled_bytes(shape, size),
        weight=weight,
        shape=shape,
        epilogue=epilogue,
        weight_bytes=shape.weights * size,
    )


def _subsample_step(y: Tensor, step: int) -> Tensor:
    """Every ``step``-th row and column, copied: max-pooling with a window of one pixel."""
    n, k, p, q = y.shape
    size = (cdiv(p, step), cdiv(q, step))
    moved = 2 * n * k * size[0] * size[1] * y.element_size()
    choice = _moving("max_pool", y, moved)

    def launch(out: Tensor) -> None:
        from .kernels.pool import launch_max_pool

        launch_max_pool(nhwc(y), out.permute(0, 2, 3, 1), 1, step, 0)

    return run(
        "subsample",
        choice,
        lambda: new_channels_last(y, n, k, *size),
        launch,
        lambda: y[:, :, ::step, ::step],
        lambda: moved,
    )


def _average_step(y: Tensor) -> Tensor:
    """The average over the image."""
    n, k, p, q = y.shape
    moved = n * k * (p * q + 1) * y.element_size()
    choice = _moving("global_avg_pool", y, moved)

    def launch(out: Tensor) -> None:
        from .kernels.pool import launch_global_avg_pool

        launch_global_avg_pool(nhwc(y), out.view(n, k))

    return run(
        "global_avg_pool",
        choice,
        lambda: new_channels_last(y, n, k, 1, 1),
        launch,
        lambda: channels_last(y.mean((2, 3), keepdim=True)),
        lambda: moved,
    )


def _moving(step: str, y: Tensor, moved: int) -> plan.Choice:
    return plan.choose_step(step, target_for(y), y.dtype, backend.current_backend(), (moved, 1), (moved, 1))

"""Which convolutions of a residual block's end share a kernel: every way is priced, the cheapest is taken.

A block's end is up to four convolutions: the projection on the shortcut, the 3x3, the 1x1 that expands and adds the
shortcut, and the next block's first 1x1. A chain (``kernels.chain``) holds the expanding one and any of the others;
what it does not hold runs as a convolution of its own, on the kernel that :mod:`.plan` chooses for it. The choice is
data: no GPU is needed to make it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from . import cost, plan, tuning
from .devices import Target
from .kernels.config import ConvConfig, Epilogue
from .kernels.geometry import ChainShape, ConvShape
from .plan import CLEAR_WIN, Choice, refusal
from .shapes import ConvSite, resnet_convs

#: Predicted times closer than this say nothing: the rate of L2, which decides most of them, is known less well.
EQUAL = 1.1
#: The convolutions beside the expanding one, in the order of execution.
OTHERS = ("first", "project", "conv", "reduce")


@dataclass(frozen=True)
class Tail:
    """The end of a residual block as sizes and epilogues.

    Args:
        last: the convolution to which the shortcut is added.
        conv: the one before it, or None in a basic block.
        project: the one on the shortcut, or None for identity.
        reduce: the next block's first one, or None.
        epilogues: of these, in the order last, conv, project, reduce; None for those that are absent.
        subsample: every how many rows and columns of the output are wanted.
        first, first_epilogue: the block's first convolution where it has not been computed yet, else None.
    """

    last: ConvShape
    conv: ConvShape | None
    project: ConvShape | None
    reduce: ConvShape | None
    epilogues: tuple[Epilogue | None, Epilogue | None, Epilogue | None, Epilogue | None]
    subsample: int = 1
    first: ConvShape | None = None
    first_epilogue: Epilogue | None = None

    def sites(self) -> dict[str, tuple[ConvShape, Epilogue]]:
        """Shape and epilogue of each convolution that is present, by name."""
        shapes = (self.last, self.conv, self.project, self.reduce, self.first)
        epilogues = (*self.epilogues, self.first_epilogue)
        named = zip(("last", "conv", "project", "reduce", "first"), shapes, epilogues, strict=True)
        return {name: (shape, epilogue) for name, shape, epilogue in named if shape and epilogue}


@dataclass(frozen=True)
class Chain:
    """A chain that was chosen: its sizes, how it runs, and which of :data:`OTHERS` it holds."""

    shape: ChainShape
    choice: Choice
    holds: frozenset[str]


def chain_shape(tail: Tail, holds: frozenset[str]) -> ChainShape | None:
    """The chain of ``last`` and the convolutions named; None where no kernel could compute it."""
    shapes = {name: getattr(tail, name) if name in holds else None for name in OTHERS}
    first, conv, project, reduce = (shapes[name] for name in ("first", "conv", "project", "reduce"))
    if any(shapes[name] is None for name in holds) or not tail.last.pointwise:
        return None
    if first is not None and (conv is None or not first.pointwise or project is not tail.project):
        return None  # it is computed on load, from the tensor that is also the shortcut
    if reduce is not None and not reduce.pointwise:
        return None
    if project is not None and (project.r != 1 or project.s != 1 or project.padding != 0):
        return None
    # what comes behind the chain reads all of its output
    whole = tail.reduce is not None and reduce is None
    return ChainShape(conv, tail.last, project, reduce, 1 if whole else tail.subsample, first)


def ways(tail: Tail) -> Iterator[tuple[frozenset[str], ChainShape]]:
    """Every chain of the tail, those of most convolutions first."""
    present = [name for name in OTHERS if getattr(tail, name) is not None]
    for size in range(len(present), 0, -1):
        for names in itertools.combinations(present, size):
            shape = chain_shape(tail, frozenset(names))
            if shape is not None:
                yield frozenset(names), shape


def refusal_of_chains(target: Target, dtype: torch.dtype, precision: str) -> str | None:
    """Why no chain can run there, or None."""
    reason = refusal(target, dtype)
    if reason:
        return reason
    if not target.tma:
        return f"{target.name} has no TMA, by which chains load"
    if target.is_cuda and target.sm // 10 != 9:
        return f"chains are tiled for sm_90; {target.name} is sm_{target.sm}"
    if target.is_cuda and dtype.itemsize != 2:
        return f"the tiles of a chain in {dtype} do not fit a multiprocessor"
    return None


class _Way(NamedTuple):
    """A way to run a tail.

    Args:
        share: of the time of all convolutions on their own.
        moved: bytes.
        measured: whether nothing of that is predicted.
        chain: what it holds, if any.
    """

    share: float
    moved: int
    measured: bool
    chain: Chain | None


@functools.lru_cache(maxsize=4096)
def choose_chain(tail: Tail, dtype: torch.dtype, precision: str, target: Target, backend: str) -> Chain | None:
    """The chain that makes the tail fastest, or None where every convolution is better off on its own.

    Every way is the sum of its parts, each at its measured time where there is one, else at its predicted time, and is
    held against the sum of all convolutions on their own at the same batch: that of the measurement, where a chain was
    measured. Predictions and measurements are compared with each other with these margins:

    - A measured chain must not be slower than the library was beside it; its time then counts against the convolutions'
      as it is, even if those are predicted only.
    - A chain that was not measured must be predicted to need at most 80 % of the library's predicted time for its
      convolutions (measured on a sibling of the GPU, at most 80 % of the library's time there), and of the time of the
      convolutions on their own if all of them were measured.

    Of ways that are equal within 10 %, the one that moves the fewest bytes is taken: times rest on estimates, bytes do
    not. Of ways that are measured throughout, the fastest is.
    """
    if backend == "cudnn" or refusal_of_chains(target, dtype, precision):
        return None
    if not target.is_cuda:  # in the interpreter: whatever there is a kernel for, the longest chain first
        if backend != "triton":
            return None
        for holds, shape in ways(tail):
            for config in configs_of(shape, dtype, target):
                return Chain(shape, Choice(config.kernel, config, "use_backend('triton') in the interpreter"), holds)
        return None
    sites, size = tail.sites(), dtype.itemsize

    def apart_at(batch: int) -> dict[str, Choice]:
        return {
            name: plan.choose_conv(replace(shape, n=batch), epilogue, dtype, precision, target, backend)
            for name, (shape, epilogue) in sites.items()
        }

    apart = apart_at(tail.last.n)
    alone = {name: plan.conv_bytes(*site, apart[name], size) for name, site in sites.items()}
    share, moved = 1.0, sum(alone.values())
    project = sites.get("project")
    if project and plan.postpones_bn(project, sites["last"], dtype, precision, target, backend):
        share -= cost.passes_us(*project, size, target) / _total(apart.values())
        moved += project[0].bytes_moved(size) - alone["project"]
    options = [_Way(share, moved, _measured(apart.values()), None)]
    for holds, shape in ways(tail):
        replaced = ("last", *holds)
        library = sum(cost.predict_unfused(*sites[name], dtype, precision, target).us for name in replaced)
        found = _choose(shape, library, dtype, precision, target)
        if found is None:
            continue
        choice, wins, batch = found
        around = apart if batch == tail.last.n else apart_at(batch)
        others = _total(around[name] for name in replaced)
        if backend != "triton":
            unsure = choice.measured_us is None and _measured(around[name] for name in replaced)
            if not wins or (unsure and _us(choice) > CLEAR_WIN * others):
                continue
        text = f"{choice.reason}, {others:.1f} us one kernel a convolution"
        rest = [name for name in sites if name not in replaced]
        share = (_us(choice) + _total(around[name] for name in rest)) / _total(around.values())
        moved = shape.bytes_moved(size) + sum(alone[name] for name in rest)
        measured = _measured((choice, *around.values()))
        options.append(_Way(share, moved, measured, Chain(shape, replace(choice, reason=text), holds)))
    first = min(options, key=lambda way: way.share)
    near = [way for way in options if way is first or not (way.measured and first.measured)]
    equal = (way for way in near if way.share <= EQUAL * first.share)
    chain = min(equal, key=lambda way: (way.moved, way.share)).chain
    if chain and chain.choice.measured_us is None:
        plan.warn_unmeasured(target, tail.last, dtype, precision)
    return chain


@functools.lru_cache(maxsize=1024)
def choose_pooled(
    shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, target: Target, backend: str
) -> Choice | None:
    """How a network's last convolution runs with the average over the image in its kernel; None where not.

    Args:
        shape, epilogue: of the convolution, to which a shortcut is added.
        dtype, precision, target, backend: as in :func:`choose_chain`.
    """
    if backend == "cudnn" or refusal_of_chains(target, dtype, precision) or not shape.pointwise:
        return None
    if not target.is_cuda and backend != "triton":
        return None
    from .kernels.conv1x1_pool import pool_config

    pixels = shape.p * shape.q
    config = pool_config(shape.n, pixels, shape.c, shape.k, dtype.itemsize)
    if config is None or not epilogue.residual:
        return None
    if not target.is_cuda:
        return Choice(config.kernel, config, "use_backend('triton') in the interpreter")
    if not cost.fits(config, shape, dtype.itemsize, True, target):
        return None
    ours = cost.predict(shape, epilogue, config, dtype, precision, target)
    average = cost.memory_us(shape.n * shape.k * (pixels + 1) * dtype.itemsize, target) or 0.0
    apart = plan.choose_conv(shape, epilogue, dtype, precision, target, backend)
    alone = _us(apart) + average
    library = cost.predict_unfused(shape, epilogue, dtype, precision, target).us + average
    if backend != "triton" and ours.us > CLEAR_WIN * (library if apart.measured_us is None else min(library, alone)):
        return None
    if ours.us >= alone:
        return None
    text = f"unmeasured; predicted {ours.us:.1f} us ({ours.limit}) against {alone:.1f} us with the average apart"
    return Choice(config.kernel, config, text, ours.us, limit=ours.limit)


def _us(choice: Choice) -> float:
    return choice.measured_us or choice.predicted_us or 0.0


def _measured(choices: Iterable[Choice]) -> bool:
    return all(choice.measured_us is not None for choice in choices)


def _total(choices: Iterable[Choice]) -> float:
    return sum(map(_us, choices))


def _choose(
    shape: ChainShape, library_us: float, dtype: torch.dtype, precision: str, target: Target
) -> tuple[Choice, bool, int] | None:
    """How a chain runs if it does: as it was measured on this device, or on its sibling, or as predicted fastest.

    Returns:
        The choice; whether it beats the library, clearly so unless it was measured here; and the batch that its time is
        of. None where there is no kernel, or without a measurement less than a program for each multiprocessor.
    """
    batch = shape.expand.n

    def predicted(config: ConvConfig) -> cost.Prediction:
        return cost.predict_chain(shape, config, dtype, precision, target)

    entry = tuning.lookup_chain(target.name, shape, dtype)
    if entry and fits(entry.config, shape, dtype, target):
        text = f"measured {entry.us:.1f} us against {entry.library_us:.1f} us by cudnn"
        if entry.batch != batch:
            text += f" at batch {entry.batch}"
        limit = predicted(entry.config).limit
        choice = Choice(entry.config.kernel, entry.config, text, None, entry.us, limit)
        return choice, entry.us <= entry.library_us, entry.batch
    name, entry = tuning.lookup_sibling_chain(target, shape, dtype) or ("", None)
    if entry and fits(entry.config, shape, dtype, target):
        plan.warn_borrowed(target, name, shape.expand, dtype, precision)
        config, ours = entry.config, predicted(entry.config)
        wins = entry.us <= CLEAR_WIN * entry.library_us
        text = f"unmeasured here; {entry.us:.1f} us against {entry.library_us:.1f} us by cudnn on {name}"
    else:
        # the convolutions of a chain come one after another: where it leaves multiprocessors idle, it does so for all
        configs = [
            config
            for config in configs_of(shape, dtype, target)
            if cost.chain_programs(shape, config) >= target.multiprocessors
        ]
        if not configs:
            return None
        ours, config = min(((predicted(config), config) for config in configs), key=lambda pair: pair[0].us)
        wins = ours.us <= CLEAR_WIN * library_us
        text = f"unmeasured; predicted {ours.us:.1f} us ({ours.limit}) against {library_us:.1f} us by cudnn"
    return Choice(config.kernel, config, text, ours.us, limit=ours.limit), wins, batch


def configs_of(shape: ChainShape, dtype: torch.dtype, target: Target) -> list[ConvConfig]:
    """The configurations with which a chain runs on a target: none spills, all fit its shared memory."""
    from .kernels.chain import chain_configs

    return [config for config in chain_configs(shape, dtype.itemsize) if fits(config, shape, dtype, target)]


def fits(config: ConvConfig, shape: ChainShape, dtype: torch.dtype, target: Target) -> bool:
    """Whether a configuration can compute a chain at all, and a target has the shared memory for it."""
    from .kernels.chain import chain_refusal, chain_shared_bytes

    room = target.shared_memory or math.inf
    return chain_refusal(config, shape) is None and chain_shared_bytes(config, shape, dtype.itemsize) <= room


def bottleneck_tails(depth: int, batch: int, size: int) -> Iterator[tuple[str, Tail]]:
    """Each bottleneck up to the next one's first convolution, where nobody else reads its output.

    The first bottleneck begins with its own first convolution; the others find it computed by the block before.
    """
    blocks: dict[str, dict[str, ConvSite]] = {}
    for site in resnet_convs(depth, batch, size):
        path = site.name.split(".")
        blocks.setdefault(".".join(path[:2]), {})[path[2]] = site
    following: list[dict[str, ConvSite]] = [*list(blocks.values())[1:], {}]
    step = 1  # at which the block before stored its output
    first: ConvSite | None = next(iter(blocks.values()))["conv1"]
    for (name, block), after in zip(blocks.items(), following, strict=True):
        last, conv, project, reduce = block["conv3"], block["conv2"], block.get("downsample"), after.get("conv1")
        if project and step > 1:  # it reads every pixel that was stored
            was = project.shape
            project = project._replace(shape=ConvShape(was.n, was.p, was.q, was.c, was.k))
        step = after["downsample"].shape.stride if "downsample" in after else 1
        yield (
            name,
            Tail(
                last.shape,
                conv.shape,
                project.shape if project else None,
                reduce.shape if reduce else None,
                (
                    last.epilogue,
                    conv.epilogue,
                    project.epilogue if project else None,
                    reduce.epilogue if reduce else None,
                ),
                step,
                first.shape if first else None,
                first.epilogue if first else None,
            ),
        )
        first = None


plan.CLEARED += [choose_chain.cache_clear, choose_pooled.cache_clear]

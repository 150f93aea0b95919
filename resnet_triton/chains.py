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

import torch

from . import cost, plan
from .devices import Target
from .kernels.config import ConvConfig, Epilogue
from .kernels.geometry import ChainShape, ConvShape
from .plan import CLEAR_WIN, Choice, refusal
from .shapes import ConvSite, resnet_convs

EQUAL = 1.05  # predicted times closer than this say nothing
#: The convolutions beside the expanding one, in the order of execution.
OTHERS = ("project", "conv", "reduce")


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
    """

    last: ConvShape
    conv: ConvShape | None
    project: ConvShape | None
    reduce: ConvShape | None
    epilogues: tuple[Epilogue | None, Epilogue | None, Epilogue | None, Epilogue | None]
    subsample: int = 1

    def sites(self) -> dict[str, tuple[ConvShape, Epilogue]]:
        """Shape and epilogue of each convolution that is present, by name."""
        shapes = (self.last, self.conv, self.project, self.reduce)
        named = zip(("last", "conv", "project", "reduce"), shapes, self.epilogues, strict=True)
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
    conv, project, reduce = shapes["conv"], shapes["project"], shapes["reduce"]
    if any(shapes[name] is None for name in holds) or not tail.last.pointwise:
        return None
    if reduce is not None and not reduce.pointwise:
        return None
    if project is not None and (project.r != 1 or project.s != 1 or project.padding != 0):
        return None
    # what comes behind the chain reads all of its output
    whole = tail.reduce is not None and reduce is None
    return ChainShape(conv, tail.last, project, reduce, 1 if whole else tail.subsample)


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


@functools.lru_cache(maxsize=4096)
def choose_chain(tail: Tail, dtype: torch.dtype, precision: str, target: Target, backend: str) -> Chain | None:
    """The chain that makes the tail fastest, or None where every convolution is better off on its own.

    A chain that was not measured must be predicted to need at most 80 % of the library's time for its convolutions, and
    of the time of the convolutions on their own if that was measured. Of ways whose times are equal within 5 %, the one
    that moves the fewest bytes is taken: times rest on estimates, bytes do not.
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
    sites = tail.sites()
    apart = {name: plan.choose_conv(*site, dtype, precision, target, backend) for name, site in sites.items()}
    size = dtype.itemsize
    alone = {name: plan.conv_bytes(*site, apart[name], size) for name, site in sites.items()}
    options: list[tuple[float, int, Chain | None]] = [(_total(apart.values()), sum(alone.values()), None)]
    for holds, shape in ways(tail):
        choice = _choose(shape, dtype, precision, target)
        if choice is None:
            continue
        replaced = ("last", *holds)
        others = _total(apart[name] for name in replaced)
        if choice.measured_us is None and backend != "triton":
            library = sum(cost.predict_unfused(*sites[name], dtype, precision, target).us for name in replaced)
            measured = all(apart[name].measured_us is not None for name in replaced)
            if _us(choice) > CLEAR_WIN * (min(library, others) if measured else library):
                continue
        text = f"{choice.reason} against {others:.1f} us one kernel a convolution"
        rest = [name for name in sites if name not in replaced]
        total = _us(choice) + _total(apart[name] for name in rest)
        moved = shape.bytes_moved(size) + sum(alone[name] for name in rest)
        options.append((total, moved, Chain(shape, replace(choice, reason=text), holds)))
    fastest = min(total for total, _, _ in options)
    near = [way for way in options if way[0] <= EQUAL * fastest]
    return min(near, key=lambda way: (way[1], way[0]))[2]


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
    alone = _us(plan.choose_conv(shape, epilogue, dtype, precision, target, backend)) + average
    library = cost.predict_unfused(shape, epilogue, dtype, precision, target).us + average
    if ours.us >= alone or (backend != "triton" and ours.us > CLEAR_WIN * library):
        return None
    text = f"unmeasured; predicted {ours.us:.1f} us ({ours.limit}) against {alone:.1f} us with the average apart"
    return Choice(config.kernel, config, text, ours.us, limit=ours.limit)


def _us(choice: Choice) -> float:
    return choice.measured_us or choice.predicted_us or 0.0


def _total(choices: Iterable[Choice]) -> float:
    return sum(map(_us, choices))


def _choose(shape: ChainShape, dtype: torch.dtype, precision: str, target: Target) -> Choice | None:
    """How a chain runs if it does: as it was measured on this device, else in the way that is predicted fastest."""
    configs = configs_of(shape, dtype, target)
    if not configs:
        return None
    predictions = [(cost.predict_chain(shape, config, dtype, precision, target), config) for config in configs]
    prediction, config = min(predictions, key=lambda pair: pair[0].us)
    text = f"unmeasured; predicted {prediction.us:.1f} us ({prediction.limit})"
    return Choice(config.kernel, config, text, prediction.us, limit=prediction.limit)


def configs_of(shape: ChainShape, dtype: torch.dtype, target: Target) -> list[ConvConfig]:
    """The configurations with which a chain runs on a target: none spills, all fit its shared memory."""
    from .kernels.chain import chain_configs, chain_shared_bytes

    size = dtype.itemsize
    room = target.shared_memory or math.inf
    return [config for config in chain_configs(shape, size) if chain_shared_bytes(config, shape, size) <= room]


def bottleneck_tails(depth: int, batch: int, size: int) -> Iterator[tuple[str, Tail]]:
    """What follows each bottleneck's first convolution, up to the next one's, where nobody else reads its output."""
    blocks: dict[str, dict[str, ConvSite]] = {}
    for site in resnet_convs(depth, batch, size):
        path = site.name.split(".")
        blocks.setdefault(".".join(path[:2]), {})[path[2]] = site
    following: list[dict[str, ConvSite]] = [*list(blocks.values())[1:], {}]
    step = 1  # at which the block before stored its output
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
            ),
        )


plan.CLEARED += [choose_chain.cache_clear, choose_pooled.cache_clear]

"""What there is to tune of a model: its distinct convolutions, and the chains that its blocks may end with.

In training mode it is the distinct steps of training instead, see :mod:`.training.sites`.

Both are found on shape-only tensors, as ``explain`` does. A site knows all that differs between a convolution and a
chain: its name in a journal, its candidates, its operands, what it launches, and the entry that its trials make.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from . import chains, cost, plan, tuning
from .backend import current_backend, use_backend
from .chains import Tail
from .devices import Target
from .entries import ChainEntry, Entry, chain_shape_of, work_of
from .explain import fused_steps
from .kernels.config import ConvConfig, Epilogue
from .kernels.geometry import ChainShape, ConvShape
from .tuner import Trial, candidates, chain_candidates, chain_entry_of, entry_of, key_of

if TYPE_CHECKING:
    from .codegen import Launch
    from .measure import ChainProblem, ConvProblem
    from .training.sites import TrainSite

PREFIX = "tune "
#: A chain is measured if its block's end is predicted to take at most this many times as long as in the fastest way.
NEAR_BEST = 1.5


class Named(abc.ABC):
    """Names of a site in a journal."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """What runs, in words."""

    @property
    def key(self) -> str:
        """Its name in a journal."""
        return PREFIX + self.name

    @property
    def row_key(self) -> str:
        """The name of the work on it in a journal."""
        return f"{self.key} (whole)"

    @property
    @abc.abstractmethod
    def beside(self) -> str:
        """What runs besides the convolution, in words."""


@dataclass(frozen=True)
class Site(Named):
    """A distinct convolution of a model, as tuned files tell them apart.

    Args:
        shape, epilogue, dtype, precision: what runs.
        layers: names of the modules that it is.
        share: predicted share of the network's convolution time by the library, summed over the layers.
    """

    shape: ConvShape
    epilogue: Epilogue
    dtype: torch.dtype
    precision: str
    layers: tuple[str, ...] = ()
    share: float = 0.0

    @property
    def name(self) -> str:
        return key_of(self.shape, self.epilogue, self.dtype, self.precision)

    @property
    def beside(self) -> str:
        return str(self.epilogue)

    @property
    def worth(self) -> float:
        """What comes first has more of it."""
        return self.share

    def joined(self, other: Site) -> Site:
        """The same site with the layers and shares of both."""
        return replace(self, layers=together(self.layers, other.layers), share=self.share + other.share)

    def library_us(self, target: Target) -> float:
        """Predicted time of the library's convolution and separate passes, microseconds."""
        return cost.predict_unfused(self.shape, self.epilogue, self.dtype, self.precision, target).us

    def candidates(self, target: Target) -> list[ConvConfig]:
        """What is measured, most promising first."""
        return candidates(self.shape, self.dtype, target, epilogue=self.epilogue, precision=self.precision)

    def ours_us(self, target: Target) -> float:
        """Predicted time of the best candidate, microseconds."""
        return min(
            cost.predict(self.shape, self.epilogue, config, self.dtype, self.precision, target).us
            for config in self.candidates(target)
        )

    def payload(self) -> dict[str, Any]:
        """What a worker process needs; :func:`site_of` is the inverse but for layers and share."""
        more = {"dtype": str(self.dtype).removeprefix("torch."), "precision": self.precision}
        return {"shape": vars(self.shape), "epilogue": vars(self.epilogue), **more}

    def problem(self, device: str) -> ConvProblem:
        """Operands on a device."""
        from .measure import ConvProblem

        return ConvProblem(self.shape, self.epilogue, self.dtype, device)

    def launches(self, config: ConvConfig, multiprocessors: int) -> list[Launch]:
        """What :meth:`problem` launches, without a GPU."""
        from .codegen import conv_launches

        return conv_launches(
            self.shape, self.epilogue, self.dtype, self.precision, config, multiprocessors, vectors=self.dtype
        )

    def entry(self, trials: Sequence[Trial]) -> Entry | None:
        """The entry of a search's trials, or None if none is good."""
        return entry_of(self.shape, self.epilogue, self.dtype, trials, self.precision)

    def read_entry(self, data: dict) -> Entry:
        """The entry that a journal holds."""
        return Entry.from_dict(data)

    def measured(self, target: Target) -> Entry | None:
        """The entry that the plan would use, if it is of this very batch."""
        entry = tuning.lookup(target.name, self.shape, self.dtype, self.epilogue.residual, self.precision)
        return entry if entry and entry.shape == self.shape else None


@dataclass(frozen=True)
class ChainSite(Named):
    """A distinct chain that blocks of a model may end with.

    Args:
        shape, dtype: what runs.
        layers: names of the modules whose output the shortcut is added to.
        share: predicted share of its convolutions in the network's convolution time by the library, over the layers.
        gain: predicted time that it saves beside one kernel a convolution, as such a share; may be negative.
    """

    shape: ChainShape
    dtype: torch.dtype
    layers: tuple[str, ...] = ()
    share: float = 0.0
    gain: float = 0.0
    precision = "tf32"  # chains have 16-bit operands, for which it means nothing

    @property
    def name(self) -> str:
        return key_of(self.shape, None, self.dtype)

    @property
    def beside(self) -> str:
        return "chain"

    @property
    def worth(self) -> float:
        """What comes first has more of it."""
        return self.gain

    def joined(self, other: ChainSite) -> ChainSite:
        """The same site with the layers, shares and gains of both."""
        layers, share, gain = together(self.layers, other.layers), self.share + other.share, self.gain + other.gain
        return replace(self, layers=layers, share=share, gain=gain)

    def library_us(self, target: Target) -> float:
        """Predicted time of the library's convolutions and separate passes, microseconds."""
        return sum(
            cost.predict_unfused(
                conv, Epilogue(bn=True, residual=name == "expand", relu=name != "project"), self.dtype, "tf32", target
            ).us
            for name, conv in self.shape.named.items()
        )

    def candidates(self, target: Target) -> list[ConvConfig]:
        """What is measured, most promising first."""
        return chain_candidates(self.shape, self.dtype, target)

    def ours_us(self, target: Target) -> float:
        """Predicted time of the best candidate, microseconds."""
        configs = self.candidates(target)
        return min(cost.predict_chain(self.shape, config, self.dtype, "tf32", target).us for config in configs)

    def payload(self) -> dict[str, Any]:
        """What a worker process needs; :func:`site_of` is the inverse but for layers, share and gain."""
        return {"chain": asdict(self.shape), "dtype": str(self.dtype).removeprefix("torch.")}

    def problem(self, device: str) -> ChainProblem:
        """Operands on a device."""
        from .measure import ChainProblem

        return ChainProblem(self.shape, self.dtype, device)

    def launches(self, config: ConvConfig, multiprocessors: int) -> list[Launch]:
        """What :meth:`problem` launches, without a GPU."""
        from .codegen import chain_launches

        return chain_launches(self.shape, self.dtype, "tf32", config, multiprocessors, vectors=self.dtype)

    def entry(self, trials: Sequence[Trial]) -> ChainEntry | None:
        """The entry of a search's trials, or None if none is good."""
        return chain_entry_of(self.shape, self.dtype, trials)

    def read_entry(self, data: dict) -> ChainEntry:
        """The entry that a journal holds."""
        return ChainEntry.from_dict(data)

    def measured(self, target: Target) -> ChainEntry | None:
        """The entry that the plan would use, if it is of this very batch."""
        entry = tuning.lookup_chain(target.name, self.shape, self.dtype)
        return entry if entry and entry.shape == self.shape else None


AnySite: TypeAlias = "Site | ChainSite | TrainSite"


def site_of(payload: dict[str, Any]) -> AnySite:
    """The site that a worker process is sent."""
    dtype = getattr(torch, payload["dtype"])
    if "chain" in payload:
        return ChainSite(chain_shape_of(payload["chain"]), dtype)
    if "work" in payload:
        from .training.sites import TrainSite

        return TrainSite(work_of(payload["work"]), dtype, payload["precision"])
    return Site(ConvShape(**payload["shape"]), Epilogue(**payload["epilogue"]), dtype, payload["precision"])


def together(*layers: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in layers for name in names))


# Which


def sites_of(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, target: Target, precision: str = "tf32"
) -> list[AnySite]:
    """What a converted model may run in this package's kernels: convolutions in order of execution, then chains.

    If any of its blocks has batch statistics, the steps of training instead, forward and backward.

    Args:
        model: converted, in the mode that it will run in.
        input_shape: ``(N, C, H, W)``.
        dtype: of weights and activations.
        target: the GPU.
        precision: ``"tf32"`` or ``"ieee"``, for fp32 only.

    Raises:
        ValueError: there is none, or kernels cannot run there; with the reason.
    """
    reason = plan.refusal(target, dtype)
    if reason:
        raise ValueError(f"nothing to tune: {reason}")
    with plan.quiet(), use_backend(current_backend(), chains=False):
        steps, tails = fused_steps(model, input_shape, dtype=dtype, device=target.name)
    if any(step.op == "fprop" for _, step in steps):
        from .training.sites import training_sites

        return [*training_sites(model, input_shape, dtype, target, precision)]
    found: dict[tuple[ConvShape, bool], Site] = {}
    total = 0.0
    for layer, step in steps:
        if step.op == "conv" and isinstance(step.shape, ConvShape) and step.epilogue:
            after = step.epilogue
            # a residual's own BN is not measured, nor are slopes
            epilogue = Epilogue(after.bn, after.bias, after.residual, after.relu, prelu=after.prelu)
            us = cost.predict_unfused(step.shape, epilogue, dtype, precision, target).us
            site = Site(step.shape, epilogue, dtype, precision, (layer,), us)
            total += us
            same = step.shape, epilogue.residual
            found[same] = found[same].joined(site) if same in found else site
    if not found:
        raise ValueError(
            "nothing to tune: no convolution of this model runs through resnet_triton; "
            "`resnet-triton explain` says why, layer by layer"
        )
    convs = [replace(site, share=site.share / total) for site in found.values()]
    return [*convs, *_chain_sites(tails, dtype, target, total)]


def _chain_sites(
    tails: Iterable[tuple[str, Tail]], dtype: torch.dtype, target: Target, total_us: float
) -> list[ChainSite]:
    """The distinct chains worth measuring; ``total_us`` is what shares are shares of."""
    if chains.refusal_of_chains(target, dtype, "tf32"):
        return []
    found: dict[ChainShape, ChainSite] = {}
    for layer, tail in tails:
        for shape, gain in chain_gains(tail, dtype, target):
            site = ChainSite(shape, dtype, (layer,), 0.0, gain / total_us)
            site = replace(site, share=site.library_us(target) / total_us)
            found[shape] = found[shape].joined(site) if shape in found else site
    return list(found.values())


@functools.lru_cache(maxsize=256)
def chain_gains(tail: Tail, dtype: torch.dtype, target: Target) -> list[tuple[ChainShape, float]]:
    """Chains that a block may end with, and the microseconds that each saves beside one kernel a convolution.

    By prediction alone, so that what is to be measured does not depend on what has been. Left out are chains with which
    the whole end of the block takes more than :data:`NEAR_BEST` times as long as in the fastest way.
    """
    alone = {
        name: min(
            cost.predict(
                shape, epilogue, plan.own_config(shape, epilogue, dtype, "tf32", target), dtype, "tf32", target
            ).us,
            cost.predict_unfused(shape, epilogue, dtype, "tf32", target).us,
        )
        for name, (shape, epilogue) in tail.sites().items()
    }
    found = []
    for holds, shape in chains.ways(tail):
        configs = chains.configs_of(shape, dtype, target)
        if configs:
            us = min(cost.predict_chain(shape, config, dtype, "tf32", target).us for config in configs)
            found.append((shape, sum(alone[name] for name in ("last", *holds)) - us))
    apart = sum(alone.values())
    fastest = min([apart, *(apart - gain for _, gain in found)])
    return [(shape, gain) for shape, gain in found if apart - gain <= NEAR_BEST * fastest]


def merged(sites: Iterable[AnySite]) -> list[AnySite]:
    """Sites of several batches and dtypes without repetitions: chains come last, the most worthwhile first."""
    found: dict[str, Any] = {}
    for site in sites:
        found[site.key] = found[site.key].joined(site) if site.key in found else site
    return sorted(found.values(), key=lambda site: (isinstance(site, ChainSite), -site.worth))

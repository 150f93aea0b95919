"""What there is to tune of a model in training mode: its distinct steps with products, forward and backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import backend, tuning
from ..devices import Target
from ..entries import TrainEntry
from ..explain import training_work
from ..kernels.config import ConvConfig
from ..kernels.geometry import ConvShape
from ..plan import quiet
from ..sites import Named, together
from ..tuner import Trial
from . import plan
from .plan import Work

if TYPE_CHECKING:
    from ..codegen import Launch
    from .measure import TrainProblem

LIMIT = 8  # candidates of a step


@dataclass(frozen=True)
class TrainSite(Named):
    """A distinct step of training, as tuned files tell them apart.

    Args:
        work, dtype, precision: what runs.
        layers: names of the modules whose convolution it belongs to.
        share: predicted share of the time of all such steps by the library (by ours where there is none); 0 for what
            runs only if another step turns out to be slow.
    """

    work: Work
    dtype: torch.dtype
    precision: str = "tf32"
    layers: tuple[str, ...] = ()
    share: float = 0.0

    @property
    def shape(self) -> ConvShape:
        """Of the forward convolution."""
        assert self.work.shape is not None
        return self.work.shape

    @property
    def beside(self) -> str:
        w = self.work
        words = {
            "": w.step, "bn+relu in": w.prologue, "bn backward in": w.backward, "sums out": w.moments,
            f"shortcut {w.project}": w.project, f"add/{w.residual_stride}": w.residual_stride,
            f"then 1x1->{w.following}": w.following,
        }  # fmt: skip
        return ", ".join(word or w.step for word, present in words.items() if present)

    @property
    def name(self) -> str:
        exact = " exact" if self.dtype == torch.float32 and self.precision == "ieee" else ""
        return f"{self.shape} {_name(self.dtype)}{exact} {self.beside}"

    @property
    def worth(self) -> float:
        """What comes first has more of it."""
        return self.share

    def joined(self, other: TrainSite) -> TrainSite:
        """The same site with the layers and shares of both."""
        return replace(self, layers=together(self.layers, other.layers), share=self.share + other.share)

    def library_us(self, target: Target) -> float:
        """Predicted time of the library and its passes, microseconds; 0 for the Gram form, which has none."""
        if not self.work.has_library:
            return 0.0
        return plan.library_prediction(self.work, self.dtype, self.precision, target).us

    def candidates(self, target: Target) -> list[ConvConfig]:
        """What is measured, most promising first."""
        return list(plan.candidates_of(self.work, self.dtype, self.precision, target))[:LIMIT]

    def ours_us(self, target: Target) -> float:
        """Predicted time of the best candidate, microseconds."""
        best = self.candidates(target)[0]
        return plan.predict(self.work, best, self.dtype, self.precision, target).us

    def payload(self) -> dict[str, Any]:
        """What a worker process needs; :func:`..sites.site_of` is the inverse but for layers and share."""
        work = asdict(self.work)
        del work["moved"]
        return {"work": work, "dtype": _name(self.dtype), "precision": self.precision}

    def problem(self, device: str) -> TrainProblem:
        """Operands on a device."""
        from .measure import TrainProblem

        return TrainProblem(self.work, self.dtype, device)

    def launches(self, config: ConvConfig, multiprocessors: int) -> list[Launch]:
        """What :meth:`problem` launches, without a GPU."""
        from ..codegen import trace
        from .measure import TrainProblem

        problem = TrainProblem(self.work, self.dtype, "meta")
        return trace(lambda: problem.run_ours(config), multiprocessors)

    def entry(self, trials: Sequence[Trial]) -> TrainEntry | None:
        """The entry of a search's trials, or None if none is good."""
        best = trials[0] if trials else None
        if best is None or best.timing is None:
            return None
        theirs = best.timing.library_us if self.work.has_library else 0.0
        exact = self.precision if self.dtype == torch.float32 else ""
        return TrainEntry(self.work, _name(self.dtype), best.config, best.timing.us, theirs, exact, tuning.versions())

    def read_entry(self, data: dict) -> TrainEntry:
        """The entry that a journal holds."""
        return TrainEntry.from_dict(data)

    def measured(self, target: Target) -> TrainEntry | None:
        """The entry that the plan would use, if it is of this very batch."""
        entry = tuning.lookup_training(target.name, self.work, self.dtype, self.precision)
        return entry if entry and entry.work == self.work else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def training_sites(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype, target: Target, precision: str = "tf32"
) -> list[TrainSite]:
    """The distinct steps of training of a converted model, in order of execution.

    Whatever was measured before, all steps count as run by this package's kernels, with and without the chains at the
    ends of blocks; and a gradient that a step forms as it loads it counts as stored too, which the plan may prefer.

    Args:
        model: converted, in training mode.
        input_shape, dtype, target, precision: as for :func:`..sites.sites_of`.

    Raises:
        ValueError: there is none; with the reason.
    """
    counts: Counter[Work] = Counter()
    layers: dict[tuple[bool, ConvShape], dict[str, None]] = {}
    for chained in (False, True):
        with quiet(), backend.use_backend("triton", chains=chained, memory=backend.memory()):
            asked, steps = training_work(model, input_shape, dtype=dtype, device=target.name)
        counts |= Counter(work for work in asked if work.shape is not None)
        for layer, step in steps:
            if isinstance(step.shape, ConvShape):
                layers.setdefault((step.op == "gram", step.shape), {})[layer] = None
    works = {work: count for work, count in counts.items() if _runs(work, dtype, precision, target)}
    if not works:
        reasons = (plan.refusal_of_products(work, dtype, precision, target) for work in counts)
        raise ValueError(f"nothing to tune: {next(reasons, None) or 'no step of training has configurations'}")
    for work in list(works):
        works.setdefault(replace(work, backward=False), 0)
    sites = [TrainSite(work, dtype, precision, tuple(layers.get(_place(work), ()))) for work in works]
    alone = [site.library_us(target) or site.ours_us(target) for site in sites]
    times = [us * count for us, count in zip(alone, works.values(), strict=True)]
    return [replace(site, share=us / sum(times)) for site, us in zip(sites, times, strict=True)]


def _place(work: Work) -> tuple[bool, ConvShape]:
    assert work.shape is not None
    return work.step == "gram", work.shape


def _runs(work: Work, dtype: torch.dtype, precision: str, target: Target) -> bool:
    return plan.refusal_of_products(work, dtype, precision, target) is None

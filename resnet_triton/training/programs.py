"""The programs of a training step, from the steps themselves: they run on tensors that have sizes but no memory.

So what is compiled ahead of time is what a step launches, with its operands, constants and divisibility hints.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from .. import backend
from ..codegen import Launch, arguments, trace
from ..devices import Target
from ..kernels.config import ConvConfig
from ..kernels.geometry import ConvShape
from ..plan import Choice
from ..shapes import ConvSite, resnet_convs, stem_conv
from . import block, plan, stem, steps
from .block import Form, Needs, Unit

#: Optional arguments of the kernels of a step, in words.
OPTIONAL = {
    "raw": "bn_backward", "scale": "bn", "residual_scale": "bn_of_residual", "residual": "add", "mask": "mask",
    "next_w": "following", "wd": "project", "other": "and", "g1": "vectors", "parts": "parts", "sums": "sums",
    "gamma": "gamma", "moments": "moments", "dgamma": "dgamma", "doubtful": "doubtful", "tail": "tail",
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """One launch of a training step.

    Args:
        label: where it comes from: network, layer and step.
        launch: what Triton would be given.
        work: what the step has to do, or None for one without a plan.
        config: of a launch with products, else None.
        share: of the step's products, where several launches divide them.
    """

    label: str
    launch: Launch
    work: plan.Work | None = None
    config: ConvConfig | None = None
    share: float = 1.0

    @property
    def operands(self) -> str:
        """What it is given besides what it always needs, in words."""
        given = arguments(self.launch)
        return "+".join(text for name, text in OPTIONAL.items() if given.get(name) is not None)


@dataclass
class _Tracer:
    """Stands between the steps and Triton: plans for a target, notes launches.

    Args:
        dtype, precision, target: of the step.
        chained: whether the ends of blocks compute the next block's first convolution.
        pick: which of the configurations that a step has, the one that is predicted fastest first; the last where there
            are fewer.
        network, behind: of the labels, in front and behind.
    """

    dtype: torch.dtype
    precision: str
    target: Target
    chained: bool
    pick: int
    network: str
    behind: str
    place: str = ""
    names: dict[int, str] = field(default_factory=dict)
    planned: list[tuple[Choice, plan.Work]] = field(default_factory=list)
    found: list[Program] = field(default_factory=list)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """While active, steps on tensors without memory plan for the target and are traced."""
        with (
            patch.object(plan, "choose", self.choose),
            patch.object(plan, "chains", self.chains),
            patch.object(steps, "run", self.run),
            patch.object(steps, "target_for", lambda x: self.target),
            patch.object(backend, "dot_precision", lambda dtype: self.precision),
            backend.use_backend("triton"),
        ):
            yield

    def choose(self, work: plan.Work, dtype: torch.dtype, precision: str, target: Target, backend: str) -> Choice:
        """The plan's choice where nothing was measured and the library is not asked."""
        passing = work.step in plan.PASSES
        choice = Choice(work.step if passing else "aten", None, "a pass")
        if not passing and work.step != "aten" and not plan.refusal_of_products(work, dtype, precision, target):
            configs = plan.configs_of(work, dtype, precision, target.multiprocessors)
            ordered = sorted(configs, key=lambda config: plan.predict(work, config, dtype, precision, target).us)
            choice = Choice(work.step, ordered[min(self.pick, len(ordered) - 1)], "picked")
        self.planned.append((choice, work))
        return choice

    def chains(
        self, work: plan.Work, filters: int, dtype: torch.dtype, precision: str, target: Target, backend: str
    ) -> bool:
        """Whether what follows is computed with the end of a block: if at all, wherever it can be."""
        both = replace(work, following=filters)
        return self.chained and plan.refusal_of_products(both, dtype, precision, target) is None

    def run(
        self, op: str, choice: Choice, x: Tensor, allocate: Callable, launch: Callable, eager: Callable, moved: int,
        weight: Tensor | None = None, shape: ConvShape | None = None,
    ) -> Any:  # fmt: skip
        """Traces the step; the library's have nothing to trace."""
        out = allocate()
        if choice.fused:
            work = next(work for planned, work in reversed(self.planned) if planned is choice)
            label = f"{self.names.get(id(weight), self.place)} {op} {self.behind}"
            launches, config = trace(lambda: launch(out), self.target.multiprocessors), choice.config
            multiplies = [config is not None and one.kernel.__name__.startswith(config.kernel) for one in launches]
            for one, products in zip(launches, multiplies, strict=True):
                share = 1 / max(1, sum(multiplies))
                self.found.append(Program(label, one, work, config if products else None, share))
        return out

    def trace(self, run: Callable[[], Any]) -> Any:
        """The result of ``run``; what it launches outside of a step is noted without a plan."""
        results = []
        for launch in trace(lambda: results.append(run()), self.target.multiprocessors):
            self.found.append(Program(f"{self.place} {self.behind}", launch))
        return results[0]

    def unit(self, site: ConvSite) -> Unit:
        """A convolution with batch statistics, its weight as a mixed-precision model holds it."""
        s = site.shape
        weight = torch.empty(s.k, s.c, s.r, s.s, device="meta", memory_format=torch.channels_last)
        self.names[id(weight)] = f"{self.network} {site.name}"
        gamma, beta = (torch.empty(s.k, device="meta") for _ in range(2))
        return Unit(weight, gamma, beta, None, None, 1e-5, (s.stride, s.padding, s.dilation))


@dataclass(frozen=True)
class TrainingStep:
    """A training step of a ResNet.

    Args:
        depth, batch, size: of the network and its images.
        gram: whether the ends of bottlenecks are in the Gram form.
        chained: whether they then compute the next block's first convolution where they can.
    """

    depth: int
    batch: int
    size: int = 224
    gram: bool = False
    chained: bool = False

    def programs(self, dtype: torch.dtype, precision: str, target: Target, pick: int = 0) -> list[Program]:
        """What it launches: forward layer after layer, then backward; and the pass behind a library's convolution.

        Args:
            dtype, precision: of activations, and of fp32 products.
            target: the device to plan for.
            pick: 0 for the configurations that are predicted fastest, 1 for those next to them, and so on; the last
                where there are fewer.
        """
        tracer = _Tracer(
            dtype, precision, target, self.chained, pick, f"resnet{self.depth}", f"batch {self.batch}"
        )  # fmt: skip
        with tracer.active():
            _stem(tracer, stem_conv(self.batch, self.size))
            _blocks(tracer, list(resnet_convs(self.depth, self.batch, self.size)), self.gram)
            s = stem_conv(self.batch, self.size).shape
            raw = torch.empty(s.n, s.k, s.p, s.q, dtype=dtype, device="meta", memory_format=torch.channels_last)
            tracer.place = f"resnet{self.depth} behind a library's convolution"
            steps.moments_of(raw)
        return tracer.found


def _stem(tracer: _Tracer, site: ConvSite) -> None:
    tracer.place = f"{tracer.network} stem"
    u, s = tracer.unit(site), site.shape
    x = torch.empty(s.n, s.c, s.h, s.w, dtype=tracer.dtype, device="meta")
    y, raw, stats = tracer.trace(lambda: stem.forward(x, u, ""))
    tracer.trace(lambda: stem.backward(y, x, u, raw, stats, "", (False, True, True, True)))


class _Block(NamedTuple):
    place: str
    units: list[Unit]
    project: Unit | None
    form: Form


def _described(tracer: _Tracer, sites: Sequence[ConvSite], gram: bool) -> Iterator[_Block]:
    """The blocks of a network whose normalisations all have batch statistics."""
    names = list(dict.fromkeys(_block_of(site) for site in sites))
    for name in names:
        own = [site for site in sites if _block_of(site) == name]
        units = [tracer.unit(site) for site in own if "downsample" not in site.name]
        project = next((tracer.unit(site) for site in own if "downsample" in site.name), None)
        form = Form(own_shortcut=True, mask_input=name != names[0], masked_grad=name != names[-1])
        form = replace(form, gram=gram and block.may_be_gram(units, project, form))
        yield _Block(f"{tracer.network} {name}", units, project, form)


def _block_of(site: ConvSite) -> str:
    return ".".join(site.name.split(".")[:2])


def _blocks(tracer: _Tracer, sites: Sequence[ConvSite], gram: bool) -> None:
    described = list(_described(tracer, sites, gram))
    s = sites[0].shape
    x = torch.empty(s.n, s.c, s.h, s.w, dtype=tracer.dtype, device="meta", memory_format=torch.channels_last)
    ahead, ran = None, []
    for (place, units, project, form), after in zip(described, [*described[1:], None], strict=True):
        tracer.place = place
        following = after.units[0] if after is not None and form.gram and after.units[0].pointwise else None
        form = replace(form, following=following is not None)
        saved, then = tracer.trace(partial(block.forward, x, None, units, project, form, ahead, following))
        ran.append((place, x, units, project, saved, form))
        x, ahead = saved.y, then
    for place, x, units, project, saved, form in reversed(ran):
        tracer.place = place
        needs = Needs(True, True, ((True, True, True),) * (len(units) + (project is not None)))
        grad = torch.empty_like(saved.y)
        tracer.trace(partial(block.backward, grad, x, None, units, project, saved, form, needs))

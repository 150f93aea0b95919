"""The steps of a training step one by one: our kernel beside what PyTorch would run instead.

Steps are what the plan of training is asked about while ``explain`` follows a network, so they are those that run.
:class:`resnet_triton.training.measure.TrainProblem` has the operands and the clock: replays of CUDA graphs, a cold L2
cache, both sides in turns.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_triton
from resnet_triton import backend
from resnet_triton.compare import PREDICT_FOR
from resnet_triton.devices import Target, known_devices
from resnet_triton.errors import PEER_LIMIT
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.measure import Errors, errors, exact_fp32
from resnet_triton.plan import Choice
from resnet_triton.results import FAILED, NO_CUDA, OK, WRONG, Row
from resnet_triton.training import plan, reference
from resnet_triton.training.measure import TrainProblem
from resnet_triton.training.plan import Work
from resnet_triton.training.reference import Lazy

from . import cudnn_graphs
from .cudnn_graphs import NotSupported, Peer
from .training import plain_model

SUITE = "training layers"
TINY = 1e-12  # an epsilon that changes nothing
OURS, LIBRARY, ALONE = "ours", "PyTorch", "its convolution alone"


@functools.cache
def works(model: str, batch: int, memory: str = "auto", dtype: str = "bfloat16", size: int = 224) -> tuple[Work, ...]:
    """The distinct steps with products about which the plan of a network's training step is asked, in order."""
    found: dict[Work, None] = {}
    choose = plan.choose

    def noting(work: Work, *rest: Any) -> Choice:
        if work.shape is not None:
            found.setdefault(work)
        return choose(work, *rest)

    converted = resnet_triton.convert(plain_model(model)).train()
    with backend.use_backend("auto", memory=memory), patch.object(plan, "choose", noting):
        kind = getattr(torch, dtype)
        resnet_triton.explain(converted, (batch, 3, size, size), dtype=kind, device=PREDICT_FOR)
    return tuple(found)


def title(work: Work) -> str:
    """A step in words."""
    notes = {
        "h on load": work.prologue,
        "dc on load": work.backward,
        "sums": work.moments,
        f"projection {work.project}": work.project is not None,
        f"and the next 1x1 to {work.following}": work.following > 0,
        f"+ residual/{work.residual_stride}": work.residual_stride > 0,
    }
    return " ".join([work.step, str(work.shape), *(f"[{text}]" for text, on in notes.items() if on)])


def runs(work: Work, target: Target, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether one of our kernels can compute a step there."""
    return plan.refusal_of_products(work, dtype, "tf32", target) is None


def own_config(work: Work, target: Target, dtype: torch.dtype = torch.bfloat16, precision: str = "tf32") -> ConvConfig:
    """How our kernel would run a step: as the plan has it without a library to compare with."""
    return plan.choose(work, dtype, precision, target, "triton").tiling


def configs_by_kernel(
    work: Work, target: Target, dtype: torch.dtype = torch.bfloat16, precision: str = "tf32"
) -> dict[str, ConvConfig]:
    """The configuration of each of our kernels that can compute a step, with the shortest predicted time."""
    found: dict[str, ConvConfig] = {}
    configs = list(plan.configs_of(work, dtype, precision, target.multiprocessors)) if runs(work, target, dtype) else []
    if target.is_cuda:
        configs.sort(key=lambda config: plan.predict(work, config, dtype, precision, target).us)
    for config in configs:
        found.setdefault(config.kernel, config)
    return found


class Beside(TrainProblem):
    """A step, checked against float64, beside what eager runs; arguments as for :class:`TrainProblem`.

    Attributes:
        fused: the step as a graph of cuDNN's on a set of operands, once :func:`fused_peer` found it right.
    """

    fused: Callable[[int], tuple[Tensor, ...]] | None = None

    def _prepare_reference(self) -> None:
        super()._prepare_reference()
        with exact_fp32():
            self._wanted = tuple(wanted.contiguous() for wanted in self.compared(self.unfused(0, torch.float64)))

    def release(self) -> None:
        """Frees what :meth:`validate` compares with."""
        self._wanted, self._kept = (), {}

    def errors_of(self, config: ConvConfig) -> tuple[str | None, Errors, Errors]:
        """What is wrong, or None; errors of our first result and of the library's."""
        wrong = self.validate(config)
        ours = self.compared(self.run_ours(config))[0]
        return wrong, errors(ours, self._wanted[0]), self._library_errors[0]

    def _operands(self) -> dict[str, Tensor]:
        made, k = super()._operands(), self.shape.k
        if self.work.step == "gram_dgrad":
            made["g"] = torch.ones(3, k, device=self.device)
        return {**made, "zeros": torch.zeros(k, device=self.device), "ones": torch.ones(k, device=self.device)}

    def baselines(self) -> dict[str, Callable[[int], object]]:
        found = super().baselines() or {"library": self._stored_form}
        return {**found, "conv": self._alone, **({"fused": self.fused} if self.fused else {})}

    def _value(self, i: int) -> Tensor:
        o = self.operands[i]
        return reference.value(Lazy(o["x"], o.get("stats")))

    def _stored_form(self, i: int) -> object:
        """What eager runs in place of a step of the Gram form, which no library has."""
        o, work = self.operands[i], self.work
        if work.step == "gram":
            return self._alone(i)
        if work.step == "gram_dgrad":  # BN's backward from a stored output, the convolution's dgrad, the ReLU's mask
            d = self._dgrad(i, reference.bn_backward(o["dz"], o["dz"], o["g"]))
            return reference.masked(d, o["x"]) if work.prologue else d
        y = self._bn(i, F.conv2d(self._value(i), o["w"]), "out_stats")
        shortcut = o["shortcut"]
        if work.project is not None:
            shortcut = self._bn(i, F.conv2d(shortcut, o["wd"], None, work.project.stride), "project_stats")
        y = (y + shortcut).relu_()
        return F.conv2d(y, o["w_next"]) if work.following else y

    def _bn(self, i: int, c: Tensor, stats: str) -> Tensor:
        """BN with known statistics in one pass of PyTorch's."""
        o = self.operands[i]
        scale, shift = o[stats][reference.SCALE], o[stats][reference.SHIFT]
        return F.batch_norm(c, o["zeros"], o["ones"], scale, shift, False, 0.0, TINY)

    def _dgrad(self, i: int, dc: Tensor) -> Tensor:
        s, o = self.shape, self.operands[i]
        weight = o["wp"][:, :, None, None] if "wp" in o else o["w"]
        x = o["x"][:, :, :: s.stride, :: s.stride] if self.work.step == "gram_dgrad" else o["x"]
        geometry = (1, 0, 1) if self.work.step == "gram_dgrad" else (s.stride, s.padding, s.dilation)
        return reference._conv_backward(dc, x, weight, geometry, [True, False])[0]

    def _alone(self, i: int) -> object:
        """The library's convolution in the same direction, without anything around it."""
        o, s, step = self.operands[i], self.shape, self.work.step
        geometry = (s.stride, s.padding, s.dilation)
        if step == "gram":
            rows = o["x"][:, :, :: s.stride, :: s.stride].permute(0, 2, 3, 1).reshape(-1, s.c)
            return rows.t() @ rows
        if step in ("conv_stats", "stem_conv_stats", "expand"):
            return F.conv2d(o["x"], o["w"], None, *geometry)
        if step in ("wgrad", "stem_wgrad"):
            return reference._conv_backward(o["dz"], o["x"], o["w"], geometry, [False, True])[1]
        return self._dgrad(i, o["dz"])


@dataclass(frozen=True)
class Timed:
    """One step measured; microseconds.

    Args:
        us: time of our kernel; library_us: what PyTorch runs instead; conv_us: its convolution alone.
        error, library_error: against float64.
        wrong: what is wrong, or None; then there are no times.
        fused: the step as a graph of cuDNN's.
    """

    us: float
    library_us: float
    conv_us: float | None
    error: float
    library_error: float
    wrong: str | None = None
    fused: Peer | None = None


def fused_peer(problem: Beside) -> Peer:
    """A step as a graph of cuDNN's, checked as the library is; if it is right, it is timed from then on."""
    if not cudnn_graphs.installed():
        return Peer(cudnn_graphs.ABSENT)
    try:
        step = cudnn_graphs.TrainingStep(problem.work, problem.dtype, cudnn_graphs.this_gpu())
        runs = [step.bind(operands) for operands in problem.operands]
        outs = problem.compared(step.results(runs[0]()))
    except NotSupported as reason:
        return Peer(str(reason))
    except Exception as error:
        return Peer(f"{FAILED}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200])
    found = [errors(out, wanted) for out, wanted in zip(outs, problem._wanted, strict=True)]
    reasons = (e.exceeds(theirs, PEER_LIMIT) for e, theirs in zip(found, problem._library_errors, strict=True))
    if wrong := next(filter(None, reasons), None):
        return Peer(f"{WRONG}: {wrong}", step.note, error=found[0].l2)
    problem.fused = lambda i: runs[i]()
    return Peer(OK, step.note, error=found[0].l2)


def measure(work: Work, config: ConvConfig, dtype: torch.dtype = torch.bfloat16) -> Timed:
    """Checks a step on the GPU that is there, then times it; a wrong one is not timed."""
    problem = Beside(work, dtype)
    wrong, mine, library = problem.errors_of(config)
    peer = None if wrong else fused_peer(problem)
    problem.release()
    torch.cuda.empty_cache()
    if wrong:
        return Timed(0.0, 0.0, None, mine.l2, library.l2, wrong)
    us = {name: statistics.median(values) for name, values in problem.times(config).items()}
    peer = peer and replace(peer, us=us.get("fused"))
    return Timed(us["ours"], us["library"], us.get("conv"), mine.l2, library.l2, fused=peer)


def measured_rows(work: Work, config: ConvConfig, device: str, target: Target) -> list[Row]:
    """Checked and timed rows of one step, ours first; in float16 too where that is what cuDNN has a graph for."""
    timed = measure(work, config)
    rows = rows_of(work, config, device, target, timed)
    refused = timed.fused is not None and timed.fused.status.startswith(cudnn_graphs.REFUSED)
    if refused and work.step in cudnn_graphs.NARROW:
        with contextlib.suppress(NotSupported):
            cudnn_graphs.TrainingStep(work, torch.float16, cudnn_graphs.this_gpu())
            rows += rows_of(work, config, device, target, measure(work, config, torch.float16), "float16")
    return rows


def rows_of(
    work: Work, config: ConvConfig, device: str, target: Target, timed: Timed | None, dtype: str = "bfloat16"
) -> list[Row]:
    """Rows of one step with our configuration and the plan's choice, ours first; ``timed`` None: not measured."""
    assert work.shape is not None
    batch, kind = work.shape.n, getattr(torch, dtype)
    choice = plan.choose(work, kind, "tf32", target, "auto")
    chosen = f"plan: {choice.realisation}" + (f" {choice.config}" if choice.config else "")

    def row(provider: str, us: float | None) -> Row:
        made = Row(SUITE, device, provider, title(work), dtype, OK if us else NO_CUDA, train_batch_size=batch)
        if us:
            made.train_step_time, made.samples, made.rounds = us / 1e3, [us / 1e6], 1
        return made

    ours = row(OURS, timed.us if timed else None)
    ours.note = f"{config.kernel} {config}; {chosen}"
    if timed is None:
        ours.predicted_step_time = plan.predict(work, config, kind, "tf32", target).us / 1e3
        ours.predicted_for = target.name
        return [ours]
    ours.error, ours.eager_error = timed.error, timed.library_error
    if timed.wrong:
        ours.status = f"{WRONG}: {timed.wrong}"
        return [ours]
    ours.speedup = timed.library_us / timed.us
    rows = [ours, row(LIBRARY, timed.library_us), *([row(ALONE, timed.conv_us)] if timed.conv_us else [])]
    return rows if timed.fused is None else [*rows, _fused_row(row, timed, timed.fused)]


def _fused_row(row: Callable[[str, float | None], Row], timed: Timed, peer: Peer) -> Row:
    made = row(cudnn_graphs.PROVIDER, peer.us)
    if peer.status == cudnn_graphs.ABSENT:  # one line for all
        made.model, made.train_batch_size = cudnn_graphs.EVERY_STEP, None
    made.status, made.note, made.error, made.eager_error = peer.status, peer.note, peer.error, timed.library_error
    made.speedup = timed.library_us / peer.us if peer.us else None
    return made


def one_each(target: Target, batch: int = 256) -> list[tuple[Work, ConvConfig]]:
    """One step of ResNet-50 or -18 for each kind of step and kernel, with the kernel's configuration."""
    chosen: dict[tuple[str, str], tuple[Work, ConvConfig]] = {}
    for work in (*works("resnet50", batch), *works("resnet18", batch)):
        for kernel, config in configs_by_kernel(work, target).items():
            chosen.setdefault((work.step, kernel), (work, config))
    return list(chosen.values())


def all_steps(target: Target, batch: int = 256) -> list[tuple[Work, ConvConfig]]:
    """The distinct steps of ResNet-50 in both forms and of ResNet-18 that our kernels compute, as they would."""
    found = (*works("resnet50", batch), *works("resnet18", batch), *works("resnet50", batch, "stored"))
    return [(work, own_config(work, target)) for work in dict.fromkeys(found) if runs(work, target)]


def h200() -> Target:
    """What predictions are for."""
    return known_devices()[PREDICT_FOR]

"""One group of the bench: the providers of one model and batch, checked against float64, then timed interleaved.

Correctness gates the clock: a call whose logits are wrong is never timed.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_triton

from . import data
from .providers import DTYPES, Call, Provider, providers_on, weak_dtype
from .record import FAILED, NO_CUDA, OK, WRONG, Row, device_name
from .timing import Bystanders, Sample, clock_for, interleave, percentiles

OURS_LIMIT = 2.0  # our error in units of eager's
PEER_LIMIT = 10.0  # a peer beyond this was built wrongly by this bench
PREDICT_FOR = "NVIDIA H200"
MNIST_MODEL = "mnist5k_resnet20"
SEED = 0
LAST_GAMMA = 0.25


@dataclass(frozen=True)
class Group:
    """What is timed together.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        model: a name of ``torchvision.models``, or :data:`MNIST_MODEL`.
        batch, size: images and pixels of a side.
        dtypes: names of :data:`.providers.DTYPES`.
        budget_s: seconds to spend on timing.
        leave_out: names of providers that do not take part.
        suite: of its rows.
    """

    device: str
    model: str
    batch: int
    size: int
    dtypes: tuple[str, ...]
    budget_s: float
    leave_out: tuple[str, ...] = ()
    suite: str = "models"

    @property
    def name(self) -> str:
        """Short name, for test ids."""
        return f"{self.device}-{self.model}-b{self.batch}"

    def entries(self) -> Iterator[tuple[str, Provider]]:
        """``(dtype, provider)`` of each row, baseline first within a dtype."""
        for dtype in self.dtypes:
            for provider in providers_on(self.device):
                if provider.name not in self.leave_out:
                    yield dtype, provider

    def row(self, dtype: str, provider: Provider, status: str = OK) -> Row:
        """An empty row."""
        device = self.device if self.device == "cpu" or not torch.cuda.is_available() else device_name()
        return Row(
            self.suite, device, provider.name, self.model, dtype, status,
            infer_batch_size=self.batch, infer_img_size=self.size,
        )  # fmt: skip


@dataclass
class _Contestant:
    row: Row
    provider: Provider
    call: Call
    logits: Tensor


def images_of(model: str, batch: int, size: int) -> Tensor:
    """Float32 images for a model: real photographs, or test digits for :data:`MNIST_MODEL`."""
    if model == MNIST_MODEL:
        return data.mnist5k(train=False).images[:batch]
    return data.photo_batch(batch, size).contiguous()


@functools.cache
def build_model(name: str) -> nn.Module:
    """The float32 model on the CPU, unconverted, in eval mode. Shared: do not change it.

    :data:`MNIST_MODEL` has trained weights. Networks of torchvision have random ones, and BN statistics of the
    photographs, and a small last gamma in each block: with the initial ones, activations and rounding errors would grow
    from block to block as in no trained network, and hide a wrong result from the gate.
    """
    if name == MNIST_MODEL:
        return resnet_triton.unconvert(resnet_triton.models.mnist5k_resnet20())
    import torchvision

    torch.manual_seed(SEED)
    model = torchvision.models.get_model(name)
    for m in model.modules():
        if hasattr(m, "downsample"):
            nn.init.constant_(m.bn3.weight if hasattr(m, "bn3") else m.bn2.weight, LAST_GAMMA)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the running statistics become those of the one batch
    with torch.no_grad():
        model.train()(data.photo_batch(4, 128, seed=1))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def reference_logits(model: nn.Module, x: Tensor, chunk: int = 32) -> Tensor:
    """Float64 logits of the model in eval mode."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        return torch.cat([exact(part.double()) for part in x.split(chunk)])


def relative_error(out: Tensor, reference: Tensor) -> float:
    """Largest deviation over the largest reference value; infinite for NaN or a wrong shape."""
    if out.shape != reference.shape:
        return float("inf")
    error = ((out.double() - reference).abs().max() / reference.abs().max()).item()
    return float("inf") if math.isnan(error) else error


def gate(error: float, eager_error: float, dtype: str, is_ours: bool) -> str:
    """``"ok"``, or ``"WRONG: ..."`` for an error beyond the limit (the rounding of the result is always allowed)."""
    eps = 2.0**-11 if dtype == "tf32" else torch.finfo(DTYPES[dtype]).eps / 2
    if math.isinf(error):
        return f"{WRONG}: NaN, infinite, or of another shape"
    limit = max((OURS_LIMIT if is_ours else PEER_LIMIT) * eager_error, eps)
    return OK if error <= limit else f"{WRONG}: error {error:.1e}, eager {eager_error:.1e}, limit {limit:.1e}"


def unmeasured(group: Group) -> dict[tuple[str, str], Row]:
    """Rows of a group that cannot be measured for want of a GPU, ours with the cost model's prediction."""
    rows = {}
    for dtype, provider in group.entries():
        row = group.row(dtype, provider, NO_CUDA)
        if group.model != MNIST_MODEL:
            _count(row)
            row.predicted_step_time = predicted_ms(group.model, group.batch, group.size, dtype, provider.name)
            row.predicted_for = None if row.predicted_step_time is None else PREDICT_FOR
        rows[dtype, provider.name] = row
    return rows


def predicted_ms(model: str, batch: int, size: int, dtype: str, provider: str) -> float | None:
    """The cost model's milliseconds on :data:`PREDICT_FOR`, without host time; None for a provider it cannot price."""
    backend = {"eager channels_last": "cudnn", "ours": "auto"}.get(provider)
    if backend is None:
        return None
    converted = resnet_triton.convert(build_model(model))
    with resnet_triton.use_backend(backend):
        plan = resnet_triton.explain(converted, (batch, 3, size, size), dtype=DTYPES[dtype], device=PREDICT_FOR)
    return None if plan.predicted_us is None else plan.predicted_us / 1e3


@contextmanager
def _measuring() -> Iterator[None]:
    torch._dynamo.reset()
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    gc.collect()
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch._dynamo.reset()
        gc.collect()


def measure(group: Group, finish: Callable[[Row, Tensor], None] | None = None) -> dict[tuple[str, str], Row]:
    """Every row of a group by ``(dtype, provider)``: built, checked, timed.

    Args:
        group: what to measure; its device must be there.
        finish: called with each row and the provider's logits, to add what the group cannot know.
    """
    model = copy.deepcopy(build_model(group.model)).to(group.device)
    images = images_of(group.model, group.batch, group.size).to(group.device)
    reference = reference_logits(model, images)
    rows: dict[tuple[str, str], Row] = {}
    contestants: list[_Contestant] = []
    eager_errors: dict[str, float] = {}
    with _measuring():
        for dtype, provider in group.entries():
            row = rows[dtype, provider.name] = group.row(dtype, provider)
            _count(row)
            row.status = weak_dtype(group.device, dtype) or provider.needs(group.device) or OK
            if row.status == OK:
                found = _build(row, provider, model, images)
                if found is not None and _check(found, reference, eager_errors):
                    contestants.append(found)
        _time(group, contestants)
    for found in contestants:
        if finish is not None:
            finish(found.row, found.logits)
    return rows


def _build(row: Row, provider: Provider, model: nn.Module, images: Tensor) -> _Contestant | None:
    """Builds and calls a provider once; an exception becomes the row's status."""
    cuda = images.is_cuda
    before = torch.cuda.memory_allocated() if cuda else 0
    try:
        with torch.inference_mode(False), torch.no_grad():  # users build and load their models as usual
            call = provider.build(model, images, DTYPES[row.dtype])
        call()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        logits = call().clone()
    except Exception as error:
        row.status = f"{FAILED}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        return None
    if cuda:
        row.peak_memory_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
    return _Contestant(row, provider, call, logits)


def _check(found: _Contestant, reference: Tensor, eager_errors: dict[str, float]) -> bool:
    """Fills in the errors; whether the row may be timed. The first provider of a dtype is eager."""
    row = found.row
    row.error = relative_error(found.logits, reference)
    row.eager_error = eager_errors.setdefault(row.dtype, row.error)
    row.status = gate(row.error, row.eager_error, row.dtype, found.provider.ours)
    return row.status == OK


def _time(group: Group, contestants: list[_Contestant]) -> None:
    calls = {f"{c.row.dtype} {c.row.provider}": c.call for c in contestants}
    with Bystanders() as bystanders:
        timed = interleave(calls, clock_for(group.device), group.budget_s)
    medians: dict[tuple[str, str], float] = {}
    baseline = providers_on(group.device)[0].name
    for c, samples in zip(contestants, timed.values(), strict=True):
        c.row.others_cpu = bystanders.share
        fill_times(c.row, samples)
        medians[c.row.dtype, c.row.provider] = c.row.infer_step_time or float("nan")
    for c in contestants:
        own = medians[c.row.dtype, c.row.provider]
        for column, dtype in (("speedup", c.row.dtype), ("speedup_fp32", "float32")):
            theirs = medians.get((dtype, baseline))
            setattr(c.row, column, None if theirs is None else theirs / own)


def fill_times(row: Row, samples: list[Sample]) -> None:
    """Fills in times, throughput and TFLOP/s."""
    seconds = [sample.seconds for sample in samples]
    p20, p50, p80 = percentiles(seconds)
    row.samples, row.rounds = seconds, len(seconds)
    row.infer_step_time, row.step_time_p20, row.step_time_p80 = p50 * 1e3, p20 * 1e3, p80 * 1e3
    if row.infer_batch_size:
        row.infer_samples_per_sec = row.infer_batch_size / p50
        if row.infer_gmacs:
            row.tflops = 2 * row.infer_gmacs * row.infer_samples_per_sec / 1e3
    host = [sample.host for sample in samples if sample.host is not None]
    row.host_time = percentiles(host).p50 * 1e3 if host else None


def _count(row: Row) -> None:
    row.param_count, row.infer_gmacs = size_of(row.model, row.infer_img_size or 0)


@functools.cache
def size_of(model: str, size: int) -> tuple[float, float]:
    """Parameters in millions, and 10^9 multiply-adds of one image."""
    network = build_model(model)
    shape = (1, 1 if model == MNIST_MODEL else 3, size, size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).to("meta")(torch.empty(shape, device="meta"))
    parameters = sum(p.numel() for p in network.parameters())
    return parameters / 1e6, counter.get_total_flops() / 2e9

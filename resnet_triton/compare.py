"""Is it faster? The providers of one model and batch, checked against float64, then timed interleaved.

Correctness gates the clock: a call whose result is wrong is never timed. A batch that does not fit into memory is
halved for all providers of the group, which is said.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .backend import use_backend
from .convert import convert
from .errors import EXACT, UNUSABLE, Error, gate, largest_of, reference_outputs, relative_error, tensors_of
from .explain import explain
from .providers import CHANNELS_LAST, DTYPES, OURS, OURS_APART, Call, Provider, Unavailable, providers_on, weak_dtype
from .results import FAILED, OK, Row, device_name
from .timing import Bystanders, Sample, clock_for, interleave, percentiles

T = TypeVar("T")

PREDICT_FOR = "NVIDIA H200"
LAST_GAMMA = 0.25

# The largest of a few errors is a matter of luck, and the errors of one image go together: eager's is taken over at
# least four images, or eight where the batch has few values.
FEWEST_IMAGES, EXTRA_IMAGES = 4, 8
ENOUGH_VALUES = 128


@dataclass(frozen=True)
class Group:
    """What is timed together.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        model: its name in the rows.
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


class Watch:
    """What a comparison tells while it runs. This one is silent; override what you want to hear."""

    def stage(self, what: str, share: float) -> None:
        """``what`` is done next; ``share`` of ``"building"`` or ``"timing"`` is done, 0 to 1."""

    def say(self, text: str) -> None:
        """Something that the user must know."""


@dataclass
class _Contestant:
    row: Row
    provider: Provider
    call: Call
    outputs: list[Tensor]


class _TooLarge(Exception):
    """The batch does not fit; names who needed the memory."""


def untrained(model: nn.Module) -> bool:
    """Whether a model has BN, and all of it has the statistics of a new layer: mean 0, variance 1."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    statistics = [(m.running_mean, m.running_var) for m in norms if m.running_mean is not None]
    return bool(statistics) and all(
        not mean.any() and var is not None and torch.equal(var, torch.ones_like(var)) for mean, var in statistics
    )


def calibrate(model: nn.Module, images: Tensor) -> nn.Module:
    """Gives a model with random weights the BN statistics of ``images`` and small last gammas; returns it in eval mode.

    With the initial ones, activations and rounding errors would grow from block to block as in no trained network (or,
    with a last gamma of 0, the blocks would compute nothing), and hide a wrong result from the gate.

    Raises:
        ValueError: the images have too few pixels for statistics.
    """
    for m in model.modules():
        if hasattr(m, "downsample"):
            last = getattr(m, "bn3", None) or getattr(m, "bn2", None)
            if isinstance(last, nn.BatchNorm2d) and last.affine:
                nn.init.constant_(last.weight, LAST_GAMMA)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the running statistics become those of the one batch
    try:
        with torch.no_grad():
            model.train()(images)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            f"images of shape {tuple(images.shape)} are too few pixels for the BN statistics of a model with random "
            "weights; take more or larger images, or load weights"
        ) from error
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()
    return model


def predicted_ms(model: nn.Module, shape: tuple[int, ...], dtype: str, provider: str) -> float | None:
    """The cost model's milliseconds on :data:`PREDICT_FOR`, without host time; None for a provider it cannot price."""
    backend = {CHANNELS_LAST.name: "cudnn", OURS.name: "auto", OURS_APART.name: "auto"}.get(provider)
    if backend is None:
        return None
    with use_backend(backend, chains=provider != OURS_APART.name):
        plan = explain(convert(model), shape, dtype=DTYPES[dtype], device=PREDICT_FOR)
    return None if plan.predicted_us is None else plan.predicted_us / 1e3


def size_of(model: nn.Module, image: Sequence[int]) -> tuple[float, float | None]:
    """Parameters in millions, and 10^9 multiply-adds of one ``(C, H, W)`` image (None where shapes do not tell)."""
    parameters = sum(p.numel() for p in model.parameters())
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(model).to("meta")(torch.empty(1, *image, device="meta"))
    except Exception:  # a foreign forward that needs values
        return parameters / 1e6, None
    return parameters / 1e6, counter.get_total_flops() / 2e9


def _forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch._dynamo.reset()


@contextmanager
def _measuring() -> Iterator[None]:
    _forget_compiled()
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    gc.collect()
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        _forget_compiled()
        gc.collect()


def measure(
    group: Group,
    model: nn.Module,
    images: Tensor,
    *,
    finish: Callable[[Row, Tensor], None] | None = None,
    watch: Watch | None = None,
) -> dict[tuple[str, str], Row]:
    """Every row of a group by ``(dtype, provider)``: built, checked, timed.

    Args:
        group: what to measure; its device must be there.
        model: unconverted, float32, on the CPU, in eval mode. It is not changed.
        images: float32 ``[at least group.batch, C, H, W]`` on the CPU. Those beyond the batch serve the check only.
        finish: called with each row and the provider's (first) output, to add what the group cannot know.
        watch: hears of progress, and of a batch that was halved.

    Raises:
        ValueError: the output of the model cannot be compared.
        torch.OutOfMemoryError: not even one image fits.
    """
    watch = watch or Watch()
    notes: list[str] = []

    def tell(text: str) -> None:
        notes.append(text)
        watch.say(f"{group.model}: {text}")

    rows = halving(group.batch, lambda batch: _measure(replace(group, batch=batch), model, images, finish, watch), tell)
    for row in rows.values():
        row.note = "; ".join([*notes, *filter(None, [row.note])])
    return rows


def halving(batch: int, run: Callable[[int], T], say: Callable[[str], None]) -> T:
    """``run(batch)``, and again with half the batch each time that it runs out of memory, which is said."""
    while True:
        try:
            return run(batch)
        except Exception as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
            who = f" ({error})" if isinstance(error, _TooLarge) else ""
        # outside of the handler, so that the tensors of its frames are gone
        _forget_compiled()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"batch {batch} ran out of memory{who}, all use batch {batch // 2}")
        batch //= 2


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory that ran out is behind an exception, of a GPU or of the CPU, raised directly or by a compiler."""
    while error is not None:
        text = str(error)
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _fits(group: Group, who: str) -> Iterator[None]:
    """Names who needed the memory, where it ran out and a smaller batch is left to try."""
    try:
        yield
    except Exception as error:
        if group.batch > 1 and is_out_of_memory(error):
            raise _TooLarge(who) from error
        raise


def _measure(
    group: Group, model: nn.Module, images: Tensor, finish: Callable[[Row, Tensor], None] | None, watch: Watch
) -> dict[tuple[str, str], Row]:
    entries = list(group.entries())
    counted = size_of(model, images.shape[1:])
    rows: dict[tuple[str, str], Row] = {}
    contestants: list[_Contestant] = []
    watch.stage("float64 reference", 0.0)
    with _fits(group, "float64 reference"):
        judge = _Judge(group, copy.deepcopy(model).to(group.device), images)
    x = images[: group.batch].to(group.device)
    with _measuring():
        for done, (dtype, provider) in enumerate(entries):
            watch.stage(f"building {provider.name}, {dtype}", done / len(entries))
            row = rows[dtype, provider.name] = group.row(dtype, provider)
            row.param_count, row.infer_gmacs = counted
            row.status = weak_dtype(group.device, dtype) or provider.needs(group.device) or OK
            if row.status == OK:
                with _fits(group, f"{provider.name}, {dtype}"):
                    found = _build(row, provider, judge.model, x)
                    if found is not None and judge.accepts(found):
                        contestants.append(found)
        with _fits(group, "timing"):
            _time(group, contestants, watch)
    for found in contestants:
        if finish is not None:
            finish(found.row, found.outputs[0])
    return rows


def _build(row: Row, provider: Provider, model: nn.Module, x: Tensor) -> _Contestant | None:
    """Builds and calls a provider once; an exception becomes the row's status, unless a smaller batch may help."""
    before = torch.cuda.memory_allocated() if x.is_cuda else 0
    try:
        with torch.inference_mode(False), torch.no_grad():  # users build and load their models as usual
            call = provider.build(model, x, DTYPES[row.dtype])
        call()
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        outputs = [out.clone() for out in tensors_of(call())]
    except Unavailable as reason:
        row.status = f"not available: {reason}"
        return None
    except Exception as error:
        if len(x) > 1 and is_out_of_memory(error):
            raise
        row.status = f"{FAILED}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
        return None
    if x.is_cuda and provider.package is None:
        row.peak_memory_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
    return _Contestant(row, provider, call, outputs)


class _Judge:
    """Knows the float64 outputs, and what eager errs in each dtype."""

    def __init__(self, group: Group, model: nn.Module, images: Tensor) -> None:
        self.model = model
        self.eager_errors: dict[str, Error] = {}
        with torch.no_grad():
            outputs = reference_outputs(model, images[: group.batch].to(group.device))
            values = sum(out.numel() for out in outputs)
            extra = images[group.batch : FEWEST_IMAGES if values >= ENOUGH_VALUES else EXTRA_IMAGES]
            self.extra = extra.to(group.device)
            more = reference_outputs(model, self.extra) if len(extra) else [out[:0] for out in outputs]
        self.outputs, self.more = outputs, more
        self.scales = [max(largest_of(out), largest_of(other)) for out, other in zip(outputs, more, strict=True)]

    def accepts(self, found: _Contestant) -> bool:
        """Fills in the errors; whether the row may be timed. The first provider of a dtype is eager."""
        row = found.row
        error = self._error(found.outputs, self.outputs)
        if row.dtype not in self.eager_errors:
            self.eager_errors[row.dtype] = error.or_worse(self._extra_error(DTYPES[row.dtype]))
        elif found.provider is CHANNELS_LAST:  # PyTorch sums in another order there, as it does for ours on the CPU
            self.eager_errors[row.dtype] = error.or_worse(self.eager_errors[row.dtype])
        eager = self.eager_errors[row.dtype]
        row.error, row.eager_error = error.rms, eager.rms
        row.status = gate(error, eager, row.dtype, found.provider.ours)
        return row.status == OK

    def _error(self, outputs: list[Tensor], exact: list[Tensor]) -> Error:
        if len(outputs) != len(exact):
            return UNUSABLE
        found = (relative_error(*each) for each in zip(outputs, exact, self.scales, strict=True))
        return functools.reduce(Error.or_worse, found, EXACT)

    def _extra_error(self, dtype: torch.dtype) -> Error:
        """Eager's error on the images beyond the batch."""
        if not len(self.extra):
            return EXACT
        outputs = tensors_of(copy.deepcopy(self.model).to(dtype)(self.extra.to(dtype)))
        return self._error(outputs, self.more)


def _time(group: Group, contestants: list[_Contestant], watch: Watch) -> None:
    calls = {f"{c.row.dtype} {c.row.provider}": c.call for c in contestants}
    watch.stage("timing", 0.0)
    with Bystanders() as bystanders:
        timed = interleave(
            calls, clock_for(group.device), group.budget_s, progress=lambda share: watch.stage("timing", share)
        )
    medians: dict[tuple[str, str], float] = {}
    baseline = providers_on(group.device)[0].name
    for c, samples in zip(contestants, timed.values(), strict=True):
        c.row.others_cpu = bystanders.share
        fill_times(c.row, samples)
        if c.provider.package is not None:
            c.row.host_time = None
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

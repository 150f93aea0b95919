"""Is it faster? The providers of one model and batch, checked against float64, then timed interleaved.

Correctness gates the clock: a call whose result is wrong is never timed. A batch that does not fit into memory is
halved for all providers of the group, which is said.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .backend import use_backend
from .convert import convert
from .explain import explain
from .providers import CHANNELS_LAST, DTYPES, Call, Provider, Unavailable, providers_on, weak_dtype
from .results import FAILED, OK, WRONG, Row, device_name
from .timing import Bystanders, Sample, clock_for, interleave, percentiles

T = TypeVar("T")

OURS_LIMIT = 2.0  # our error in units of eager's
PEER_LIMIT = 10.0  # a peer beyond this was built wrongly by its provider
PREDICT_FOR = "NVIDIA H200"
LAST_GAMMA = 0.25
CHUNK = 32  # images of one float64 forward

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


def relative_error(out: Tensor, reference: Tensor, scale: float | None = None) -> float:
    """Root mean square deviation over the largest reference value (or ``scale``); infinite for NaN or a wrong shape.

    A single wrong value counts: it is larger than the rounding errors of all others together.
    """
    if out.shape != reference.shape:
        return float("inf")
    if scale is None:
        scale = _largest(reference)
    deviation = (out.double() - reference).square().mean().sqrt().item() if out.numel() else 0.0
    if deviation == 0:
        return 0.0
    error = deviation / scale if scale else float("inf")
    return float("inf") if math.isnan(error) else error


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def gate(error: float, eager_error: float, dtype: str, is_ours: bool) -> str:
    """``"ok"``, or ``"WRONG: ..."`` for an error beyond the limit (the rounding of the result is always allowed)."""
    eps = 2.0**-11 if dtype == "tf32" else torch.finfo(DTYPES[dtype]).eps / 2
    if math.isinf(error):
        return f"{WRONG}: NaN, infinite, or of another shape"
    limit = max((OURS_LIMIT if is_ours else PEER_LIMIT) * eager_error, eps)
    return OK if error <= limit else f"{WRONG}: error {error:.1e}, eager {eager_error:.1e}, limit {limit:.1e}"


def tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output: a tensor, or tuples, lists and mappings of them.

    Raises:
        ValueError: there is none.
    """
    found = list(_tensors(output))
    if not found:
        raise ValueError(f"the model must return floating-point tensors to compare, got {type(output).__name__}")
    return found


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):  # dicts, and the outputs of transformers
        for part in output.values():
            yield from _tensors(part)


def reference_outputs(model: nn.Module, x: Tensor, chunk: int = CHUNK) -> list[Tensor]:
    """Float64 outputs of the model in eval mode, a few images at a time.

    Raises:
        ValueError: an output whose first size is not that of the batch.
    """
    exact = copy.deepcopy(model).double()
    parts = []
    with torch.no_grad():
        for images in x.split(chunk):
            outputs = tensors_of(exact(images.double()))
            for out in outputs:
                if out.dim() == 0 or out.shape[0] != images.shape[0]:
                    raise ValueError(
                        f"an output of the model has shape {tuple(out.shape)} for {images.shape[0]} images; outputs "
                        "must have one entry an image in their first dimension"
                    )
            parts.append(outputs)
    return [torch.cat(same) for same in zip(*parts, strict=True)]


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
    backend = {"eager channels_last": "cudnn", "ours": "auto"}.get(provider)
    if backend is None:
        return None
    with use_backend(backend):
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
        self.eager_errors: dict[str, float] = {}
        with torch.no_grad():
            outputs = reference_outputs(model, images[: group.batch].to(group.device))
            values = sum(out.numel() for out in outputs)
            extra = images[group.batch : FEWEST_IMAGES if values >= ENOUGH_VALUES else EXTRA_IMAGES]
            self.extra = extra.to(group.device)
            more = reference_outputs(model, self.extra) if len(extra) else [out[:0] for out in outputs]
        self.outputs, self.more = outputs, more
        self.scales = [max(_largest(out), _largest(other)) for out, other in zip(outputs, more, strict=True)]

    def accepts(self, found: _Contestant) -> bool:
        """Fills in the errors; whether the row may be timed. The first provider of a dtype is eager."""
        row = found.row
        row.error = self._error(found.outputs, self.outputs)
        if row.dtype not in self.eager_errors:
            self.eager_errors[row.dtype] = max(row.error, self._extra_error(DTYPES[row.dtype]))
        elif found.provider is CHANNELS_LAST:  # PyTorch sums in another order there, as it does for ours on the CPU
            self.eager_errors[row.dtype] = max(self.eager_errors[row.dtype], row.error)
        row.eager_error = self.eager_errors[row.dtype]
        row.status = gate(row.error, row.eager_error, row.dtype, found.provider.ours)
        return row.status == OK

    def _error(self, outputs: list[Tensor], exact: list[Tensor]) -> float:
        if len(outputs) != len(exact):
            return float("inf")
        return max(relative_error(*each) for each in zip(outputs, exact, self.scales, strict=True))

    def _extra_error(self, dtype: torch.dtype) -> float:
        """Eager's error on the images beyond the batch."""
        if not len(self.extra):
            return 0.0
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


FASTER, EQUAL, SLOWER, NOT_MEASURED = "faster", "equal", "slower", "not measured"


@dataclass(frozen=True)
class Verdict:
    """The answer of one batch and dtype.

    Args:
        outcome: :data:`FASTER` than every peer, :data:`EQUAL` to the best (the spreads from p20 to p80 overlap),
            :data:`SLOWER` than one, :data:`.results.WRONG`, or :data:`NOT_MEASURED`.
        text: the same in words.
    """

    batch: int | None
    dtype: str
    outcome: str
    text: str


def verdict(rows: Sequence[Row]) -> Verdict:
    """Compares the fastest of our rows with every peer. All rows have one model, batch and dtype."""
    names = {p.name for device in ("cpu", "cuda") for p in providers_on(device) if p.ours}
    mine, peers = ([row for row in rows if (row.provider in names) == own] for own in (True, False))
    batch, dtype = rows[0].infer_batch_size, rows[0].dtype
    wrong = [row for row in mine if row.status.startswith(WRONG)]
    if wrong:
        return Verdict(batch, dtype, WRONG, "; ".join(f"{r.provider}{r.status.removeprefix(WRONG)}" for r in wrong))
    timed = [row for row in mine if row.infer_step_time is not None]
    rivals = [row for row in peers if row.infer_step_time is not None]
    if not timed or not rivals:
        reasons = dict.fromkeys(row.status for row in (peers if timed else mine) if row.status != OK)
        return Verdict(batch, dtype, NOT_MEASURED, "; ".join(reasons) or "no provider to compare with")
    best = min(timed, key=lambda row: row.infer_step_time or 0.0)
    answers = [_against(best, peer) for peer in rivals]
    outcomes = [outcome for outcome, _ in answers]
    outcome = SLOWER if SLOWER in outcomes else EQUAL if EQUAL in outcomes else FASTER
    return Verdict(batch, dtype, outcome, f"{best.provider}: {', '.join(text for _, text in answers)}")


def _against(ours: Row, peer: Row) -> tuple[str, str]:
    assert ours.infer_step_time and peer.infer_step_time and ours.step_time_p20 and peer.step_time_p20
    assert ours.step_time_p80 and peer.step_time_p80
    ratio = peer.infer_step_time / ours.infer_step_time
    if ours.step_time_p80 < peer.step_time_p20:
        return FASTER, f"{ratio:.2f}x faster than {peer.provider}"
    if ours.step_time_p20 > peer.step_time_p80:
        return SLOWER, f"slower than {peer.provider} ({ratio:.2f}x its speed)"
    return EQUAL, f"equal to {peer.provider} ({ratio:.2f}x, p20-p80 overlap)"

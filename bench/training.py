"""Training steps of whole networks: the providers of one network and batch, gradients checked, then timed in turns.

Correctness gates the clock: a provider with a gradient that is further from float64 than its limit is never timed. A
batch that does not fit into memory is halved for all providers of the group, which is said.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import compare
from resnet_triton.compare import PREDICT_FOR, Group, Watch, halving
from resnet_triton.errors import PEER_LIMIT
from resnet_triton.measure import cudnn_benchmark, exact_fp32
from resnet_triton.providers import DTYPES, Provider, weak_dtype
from resnet_triton.results import FAILED, NO_CUDA, OK, WRONG, Row
from resnet_triton.timing import Bystanders, Sample, clock_for, interleave, percentiles

from . import data
from .training_providers import EAGER, OURS, REPLAYED, STORED, Phases, Step, providers_on

SUITE = "training"
EXACT = 1e-8  # the error of a gradient that was computed in float64
OURS_LIMIT = 3.0  # the error of each of our gradients in units of eager's
#: Images and pixels of a side of the check on the CPU, where float64 is slow; a GPU is checked on what is timed.
CPU_CHECK = (4, 64)
Gradients = dict[str, Tensor]
AllErrors = tuple[float, dict[str, float]]  # of all gradients together, and of each


@dataclass(frozen=True)
class TrainGroup(Group):
    """What is timed together; arguments as :class:`resnet_triton.compare.Group`."""

    suite: str = SUITE

    @property
    def name(self) -> str:
        return f"{self.device}-{self.model}-b{self.batch}-{self.size}px"

    def entries(self) -> Iterator[tuple[str, Provider]]:
        for dtype in self.dtypes:
            for provider in providers_on(self.device):
                basic = provider is STORED and self.model in ("resnet18", "resnet34")  # no Gram form to compare with
                if provider.name not in self.leave_out and not basic:
                    yield dtype, provider

    def row(self, dtype: str, provider: Provider, status: str = OK) -> Row:
        row = super().row(dtype, provider, status)
        row.train_batch_size, row.train_img_size = row.infer_batch_size, row.infer_img_size
        row.infer_batch_size = row.infer_img_size = None
        row.param_count = sum(p.numel() for p in plain_model(self.model).parameters()) / 1e6
        return row


@functools.cache
def plain_model(name: str) -> nn.Module:
    """The unconverted network on the meta device."""
    with torch.device("meta"):
        return _zoo(name)


@functools.cache
def build_model(name: str) -> nn.Module:
    """A network with random weights on the CPU, small last gammas as a trained one has. Shared: do not change it."""
    torch.manual_seed(0)
    model = _zoo(name)
    for block in model.modules():
        if hasattr(block, "downsample"):
            last: Any = getattr(block, "bn3", None) or getattr(block, "bn2", None)
            nn.init.constant_(last.weight, compare.LAST_GAMMA)
    return model


def _zoo(name: str) -> nn.Module:
    try:
        import torchvision
    except (ImportError, RuntimeError):  # a GPU machine may lack it; ours are the same networks
        return resnet_triton.unconvert(getattr(resnet_triton, name)())
    return torchvision.models.get_model(name)


@functools.lru_cache(maxsize=2)
def images_of(batch: int, size: int) -> Tensor:
    """Float32 photographs, or random images where scikit-learn is missing. Shared: do not write into them."""
    try:
        return data.photo_batch(batch, size)
    except ImportError:
        return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def predicted_ms(model: str, batch: int, size: int, dtype: str, memory: str = "auto") -> float | None:
    """The cost model's milliseconds of our forward and backward on :data:`PREDICT_FOR`, without host and optimizer."""
    converted = resnet_triton.convert(copy.deepcopy(plain_model(model))).train()
    with resnet_triton.use_backend("auto", memory=memory):
        plan = resnet_triton.explain(converted, (batch, 3, size, size), dtype=DTYPES[dtype], device=PREDICT_FOR)
    return None if plan.predicted_us is None else plan.predicted_us / 1e3


def unmeasured(group: TrainGroup) -> dict[tuple[str, str], Row]:
    """Rows of a group that cannot be measured for want of a GPU, ours with the cost model's prediction."""
    memories = {OURS.name: "auto", STORED.name: "stored"}
    rows = {}
    for dtype, provider in group.entries():
        row = rows[dtype, provider.name] = group.row(dtype, provider, NO_CUDA)
        if provider.name in memories:
            row.predicted_step_time = predicted_ms(group.model, group.batch, group.size, dtype, memories[provider.name])
            row.predicted_for = PREDICT_FOR
    return rows


# Errors of gradients


def distance(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Squared norms of the difference and of the exact gradient."""
    if found.shape != exact.shape:
        return math.inf, 1.0
    return (found.double() - exact).square().sum().item(), exact.double().square().sum().item()


class Judge:
    """Knows the float64 gradients of a batch, and what eager's are off in each dtype.

    Attributes:
        how: the dtype of the reference: float32 without TF32 where float64 did not fit into the memory of a GPU.
    """

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self._eager: dict[str, AllErrors] = {}
        self.how = "float64"
        try:
            self.exact = reference_gradients(model, x, torch.float64)
            return
        except Exception as error:
            if not (x.is_cuda and compare.is_out_of_memory(error)):
                raise
        _forget()  # outside of the handler, so that the tensors of its frames are gone
        self.how = "float32"
        self.exact = reference_gradients(model, x, torch.float32)

    def errors(self, gradients: Gradients) -> AllErrors:
        """Relative L2 error of all gradients together, and of each; infinite for one that is missing or NaN."""
        squares, norms, each = 0.0, 0.0, {}
        for name, exact in self.exact.items():
            found = gradients.get(name)
            off, norm = (math.inf, 1.0) if found is None else distance(found, exact)
            off = math.inf if math.isnan(off) else off
            squares, norms = squares + off, norms + norm
            each[name] = math.sqrt(off / norm) if norm else math.sqrt(off)
        return math.sqrt(squares / norms), each

    def accepts(self, row: Row, provider: Provider, gradients: Gradients, wide: Gradients | None = None) -> bool:
        """Fills in the errors; whether the row may be timed. The first provider of a dtype is eager.

        Args:
            row, provider: whose gradients.
            gradients: in the row's dtype.
            wide: the same in float64, which decide where given: in float32, a few signs of values near zero make all
                the difference between two right results.
        """
        found = self.errors(gradients)
        eager = self._eager.setdefault(row.dtype, found)
        row.error, row.eager_error = found[0], eager[0]
        if wide is not None:
            _, each = self.errors(wide)
            name = max(each, key=each.__getitem__)
            if not each[name] <= EXACT:
                row.status = f"{WRONG}: gradient of {name}, error {each[name]:.1e} in float64, limit {EXACT:g}"
            return row.status == OK
        limit = OURS_LIMIT if provider.ours else PEER_LIMIT
        name, ratio = worst_of(found, eager, DTYPES[row.dtype])
        if provider is not EAGER:
            row.note = f"worst gradient {ratio:.2f}x eager's error"
        if not ratio <= limit:
            row.status = (
                f"{WRONG}: gradient of {name}, error {found[1][name]:.1e}, is {ratio:.2f}x eager's, limit {limit:g}x"
            )
        return row.status == OK


def worst_of(found: AllErrors, eager: AllErrors, dtype: torch.dtype) -> tuple[str, float]:
    """The gradient that is worst beside eager's, and its error in units of eager's.

    The unit is eager's error for this gradient, or for all together where that is larger: the errors of a short vector
    go together, so that its own is small by luck at times.
    """
    least = max(eager[0], torch.finfo(dtype).eps / 2)
    ratios = {name: error / max(eager[1][name], least) for name, error in found[1].items()}
    worst = max(ratios, key=ratios.__getitem__)
    return worst, ratios[worst]


def reference_gradients(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Gradients:
    """Gradients of the unconverted model in a wide dtype, without TF32."""
    step = Step(copy.deepcopy(model).to(dtype).train(), x.to(dtype), dtype)
    with exact_fp32():
        step()
    return step.gradients()


def saved_mb_per_image(provider: Provider, model: nn.Module, x: Tensor, dtype: torch.dtype) -> float | None:
    """10^6 bytes that autograd keeps for one more image, parameters and what does not grow with the batch left out."""
    if len(x) < 4:  # one image may be too few pixels for BN
        return None
    sizes = [_saved_bytes(provider.build(model, images, dtype)) for images in (x[: len(x) // 2], x)]  # type: ignore[arg-type]
    return (sizes[1] - sizes[0]) / (len(x) - len(x) // 2) / 1e6


def _saved_bytes(step: Step) -> int:
    owned = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (t, storage.nbytes())  # the tensor too: its address is not used again
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        resnet_triton.use_backend(step.backend, memory=step.memory),
        step.autocast(),
    ):
        step.model(step.x)
    return sum(nbytes for _, nbytes in kept.values())


# Measuring


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(group: TrainGroup, watch: Watch | None = None) -> dict[tuple[str, str], Row]:
    """Every row of a group by ``(dtype, provider)``: built, checked, timed. Its device must be there.

    Raises:
        torch.OutOfMemoryError: not even one image fits.
    """
    watch = watch or Watch()
    notes: list[str] = []

    def tell(text: str) -> None:
        notes.append(text)
        watch.say(f"training {group.model}: {text}")

    rows = halving(group.batch, lambda batch: _measure(replace(group, batch=batch), watch), tell)
    for row in rows.values():
        row.note = "; ".join([*notes, *filter(None, [row.note])])
    return rows


def _measure(group: TrainGroup, watch: Watch) -> dict[tuple[str, str], Row]:
    model = copy.deepcopy(build_model(group.model)).to(group.device)
    x = images_of(group.batch, group.size).to(group.device)
    on_gpu = group.device == "cuda"
    checked = x if on_gpu else images_of(*CPU_CHECK)
    rows: dict[tuple[str, str], Row] = {}
    steps: dict[tuple[str, str], Step] = {}
    compare._forget_compiled()
    with cudnn_benchmark():
        judge = Judge(model, checked)
        _forget()
        for dtype, provider in group.entries():
            row = rows[dtype, provider.name] = group.row(dtype, provider)
            row.status = weak_dtype(group.device, dtype) or provider.needs(group.device) or OK
            if row.status != OK:
                continue
            try:
                step = _build(row, provider, model, x, checked, judge)
            except Exception as error:
                if group.batch > 1 and compare.is_out_of_memory(error):
                    raise
                row.status = f"{FAILED}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]
                continue
            if step is not None:
                steps[dtype, provider.name] = step
        note = f"; checked against {judge.how}" if on_gpu else ""
        del judge
        _forget()
        _time(group, rows, steps)
    for row in rows.values():
        row.note += note if row.note else ""
    compare._forget_compiled()
    return rows


def _build(row: Row, provider: Provider, model: nn.Module, x: Tensor, checked: Tensor, judge: Judge) -> Step | None:
    """A provider's step, if its gradients are right; fills in errors and memory."""
    dtype = DTYPES[row.dtype]
    if not x.is_cuda:
        small: Any = provider.build(model, checked, dtype)
        small()
        wide: Any = None
        if dtype == torch.float32:
            step = provider.build(copy.deepcopy(model).double(), checked.double(), torch.float64)
            step()
            wide = step.gradients()  # type: ignore[attr-defined]
        if not judge.accepts(row, provider, small.gradients(), wide):
            return None
        row.saved_mb_per_image = saved_mb_per_image(provider, model, x[:4], dtype)
        return provider.build(model, x, dtype)  # type: ignore[return-value]
    _forget()
    before = torch.cuda.memory_allocated()
    whole: Any = provider.build(model, x, dtype)
    whole()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    whole()
    torch.cuda.synchronize()
    if provider not in REPLAYED:
        row.peak_memory_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
        row.saved_mb_per_image = saved_mb_per_image(provider, model, x[: min(len(x), 16)], dtype)
    return whole if judge.accepts(row, provider, whole.gradients()) else None


def _time(group: TrainGroup, rows: dict[tuple[str, str], Row], steps: dict[tuple[str, str], Step]) -> None:
    clock = clock_for(group.device)
    phases: dict[int, list[Phases | None]] = {id(step): [] for step in steps.values()}

    def timed(call: Callable[[], Any]) -> Sample:
        sample = clock(call)
        assert isinstance(call, Step)
        phases[id(call)].append(call.phases())
        return sample

    with Bystanders() as bystanders:
        found = interleave({" ".join(key): step for key, step in steps.items()}, timed, group.budget_s)
    for (key, step), samples in zip(steps.items(), found.values(), strict=True):
        rows[key].others_cpu = bystanders.share
        fill_times(rows[key], samples, phases[id(step)][-len(samples) :])
    for (dtype, _), row in rows.items():
        base = rows.get((dtype, EAGER.name))
        if base and base.train_step_time and row.train_step_time:
            row.speedup = base.train_step_time / row.train_step_time


def fill_times(row: Row, samples: list[Sample], phases: list[Phases | None]) -> None:
    """Fills in times and images per second."""
    seconds = [sample.seconds for sample in samples]
    p20, p50, p80 = percentiles(seconds)
    row.samples, row.rounds = seconds, len(seconds)
    row.train_step_time, row.step_time_p20, row.step_time_p80 = p50 * 1e3, p20 * 1e3, p80 * 1e3
    row.train_samples_per_sec = (row.train_batch_size or 0) / p50
    known = [part for part in phases if part is not None]
    if known:
        medians = [percentiles(list(part)).p50 * 1e3 for part in zip(*known, strict=True)]
        row.train_fwd_time, row.train_bwd_time, row.train_opt_time = medians
    host = [sample.host for sample in samples if sample.host is not None]
    row.host_time = percentiles(host).p50 * 1e3 if host else None

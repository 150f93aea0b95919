"""``explain``: what would run, layer by layer, on this or another device, and why. Nothing is computed.

The model's forward runs on shape-only tensors. Every op of this package then asks ``plan`` exactly as it does when it
really runs, and records the answer; every other PyTorch operator is one row with the bytes that it moves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import structure, units
from .backend import current_backend, planning_for_cuda
from .chains import Tail
from .convert import is_block, is_converted
from .cost import ideal_us, library_us
from .devices import Target, target_of
from .models.blocks import ZeroPad
from .ops import IMPLEMENTATIONS
from .plan import library_of
from .steps import Recorder, Step

if TYPE_CHECKING:
    from .training.plan import Work

# Short names of PyTorch's operators; the others go by their own.
_NAMES = {
    "convolution": "conv",
    "native_batch_norm": "batch_norm",
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_batch_norm_with_update": "batch_norm",
    "cudnn_batch_norm": "batch_norm",
    "threshold_backward": "relu",
    "max_pool2d_with_indices": "max_pool",
    "avg_pool2d": "avg_pool",
    "_adaptive_avg_pool2d": "mean",
    "addmm": "linear",
    "mm": "linear",
    "_to_copy": "cast",
    "clone": "copy",
    "constant_pad_nd": "pad",
    "copy_": "copy",
}
# Neither read nor write an activation.
_FREE = {"detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "alias", "set_"}


@dataclass(frozen=True)
class Row:
    """One step of a plan.

    Args:
        name: the module whose weight it uses; rows without a weight name the one before them, but for zero padding
            and a max-pool that the stem does not compute.
        op: what it computes.
        realisation: the kernel, or ``"cudnn"``, ``"onednn"``, ``"aten"``.
        config: the kernel's tiling, or ``""``.
        predicted_us, measured_us: microseconds, None where unknown; a prediction is not a measurement.
        bytes: through device memory.
        reason: why it runs so.
        limit: the resource that bounds it by the cost model, or ``""``.
        weight_bytes: the weights' share of ``bytes``.
        roofline: share of the time that the step needs at least, by its bytes at the device's full bandwidth or its
            products at the full matrix rate, in its measured or predicted time; None where neither is known.
    """

    name: str
    op: str
    realisation: str
    config: str
    predicted_us: float | None
    measured_us: float | None
    bytes: int
    reason: str
    limit: str = ""
    weight_bytes: int = 0
    roofline: float | None = None


@dataclass(frozen=True)
class Plan:
    """What :func:`explain` returns; ``str()`` is the table.

    Args:
        rows: steps in the order of execution; of a model with batch statistics, its backward's too.
        device: the device planned for.
        dtype: dtype of the activations.
        input_shape: of the images.
        backward: what computes the gradients of these steps.
    """

    rows: tuple[Row, ...]
    device: str
    dtype: str
    input_shape: tuple[int, ...]
    backward: str

    @property
    def bytes_per_image(self) -> float:
        """Bytes of activations through device memory of these steps, divided by the batch."""
        return sum(row.bytes - row.weight_bytes for row in self.rows) / max(1, self.input_shape[0])

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights through device memory of these steps."""
        return sum(row.weight_bytes for row in self.rows)

    @property
    def predicted_us(self) -> float | None:
        """Sum of predicted (or measured, where known) times in microseconds; None where no step has one."""
        known = [row.measured_us or row.predicted_us for row in self.rows]
        return sum(us for us in known if us) if any(known) else None

    def to_json(self) -> str:
        """The plan as JSON: device, dtype, input_shape, backward, rows."""
        return json.dumps(asdict(self), indent=1)

    def plot(self, path: str | Path) -> None:
        """Draws bytes and times of each step, coloured by who runs it; see :func:`resnet_triton.plot.plot_plan`."""
        from .plot import plot_plan

        plot_plan(self, path)

    def __str__(self) -> str:
        head = ("layer", "op", "runs as", "config", "MB", "predicted us", "measured us", "limit", "roof", "reason")
        lines: list[tuple[str, ...]] = [head]
        for row in self.rows:
            times = ("" if us is None else f"{us:.1f}" for us in (row.predicted_us, row.measured_us))
            roof = "" if row.roofline is None else f"{row.roofline:.0%}"
            what = (row.name, row.op, row.realisation, row.config, f"{row.bytes / 1e6:.2f}")
            lines.append((*what, *times, row.limit, roof, row.reason))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head) - 1)]
        table = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in lines]
        own = sum(row.realisation not in ("cudnn", "onednn", "aten") for row in self.rows)
        table.append(
            f"{len(self.rows)} steps, {own} on this package's kernels; "
            f"{self.bytes_per_image / 1e6:.1f} MB an image on {self.device}, {self.dtype}, "
            f"and {self.weight_bytes / 1e6:.1f} MB of weights"
        )
        table.append(f"backward: {self.backward}")
        return "\n".join(line.rstrip() for line in table)


class _Tracer(TorchDispatchMode):
    """Turns each operator of a shape-only forward into rows."""

    def __init__(self, target: Target, dtype: torch.dtype, names: dict[int, str], reasons: dict[str, str]) -> None:
        super().__init__()
        self.target, self.dtype, self.names, self.reasons = target, dtype, names, reasons
        self.rows: list[Row] = []
        self.steps: list[tuple[str, Step]] = []
        self.asked: list[Work] = []  # by steps of training
        self.tails: list[tuple[str, Tail]] = []
        self.trained: list[tuple[str, tuple, list[Tensor]]] = []  # operators of training, their arguments and results
        self.backward_rows = 0
        self.place = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "resnet_triton":
            out = self._run(func._opname, args, kwargs or {})
            if func._opname.startswith("train_"):
                self.trained.append((func._opname, args, out))
            return out
        out = func(*args, **(kwargs or {}))
        name = func._opname.rstrip("_") or func._opname
        # such as num_batches_tracked, or running statistics
        small = len(self.trained) > 0 and all(t.dim() < 2 for t in _tensors(out))
        counter = (isinstance(out, Tensor) and out.dim() == 0) or small
        if not (func.is_view or func._opname in _FREE or counter or not _tensors(out)):
            self.rows.append(self._eager(_NAMES.get(func._opname, name), args, out))
        return out

    def _run(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        with Recorder(self.target) as recorder:
            out = IMPLEMENTATIONS[name](*args, **kwargs)
        self.rows += [self._step(step) for step in recorder.steps]
        self.asked += recorder.asked
        self.tails += [(self._find([weight]) or self.place, tail) for weight, tail in recorder.tails]
        return out

    def go_back(self) -> None:
        """Adds the steps of the backwards of training's operators, the last operator's first."""
        forward_rows = len(self.rows)
        for i, (name, args, out) in reversed(list(enumerate(self.trained))):
            grad, first = torch.empty_like(out[0]), i == 0
            if name == "train_stem":
                *tensors, eps, group = args
                self._run("train_stem_backward", (grad, *tensors, out, eps, group, [False, True, True, True]), {})
                continue
            if name == "train_preact":
                from .training.preact import preact_backward_arguments

                self._run("train_preact_backward", preact_backward_arguments(grad, args, out), {})
                continue
            from .training.ops import backward_arguments

            self._run("train_block_backward", backward_arguments(grad, args, out, not first), {})
        self.backward_rows = len(self.rows) - forward_rows

    def _find(self, tensors: Sequence[object]) -> str | None:
        return next((self.names[id(t)] for t in tensors if id(t) in self.names), None)

    def _step(self, step: Step) -> Row:
        self.place = self._find([step.weight]) or self.place
        self.steps.append((self.place, step))
        choice, reason = step.choice, step.choice.reason
        w = step.weight
        if step.op == "conv" and w is not None and not w.is_contiguous(memory_format=torch.channels_last):
            reason += "; its K,C,R,S weight is repacked on each call: model.to(memory_format=torch.channels_last)"
        op = " ".join(str(part) for part in (step.op, step.shape, step.epilogue) if part is not None)
        config = str(choice.config) if choice.config else ""
        predicted, limit = choice.predicted_us, choice.limit
        if predicted is None and choice.measured_us is None:
            predicted, limit = library_us(step.bytes, 0, torch.float32, self.target)
        macs = step.shape.macs if step.shape else 0
        roofline = self._roofline(step.bytes, macs, self.dtype, choice.measured_us or predicted)
        return Row(
            self.place, op, choice.realisation, config, predicted, choice.measured_us, step.bytes, reason, limit,
            step.weight_bytes, roofline,
        )  # fmt: skip

    def _roofline(self, moved: int, macs: int, dtype: torch.dtype, us: float | None) -> float | None:
        if not us or not self.target.is_cuda:
            return None
        return min(1.0, ideal_us(moved, macs, dtype, self.target) / us)

    def _eager(self, op: str, args: Sequence[object], out: object) -> Row:
        self.place = self._find(args) or self.place
        owner = max((p for p in self.reasons if f"{self.place}.".startswith(f"{p}.")), key=len, default=None)
        reason = "not part of a fused block" if owner is None else self.reasons[owner]
        moved = sum(t.numel() * t.element_size() for t in (*_tensors(args), *_tensors(out)))
        library = library_of(self.target) if op in ("conv", "batch_norm") else "aten"
        tensors = _tensors(out)
        macs, dtype = _multiply_adds(op, args, tensors[0]), tensors[0].dtype
        us, limit = library_us(moved, macs, dtype, self.target)
        weights = [t for t in args if isinstance(t, Tensor) and id(t) in self.names]
        read = sum(t.numel() * t.element_size() for t in weights)
        return Row(
            self.place, op, library, "", us, None, moved, reason, limit, read, self._roofline(moved, macs, dtype, us)
        )


def _multiply_adds(op: str, args: Sequence[Any], out: Tensor) -> int:
    """Of an operator of PyTorch that is a matrix product, else 0."""
    if op == "conv" and not args[6]:  # transposed
        return out.numel() * prod(args[1].shape[1:])
    return out.numel() * args[-1].shape[0] if op == "linear" else 0


def _tensors(values: object) -> list[Tensor]:
    """The tensors among an operator's arguments or results."""
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _needs_values() -> tuple[type[Exception], ...]:
    """What is raised where shapes depend on values; asked for late, because symbolic shapes take a second to import."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


def reasons_not_fused(model: nn.Module) -> dict[str, str]:
    """Why what is known but does not run fused does not, by module name."""
    reasons: dict[str, str | None] = {}
    m: structure.Converted
    for name, m in model.named_modules():
        path = f"{name}." if name else ""
        marker = m._resnet_triton if is_converted(m) else None
        if marker is None:
            if is_block(m):
                reasons[name] = "not converted: resnet_triton.convert(model)"
        elif units.is_known(m, marker):
            reasons |= {(path + part).removesuffix("."): reason for part, reason in units.reasons(m, marker).items()}
        elif marker.kind == "block":
            reasons[name] = structure.why_not_block(m)
            if structure.transient_reason(m, marker.spec) is None:
                reasons |= {path + child: reason for child, reason in structure.partial_reasons(m).items()}
        elif marker.kind == "getter" or isinstance(marker.spec, structure.TrunkSpec):
            children = dict(m.named_children())
            stem = next((names for names in structure.STEMS if all(child in children for child in names)), None)
            if stem is not None:
                reason = structure.why_not_stem(*(children[child] for child in stem))
                reasons |= {path + child: reason for child in (*stem, "maxpool") if child in children}
                conv, pool = children[stem[0]], children.get("maxpool")
                if reason is None and structure.is_imagenet_stem(conv) and type(pool) is nn.MaxPool2d:
                    reasons[f"{path}maxpool"] = structure.why_not_pool(pool)
            if marker.kind == "container":
                reasons[f"{path}fc"] = structure.why_not_head(m)
    return {name: reason for name, reason in reasons.items() if reason}


@contextmanager
def _named(model: nn.Module, tracer: _Tracer) -> Iterator[None]:
    """While active, the rows of zero padding and of a pool that the stem does not compute go by their names."""
    beside = ((name, m) for name, m in model.named_modules() if isinstance(m, (ZeroPad, nn.MaxPool2d)))
    names = {id(m): name for name, m in beside if name in tracer.reasons}
    call = nn.Module.__call__

    def named_call(m: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tracer.place = names.get(id(m), tracer.place)
        return call(m, *args, **kwargs)

    with patch.object(nn.Module, "__call__", named_call) if names else nullcontext():
        yield


def _converted_child(model: nn.Module) -> str:
    """The first child that holds converted modules, such as a detector's ``backbone``."""
    holds = (name for name, child in model.named_children() if any(is_converted(m) for m in child.modules()))
    return next(holds, "backbone")


def explain(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Plan:
    """Lists how each step of ``model`` would run in its present mode, with the reason; computes nothing.

    Args:
        model: any module that takes one image batch.
        input_shape: ``(N, C, H, W)``; of a :class:`.images.FromUint8`, in its layout.
        dtype: plan for this floating dtype; None is the model's own.
        device: a torch device, or a known device name such as ``"NVIDIA H200"``, which needs no GPU; None is the
            model's own.

    Raises:
        TypeError: ``model`` is not an nn.Module, or ``dtype`` not a torch.dtype.
        ValueError: for an unknown device, a shape that is not four positive sizes, or a model whose shapes depend on
            values, such as a detector: explain its backbone.
    """
    tracer, dtype = _trace(model, input_shape, dtype, device)
    backward = f"{library_of(tracer.target)}: PyTorch's operators, behind the autograd.Functions of the fused steps"
    if tracer.trained:
        backward = f"the last {tracer.backward_rows} steps; PyTorch's operators where statistics are constant"
    name = str(dtype).removeprefix("torch.")
    return Plan(tuple(tracer.rows), tracer.target.name, name, tuple(input_shape), backward)


def fused_steps(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[list[tuple[str, Step]], list[tuple[str, Tail]]]:
    """The steps of this package's ops in one forward, each with its module's name; arguments as :func:`explain`.

    Behind them the ends of its residual blocks, as :mod:`.chains` sees them, with the name of their last convolution.
    """
    tracer, _ = _trace(model, input_shape, dtype, device)
    return tracer.steps, tracer.tails


def training_work(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[list[Work], list[tuple[str, Step]]]:
    """What the steps of training of a forward and its backward asked the plan about, and :func:`fused_steps`."""
    tracer, _ = _trace(model, input_shape, dtype, device)
    return tracer.asked, tracer.steps


def _trace(
    model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None, device: torch.device | str | None
) -> tuple[_Tracer, torch.dtype]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain takes an nn.Module, got {type(model).__name__}; resnet_triton.resnet50() makes one")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")
    shape = tuple(input_shape) if isinstance(input_shape, Sequence) else ()
    if len(shape) != 4 or not all(isinstance(size, int) and size >= 0 for size in shape) or prod(shape[1:]) == 0:
        raise ValueError(f"input_shape must be (N, C, H, W) with positive sizes, got {input_shape!r}")
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    first = next((t for t in tensors.values() if t.is_floating_point()), torch.empty(0))
    target = target_of(device if device is not None else first.device, current_backend() == "triton")
    dtype = dtype or first.dtype
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    for name, tensor in tensors.items():
        fake: Tensor = mode.from_tensor(tensor.detach())
        if fake.is_floating_point() and fake.dtype != dtype:
            fake = fake.to(dtype)
        fakes[name] = fake
        names[id(fake)] = name.rpartition(".")[0]
    with planning_for_cuda(target.is_cuda):
        reasons = reasons_not_fused(model)
    tracer = _Tracer(target, dtype, names, reasons)
    with mode, torch.no_grad():
        x = torch.empty(shape, dtype=getattr(model, "input_dtype", dtype), device=first.device)
        try:
            with tracer, planning_for_cuda(target.is_cuda), _named(model, tracer):
                torch.func.functional_call(model, fakes, (x,))
                tracer.go_back()
        except _needs_values() as error:
            raise ValueError(
                f"explain cannot follow {type(model).__name__}: its shapes depend on values ({error}). "
                f"Explain the part that holds the blocks: explain(model.{_converted_child(model)}, (N, C, H, W))"
            ) from error
    return tracer, dtype

"""One convolution or chain on a GPU, ours and PyTorch's: checked against fp32, timed in turns with a cold L2 cache.

Times are GPU times of CUDA graph replays (no host overhead on either side). The buffers rotate over several times the
L2 cache, as in a network, where a layer's operands were last touched a whole forward ago.
"""

from __future__ import annotations

import abc
import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, cost
from .devices import Target, target_of
from .kernels.config import ConvConfig, Epilogue
from .kernels.geometry import ChainShape, ConvShape
from .tuner import Timing

ERROR_FACTOR = 2.0  # error allowed, relative to PyTorch's own in the same dtype
LARGEST_FACTOR = 4.0  # the same for the largest single error
FLOOR = 1e-6  # errors below this, relative to the reference, are as good as none
ROTATION = 3  # buffers cover this many times the L2 cache
REPLAY_US = 400.0  # a replay lasts at least about this long
ROUNDS = 15


@dataclass(frozen=True)
class Errors:
    """Distance from a reference, relative to the reference's norm (``l2``) and to its largest value (``largest``)."""

    l2: float
    largest: float

    def exceeds(self, library: Errors, factor: float = ERROR_FACTOR) -> str | None:
        """What is wrong beside the library's own errors, or None. NaN never passes."""
        if not self.l2 <= factor * library.l2 + FLOOR:
            return f"error {self.l2:.3g} against {library.l2:.3g} of the library"
        if not self.largest <= LARGEST_FACTOR * factor / ERROR_FACTOR * library.largest + FLOOR:
            return f"largest error {self.largest:.3g} against {library.largest:.3g} of the library"
        return None


def errors(out: torch.Tensor, wanted: torch.Tensor) -> Errors:
    """Errors of ``out`` against ``wanted`` (fp32 or fp64), computed in the dtype of ``wanted``."""
    if out.shape != wanted.shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, wanted {tuple(wanted.shape)}")
    if out.numel() == 0:
        return Errors(0.0, 0.0)
    difference = out.to(wanted.dtype) - wanted
    norm = wanted.norm().item() or 1.0
    peak = wanted.abs().max().item() or 1.0
    return Errors(difference.norm().item() / norm, difference.abs().max().item() / peak)


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Within the block, cuDNN computes fp32 without TF32."""
    with fp32_precision("ieee"):
        yield


@contextlib.contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """Within the block, cuDNN's convolutions form fp32 products in ``"tf32"`` or exactly (``"ieee"``)."""
    cudnn: Any = torch.backends.cudnn
    setting, name = cudnn, "allow_tf32"
    value: bool | str = precision == "tf32"
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # set through the API of torch 2.9, which does not mix with the other
        setting, name, value = cudnn.conv, "fp32_precision", precision
        before = setting.fp32_precision
    setattr(setting, name, value)
    try:
        yield
    finally:
        setattr(setting, name, before)


@contextlib.contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Within the block, cuDNN measures its algorithms on the first call for a shape and keeps the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def device_lost() -> bool:
    """Whether a CUDA error made the device unusable for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Problem(abc.ABC):
    """Random operands of what is measured, and both ways to compute it. BN's vectors have the dtype of the rest.

    Args:
        dtype: of the operands.
        device: where. The CPU works for :meth:`validate` in Triton's interpreter, "meta" for tracing what is launched.
        seed: of the random operands.
        sets: how many sets of buffers rotate; None covers three times the L2 cache.
        moved: bytes of one set.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device | str, seed: int, sets: int | None, moved: int) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.sets = sets or self._sets_for_cold_cache(moved)
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(seed)
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._replays = 0
        self._wanted: tuple[Tensor, ...] = ()
        self._library_errors: tuple[Errors, ...] = ()

    @abc.abstractmethod
    def run_ours(self, config: ConvConfig, i: int = 0) -> tuple[Tensor, ...]:
        """Our kernel on buffer set ``i``; returns its outputs, NHWC, overwritten by the next call on the set."""

    @abc.abstractmethod
    def outputs(self) -> tuple[Tensor, ...]:
        """What :meth:`run_ours` writes to on set 0."""

    @abc.abstractmethod
    def unfused(self, i: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The same by PyTorch, every operator in ``dtype``."""

    @abc.abstractmethod
    def predict(self, config: ConvConfig, target: Target) -> cost.Prediction:
        """The cost model's price of our kernel."""

    def baselines(self) -> dict[str, Callable[[int], object]]:
        """What is timed beside our kernel, on a set: ``"library"`` if there is one, ``"conv"`` if only one of those."""
        return {"library": self.run_library}

    def run_library(self, i: int = 0) -> tuple[Tensor, ...]:
        """PyTorch's convolutions, with BN, addition and ReLU behind them."""
        return self.unfused(i, self.dtype)

    def compared(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is compared of the outputs of either side."""
        return found

    def validate(self, config: ConvConfig) -> str | None:
        """Compares our kernel with fp32 arithmetic: None if its errors are about the library's, else why not."""
        if not self._wanted:
            self._prepare_reference()
        for out in self.outputs():
            out.fill_(float("nan"))  # an element that nothing writes is found
        found = zip(self.compared(self.run_ours(config)), self._wanted, self._library_errors, strict=True)
        reasons = (errors(out, wanted).exceeds(theirs) for out, wanted, theirs in found)
        return next((reason for reason in reasons if reason), None)

    def _prepare_reference(self) -> None:
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        with exact_fp32():
            self._wanted = tuple(wanted.contiguous() for wanted in self.compared(self.unfused(0, wide)))
        found = zip(self.compared(self.run_library()), self._wanted, strict=True)
        self._library_errors = tuple(errors(out, wanted) for out, wanted in found)

    def time(self, config: ConvConfig) -> Timing:
        """Median times of our kernel and the baselines."""
        times = self.times(config)
        us = {name: statistics.median(values) for name, values in times.items()}
        return Timing(us["ours"], us.get("library", 0.0), us.get("conv"), spread(times["ours"]))

    def times(self, config: ConvConfig) -> dict[str, list[float]]:
        """Microseconds of our kernel (``"ours"``) and of each baseline, replay by replay in turns."""
        replays = self._launches(config)
        if not self._replays:
            with cudnn_benchmark():
                self._graphs = {name: self._capture(run, replays) for name, run in self.baselines().items()}
            self._replays = replays
        graphs = {**self._graphs, "ours": self._capture(lambda i: self.run_ours(config, i), self._replays)}
        found = interleaved(graphs, ROUNDS)
        return {name: [ms * 1e3 / self._replays for ms in values] for name, values in found.items()}

    def _launches(self, config: ConvConfig) -> int:
        """Launches per replay: whole rotations, at least about :data:`REPLAY_US` of work."""
        us = self.predict(config, target_of(self.device)).us
        return self.sets * max(1, round(REPLAY_US / us / self.sets))

    def _capture(self, run: Callable[[int], object], launches: int) -> torch.cuda.CUDAGraph:
        """A graph of ``launches`` runs over the rotating sets, after a run outside it (compilation, cuDNN's choice)."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run(0)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                run(i % self.sets)
        return graph

    # Operands

    def _sets_for_cold_cache(self, moved: int) -> int:
        if self.device.type != "cuda":
            return 1
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
        return min(64, max(1, -(-ROTATION * cache // moved)))

    def random(self, *sizes: int) -> Tensor:
        """Normal values, fp32."""
        return torch.randn(sizes, generator=self._generator, device=self.device, dtype=torch.float32)

    def activations(self, *sizes: int) -> list[Tensor]:
        """Normal values behind a ReLU, for each set."""
        return [self.random(*sizes).relu_().to(self.dtype) for _ in range(self.sets)]

    def weights(self, shape: ConvShape) -> list[Tensor]:
        """``[K,R,S,C]``, scaled so that results are about as large as inputs, for each set."""
        deviation = (2 / shape.reduction) ** 0.5
        sizes = shape.k, shape.r, shape.s, shape.c
        return [(self.random(*sizes) * deviation).to(self.dtype) for _ in range(self.sets)]

    def unwritten(self, *sizes: int) -> list[Tensor]:
        """Room for an output, for each set."""
        return [torch.empty(sizes, dtype=self.dtype, device=self.device) for _ in range(self.sets)]

    def bn_vectors(self, k: int) -> tuple[Tensor, ...]:
        """gamma, beta, mean and var."""
        gamma, beta, mean, var = (self.random(k) for _ in range(4))
        return tuple(v.to(self.dtype) for v in (1 + gamma / 4, beta / 4, mean / 4, 1 + var.abs()))


class ConvProblem(Problem):
    """One convolution.

    Args:
        shape, epilogue: what is computed.
        dtype, device, seed, sets: as for :class:`Problem`.
    """

    def __init__(
        self,
        shape: ConvShape,
        epilogue: Epilogue,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
        *,
        seed: int = 0,
        sets: int | None = None,
    ) -> None:
        super().__init__(dtype, device, seed, sets, shape.bytes_moved(dtype.itemsize, epilogue.residual))
        self.shape, self.epilogue = shape, epilogue
        n, k = shape.n, shape.k
        self.xs, self.ws = self.activations(n, shape.h, shape.w, shape.c), self.weights(shape)
        self.ys = self.unwritten(n, shape.p, shape.q, k)
        self.residuals = self.activations(n, shape.p, shape.q, k) if epilogue.residual else None
        self.bias = self.random(k).to(dtype) if epilogue.bias else None
        self.bn: tuple[Tensor | None, ...] = self.bn_vectors(k) if epilogue.bn else (None,) * 4

    def run_ours(self, config: ConvConfig, i: int = 0) -> tuple[Tensor, ...]:
        from .kernels.dispatch import launch_conv
        from .kernels.epilogue import Operands

        gamma, beta, mean, var = self.bn
        operands = Operands(self._residual(i), self.bias, gamma, beta, mean, var, 1e-5, self.epilogue.relu)
        precision = backend.dot_precision(self.dtype)
        launch_conv(self.xs[i], self.ws[i], self.ys[i], self.shape, operands, config, precision)
        return (self.ys[i],)

    def outputs(self) -> tuple[Tensor, ...]:
        return (self.ys[0],)

    def unfused(self, i: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        y = _conv(nchw(self.xs[i], dtype), self.ws[i], self.shape, self.bias)
        residual = self._residual(i)
        y = _behind(y, self.bn, None if residual is None else nchw(residual, dtype), self.epilogue.relu)
        return (y.permute(0, 2, 3, 1),)

    def baselines(self) -> dict[str, Callable[[int], object]]:
        def alone(i: int) -> Tensor:
            return _conv(nchw(self.xs[i]), self.ws[i], self.shape, self.bias)

        return {**super().baselines(), "conv": alone}

    def predict(self, config: ConvConfig, target: Target) -> cost.Prediction:
        precision = backend.dot_precision(self.dtype)
        return cost.predict(self.shape, self.epilogue, config, self.dtype, precision, target)

    def _residual(self, i: int) -> Tensor | None:
        return self.residuals[i] if self.residuals else None


class ChainProblem(Problem):
    """A chain of convolutions, each with BN.

    Args:
        shape: what is computed.
        dtype, device, seed, sets: as for :class:`Problem`.
    """

    def __init__(
        self,
        shape: ChainShape,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
        *,
        seed: int = 0,
        sets: int | None = None,
    ) -> None:
        super().__init__(dtype, device, seed, sets, shape.bytes_moved(dtype.itemsize))
        self.shape = shape
        self.ts = self.activations(*shape.source)
        self.shortcuts = self.ts if shape.first else self.activations(*shape.shortcut)
        self.units = {name: (conv, self.weights(conv), self.bn_vectors(conv.k)) for name, conv in shape.named.items()}
        self.ys, after = self.unwritten(*shape.stored), shape.reduce
        self.nexts = self.unwritten(after.n, after.p, after.q, after.k) if after else None

    def run_ours(self, config: ConvConfig, i: int = 0) -> tuple[Tensor, ...]:
        from .kernels.chain import ChainUnits, Unit, launch_chain
        from .kernels.epilogue import Operands

        units: dict[str, Any] = {"conv": None}
        for name, (_, ws, (gamma, beta, mean, var)) in self.units.items():
            units[name] = Unit(ws[i], Operands(None, None, gamma, beta, mean, var, 1e-5))
        y, t_next = self.ys[i], self.nexts[i] if self.nexts else None
        precision = backend.dot_precision(self.dtype)
        launch_chain(self.ts[i], self.shortcuts[i], y, t_next, ChainUnits(**units), self.shape, config, precision)
        return (y,) if t_next is None else (y, t_next)

    def outputs(self) -> tuple[Tensor, ...]:
        return (self.ys[0], self.nexts[0]) if self.nexts else (self.ys[0],)

    def unfused(self, i: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def convolve(name: str, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
            conv, ws, bn = self.units[name]
            return _behind(_conv(x, ws[i], conv), bn, residual, relu)

        t, shortcut = nchw(self.ts[i], dtype), nchw(self.shortcuts[i], dtype)
        for name in ("first", "conv"):
            t = convolve(name, t) if name in self.units else t
        if self.shape.project:
            shortcut = convolve("project", shortcut, relu=False)
        y, step = convolve("expand", t, shortcut), self.shape.subsample
        outs = [y[:, :, ::step, ::step], *([convolve("reduce", y)] if self.shape.reduce else [])]
        return tuple(out.permute(0, 2, 3, 1) for out in outs)

    def predict(self, config: ConvConfig, target: Target) -> cost.Prediction:
        return cost.predict_chain(self.shape, config, self.dtype, backend.dot_precision(self.dtype), target)


def nchw(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A dense NHWC tensor as PyTorch's operators take it, in another dtype if there is one."""
    return x.permute(0, 3, 1, 2).to(dtype or x.dtype)


def _conv(x: Tensor, w: Tensor, shape: ConvShape, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, nchw(w, x.dtype), bias, shape.stride, shape.padding, shape.dilation)


def _behind(y: Tensor, bn: Sequence[Tensor | None], residual: Tensor | None, relu: bool) -> Tensor:
    """BN, then addition and ReLU in place, as torchvision's ResNet runs them."""
    gamma, beta, mean, var = (None if v is None else v.to(y.dtype) for v in bn)
    if var is not None:
        y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, 1e-5)
    if residual is not None:
        y += residual
    return y.relu_() if relu else y


def interleaved(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each replay: every round replays every graph once; two rounds warm up."""
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for i in range(rounds + 2):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            if i >= 2:
                marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in marks.items()}


def spread(values: list[float]) -> float:
    """(80th - 20th percentile) / median."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return (ordered[round(0.8 * last)] - ordered[round(0.2 * last)]) / statistics.median(ordered)

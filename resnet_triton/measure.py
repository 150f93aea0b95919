"""One convolution on a GPU, ours and PyTorch's: checked against fp32, timed in turns with a cold L2 cache.

Times are GPU times of CUDA graph replays (no host overhead on either side). The buffers rotate over several times the
L2 cache, as in a network, where a layer's operands were last touched a whole forward ago.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import backend, cost, reference
from .devices import target_of
from .kernels.config import ConvConfig, Epilogue
from .kernels.geometry import ConvShape
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


class ConvProblem:
    """Random operands of one convolution and both ways to compute it.

    Args:
        shape, epilogue, dtype: of the convolution. BN's vectors have the same dtype, as in ``model.to(dtype)``.
        device: where. The CPU works for :meth:`validate` in Triton's interpreter.
        seed: of the random operands.
        sets: how many sets of buffers rotate; the default covers three times the L2 cache.
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
        self.shape, self.epilogue, self.dtype = shape, epilogue, dtype
        self.device = torch.device(device)
        generator = torch.Generator(self.device).manual_seed(seed)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator, device=self.device, dtype=torch.float32)

        n, k = shape.n, shape.k
        if sets is None:
            sets = self._sets_for_cold_cache()
        self.xs = [random(n, shape.h, shape.w, shape.c).relu_().to(dtype) for _ in range(sets)]
        deviation = (2 / shape.reduction) ** 0.5
        self.ws = [(random(k, shape.r, shape.s, shape.c) * deviation).to(dtype) for _ in range(sets)]
        self.ys = [torch.empty(n, shape.p, shape.q, k, dtype=dtype, device=self.device) for _ in range(sets)]
        self.residuals: list[torch.Tensor | None] = [None] * sets
        if epilogue.residual:
            self.residuals = [random(n, shape.p, shape.q, k).relu_().to(dtype) for _ in range(sets)]
        self.bias = random(k).to(dtype) if epilogue.bias else None
        self.bn: tuple[torch.Tensor | None, ...] = (None,) * 4
        if epilogue.bn:
            gamma, beta, mean, var = 1 + random(k) / 4, random(k) / 4, random(k) / 4, 1 + random(k).abs()
            self.bn = tuple(v.to(dtype) for v in (gamma, beta, mean, var))
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._replays = 0
        self._wanted: torch.Tensor | None = None
        self._library_errors = Errors(0.0, 0.0)

    def _sets_for_cold_cache(self) -> int:
        if self.device.type != "cuda":
            return 1
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
        moved = self.shape.bytes_moved(self.dtype.itemsize, self.epilogue.residual)
        return min(64, max(1, -(-ROTATION * cache // moved)))

    def run_ours(self, config: ConvConfig, i: int = 0) -> torch.Tensor:
        """Our kernel on buffer set ``i``; returns ``[N,P,Q,K]``, overwritten by the next call on the set."""
        from .kernels.dispatch import launch_conv
        from .kernels.epilogue import Operands

        gamma, beta, mean, var = self.bn
        operands = Operands(self.residuals[i], self.bias, gamma, beta, mean, var, 1e-5, self.epilogue.relu)
        precision = backend.dot_precision(self.dtype)
        launch_conv(self.xs[i], self.ws[i], self.ys[i], self.shape, operands, config, precision)
        return self.ys[i]

    def run_library(self, i: int = 0) -> torch.Tensor:
        """PyTorch's convolution, then BN, addition and ReLU in place, as torchvision's ResNet runs them."""
        y = self.run_conv_alone(i)
        gamma, beta, mean, var = self.bn
        if var is not None:
            y = torch.nn.functional.batch_norm(y, mean, var, gamma, beta, False, 0.0, 1e-5)
        residual = self.residuals[i]
        if residual is not None:
            y += residual.permute(0, 3, 1, 2)
        if self.epilogue.relu:
            y.relu_()
        return y.permute(0, 2, 3, 1)

    def run_conv_alone(self, i: int = 0) -> torch.Tensor:
        """PyTorch's convolution on channels_last operands; ``[N,K,P,Q]``."""
        s = self.shape
        x, w = self.xs[i].permute(0, 3, 1, 2), self.ws[i].permute(0, 3, 1, 2)
        return torch.nn.functional.conv2d(x, w, self.bias, s.stride, s.padding, s.dilation)

    def validate(self, config: ConvConfig) -> str | None:
        """Compares our kernel with fp32 arithmetic: None if its errors are about the library's, else why not."""
        if self._wanted is None:
            self._prepare_reference()
        assert self._wanted is not None
        self.ys[0].fill_(float("nan"))  # an element that nothing writes is found
        out = self.run_ours(config)
        return errors(out, self._wanted).exceeds(self._library_errors)

    def _prepare_reference(self) -> None:
        s = self.shape
        wide = torch.float64 if self.dtype == torch.float32 else torch.float32

        def up(t: torch.Tensor | None) -> torch.Tensor | None:
            return None if t is None else t.to(wide)

        def nchw(t: torch.Tensor) -> torch.Tensor:
            return t.permute(0, 3, 1, 2).to(wide)

        gamma, beta, mean, var = map(up, self.bn)
        residual = self.residuals[0]
        residual = None if residual is None else nchw(residual)
        x, w, bias = nchw(self.xs[0]), nchw(self.ws[0]), up(self.bias)
        with exact_fp32():
            y = reference.conv_bn_act(
                x, w, bias, gamma, beta, mean, var, residual, 1e-5, self.epilogue.relu, s.stride, s.padding, s.dilation
            )
        self._wanted = y.permute(0, 2, 3, 1).contiguous()
        self._library_errors = errors(self.run_library(), self._wanted)

    def time(self, config: ConvConfig) -> Timing:
        """Times our kernel, PyTorch's passes and its convolution alone, replay by replay in turns."""
        replays = self._launches(config)
        if not self._graphs:
            with cudnn_benchmark():
                self._graphs = {
                    "library": self._capture(self.run_library, replays),
                    "conv": self._capture(self.run_conv_alone, replays),
                }
            self._replays = replays
        graphs = {**self._graphs, "ours": self._capture(lambda i: self.run_ours(config, i), self._replays)}
        times = interleaved(graphs, ROUNDS)
        us = {name: statistics.median(values) * 1e3 / self._replays for name, values in times.items()}
        return Timing(us["ours"], us["library"], us["conv"], spread(times["ours"]))

    def _launches(self, config: ConvConfig) -> int:
        """Launches per replay: whole rotations, at least about :data:`REPLAY_US` of work."""
        target = target_of(self.device)
        precision = backend.dot_precision(self.dtype)
        us = cost.predict(self.shape, self.epilogue, config, self.dtype, precision, target).us
        sets = len(self.xs)
        return sets * max(1, round(REPLAY_US / us / sets))

    def _capture(self, run: Callable[[int], torch.Tensor], launches: int) -> torch.cuda.CUDAGraph:
        """A graph of ``launches`` runs over the rotating sets, after a run outside it (compilation, cuDNN's choice)."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            run(0)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(launches):
                run(i % len(self.xs))
        return graph


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

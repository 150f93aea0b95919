"""The contestants of a training step: each builds, from one float32 model and images, a whole step as a call.

The learning rate is 0: every call does all the work of a step and is the same step again, so that its gradients can be
checked after any of them. Weights stay float32, autocast does the rest; everything is channels_last.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resnet_triton
from resnet_triton.backend import use_backend
from resnet_triton.providers import Provider

WARM_UP = 3  # steps before a capture
Loss = Callable[[Tensor, Tensor], Tensor]


class Phases(NamedTuple):
    """Seconds of a step's parts."""

    forward: float
    backward: float
    optimizer: float


class Step:
    """Forward, backward and optimizer of one batch.

    Args:
        model: in training mode, float32 weights.
        x: float32 images.
        dtype: of autocast where it has 16 bits; else the model's own.
        loss: ``(images, labels) -> loss``; the model's cross entropy by default.
        memory, backend: see :func:`resnet_triton.use_backend`.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        dtype: torch.dtype,
        loss: Loss | None = None,
        memory: str = "auto",
        backend: str = "auto",
    ) -> None:
        self.backend = backend
        self.model, self.x, self.dtype, self.memory = model, x, dtype, memory
        self.labels = torch.arange(len(x), device=x.device) % 10
        self.loss = loss or loss_of(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4, fused=True)
        self._marks: list[Any] = []

    def __call__(self) -> None:
        self._marks.clear()
        self._mark()
        self.optimizer.zero_grad()
        with use_backend(self.backend, memory=self.memory):
            with self.autocast():
                loss = self.loss(self.x, self.labels)
            self._mark()
            loss.backward()
        self._mark()
        self.optimizer.step()
        self._mark()

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision of the forward. No cache of cast weights: a captured step must cast them anew."""
        mixed = self.dtype.itemsize == 2
        return torch.autocast(self.x.device.type, self.dtype if mixed else None, enabled=mixed, cache_enabled=False)

    def _mark(self) -> None:
        if not self.x.is_cuda:
            self._marks.append(time.perf_counter())
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)

    def phases(self) -> Phases | None:
        """Of the last call, once its result is there; None where the step is one graph."""
        if not self._marks:
            return None
        if not self.x.is_cuda:
            return Phases(*(after - before for before, after in zip(self._marks, self._marks[1:], strict=False)))
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return Phases(*(before.elapsed_time(after) / 1e3 for before, after in pairs))

    def gradients(self) -> dict[str, Tensor]:
        """Of the last call, by parameter; the same tensors that the next call overwrites."""
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


class GraphedStep(Step):
    """A step captured once as a CUDA graph and replayed; a call copies the images in, as a loop would."""

    def __init__(self, model: nn.Module, x: Tensor, dtype: torch.dtype, backend: str = "auto") -> None:
        super().__init__(model, x.clone(memory_format=torch.channels_last), dtype, backend=backend)
        self.images = x
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                super().__call__()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        with torch.cuda.graph(self.graph, stream=stream):
            super().__call__()
        self._marks.clear()

    def __call__(self) -> None:
        self.x.copy_(self.images, non_blocking=True)
        self.graph.replay()


def loss_of(model: nn.Module) -> Loss:
    """Cross entropy of a model's outputs."""
    return lambda x, labels: F.cross_entropy(model(x), labels)


def _trained(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def _images(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def eager(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """The model as it is, channels_last, under autocast."""
    return Step(_trained(model), _images(x), dtype)


def compiled(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """Model and loss through Inductor's strongest setting, with CUDA graphs of forward and backward."""
    trained = _trained(model)
    return Step(trained, _images(x), dtype, torch.compile(loss_of(trained), mode="max-autotune", dynamic=False))


def ours(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """The converted model as it is."""
    return Step(resnet_triton.convert(_trained(model)), _images(x), dtype)


def ours_gram(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """The converted model with ``use_backend("auto", memory="gram")``."""
    return Step(resnet_triton.convert(_trained(model)), _images(x), dtype, memory="gram")


def ours_stored(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """The converted model with ``use_backend("auto", memory="stored")``."""
    return Step(resnet_triton.convert(_trained(model)), _images(x), dtype, memory="stored")


def ours_graph(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Step:
    """The converted model, the whole step in one CUDA graph."""
    return GraphedStep(resnet_triton.convert(_trained(model)), _images(x), dtype)


EAGER = Provider("eager channels_last", eager)
OURS = Provider("ours", ours, ours=True)
GRAM = Provider('ours memory="gram"', ours_gram, ours=True, devices=("cpu",))
STORED = Provider('ours memory="stored"', ours_stored, ours=True, devices=("cuda",))
GRAPH = Provider("ours + CUDA graph of the step", ours_graph, ours=True, devices=("cuda",))
MAX_AUTOTUNE = Provider("torch.compile max-autotune", compiled, devices=("cuda",))
#: In the order of the tables, the baseline first.
PROVIDERS: list[Provider] = [EAGER, MAX_AUTOTUNE, OURS, STORED, GRAPH, GRAM]
#: Whose memory PyTorch's counters do not show, because replays allocate nothing.
REPLAYED = (GRAPH, MAX_AUTOTUNE)


def providers_on(device: str) -> Iterator[Provider]:
    """Those that compete on a device type."""
    return (provider for provider in PROVIDERS if device in provider.devices)

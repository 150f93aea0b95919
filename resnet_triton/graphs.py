"""``graph``: captures a model's forward once as a CUDA graph and replays it, which skips the host's part of a forward.

A graph is a recording of kernel launches with their addresses. It reads its input at one address and writes its output
at another, so a call copies the images in and, by default, the output out. It reads the weights where they were when
it was captured: a weight that changes in place (an optimizer step, ``load_state_dict``, ``copy_``) is seen, one that is
replaced (``model.half()``, ``load_state_dict(assign=True)``, ``fold``) is an error at the next call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DEVICE = "cuda"
WARM_UP = 3  # calls before the capture: kernels are compiled and libraries choose their algorithms there


def graph(model: nn.Module, example: Tensor, *, clone: bool = True) -> Graph:
    """Captures the forward of ``model`` for inputs like ``example`` as a CUDA graph.

    Autocast, ``use_backend`` and PyTorch's precision settings are recorded as they are now; no gradient flows.

    Args:
        model: any module in eval mode whose forward takes one tensor and returns a tensor, or tuples, lists and dicts
            of tensors, and does the same work each time without waiting for the GPU (``.item()``, ``.cpu()``).
        example: a batch with the shape, dtype, device and layout of the inputs to come; its values do not matter.
        clone: return a copy of the output. False returns the graph's own output, which the next call overwrites.

    Returns:
        A callable from a batch to the model's output. It serves one stream at a time.

    Raises:
        TypeError: ``model`` is not an nn.Module, ``example`` not a tensor, or the output holds other things.
        ValueError: the model is in training mode; ``example`` requires grad or is not on the model's CUDA device.
        RuntimeError: there is no CUDA device, or the forward cannot be captured.
    """
    return Graph(model, example, clone=clone)


class Graph:
    """A captured forward; :func:`graph` makes one and describes the arguments.

    Attributes:
        model: the captured model.
        input: the batch that a replay reads.
        output: what a replay overwrites, structured as the model's output.
    """

    def __init__(self, model: nn.Module, example: Tensor, *, clone: bool = True) -> None:
        _check_model(model)
        _check_example(model, example)
        self.model = model
        self.clone = clone
        self._graph = torch.cuda.CUDAGraph()
        # an input made in inference mode could not be written to outside of it
        with torch.cuda.device(example.device), torch.inference_mode(False), torch.no_grad(), _uncached_autocast():
            self.input = example.detach().clone()
            self.output = self._capture()
        self._leaves, self._structure = pytree.tree_flatten(self.output)
        self._weights = list(_weights(model))

    def _capture(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                _check_output(self.model(self.input))
        torch.cuda.current_stream().wait_stream(stream)
        try:
            # other threads of a server may go on allocating and copying
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                return self.model(self.input)
        except RuntimeError as error:
            raise RuntimeError(
                f"graph cannot capture the forward of {type(self.model).__name__}: {error}. A forward that waits for "
                "the GPU (.item(), .cpu(), a branch on values) has no graph; call the model itself, or capture the "
                "part of it that does the same work each time."
            ) from error

    def __call__(self, x: Tensor) -> Any:
        """The model's output for a batch like the example.

        Raises:
            TypeError: ``x`` is not a tensor.
            ValueError: ``x`` has another shape, dtype or device than the example, or requires grad.
            RuntimeError: the model was put into training mode, or a weight was replaced since the capture.
        """
        self._check(x)
        self.input.copy_(x, non_blocking=True)
        self.replay()
        self._check_weights()  # the GPU is at work meanwhile; what the graph reads is kept alive here
        if not self.clone:
            return self.output
        return pytree.tree_unflatten([t.clone() if isinstance(t, Tensor) else t for t in self._leaves], self._structure)

    def replay(self) -> Any:
        """Computes :attr:`output` from what :attr:`input` holds, and returns it; nothing is checked or copied."""
        self._graph.replay()
        return self.output

    def _check(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"a graph takes a tensor, got {type(x).__name__}")
        for name in ("shape", "dtype", "device"):
            came, allowed = getattr(x, name), getattr(self.input, name)
            if came != allowed:
                raise ValueError(
                    f"x has {name} {_text(came)}, the graph was captured for {_text(allowed)}; convert x, or capture "
                    f"another graph: resnet_triton.graph(model, x)"
                )
        if x.requires_grad:
            raise ValueError(
                "x requires grad, and no gradient flows through a graph; pass x.detach() or call the model"
            )

    def _check_weights(self) -> None:
        again = "capture again: resnet_triton.graph(model, x)"
        if self.model.training:
            raise RuntimeError(f"the model was put into training mode since the capture; call model.eval(), or {again}")
        for members, name, path, value, kept in self._weights:
            same: bool = members.get(name) is value
            if not same or (kept is not None and value.data_ptr() != kept.data_ptr()):
                raise RuntimeError(
                    f"{path} was replaced since the capture, and the graph still reads the old one; {again}. "
                    "Changes in place (load_state_dict, optimizer steps) need no new graph."
                )


#: ``(dictionary, name, path, member, alias)``, see :func:`_weights`.
Weight = tuple[dict[str, Any], str, str, Any, Tensor | None]


def _weights(model: nn.Module) -> Iterator[Weight]:
    """Every parameter, buffer and child that a forward may read: where it is held, its path, and itself.

    The alias shares a tensor's storage, and so keeps it alive when the tensor is pointed to another.
    """
    for prefix, m in model.named_modules():
        held: tuple[dict[str, Any], ...] = (m._parameters, m._buffers, m._modules)
        for members in held:
            for name, value in members.items():
                path = f"{prefix}.{name}" if prefix else name
                yield members, name, path, value, value.detach() if isinstance(value, Tensor) else None


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"graph takes an nn.Module, got {type(model).__name__}; resnet_triton.resnet50() makes one")
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ValueError(
            f"{training or 'model'} is in training mode; a graph replays inference: call model.eval() first"
        )


def _check_example(model: nn.Module, example: Tensor) -> None:
    if not isinstance(example, Tensor):
        raise TypeError(f"example must be a tensor, one batch of images, got {type(example).__name__}")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "graph needs a CUDA device; there is none here (`resnet-triton info` says why). Call the model itself, or "
            "torch.compile(model), on the CPU."
        )
    if example.device.type != DEVICE:
        raise ValueError(f"example is on {example.device}; graph needs a CUDA device: model.cuda(), example.cuda()")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(f"{name} is on {tensor.device}, example on {example.device}; move both to one CUDA device")
    if example.requires_grad:
        raise ValueError("example requires grad, and no gradient flows through a graph; pass example.detach()")


def _check_output(output: Any) -> None:
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor | int | float | bool | str | None):
            raise TypeError(
                f"the model returns a {type(leaf).__name__}; a graph gives back tensors, and tuples, lists and dicts "
                "of them. Wrap the model in a module that returns those."
            )


@contextmanager
def _uncached_autocast() -> Iterator[None]:
    """Autocast as it is, but casting weights within the graph: casts cached before it would be freed under it."""
    if not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False):
        yield


def _text(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)

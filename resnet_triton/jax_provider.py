"""The contestant JAX: a PyTorch model as a jitted JAX function, the way that a user of JAX would write it.

``torch.export`` names the operators of the model; each has a counterpart here. Values of four dimensions are NHWC
(PyTorch's shape NCHW), filters are HWIO. BN is folded in float32 into the convolution before it; one without is a
scale and a shift. The parameters are moved to JAX's device once and are arguments of the jitted function.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .backend import dot_precision
from .providers import Call, Unavailable

Layer = tuple[Any, ...]  # the parameters of one layer
NAMED = 3  # unknown operators that a reason names
aten = torch.ops.aten
CONV, LINEAR = aten.conv2d.default, aten.linear.default
NORM = aten._native_batch_norm_legit_no_training.default


def why_not(device: str) -> str | None:
    """Why JAX cannot compute on a device type, or None."""
    try:
        platform = _device(device).platform
    except (ImportError, RuntimeError) as error:
        return f"JAX does not start: {(str(error).splitlines() or [''])[0]}"
    if device == "cuda" and platform == "cpu":
        return "JAX sees no GPU; for CUDA: pip install 'jax[cuda13]' (or cuda12)"
    return None


def _device(device: str) -> Any:
    # else JAX takes three quarters of the GPU's memory at once, from all other contestants
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax.devices("cpu")[0] if device == "cpu" else jax.devices()[0]


def build(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """The model in JAX, compiled by XLA for these images; a call returns when JAX has the result.

    Args:
        model: float32, in eval mode; it is not changed.
        x: float32 images ``[N, C, H, W]``, on the device of the model.
        dtype: of images, filters and activations. Float32 follows PyTorch's TF32 setting on a GPU.

    Returns:
        A call whose outputs are PyTorch tensors that share JAX's memory, in the order of the model's outputs.

    Raises:
        Unavailable: the model cannot be exported, or has an operator without a counterpart here.
        torch.OutOfMemoryError: (also from a call) JAX ran out of memory.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of PyTorch about its own code
            program = torch.export.export(model, (x,)).run_decompositions({})
    except Exception as error:
        raise Unavailable(f"torch.export: {(str(error).splitlines() or [''])[0]}") from error
    layers = _layers(program)
    device = _device(x.device.type)
    import jax

    exact = x.is_cuda and dtype == torch.float32 and dot_precision(dtype) != "tf32"

    def put(t: Tensor) -> Any:
        return jax.device_put(jax.dlpack.from_dlpack(t.detach().contiguous()), device)

    def forward(parameters: Mapping[str, Layer], image: Any) -> list[Any]:
        with jax.default_matmul_precision("highest" if exact else "default"):
            return _interpret(program.graph, parameters, image)

    with _memory_errors():
        # the scales and shifts of a BN that stays are float32
        parameters = {
            node.name: tuple(None if t is None else put(t if node.target is NORM else t.to(dtype)) for t in layer)
            for node, layer in layers.items()
        }
        images = put(x.to(dtype).permute(0, 2, 3, 1))
    compiled = jax.jit(forward)

    def call() -> list[Tensor]:
        with _memory_errors():
            outputs = jax.block_until_ready(compiled(parameters, images))
        return [_to_torch(out) for out in outputs]

    return call


def _to_torch(out: Any) -> Tensor:
    t = torch.from_dlpack(out)
    return t.permute(0, 3, 1, 2) if t.dim() == 4 else t


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise torch.OutOfMemoryError(f"JAX: {error}") from error
        raise


def _layers(program: ExportedProgram) -> dict[fx.Node, Layer]:
    """Parameters of each convolution, linear layer and BN, laid out as JAX wants them; a folded BN has none.

    Raises:
        Unavailable: for operators without a counterpart, and for parameters that something else uses.
    """
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    constants = {placeholder: tensors[name] for placeholder, name in names.items()}
    found: dict[fx.Node, Layer] = {}
    unknown: set[str] = set()
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        arguments = _arguments(node)
        kept = PARAMETERS.get(node.target, ())
        held = [arguments[i] if i in kept else None for i in range(len(arguments))]
        if any(a is not None and a.name not in constants for a in held):
            unknown.add(f"{node.target} with computed parameters")
        elif any(a.name in constants for a in node.all_input_nodes if a not in held):
            unknown.add(f"{node.target} of a parameter")
        elif node.target not in OPERATORS:
            unknown.add(str(node.target))
        else:
            parameters = [None if a is None else constants[a.name] for a in held]
            if node.target is NORM:
                _normalise(node, parameters[1:5], arguments[-1], found)
            elif kept:
                found[node] = tuple(parameters[1:3])
    if unknown:
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        raise Unavailable(f"JAX translation does not know {', '.join(sorted(unknown)[:NAMED])}{more}")
    layouts = {CONV: (2, 3, 1, 0), LINEAR: (1, 0)}
    return {n: (p[0].permute(layouts[n.target]), p[1]) if n.target in layouts else p for n, p in found.items()}


def _normalise(node: fx.Node, statistics: Sequence[Tensor | None], eps: float, found: dict[fx.Node, Layer]) -> None:
    """Scale and shift of a BN: in the convolution before it where that has no other user, else its own."""
    gamma, beta, mean, var = statistics
    assert mean is not None and var is not None  # the operator asks for them
    scale = (var + eps).rsqrt() if gamma is None else gamma * (var + eps).rsqrt()
    shift = -mean * scale if beta is None else beta - mean * scale
    before = node.args[0]
    assert isinstance(before, fx.Node)
    if before.target is CONV and len(before.users) == 1:
        weight, bias = found[before]
        found[before] = weight * scale[:, None, None, None], shift if bias is None else bias * scale + shift
        found[node] = ()
    else:
        found[node] = scale, shift


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments of a call in the order of the operator's schema, with its defaults."""
    if node.target is getitem:
        return list(node.args)
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return [given.get(a.name, a.default_value) for a in schema]


def _interpret(graph: fx.Graph, parameters: Mapping[str, Layer], image: Any) -> list[Any]:
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = image  # no operator reads those of the parameters
        elif node.op == "call_function":
            kept = PARAMETERS.get(node.target, ())
            arguments = [a for i, a in enumerate(_arguments(node)) if i not in kept]
            layer = (parameters[node.name],) if kept else ()
            values[node] = OPERATORS[node.target](*layer, *fx.node.map_arg(arguments, values.__getitem__))
        else:
            (outputs,) = node.args
            return [values[out] for out in outputs if isinstance(out, fx.Node)]
    raise AssertionError("a graph ends with its output")


def _conv(
    layer: Layer, x: Any, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Any:
    from jax import lax

    kernel, bias = layer
    (sh, sw), (ph, pw), (dh, dw) = (_pair(each) for each in (stride, padding, dilation))
    y = lax.conv_general_dilated(
        x,
        kernel,
        (sh, sw),
        [(ph, ph), (pw, pw)],
        rhs_dilation=(dh, dw),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y if bias is None else y + bias


def _linear(layer: Layer, x: Any) -> Any:
    kernel, bias = layer
    y = _nchw(x) @ kernel
    return _nhwc(y if bias is None else y + bias)


def _norm(layer: Layer, x: Any, momentum: float, eps: float) -> tuple[Any]:
    if not layer:
        return (x,)
    scale, shift = layer
    return ((x * scale + shift).astype(x.dtype),)


def _max_pool(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Any:
    import jax.numpy as jnp
    from jax import lax

    windows = _windows(x.shape, kernel, stride, padding, dilation, ceil_mode)
    return lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), lax.max, **windows)


def _avg_pool(
    x: Any, kernel: Any, stride: Any, padding: Any, ceil_mode: bool, count_include_pad: bool, divisor: int | None
) -> Any:
    import jax.numpy as jnp
    from jax import lax

    windows = _windows(x.shape, kernel, stride, padding, 1, ceil_mode)
    total = lax.reduce_window(x.astype(jnp.float32), 0.0, lax.add, **windows)
    if divisor is None:
        # the padding counts or not; what a window of ceil_mode covers beyond it never does
        own = [p if count_include_pad else 0 for p in _pair(padding)]
        counted = jnp.ones((1, *(size + 2 * p for size, p in zip(x.shape[1:3], own, strict=True)), 1), jnp.float32)
        beyond = [(lo - p, max(0, hi - p)) for (lo, hi), p in zip(windows["padding"][1:3], own, strict=True)]
        divisor = lax.reduce_window(counted, 0.0, lax.add, **{**windows, "padding": [(0, 0), *beyond, (0, 0)]})
    return (total / divisor).astype(x.dtype)


def _windows(
    shape: Sequence[int], kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> dict[str, Any]:
    """Arguments of ``lax.reduce_window`` for a pooling of PyTorch on NHWC."""
    sides = list(zip(shape[1:3], *(_pair(each) for each in (kernel, stride or kernel, padding, dilation)), strict=True))
    pads = []
    for size, k, s, p, d in sides:
        reach = d * (k - 1) + 1
        steps = size + 2 * p - reach
        last = -(-steps // s) if ceil_mode else steps // s
        if ceil_mode and last * s >= size + p:  # no window starts in the padding behind the image
            last -= 1
        pads.append((p, max(0, last * s + reach - size - p)))
    return {
        "window_dimensions": (1, *(k for _, k, _, _, _ in sides), 1),
        "window_strides": (1, *(s for _, _, s, _, _ in sides), 1),
        "padding": [(0, 0), *pads, (0, 0)],
        "window_dilation": (1, *(d for *_, d in sides), 1),
    }


def _adaptive_avg_pool(x: Any, size: Any) -> Any:
    if tuple(size) != (1, 1):
        raise Unavailable(f"JAX translation does not know adaptive_avg_pool2d to {tuple(size)}, only to (1, 1)")
    return x.mean((1, 2), keepdims=True)


def _mean(x: Any, dims: Sequence[int] | None, keepdim: bool, dtype: torch.dtype | None) -> Any:
    if dtype is not None:
        raise Unavailable("JAX translation does not know aten.mean.dim with a dtype")
    return _nhwc(_nchw(x).mean(None if not dims else tuple(dims), keepdims=keepdim))


def _view(x: Any, shape: Sequence[int]) -> Any:
    return _nhwc(_nchw(x).reshape(shape))


def _add(x: Any, y: Any, alpha: float) -> Any:
    _check_ranks(x, y)
    return x + (y if alpha == 1 else alpha * y)


def _mul(x: Any, y: Any) -> Any:
    _check_ranks(x, y)
    return x * y


def _check_ranks(x: Any, y: Any) -> None:
    ranks = {getattr(each, "ndim", 0) for each in (x, y)} - {0}
    if len(ranks) > 1 and 4 in ranks:  # broadcasting goes by PyTorch's order of dimensions
        raise Unavailable(f"JAX translation does not know operands of {' and '.join(map(str, ranks))} dimensions")


def _nchw(x: Any) -> Any:
    return x.transpose(0, 3, 1, 2) if x.ndim == 4 else x


def _nhwc(x: Any) -> Any:
    return x.transpose(0, 2, 3, 1) if x.ndim == 4 else x


def _pair(value: Any) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return (values[0], values[-1])


def _relu(x: Any) -> Any:
    import jax

    return jax.nn.relu(x)


def _sigmoid(x: Any) -> Any:
    import jax

    return jax.nn.sigmoid(x)


def _silu(x: Any) -> Any:
    import jax

    return jax.nn.silu(x)


#: Which arguments of an operator are the parameters of a layer.
PARAMETERS: dict[Any, tuple[int, ...]] = {CONV: (1, 2), LINEAR: (1, 2), NORM: (1, 2, 3, 4)}

#: Operators of an exported model: ``(parameters of a layer, its other arguments) -> value``.
OPERATORS: dict[Any, Callable[..., Any]] = {
    CONV: _conv,
    LINEAR: _linear,
    NORM: _norm,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.mean.dim: _mean,
    aten.relu.default: _relu,
    aten.sigmoid.default: _sigmoid,
    aten.silu.default: _silu,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.view.default: _view,
    aten.clone.default: lambda x, memory_format: x,
    getitem: getitem,
}

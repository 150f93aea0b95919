"""The contestants of a comparison: each builds, from one float32 model and one batch of images, a call that returns the
model's output.

A provider gets the model in the layout and the dtype that its users have it in; nothing it does changes the model that
it was given. Why one cannot run somewhere is said in words, not hidden.
"""

from __future__ import annotations

import copy
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import resnet_triton

from .backend import use_backend

Call = Callable[[], Any]
DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,  # PyTorch's default for float32 convolutions on a GPU
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
CXX_COMPILERS = ("g++", "clang++", "c++", "icpx", "cl")


class Unavailable(Exception):
    """Why a provider cannot run a model; the row says it, and no comparison fails for it."""


@dataclass(frozen=True)
class Provider:
    """One contestant.

    Args:
        name: its name in the tables.
        build: ``(float32 model in eval mode, float32 images, dtype) -> call``.
        ours: whether it is this package: then a wrong or failing result fails the comparison.
        devices: device types on which it competes.
        needs: ``device type -> None`` or why it cannot run here.
        package: what it runs on instead of PyTorch: without that installed it does not compete; its memory is not
            PyTorch's to count, and its calls return with the result.
    """

    name: str
    build: Callable[[nn.Module, Tensor, torch.dtype], Call]
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: Callable[[str], str | None] = lambda device: None
    package: str | None = None

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return self.package is None or find_spec(self.package) is not None


def _cast(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    return copy.deepcopy(model).to(dtype=dtype).to(memory_format=layout)  # type: ignore[call-overload]


def _eager(model: nn.Module, x: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Call:
    model, x = _cast(model, dtype, layout), x.to(dtype).contiguous(memory_format=layout)
    return lambda: model(x)


def eager(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """The model as torchvision builds it: contiguous NCHW."""
    return _eager(model, x, dtype, torch.contiguous_format)


def eager_channels_last(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Eager in the layout that cuDNN and oneDNN prefer."""
    return _eager(model, x, dtype, torch.channels_last)


def _compiled(model: nn.Module, x: Tensor, dtype: torch.dtype, options: dict[str, Any]) -> Call:
    model, x = _cast(model, dtype, torch.channels_last), x.to(dtype).contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, dynamic=False, options=options)
    return lambda: compiled(x)


def compiled(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """``torch.compile(model)``, channels_last."""
    return _compiled(model, x, dtype, {})


def compiled_freezing(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Inductor with freezing: it folds BN and packs weights too."""
    return _compiled(model, x, dtype, {"freezing": True})


def compiled_max_autotune(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """Inductor's strongest setting on a GPU: max-autotune, CUDA graphs, freezing."""
    return _compiled(model, x, dtype, {"freezing": True, "max_autotune": True, "triton.cudagraphs": True})


def _converted(model: nn.Module, x: Tensor, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    layout = torch.channels_last if x.is_cuda else torch.contiguous_format
    return resnet_triton.convert(model).to(dtype), x.to(dtype).contiguous(memory_format=layout)


def ours(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """``resnet_triton.convert(model)``: on a GPU channels_last, on the CPU in the layout that the user has."""
    model, x = _converted(model, x, dtype)
    return lambda: model(x)


def ours_apart(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """:func:`ours` without chains: what several convolutions in one kernel gain shows in the difference."""
    model, x = _converted(model, x, dtype)

    def call() -> Any:
        with use_backend("auto", chains=False):
            return model(x)

    return call


def ours_folded(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """``resnet_triton.fold(model)``, folded in float32 and then cast; channels_last."""
    return _eager(resnet_triton.fold(model), x, dtype, torch.channels_last)


def ours_compiled(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """The converted model through ``torch.compile``."""
    return _compiled(resnet_triton.convert(model), x, dtype, {})


def ours_graph(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """``resnet_triton.graph(converted model, images)``; a call copies the images in and the output out."""
    from .graphs import graph

    model, x = _converted(model, x, dtype)
    captured = graph(model, x)
    return lambda: captured(x)


def jax(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Call:
    """The model as a jitted JAX function on NHWC, BN folded."""
    from .jax_provider import build

    return build(model, x, dtype)


def no_jax(device: str) -> str | None:
    """Why JAX, which is installed, cannot compute on a device type, or None."""
    from .jax_provider import why_not

    return why_not(device)


def no_cxx_compiler(device: str) -> str | None:
    """Why Inductor cannot compile for the CPU here, or None. On a GPU it needs no C++ compiler of its own."""
    chosen = os.environ.get("CXX")
    found = any(shutil.which(name) for name in ([chosen] if chosen else CXX_COMPILERS))
    return None if found or device != "cpu" else "needs g++"


EAGER = Provider("eager", eager, devices=("cpu",))
CHANNELS_LAST = Provider("eager channels_last", eager_channels_last)
COMPILE = Provider("torch.compile", compiled, devices=("cpu",), needs=no_cxx_compiler)
FREEZING = Provider("torch.compile freezing", compiled_freezing, devices=("cpu",), needs=no_cxx_compiler)
MAX_AUTOTUNE = Provider("torch.compile max-autotune", compiled_max_autotune, devices=("cuda",))
JAX = Provider("JAX", jax, needs=no_jax, package="jax")
OURS = Provider("ours", ours, ours=True)
FOLDED = Provider("ours folded", ours_folded, ours=True, devices=("cpu",))
OURS_APART = Provider("ours, one kernel a convolution", ours_apart, ours=True, devices=("cuda",))
OURS_COMPILED = Provider("ours + torch.compile", ours_compiled, ours=True, devices=("cuda",))
OURS_GRAPH = Provider("ours + CUDA graph", ours_graph, ours=True, devices=("cuda",))

#: In the order of the tables. The first that runs on a device is its baseline: "eager" in every speed-up and error.
PROVIDERS: list[Provider] = [
    EAGER,
    CHANNELS_LAST,
    COMPILE,
    FREEZING,
    MAX_AUTOTUNE,
    JAX,
    OURS,
    FOLDED,
    OURS_APART,
    OURS_COMPILED,
    OURS_GRAPH,
]


def providers_on(device: str) -> list[Provider]:
    """The providers that compete on a device type, baseline first."""
    return [provider for provider in PROVIDERS if device in provider.devices and provider.installed]


def absent_on(device: str) -> list[Provider]:
    """Those that would compete on a device type if their package were installed."""
    return [provider for provider in PROVIDERS if device in provider.devices and not provider.installed]


def weak_dtype(device: str, dtype: str) -> str | None:
    """Why a dtype makes no sense on a device, or None."""
    if device == "cpu" and dtype == "bfloat16" and not cpu_has_bfloat16():
        return "not measured: this CPU emulates bfloat16 (no AMX, no AVX512_BF16)"
    return None


def cpu_has_bfloat16() -> bool:
    """Whether oneDNN computes bfloat16 convolutions with matrix or dot-product instructions here."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # on x86 the call above is content with AVX-512 alone
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)

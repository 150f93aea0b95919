"""Decides how each step of an op runs. The ops ask while running, ``explain`` asks without running: same function.

A choice is data: a realisation's name, its configuration, and the reason in words. A convolution that was measured on
this device takes the faster of the measured times; one that was measured on a GPU of the same architecture takes the
configuration found there; otherwise the cost model chooses.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from . import cost, onednn, tuning
from .devices import Target, known_devices
from .kernels.config import ROLLING_KERNELS, ConvConfig, Epilogue, alternatives
from .kernels.geometry import ConvShape
from .kernels.small_grid import small_grid_configs

logger = logging.getLogger("resnet_triton")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_PASS = "cudnn+bn_act"  # the library's convolution, and this package's pass behind it
CLEAR_WIN = 0.8  # an unmeasured kernel must be predicted to need at most this share of the library's time
NO_OVERLAP = "the driver refuses the tensor map of one kernel for the stem and its max-pool"
#: Whether convolutions without a measurement are measured at their first call. Read at import.
AUTOTUNE = os.environ.get("RESNET_TRITON_AUTOTUNE", "0") not in ("", "0")
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}  # on the command line


@dataclass(frozen=True)
class Choice:
    """How one step runs.

    Args:
        realisation: a kernel's name, :data:`ONE_PASS`, or PyTorch's operators: ``"cudnn"``, ``"onednn"``, ``"aten"``.
        config: the kernel's tiling, if it has one.
        reason: why, in words.
        predicted_us, measured_us: time of the chosen realisation in microseconds, where known.
        limit: the resource that bounds it by the cost model (``"hbm"``, ``"l2"``, ``"shared"``, ``"tensor"``,
            ``"issue"``), or ``""``.
    """

    realisation: str
    config: ConvConfig | None
    reason: str
    predicted_us: float | None = None
    measured_us: float | None = None
    limit: str = ""

    @property
    def fused(self) -> bool:
        """Whether a kernel of this package runs."""
        return self.realisation not in ("cudnn", "onednn", "aten")

    @property
    def tiling(self) -> ConvConfig:
        """The configuration of a realisation that has one."""
        assert self.config is not None, f"{self.realisation} has no configuration"
        return self.config


def library_of(target: Target) -> str:
    """The name of PyTorch's own convolution on this target."""
    return "cudnn" if target.is_cuda else "aten"


def refusal(target: Target, dtype: torch.dtype) -> str | None:
    """Why no kernel of this package can run there, or None."""
    if not (target.is_cuda or target.name == "interpreter"):
        return f"kernels need a CUDA tensor, or TRITON_INTERPRET=1; the tensors are on {target.name}"
    if target.is_cuda and torch.version.hip and target.name not in known_devices():
        return f"{target.name} runs on ROCm; kernels are written for NVIDIA GPUs"
    if target.is_cuda and target.sm < 80:
        return f"{target.name} is sm_{target.sm}; kernels need sm_80 or later"
    if dtype not in KERNEL_DTYPES:
        return f"{dtype} is not one of float32, float16, bfloat16"
    if not triton_importable():
        return "triton is not installed"
    return None


@functools.cache
def triton_importable() -> bool:
    """Whether a triton that has what the kernels use can be imported here."""
    try:
        import triton.tools.tensor_descriptor  # noqa: F401  (absent before 3.4)
    except Exception:  # a broken installation raises more than ImportError
        return False
    return True


def choose_step(
    step: str,
    target: Target,
    dtype: torch.dtype,
    backend: str,
    ours: tuple[int, int] = (0, 1),
    theirs: tuple[int, int] = (0, 1),
) -> Choice:
    """Chooses for a step that only moves bytes (pooling, folding, addition, stem, head).

    Args:
        step: the realisation's name if a kernel runs.
        ours, theirs: ``(bytes through device memory, launches)`` of our kernels and of the library's.

    Raises:
        RuntimeError: ``use_backend("triton")`` is in force and no kernel can run.
    """
    reason = refusal(target, dtype)
    limit = "hbm" if target.is_cuda else ""
    if backend == "triton":
        if reason:
            raise RuntimeError(f"use_backend('triton') cannot run {step}: {reason}. Use use_backend('auto').")
        return Choice(step, None, "use_backend('triton')", _moving_us(ours, target), limit=limit)
    library = library_of(target)
    library_us = _moving_us(theirs, target)
    if backend == "cudnn":
        return Choice(library, None, "use_backend('cudnn')", library_us, limit=limit)
    our_us = _moving_us(ours, target)
    if reason or our_us is None or library_us is None:
        return Choice(library, None, reason or "the interpreter runs only under use_backend('triton')")
    text = f"unmeasured; predicted {our_us:.1f} us (hbm) against {library_us:.1f} us by {library}"
    if our_us <= CLEAR_WIN * library_us:
        return Choice(step, None, text, our_us, limit=limit)
    return Choice(library, None, text, library_us, limit=limit)


def _moving_us(work: tuple[int, int], target: Target) -> float | None:
    moved, launches = work
    return cost.memory_us(moved, target, launches)


def choose_conv(
    shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, target: Target, backend: str
) -> Choice:
    """Chooses how one convolution with its epilogue runs.

    With ``RESNET_TRITON_AUTOTUNE=1``, one that was not measured on this GPU is measured first (not by ``explain``).

    Raises:
        RuntimeError: ``use_backend("triton")`` is in force and no kernel can run.
    """
    choice = _choose_conv(shape, epilogue, dtype, precision, target, backend)
    if (
        AUTOTUNE
        and not _quiet
        and choice.measured_us is None
        and choice.predicted_us is not None
        and backend != "cudnn"
    ):
        from .tune import tune_now

        if tune_now(shape, epilogue, dtype, precision, target):
            forget()
            return _choose_conv(shape, epilogue, dtype, precision, target, backend)
    return choice


#: Called when choices have to be made anew.
CLEARED: list[Callable[[], None]] = []


def forget() -> None:
    """Reads tuned files and chooses anew from here on."""
    tuning.forget()
    _clear()


def _clear() -> None:
    _choose_conv.cache_clear()
    _choose_stem_pool.cache_clear()
    for clear in CLEARED:
        clear()


@functools.lru_cache(maxsize=4096)
def _choose_conv(
    shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, target: Target, backend: str
) -> Choice:
    library = library_of(target)
    reason = refusal(target, dtype)
    if backend == "triton" and reason:
        raise RuntimeError(f"use_backend('triton') cannot run {shape}: {reason}. Use use_backend('auto').")
    if backend == "triton" and not target.is_cuda:
        config = own_config(shape, epilogue, dtype, precision, target)
        return Choice(config.kernel, config, "use_backend('triton') in the interpreter")
    if not target.is_cuda:
        return _choose_cpu(epilogue, dtype, target, backend)
    if reason:  # such as fp64, for which the target has no rate
        return Choice(library, None, reason)
    unfused = cost.predict_unfused(shape, epilogue, dtype, precision, target)
    theirs = unfused.us
    if backend == "cudnn":
        return Choice(library, None, "use_backend('cudnn')", theirs, limit=unfused.limit)

    def fits(config: ConvConfig) -> bool:
        return epilogue.runs_in(config) and cost.fits(config, shape, dtype.itemsize, epilogue.residual, target)

    entry = tuning.lookup(target.name, shape, dtype, epilogue.residual, precision)
    if entry and fits(entry.config):
        text = f"measured {entry.us:.1f} us against {entry.library_us:.1f} us by {library}"
        if entry.shape.n != shape.n:
            text += f" at batch {entry.shape.n}"
        if backend == "triton" or entry.us <= entry.library_us:
            limit = cost.predict(shape, epilogue, entry.config, dtype, precision, target).limit
            return Choice(entry.config.kernel, entry.config, text, None, entry.us, limit)
        return Choice(library, None, text, None, entry.library_us, unfused.limit)
    name, entry = tuning.lookup_sibling(target, shape, dtype, epilogue.residual, precision) or ("", None)
    if entry and fits(entry.config):
        config = entry.config
        ours = cost.predict(shape, epilogue, config, dtype, precision, target)
        text = f"unmeasured here; {entry.us:.1f} us against {entry.library_us:.1f} us by {library} on {name}"
        win = entry.us <= CLEAR_WIN * entry.library_us
        warn_borrowed(target, name, shape, dtype, precision)
    else:
        config = own_config(shape, epilogue, dtype, precision, target)
        ours = cost.predict(shape, epilogue, config, dtype, precision, target)
        text = f"unmeasured; predicted {ours.us:.1f} us ({ours.limit}) against {theirs:.1f} us by {library}"
        win = ours.us <= CLEAR_WIN * theirs
        if win:
            warn_unmeasured(target, shape, dtype, precision)
    if backend == "triton":
        return Choice(config.kernel, config, f"use_backend('triton'); {text}", ours.us, limit=ours.limit)
    size = dtype.itemsize
    one_pass = cost.predict_unfused(shape, epilogue, dtype, precision, target, one_pass=True)
    behind = cost.passes_us(shape, epilogue, size, target)
    shorter = cost.passes_us(shape, epilogue, size, target, one_pass=True) <= CLEAR_WIN * behind
    if win and not (shorter and one_pass.us < ours.us):
        return Choice(config.kernel, config, text, ours.us, limit=ours.limit)
    if shorter:
        text += f", {one_pass.us:.1f} us with one pass behind it"
        return Choice(ONE_PASS, None, text, one_pass.us, limit=one_pass.limit)
    return Choice(library, None, text, theirs, limit=unfused.limit)


def postpones_bn(
    project: tuple[ConvShape, Epilogue],
    last: tuple[ConvShape, Epilogue],
    dtype: torch.dtype,
    precision: str,
    target: Target,
    backend: str,
) -> bool:
    """Whether a projection shortcut is the library's and its BN is left to the kernel that adds it.

    Args:
        project, last: shapes and epilogues of the projection and of the convolution to which it is added.
        dtype, precision, target, backend: as in :func:`choose_conv`.
    """
    if not target.is_cuda or backend == "cudnn" or dtype.itemsize != 2 or not (project[1].bn or project[1].bias):
        return False  # in fp32 the kernel would spill
    theirs, ours = (choose_conv(*site, dtype, precision, target, backend) for site in (project, last))
    return theirs.realisation == library_of(target) and ours.realisation == "conv1x1" and ours.tiling.split == 1


def conv_bytes(shape: ConvShape, epilogue: Epilogue, choice: Choice, itemsize: int) -> int:
    """Bytes through device memory of a convolution as chosen."""
    if choice.realisation == ONE_PASS:
        return cost.unfused_bytes(shape, epilogue, itemsize, one_pass=True)
    if not choice.fused and choice.realisation != "onednn":
        return cost.unfused_bytes(shape, epilogue, itemsize)
    moved = shape.bytes_moved(itemsize, epilogue.residual)
    return moved + (cost.workspace_bytes(choice.config, shape) if choice.config else 0)


def choose_stem(
    shape: ConvShape,
    epilogue: Epilogue,
    dtype: torch.dtype,
    target: Target,
    backend: str,
    precision: str = "tf32",
    pool: bool = False,
) -> Choice:
    """Chooses how the 7x7/2 stem convolution runs: space-to-depth pass and 4x4 convolution, or the library.

    With ``pool``, the ``"stem_pool"`` kernel is a choice too, which computes the max-pool behind it as well.
    """
    size = dtype.itemsize
    passes = 1 + epilogue.bn + epilogue.relu
    theirs = (cost.unfused_bytes(shape, epilogue, size), passes)
    choice = choose_step("stem", target, dtype, backend, (cost.stem_bytes(shape, size), 4), theirs)
    if choice.fused:
        from .kernels.stem import stem_config

        tma = target.tma and tensor_cores(dtype, precision)
        choice = replace(choice, config=stem_config(shape.n, shape.p, shape.q, shape.k, size, tma))
    return _choose_stem_pool(shape, dtype, target, backend, choice) if pool else choice


@functools.lru_cache(maxsize=1024)
def _choose_stem_pool(shape: ConvShape, dtype: torch.dtype, target: Target, backend: str, apart: Choice) -> Choice:
    """The stem with its max-pool in one kernel where that is predicted to be faster than ``apart`` and a max-pool."""
    if backend == "cudnn" or refusal(target, dtype):
        return apart
    why = _why_stem_apart(shape, dtype, target)
    if why:
        return replace(apart, reason=f"{apart.reason}; the max-pool is a step of its own: {why}")
    from .kernels.stem_pool import stem_pool_configs

    configs = stem_pool_configs(shape.p, shape.k, dtype.itemsize)
    if not target.is_cuda:
        return Choice("stem_pool", configs[0], apart.reason) if apart.fused else apart
    config = min(configs, key=lambda config: cost.predict_stem_pool(shape, config, dtype, target).us)
    ours = cost.predict_stem_pool(shape, config, dtype, target)
    behind = choose_pool(shape.m * shape.k, cost.pooled_size(shape), dtype, target, backend)
    theirs = (apart.predicted_us or 0.0) + (behind.predicted_us or 0.0)
    text = f"predicted {ours.us:.1f} us ({ours.limit}) in one kernel with the max-pool, {theirs:.1f} us apart"
    if ours.us > theirs * (1.0 if apart.fused else CLEAR_WIN):
        return replace(apart, reason=f"{apart.reason}; {text}")
    forced = "use_backend('triton'); " if backend == "triton" else ""
    return Choice("stem_pool", config, f"{forced}unmeasured; {text}", ours.us, limit=ours.limit)


_no_overlap: set[str] = set()


def refuses_overlap(target: Target, error: RuntimeError) -> bool:
    """Whether an error says that the driver refuses ``stem_pool``'s tensor map, whose rows overlap.

    That is said once, and the kernel is not planned on this device again.
    """
    if "invalid argument" not in str(error) or target.name in _no_overlap:
        return False
    _no_overlap.add(target.name)
    _clear()
    logger.warning("%s: %s (%s); they run one after the other", target.name, NO_OVERLAP, error)
    return True


def _why_stem_apart(shape: ConvShape, dtype: torch.dtype, target: Target) -> str | None:
    """Why one kernel cannot compute the stem with its max-pool, or None."""
    if not target.tma:
        return "one kernel for both needs a tensor memory accelerator"
    if target.sm >= 100:
        return f"one kernel for both was fitted to the registers of sm_90, this is sm_{target.sm}"
    if target.name in _no_overlap:
        return NO_OVERLAP
    if dtype == torch.float32:
        return "one kernel for both has no room for fp32 in its registers"
    if shape.k > 64:
        return f"one kernel for both has room for 64 filters in its registers, these are {shape.k}"
    return None


def choose_pool(inputs: int, outputs: int, dtype: torch.dtype, target: Target, backend: str) -> Choice:
    """Chooses how a max-pool runs that reads and writes so many elements."""
    return choose_step("max_pool", target, dtype, backend, *pool_work(inputs, outputs, dtype.itemsize))


def pool_work(inputs: int, outputs: int, itemsize: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Bytes and launches of a max-pool: ours, and PyTorch's, which also stores an int64 index per value."""
    moved = (inputs + outputs) * itemsize
    return (moved, 1), (moved + 8 * outputs, 1)


def choose_head(n: int, c: int, k: int, dtype: torch.dtype, target: Target, backend: str, pixels: int = 49) -> Choice:
    """Chooses how global average pool (over ``pixels``; none of one) and fully connected layer run."""
    work = (cost.head_bytes(n, c, k, pixels, dtype.itemsize), 1 + (pixels > 1))
    choice = choose_step("head", target, dtype, backend, work, work)
    if not choice.fused:
        return choice
    from .kernels.head import head_config

    return replace(choice, config=head_config(n, c, k, dtype.itemsize, target.tma))


def tensor_cores(dtype: torch.dtype, precision: str) -> bool:
    """Whether a product of this dtype runs on tensor cores: everything but exact fp32."""
    return dtype != torch.float32 or precision != "ieee"


def own_configs(shape: ConvShape, dtype: torch.dtype, precision: str, target: Target) -> list[ConvConfig]:
    """The configurations of this package's kernels that need no measurement: they fit and do not spill."""
    tma = target.tma and tensor_cores(dtype, precision)
    configs = alternatives(shape, dtype.itemsize, tma, target.multiprocessors)
    if target.sm >= 90:
        configs += small_grid_configs(configs[0], shape, target.multiprocessors)
    if target.sm >= 100:  # 128x128 tiles of four warps spill there, without tensor cores any wider than 32
        widest = 128 if tensor_cores(dtype, precision) else 32
        # a rolling convolution would move its accumulators between tensor memory and registers at every step
        tiled = [config for config in configs if config.kernel not in ROLLING_KERNELS]
        # 256x128 pixels and filters, in this order, spill there; conv_tma has the filters first
        tiled = [config for config in tiled if config.kernel != "conv1x1" or config.bm <= 128]
        configs = [replace(config, warps=8, bn=min(config.bn, widest)) for config in tiled]
    return configs


def own_config(shape: ConvShape, epilogue: Epilogue, dtype: torch.dtype, precision: str, target: Target) -> ConvConfig:
    """Of :func:`own_configs`, the one that is predicted fastest (without a GPU, the first)."""
    configs = [config for config in own_configs(shape, dtype, precision, target) if epilogue.runs_in(config)]
    if not target.is_cuda:
        return configs[0]
    return min(configs, key=lambda config: cost.predict(shape, epilogue, config, dtype, precision, target).us)


def _choose_cpu(epilogue: Epilogue, dtype: torch.dtype, target: Target, backend: str) -> Choice:
    if target.name not in ("cpu", "interpreter"):
        return Choice("aten", None, refusal(target, dtype) or "")
    if epilogue.prelu:
        return Choice("aten", None, "use_backend('cudnn')" if backend == "cudnn" else "oneDNN does not fuse PReLU")
    if backend == "auto" and not epilogue.bn and dtype in (torch.float32, torch.bfloat16) and onednn.available():
        return Choice("onednn", None, "BN is folded: bias, add and ReLU run as oneDNN post-ops")
    if epilogue.bn:
        return Choice("aten", None, "BN is not folded; resnet_triton.fold(model) fuses it on the CPU")
    return Choice("aten", None, "use_backend('cudnn')" if backend == "cudnn" else f"oneDNN does not fuse {dtype}")


_warned: set[tuple[str, str]] = set()
_quiet = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, nothing is said about missing measurements, nor measured: the caller is about to."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before
        _clear()


def _warn_once(kind: str, target: Target, text: str) -> None:
    if (kind, target.name) not in _warned and not (AUTOTUNE or _quiet):
        _warned.add((kind, target.name))
        logger.warning("%s", text)


def tune_command(batch: int, dtype: torch.dtype, precision: str, train: bool = False) -> str:
    """The command that measures a model's convolutions, or its steps of training, at this batch, dtype, precision."""
    exact = " --precision ieee" if dtype == torch.float32 and precision == "ieee" else ""
    return (
        f"resnet-triton tune --model resnet50{' --train' * train} --batch {batch} --dtype {DTYPE_NAMES[dtype]}{exact}"
    )


def warn_unmeasured(target: Target, shape: ConvShape, dtype: torch.dtype, precision: str) -> None:
    """Says once per device that its plan rests on predictions."""
    _warn_once(
        "unmeasured",
        target,
        f"no measured configurations for some convolutions on {target.name}: the cost model chooses there. "
        f"`{tune_command(shape.n, dtype, precision)}` measures them (put your model in place of resnet50).",
    )


def warn_borrowed(
    target: Target, name: str, shape: ConvShape, dtype: torch.dtype, precision: str, train: bool = False
) -> None:
    """Says once per device that its plan, or that of training, rests on another device's measurements."""
    what, command = "steps of training" if train else "convolutions", tune_command(shape.n, dtype, precision, train)
    _warn_once(
        f"borrowed {what}",
        target,
        f"no measured configurations for some {what} on {target.name}: those of {name} (also sm_{target.sm}) "
        f"serve. `{command}` measures them here (put your model in place of resnet50).",
    )

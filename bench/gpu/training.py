"""Training on a visit to a GPU: what is checked and timed, in the order of its worth; :mod:`.training_run` does it.

Checked: every distinct step with products of ResNet-50 and -18 on our kernels, every kernel in every dtype, gradients
of whole networks in both forms, repeats, a captured step. Timed: networks with their peers, and each step beside what
PyTorch runs instead.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch

from bench.training import TrainGroup
from bench.training_layers import all_steps, configs_by_kernel, one_each, title, works
from resnet_triton.devices import Target
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.training.plan import Work

from .check import torch_dtype
from .rows import Row

HANDLER = "bench.gpu.training_run:run_row"
BATCH, CHECKED_BATCH = 256, 32
PEER = ("torch.compile max-autotune",)  # compiles for minutes
#: Networks without the slow peer, and with it; the latter's rows replace the former's.
QUICK = tuple(TrainGroup("cuda", f"resnet{depth}", BATCH, 224, ("bfloat16",), 6, PEER) for depth in (50, 18))
SLOW = tuple(TrainGroup("cuda", f"resnet{depth}", BATCH, 224, ("bfloat16",), 8) for depth in (50, 18))
DEEP = tuple(TrainGroup("cuda", f"resnet{depth}", BATCH, 224, ("bfloat16",), 6, PEER) for depth in (101, 34, 152))
NETWORK_S, PEER_S, STEP_S = 240.0, 540.0, 60.0
#: Kernels that a training step of a network of bottlenecks launches in the Gram form and in the stored one.
BOTH_FORMS = ("conv_stats", "finalise", "dgrad", "wgrad", "bn_relu_pool", "bn_relu_pool_backward")
FORMS = {"gram": (*BOTH_FORMS, "expand", "gram_dgrad"), "stored": (*BOTH_FORMS, "bn_apply")}


def check_rows(target: Target) -> list[Row]:
    """Every check at full size for a CUDA target; none where no training kernel runs."""
    if not target.tma:
        return []
    found = [_model(50, "bfloat16", 16, 224, memory) for memory in FORMS]
    found += [_step(work, config, "bfloat16") for work, config in all_steps(target, CHECKED_BATCH)]
    found += [_model(18, "bfloat16", 16, 224, "auto"), _model(50, "float16", 16, 224, "gram"), _graph()]
    for dtype in ("float16", "tf32", "ieee"):
        found += [_step(work, config, dtype) for work, config in _each(target, dtype)]
    found.append(_model(50, "tf32", 16, 224, "stored"))
    return found


def sanitizer_rows(target: Target) -> list[Row]:
    """One small case for each training kernel, and a network of four blocks in both forms."""
    if not target.tma:
        return []
    found = [_step(work, config, "bfloat16") for work, config in _small(target)]
    return found + [_model(4, "bfloat16", 4, 64, memory) for memory in FORMS]


def dry_rows() -> list[Row]:
    """The same kinds of checks at sizes for Triton's interpreter; gradients of a network in PyTorch's operators."""
    found = [_step(work, config, "float16") for work, config in _tiny()]
    found.append(_model(4, "bfloat16", 8, 32, "gram", backend="auto"))
    return [Row(r.key, r.kernel, r.config, r.limit_s, {**r.payload, "device": "cpu"}) for r in found]


def timed_rows(target: Target) -> list[Row]:
    """Networks and single steps to time."""
    if not target.tma:
        return [network_row(group) for group in (*QUICK, *DEEP)]
    steps = [_timed(work, config) for work, config in all_steps(target, BATCH)]
    quick, slow, deep = ([network_row(group) for group in groups] for groups in (QUICK, SLOW, DEEP))
    return [quick[0], *steps[:40], slow[0], quick[1], *steps[40:], *deep, slow[1]]


def dry_timed_rows() -> list[Row]:
    """A tiny network on the CPU."""
    return [network_row(TrainGroup("cpu", "resnet18", 4, 32, ("float32",), 0.0, ('ours memory="gram"',)))]


def network_row(group: TrainGroup) -> Row:
    """One group of providers."""
    slow = group.device == "cuda" and not group.leave_out
    key = f"train {group.name}{' with torch.compile' if slow else ''}"
    return Row(key, "all", "plan", PEER_S if slow else NETWORK_S, {"what": "network", "group": asdict(group)})


def _timed(work: Work, config: ConvConfig) -> Row:
    payload = {"what": "step", "work": asdict(work), "config": config.to_dict()}
    return Row(f"train {title(work)} {config.kernel}", config.kernel, str(config), STEP_S, payload)


def _step(work: Work, config: ConvConfig, dtype: str) -> Row:
    payload: dict[str, Any] = {"what": "train step", "work": asdict(work), "config": config.to_dict(), "dtype": dtype}
    key = f"training {title(work)} {dtype} {config.kernel} {config}"
    return Row(key, config.kernel, str(config), STEP_S, payload)


def _model(depth: int, dtype: str, batch: int, size: int, memory: str, backend: str = "triton") -> Row:
    payload: dict[str, Any] = {"what": "train model", "depth": depth, "dtype": dtype, "batch": batch, "size": size}
    payload |= {"memory": memory, "backend": backend, "kernels": FORMS.get(memory, BOTH_FORMS)}
    if backend != "triton":
        payload["kernels"] = ()
    return Row(f"gradients of resnet{depth} {batch}x{size} {dtype} {memory}", "all", "plan", 180, payload)


def _graph() -> Row:
    payload = {"what": "train graph", "depth": 50, "dtype": "bfloat16", "batch": 16, "size": 224}
    return Row("CUDA graph of a training step of resnet50 16x224 bfloat16", "all", "plan", 180, payload)


def _each(target: Target, dtype: str) -> list[tuple[Work, ConvConfig]]:
    """One step for each kernel, in another dtype."""
    kind, precision = torch_dtype(dtype), dtype if dtype == "ieee" else "tf32"
    chosen: dict[tuple[str, str], tuple[Work, ConvConfig]] = {}
    for work in works("resnet50", CHECKED_BATCH):
        for kernel, config in configs_by_kernel(work, target, kind, precision).items():
            chosen.setdefault((work.step, kernel), (work, config))
    return list(chosen.values())


def _small(target: Target) -> list[tuple[Work, ConvConfig]]:
    """The steps of :func:`one_each` on few pixels."""
    found = []
    for full, config in one_each(target, CHECKED_BATCH):
        assert full.shape is not None
        shape = replace(full.shape, n=2, h=min(full.shape.h, 28), w=min(full.shape.w, 28))
        stride = full.project.stride if full.project else 1
        project = full.project and replace(full.project, n=2, h=shape.h * stride, w=shape.w * stride)
        work = replace(full, shape=shape, project=project)
        found.append((work, configs_by_kernel(work, target).get(config.kernel, config)))
    return found


def _tiny() -> list[tuple[Work, ConvConfig]]:
    """A step of each kind for the interpreter."""
    square, flat = ConvShape(2, 6, 6, 16, 16, 3, 3, 1, 1), ConvShape(2, 6, 6, 16, 32)
    tiny = [
        Work("conv_stats", square, prologue=True, moments=True),
        Work("dgrad", square, prologue=True, moments=True),
        Work("wgrad", flat, prologue=True, moments=True),
        Work("gram", ConvShape(2, 6, 6, 16, 16), prologue=True),
        Work("expand", flat, prologue=True),
        Work("gram_dgrad", flat, prologue=True),
    ]
    target = Target("interpreter")
    return [(w, c) for w in tiny for c in configs_by_kernel(w, target, torch.float16).values()]

"""Checks one result of training, or times one network or step; :mod:`.training` says which."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import resnet_triton
from bench.training import OURS_LIMIT, Judge, TrainGroup, build_model, measure, worst_of
from bench.training_layers import Beside, measured_rows
from bench.training_providers import GraphedStep, Step
from resnet_triton.backend import use_backend
from resnet_triton.devices import target_of
from resnet_triton.journal import Journal
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.models import Bottleneck, ResNet
from resnet_triton.results import FAILED, WRONG, device_name, environment
from resnet_triton.training.plan import Work

from .check import torch_dtype
from .operands import Result


def run_row(row: dict[str, Any], journal: Journal) -> Result:
    """Handler of a timed row: its ``rows`` for the tables, and the ``environment`` of a network's."""
    payload = row["payload"]
    if payload["what"] == "step":
        work, config = work_of(payload["work"]), ConvConfig.from_dict(payload["config"])
        found = measured_rows(work, config, device_name(), target_of("cuda"))
    else:
        group = TrainGroup(**{**payload["group"], "dtypes": tuple(payload["group"]["dtypes"])})
        found = list(measure(group).values())
    bad = [r for r in found if r.provider.startswith("ours") and r.status.startswith((WRONG, FAILED))]
    status, detail = ("wrong", "; ".join(f"{r.provider}: {r.status}" for r in bad)) if bad else ("ok", "")
    return {"status": status, "detail": detail, "rows": [asdict(r) for r in found], "environment": environment()}


def work_of(data: dict[str, Any]) -> Work:
    """Inverse of ``dataclasses.asdict``."""
    shapes = {name: data[name] and ConvShape(**data[name]) for name in ("shape", "project")}
    return Work(**{**data, **shapes})


def check_step(work: dict, config: dict, dtype: str, device: str) -> Result:
    """A step with products on our kernel, against float64, beside PyTorch's; twice, bit for bit the same."""
    chosen = ConvConfig.from_dict(config)
    with use_backend("triton"):
        problem = Beside(work_of(work), torch_dtype(dtype), device, sets=1)
        with launching((chosen.kernel,)):
            wrong, mine, library = problem.errors_of(chosen)
        first = [out.clone() for out in problem.run_ours(chosen)]
        same = all(map(torch.equal, first, problem.run_ours(chosen)))
    if not wrong and not same:
        wrong = "a second run differs from the first"
    ratio = mine.l2 / library.l2 if library.l2 else float(mine.l2 > 0)
    result = {"error": mine.l2, "library_error": library.l2, "ratio": round(ratio, 3)}
    return {"status": "wrong" if wrong else "ok", "detail": wrong or "", **result}


@contextlib.contextmanager
def launching(kernels: Sequence[str]) -> Iterator[None]:
    """Within the block, every one of these kernels must be launched.

    Raises:
        AssertionError: at its end, naming those that were not.
    """
    from resnet_triton.kernels.launch import COUNTS

    before = dict(COUNTS)
    yield
    missing = [name for name in kernels if COUNTS[name] == before.get(name, 0)]
    if missing:
        raise AssertionError(f"not launched: {', '.join(missing)}")


def network(depth: int) -> nn.Module:
    """A ResNet by depth; 4 is one bottleneck a stage."""
    return build_model(f"resnet{depth}") if depth > 4 else ResNet(Bottleneck, (1, 1, 1, 1), num_classes=10)


def _problem(depth: int, batch: int, size: int, device: str) -> tuple[nn.Module, Tensor]:
    model = copy.deepcopy(network(depth)).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    return model, x


def check_model(
    depth: int, dtype: str, batch: int, size: int, memory: str, backend: str, kernels: Sequence[str], device: str
) -> Result:
    """Every gradient of a network against float64, beside eager's; a second step gives the same bits."""
    model, x = _problem(depth, batch, size, device)
    kind = torch_dtype(dtype)
    judge = Judge(model, x)
    eager = Step(copy.deepcopy(model), x, kind)
    eager()
    theirs = judge.errors(eager.gradients())
    step = Step(resnet_triton.convert(copy.deepcopy(model)), x, kind, memory=memory, backend=backend)
    with launching(kernels):
        step()
    mine = judge.errors(step.gradients())
    first = {name: g.clone() for name, g in step.gradients().items()}
    step()
    name, ratio = worst_of(mine, theirs, kind)
    wrong = "" if ratio <= OURS_LIMIT else f"gradient of {name}: {ratio:.2f}x eager's error"
    if not all(torch.equal(g, first[name]) for name, g in step.gradients().items()):
        wrong = wrong or "a second step gives other gradients"
    detail = wrong or f"worst gradient {name}: {ratio:.2f}x eager's error"
    result = {"error": mine[0], "library_error": theirs[0], "ratio": round(mine[0] / theirs[0], 3)}
    return {"status": "wrong" if wrong else "ok", "detail": detail, **result}


def check_graph(depth: int, dtype: str, batch: int, size: int, device: str) -> Result:
    """Replays of a captured step give, bit by bit, the gradients of the step itself, for other images than captured."""
    model, x = _problem(depth, batch, size, device)
    kind = torch_dtype(dtype)
    step = Step(resnet_triton.convert(copy.deepcopy(model)), x, kind, backend="triton")
    captured = GraphedStep(resnet_triton.convert(copy.deepcopy(model)), x, kind, backend="triton")
    for i in range(3):
        images = torch.randn_like(x)
        step.x = captured.images = images
        step()
        captured()
        theirs = step.gradients()
        if not all(torch.equal(g, theirs[name]) for name, g in captured.gradients().items()):
            return {"status": "wrong", "detail": f"replay {i + 1} differs from the step itself"}
    return {"status": "ok", "detail": "3 replays bitwise equal"}


CHECKS: dict[str, Callable[..., Result]] = {
    "train step": check_step,
    "train model": check_model,
    "train graph": check_graph,
}

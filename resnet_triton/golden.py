"""Whether a program's machine code is good, and no worse than the figures that ``tests/codegen/golden.json`` keeps."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import triton

from .codegen import SHARED_LIMIT, Case, Metrics, arguments, compile_case
from .kernels.config import END_KERNELS, KERNELS, WGRAD_KERNELS
from .kernels.geometry import ChainShape

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "codegen" / "golden.json"
PRESSURE_BOUND = 0.7  # of TMA kernels of one convolution whose tile needs the tensor cores longer than device memory
ROOF_BOUND = 1.0  # of all
LOOP_GOAL = 0.6  # of a training kernel's loops; the page says why the others have more
#: Golden figures that begin with one of these are instructions.
PRESSURES = ("issue", "loop")
#: Changes of the golden figures that are noise: registers, bytes of shared memory, and the share of the issue figures.
REGISTER_TOLERANCE, SHARED_TOLERANCE, ISSUE_TOLERANCE = 8, 1024, 0.05
ACCEPT = "to accept: `python -m resnet_triton.aot --golden`, then commit tests/codegen/golden.json"


def problems(case: Case, metrics: Metrics) -> list[str]:
    """What is wrong with a case, in words; empty if nothing is."""
    found = []
    if metrics.spill_bytes or metrics.local_accesses:
        found.append(f"spills {metrics.spill_bytes} bytes ({metrics.local_accesses} accesses to local memory)")
    if metrics.shared_bytes > SHARED_LIMIT[case.sm]:
        found.append(f"needs {metrics.shared_bytes} bytes of shared memory, the limit is {SHARED_LIMIT[case.sm]}")
    if case.config and case.kernel != "conv_pointer":
        if not metrics.tma_loads:
            found.append("loads without TMA")
        if not (metrics.tma_stores or _scatters(case)):
            found.append("stores without TMA")
    if case.config and not case.tensor_cores:  # its multiply-adds alone fill the issue slots
        return found if metrics.ffma else [*found, "has no FFMA"]
    compiled = compile_case(case)
    if case.config and not compiled.listing.count(_expected_opcode(case)):
        found.append(f"has no {_expected_opcode(case)}")
    if compiled.repeats > 1 and _wide(case):
        found.append(f"computes products {compiled.repeats} times: fewer warps, or a larger tile")
    if metrics.tensor_bound and case.kernel in KERNELS and case.kernel != "conv_pointer":
        found += _beyond(metrics.pressure, PRESSURE_BOUND, "pressure")
    if case.small_products or (case.training and not case.config and metrics.limit == "launch"):  # once a layer
        return found
    return found + _beyond(metrics.issue_over_roof, ROOF_BOUND, f"issue/roof ({metrics.limit})")


def heavy_loop(case: Case, metrics: Metrics) -> str | None:
    """Why a loop of a training kernel issues more than :data:`LOOP_GOAL`, in words; None where none does."""
    if not metrics.loops or max(loop.pressure for loop in metrics.loops) <= LOOP_GOAL:
        return None
    if case.small_products:
        return "small matrices, once a layer, which each program fetches, centres and splits for tensor cores"
    assert case.config is not None
    given = arguments(case.launch)
    if not case.tensor_cores:
        return "exact fp32 has no tensor cores"
    if case.dtype == torch.float32:
        return "TF32 operands pass through registers"
    if case.kernel.endswith("_rolling"):
        return "64 channels; what a row does only at the border or at first is counted in all"
    if given.get("R", 1) * given.get("S", 1) == 1:
        return "a 1x1 has few products for what it loads, normalises and stores"
    if case.kernel == "wgrad" and not given["SHIFTED"]:
        return "with stride 2, each tap has an input box of its own, to load and to normalise"
    if min(case.config.bn, given["C"]) < 128:
        return "few channels, so few products for what is done to a box of pixels"
    return "with what bounds the boxes at the border"


def _beyond(value: float | None, bound: float, name: str) -> list[str]:
    return [] if value is None or value < bound else [f"{name} is {value:.2f}, the bound is {bound}"]


def _scatters(case: Case) -> bool:
    """Whether what a kernel stores is no box: averages, fp32 parts, or nothing but every second row and column."""
    shape = case.uses[0].shape
    if case.kernel in WGRAD_KERNELS:
        return True
    subsampled = isinstance(shape, ChainShape) and shape.subsample > 1 and shape.reduce is None
    return subsampled or case.kernel in END_KERNELS


def _expected_opcode(case: Case) -> str:
    """The matrix instruction of an architecture."""
    if case.kernel in WGRAD_KERNELS:  # whose box of pixels is the depth; of fp32, either will do
        return "HGMMA" if case.dtype.itemsize == 2 else "HG?MMA"
    return {90: "HGMMA", 100: r"UTC\w*MMA"}.get(case.sm, "HMMA") if _wide(case) else "HMMA"


def _wide(case: Case) -> bool:
    """Whether a tile has the 64 rows that the matrix instructions of a group of warps need."""
    return case.config is not None and case.config.bm >= 64


def golden_record(metrics: Metrics) -> dict[str, float]:
    """The figures that tests/codegen/golden.json keeps of a case; ``loop 0`` is the pressure of its first loop."""
    issue = metrics.tile_instructions if metrics.pressure is None else metrics.pressure
    return {
        "registers": metrics.registers,
        "spills": metrics.spill_bytes,
        "shared": metrics.shared_bytes,
        "mma": metrics.tensor_core or metrics.ffma,
        "tma_loads": metrics.tma_loads,
        "tma_stores": metrics.tma_stores,
        "issue": round(issue, 3),
        **{f"loop {i}": round(loop.pressure, 3) for i, loop in enumerate(metrics.loops)},
    }


def changes(now: dict[str, float], golden: dict[str, float]) -> dict[str, str]:
    """What differs from the golden figures, in words by name; those beyond the tolerance end in ``(worse)``.

    Fewer or more matrix and TMA instructions are neither better nor worse (:func:`problems` finds none at all).
    """
    bounds: dict[str, float] = {
        "registers": golden["registers"] + REGISTER_TOLERANCE,
        "spills": golden["spills"],
        "shared": golden["shared"] + SHARED_TOLERANCE,
    }
    bounds |= {name: figure * (1 + ISSUE_TOLERANCE) for name, figure in golden.items() if name.startswith(PRESSURES)}
    found = {}
    for name in golden | now:
        before, after = golden.get(name), now.get(name)
        if before is None or after is None:
            found[name] = f"{name} {'appeared' if before is None else 'disappeared'}"
        elif before != after:
            worse = " (worse)" if after > bounds.get(name, after) else ""
            found[name] = f"{name} {before:g} -> {after:g}{worse}"
    return found


def regressions(metrics: Metrics, golden: dict[str, float]) -> list[str]:
    """Golden figures that got worse by more than the tolerance, in words."""
    return [text for text in changes(golden_record(metrics), golden).values() if text.endswith("(worse)")]


def diff(now: dict[str, dict[str, float]], path: Path = GOLDEN, complete: bool = True) -> tuple[list[str], bool]:
    """Lines that say what changed since a golden file, and whether it must be accepted or mended.

    Args:
        now: the record of each case by its name.
        path: of the golden file.
        complete: whether ``now`` holds every case, so that what is missing is gone.

    Raises:
        ValueError: the file is missing or not a golden file.
    """
    try:
        data = json.loads(path.read_text())
        version, golden = data["triton"], data["cases"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no golden file ({error}); `python -m resnet_triton.aot --golden` makes one"
        ) from None
    if version != triton.__version__:
        return [f"not compared: {path.name} is of triton {version}, this is {triton.__version__}"], False
    lines, bad = [], False
    for name, record in now.items():
        if name not in golden:
            lines.append(f"new: {name}")
            bad = True
        elif found := changes(record, golden[name]):
            lines.append(f"{name}: {', '.join(found.values())}")
            bad |= any(text.endswith("(worse)") for text in found.values())
    if complete:
        gone = [name for name in golden if name not in now]
        lines += [f"gone: {name}" for name in gone]
        bad |= bool(gone)
    return lines or [f"nothing changed in {len(now)} programs"], bad

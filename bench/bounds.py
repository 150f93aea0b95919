"""What limits each step of a network on one GPU by the cost model, and what would come next: for the performance page.

Measured times are those of the tuned files that the package ships, so that the page is the same on every machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch

import resnet_triton
from resnet_triton import cost, plan, tuning
from resnet_triton.compare import PREDICT_FOR
from resnet_triton.devices import Target, known_devices
from resnet_triton.explain import Plan, Row, explain, fused_steps
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.steps import Step
from resnet_triton.tables import Table, significant

NETWORKS = (("resnet50", 256), ("resnet18", 256))
SIZE, DTYPE = 224, torch.bfloat16
NOT_MEASURED = "not measured"
AT_ROOF = 0.9  # from this share of the roofline on, only less work makes a step faster
#: What would make a step faster that a resource limits.
NEXT = {
    "hbm": "fewer bytes: results that stay on the chip in a longer chain, or 8-bit activations",
    "l2": "fewer loads of the same data: larger tiles, or clusters of programs that share what they load",
    "shared": "fewer passes of operands through shared memory: larger tiles for a group of warps",
    "tensor": "8-bit products; below the roofline, less padding of tiles and less recomputation at their edges",
    "issue": "fewer instructions beside the products: larger tiles, a shorter epilogue",
}
COLUMNS = ("step", "computes", "runs as", "MB", "predicted us", "limited by", "roofline", "then", "measured us")


@dataclass(frozen=True)
class Bounds:
    """A network's plan, with the prediction of each step that has one.

    Args:
        name, batch: of the network.
        plan: what ``explain`` says.
        predictions: every limit of each step, None where only bytes are counted.
    """

    name: str
    batch: int
    plan: Plan
    predictions: tuple[cost.Prediction | None, ...]

    @property
    def title(self) -> str:
        """Network, batch, dtype and device."""
        return f"{self.name}, batch {self.batch}, {self.plan.dtype}, {self.plan.device}"

    def steps(self) -> Table:
        """A line for each step."""
        lines = [_line(row, prediction) for row, prediction in zip(self.plan.rows, self.predictions, strict=True)]
        return [list(COLUMNS), *lines]

    def limits(self) -> Table:
        """A line for each limit: the time that it takes, what of it is above the roofline, and what would help."""
        table = [["limited by", "steps", "us", "above the roofline, us", "what would come next"]]
        names = {name: [row for row in self.plan.rows if row.limit == name] for name in NEXT}
        for name, rows in sorted(names.items(), key=lambda item: -sum(map(_us, item[1]))):
            if rows:
                above = sum(_us(row) * (1 - (row.roofline or 0.0)) for row in rows)
                total = sum(map(_us, rows))
                table.append([name, str(len(rows)), significant(total), significant(above), NEXT[name]])
        return table

    def text(self) -> str:
        """The sums, and what is measured of them."""
        rows = self.plan.rows
        measured = [row for row in rows if row.measured_us is not None]
        known = f"{len(measured)} of {len(rows)} steps were measured" if measured else "No step of it was measured"
        at_roof = sum((row.roofline or 0.0) >= AT_ROOF for row in rows)
        sums = "Predicted and measured times" if measured else "Predicted times"
        return (
            f"{known}. {sums} add up to {significant((self.plan.predicted_us or 0.0) / 1e3)} ms, without host time; "
            f"{self.plan.bytes_per_image / 1e6:.1f} MB of activations an image and {self.plan.weight_bytes / 1e6:.1f} "
            f"MB of weights pass through device memory. {at_roof} of {len(rows)} steps are within "
            f"{1 - AT_ROOF:.0%} of the roofline."
        )


def _us(row: Row) -> float:
    return row.measured_us or row.predicted_us or 0.0


def _line(row: Row, prediction: cost.Prediction | None) -> list[str]:
    after = ""
    if prediction is not None:
        others = {name: us for name, us in prediction.limits.items() if name != row.limit and us}
        name = max(others, key=others.__getitem__, default=None)
        after = f"{name} {significant(others[name])}" if name else ""
    roof = "" if row.roofline is None else f"{row.roofline:.0%}"
    measured = NOT_MEASURED if row.measured_us is None else significant(row.measured_us)
    moved, predicted = f"{row.bytes / 1e6:.1f}", significant(row.predicted_us)
    return [row.name, row.op, row.realisation, moved, predicted, row.limit, roof, after, measured]


@functools.cache
def bounds() -> tuple[Bounds, ...]:
    """Of each network on an H200."""
    return tuple(_bounds(name, batch) for name, batch in NETWORKS)


def _bounds(name: str, batch: int) -> Bounds:
    with torch.device("meta"):
        model = getattr(resnet_triton, name)().eval().to(DTYPE)
    shape = (batch, 3, SIZE, SIZE)
    with _shipped_only():
        found = explain(model, shape, dtype=DTYPE, device=PREDICT_FOR)
        steps, _ = fused_steps(model, shape, dtype=DTYPE, device=PREDICT_FOR)
    target = known_devices()[PREDICT_FOR]
    return Bounds(name, batch, found, tuple(_prediction(step, target) for _, step in steps))


@contextmanager
def _shipped_only() -> Iterator[None]:
    """Within the block, no tuned file of the user counts, and nothing is said about missing ones."""
    try:
        with patch.object(tuning, "search_path", lambda: [tuning.shipped_dir()]), plan.quiet():
            plan.forget()
            yield
    finally:
        plan.forget()


def _prediction(step: Step, target: Target) -> cost.Prediction | None:
    """All limits of a step, where the cost model knows more than its bytes."""
    config, shape = step.choice.config, step.shape
    if isinstance(shape, ChainShape):
        return cost.predict_chain(shape, step.choice.tiling, DTYPE, "tf32", target)
    if not isinstance(shape, ConvShape) or step.epilogue is None or step.op == "stem":
        return None
    if config is None:
        one_pass = step.choice.realisation == plan.ONE_PASS
        return cost.predict_unfused(shape, step.epilogue, DTYPE, "tf32", target, one_pass)
    if config.kernel == "stem_pool":
        return cost.predict_stem_pool(shape, config, DTYPE, target)
    return cost.predict(shape, step.epilogue, config, DTYPE, "tf32", target)

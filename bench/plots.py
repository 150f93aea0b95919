"""The pictures of ``docs/performance.md``: measured rows as bars, and a roofline with predicted and measured dots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from resnet_triton import cost
from resnet_triton.compare import PREDICT_FOR
from resnet_triton.devices import known_devices
from resnet_triton.kernels.config import alternatives
from resnet_triton.plot import new_figure, save
from resnet_triton.results import OK, Row

from .layers import OURS as OUR_STEP
from .layers import conv_layers

BATCH = 256  # of the roofline's predictions
DTYPE = torch.bfloat16


def measured(rows: Sequence[Row], suite: str) -> list[Row]:
    """Rows of a suite that were timed."""
    return [row for row in rows if row.suite == suite and row.status == OK and row.samples]


def _providers(rows: Sequence[Row]) -> dict[str, str]:
    """A colour for each provider; greens are ours."""
    names = list(dict.fromkeys(row.provider for row in rows))
    greens = iter(("tab:green", "limegreen", "darkgreen", "yellowgreen", "olive"))
    others = iter(("silver", "gray", "tab:blue", "tab:cyan", "tab:purple", "tab:orange"))
    return {name: next(greens if name.startswith("ours") else others) for name in names}


def _legend(figure: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def draw_throughput(rows: Sequence[Row], path: Path) -> None:
    """Images per second by batch and provider, a panel for each network and dtype; whiskers from p20 to p80."""
    rows = measured(rows, "models")
    models, dtypes = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("model", "dtype"))
    colours = _providers(rows)
    figure = new_figure(4.5 * len(dtypes), 0.6 + 2.4 * len(models))
    panels = figure.subplots(len(models), len(dtypes), squeeze=False)
    for model, line in zip(models, panels, strict=True):
        for dtype, axes in zip(dtypes, line, strict=True):
            here = [row for row in rows if (row.model, row.dtype) == (model, dtype)]
            _bars(axes, here, colours)
            axes.set_title(f"{model}, {dtype}", fontsize=9)
            axes.set_ylabel("images/s", fontsize=8)
    _legend(figure, colours)
    save(figure, path)


def _bars(axes: Any, rows: Sequence[Row], colours: dict[str, str]) -> None:
    batches = sorted({row.infer_batch_size or 0 for row in rows})
    width = 0.8 / len(colours)
    for i, (provider, colour) in enumerate(colours.items()):
        for row in (row for row in rows if row.provider == provider):
            batch, speed = row.infer_batch_size or 0, row.infer_samples_per_sec or 0.0
            low, high = (1e3 * batch / ms if ms else speed for ms in (row.step_time_p80, row.step_time_p20))
            place = batches.index(batch) + (i - (len(colours) - 1) / 2) * width
            spread = [[max(0.0, speed - low)], [max(0.0, high - speed)]]
            axes.bar(place, speed, width, color=colour, yerr=spread, error_kw={"linewidth": 0.7})
    axes.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches], fontsize=8)
    axes.tick_params(axis="y", labelsize=7)


def draw_layers(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds of each step by provider, a panel for each dtype; whiskers from p20 to p80."""
    rows = measured(rows, "layers")
    steps, dtypes = (list(dict.fromkeys(getattr(row, name) for row in rows)) for name in ("model", "dtype"))
    colours = _providers(rows)
    figure = new_figure(3 + 4 * len(dtypes), 1.0 + 0.12 * len(steps) * (len(colours) + 1.5))
    panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    height = 0.8 / len(colours)
    for dtype, axes in zip(dtypes, panels, strict=True):
        for i, (provider, colour) in enumerate(colours.items()):
            for row in (row for row in rows if (row.dtype, row.provider) == (dtype, provider)):
                ms = row.infer_step_time or 0.0
                spread = [[ms - (row.step_time_p20 or ms)], [(row.step_time_p80 or ms) - ms]]
                place = steps.index(row.model) + (i - (len(colours) - 1) / 2) * height
                axes.barh(place, ms, height, color=colour, xerr=spread, error_kw={"linewidth": 0.7})
        axes.set_title(dtype, fontsize=9)
        axes.set_xlabel("ms", fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    panels[0].set_yticks(range(len(steps)), steps, fontsize=7)
    panels[0].margins(y=0.02)
    panels[0].invert_yaxis()
    _legend(figure, colours)
    save(figure, path)


def on_roofline(rows: Sequence[Row]) -> list[Row]:
    """Our measured steps on the roofline's device whose rate is known."""
    return [
        row
        for row in measured(rows, "layers")
        if row.device == PREDICT_FOR and row.dtype == "bfloat16" and row.provider == OUR_STEP and row.tflops
    ]


def draw_roofline(rows: Sequence[Row], path: Path) -> None:
    """Each convolution of ResNet-50 below the limits of one GPU: hollow dots predicted, filled ones measured."""
    target = known_devices()[PREDICT_FOR]
    peak, bandwidth = target.tflops(DTYPE, "tf32"), target.hbm_tb_s
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    ends = (8.0, peak / bandwidth, 2000.0)
    axes.plot(ends, [min(peak, x * bandwidth) for x in ends], color="black", linewidth=1)
    axes.annotate(f"{bandwidth:g} TB/s", (12, 12 * bandwidth), ha="right", va="bottom", fontsize=8)
    axes.annotate(f"{peak:g} TFLOP/s", (2000, peak), ha="right", va="bottom", fontsize=8)
    filled = {row.model: row for row in on_roofline(rows)}
    for name, shape, epilogue in _convs(BATCH):
        flop, moved = 2 * shape.macs, shape.bytes_moved(DTYPE.itemsize, epilogue.residual)
        us = min(
            cost.predict(shape, epilogue, config, DTYPE, "tf32", target).us
            for config in alternatives(shape, DTYPE.itemsize, target.tma)
        )
        marker = "o" if shape.pointwise else "s"
        axes.plot(flop / moved, flop / us / 1e6, marker, color="tab:green", fillstyle="none", markersize=5)
        row = filled.get(name)
        if row is not None:
            axes.plot(flop / moved, row.tflops, marker, color="tab:green", markersize=5)
    _explain_markers(axes, bool(filled))
    for axis, scale, ticks in (
        (axes.xaxis, axes.set_xscale, (10, 30, 100, 300, 1000)),
        (axes.yaxis, axes.set_yscale, (50, 100, 200, 400, 800)),
    ):
        scale("log")
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlabel("FLOP per byte through device memory")
    axes.set_ylabel("TFLOP/s")
    kind = "predicted and measured" if filled else "predicted, not measured"
    axes.set_title(f"Convolutions of ResNet-50, batch {BATCH}, bfloat16, {PREDICT_FOR}: {kind}", fontsize=9)
    save(figure, path)


def _convs(batch: int) -> list[tuple[str, Any, Any]]:
    """Name in the layers table, shape and epilogue of each distinct convolution."""
    from resnet_triton.shapes import resnet_convs

    titles = {layer.name for layer in conv_layers(batch)}
    named = ((f"{name} {shape} {epilogue}", shape, epilogue) for name, shape, epilogue in resnet_convs(50, batch))
    return [each for each in named if each[0] in titles]


def _explain_markers(axes: Any, some_measured: bool) -> None:
    from matplotlib.lines import Line2D

    kinds = [("o", "1x1", "none"), ("s", "3x3", "none")]
    texts = [(marker, f"{size}, predicted by the cost model", fill) for marker, size, fill in kinds]
    if some_measured:
        texts += [(marker, f"{size}, measured", "full") for marker, size, _ in kinds]
    handles = [
        Line2D([], [], marker=marker, fillstyle=fill, linestyle="none", color="tab:green", label=text)  # type: ignore[arg-type]
        for marker, text, fill in texts
    ]
    axes.legend(handles=handles, loc="lower right", fontsize=8, frameon=False)

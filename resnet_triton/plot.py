"""Pictures that are the same on every run: a plan as bars, and what other plots of this repository are drawn with."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .explain import Plan, Row

#: Entries of each format that would tell the date or the version of matplotlib.
METADATA: dict[str, dict[str, None]] = {
    ".svg": {"Date": None},
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None},
}
OURS = "this package's kernels"
COLOURS = {OURS: "tab:green", "cudnn": "tab:gray", "onednn": "tab:blue", "aten": "tab:orange"}


def check_path(path: str | PathLike[str]) -> Path:
    """The path of a picture.

    Raises:
        ValueError: for a suffix that is no format of :data:`METADATA`.
    """
    target = Path(path)
    if target.suffix.lower() not in METADATA:
        raise ValueError(f"path {str(path)!r} has suffix {target.suffix!r}; allowed: {', '.join(METADATA)}")
    return target


def new_figure(width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of this many inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | PathLike[str]) -> None:
    """Writes a figure; equal figures give equal files. SVG keeps its text as text.

    Raises:
        ValueError: for an unknown suffix.
        OSError: the file cannot be written.
    """
    import matplotlib

    target = check_path(path)
    with matplotlib.rc_context({"svg.hashsalt": "resnet_triton", "svg.fonttype": "none"}):
        figure.savefig(target, metadata=METADATA[target.suffix.lower()], dpi=120)


def plot_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Draws a plan: bytes of each step and, where known, its time with the resource that limits it.

    Args:
        plan: what ``explain`` returned.
        path: a ``.svg``, ``.png`` or ``.pdf`` file.

    Raises:
        ImportError: without matplotlib.
        ValueError: for an unknown suffix.
        OSError: the file cannot be written.
    """
    check_path(path)
    timed = plan.predicted_us is not None
    figure = new_figure(14 if timed else 10, 1.5 + 0.18 * len(plan.rows))
    panels = figure.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    places = range(len(plan.rows))
    runners = [_runner(row) for row in plan.rows]
    colours = [COLOURS[runner] for runner in runners]
    # numbers and not names as places: steps of one module may have one name
    panels[0].barh(places, [row.bytes / 1e6 for row in plan.rows], color=colours)
    panels[0].set_yticks(places, [f"{row.name} {row.op}" for row in plan.rows], fontsize=6)
    panels[0].set_xlabel("MB through memory")
    panels[0].margins(y=0.01)
    panels[0].invert_yaxis()
    if timed:
        _draw_times(panels[1], plan.rows, colours)
    handles = [_swatch(runner) for runner in dict.fromkeys(runners)]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles) or 1, frameon=False)
    images = " x ".join(map(str, plan.input_shape))
    figure.suptitle(f"{images} {plan.dtype} on {plan.device}", x=0.01, ha="left")
    save(figure, path)


def _runner(row: Row) -> str:
    return row.realisation if row.realisation in COLOURS else OURS


def _swatch(runner: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=COLOURS[runner], label=runner)


def _draw_times(axes: Any, rows: tuple[Row, ...], colours: list[str]) -> None:
    """Measured times in full colour, predicted ones pale, each with its limit where that is known."""
    times = [row.predicted_us if row.measured_us is None else row.measured_us for row in rows]
    measured = any(row.measured_us is not None for row in rows)
    predicted = any(row.measured_us is None and row.predicted_us is not None for row in rows)
    for place, (row, us, colour) in enumerate(zip(rows, times, colours, strict=True)):
        if us is None:
            continue
        axes.barh(place, us, color=colour, alpha=0.5 if row.measured_us is None else 1.0)
        axes.annotate(row.limit, (us, place), xytext=(2, 0), textcoords="offset points", va="center", fontsize=5)
    kind = "predicted, not measured" if not measured else "measured; pale: predicted" if predicted else "measured"
    axes.set_xlabel(f"microseconds ({kind}) and the limiting resource")

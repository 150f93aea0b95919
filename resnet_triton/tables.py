"""Rows as tables of text: the columns of a comparison of networks, and how cells are printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .results import OK, Row

#: Share of the cores that other processes may take while a row is timed before a table says so.
DISTURBED = 0.05

Column = tuple[str, Callable[[Row], str]]
Table = list[list[str]]


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def significant(value: float | None) -> str:
    """Three figures, never in exponents: 0.042, 4.13, 27.5, 1,204."""
    if value is None:
        return ""
    digits = 3 if value < 0.1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _spread(row: Row) -> str:
    if row.infer_step_time is None:
        return ""
    return f"{significant(row.step_time_p20)}-{significant(row.step_time_p80)}"


def _speed(row: Row) -> str:
    """Images per second, or why there are none."""
    return significant(row.infer_samples_per_sec) if row.status == OK else why(row)


def why(row: Row) -> str:
    """Why a row has no number, with the prediction if it has one."""
    text = row.status
    if row.predicted_step_time is not None:
        text += f"; predicted {significant(row.predicted_step_time)} ms on {row.predicted_for}"
    return text


MODEL_COLUMNS: tuple[Column, ...] = (
    ("model", lambda r: r.model),
    ("batch", lambda r: str(r.infer_batch_size or "")),
    ("dtype", lambda r: r.dtype),
    ("provider", lambda r: r.provider),
    ("images/s", _speed),
    ("ms", lambda r: significant(r.infer_step_time)),
    ("p20-p80", _spread),
    ("n", lambda r: str(r.rounds or "")),
    ("vs eager", lambda r: _times(r.speedup)),
    ("vs fp32", lambda r: _times(r.speedup_fp32)),
    ("error", lambda r: _error(r.error)),
    ("eager's", lambda r: _error(r.eager_error)),
    ("TFLOP/s", lambda r: significant(r.tflops)),
    ("others %", lambda r: _percent(r.others_cpu) if (r.others_cpu or 0) > DISTURBED else ""),
    ("host ms", lambda r: significant(r.host_time)),
    ("peak MB", lambda r: _number(r.peak_memory_mb, 0)),
    ("top-1 %", lambda r: _percent(r.accuracy)),
    ("agree %", lambda r: _percent(r.agreement)),
    ("", lambda r: r.note),
)
LEGEND = (
    "images/s from the median of n interleaved rounds; vs eager: same dtype; vs fp32: against eager float32; "
    "error, eager's: root mean square deviation from float64 over the largest value, ours gated at 2x eager's"
)
ACCURACY_LEGEND = "top-1, agree: right, and as float32 eager, on held-out images"
PREDICTION = "A predicted time is the cost model's, without host time. It is not a measurement."


def cells(rows: Sequence[Row], columns: Sequence[Column]) -> Table:
    """Header and rows as strings, without the columns that are empty throughout."""
    table = [[title for title, _ in columns], *(_line(row, columns) for row in rows)]
    kept = [i for i in range(len(columns)) if any(line[i] for line in table[1:])]
    return [[line[i] for i in kept] for line in table]


def _line(row: Row, columns: Sequence[Column]) -> list[str]:
    """One row as strings; the reason why it has no numbers ends it."""
    line = [show(row) for _, show in columns]
    if row.status == OK:
        return line
    reason = line.index(why(row))
    return line[: reason + 1] + [""] * (len(line) - reason - 1)


def plain(table: Table) -> list[str]:
    """Aligned lines; numbers to the right."""
    if len(table) < 2:
        return []
    count = range(len(table[0]))
    # the reason why a row has no numbers runs over the empty cells behind it
    spans = [[i for i in count if line[i] and not any(line[i + 1 :]) and len(line[i]) > 20] for line in table]
    widths = [max(len(line[i]) for line, s in zip(table, spans, strict=True) if i not in s) for i in count]
    right = [
        all(not line[i] or line[i][0].isdigit() or i in s for line, s in zip(table[1:], spans[1:], strict=True))
        for i in count
    ]
    lines = []
    for line, span in zip(table, spans, strict=True):
        parts = (c if i in span else c.rjust(widths[i]) if right[i] else c.ljust(widths[i]) for i, c in enumerate(line))
        lines.append("  ".join(parts).rstrip())
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def markdown(table: Table) -> list[str]:
    """A Markdown table."""
    rule = ["---"] * len(table[0])
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (table[0], rule, *table[1:])]


def conditions(env: dict[str, Any]) -> str:
    """Hardware and versions in one line."""
    hardware = f"{env['device']}, " if env["device"] != "cpu" else ""
    text = f"{hardware}{env['cpu']}, {env['cores']} cores, {env['threads']} threads; torch {env['torch']}"
    for name in ("triton", "torchvision", "jax", "cuda", "cudnn"):
        if env.get(name):
            text += f", {name} {env[name]}"
    text += f"; {env['date']}"
    return f"{text}; clocks {env['clocks']}" if env.get("clocks") else text


def busy(rows: Sequence[Row]) -> str | None:
    """A warning when other processes took the processor while rows were timed, or None."""
    timed = [row for row in rows if row.samples]
    hit = [row.others_cpu for row in timed if (row.others_cpu or 0) > DISTURBED]
    if not hit:
        return None
    return (
        f"The machine was busy: while {len(hit)} of {len(timed)} rows were timed, other processes took up to "
        f"{max(filter(None, hit)):.0%} of its cores. Do not quote these rows; run the bench again on an idle machine."
    )

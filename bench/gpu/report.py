"""The files that a visit leaves and the short table that it ends with. Everything comes from the journals' records."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

CHECK_COLUMNS = ("key", "kernel", "config", "status", "error", "library_error", "ratio", "seconds", "detail")
WIDTH = 118
SHOWN = 30  # problems in the table


def write_json(path: Path, data: Any) -> None:
    """Writes a file atomically."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(data, indent=1))
    os.replace(part, path)


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[dict[str, Any]]) -> None:
    """Writes a table atomically; keys that are no column are left out."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for line in lines:
            writer.writerow({name: _cell(line.get(name)) for name in columns})
    os.replace(part, path)


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split())[:500] if value is not None else ""


def problems(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records that did not end well, with what the reader needs to reproduce them."""
    keep = ("key", "kernel", "config", "status", "detail", "error", "library_error")
    return [{name: r[name] for name in keep if name in r} for r in records if r["status"] != "ok"]


def grouped(problems: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], int]]:
    """The first of each kind of problem (same status and, but for numbers, same message), and how many more."""
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for problem in problems:
        message = re.sub(r"[0-9.e+-]+", "#", str(problem.get("detail", "")))[:80]
        # errors of arithmetic are told apart by kernel and configuration; the same exception everywhere is one problem
        kind = problem["key"] if problem["status"] in ("wrong", "crashed", "hung") else message
        kinds.setdefault((problem["status"], kind), []).append(problem)
    return [(same[0], len(same) - 1) for same in kinds.values()]


def count_text(records: Iterable[dict[str, Any]]) -> str:
    """``"38 ok, 1 crashed"``."""
    counts = Counter(record["status"] for record in records)
    return ", ".join(f"{number} {status}" for status, number in counts.most_common()) or "nothing"


def table(summary: dict[str, Any]) -> str:
    """The last thing printed: what came out, and every row that did not end well, in a few lines."""
    lines = ["", f"== {summary['device']}: {summary['seconds']:.0f} s"]
    for step in summary["steps"]:
        lines.append(f"{step['name']:<12} {step['state']:<11} {step['seconds']:6.0f} s  {step['text']}"[:WIDTH])
    if summary.get("limits"):
        figures = "  ".join(f"{name} {value}" for name, value in summary["limits"].items())
        lines.append(f"limits       {figures}")
    for total in summary.get("networks", []):
        lines.append(
            f"{total['network']} batch {total['batch']} {total['dtype']}: convs {total['ours_ms']} ms, "
            f"cuDNN + passes {total['cudnn_passes_ms']} ms ({total['speedup']}x), "
            f"conv alone {total['cudnn_conv_ms']} ms, {total['slower_layers']} layers slower"
        )
    groups = grouped(summary["problems"])
    for problem, more in groups[:SHOWN]:
        text = " ".join(str(problem.get("detail", "")).split())
        line = f"! {problem['status']}: {problem['key']} [{problem['kernel']} {problem['config']}]"
        lines.append(f"{line}{f' and {more} more alike' if more else ''} {text}"[:240])
    if len(groups) > SHOWN:
        lines.append(f"! and {len(groups) - SHOWN} other problems in summary.json")
    return "\n".join(lines)

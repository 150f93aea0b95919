"""Prints the bench's tables, and writes ``docs/performance.md`` and its pictures from the result files and the plan.

``python -m bench.report`` prints every ``bench/results/<device>/latest.json`` (with ``training.json`` beside it, which
``bench/gpu_suite.py`` writes) and writes the page and ``docs/images``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resnet_triton.compare import PREDICT_FOR
from resnet_triton.results import NO_CUDA, OK, Row, folder_name, load
from resnet_triton.tables import (
    ACCURACY_LEGEND,
    LEGEND,
    MODEL_COLUMNS,
    PREDICTION,
    Column,
    Table,
    busy,
    cells,
    conditions,
    markdown,
    plain,
    significant,
    why,
)

from . import RESULTS, plots
from .bounds import bounds
from .cudnn_graphs import PROVIDER

LAYERS, MODELS = "single steps", "throughput and accuracy"
TRAINING, TRAINING_LAYERS = "training", "single steps of training"
TRAIN_FILE = "training.json"  # beside latest.json: the training rows of a visit to a GPU
IMAGES, ROOFLINE = "images", "roofline.svg"  # beside the page
Results = Sequence[tuple[list[Row], dict[str, Any]]]
PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"

LAYER_COLUMNS: tuple[Column, ...] = (
    ("step", lambda r: r.model),
    ("dtype", lambda r: r.dtype),
    ("provider", lambda r: r.provider if r.device == "cpu" or r.provider != "ours" else f"ours: {r.note}"),
    ("ms", lambda r: significant(r.infer_step_time) if r.status == OK else why(r)),
    *(
        column
        for column in MODEL_COLUMNS
        if column[0] in ("p20-p80", "n", "vs eager", "error", "eager's", "TFLOP/s", "others %")
    ),
)

_SPREADS = tuple(c for c in MODEL_COLUMNS if c[0] in ("n", "vs eager", "error", "eager's", "others %"))
TRAIN_COLUMNS: tuple[Column, ...] = (
    ("model", lambda r: r.model),
    ("batch", lambda r: str(r.train_batch_size or "")),
    ("px", lambda r: str(r.train_img_size or "")),
    ("dtype", lambda r: r.dtype),
    ("provider", lambda r: r.provider),
    ("images/s", lambda r: significant(r.train_samples_per_sec) if r.status == OK else why(r)),
    ("ms", lambda r: significant(r.train_step_time)),
    ("p20-p80", lambda r: f"{significant(r.step_time_p20)}-{significant(r.step_time_p80)}" if r.samples else ""),
    ("forward", lambda r: significant(r.train_fwd_time)),
    ("backward", lambda r: significant(r.train_bwd_time)),
    ("optimizer", lambda r: significant(r.train_opt_time)),
    *_SPREADS,
    ("kept MB/image", lambda r: significant(r.saved_mb_per_image)),
    *(c for c in MODEL_COLUMNS if c[0] in ("host ms", "peak MB", "")),
)
TRAIN_STEP_COLUMNS: tuple[Column, ...] = (
    ("step", lambda r: r.model),
    ("dtype", lambda r: r.dtype),
    ("provider", lambda r: f"{r.provider}: {r.note}" if r.note else r.provider),
    ("ms", lambda r: significant(r.train_step_time) if r.status == OK else why(r)),
    *(c if c[0] != "vs eager" else ("vs PyTorch", c[1]) for c in _SPREADS if c[0] not in ("n", "others %")),
)
TRAIN_LEGEND = (
    "training: forward, backward, optimizer in ms, of one step under autocast; error, eager's: root mean square "
    "deviation of all gradients from float64 over their root mean square, each of ours gated at 3x eager's; "
    "kept: by autograd between forward and backward, parameters not counted"
)

FUSED_LEGEND = f"{PROVIDER}: the whole step as one graph of cuDNN's, whose kernel its heuristics choose"


def merged(rows: Sequence[Row]) -> list[Row]:
    """The rows, with neighbours that are unmeasured for the same reason and have no prediction on one line."""
    out: list[Row] = []
    for row in rows:
        last = out[-1] if out else None
        if (
            last is not None
            and row.status == last.status == NO_CUDA
            and last.key[:-1] == row.key[:-1]
            and row.predicted_step_time is None
            and last.predicted_step_time is None
        ):
            out[-1] = replace(last, provider=f"{last.provider}; {row.provider}")
        else:
            out.append(row)
    return out


def sections(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Titles and tables: layers first, throughput and accuracy last."""

    def of(*suites: str) -> list[Row]:
        return sorted((r for r in rows if r.suite in suites), key=lambda r: (r.device != "cpu", suites.index(r.suite)))

    found = [
        (TRAINING_LAYERS, cells(of("training layers"), TRAIN_STEP_COLUMNS)),
        (LAYERS, cells([r for r in rows if r.suite == "layers"], LAYER_COLUMNS)),
        (TRAINING, cells(merged(of("training")), TRAIN_COLUMNS)),
        (MODELS, cells(merged(of("models", "accuracy")), MODEL_COLUMNS)),
    ]
    return [(title, table) for title, table in found if len(table) > 1]


def terminal(rows: Sequence[Row], env: dict[str, Any]) -> list[str]:
    """Everything as lines of text."""
    lines = []
    for title, table in sections(rows):
        lines += ["", title, "", *plain(table)]
    lines += ["", f"{LEGEND}; {ACCURACY_LEGEND}"]
    lines += [TRAIN_LEGEND] if _trains(rows) else []
    lines += [FUSED_LEGEND] if _has_fused(rows) else []
    if any(row.predicted_step_time is not None for row in rows):
        lines.append(PREDICTION)
    return [*lines, conditions(env), *filter(None, [busy(rows)])]


def _has_fused(rows: Sequence[Row]) -> bool:
    return any(row.provider == PROVIDER for row in rows)


def _trains(rows: Sequence[Row]) -> bool:
    return any(row.suite.startswith("training") for row in rows)


def page(results: Results) -> str:
    """The text of ``docs/performance.md``."""
    lines = [
        "<!-- Generated by `python -m bench.report` from bench/results/*/latest.json. Do not edit. -->",
        "# Performance",
        "",
        "Measured by `pytest bench/`; `bench/README.md` says how. Random weights with BN statistics of the",
        "photographs for torchvision's networks, trained weights for `mnist5k_resnet20`. " + PREDICTION,
        "",
        f"{LEGEND[0].upper()}{LEGEND[1:]}; {ACCURACY_LEGEND}.",
    ]
    if any(_trains(rows) for rows, _ in results):
        lines += ["", f"{TRAIN_LEGEND[0].upper()}{TRAIN_LEGEND[1:]}."]
    if any(_has_fused(rows) for rows, _ in results):
        lines += ["", f"{FUSED_LEGEND}."]
    for rows, env in results:
        lines += ["", f"## {env['device']}", "", conditions(env) + "."]
        lines += ["", f"**{warning}**"] if (warning := busy(rows)) else []
        pictures = pictures_of(rows, env)
        for title, table in reversed(sections(rows)):
            lines += ["", f"### {title[0].upper()}{title[1:]}"]
            lines += ["", f"![{title}]({IMAGES}/{pictures[title]})"] if title in pictures else []
            lines += ["", *markdown(table)]
    return "\n".join([*lines, "", *_limits(), "", *_roofline(results)]) + "\n"


def _limits() -> list[str]:
    lines = [
        "## What limits each step",
        "",
        f"How `resnet_triton.explain` plans a forward on an {PREDICT_FOR}, what limits each step by the cost model,",
        "and what would come next. Predictions are not measurements: they rest on the rates in",
        "`resnet_triton/devices.json`, on sizes, and on instructions counted in the machine code.",
        "",
        "*Roofline*: the time that a step needs at least, by its bytes at the full bandwidth or its products at the",
        "full matrix rate, as a share of its predicted time (of its measured time, where there is one). *Then*: the",
        "resource that takes longest after the limiting one, in us. *hbm*: device memory; *l2*: loads through the L2",
        "cache; *shared*: shared memory; *tensor*: the tensor cores; *issue*: instructions. Measured times are those",
        "of the tuned files in `resnet_triton/tuned`.",
    ]
    for network in bounds():
        lines += ["", f"### {network.title}", "", network.text(), "", *markdown(network.limits())]
        lines += ["", *markdown(network.steps())]
    return lines


def _roofline(results: Results) -> list[str]:
    dots = sum(len(plots.on_roofline(rows)) for rows, _ in results)
    measured = f"{dots} filled dots were measured" if dots else "no dot is measured"
    return [
        "## Roofline",
        "",
        f"![roofline]({IMAGES}/{ROOFLINE})",
        "",
        f"The limits of an {PREDICT_FOR} as `resnet_triton/devices.json` has them, and this package's kernels for the",
        f"convolutions of ResNet-50 at batch {plots.BATCH} in bfloat16. Hollow dots are predicted by the cost model;",
        f"{measured}.",
    ]


def pictures_of(rows: Sequence[Row], env: dict[str, Any]) -> dict[str, str]:
    """File names of the pictures of one result file, by the title of their table; only what was measured has one."""
    folder = folder_name(env["device"])
    names = {LAYERS: f"{folder}-layers.svg"} if plots.measured(rows, "layers") else {}
    return names | ({MODELS: f"{folder}-throughput.svg"} if plots.measured(rows, "models") else {})


def draw(results: Results, folder: Path) -> list[Path]:
    """Draws every picture of the page into a folder; returns the files.

    Raises:
        ImportError: without matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / ROOFLINE]
    plots.draw_roofline([row for rows, _ in results for row in rows], made[0])
    for rows, env in results:
        for title, name in pictures_of(rows, env).items():
            (plots.draw_layers if title == LAYERS else plots.draw_throughput)(rows, folder / name)
            made.append(folder / name)
    return made


def found_in(folder: Path) -> list[tuple[list[Row], dict[str, Any]]]:
    """The results of each device below a folder; training rows of a file of their own replace those of the bench."""
    found = []
    for device in sorted(path for path in folder.glob("*") if path.is_dir()):
        latest, training = device / "latest.json", device / TRAIN_FILE
        rows, env = load(latest) if latest.exists() else ([], {})
        if training.exists():
            trained, its_env = load(training)
            rows, env = [row for row in rows if not _trains([row])] + trained, env or its_env
        if rows:
            found.append((rows, env))
    return found


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 1 where there are no results, or nothing to draw with."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder with <device>/latest.json and training.json"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="Markdown file to write")
    args = parser.parse_args(argv)
    results = found_in(args.results)
    if not results:
        print(f"no */latest.json under {args.results}; run `pytest bench/` first", file=sys.stderr)
        return 1
    for rows, env in results:
        print("\n".join(terminal(rows, env)))
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(results))
    print(f"\nwrote {args.page}")
    try:
        pictures = draw(results, args.page.parent / IMAGES)
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
        return 1
    print(f"wrote {', '.join(map(str, pictures))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

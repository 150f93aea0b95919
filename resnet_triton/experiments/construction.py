"""A deeper net built from a trained one by appending identity blocks (section 1 of the paper).

Such a net exists for every trained net and has its outputs, so a deeper net need not have a higher training error; the
question of the paper is whether training finds as good a one. Here: are the outputs the same, bit for bit; and what
becomes of the deeper net when it is trained further, beside the shallower one trained as long, and beside the deeper
net trained from random weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runs.data import Data, Request
from . import nets
from .nets import Net
from .output import Images, Report, Shown, Table, Tables, spans, spread, text
from .plan import Plan
from .pool import Watch, run_all
from .runs import Result, Run, Store, data_of, further, seeds_of
from .spread import UNDECIDED, compare, in_deviations, mean, points

STAGES = ("layer1", "layer2", "layer3")
BATCH = 256
#: Columns of the summary.
SHOWN: Shown = (
    ("kind", text("kind")),
    ("net", text("net")),
    ("layers", text("depth")),
    ("runs", text("seeds")),
    ("training error, %", spread("train_error_eval")),
    ("test error, %", spread("test_error")),
)
#: Columns of the check.
CHECK_SHOWN: Shown = (
    ("kind", text("kind")),
    ("layers", lambda row: f"{row['depth']} -> {row['deeper']}"),
    ("seed", text("seed")),
    ("outputs equal", lambda row: "bit for bit" if row["equal"] in (True, "True") else "no"),
    ("largest difference", lambda row: f"{row['largest_difference']:.2g}"),
    ("largest output", lambda row: f"{row['largest_output']:.2g}"),
)
ERRORS = ("train_error_eval", "test_error")
#: What is compared; the first two are before the training that the others have had.
SHALLOW, BUILT, SHALLOW_ON, BUILT_ON, SCRATCH = (
    "shallow net",
    "with identity blocks",
    "shallow net, trained further",
    "with identity blocks, trained further",
    "deep net from random weights",
)


def appended(shallow: nn.Module, deep: nn.Module) -> Iterator[Any]:
    """The blocks at the ends of the stages of ``deep`` that ``shallow`` does not have."""
    for stage in STAGES:
        yield from list(getattr(deep, stage))[len(getattr(shallow, stage)) :]


def deepened(trained: nn.Module, net: Net, classes: int, channels: int) -> nn.Module:
    """A deeper net with the outputs of a trained one.

    Args:
        trained: of a kind in :data:`.nets.STAGED`; as deep as ``net`` is just copied.
        net: of the same kind.
        classes: outputs.
        channels: of the images.

    Returns:
        The net, in eval mode. The blocks that ``trained`` does not have pass their input on: those without a shortcut
        by convolutions with identity kernels behind BN that changes nothing, the others by a last BN with gamma 0,
        which leaves the shortcut. What is passed on is the output of a ReLU, which a ReLU does not change.

    Raises:
        ValueError: ``net`` is shallower, or of a kind whose blocks do not end with a ReLU.
    """
    if net.kind not in nets.STAGED:
        raise ValueError(f"kind {net.kind!r} cannot be deepened; allowed: {', '.join(nets.STAGED)}")
    deep = nets.build(net, classes, channels)
    _, unexpected = deep.load_state_dict(trained.state_dict(), strict=False)
    if unexpected:
        raise ValueError(f"{net} lacks {len(unexpected)} tensors of the trained net, such as {unexpected[0]}")
    for block in appended(trained, deep):
        if net.kind == "plain":
            for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
                _make_identity(conv, norm)
        else:
            if isinstance(block.downsample, nn.Sequential):
                _make_identity(*block.downsample)
            nn.init.zeros_(block.bn2.weight)
            nn.init.zeros_(block.bn2.bias)
    return deep.eval()


@torch.no_grad()
def _make_identity(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    nn.init.dirac_(conv.weight)
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    nn.init.zeros_(norm.running_mean)  # type: ignore[arg-type]
    nn.init.constant_(norm.running_var, 1 - norm.eps)  # type: ignore[arg-type]  # so that sqrt(var + eps) is 1


def run(
    plan: Plan,
    kinds: Sequence[str],
    depths: tuple[int, int],
    seeds: int,
    on: Plan,
    folder: Path,
    jobs: int,
    watch: Watch,
) -> Report:
    """Trains, deepens, trains on, and reports.

    Args:
        plan: data and training of the first nets and of those from random weights.
        kinds: of :data:`.nets.STAGED`.
        depths: of the trained and of the deepened nets.
        seeds: how many, from 0.
        on: how the nets are trained further.
        folder: of the experiments.
        jobs: runs at once.
        watch: is told how it goes.

    Raises:
        ValueError: for depths that are not in ascending order or that a kind does not have, and as
            :func:`.pool.run_all` does.
    """
    low, high = depths
    if low >= high:
        raise ValueError(f"--depths {low} {high}: the second must be deeper than the first")
    first = [run for kind in kinds for run in seeds_of(Net(kind, low), plan, seeds)]
    scratch = [run for kind in kinds for run in seeds_of(Net(kind, high), plan, seeds)]
    trained = run_all([*first, *scratch], folder, jobs, watch)
    onward = [further(run, Net(run.net.kind, depth), on) for run in first for depth in depths]
    trained += run_all(onward, folder, jobs, watch)
    store = Store(folder)
    check = [_checked(run, high, store) for run in first]
    data = data_of(plan, 0)
    table = _ends(trained, low)
    return Report(
        "construction",
        {"": table, "check": check, "summary": summarise(table)},
        Images(len(data.train), len(data.test)),
    )


def goes_on(plan: Plan, epochs: int, lr: float) -> Plan:
    """How a trained net is trained further: so long, from this learning rate down along half a cosine."""
    return replace(plan, epochs=epochs, lr=lr, schedule="cosine", warmup=0.0)


def _checked(run: Run, depth: int, store: Store) -> dict[str, Any]:
    """Outputs of a trained net and of its deepened copy on all test images."""
    data = data_of(run.plan, run.seed)
    shallow = store.model(run, data)
    deep = deepened(shallow, Net(run.net.kind, depth), len(data.classes), run.plan.channels)
    mine, other = outputs(shallow, data), outputs(deep, data)
    labels = data.test[Request(None, range(len(data.test)))][1]
    return {
        "kind": run.net.kind,
        "depth": run.net.depth,
        "deeper": depth,
        "seed": run.seed,
        "images": len(mine),
        "equal": bool(torch.equal(mine, other)),
        "largest_difference": (mine - other).abs().max().item(),
        "largest_output": mine.abs().max().item(),
        "test_error": (mine.argmax(1) != labels).double().mean().item(),
        "deeper_test_error": (other.argmax(1) != labels).double().mean().item(),
    }


@torch.no_grad()
def outputs(model: nn.Module, data: Data) -> Tensor:
    """Logits of all test images."""
    count = len(data.test)
    places = [range(count)[i : i + BATCH] for i in range(0, count, BATCH)]
    return torch.cat([model(data.test[Request(None, place)][0]) for place in places])


def _ends(results: Sequence[Result], low: int) -> Table:
    """A line for each run: errors after its last epoch."""
    names = {(True, False): SHALLOW, (True, True): SHALLOW_ON, (False, True): BUILT_ON, (False, False): SCRATCH}
    rows = []
    for result in results:
        net = result.run.net
        name = names[net.depth == low, result.run.start is not None]
        line = {"kind": net.kind, "net": name, "depth": net.depth, "seed": result.run.seed}
        rows.append(line | {column: result.last(column) for column in ("epoch", *ERRORS)})
    return sorted(rows, key=lambda row: (row["kind"], list(names.values()).index(row["net"]), row["seed"]))


Groups = dict[str, dict[str, list[dict[str, Any]]]]


def grouped(table: Table) -> Groups:
    """Runs by kind and by what they are; those with identity blocks begin as the shallow nets and are no runs."""
    groups: Groups = {}
    for row in table:
        groups.setdefault(row["kind"], {}).setdefault(row["net"], []).append(row)
    return groups


def summarise(table: Table) -> Table:
    """A line for each kind and what it is."""
    return [
        {"kind": kind, "net": name, "depth": rows[0]["depth"], "seeds": len(rows)}
        | {f"{c}_{key}": value for c in ERRORS for key, value in spans([row[c] for row in rows]).items()}
        for kind, named in grouped(table).items()
        for name, rows in named.items()
    ]


def judge(tables: Tables, images: Images) -> tuple[list[str], dict[str, Any]]:
    """Whether the outputs are the same, and what training errors say."""
    lines: list[str] = []
    facts: dict[str, Any] = {"exact": {}, "further_training": {}}
    for kind, named in grouped(tables[""]).items():
        checks = [row for row in tables["check"] if row["kind"] == kind]
        low, high = checks[0]["depth"], checks[0]["deeper"]
        equal, worst = sum(row["equal"] for row in checks), max(row["largest_difference"] for row in checks)
        lines.append(
            f"{kind}: {high - low} layers of identity blocks behind {low} trained ones leave the outputs for "
            f"{checks[0]['images']} test images unchanged bit for bit in {equal} of {len(checks)} nets"
            + (f"; the largest difference is {worst:.2g}." if worst else ".")
        )
        facts["exact"][kind] = {"equal": equal, "nets": len(checks), "largest_difference": worst}
        errors = {name: [row["train_error_eval"] for row in rows] for name, rows in named.items()}
        for first, second in ((BUILT_ON, SHALLOW_ON), (BUILT_ON, SCRATCH), (SHALLOW, SCRATCH)):
            found = compare(errors[first], errors[second], 1 / images.train)
            word = "not told apart from" if found.outcome == UNDECIDED else f"{found.outcome} than"
            lines.append(
                f"{kind}: the training error of the {_title(first, low, high)} ({mean(errors[first]):.2%}) is {word} "
                f"that of the {_title(second, low, high)} ({mean(errors[second]):.2%}): {points(found.difference)}, "
                f"{in_deviations(found)}."
            )
            facts["further_training"].setdefault(kind, []).append({"of": first, "against": second, **vars(found)})
    return lines, facts


def _title(name: str, low: int, high: int) -> str:
    return {
        SHALLOW: f"{low}-layer net",
        SHALLOW_ON: f"{low}-layer net trained further",
        BUILT_ON: f"{high}-layer net built from it and trained further",
        SCRATCH: f"{high}-layer net from random weights",
    }[name]


def draw(figure: Any, tables: Tables) -> None:
    """Training error of each kind of net, a panel for each kind: a bar for the mean, a dot for each seed."""
    groups = grouped(tables[""])
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for (kind, named), axes in zip(groups.items(), panels, strict=True):
        bars = {SHALLOW: named[SHALLOW], BUILT: named[SHALLOW], **named}
        for place, (name, rows) in enumerate(bars.items()):
            values = [100 * row["train_error_eval"] for row in rows]
            axes.barh(place, mean(values), color="tab:green" if name in (BUILT, BUILT_ON) else "silver")
            axes.plot(values, [place] * len(values), "o", color="black", markersize=3)
        axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
        axes.set_xlabel("training error, %")
        axes.set_title(kind, fontsize=10)
    panels[0].invert_yaxis()

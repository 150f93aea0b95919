"""Standard deviations of layer responses (figure 7 of the paper).

A response is the output of a 3x3 convolution behind its BN, before the ReLU or the addition. Its standard deviation is
taken over all training images as they are, positions and channels, of a trained net in eval mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import unconvert
from ..runs.data import Request, Split
from .nets import Net
from .output import Images, Report, Shown, Table, Tables, spans, spread, text
from .plan import Plan
from .pool import Watch, run_all
from .runs import Result, Store, data_of, seeds_of
from .spread import HIGHER, LOWER, compare, in_deviations, mean

BATCH = 256
#: Columns of the summary.
SHOWN: Shown = (
    ("kind", text("kind")),
    ("layers", text("depth")),
    ("runs", text("seeds")),
    ("std, mean over layers", spread("std", 1, 3)),
)


def run(
    plan: Plan, kinds: Sequence[str], depths: Sequence[int], seeds: int, folder: Path, jobs: int, watch: Watch
) -> Report:
    """Measures the responses of trained nets, which are trained where they are not there yet.

    Args:
        plan: data and training.
        kinds: of :data:`.nets.KINDS` whose BN follows the convolution, so not ``preact``.
        depths: of the nets.
        seeds: how many, from 0.
        folder: of the experiments; runs of ``degradation`` in it are taken.
        jobs: trainings at once.
        watch: is told how it goes.

    Raises:
        ValueError: as :func:`.pool.run_all` does.
    """
    chosen = [Net(kind, depth) for kind in kinds for depth in sorted(set(depths))]
    results = run_all([each for net in chosen for each in seeds_of(net, plan, seeds)], folder, jobs, watch)
    store, data = Store(folder), data_of(plan, 0)
    table = []
    for result in results:
        found = deviations(store.model(result.run, data), data.train)
        table += [_row(result, layer, name, value) for layer, (name, value) in enumerate(found.items(), 1)]
    return Report("responses", {"": table, "summary": summarise(table)})


def _row(result: Result, layer: int, name: str, value: float) -> dict[str, Any]:
    net = result.run.net
    return {"kind": net.kind, "depth": net.depth, "seed": result.run.seed, "layer": layer, "name": name, "std": value}


def normalised_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """The BN behind each 3x3 convolution, by the convolution's name.

    Raises:
        NotImplementedError: a 3x3 convolution has no BN behind it.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            parent, _, own = name.rpartition(".")
            norm = modules.get(".".join(filter(None, (parent, own.replace("conv", "bn")))))
            if not isinstance(norm, nn.BatchNorm2d) or norm.num_features != module.out_channels:
                raise NotImplementedError(
                    f"convolution {name} has no BN behind it; responses are those of BN's outputs"
                )
            found[name] = norm
    return found


@torch.no_grad()
def deviations(model: nn.Module, split: Split) -> dict[str, float]:
    """Standard deviation of each layer's responses, by the name of its convolution, in order.

    Args:
        model: in eval mode.
        split: whose images it sees, as they are.

    Raises:
        NotImplementedError: as :func:`normalised_convolutions` does.
    """
    model = unconvert(model)
    norms = normalised_convolutions(model)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in norms}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, out: Tensor) -> None:
            x = out.double()
            sums[name] += torch.stack([x.new_tensor(x.numel()), x.sum(), x.square().sum()]).cpu()

        return hook

    for name, norm in norms.items():
        norm.register_forward_hook(keep(name))
    for first in range(0, len(split), BATCH):
        model(split[Request(None, range(len(split))[first : first + BATCH])][0])
    return {name: _deviation(*found.tolist()) for name, found in sums.items()}


def _deviation(count: float, total: float, squares: float) -> float:
    return math.sqrt(max(0.0, squares / count - (total / count) ** 2))


def means(table: Table) -> dict[Net, list[float]]:
    """The mean over a net's layers, one a seed."""
    layers: dict[tuple[Net, int], list[float]] = {}
    for row in table:
        layers.setdefault((Net(row["kind"], row["depth"]), row["seed"]), []).append(row["std"])
    found: dict[Net, list[float]] = {}
    for (net, _), values in layers.items():
        found.setdefault(net, []).append(mean(values))
    return found


def summarise(table: Table) -> Table:
    """A line for each net: the mean over its layers, over seeds."""
    return [
        {"kind": net.kind, "depth": net.depth, "seeds": len(values)}
        | {f"std_{name}": value for name, value in spans(values).items()}
        for net, values in means(table).items()
    ]


def judge(tables: Tables, images: Images | None) -> tuple[list[str], dict[str, Any]]:
    """Whether residual nets respond less than plain ones of their depth, and deeper nets less than shallower ones."""
    groups = means(tables[""])
    pairs = [(Net("residual", net.depth), net) for net in groups if net.kind == "plain"]
    for kind in dict.fromkeys(net.kind for net in groups):
        depths = sorted(net.depth for net in groups if net.kind == kind)
        pairs += [(Net(kind, deep), Net(kind, shallow)) for shallow, deep in pairwise(depths)]
    lines, facts = [], []
    for first, second in pairs:
        if first not in groups or second not in groups:
            continue
        found = compare(groups[first], groups[second])
        word = {HIGHER: "larger than", LOWER: "smaller than"}.get(found.outcome, "not told apart from")
        lines.append(
            f"The responses of {first} ({mean(groups[first]):.3f}, mean over its layers) are {word} those of {second} "
            f"({mean(groups[second]):.3f}): {in_deviations(found)}."
        )
        facts.append({"of": str(first), "against": str(second), **vars(found)})
    return lines, {"responses": facts}


def draw(figure: Any, tables: Tables) -> None:
    """As figure 7: by layer, and in descending order; lines are means over seeds."""
    table = tables[""]
    panels = figure.subplots(1, 2, sharey=True)
    for i, net in enumerate(means(table)):
        rows = [row for row in table if (row["kind"], row["depth"]) == net]
        seeds = sorted({row["seed"] for row in rows})
        by_seed = [[row["std"] for row in rows if row["seed"] == seed] for seed in seeds]
        style = {
            "linestyle": "--" if net.kind == "plain" else "-",
            "color": f"C{i}",
            "label": str(net),
            "linewidth": 1.3,
        }
        panels[0].plot(range(1, len(by_seed[0]) + 1), [mean(each) for each in zip(*by_seed, strict=True)], **style)
        ordered = [sorted(each, reverse=True) for each in by_seed]
        panels[1].plot(range(1, len(by_seed[0]) + 1), [mean(each) for each in zip(*ordered, strict=True)], **style)
    for axes, what in zip(panels, ("layer", "layer, by magnitude"), strict=True):
        axes.set_xlabel(what)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("standard deviation of responses")
    panels[1].legend(fontsize=8)

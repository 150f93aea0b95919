"""What depth and width cost: parameters, multiply-adds, latency and memory (table 1 and section 4 of the paper)."""

from __future__ import annotations

import itertools
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import macs, models
from ..convert import convert
from ..tables import DISTURBED, significant
from ..timing import Bystanders, clock_for, interleave, percentiles
from .output import Images, Report, Shown, Tables, integer, text


class Entry(NamedTuple):
    """A network to measure.

    Args:
        family: of the networks that are compared, and joined in the picture.
        model: a name for :func:`resnet_triton.models.build_by_name`, or ``torchvision:NAME``.
        arguments: of the builder.
        pixels: height and width of the images.
    """

    family: str
    model: str
    arguments: dict[str, Any]
    pixels: int

    @property
    def depth(self) -> int | None:
        """Weighted layers, from the name."""
        found = re.search(r"(\d+)", self.model.removeprefix("torchvision:"))
        return int(found[1]) if found else None


#: Every network of the paper for ImageNet and CIFAR-10, wide ones beside them, and the peers that torchvision has.
FAMILY = (
    *(Entry("plain", f"plain{depth}", {}, 224) for depth in (18, 34)),
    *(Entry("residual", f"resnet{depth}", {}, 224) for depth in (18, 34, 50, 101, 152)),
    *(Entry("residual, stride in 1x1", f"resnet{depth}", {"stride_in_1x1": True}, 224) for depth in (50, 101, 152)),
    *(Entry("wide", f"wide_resnet{depth}_2", {}, 224) for depth in (50, 101)),
    *(Entry("VGG", f"torchvision:vgg{depth}", {}, 224) for depth in (16, 19)),
    *(Entry("CIFAR plain", f"cifar_plain{depth}", {}, 32) for depth in (20, 32, 44, 56, 110)),
    *(Entry("CIFAR residual", f"cifar_resnet{depth}", {}, 32) for depth in (20, 32, 44, 56, 110)),
    *(Entry("CIFAR pre-activation", f"preact_cifar_resnet{depth}", {}, 32) for depth in (110, 164)),
)


#: Columns of the table.
SHOWN: Shown = (
    ("family", text("family")),
    ("model", text("model")),
    ("px", text("pixels")),
    ("parameters", integer("parameters")),
    ("multiply-adds", integer("multiply_adds")),
    ("ms", lambda row: significant(row["latency_ms"])),
    ("p20-p80", lambda row: f"{significant(row['latency_ms_p20'])}-{significant(row['latency_ms_p80'])}"),
    ("n", text("rounds")),
    ("GMAC/s", lambda row: significant(row["gmacs_per_s"])),
    ("weights MB", lambda row: significant(row["weights_mb"])),
    ("beside them MB", lambda row: significant(row["activations_mb"])),
    ("others %", lambda row: f"{100 * row['others_cpu']:.0f}" if (row["others_cpu"] or 0) > DISTURBED else ""),
)
#: What the verdict sets against each other: the paper's pairs, and width against depth.
COMPARED = (
    (("residual, stride in 1x1", "resnet152"), ("VGG", "torchvision:vgg19")),
    (("residual, stride in 1x1", "resnet50"), ("residual", "resnet34")),
    (("residual", "resnet34"), ("plain", "plain34")),
    (("residual", "resnet101"), ("residual", "resnet50")),
    (("wide", "wide_resnet50_2"), ("residual", "resnet50")),
    (("wide", "wide_resnet50_2"), ("residual", "resnet152")),
    (("CIFAR residual", "cifar_resnet110"), ("CIFAR residual", "cifar_resnet20")),
    (("CIFAR residual", "cifar_resnet56"), ("CIFAR plain", "cifar_plain56")),
)


def run(
    entries: Sequence[Entry],
    batch: int,
    device: torch.device,
    seconds: float,
    progress: Callable[[Sequence[Entry]], Iterable[Entry]],
) -> Report:
    """Measures networks with constant weights in eval mode, converted, in float32.

    Args:
        entries: what to measure; torchvision's are left out where it is not installed.
        batch: images of a forward.
        device: to measure on.
        seconds: of timing, for each.
        progress: shows how far it is.

    Raises:
        ValueError: for a name that is not known.
    """
    table = [_measured(entry, batch, device, seconds) for entry in progress(list(entries))]
    return Report("cost", {"": [row for row in table if row is not None]})


def _measured(entry: Entry, batch: int, device: torch.device, seconds: float) -> dict[str, Any] | None:
    try:
        model = _built(entry)
    except ImportError:
        return None
    shape = (batch, 3, entry.pixels, entry.pixels)
    sizes = {
        "parameters": macs.parameters(model),
        "multiply_adds": macs.multiply_adds(model, (1, *shape[1:])),
    }
    model = model.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, memory_format=torch.channels_last)
    with torch.inference_mode(), Bystanders() as bystanders:
        samples = interleave({"": lambda: model(x)}, clock_for(device.type), seconds, warmup=2)[""]
    spread = percentiles([1e3 * sample.seconds for sample in samples])
    activations = peak_bytes(lambda: model(x), device)
    return {
        "family": entry.family,
        "model": entry.model,
        "depth": entry.depth,
        "pixels": entry.pixels,
        "batch": batch,
        **sizes,
        "latency_ms": spread.p50,
        "latency_ms_p20": spread.p20,
        "latency_ms_p80": spread.p80,
        "rounds": len(samples),
        "gmacs_per_s": sizes["multiply_adds"] * batch / spread.p50 / 1e6,
        "weights_mb": sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())) / 1e6,
        "activations_mb": activations / 1e6,
        "others_cpu": bystanders.share,
    }


def _built(entry: Entry) -> nn.Module:
    prefix, _, name = entry.model.rpartition(":")
    with torch.device("meta"):  # drawing weights takes longer than all else here
        if prefix == "torchvision":
            from torchvision.models import get_model

            model = convert(get_model(name), inplace=True)
        else:
            model = models.build_by_name(entry.model, **entry.arguments)
    return _filled(model)


def _filled(model: nn.Module) -> nn.Module:
    """A model of the meta device with constant weights: its time does not depend on them."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01 if tensor.is_floating_point() else 0)
    return model


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that PyTorch holds during a call, beyond those that it holds before."""
    with torch.inference_mode():
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        return _peak_of_cpu(call)


def _peak_of_cpu(call: Callable[[], object]) -> int:
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it complains where there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(change for _, change in changes), default=0)


def judge(tables: Tables, images: Images | None) -> tuple[list[str], dict[str, Any]]:
    """What depth and width cost, where the nets of a comparison were measured."""
    rows = {(row["family"], row["model"]): row for row in tables[""]}
    lines, facts = [], []
    for first, second in COMPARED:
        one, other = rows.get(first), rows.get(second)
        if one is None or other is None:
            continue
        ratios = {key: one[key] / other[key] for key in ("parameters", "multiply_adds", "latency_ms", "activations_mb")}
        apart = one["latency_ms_p20"] > other["latency_ms_p80"] or one["latency_ms_p80"] < other["latency_ms_p20"]
        lines.append(
            f"{_title(one)} against {_title(other)}: {ratios['parameters']:.2f}x the parameters, "
            f"{ratios['multiply_adds']:.2f}x the multiply-adds, {ratios['latency_ms']:.2f}x the time"
            f"{'' if apart else ' (p20-p80 overlap)'}, {ratios['activations_mb']:.2f}x the memory beside the weights."
        )
        facts.append({"of": _title(one), "against": _title(other), "times_apart": apart, **ratios})
    return lines, {"ratios": facts}


def _title(row: dict[str, Any]) -> str:
    own = row["model"].removeprefix("torchvision:")
    return f"{own} ({row['family'].partition(', ')[2]})" if ", " in row["family"] else own


def draw(figure: Any, tables: Tables) -> None:
    """Time over multiply-adds and over depth, memory over parameters; nets of a family are joined."""
    table = tables[""]
    panels = figure.subplots(1, 3)
    columns = (
        ("multiply_adds", 1e9, "10^9 multiply-adds an image", "latency_ms", "ms a batch, median"),
        ("depth", 1, "layers", "latency_ms", "ms a batch, median"),
        ("parameters", 1e6, "10^6 parameters", "activations_mb", "MB beside the weights"),
    )
    for i, family in enumerate(dict.fromkeys(row["family"] for row in table)):
        rows = [row for row in table if row["family"] == family and row["depth"]]
        for axes, (x, unit, _, y, _) in zip(panels, columns, strict=True):
            axes.plot(
                [row[x] / unit for row in rows],
                [row[y] for row in rows],
                "o-",
                color=f"C{i}",
                label=family,
                markersize=4,
            )
    for axes, (_, _, across, _, up) in zip(panels, columns, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        if across == "layers":  # less than two decades, whose minor ticks have labels of their own
            axes.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
            axes.set_xticks([], minor=True)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)

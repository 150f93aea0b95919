"""``resnet-triton eval``: the error of a classifier, or of an ensemble, by the paper's test protocols."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import evaluation
from ..convert import convert
from ..evaluation.images import Labelled, load_images
from ..evaluation.protocols import Procedure
from ..evaluation.trained import Trained, load_run
from ..runs import data
from ..sources import load_model
from . import image_files
from .common import DTYPES, channels_of, device_of, in_one_line, note_random_weights, positive, progress, table
from .train import natural

HELP = "top-1 and top-5 error of a classifier, or of an ensemble, by the paper's test protocols"
EXAMPLE = "resnet-triton eval --model resnet50 --weights IMAGENET1K_V1 --data imagefolder:imagenet --protocol 10-crop"

PROTOCOLS = ("plain", "1-crop", "10-crop", "dense")
SCALES = evaluation.Dense().scales
DEFAULT_MODEL = "resnet50"


class Member(NamedTuple):
    """A network that takes part: ``--model`` with its ``--weights`` and ``--model-kwargs``, or ``--run``."""

    model: str = ""
    weights: str | None = None
    run: str | None = None

    @property
    def name(self) -> str:
        """In the table."""
        if self.run is not None:
            return self.run
        return ", ".join(filter(None, [self.model, self.weights]))


class _Add(argparse.Action):
    """``--model`` and ``--run`` begin a network; ``--weights`` and ``--model-kwargs`` belong to the model before."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        members = [*(getattr(namespace, self.dest) or [])]
        last = members[-1] if members else Member(DEFAULT_MODEL)
        if option_string in ("--model", "--run"):
            members.append(Member(**{option_string[2:]: values}))
        elif last.run is not None:
            parser.error(f"{option_string} follows --run {last.run}; it belongs behind its --model")
        elif option_string == "--weights":
            members = [*(members if last.weights else members[:-1]), last._replace(weights=values)]
        else:
            members = [*members[:-1], last._replace(model=" ".join([last.model, *values]))]
        setattr(namespace, self.dest, members)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Networks, images, protocol, device."""
    for name, metavar, text in (
        (
            "--model",
            "NAME",
            f"as in other commands (default: {DEFAULT_MODEL}); repeat --model and --weights for an ensemble, whose "
            "scores are averaged",
        ),
        (
            "--weights",
            "FILE",
            "of the model before it: a .pth or .safetensors file, or a name of torchvision's weights, which is "
            "downloaded; more than once for several of the same model",
        ),
        ("--model-kwargs", "NAME=VALUE", "of the model before it, such as shortcut=A stride_in_1x1=true"),
        ("--run", "DIR", "a folder that resnet-triton train wrote: its model, its weights and, where it can, its data"),
    ):
        nargs = "+" if name == "--model-kwargs" else None
        parser.add_argument(name, dest="members", action=_Add, nargs=nargs, metavar=metavar, help=text)
    parser.add_argument(
        "--best", action="store_true", help="of a --run, the checkpoint of least test error, not the last"
    )
    parser.add_argument(
        "--data",
        help=f"{data.ALLOWED}; of an imagefolder, PATH/val/CLASS/*.jpg or PATH/CLASS/*.jpg (of a --run: its own)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only N images, at even distances")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="of files, 1-crop (default): centre; 10-crop: centre and corners, mirrored too; dense: whole images at "
        "several scales, fully convolutional. Of other data, plain: the image as it is",
    )
    parser.add_argument("--size", type=positive, help="of a crop, in pixels (default: 224; other data have their own)")
    parser.add_argument(
        "--resize", type=positive, help="shorter side that crops are cut from (default: 256/224 of --size)"
    )
    parser.add_argument(
        "--scales", type=positive, nargs="+", help=f"shorter sides of dense (default: {' '.join(map(str, SCALES))})"
    )
    parser.add_argument(
        "--average",
        choices=evaluation.AVERAGES,
        default="softmax",
        help="what is averaged over views and networks (default: softmax)",
    )
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        help="of each channel, of pixels of 0 to 1 (default: ImageNet's, or the data's)",
    )
    parser.add_argument("--std", type=float, nargs="+", help="likewise")
    parser.add_argument(
        "--caffe",
        action="store_true",
        help="for original weights: blue, green, red of 0 to 255 minus --mean (default: "
        f"{' '.join(f'{v:g}' for v in evaluation.CAFFE.mean)})",
    )
    parser.add_argument("--batch", type=positive, default=32, help="crops at a time (default: 32)")
    parser.add_argument(
        "--workers", type=natural, help="processes that read images (default: 0, of files 8 or the cores)"
    )
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="default: fp32")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    """Prints the errors."""
    device = device_of(args.device)
    members: list[Member] = args.members or [Member(DEFAULT_MODEL)]
    runs = [None if member.run is None else load_run(member.run, args.best) for member in members]
    images, spec = _images(args, [found for found in runs if found is not None])
    protocol = _protocol(args, images, runs[0])
    pixels = _pixels(args, images)
    models = [_network(args, *pair, len(images.classes)) for pair in zip(members, runs, strict=True)]
    images.set_channels(_channels(models))
    chosen, source = images.images, images.source
    if args.limit and args.limit < len(chosen):
        source = f"{args.limit} of {source}"
        chosen = torch.utils.data.Subset(chosen, image_files.spread([*range(len(chosen))], args.limit))
    workers = (
        min(data.DEFAULTS[data.kind_of(spec)].workers, os.cpu_count() or 1) if args.workers is None else args.workers
    )
    for model in models:
        model.to(device, DTYPES[args.dtype]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = in_one_line(
        "the evaluation fails",
        evaluation.evaluate,
        models,
        chosen,
        protocol,
        batch=args.batch,
        pixels=pixels,
        average=args.average,
        classes=len(images.classes),
        workers=workers,
        watch=lambda batches: progress(batches, protocol.name, args, unit="batch"),
    )
    networks = [
        {**_described(member, found), **_errors(errors)}
        for member, found, errors in zip(members, runs, result.single, strict=True)
    ]
    facts: dict[str, Any] = {
        "protocol": protocol.name,
        "views": str(protocol),
        "views_per_image": protocol.count,
        "average": args.average,
        "images": result.errors.images,
        "classes": len(images.classes),
        "source": source,
        "pixels": "normalised by the data" if images.pixels is None else str(pixels),
        "dtype": args.dtype,
        "device": str(device),
        "networks": networks,
        **_errors(result.errors),
    }
    print(json.dumps(facts, indent=1) if args.json else _text(facts, members))
    return 0


def _images(args: argparse.Namespace, runs: Sequence[Trained]) -> tuple[Labelled, str]:
    """The images, and what names them."""
    kinds = {found.configuration["data"] for found in runs}
    spec = args.data
    if spec is None:
        if not kinds:
            raise ValueError(f"--data is missing; allowed: {data.ALLOWED}")
        kind = sorted(kinds)[0]
        if len(kinds) > 1 or kind in data.FROM_FILES:
            raise ValueError(
                f"--data is missing: the runs were trained on {', '.join(sorted(kinds))}, name the test images"
            )
        spec = kind
    recipes = {found.configuration.get("recipe") for found in runs if found.configuration["data"] == data.kind_of(spec)}
    if len(recipes) > 1:
        raise ValueError(f"the runs have different recipes ({', '.join(map(str, recipes))}): evaluate them one by one")
    sizes = {found.configuration["size"] for found in runs}
    size = args.size or (sizes.pop() if len(sizes) == 1 else None)
    return load_images(spec, size=size, recipe=recipes.pop() if recipes else None), spec


def _protocol(args: argparse.Namespace, images: Labelled, run: Trained | None) -> Procedure:
    name = args.protocol or ("1-crop" if images.files else "plain")
    if images.files == (name == "plain"):
        allowed = ", ".join(PROTOCOLS[1:]) if images.files else "plain"
        raise ValueError(f"--protocol {name} is not possible with --data {args.data}; allowed: {allowed}")
    given = {"--resize": args.resize, "--scales": args.scales}
    used = {"1-crop": "--resize", "10-crop": "--resize", "dense": "--scales"}.get(name)
    if unused := [option for option, value in given.items() if value is not None and option != used]:
        raise ValueError(f"--protocol {name} does not take {unused[0]}")
    if name == "plain":
        return evaluation.Plain()
    size = args.size or (224 if run is None else run.configuration["size"])
    if name == "dense":
        scales = args.scales or [round(size * scale / 224) for scale in SCALES]
        return evaluation.Dense(tuple(scales), size)
    crops = evaluation.OneCrop if name == "1-crop" else evaluation.TenCrop
    return crops(size, args.resize or round(size * 256 / 224))


def _pixels(args: argparse.Namespace, images: Labelled) -> evaluation.Pixels:
    """How bytes are normalised."""
    default = images.pixels or evaluation.IMAGENET
    if not (args.caffe or args.mean or args.std):
        return default
    if images.pixels is None:
        raise ValueError("--mean, --std and --caffe are for images that come as bytes; these are normalised already")
    if args.caffe:
        default = evaluation.CAFFE
    return evaluation.Pixels(args.mean or default.mean, args.std or default.std, default.bgr, default.scale)


def _network(args: argparse.Namespace, member: Member, run: Trained | None, classes: int) -> nn.Module:
    if run is not None:
        return run.network(classes)
    torch.manual_seed(0)  # random weights are the same each time
    model = load_model(member.model, weights=member.weights)
    note_random_weights(argparse.Namespace(model=member.model, weights=member.weights), model)
    return convert(model, inplace=True)


def _channels(models: Sequence[nn.Module]) -> int:
    found = sorted({channels_of(model) for model in models})
    if len(found) > 1:
        raise ValueError(f"the networks of an ensemble take images of {' and '.join(map(str, found))} channels")
    return found[0]


def _described(member: Member, run: Trained | None) -> dict[str, Any]:
    if run is None:
        return {"model": member.model, "weights": member.weights}
    return {
        "model": run.configuration["model"],
        "run": member.run,
        "checkpoint": run.name,
        "averaged_weights": run.averaged,
    }


def _errors(errors: evaluation.Errors) -> dict[str, float | None]:
    return {"top1_error": errors.top1, "top5_error": errors.top5}


def _text(facts: dict[str, Any], members: Sequence[Member]) -> str:
    average = ", averaged" if facts["views_per_image"] > 1 or facts["protocol"] == "dense" or len(members) > 1 else ""
    rows = []
    for member, network in zip(members, facts["networks"], strict=True):
        where = f" at {network['checkpoint']}" if "checkpoint" in network else ""
        rows.append((f"{member.name}{where}{', averaged weights' if network.get('averaged_weights') else ''}", network))
    if len(rows) > 1:
        rows.append((f"ensemble of {len(rows)}", facts))
    cells = [(name, *(_percent(found[key]) for key in ("top1_error", "top5_error"))) for name, found in rows]
    what = f"{facts['protocol']}: {facts['views']}; {facts['average']}{average}"
    return "\n".join(
        [
            f"{facts['source']}, {facts['dtype']} on {facts['device']}",
            what,
            f"pixels: {facts['pixels']}",
            "",
            table(("", "top-1 error", "top-5 error"), cells),
        ]
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"

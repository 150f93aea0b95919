"""The ``resnet-triton`` command: ``info`` and ``explain``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from . import models
from .convert import convert
from .explain import explain
from .info import info

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    root = argparse.ArgumentParser(prog="resnet-triton", description="Residual networks on fused Triton kernels.")
    commands = root.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="what is usable here, and why not", epilog="example: resnet-triton info")
    plan = commands.add_parser(
        "explain",
        help="what would run, layer by layer, and why",
        epilog="example: resnet-triton explain --model resnet50 --batch 256 --dtype bf16 --device 'NVIDIA H200'",
    )
    plan.add_argument("--model", default="resnet50", choices=MODELS)
    plan.add_argument("--batch", type=int, default=1)
    plan.add_argument("--size", type=int, default=224, help="image height and width")
    plan.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    plan.add_argument("--device", help="a torch device, or a known device name; needs no GPU")
    for command in (about, plan):
        command.add_argument("--json", action="store_true", help="print JSON")
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (0 done, 2 wrong arguments)."""
    args = parser().parse_args(arguments)
    if args.command == "info":
        report = info()
        print(json.dumps(report.to_dict(), indent=1) if args.json else report)
        return 0
    model = convert(getattr(models, args.model)().eval(), inplace=True)
    try:
        plan = explain(model, (args.batch, 3, args.size, args.size), dtype=DTYPES[args.dtype], device=args.device)
    except ValueError as error:
        print(f"resnet-triton explain: {error}", file=sys.stderr)
        return 2
    print(plan.to_json() if args.json else plan)
    return 0

"""``resnet-triton explain``."""

from __future__ import annotations

import argparse

from ..convert import convert
from ..explain import explain
from ..sources import load_model
from .common import DTYPES, model_arguments

HELP = "what would run, layer by layer, and why"
EXAMPLE = "resnet-triton explain --model resnet50 --batch 256 --dtype bf16 --device 'NVIDIA H200'"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, shape, dtype and device."""
    model_arguments(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224, help="image height and width")
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    parser.add_argument("--device", help="a torch device, or a known device name; needs no GPU")


def run(args: argparse.Namespace) -> int:
    """Prints the plan."""
    model = convert(load_model(args.model, weights=args.weights), inplace=True)
    plan = explain(model, (args.batch, 3, args.size, args.size), dtype=DTYPES[args.dtype], device=args.device)
    print(plan.to_json() if args.json else plan)
    return 0

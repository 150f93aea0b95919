"""``resnet-triton explain``."""

from __future__ import annotations

import argparse

from ..convert import convert
from ..explain import explain
from .common import DTYPES, image_arguments, in_one_line, input_shape, model_arguments, model_of

HELP = "what would run, layer by layer, and why"
EXAMPLE = "resnet-triton explain --model resnet50 --batch 256 --dtype bf16 --device 'NVIDIA H200'"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, shape, dtype, device, picture."""
    model_arguments(parser)
    image_arguments(parser)
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="of the activations (default: fp32)")
    parser.add_argument("--device", help="a torch device, or a known device name; needs no GPU")
    parser.add_argument("--plot", metavar="FILE", help="draw the plan as well (.png, .svg, .pdf; needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Prints the plan."""
    model = convert(model_of(args), inplace=True)
    shape = input_shape(args, model)
    what = f"{args.model} cannot be planned on shapes {shape} alone (of a detector, plan the backbone)"
    plan = in_one_line(what, explain, model, shape, dtype=DTYPES[args.dtype], device=args.device)
    if args.plot:
        plan.plot(args.plot)
    print(plan.to_json() if args.json else plan)
    return 0

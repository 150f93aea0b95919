"""``resnet-triton convert``: what of a model runs fused, and optionally the converted model as an exported program."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from .. import structure
from ..convert import KNOWN, convert, is_converted, modules_of_units, original_class, residual_blocks
from ..explain import reasons_not_fused
from .common import (
    DTYPES,
    device_of,
    image_arguments,
    in_one_line,
    input_shape,
    model_arguments,
    model_of,
    note_random_weights,
    output_file,
    table,
    written_whole,
)

HELP = "list which blocks run fused and which do not, and why; export the converted model"
EXAMPLE = "resnet-triton convert --model torchvision:resnet50 --weights IMAGENET1K_V2 --output resnet50.pt2"

YES, PARTLY, NO = "yes", "in part", "no"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, strictness, output and what to export for."""
    model_arguments(parser)
    parser.add_argument("--strict", action="store_true", help="exit with 1 where anything does not run fused")
    parser.add_argument(
        "--output",
        metavar="FILE.pt2",
        help="export the converted model by torch.export, for any batch and the image size of --size; loading it needs "
        "`import resnet_triton`",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    image_arguments(parser, batch=2)
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="of the export (default: fp32)")
    parser.add_argument("--device", help="of the export: cpu, cuda or cuda:N (default: cuda where there is one)")


@dataclass(frozen=True)
class Part:
    """A block, or a piece of a stem or head that does not run fused.

    Args:
        name: of the module.
        kind: its class.
        fused: ``"yes"``, ``"in part"`` or ``"no"``.
        reason: why not, or ``""``.
    """

    name: str
    kind: str
    fused: str
    reason: str


def parts_of(model: nn.Module) -> list[Part]:
    """What a converted model fuses, in the order of its modules."""
    reasons = reasons_not_fused(model)
    blocks = {name: (m, spec) for name, m, spec in residual_blocks(model)}
    beside = {name: reasons for name, _, reasons in modules_of_units(model)}
    parts = []
    for name, m in model.named_modules():
        if name in blocks:
            parts.append(_block_part(name, *blocks[name]))
        elif name in beside:
            parts.append(_units_part(name, m, beside[name]))
        elif name in reasons and not any(name.startswith(f"{owner}." if owner else "") for owner in (*blocks, *beside)):
            parts.append(Part(name, original_class(m).__name__, NO, reasons[name]))
    return parts


def _block_part(name: str, block: structure.Converted, spec: structure.BlockSpec) -> Part:
    kind = original_class(block).__name__
    if not is_converted(block):
        return Part(name, kind, NO, "its forward was replaced on the instance")
    reason = structure.why_not_block(block)
    if reason is None:
        return Part(name, kind, YES, "")
    partly = structure.transient_reason(block, spec) is None and structure.has_fusable_unit(block, spec)
    return Part(name, kind, PARTLY if partly else NO, reason)


def _units_part(name: str, m: nn.Module, reasons: Mapping[str, str | None]) -> Part:
    left = [reason for reason in reasons.values() if reason]
    kind, more = original_class(m).__name__, f", and {len(left) - 1} more" * (len(left) > 1)
    fused = YES if not left else PARTLY if len(left) < len(reasons) else NO
    return Part(name, kind, fused, left[0] + more if left else "")


def run(args: argparse.Namespace) -> int:
    """Prints the parts; 1 with --strict where not all of them run fused."""
    target = None if args.output is None else output_file(args.output, (".pt2",), args.force)
    device = device_of(args.device) if target else None
    model = convert(model_of(args), inplace=True)
    parts = parts_of(model)
    counts = {state: sum(part.fused == state for part in parts) for state in (YES, PARTLY, NO)}
    fused = bool(parts) and counts[YES] == len(parts)
    refused = args.strict and not fused
    if target is not None and not refused:
        note_random_weights(args, model)
        shape = input_shape(args, model)
        _export(
            model.to(device, DTYPES[args.dtype]), torch.zeros(shape, device=device, dtype=DTYPES[args.dtype]), target
        )
    written = str(target) if target is not None and not refused else None
    if args.json:
        facts = {"model": args.model, "fused": fused, "parts": [asdict(part) for part in parts], "output": written}
        print(json.dumps(facts, indent=1))
    else:
        print(_text(args.model, parts, counts))
        if written is not None:
            print(f"\nwrote {written}; to run it:")
            print(f"  import torch, resnet_triton\n  model = torch.export.load({written!r}).module()")
    if refused and target is not None:
        print("resnet-triton convert: --strict, so nothing was written", file=sys.stderr)
    return 1 if refused else 0


def _text(name: str, parts: list[Part], counts: dict[str, int]) -> str:
    if not parts:
        return f"{name}: no residual block of {KNOWN}; it runs as before"
    rows = [(part.name, part.kind, part.fused, part.reason) for part in parts]
    summary = f"{name}: {counts[YES]} run fused, {counts[PARTLY]} in part, {counts[NO]} not"
    return f"{table(('module', 'class', 'fused', 'why not'), rows)}\n\n{summary}"


def _export(model: nn.Module, x: torch.Tensor, target: Path) -> None:
    """Writes the exported program, for any batch size."""
    sizes = ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = in_one_line("the model cannot be exported", torch.export.export, model, (x,), dynamic_shapes=sizes)
    with written_whole(target) as part, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about tensors that share memory
        in_one_line(f"--output {str(target)!r} could not be written", torch.export.save, program, part)

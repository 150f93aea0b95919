"""``resnet-triton fold``: multiplies BN into the convolutions and stores the result."""

from __future__ import annotations

import argparse
import json
import shlex

import torch
from torch import nn

from .._version import __version__
from ..explain import reasons_not_fused
from ..fold import fold
from ..models.names import with_arguments
from ..sources import ARGUMENTS, FOLDED, arguments_of
from .common import model_arguments, model_of, note_random_weights, output_file, written_whole

HELP = "fold BN into the convolutions and save the weights as .safetensors"
EXAMPLE = "resnet-triton fold --model timm:resnet50 --weights resnet50.safetensors --output folded.safetensors"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model and output."""
    model_arguments(parser)
    parser.add_argument(
        "--output", required=True, metavar="FILE.safetensors", help="the state_dict of the folded model"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output")


def run(args: argparse.Namespace) -> int:
    """Writes the file; prints what was folded, what was not, and why."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = output_file(args.output, (".safetensors",), args.force)
    model = model_of(args)
    note_random_weights(args, model)
    before = _norms(model)
    folded = fold(model, inplace=True)
    left = _left(folded)
    done = [name for name in before if name not in left]
    if not done:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
        raise ValueError(f"nothing to fold in {args.model}: {why or 'it has no BN'}. Nothing was written.")
    state = {name: tensor.detach().contiguous().clone() for name, tensor in folded.state_dict().items()}
    arguments = json.dumps(with_arguments(args.model)[1] | dict(args.model_kwargs) | arguments_of(model))
    metadata = {"format": "pt", FOLDED: args.model, ARGUMENTS: arguments, "resnet_triton.version": __version__}
    with written_whole(target) as part:
        try:
            save_file(state, part, metadata)
        except SafetensorError as error:  # a full disk, too
            raise OSError(f"--output {args.output!r} could not be written: {error}") from error
    size = target.stat().st_size
    if args.json:
        facts = {"model": args.model, "folded": done, "not_folded": left, "output": str(target), "bytes": size}
        print(json.dumps(facts, indent=1))
        return 0
    print(f"folded {len(done)} of {len(before)} BNs of {args.model}")
    for name, reason in left.items():
        print(f"  not {name}: {reason}")
    print(f"wrote {target}: {len(state)} tensors, {size / 1e6:.1f} MB")
    print(f"use it: --weights {shlex.quote(str(target))} in any command, or")
    print(f"        resnet_triton.sources.load_model({args.model!r}, weights={str(target)!r})")
    return 0


def _norms(model: nn.Module) -> list[str]:
    """Names of the modules that normalise by running statistics."""
    return [name for name, m in model.named_modules() if isinstance(getattr(m, "running_var", None), torch.Tensor)]


def _left(folded: nn.Module) -> dict[str, str]:
    """Why each BN that a folded model still has was left."""
    reasons = reasons_not_fused(folded)
    left = {}
    for name in _norms(folded):
        owner = max((path for path in reasons if f"{name}.".startswith(f"{path}.")), key=len, default=None)
        left[name] = "not in a block or stem that is known" if owner is None else reasons[owner]
    return left

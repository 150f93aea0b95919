"""``resnet-triton verify``: are the outputs of the converted model those of the original, on the user's images?

Errors are deviations from the original model in float64, over the largest float64 output. Ours pass where their root
mean square is at most twice, and the largest at most four times, that of the original in the same dtype. That bounds
top-1 too: it can change only where two classes are closer to each other than twice the largest error allowed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import dot_precision
from ..compare import ENOUGH_VALUES, EXTRA_IMAGES, calibrate, is_out_of_memory
from ..convert import convert
from ..errors import EXACT, OURS_LIMIT, UNUSABLE, Deviation, Error, gate, largest_of, tensors_of
from ..fold import fold
from ..results import FAILED, OK
from . import image_files
from .common import (
    DTYPES,
    device_of,
    image_arguments,
    in_one_line,
    input_shape,
    model_arguments,
    model_of,
    note_random_weights,
    positive,
    progress,
    table,
)

HELP = "compare the converted model's outputs with the original's, on your images"
EXAMPLE = "resnet-triton verify --model timm:resnet50 --weights resnet50.safetensors --images photos --dtype bf16"

EAGER, OURS, FOLDED = "eager", "ours", "ours folded"
LIMIT = 64  # images of a folder
CROPS = 16  # of the images that need no folder
SHOWN = 5  # images named whose top-1 differs

Images = list[tuple[str, Callable[[], Tensor]]]  # name, and what reads it


def arguments(parser: argparse.ArgumentParser) -> None:
    """Model, images, dtype, device."""
    model_arguments(parser)
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="folder of .jpg, .png and .webp files, in subfolders too; resized, cropped and normalised as torchvision "
        "evaluates on ImageNet (default: crops of two photographs that come with scikit-learn, else smooth patterns)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help=f"use N images, at even distances in the folder (default: {LIMIT}, or {CROPS} without --images)",
    )
    image_arguments(parser, batch=8)
    parser.add_argument("--dtype", default="fp32", choices=tuple(DTYPES), help="of both models (default: fp32)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    """Prints the comparison; 1 where ours errs too much."""
    device = device_of(args.device)
    torch.manual_seed(0)  # random weights are the same each time
    model = model_of(args)
    shape = input_shape(args, model)[1:]
    source, images = _images(args, shape)
    batches = [images[i : i + args.batch] for i in range(0, len(images), args.batch)]
    model.to(device)
    if note_random_weights(args, model, "; its BN gets the statistics of the images"):
        in_one_line("BN cannot get statistics; pass --weights", calibrate, model, _stack(batches[0]).to(device))
    comparison = in_one_line(f"{args.model} cannot be copied", Comparison, model, DTYPES[args.dtype], device)
    what = f"the original {args.model} fails on these images"
    for batch in progress(batches, "comparing", args, unit="batch"):
        in_one_line(what, comparison.add, _stack(batch), [name for name, _ in batch])
    if comparison.values < ENOUGH_VALUES:
        in_one_line(what, comparison.add_to_eager, image_files.waves(EXTRA_IMAGES, *shape))
    rows = comparison.rows()
    facts = {
        "model": args.model,
        "weights": args.weights,
        "dtype": args.dtype,
        "device": str(device),
        "source": source,
        "images": len(images),
        "size": list(shape[1:]),
        "agrees": all(row["status"] == OK for row in rows),
        "top1_changed": comparison.changed,
        "rows": rows,
    }
    print(json.dumps(facts, indent=1) if args.json else _text(facts))
    return 0 if facts["agrees"] else 1


def _images(args: argparse.Namespace, shape: tuple[int, int, int]) -> tuple[str, Images]:
    """Where the images come from, in words, and the images."""
    if args.images is not None:
        found = image_files.find_images(args.images)
        chosen = image_files.spread(found, args.limit or LIMIT)
        source = f"{len(chosen)} of the {len(found)} images in {args.images}"
        return source, [(str(path), functools.partial(image_files.read_image, path, *shape)) for path in chosen]
    count = args.limit or CROPS
    crops = image_files.photographs(count, *shape)
    source = "smooth patterns (scikit-learn, which has photographs, is not installed; --images takes yours)"
    if crops is not None:
        source = "crops of scikit-learn's two photographs (--images takes yours)"
    tensors = image_files.waves(count, *shape) if crops is None else crops
    return source, [(f"image {i}", functools.partial(tensors.__getitem__, i)) for i in range(count)]


def _stack(batch: Images) -> Tensor:
    return torch.stack([read() for _, read in batch])


class Comparison:
    """Collects how far eager, ours and ours folded are from float64.

    Args:
        model: the original, in eval mode, on ``device``; it is not changed.
        dtype: of the three models.
        device: to run on.

    Attributes:
        values: outputs compared so far.
        changed: images whose top-1 is not eager's.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self.images, self.values = dtype, device, 0, 0
        self.exact = copy.deepcopy(model).double()
        self.models = {EAGER: self._cast(copy.deepcopy(model))}
        self.failures: dict[str, str] = {}
        for name, make in ((OURS, convert), (FOLDED, fold)):
            if (ours := self._try(name, make, model)) is not None:
                self.models[name] = self._cast(ours)
        self.scales: list[float] = []  # largest float64 value of each output tensor
        self.deviations: dict[str, list[Deviation]] = {}  # from it, of each output tensor
        self.agreed = {name: [0, 0] for name in (EAGER, OURS, FOLDED)}  # top-1 of float64, of eager
        self.has_top1 = True
        self.changed: list[str] = []

    def _cast(self, model: nn.Module) -> nn.Module:
        # the layout of a converted model's weights, in which PyTorch sums in another order than in NCHW
        return model.to(dtype=self.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _try(self, name: str, step: Callable[..., Any], *args: Any) -> Any:
        """A step of our own models, or None; an exception is their failure, not the user's."""
        try:
            return step(*args)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.failures[name] = f"{FAILED}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return None

    def add(self, x: Tensor, names: list[str]) -> None:
        """Compares on images ``[n, C, H, W]`` with these names."""
        exact = self._exact(x)
        outputs = {EAGER: self._outputs(EAGER, x)}
        for name in (OURS, FOLDED):
            if name not in self.failures:
                outputs[name] = self._try(name, self._outputs, name, x)
        for name, out in outputs.items():
            if out is not None:
                self._deviates(name, out, exact)
        self.values += sum(t.numel() for t in exact)
        self.images += len(names)
        self._top1(exact[0], {name: out[0] for name, out in outputs.items() if out is not None}, names)

    def add_to_eager(self, x: Tensor) -> None:
        """More values for eager's error alone: the largest of a few is a matter of luck."""
        self._deviates(EAGER, self._outputs(EAGER, x), self._exact(x))

    @torch.inference_mode()
    def _exact(self, x: Tensor) -> list[Tensor]:
        exact = tensors_of(self.exact(x.to(self.device, torch.float64)))
        shapes = [tuple(t.shape) for t in exact if t.dim() == 0 or len(t) != len(x)]
        if shapes:
            raise ValueError(
                f"the model gives {shapes[0]} for {len(x)} images; outputs must have one entry an image (of a "
                "detector, verify the backbone)"
            )
        if not all(t.isfinite().all() for t in exact):
            raise ValueError("the original model's float64 outputs are not finite; check its weights")
        largest = [largest_of(t) for t in exact]
        self.scales = [max(pair) for pair in zip(self.scales or largest, largest, strict=True)]
        return exact

    @torch.inference_mode()
    def _outputs(self, name: str, x: Tensor) -> list[Tensor]:
        x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        return tensors_of(self.models[name](x))

    def _deviates(self, name: str, out: list[Tensor], exact: list[Tensor]) -> None:
        found = self.deviations.setdefault(name, [Deviation() for _ in exact])
        if [t.shape for t in out] != [t.shape for t in exact]:
            found[0].largest = math.inf
            return
        for deviation, mine, theirs in zip(found, out, exact, strict=True):
            deviation.add(mine.double() - theirs)

    def _top1(self, exact: Tensor, outputs: dict[str, Tensor], names: list[str]) -> None:
        """Counts agreement, where the first output is logits ``[n, classes]``."""
        self.has_top1 &= exact.dim() == 2 and len(exact) == len(names)
        if not self.has_top1:
            return
        right, eager = exact.argmax(1), outputs[EAGER].argmax(1)
        for name, logits in outputs.items():
            if logits.shape != exact.shape:
                continue
            top1 = logits.argmax(1)
            self.agreed[name][0] += int((top1 == right).sum())
            self.agreed[name][1] += int((top1 == eager).sum())
            differing = [image for image, same in zip(names, (top1 == eager).tolist(), strict=True) if not same]
            self.changed += [image for image in differing if image not in self.changed]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each model: error, in units of eager's, top-1 agreement, ``"ok"`` or what is wrong.

        Raises:
            ValueError: the original itself cannot hold the outputs in this dtype.
        """
        eager = self._error(EAGER)
        if eager == UNUSABLE:
            raise ValueError(f"the original model overflows in {self.dtype}: nothing to compare with; use bf16 or fp32")
        return [self._row(name, eager) for name in (EAGER, OURS, FOLDED)]

    def _error(self, name: str) -> Error:
        """Of the worst output tensor."""
        pairs = zip(self.deviations[name], self.scales, strict=True)
        return functools.reduce(Error.or_worse, (found.over(scale) for found, scale in pairs), EXACT)

    def _row(self, name: str, eager: Error) -> dict[str, Any]:
        status, error = self.failures.get(name, OK), UNUSABLE
        if status == OK:
            error = self._error(name)
            tf32 = self.device.type == "cuda" and self.dtype == torch.float32 and dot_precision(self.dtype) == "tf32"
            dtype = "tf32" if tf32 else str(self.dtype).removeprefix("torch.")
            status = gate(error, eager, dtype, True)
        shares = [count / self.images for count in self.agreed[name]]
        known = error != UNUSABLE
        return {
            "name": name,
            "rms_error": error.rms if known else None,
            "rms_error_ratio": error.rms / eager.rms if known and eager.rms else None,
            "largest_error": error.largest if known else None,
            "top1_float64": shares[0] if self.has_top1 and known else None,
            "top1_eager": shares[1] if self.has_top1 and known else None,
            "status": status,
        }


def _text(facts: dict[str, Any]) -> str:
    height, width = facts["size"]
    what = f"{facts['model']}, {facts['dtype']} on {facts['device']}, {facts['images']} images of {height} x {width}"
    lines = [f"{what}: {facts['source']}", ""]
    cells = []
    for row in facts["rows"]:
        numbers = [
            "" if row[key] is None else pattern.format(row[key])
            for key, pattern in (
                ("rms_error", "{:.1e}"),
                ("rms_error_ratio", "{:.2f}"),
                ("largest_error", "{:.1e}"),
                ("top1_float64", "{:.1%}"),
                ("top1_eager", "{:.1%}"),
            )
        ]
        cells.append((row["name"], *numbers, row["status"]))
    lines.append(
        table(("", "RMS error", "x eager's", "largest error", "top-1 of float64", "top-1 of eager", ""), cells)
    )
    changed = facts["top1_changed"]
    if changed:
        more = f", and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        lines += ["", f"another top-1 than eager's: {', '.join(changed[:SHOWN])}{more}"]
    good = f"the outputs agree: ours errs at most {OURS_LIMIT:g} times as much as eager"
    if changed:
        good += ", which explains the top-1 that changed"
    lines += ["", good if facts["agrees"] else "the outputs differ by more than rounding explains"]
    return "\n".join(lines)

"""``resnet-triton detect``."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..detection.data import DetectionData, coco, shapes, voc
from ..detection.fit import RECORD_EVERY, Fit, Recipe, detect
from ..detection.metrics import summary
from ..runs import config
from ..runs.checkpoint import Checkpoints
from ..runs.files import replace_file
from ..runs.interrupt import Stop
from .common import device_of, positive, progress, table
from .train import natural, number

HELP = "train or test the paper's Faster R-CNN on VOC, COCO or drawn shapes"
EXAMPLE = "resnet-triton detect train --data shapes --output runs/shapes"


class Defaults(NamedTuple):
    """What is taken for a kind of data where nothing else is said: sets, arguments of the detector, recipe."""

    train_set: str
    test_set: str
    model: dict[str, Any]
    recipe: Recipe


#: Drawn shapes are for trying things out: a small network, small images, few steps, and no weights to start from.
_SHAPES: dict[str, Any] = {
    "depth": 18,
    "narrow": True,
    "min_size": 64,
    "max_size": 64,
    "frozen_stages": 0,
    "roi": "align",
    "roi_size": 4,
    "roi_stride": 2,
    "background_iou": 0.0,
    "anchor_sizes": [12, 20, 32],
    "box_batch_size_per_image": 16,
    "box_positive_fraction": 0.5,
    "rpn_batch_size_per_image": 32,
    "rpn_pre_nms_top_n_train": 200,
    "rpn_post_nms_top_n_train": 50,
    "rpn_pre_nms_top_n_test": 100,
    "rpn_post_nms_top_n_test": 20,
}
DEFAULTS = {
    # the paper's, but that RPN and head train together
    "voc": Defaults("2007-trainval+2012-trainval", "2007-test", {}, Recipe()),
    "coco": Defaults("train2014", "val2014", {}, Recipe(steps=320_000, drops=(240_000,), batch_size=8)),
    "shapes": Defaults("2000", "100", _SHAPES, Recipe(steps=300, lr=3e-3, drops=(240,), warmup=5, batch_size=8)),
}
ALLOWED = "voc:PATH, coco:PATH, shapes"


def arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, data, run, detector and recipe."""
    parser.add_argument("action", choices=("train", "eval"), help="train, then test; or test only")
    parser.add_argument(
        "--data", required=True, help=f"{ALLOWED} (PATH holds VOC2007 and VOC2012, or COCO's annotations and images)"
    )
    parser.add_argument(
        "--output", metavar="DIR", help="folder of the run: train writes it, and goes on from it; eval reads it"
    )
    parser.add_argument("--train-set", help=f"default: {_told('train_set')}")
    parser.add_argument("--test-set", help=f"default: {_told('test_set')}")
    parser.add_argument("--weights", help="file of a whole detector: eval tests it, train starts from it")
    parser.add_argument(
        "--weights-backbone",
        help="classifier that train starts from: a file, or a name of torchvision's (IMAGENET1K_V1), which downloads; "
        "without, the weights are random and BN is set from the first images",
    )
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101, 152), help="default: 101, of shapes 18")
    parser.add_argument("--size", type=positive, help="shorter side of the images in pixels (default: 600)")
    parser.add_argument("--max-size", type=positive, help="longer side at most (default: 1000)")
    parser.add_argument("--roi", choices=("pool", "align"), help="RoIPool or RoIAlign (default: pool, the paper's)")
    parser.add_argument("--roi-size", type=positive, help="height and width of a region's features (default: 14)")
    parser.add_argument("--frozen-stages", type=int, choices=range(6), help="default: 2, conv1 and layer1")
    parser.add_argument("--steps", type=positive, help="default: voc 80000, coco 320000, shapes 300")
    parser.add_argument("--lr", type=number(0, 1e3), help="default: 0.001, of shapes 0.003")
    parser.add_argument(
        "--drops", type=natural, nargs="+", metavar="STEP", help="after which the rate is a tenth (default: of 3/4)"
    )
    parser.add_argument("--batch-size", type=positive, help="images of a step (default: voc 1, coco 8, shapes 8)")
    parser.add_argument("--seed", type=natural, default=0, help="of weights, order and sampling (default: 0)")
    parser.add_argument("--workers", type=natural, default=0, help="processes that read images (default: 0)")
    parser.add_argument("--refine", action="store_true", help="test with box refinement (appendix B of the paper)")
    parser.add_argument("--save-every", type=positive, default=1000, metavar="STEPS", help="default: 1000")
    parser.add_argument("--no-resume", action="store_true", help="delete the run in DIR and start over")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")


def _told(name: str) -> str:
    return ", ".join(f"{kind} {getattr(found, name)}" for kind, found in DEFAULTS.items())


def run(args: argparse.Namespace) -> int:
    """Trains, or goes on, and tests."""
    kind, _, path = args.data.partition(":")
    if kind not in DEFAULTS or (kind == "shapes") == bool(path):
        raise ValueError(f"--data {args.data!r} is not known; allowed: {ALLOWED}")
    if args.action == "train":
        if not args.output:
            raise ValueError("detect train needs --output DIR, where its checkpoints go")
        return _train(args, kind, path)
    if bool(args.output) == bool(args.weights):
        raise ValueError("detect eval needs either --output DIR of a run, or --weights FILE of a detector")
    return _eval(args, kind, path)


def _data(kind: str, path: str, name: str, seed: int) -> DetectionData:
    if kind == "voc":
        return voc(path, name)
    if kind == "coco":
        return coco(path, name)
    if not name.isdecimal() or int(name) == 0:
        raise ValueError(f"a set of shapes is a number of images, got {name!r}")
    return shapes(int(name), seed)


def _options(args: argparse.Namespace, kind: str, classes: int) -> dict[str, Any]:
    """Arguments of the detector, as JSON can hold them."""
    names = {"size": "min_size"}
    given = {name: getattr(args, name) for name in ("depth", "size", "max_size", "roi", "roi_size", "frozen_stages")}
    chosen = {names.get(name, name): value for name, value in given.items() if value is not None}
    return {"num_classes": classes + 1, **DEFAULTS[kind].model, **chosen}


def _train(args: argparse.Namespace, kind: str, path: str) -> int:
    from ..detection.c4 import faster_rcnn_c4, set_statistics

    default = DEFAULTS[kind]
    sets = {"train": args.train_set or default.train_set, "test": args.test_set or default.test_set}
    data, tests = _data(kind, path, sets["train"], 0), _data(kind, path, sets["test"], 1)
    _check_classes(data, tests)
    recipe = _recipe(args, default.recipe)
    options = _options(args, kind, len(data.classes))
    configuration = json.loads(json.dumps({"data": kind, **sets, "model": options, "recipe": asdict(recipe)}))
    folder = Path(args.output).expanduser()
    checkpoints = Checkpoints(folder / "checkpoints")
    if args.no_resume:
        checkpoints.clear()
    names = checkpoints.names()
    device = device_of(args.device)
    torch.manual_seed(recipe.seed)
    backbone = None if names else args.weights_backbone
    model = faster_rcnn_c4(weights=None if names else args.weights, weights_backbone=backbone, **options).to(device)
    fit = Fit(model, data, recipe, device, args.workers)
    if names:
        found = checkpoints.load(names[-1])
        if different := config.differences(found.facts["configuration"], configuration):
            raise ValueError(
                f"checkpoint {str(found.path)!r} has {'; '.join(different)}. Repeat the command of that run to go on "
                "with it, choose another --output, or pass --no-resume to start over"
            )
        fit.restore(found)
        _say(args, f"going on from {names[-1]}")
    elif args.weights is None and args.weights_backbone is None:
        _say(args, "no weights to start from (--weights-backbone): they are random, and BN is set from 16 images")
        set_statistics(model, [fit.data[i][0].to(device) for i in range(min(16, len(fit.data)))])
    _say(args, f"{len(fit.data)} images to train on, {recipe.steps} steps on {device}")
    about = {"configuration": configuration}
    with Stop() as stop:
        for row in fit.run():
            if row["step"] % RECORD_EVERY == 0:
                _say(args, "  ".join(f"{key} {value:.4g}" for key, value in row.items()))
            if stop.requested or fit.step % args.save_every == 0 or fit.step == recipe.steps:
                fit.save(checkpoints, about)
                _write_losses(folder / "losses.csv", fit.history)
            if stop.requested:
                _say(args, f"stopped after step {fit.step} of {recipe.steps}; the same command goes on from there")
                raise KeyboardInterrupt
    weights = str(checkpoints.folder / checkpoints.names()[-1] / "model.safetensors")
    result = {"output": str(folder), "weights": weights, "losses": str(folder / "losses.csv"), "steps": fit.step}
    return _test(args, model, tests, sets["test"], device, result)


def _recipe(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    steps = args.steps or recipe.steps
    drops = tuple(args.drops) if args.drops else tuple(steps * drop // recipe.steps for drop in recipe.drops)
    lr = recipe.lr if args.lr is None else args.lr
    size = args.batch_size or recipe.batch_size
    return replace(recipe, steps=steps, drops=drops, lr=lr, batch_size=size, seed=args.seed)


def _check_classes(data: DetectionData, tests: DetectionData) -> None:
    if data.classes != tests.classes:
        only = sorted(set(data.classes) ^ set(tests.classes))
        raise ValueError(f"the two sets of --data have different classes: {', '.join(only[:4])}")


def _eval(args: argparse.Namespace, kind: str, path: str) -> int:
    from ..detection.c4 import faster_rcnn_c4

    name = args.test_set or DEFAULTS[kind].test_set
    tests = _data(kind, path, name, 1)
    options, weights = _options(args, kind, len(tests.classes)), args.weights
    if args.output:
        checkpoints = Checkpoints(Path(args.output).expanduser() / "checkpoints")
        names = checkpoints.names()
        if not names:
            raise FileNotFoundError(f"--output {args.output!r} has no checkpoint; resnet-triton detect train makes one")
        found = checkpoints.load(names[-1])
        options, weights = found.facts["configuration"]["model"], found.tensors["model"]
        if options["num_classes"] != len(tests.classes) + 1:
            raise ValueError(
                f"the detector of {args.output!r} has {options['num_classes'] - 1} classes, {args.data!r} "
                f"{len(tests.classes)}"
            )
    device = device_of(args.device)
    model = faster_rcnn_c4(weights=weights, **options).to(device)
    return _test(args, model, tests, name, device, {"weights": args.weights or str(found.path / "model.safetensors")})


def _test(
    args: argparse.Namespace,
    model: torch.nn.Module,
    tests: DetectionData,
    name: str,
    device: torch.device,
    result: dict[str, Any],
) -> int:
    _say(args, f"testing on {len(tests)} images")
    found = detect(
        model,
        tests,
        device=device,
        workers=args.workers,
        refine=args.refine,
        progress=lambda batches: progress(batches, "images", args),
    )
    figures = summary(tests.kind, found, tests.truths, tests.classes)
    result = {**result, "test_set": name, "images": len(tests), **figures}
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    classes: Any = figures.pop("classes")
    rows = [(key, f"{value:.1%}") for key, value in (*classes.items(), *figures.items())]
    print(table(("", "AP"), rows))
    print(f"weights: {result['weights']}")
    return 0


def _write_losses(path: Path, history: list[dict[str, float]]) -> None:

    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]))
    writer.writeheader()
    writer.writerows(history)
    replace_file(path, text.getvalue().encode())


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text, file=sys.stderr, flush=True)

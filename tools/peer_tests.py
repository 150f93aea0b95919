"""Runs the model tests of timm or torchvision, from a checkout of theirs, on converted models.

    git clone --depth 1 https://github.com/huggingface/pytorch-image-models
    python tools/peer_tests.py timm pytorch-image-models

The tests stay theirs and are not changed: the pytest plugin ``tools/peer_plugin.py`` makes their model builders return
``resnet_triton.convert(model)`` and picks the cases whose model is a ResNet. The installed timm or torchvision is
tested, so take the checkout of the same version. Exit code 0: every picked case passed; 1: a case failed, was skipped,
or none was picked; 2: wrong arguments.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Peer:
    """One project whose tests can run here.

    Args:
        url: of its repository.
        tests: file of its model tests in a checkout.
        cases: names of the test functions to run; the others download weights or never build a ResNet.
        models: model names to run them for.
    """

    url: str
    tests: str
    cases: tuple[str, ...]
    models: tuple[str, ...]


PEERS = {
    "timm": Peer(
        "https://github.com/huggingface/pytorch-image-models",
        "tests/test_models.py",
        (
            "test_model_forward",
            "test_model_backward",
            "test_model_default_cfgs",
            "test_model_forward_torchscript",
            "test_model_forward_features",
            "test_model_forward_intermediates_features",
            "test_model_forward_intermediates",
            "test_model_forward_fx",
            "test_model_backward_fx",
            "test_model_forward_fx_torchscript",
        ),
        (
            "resnet18",
            "resnet18d",
            "resnet26",
            "resnet34",
            "resnet50",
            "resnet50d",
            "resnet101",
            "resnet152",
            "wide_resnet50_2",
            "resnext50_32x4d",
            "seresnet50",
            "resnetaa50",
        ),
    ),
    "torchvision": Peer(
        "https://github.com/pytorch/vision",
        "test/test_models.py",
        (
            "test_resnet_dilation",
            "test_classification_model",
            "test_segmentation_model",
            "test_detection_model",
            "test_detection_model_validation",
        ),
        (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "wide_resnet50_2",
            "wide_resnet101_2",
            "resnext50_32x4d",
            "resnext101_32x8d",
            "resnext101_64x4d",
            "fcn_resnet50",
            "fcn_resnet101",
            "deeplabv3_resnet50",
            "deeplabv3_resnet101",
            "fasterrcnn_resnet50_fpn",
            "fasterrcnn_resnet50_fpn_v2",
            "maskrcnn_resnet50_fpn",
            "maskrcnn_resnet50_fpn_v2",
            "keypointrcnn_resnet50_fpn",
            "retinanet_resnet50_fpn",
            "retinanet_resnet50_fpn_v2",
            "fcos_resnet50_fpn",
        ),
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a peer's tests in a child process; returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("peer", choices=tuple(PEERS))
    parser.add_argument("checkout", type=Path, help="folder of a checkout of the peer's repository")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="only these models")
    own, pytest_options = list(sys.argv[1:] if arguments is None else arguments), []
    if "--" in own:
        at = own.index("--")
        own, pytest_options = own[:at], own[at + 1 :]
    options = parser.parse_args(own)
    peer = PEERS[options.peer]
    if problem := why_not_runnable(options.peer, options.checkout):
        parser.error(problem)
    if unknown := set(options.models or ()) - set(peer.models):
        parser.error(f"--models {' '.join(sorted(unknown))}: allowed are {', '.join(peer.models)}")
    command = [
        *(sys.executable, "-m", "pytest", str(options.checkout.resolve() / peer.tests)),
        *("-p", "tools.peer_plugin", "--peer", options.peer, "--peer-models", ",".join(options.models or peer.models)),
        *("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestUnknownMarkWarning", "--override-ini=addopts="),
        *pytest_options,
    ]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # Started in the checkout, Python would import the peer from there: not built, and of another version.
    with tempfile.TemporaryDirectory() as elsewhere:
        return int(subprocess.call(command, cwd=elsewhere, env=os.environ | {"PYTHONPATH": path}) != 0)


def why_not_runnable(name: str, checkout: Path) -> str | None:
    """Why a peer's tests cannot run from a folder, or None."""
    peer = PEERS[name]
    way_out = f"make one with: git clone --depth 1 {peer.url}"
    if not checkout.is_dir():
        return f"{checkout} is not a folder; it should be a checkout of {name}: {way_out}"
    if not (checkout / peer.tests).is_file():
        return f"{checkout} is not a checkout of {name}: it has no {peer.tests}; {way_out}"
    for package in dict.fromkeys((name, "torchvision", "pytest")):  # timm's fx tests need torchvision
        try:
            importlib.import_module(package)
        except ImportError as error:
            return f"{package} cannot be imported ({error}); install it: pip install {package}"
    return None


if __name__ == "__main__":
    sys.exit(main())

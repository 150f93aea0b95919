"""Runs the kernels on test digits in Triton's interpreter: ``TRITON_INTERPRET=1 python -m bench.interpreted``.

A process of its own, because triton reads that variable when it is imported. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter

import torch

import resnet_triton
from resnet_triton.kernels.launch import COUNTS
from resnet_triton.models import mnist5k_resnet20

from . import data


def main(argv: list[str] | None = None) -> int:
    """Classifies one test digit of each of the first ``--images`` classes, every step on a kernel of this package."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, choices=range(1, 11), default=10)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float16")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1 in the environment")
    digits = data.mnist5k(train=False)
    index = [int((digits.labels == digit).nonzero()[0]) for digit in range(args.images)]
    images = digits.images[index]
    dtype = getattr(torch, args.dtype)
    model = mnist5k_resnet20()
    with torch.inference_mode():
        exact = resnet_triton.unconvert(model).double()(images.double())
        with resnet_triton.use_backend("triton"):
            logits = model.to(dtype)(images.to(dtype))
        eager = resnet_triton.unconvert(model)(images.to(dtype))
    result = {
        "logits": logits.double().tolist(),
        "eager": eager.double().tolist(),
        "exact": exact.tolist(),
        "labels": digits.labels[index].tolist(),
        "launches": Counter(COUNTS),
    }
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

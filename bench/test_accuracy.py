"""Accuracy on real images: the shipped ResNet-20 on the 1000 digits that it was not trained on, for each provider."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bench import RESULTS, data
from bench.conftest import SMOKE
from bench.groups import MNIST_MODEL, build_model, measure
from resnet_triton.compare import Group, Watch
from resnet_triton.errors import gate, relative_error
from resnet_triton.providers import Provider
from resnet_triton.results import FAILED, Row

CUDA = torch.cuda.is_available()
IMAGES = 50 if SMOKE else 1000
if CUDA:
    GROUP = Group("cuda", MNIST_MODEL, IMAGES, 28, ("tf32", "float16", "bfloat16"), 3, suite="accuracy")
else:
    DTYPES = ("float32",) if SMOKE else ("float32", "bfloat16")
    GROUP = Group("cpu", MNIST_MODEL, IMAGES, 28, DTYPES, 0.2 if SMOKE else 12, ("torch.compile",), "accuracy")


def accuracy(row: Row, logits: Tensor, labels: Tensor, eager: Tensor) -> None:
    """Fills in top-1 accuracy, and agreement with float32 eager's classes, on the images that ``logits`` are of."""
    found = logits.argmax(1).cpu()
    labels, eager = labels[: len(found)], eager[: len(found)]
    row.accuracy = (found == labels).double().mean().item()
    row.agreement = (found == eager.argmax(1).cpu()).double().mean().item()
    row.images = len(labels)


@torch.inference_mode()
def _measure(watch: Watch) -> dict[tuple[str, str], Row]:
    digits = data.mnist5k(train=False)
    labels = digits.labels[:IMAGES]
    eager = build_model(MNIST_MODEL)(digits.images[:IMAGES])
    return measure(GROUP, lambda row, logits: accuracy(row, logits, labels, eager), watch)


@pytest.mark.parametrize(
    ("dtype", "provider"),
    [pytest.param(d, p, id=f"{d}-{p.name.replace(' ', '_')}") for d, p in GROUP.entries()],
)
def test_accuracy(dtype: str, provider: Provider, lab, publish) -> None:
    """One provider in one dtype."""
    row = lab.once(GROUP, lambda: _measure(lab))[dtype, provider.name]
    publish(row)
    if provider.ours:
        assert row.agreement is not None
        # float32 logits differ in the last digits only; half precision may tip an image that is a coin toss
        assert row.agreement >= (0.999 if dtype == "float32" else 0.995), f"agreement {row.agreement:.1%}"


@pytest.mark.skipif(CUDA, reason="the rows above ran the kernels on the GPU")
def test_kernels_in_the_interpreter(record) -> None:
    """The kernels themselves on one digit of each class, in Triton's interpreter; not timed."""
    images = 1 if SMOKE else 10
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.interpreted", "--images", str(images)],
        env=env, cwd=RESULTS.parent.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    row = Row("accuracy", "cpu", "our kernels, interpreted", MNIST_MODEL, "float16")
    row.infer_batch_size = row.images = images
    if done.returncode:
        row.status = f"{FAILED}: {(done.stderr.splitlines() or ['no message'])[-1]}"[:200]
        record(row)
    found = json.loads(done.stdout)
    logits, eager, exact = (torch.tensor(found[name]) for name in ("logits", "eager", "exact"))
    ours, theirs = relative_error(logits, exact), relative_error(eager, exact)
    row.error, row.eager_error = ours.rms, theirs.rms
    row.status = gate(ours, theirs, "float16", is_ours=True)
    accuracy(row, logits, torch.tensor(found["labels"]), exact)
    launches = sum(found["launches"].values())
    row.note = f"not timed; {launches} launches of {', '.join(sorted(found['launches']))}"
    record(row)
    assert row.agreement == 1.0
    assert launches >= 22, "a step did not run on a kernel"

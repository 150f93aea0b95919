"""A small C4 detector learns drawn shapes from random weights.

The detector and the recipe are those of `resnet-triton detect train --data shapes`, but for twice the learning rate.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_triton.cli.detect import DEFAULTS
from resnet_triton.detection import detect, faster_rcnn_c4, fit_detector, set_statistics, shapes, summary

pytest.importorskip("torchvision")

#: mAP@.5 on 30 new images that 130 steps of 8 images reach at least; before training it is below a tenth.
LEARNT = 0.4


def test_a_small_detector_learns() -> None:
    data, tests = shapes(1600, seed=0), shapes(30, seed=1)
    model = faster_rcnn_c4(num_classes=1 + len(data.classes), **DEFAULTS["shapes"].model)
    set_statistics(model, [data[i][0] for i in range(16)])

    def found() -> float:
        return summary("shapes", detect(model, tests, batch_size=10), tests.truths, tests.classes)["mAP@.5"]

    before = found()
    history = fit_detector(model, data, replace(DEFAULTS["shapes"].recipe, steps=130, lr=6e-3, drops=(104,)))
    after = found()
    assert before < 0.1 and after > LEARNT, f"mAP@.5 {before:.3f} before, {after:.3f} after {history[-1]}"
    assert history[-1]["loss_objectness"] < history[0]["loss_objectness"] / 2
    frozen = [m for m in model.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    assert len(frozen) == 21 and not any(p.requires_grad for m in frozen for p in m.parameters())
    assert torch.isfinite(next(model.parameters())).all()

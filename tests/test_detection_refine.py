"""Box refinement: votes by hand, and a second round that changes nothing where boxes are already right."""

from __future__ import annotations

import pytest
import torch

from resnet_triton.detection import refined, vote
from tests.comparers import same_math
from tests.test_detection_model import detector, pictures


def test_votes_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    moved, wide, far = [0.0, 0, 10, 8], [0.0, 0, 30, 10], [50.0, 50, 60, 60]
    candidates = torch.tensor([[boxes[0].tolist()] * 2, [moved] * 2, [wide] * 2, [far] * 2])
    scores = torch.tensor([[0.1, 0.6], [0.1, 0.2], [0.1, 0.9], [0.5, 0.5]])
    voted = vote(boxes, torch.tensor([1, 0]), candidates, scores)
    # the wide one overlaps by a third and has no vote
    torch.testing.assert_close(voted, torch.tensor([[0, 0, 10, (6 + 1.6) / 0.8], [50, 50, 60, 60]]))


def test_regions_that_move_nowhere_are_found_twice_and_kept_once() -> None:
    """With box deltas of zero both rounds agree, and NMS takes the second copy of each away."""
    model = detector()
    predictor = model.roi_heads.box_predictor
    torch.nn.init.zeros_(predictor.bbox_pred.weight)
    with torch.no_grad():
        expected = model(pictures())
    for mine, theirs in zip(refined(model, pictures()), expected, strict=True):
        assert len(mine["labels"]) > 5 and torch.equal(mine["labels"], theirs["labels"])
        same_math(mine["scores"], theirs["scores"])


def test_refined_boxes_are_in_the_image_and_need_eval_mode() -> None:
    model = detector()
    for image, found in zip(pictures(), refined(model, pictures()), strict=True):
        boxes, (h, w) = found["boxes"], image.shape[-2:]
        assert len(boxes) == len(found["scores"]) == len(found["labels"]) > 0
        assert (boxes >= 0).all() and (boxes[:, 2] <= w).all() and (boxes[:, 3] <= h).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (found["scores"].diff() <= 0).all()
    with pytest.raises(ValueError, match="refined needs a detector in eval mode"):
        refined(model.train(), pictures())

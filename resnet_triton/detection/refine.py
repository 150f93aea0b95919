"""Box refinement (appendix B of the paper): regions are pooled again where the first boxes came out, and boxes vote."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def refined(model: Any, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Detections with box refinement, as ``model(images)`` gives them without.

    Each region's box of its likeliest class is pooled and classified once more; the predictions of both rounds go
    through one NMS, and each box that is left becomes the mean of those near it (:func:`vote`). The paper does not say
    which class's box is pooled again.

    Args:
        model: a Faster R-CNN of torchvision's kind in eval mode.
        images: ``[3, H, W]`` from 0 to 1.

    Raises:
        ValueError: ``model`` is in training mode.
    """
    if model.training:
        raise ValueError("refined needs a detector in eval mode; call model.eval() first")
    heads = model.roi_heads
    batch, _ = model.transform(list(images))
    features = model.backbone(batch.tensors)
    if isinstance(features, Tensor):
        features = OrderedDict([("0", features)])
    proposals, _ = model.rpn(batch, features)
    rounds = [_predicted(heads, features, proposals, batch.image_sizes)]
    rounds.append(_predicted(heads, features, _likeliest(rounds[0], batch.image_sizes), batch.image_sizes))
    union = [[torch.cat(parts) for parts in zip(*image, strict=True)] for image in zip(*rounds, strict=True)]
    logits, deltas = (torch.cat([image[i] for image in union]) for i in (0, 1))
    found = heads.postprocess_detections(logits, deltas, [image[2] for image in union], batch.image_sizes)
    results = []
    for (image_logits, _, _, candidates), size, boxes, scores, labels in zip(
        union, batch.image_sizes, *found, strict=True
    ):
        voted = vote(boxes, labels, _clipped(candidates, size), image_logits.softmax(1))
        results.append({"boxes": voted, "labels": labels, "scores": scores})
    return model.transform.postprocess(results, batch.image_sizes, [image.shape[-2:] for image in images])


def vote(boxes: Tensor, labels: Tensor, candidates: Tensor, scores: Tensor, overlap: float = 0.5) -> Tensor:
    """The mean of the candidates of its class that overlap each box, weighted by their scores.

    Args:
        boxes, labels: ``[N, 4]`` and ``[N]``, which NMS has left of the candidates.
        candidates, scores: ``[M, classes, 4]`` and ``[M, classes]``.
        overlap: intersection over union from which on a candidate votes.
    """
    from torchvision.ops import box_iou

    voted = boxes.clone()
    for label in labels.unique():
        mine = labels == label
        weights = scores[:, label] * (box_iou(boxes[mine], candidates[:, label]) >= overlap)
        voted[mine] = weights @ candidates[:, label] / weights.sum(1, keepdim=True)
    return voted


def _predicted(heads: Any, features: Any, proposals: list[Tensor], sizes: list[tuple[int, int]]) -> list[tuple]:
    """Of each image: logits, box deltas, regions, and the boxes of every class."""
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, proposals, sizes)))
    boxes = heads.box_coder.decode(deltas, proposals)
    counts = [len(regions) for regions in proposals]
    return list(zip(logits.split(counts), deltas.split(counts), proposals, boxes.split(counts), strict=True))


def _likeliest(predicted: list[tuple], sizes: list[tuple[int, int]]) -> list[Tensor]:
    """The box of each region's likeliest class that is not the background."""
    chosen = []
    for (logits, _, _, boxes), size in zip(predicted, sizes, strict=True):
        best = logits[:, 1:].argmax(1) + 1
        chosen.append(_clipped(boxes[torch.arange(len(boxes), device=boxes.device), best], size))
    return chosen


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.ops import clip_boxes_to_image

    return clip_boxes_to_image(boxes, size)

"""Faster R-CNN with a ResNet C4 backbone: the paper's detector (appendix A), on torchvision's detection package.

::

    image -> conv1 layer1 layer2 layer3 -> features, stride 16 -> RPN -> proposals
                                               |                        |
                                               +---- RoI pooling 14x14 -+-> layer4 -> 7x7 -> mean -> classes, boxes

layer4 runs once for each region, as the head. The statistics of every BN are constants. Backbone and head are this
package's blocks, converted: they run fused in training and in inference, and ``unconvert`` gives the plain modules
back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from ..convert import convert
from ..models.builders import Weights
from ..transfer import freeze
from ..weights import load_weights

STRIDE = 16  # of the features, in pixels of the image
DEPTHS = (18, 34, 50, 101, 152)
STAGES = ("conv1", "layer1", "layer2", "layer3", "layer4")
POOLINGS = ("pool", "align")

#: Arguments of torchvision's FasterRCNN where nothing else is said; docs/detection.md has their sources.
DEFAULTS: Mapping[str, Any] = {
    "min_size": 600,
    "max_size": 1000,
    "rpn_pre_nms_top_n_train": 12000,
    "rpn_pre_nms_top_n_test": 6000,
    "rpn_post_nms_top_n_train": 2000,
    "rpn_post_nms_top_n_test": 300,
    "rpn_nms_thresh": 0.7,
    "rpn_fg_iou_thresh": 0.7,
    "rpn_bg_iou_thresh": 0.3,
    "rpn_batch_size_per_image": 256,
    "rpn_positive_fraction": 0.5,
    "box_batch_size_per_image": 128,
    "box_positive_fraction": 0.25,
    "box_fg_iou_thresh": 0.5,
    "box_bg_iou_thresh": 0.5,
    "box_nms_thresh": 0.3,
    "box_score_thresh": 0.05,
    "box_detections_per_img": 100,
    "bbox_reg_weights": (10.0, 10.0, 5.0, 5.0),  # 1 / (.1, .1, .2, .2)
}


class RoIPooling(nn.Module):
    """Features of regions ``[R, C, size, size]`` from the one feature map: RoIPool (``"pool"``) or RoIAlign."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size

    def forward(self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: object) -> Tensor:
        """As torchvision's RoIHeads calls it; ``proposals`` are ``[R, 4]`` an image, in its pixels."""
        from torchvision import ops

        (x,) = features.values()
        size = (self.size, self.size)
        if self.kind == "align":
            return ops.roi_align(x, proposals, size, 1 / STRIDE, sampling_ratio=2)
        return ops.roi_pool(x, proposals, size, 1 / STRIDE)

    def extra_repr(self) -> str:
        """Kind and size."""
        return f"{self.kind!r}, {self.size}"


class Conv5Head(nn.Module):
    """The last stage of a ResNet and the average over each region: ``[R, C, size, size]`` to ``[R, C']``."""

    def __init__(self, layer4: nn.Sequential) -> None:
        super().__init__()
        self.layer4 = layer4

    def forward(self, x: Tensor) -> Tensor:
        """Features of regions to one vector a region."""
        return self.layer4(x).mean((2, 3))


class NarrowResNet(models.ResNet):
    """A ResNet whose four stages have a quarter of the channels."""

    def _make_layer(self, make: Any, outplanes: int, planes: int, *args: Any) -> nn.Sequential:
        return super()._make_layer(make, outplanes // 4, planes // 4, *args)


class _Matcher:
    """torchvision's matcher of regions and objects, that leaves out background far from every object."""

    def __init__(self, matcher: Any, low: float) -> None:
        self.matcher, self.low = matcher, low
        self.BELOW_LOW_THRESHOLD, self.BETWEEN_THRESHOLDS = matcher.BELOW_LOW_THRESHOLD, matcher.BETWEEN_THRESHOLDS

    def __call__(self, overlaps: Tensor) -> Tensor:
        """The object of each region, or why it has none, from overlaps ``[objects, regions]``."""
        matched = self.matcher(overlaps)
        matched[overlaps.amax(0) < self.low] = self.BETWEEN_THRESHOLDS
        return matched


def faster_rcnn_c4(
    depth: int = 101,
    num_classes: int = 21,
    *,
    weights: Weights = None,
    weights_backbone: Weights = None,
    narrow: bool = False,
    frozen_stages: int = 2,
    roi: str = "pool",
    roi_size: int = 14,
    roi_stride: int | None = None,
    background_iou: float = 0.1,
    anchor_sizes: Sequence[int] = (128, 256, 512),
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    backbone_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    **kwargs: Any,
) -> Any:
    """The paper's detector, converted: torchvision's FasterRCNN with conv1 to layer3 as backbone and layer4 as head.

    It takes images and targets as torchvision's detectors do: a list of ``[3, H, W]`` from 0 to 1, and in training a
    list of ``{"boxes": [N, 4] in x1 y1 x2 y2, "labels": [N] from 1}``; it gives losses, or boxes, labels and scores.

    Args:
        depth: one of 18, 34, 50, 101, 152.
        num_classes: with the background, which is class 0: 21 for VOC, 81 for COCO.
        weights: of the whole detector: a state_dict or a path, see :mod:`resnet_triton.weights`.
        weights_backbone: of the classifier that it starts from; as ``weights`` of :func:`resnet_triton.resnet101`.
            The statistics of its BNs are what the detector keeps. With random weights they are 0 and 1, which a deep
            network cannot train with: see :func:`set_statistics`.
        narrow: a quarter of the channels in every stage, for trials on small images; of depth 18 only.
        frozen_stages: how many of conv1, layer1 .. layer4 are not trained, from the first.
        roi: ``"pool"`` (RoIPool, the paper's) or ``"align"`` (RoIAlign).
        roi_size: height and width of a region's features; 14, or 7 for half of the head's cost.
        roi_stride: of layer4; None is 2, or 1 where ``roi_size`` is below 14, so that its output stays 7x7.
        background_iou: a region trains as background where its best overlap with an object is at least this, and
            below ``box_bg_iou_thresh``; 0 takes all others.
        anchor_sizes, aspect_ratios: of the RPN's anchors; sizes in pixels of the resized image.
        backbone_options: arguments of :class:`resnet_triton.models.ResNet`, such as ``stride_in_1x1`` for the
            authors' own weights.
        progress: show the progress of a download.
        **kwargs: arguments of torchvision's FasterRCNN, before :data:`DEFAULTS`.

    Raises:
        ValueError: for arguments out of range, and weights that do not fit.
        ImportError: without torchvision.
    """
    if narrow and depth != 18:
        raise ValueError(f"narrow=True is a ResNet of depth 18, got depth={depth!r}")
    _check(depth, num_classes, frozen_stages, roi, roi_size, roi_stride, background_iou)
    try:
        from torchvision.models._utils import IntermediateLayerGetter
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.anchor_utils import AnchorGenerator
        from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
        from torchvision.ops.misc import FrozenBatchNorm2d
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"detection needs torchvision: pip install torchvision ({error})") from error

    options = {"norm_layer": FrozenBatchNorm2d, **(backbone_options or {})}
    resnet: models.ResNet
    if narrow:
        resnet = NarrowResNet(models.BasicBlock, (2, 2, 2, 2), **options)
        load_weights(resnet, weights_backbone)
    else:
        resnet = models.BUILDERS[f"resnet{depth}"](weights=weights_backbone, progress=progress, **options)
    freeze(resnet, STAGES[:frozen_stages])
    block: Any = resnet.layer4[0]
    _set_stride(block, (2 if roi_size >= 14 else 1) if roi_stride is None else roi_stride)
    channels = [planes * block.expansion // (4 if narrow else 1) for planes in (256, 512)]
    backbone: Any = IntermediateLayerGetter(resnet, {"layer3": "0"})
    backbone.out_channels = channels[0]
    model = FasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator((tuple(anchor_sizes),), (tuple(aspect_ratios),)),
        box_head=Conv5Head(resnet.layer4),
        box_predictor=FastRCNNPredictor(channels[1], num_classes),
        **{**DEFAULTS, **kwargs},
    )
    model.roi_heads.box_roi_pool = RoIPooling(roi, roi_size)
    model.roi_heads.proposal_matcher = _Matcher(model.roi_heads.proposal_matcher, background_iou)
    for fc, std in ((model.roi_heads.box_predictor.cls_score, 0.01), (model.roi_heads.box_predictor.bbox_pred, 0.001)):
        nn.init.normal_(fc.weight, std=std)
        nn.init.zeros_(fc.bias)
    load_weights(model, weights)
    return convert(model, inplace=True)


def _check(
    depth: int, classes: int, frozen: int, roi: str, roi_size: int, roi_stride: int | None, background: float
) -> None:
    for name, value, allowed in (
        ("depth", depth, DEPTHS),
        ("frozen_stages", frozen, range(len(STAGES) + 1)),
        ("roi", roi, POOLINGS),
        ("roi_stride", roi_stride, (None, 1, 2)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    if classes < 2:
        raise ValueError(f"num_classes must be at least 2, the background and one kind of object, got {classes!r}")
    if roi_size < 1:
        raise ValueError(f"roi_size must be at least 1, got {roi_size!r}")
    if not 0 <= background < 1:
        raise ValueError(f"background_iou must be at least 0 and below 1, got {background!r}")


def _set_stride(block: nn.Module, stride: int) -> None:
    """Gives the first block of a stage another stride than 2."""
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    for conv in convs:
        conv.stride = (stride, stride)
    block.stride = stride  # type: ignore[assignment]


def set_statistics(detector: nn.Module, images: Sequence[Tensor]) -> None:
    """Takes the constants of every frozen BN from images: then the output of each has mean 0 and variance 1.

    For a detector without pre-trained weights, once, before it is trained. It runs the detector on the images, layer
    after layer as each BN gets its statistics.

    Args:
        detector: from :func:`faster_rcnn_c4`, converted or not.
        images: as the detector takes them; some dozens.

    Raises:
        ValueError: ``detector`` has no frozen BN.
    """
    frozen = [m for m in detector.modules() if type(m).__name__ == "FrozenBatchNorm2d"]
    if not frozen:
        raise ValueError(f"set_statistics: {type(detector).__name__} has no FrozenBatchNorm2d")

    def take(m: Any, args: tuple[Tensor]) -> None:
        x = args[0].float()
        m.running_mean.copy_(x.mean((0, 2, 3)))
        m.running_var.copy_(x.var((0, 2, 3), unbiased=False))

    training = detector.training
    handles = [m.register_forward_pre_hook(take) for m in frozen]
    try:
        with torch.no_grad():
            detector.eval()(list(images))
    finally:
        for handle in handles:
            handle.remove()
        detector.train(training)

"""The C4 detector: converted and plain ones agree in detections, losses and gradients; its defaults are the paper's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from resnet_triton import convert, explain, fold, unconvert
from resnet_triton.convert import is_converted
from tests.comparers import same_math
from tests.networks import calls, images, randomise

pytest.importorskip("torchvision")
from resnet_triton.detection import Conv5Head, RoIPooling, faster_rcnn_c4, set_statistics

SMALL = {
    "min_size": 48,
    "max_size": 64,
    "roi_size": 4,
    "roi_stride": 2,
    "anchor_sizes": (16, 32),
    "rpn_post_nms_top_n_test": 8,
    "rpn_post_nms_top_n_train": 16,
    "box_batch_size_per_image": 8,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 20,
}


def detector(depth: int = 18, **options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(faster_rcnn_c4(depth, 4, **{**SMALL, **options}).double())


def pictures() -> list[Tensor]:
    return [images(1, 48, 64)[0].sigmoid(), images(1, 64, 40)[0].sigmoid()]


def targets() -> list[dict[str, Tensor]]:
    boxes = ([[4.0, 5, 30, 40], [20, 10, 60, 45]], [[1.0, 20, 39, 60]])
    return [{"boxes": torch.tensor(b, dtype=torch.float64), "labels": torch.arange(len(b)) + 1} for b in boxes]


@pytest.mark.parametrize(
    "options", [{"depth": 50}, {"roi": "align", "roi_size": 3, "roi_stride": None}], ids=("50", "18")
)
def test_detections_are_those_of_the_plain_and_of_the_folded_detector(options: dict) -> None:
    ours = detector(**options)
    plain = unconvert(ours)
    assert not any(is_converted(m) for m in plain.modules())
    with torch.no_grad():
        expected = plain(pictures())
        for model in (ours, fold(plain)):
            for mine, theirs in zip(model(pictures()), expected, strict=True):
                assert len(theirs["labels"]) > 5 and torch.equal(mine["labels"], theirs["labels"])
                same_math(mine["boxes"], theirs["boxes"])
                same_math(mine["scores"], theirs["scores"])


def test_losses_and_gradients_are_those_of_the_plain_detector() -> None:
    ours = detector()
    plain = unconvert(ours)
    losses = []
    for model in (ours, plain):
        torch.manual_seed(1)
        losses.append(model.train()(pictures(), targets()))
        sum(losses[-1].values()).backward()
    assert len(losses[0]) == 4 and min(value.item() for value in losses[0].values()) > 0
    for name, value in losses[1].items():
        same_math(losses[0][name].double(), value.double())  # torchvision takes the RPN's in fp32
    trained = 0
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        frozen = name.startswith(("backbone.conv1", "backbone.layer1"))
        assert (mine.grad is None) == (theirs.grad is None) == frozen, name
        if not frozen:
            same_math(mine.grad, theirs.grad)
            trained += 1
    assert trained == 3 * 5 + 6 + 4, "convolutions of three stages, RPN and the two sibling layers"


def test_backbone_and_head_run_fused() -> None:
    ours = detector()
    counts = calls(ours, pictures())
    assert counts == {"stem": 1, "conv_bn_act": 8, "block_tail": 8, "aten": 3}, "the RPN's convolutions are its own"


@pytest.mark.parametrize(("size", "stride"), [(14, 2), (7, 1)])
def test_explain_shows_trunk_and_head(size: int, stride: int) -> None:
    with torch.device("meta"):
        model = faster_rcnn_c4(roi_size=size)
    h200 = {"dtype": torch.bfloat16, "device": "NVIDIA H200"}
    trunk = explain(model.backbone, (1, 3, 608, 1008), **h200)
    assert trunk.rows[0].op.startswith("stem") and "aten" not in {row.realisation for row in trunk.rows}
    head = explain(model.roi_heads.box_head, (300, 1024, size, size), **h200)
    assert f"3x3/{stride} 300x{size}x{size}x512->512" in "\n".join(row.op for row in head.rows)
    assert head.rows[-1].realisation == "conv1x1_pool", "the average over a region is part of the last convolution"


def test_the_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        model = faster_rcnn_c4()
    rpn, head = model.rpn, model.roi_heads
    assert (model.transform.min_size, model.transform.max_size) == ((600,), 1000)
    assert (rpn._pre_nms_top_n, rpn._post_nms_top_n) == (
        {"training": 12000, "testing": 6000},
        {"training": 2000, "testing": 300},
    )
    assert (rpn.nms_thresh, head.nms_thresh, head.box_coder.weights) == (0.7, 0.3, (10.0, 10.0, 5.0, 5.0))
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    assert (head.fg_bg_sampler.batch_size_per_image, head.fg_bg_sampler.positive_fraction) == (128, 0.25)
    assert rpn.anchor_generator.num_anchors_per_location() == [9]
    assert model.backbone.out_channels == 1024 and head.box_predictor.cls_score.out_features == 21
    convs = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    projections = 3
    assert len(convs) - projections == 91, "the paper's appendix A counts the shared convolutions"
    assert not any(p.requires_grad for p in model.backbone.layer1.parameters())
    assert all(p.requires_grad for p in model.backbone.layer2.parameters())
    assert not [name for name, _ in model.named_parameters() if ".bn" in name], "BN is constant"


def test_background_far_from_every_object_is_left_out() -> None:
    overlaps = torch.tensor([[0.05, 0.3, 0.6], [0.0, 0.1, 0.2]])
    for low, expected in ((0.1, [-2, -1, 0]), (0.0, [-1, -1, 0])):
        matcher = detector(background_iou=low).roi_heads.proposal_matcher
        assert matcher(overlaps).tolist() == expected


@pytest.mark.parametrize("kind", ["pool", "align"])
def test_regions_are_pooled_from_a_map_of_stride_16(kind: str) -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    regions = [torch.tensor([[0.0, 0, 63, 63]])]
    pooled = RoIPooling(kind, 2)({"0": x}, regions, [(64, 64)])
    assert pooled.shape == (1, 1, 2, 2)
    if kind == "pool":
        assert pooled.flatten().tolist() == [10, 11, 14, 15], "pixel 63 rounds to position 4, beyond the last"


def test_no_region_is_no_detection() -> None:
    head = detector().roi_heads.box_head
    with torch.no_grad():
        assert head(torch.empty(0, 256, 4, 4, dtype=torch.float64)).shape == (0, 512)


def test_weights_of_a_classifier_and_of_a_detector(tmp_path) -> None:
    from safetensors.torch import save_file

    from resnet_triton import resnet18

    classifier = randomise(resnet18())
    model = faster_rcnn_c4(18, 4, weights_backbone=classifier.state_dict(), **SMALL)
    layer4, bn = model.roi_heads.box_head.layer4[0], classifier.layer4[0].bn1
    assert torch.equal(layer4.conv1.weight, classifier.layer4[0].conv1.weight)
    assert torch.equal(layer4.bn1.running_var, bn.running_var) and "running_var" in dict(layer4.bn1.named_buffers())
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "d.safetensors")
    again = faster_rcnn_c4(18, 4, weights=tmp_path / "d.safetensors", **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="does not fit FasterRCNN"):
        faster_rcnn_c4(18, 5, weights=tmp_path / "d.safetensors", **SMALL)


def test_it_copies_and_pickles() -> None:
    model = detector()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), convert(unconvert(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]


def test_statistics_from_images_normalise_every_layer() -> None:
    torch.manual_seed(0)
    model = faster_rcnn_c4(18, 4, **SMALL).train()
    photographs = [torch.rand(3, 64, 64) for _ in range(4)]
    set_statistics(model, photographs)
    assert model.training
    outputs = {}
    bn = model.backbone.layer3[1].bn2
    bn.register_forward_hook(lambda m, args, out: outputs.update(out=out.clone()))  # ReLU follows in place
    with torch.no_grad():
        model.eval()(photographs)
    out = outputs["out"].double()
    assert out.mean((0, 2, 3)).abs().max() < 1e-3 and (out.var((0, 2, 3)) - 1).abs().max() < 0.1
    with pytest.raises(ValueError, match="has no FrozenBatchNorm2d"):
        set_statistics(nn.Linear(2, 2), photographs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 34, "narrow": True}, "narrow=True is a ResNet of depth 18, got depth=34"),
        ({"depth": 20}, "depth must be one of 18, 34, 50, 101, 152, got 20"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"frozen_stages": 6}, "frozen_stages must be one of 0, 1, 2, 3, 4, 5, got 6"),
        ({"roi": "crop"}, "roi must be one of 'pool', 'align', got 'crop'"),
        ({"roi_size": 0}, "roi_size must be at least 1"),
        ({"roi_stride": 3}, "roi_stride must be one of None, 1, 2, got 3"),
        ({"background_iou": 1.5}, "background_iou must be at least 0 and below 1"),
    ],
)
def test_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        faster_rcnn_c4(**{"depth": 18, "num_classes": 4, **options})


def test_the_head_is_a_module_like_any_other() -> None:
    head = detector().roi_heads.box_head
    assert isinstance(head, Conv5Head) and is_converted(head)
    x = torch.randn(3, 256, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        same_math(torch.jit.trace(head, x)(x), head(x))

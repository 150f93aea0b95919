"""Models of other libraries: converted and folded, they give the outputs of the unconverted model.

Random weights, fp64: two models that should agree differ by the order of sums alone.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torchvision.models import resnet as tv

from resnet_triton import convert, explain, fold, unconvert
from resnet_triton.convert import is_converted
from tests.comparers import same_math
from tests.networks import calls, images, randomise

timm = pytest.importorskip("timm")


def outputs(model: nn.Module, x: object) -> list[Tensor]:
    """Every tensor that a forward gives, in order."""
    with torch.no_grad():
        return [t for t in torch.utils._pytree.tree_leaves(model(x)) if isinstance(t, Tensor)]


def agree(a: nn.Module, b: nn.Module, x: object) -> None:
    theirs, ours = outputs(a, x), outputs(b, x)
    assert len(theirs) == len(ours) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        if mine.is_floating_point():
            same_math(mine, other)
        else:
            assert torch.equal(mine, other)


def converted(model: nn.Module, x: Tensor | list[Tensor]) -> dict[str, int]:
    """Checks outputs of the model converted, and folded; returns the operators that the converted one ran."""
    keys = list(model.state_dict())
    ours = convert(model)
    assert list(ours.state_dict()) == keys and isinstance(ours, type(model))
    agree(model, ours, x)
    agree(model, fold(model), x)
    assert [type(m) for m in unconvert(ours).modules()] == [type(m) for m in model.modules()]
    return calls(ours, x)


# torchvision


def test_a_wide_resnet_fuses_whole() -> None:
    model = randomise(tv.ResNet(tv.Bottleneck, [1, 2, 1, 1], num_classes=10, width_per_group=128).double())
    assert converted(model, images()) == {"stem": 1, "conv_bn_act": 1, "block_tail": 5, "head": 1}


@pytest.mark.parametrize(
    "name", ("wide_resnet50_2", "wide_resnet101_2", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d")
)
def test_every_block_of_torchvisions_variants_is_known(name: str) -> None:
    with torch.device("meta"):
        model = convert(torchvision.models.get_model(name).eval(), inplace=True)
    plan = explain(model, (1, 3, 64, 64), dtype=torch.bfloat16, device="NVIDIA H200")
    grouped = [row for row in plan.rows if "groups=" in row.reason]
    assert len([row for row in grouped if row.op == "conv"]) == 0 if "wide" in name else 16 if "50" in name else 33
    rest = [row for row in plan.rows if row not in grouped]
    assert "batch_norm" not in {row.op for row in rest}, "every other BN is part of a convolution"


def test_deeplab() -> None:
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=3)
    counts = converted(randomise(model.double()), images(1, 33, 40))
    assert (counts["stem"], counts["block_tail"]) == (1, 16)


def test_mask_rcnn_with_frozen_bn_whose_eps_changed() -> None:
    from torchvision.models.detection._utils import overwrite_eps

    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, box_detections_per_img=5
    )
    model = randomise(model).double()
    overwrite_eps(model, 0.0)
    x = [images(1, 48, 64)[0]]
    counts = converted(model, x)
    assert (counts["stem"], counts["block_tail"]) == (1, 16)


# timm

TIMM = {
    "resnet18": {"stem": 1, "conv_bn_act": 8, "block_tail": 8, "head": 1},
    "resnet50": {"stem": 1, "conv_bn_act": 1, "block_tail": 16, "head": 1},
    "resnet26d": {"conv_bn_act": 4, "block_tail": 8, "head": 1},  # deep stem, average pool in the shortcut
    "seresnet18": {"stem": 1, "conv_bn_act": 19, "aten": 16, "add_relu": 8, "head": 1},
    "resnext26ts": None,  # another class of timm's, which is not a ResNet of blocks
    "resnetblur18": {"stem": 1, "aten": 4, "conv_bn_act": 14, "block_tail": 5, "head": 1},
}


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, caplog) -> None:
    model = randomise(timm.create_model(name, num_classes=10).double())
    if TIMM[name] is None:
        assert "stem" not in calls(convert(model), images())
        assert "found no residual block that it knows" in caplog.text
    else:
        assert converted(model, images()) == TIMM[name]


def test_timm_says_why_parts_stay() -> None:
    plan = explain(convert(timm.create_model("seresnet18").eval()), (1, 3, 64, 64), device="NVIDIA H200")
    reason = "se is SEModule between the last BN and the addition"
    assert [r.reason for r in plan.rows if r.name == "layer1.0.se.fc1"] == [reason] * 2, "convolution and ReLU"


def test_timm_methods_beside_forward() -> None:
    model = randomise(timm.create_model("resnet18", num_classes=10).double())
    ours, x = convert(model), images()
    with torch.no_grad():
        features = model.forward_features(x)
        same_math(ours.forward_features(x), features)
        same_math(ours.forward_head(features), model.forward_head(features))
        same_math(ours.forward_head(features, pre_logits=True), model.forward_head(features, pre_logits=True))
        final, taken = model.forward_intermediates(x)
        our_final, ours_taken = ours.forward_intermediates(x)
        for a, b in zip([our_final, *ours_taken], [final, *taken], strict=True):
            same_math(a, b)
    for m in (model, ours):
        m.reset_classifier(0)
    agree(model, ours, x)
    for m in (model, ours):
        m.reset_classifier(4, "max")
        torch.manual_seed(0)
        m.fc.reset_parameters()
        m.double()
    agree(model, ours, x)
    ours.set_grad_checkpointing()
    agree(model, ours, x)


def test_timm_drop_path_is_off_in_eval_and_on_in_training() -> None:
    model = randomise(timm.create_model("resnet18", num_classes=10, drop_path_rate=0.5, drop_rate=0.5).double())
    assert converted(model, images()) == TIMM["resnet18"]
    ours, x = convert(model.train()), images(4)
    for m in (model, ours):
        for bn in m.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.eval()
    torch.manual_seed(0)
    theirs = model(x)
    torch.manual_seed(0)
    same_math(ours(x), theirs)


@pytest.mark.parametrize("options", ({"act_layer": "silu"}, {"block_args": {"attn_layer": "se"}}), ids=("silu", "se"))
def test_gradients_of_blocks_that_run_fused_in_part(options: dict) -> None:
    """timm's activations work in place, on what the fused convolutions return."""
    model = randomise(timm.create_model("resnet18", num_classes=10, **options).double())
    ours = convert(model)
    for m in (model, ours):
        m(images()).square().sum().backward()
    for mine, theirs in zip(ours.parameters(), model.parameters(), strict=True):
        same_math(mine.grad, theirs.grad)


@pytest.mark.parametrize("name", ("resnet18", "resnet10t"))
def test_timm_features_only(name: str) -> None:
    for options in ({}, {"out_indices": (1, 3)}, {"out_indices": (4,)}, {"feature_cls": "dict"}):
        model = randomise(timm.create_model(name, features_only=True, **options).double())
        counts = converted(model, images(1))
        assert "aten" not in counts and counts["block_tail"] > 0


def test_timm_create_feature_extractor() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = randomise(timm.create_model("resnet18", num_classes=10).double())
    nodes = ["layer2", "layer4", "fc"]
    ours = create_feature_extractor(convert(model), return_nodes=nodes)
    agree(create_feature_extractor(model, return_nodes=nodes), ours, images())
    assert calls(ours, images())["block_tail"] == 8


def test_timm_scripts_traces_exports_and_compiles() -> None:
    model = randomise(timm.create_model("resnet10t", num_classes=10).double())
    ours, x = convert(model), images()
    agree(model, torch.jit.script(ours), x)
    agree(model, torch.jit.trace(ours, x), x)
    agree(model, fx.symbolic_trace(ours), x)
    agree(model, torch.export.export(ours, (x,)).module(), x)
    agree(model, torch.compile(ours, fullgraph=True, backend="eager"), x)
    features = timm.create_model("resnet10t", features_only=True, scriptable=True).double().eval()
    agree(features, torch.jit.script(convert(features)), x)


def test_timm_compiles_blocks_that_run_fused_in_part() -> None:
    model = randomise(timm.create_model("resnetblur18", num_classes=10).double())
    agree(model, torch.compile(convert(model), fullgraph=True, backend="eager"), images())


def test_timm_copies_and_pickles() -> None:
    model = convert(randomise(timm.create_model("resnet10t", num_classes=10).double()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        agree(model, other, images())


# segmentation_models_pytorch


@pytest.mark.parametrize(
    ("architecture", "encoder", "options", "tails"),
    (
        ("Unet", "resnet18", {}, 8),
        ("Unet", "resnet18", {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}, 4),
        ("DeepLabV3Plus", "resnet18", {"encoder_output_stride": 8}, 8),
        ("FPN", "resnext50_32x4d", {}, None),
        ("Unet", "tu-resnet18", {}, 8),
    ),
)
def test_segmentation_models_pytorch(architecture: str, encoder: str, options: dict, tails: int | None) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = randomise(getattr(smp, architecture)(encoder, encoder_weights=None, classes=2, **options).double())
    counts = converted(model, images(1, 64, 64))
    assert counts["stem"] == 1 and counts.get("block_tail") == tails


def test_an_encoder_compiles_whole() -> None:
    encoders = pytest.importorskip("segmentation_models_pytorch.encoders")
    model = randomise(encoders.get_encoder("resnet18", depth=2, weights=None).double())
    agree(model, torch.compile(convert(model), fullgraph=True, backend="eager"), images())


# Hugging Face transformers


def hugging_face(name: str = "ResNetForImageClassification", **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = {"layer_type": "bottleneck", "hidden_sizes": [64, 128, 256, 512], "depths": [2, 1, 1, 1], "num_labels": 7}
    model = getattr(transformers, name)(transformers.ResNetConfig(embedding_size=16, **config | options))
    return randomise(model.double())


HF = {
    "bottleneck": ({}, {"stem": 1, "conv_bn_act": 1, "block_tail": 5}),
    "basic": (
        {"layer_type": "basic", "hidden_sizes": [16, 32, 64, 128]},
        {"stem": 1, "conv_bn_act": 5, "block_tail": 5},
    ),
    # between two stages every second pixel is stored, from which both strided 1x1s read
    "v1": ({"downsample_in_bottleneck": True}, {"stem": 1, "conv_bn_act": 4, "block_tail": 5}),
    "gelu": ({"hidden_act": "gelu"}, {"aten": 1, "conv_bn_act": 5 * 3 + 4}),
}


@pytest.mark.parametrize("name", HF)
def test_hugging_face(name: str) -> None:
    options, counts = HF[name]
    model = hugging_face(**options)
    assert converted(model, images()) == counts


def test_hugging_face_hidden_states_and_tuples() -> None:
    model = hugging_face()
    ours, x = convert(model), images()
    for options in ({"output_hidden_states": True}, {"return_dict": False}):
        with torch.no_grad():
            theirs, mine = model(x, **options), ours(x, **options)
        assert type(theirs) is type(mine)
        theirs, mine = (
            torch.utils._pytree.tree_leaves(tuple(o if isinstance(o, tuple) else o.to_tuple())) for o in (theirs, mine)
        )
        for a, b in zip(mine, theirs, strict=True):
            same_math(a, b)
    with pytest.raises(ValueError, match="channel dimension"):
        ours(torch.zeros(1, 4, 32, 32, dtype=torch.float64))


def test_hugging_face_backbone_and_saving(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    model = hugging_face("ResNetBackbone", out_features=["stage2", "stage4"])
    assert converted(model, images())["block_tail"] == 5
    ours = convert(hugging_face())
    ours.save_pretrained(tmp_path)
    loaded = transformers.ResNetForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    agree(loaded.eval(), ours, images())
    stream = io.BytesIO()
    torch.save(ours.state_dict(), stream)
    assert is_converted(copy.deepcopy(ours).resnet.encoder)


def test_hugging_face_layers_with_hooks_are_called() -> None:
    model = hugging_face()
    ours, x = convert(model), images()
    seen: list[torch.Size] = []
    layer = ours.resnet.encoder.stages[0].layers[0].layer[1]
    layer.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    agree(model, ours, x)
    assert seen == [torch.Size((2, 16, 8, 8))]


def test_detr_with_its_own_frozen_bn() -> None:
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        layer_type="basic",
        hidden_sizes=[16, 32, 64, 128],
        depths=[1, 1, 1, 1],
        out_features=["stage4"],
    )
    config = transformers.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=3,
    )
    model = transformers.DetrForObjectDetection(config).eval().double()
    frozen = [m for m in model.modules() if type(m).__name__ == "DetrFrozenBatchNorm2d"]
    assert frozen
    for m in frozen:
        m.running_var.uniform_(0.5, 1.5)
    assert converted(model, images(1, 64, 64))["block_tail"] == 4


@pytest.mark.parametrize("layer_type", ("basic", "bottleneck"))
def test_the_backbone_of_rt_detr(layer_type: str) -> None:
    """Average pools before its shortcuts; of its stem of three convolutions nothing is fused."""
    transformers = pytest.importorskip("transformers")
    sizes = [16, 32, 64, 128] if layer_type == "basic" else [64, 128, 256, 512]
    config = transformers.RTDetrResNetConfig(
        embedding_size=16, layer_type=layer_type, hidden_sizes=sizes, depths=[2, 1, 1, 1], out_features=["stage4"]
    )
    model = randomise(transformers.RTDetrResNetBackbone(config).double())
    counts = converted(model, images(1, 64, 64))
    assert counts["block_tail"] == 5 and counts["aten"] == 3

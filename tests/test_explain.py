"""``explain``: which rows, for which device, with which bytes and reasons, and that it leaves the model alone."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torchvision.models import resnet as tv
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from resnet_triton import convert, cost, explain, fold, ops, use_backend
from resnet_triton.devices import known_devices
from resnet_triton.explain import Plan, Row
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from tests.networks import basics, bottlenecks

H200 = "NVIDIA H200"
LIBRARY = ("cudnn", "onednn", "aten")


def small(layers=(2, 1, 1, 1)) -> tv.ResNet:
    return convert(bottlenecks(layers, torch.float32), inplace=True)


def convolutions(plan: Plan) -> list[Row]:
    return [row for row in plan.rows if row.op.startswith(("conv", "stem"))]


def conv_shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, ConvShape]:
    """What each convolution of an unconverted model sees."""
    shapes, handles = {}, []

    def note(name: str):
        def hook(m: nn.Conv2d, args, out) -> None:
            n, c, h, w = args[0].shape
            shapes[name] = ConvShape(
                n, h, w, c, m.out_channels, *m.kernel_size, m.stride[0], m.padding[0], m.dilation[0]
            )

        return hook

    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            handles.append(m.register_forward_hook(note(name)))
    with torch.no_grad():
        model.to("meta")(torch.empty(shape, device="meta"))
    for handle in handles:
        handle.remove()
    return shapes


def workspace_bytes(row: Row, shape: ConvShape) -> int:
    """Bytes of the partial sums of a reduction that several programs share: fp32, written and read."""
    found = re.search(r" /(\d+)", row.config)
    return 8 * int(found[1]) * shape.m * shape.k if found else 0


@pytest.mark.parametrize("name", ("resnet18", "resnet50"))
@pytest.mark.parametrize("backend", ("auto", "triton"))
def test_every_convolution_is_one_row_with_its_own_bytes(name: str, backend: str) -> None:
    shape = (4, 3, 96, 64)
    with torch.device("meta"):
        theirs = getattr(tv, name)().eval()
    shapes = conv_shapes(theirs, shape)
    with torch.device("meta"):
        model = convert(getattr(tv, name)().eval(), inplace=True)
    with use_backend(backend, chains=False):
        plan = explain(model, shape, dtype=torch.bfloat16, device=H200)
    rows = {row.name: row for row in convolutions(plan)}
    assert len(rows) == len(convolutions(plan))
    assert sorted(rows) == sorted(shapes)
    assert [row.op for row in plan.rows if row.name == "fc"] == ["head"]
    others = [row.op for row in plan.rows if row not in convolutions(plan) and row.op != "max_pool"]
    assert others == ["subsample"] * (3 if name == "resnet50" else 0) + ["global_avg_pool", "head"]
    if name == "resnet50":  # the block before has stored what the projections read
        for stage in (2, 3, 4):
            whole = shapes[f"layer{stage}.0.downsample.0"]
            shapes[f"layer{stage}.0.downsample.0"] = replace(whole, h=whole.p, w=whole.q, stride=1)
    for key, row in rows.items():
        assert row.bytes > 0 and row.predicted_us > 0 and row.measured_us is None and row.reason
        assert str(shapes[key]) in row.op
        if key == "conv1":
            continue
        last = key.rpartition(".")[2] == ("conv2" if name == "resnet18" else "conv3")
        assert row.op.endswith("bn" if "downsample" in key else "bn+add+relu" if last else "bn+relu")
        if row.realisation in LIBRARY:
            epilogue = Epilogue(bn=True, residual=last, relu="downsample" not in key)
            assert row.bytes == cost.unfused_bytes(shapes[key], epilogue, 2) and not row.config
        else:
            assert row.bytes == shapes[key].bytes_moved(2, last) + workspace_bytes(row, shapes[key]) and row.config
    if backend == "triton":
        assert not [row for row in plan.rows if row.realisation in LIBRARY]
        assert rows["conv1"].op.startswith("stem+pool") and rows["conv1"].realisation == "stem_pool"
        assert rows["conv1"].bytes == cost.stem_bytes(shapes["conv1"], 2, pool=True)
        assert {row.realisation for row in rows.values()} <= {"stem_pool", "conv_tma", "conv1x1", "conv_pointer"}
    assert plan.bytes_per_image == sum(row.bytes - row.weight_bytes for row in plan.rows) / 4
    in_blocks = sum(s.weights for key, s in shapes.items() if key != "conv1")
    assert plan.weight_bytes == 2 * (in_blocks + 1000 * (512 if name == "resnet18" else 2048))
    assert all(0 < row.roofline <= 1 for row in plan.rows)
    assert plan.predicted_us == pytest.approx(sum(row.predicted_us for row in plan.rows))
    assert (plan.device, plan.dtype, plan.input_shape) == (H200, "bfloat16", shape)


def test_rows_are_in_the_order_of_execution() -> None:
    names = [row.name for row in explain(small(), (1, 3, 32, 32), device=H200).rows]
    tail = ["conv2", "conv3", "downsample.0"]
    assert names[:3] == ["conv1", "conv1", "layer1.0.conv1"]
    assert sorted(names[3:6]) == sorted(f"layer1.0.{n}" for n in tail)
    assert names[6] == "layer1.1.conv1" and names[-1] == "fc"


def test_dtype() -> None:
    model = small()
    with use_backend("triton"):
        plans = [explain(model, (2, 3, 64, 64), dtype=d, device=H200) for d in (torch.float16, torch.float32)]
        own = explain(model, (2, 3, 64, 64), device=H200)
    assert own == plans[1] and own.dtype == "float32"
    half, full = ({row.name: row for row in convolutions(plan) if " /" not in row.config} for plan in plans)
    both = half.keys() & full.keys() - {"conv1"}
    assert len(both) > 3
    for name in both:
        assert 2 * half[name].bytes == full[name].bytes and half[name].predicted_us < full[name].predicted_us
    with pytest.raises(RuntimeError, match=r"cannot run .*float64 is not one of"), use_backend("triton"):
        explain(model, (2, 3, 64, 64), dtype=torch.float64, device=H200)
    reasons = {r.reason for r in explain(model, (2, 3, 64, 64), dtype=torch.float64, device=H200).rows}
    assert reasons == {"torch.float64 is not one of float32, float16, bfloat16"}


def test_devices() -> None:
    model = small((1, 1, 1, 1))
    for name in known_devices():
        plan = explain(model, (1, 3, 64, 64), device=name)
        assert plan.device == name and plan.predicted_us > 0
    here = explain(model, (1, 3, 64, 64))
    assert here.device == "cpu" and here.predicted_us is None
    assert {row.realisation for row in here.rows} == {"aten"}
    assert explain(model, (1, 3, 64, 64), device=torch.device("cpu")) == here
    with pytest.raises(ValueError) as error:
        explain(model, (1, 3, 64, 64), device="NVIDIA Z9000")
    assert "'NVIDIA Z9000' is neither a torch device nor a known name" in str(error.value)
    for name in known_devices():
        assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    "shape", ((3, 224, 224), (1, 3, 224, 224, 1), (1, 3, 0, 224), (1, 3, -1, 224), (1, 3, 224.0, 224), ())
)
def test_a_wrong_shape_is_an_error(shape: tuple) -> None:
    with pytest.raises(ValueError, match="input_shape must be"):
        explain(small((1, 1, 1, 1)), shape)


def test_the_library_backend() -> None:
    with use_backend("cudnn"):
        plan = explain(small(), (1, 3, 64, 64), device=H200)
    assert {row.realisation for row in plan.rows} == {"cudnn"}
    assert {row.reason for row in plan.rows} == {"use_backend('cudnn')"}


def test_a_folded_model_runs_on_onednn_here() -> None:
    plan = explain(fold(small()), (1, 3, 64, 64))
    rows = convolutions(plan)[1:]
    assert {row.realisation for row in rows} == {"onednn"}
    assert all("folded" in row.reason for row in rows)
    unfolded = convolutions(explain(small(), (1, 3, 64, 64)))[1:]
    assert all("resnet_triton.fold(model)" in row.reason for row in unfolded)
    assert all(a.bytes < b.bytes for a, b in zip(rows, unfolded, strict=True))


def reasons_of(plan: Plan, prefix: str) -> set[str]:
    return {row.reason for row in plan.rows if row.name.startswith(prefix)}


def hooked(model: tv.ResNet) -> None:
    model.layer2[0].conv2.register_forward_hook(lambda *args: None)


def silu(model: tv.ResNet) -> None:
    model.layer2[0].relu = nn.SiLU()


def grouped(model: tv.ResNet) -> None:
    model.layer2[0].conv2 = nn.Conv2d(128, 128, 3, 2, 1, groups=4)


def patched(model: tv.ResNet) -> None:
    model.layer2[0].forward = model.layer2[0].forward


CAUSES = {
    hooked: "a hook is registered on a Conv2d",
    patched: "its forward was replaced on the instance",
}


@pytest.mark.parametrize("cause", CAUSES, ids=lambda f: f.__name__)
def test_a_block_that_falls_back_says_why_and_is_the_only_one(cause) -> None:
    model = small()
    cause(model)
    with use_backend("triton", chains=False):
        plan = explain(model, (1, 3, 64, 64), device=H200)
    (reason,) = reasons_of(plan, "layer2.0")
    assert CAUSES[cause] in reason
    own = [row for row in convolutions(plan) if row.realisation not in LIBRARY]
    assert [row.name for row in plan.rows if row.realisation in LIBRARY] == [
        row.name for row in plan.rows if row.name.startswith("layer2.0")
    ]
    assert len(own) == 1 + 4 * 3 + 3  # the stem, and the other four blocks
    assert [row.name for row in convolutions(plan)].count("layer2.0.conv2") == 1


def test_a_grouped_convolution_stays_with_the_library_and_says_so() -> None:
    model = small()
    grouped(model)
    with use_backend("triton"):
        plan = explain(model, (1, 3, 64, 64), device=H200)
    theirs = [row for row in plan.rows if row.realisation in LIBRARY]
    assert [row.op for row in theirs] == ["conv", "batch_norm", "relu"]
    assert {row.reason for row in theirs} == {"conv2 has groups=4; fused blocks support groups=1"}
    own = [row.name for row in convolutions(plan) if row.realisation not in LIBRARY]
    assert [name for name in own if name.startswith("layer2.0")] == [
        "layer2.0.conv1",
        "layer2.0.downsample.0",
        "layer2.0.conv3",
    ]


def test_another_activation_stays_and_its_convolutions_are_fused() -> None:
    model = small()
    silu(model)
    with use_backend("triton"):
        plan = explain(model, (1, 3, 64, 64), device=H200)
    theirs = [row for row in plan.rows if row.realisation in LIBRARY]
    assert {row.reason for row in theirs} == {"relu is SiLU; fused blocks apply nn.ReLU"}
    assert len(theirs) == 3


def test_an_unconverted_model_is_told_to_convert() -> None:
    plan = explain(bottlenecks(dtype=torch.float32), (1, 3, 64, 64), device=H200)
    assert reasons_of(plan, "layer") == {"not converted: resnet_triton.convert(model)"}
    assert {row.realisation for row in plan.rows} <= set(LIBRARY)
    assert len(convolutions(plan)) == 1 + 5 * 3 + 4


def test_training_mode_has_a_row_for_what_moves_activations_only() -> None:
    plan = explain(small().train(), (2, 3, 64, 64), device="cpu")
    counts: dict[str, int] = {}
    for row in plan.rows:
        counts[row.op] = counts.get(row.op, 0) + 1
        assert row.bytes > 1000, row
    assert counts == {"conv": 20, "batch_norm": 20, "relu": 16, "add": 5, "max_pool": 1, "head": 1}
    for name in ("layer", "bn1"):
        assert all("batch statistics on a CPU run on PyTorch's modules" in reason for reason in reasons_of(plan, name))


def test_a_hooked_stem_says_why() -> None:
    model = small()
    model.bn1.register_forward_hook(lambda *args: None)
    plan = explain(model, (2, 3, 64, 64), device=H200)
    assert "a hook is registered on a BatchNorm2d" in reasons_of(plan, "conv1")


def test_a_contiguous_weight_is_reported_as_repacked() -> None:
    model = small((1, 1, 1, 1))
    model.to(memory_format=torch.contiguous_format)
    rows = convolutions(explain(model, (1, 3, 64, 64), device=H200))
    repacked = [row.name for row in rows if "repacked on each call" in row.reason]
    assert repacked == [row.name for row in rows if "3x3" in row.op]
    model.to(memory_format=torch.channels_last)
    assert not [r for r in explain(model, (1, 3, 64, 64), device=H200).rows if "repacked" in r.reason]


def test_json_has_every_row() -> None:
    plan = explain(small(), (2, 3, 64, 64), dtype=torch.bfloat16, device=H200)
    data = json.loads(plan.to_json())
    rows = tuple(Row(**row) for row in data["rows"])
    assert Plan(rows, data["device"], data["dtype"], tuple(data["input_shape"]), data["backward"]) == plan


def test_the_table_has_every_row_and_a_sum() -> None:
    plan = explain(small(), (2, 3, 64, 64), dtype=torch.bfloat16, device=H200)
    lines = str(plan).splitlines()
    assert len(lines) >= 1 + len(plan.rows)
    assert lines[0].startswith("layer")
    for line, row in zip(lines[1:], plan.rows, strict=False):
        assert line.startswith(f"{row.name} ") and row.op in line and row.realisation in line
        assert row.reason.strip() in line
    assert f"{plan.bytes_per_image / 1e6:.1f} MB an image on {H200}, bfloat16" in str(plan)


def test_plot_writes_a_picture(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    explain(small((1, 1, 1, 1)), (2, 3, 64, 64), device=H200).plot(path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


@pytest.mark.parametrize("mode", ("eval", "train", "error"))
def test_the_model_stays_as_it_was(mode: str) -> None:
    model = small()
    model.train(mode == "train")
    before, types = copy.deepcopy(model), [type(m) for m in model.modules()]
    identities = [id(t) for t in (*model.parameters(), *model.buffers())]
    if mode == "error":
        with pytest.raises(ValueError, match="stem takes x"):
            explain(model, (1, 4, 64, 64), device=H200)
    else:
        explain(model, (2, 3, 64, 64), dtype=torch.bfloat16, device=H200)
    assert ops.Recorder.active is None
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == identities
    assert [type(m) for m in model.modules()] == types
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    for (name, value), old in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert not isinstance(value, FakeTensor) and value.dtype == old.dtype, name
        assert torch.equal(value, old), name
    assert not torch.is_grad_enabled() or all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert type(model(torch.randn(2, 3, 32, 32))) is torch.Tensor


def test_nothing_is_computed_or_allocated() -> None:
    """A batch whose activations would take terabytes."""
    plan = explain(small(), (100_000, 3, 224, 224), dtype=torch.bfloat16, device=H200)
    assert plan.bytes_per_image * 100_000 > 1e12


def test_parts_and_getters() -> None:
    model = small()
    stage = explain(model.layer1, (2, 64, 16, 16), device=H200)
    assert convolutions(stage)[0].name == "0.conv1"
    assert len(convolutions(stage)) == 7
    getter = convert(IntermediateLayerGetter(bottlenecks(dtype=torch.float32), {"layer1": "a", "layer3": "b"}))
    names = [row.name for row in convolutions(explain(getter, (2, 3, 64, 64), device=H200))]
    assert "layer1.1.conv3" in names and "layer3.0.conv3" in names and not any("layer4" in n for n in names)
    basic = explain(convert(basics(dtype=torch.float32)), (2, 3, 64, 64), device=H200)
    assert len(convolutions(basic)) == 1 + 5 * 2 + 3


def test_the_backward_is_named() -> None:
    model = convert(tv.resnet18())
    plan = explain(model.eval(), (2, 3, 64, 64), device=H200)
    assert plan.backward.startswith("cudnn") and f"backward: {plan.backward}" in str(plan)
    plan = explain(model.train(), (2, 3, 64, 64), device=H200)
    assert plan.backward.startswith("the last ") and f"backward: {plan.backward}" in str(plan)
    last = plan.rows[-int(plan.backward.split()[2]) :]
    assert sum(row.op.startswith(("wgrad", "stem_wgrad")) for row in last) == 20


def test_a_detector_is_told_to_explain_its_backbone() -> None:
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    converted = convert(model, inplace=True)
    with pytest.raises(ValueError, match=r"cannot follow FasterRCNN.*explain\(model\.backbone, \(N, C, H, W\)\)"):
        explain(converted, (1, 3, 64, 64))
    plan = explain(converted.backbone, (1, 3, 64, 64), device=H200)
    assert {"layer4.2.conv3", "inner_blocks.0.0"} <= {
        row.name.removeprefix("body.").removeprefix("fpn.") for row in plan.rows
    }


def test_every_prediction_names_its_limit() -> None:
    model = convert(tv.resnext50_32x4d().eval(), inplace=True)
    plan = explain(model, (64, 3, 224, 224), dtype=torch.bfloat16, device=H200)
    assert {row.limit for row in plan.rows} <= {"hbm", "l2", "shared", "tensor", "issue"}
    grouped = next(row for row in plan.rows if row.name == "layer1.0.conv2" and row.op == "conv")
    assert grouped.limit == "hbm", "four channels a group"
    dense = explain(nn.Conv2d(512, 512, 3), (64, 512, 64, 64), dtype=torch.bfloat16, device=H200).rows[0]
    assert dense.limit == "tensor"
    products = 2 * dense.bytes  # at the very least: 288 multiply-adds a byte
    assert dense.predicted_us > cost.memory_us(products, known_devices()[H200])
    assert {row.limit for row in explain(model, (1, 3, 64, 64)).rows} == {""}, "nothing is predicted for a CPU"

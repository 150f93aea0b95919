"""Converted models in the rest of PyTorch: copies, graphs, compilers, DDP, torchvision's detection, fine-tuning."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models import resnet as tv
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation import fcn_resnet50
from torchvision.ops.misc import FrozenBatchNorm2d

from resnet_triton import convert, fold, unconvert
from resnet_triton.convert import is_converted
from tests.comparers import no_worse_than, same_math
from tests.networks import basics, bottlenecks, calls, images, randomise

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
FUSED = {"stem": 1, "conv_bn_act": 1, "block_tail": 5, "head": 1}


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Copies


def test_deepcopy_is_converted_and_independent() -> None:
    model, x = convert(bottlenecks()), images()
    expected = logits(model, x)
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    assert calls(twin, x) == FUSED
    model.layer1[0].conv1.weight.data.zero_()
    same_math(logits(twin, x), expected)
    assert not torch.equal(logits(model, x), expected)


def test_shallow_copy_shares_parameters() -> None:
    model = convert(bottlenecks())
    twin = copy.copy(model)
    assert type(twin) is type(model) and twin.conv1.weight is model.conv1.weight
    same_math(logits(twin, images()), logits(model, images()))


LOADER = """
import pickle, sys, torch
folder = sys.argv[1]
x, expected = torch.load(f"{folder}/values.pt")
with open(f"{folder}/model.pkl", "rb") as file:
    pickled = pickle.load(file)
saved = torch.load(f"{folder}/model.pt", weights_only=False)
assert "resnet_triton" in sys.modules
for model in (pickled, saved):
    assert type(model).__name__ == "FusedResNet" and type(model.layer1[0]).__name__ == "FusedBottleneck"
    assert not model.training
    with torch.no_grad():
        out = model(x)
    assert torch.allclose(out, expected, rtol=0, atol=1e-11 * expected.abs().max().item()), (out - expected).abs().max()
print("loaded", type(model).__module__)
"""


def test_pickles_load_in_a_fresh_process(tmp_path: Path) -> None:
    model, x = convert(bottlenecks((1, 1, 1, 1))), images()
    torch.save((x, logits(model, x)), tmp_path / "values.pt")
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loaded resnet_triton")


def test_every_pickle_protocol() -> None:
    block = convert(bottlenecks((1, 1, 1, 1)).layer1)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        twin = pickle.loads(pickle.dumps(block, protocol))
        assert type(twin) is type(block) and type(twin[0]) is type(block[0])


def test_state_dict_round_trips() -> None:
    model, x = bottlenecks(), images()
    converted = convert(model)
    buffer = io.BytesIO()
    torch.save(converted.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    for target in (tv.ResNet(tv.Bottleneck, [2, 1, 1, 1], num_classes=10).double().eval(), convert(bottlenecks())):
        with torch.no_grad():
            for p in target.parameters():
                p.zero_()
        assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
        same_math(logits(target, x), logits(model, x))
    converted.load_state_dict(model.state_dict(), assign=True)
    same_math(logits(converted, x), logits(model, x))


def test_averaged_model_for_ema() -> None:
    model, x = bottlenecks(), images()
    ema, theirs = AveragedModel(convert(model), multi_avg_fn=get_ema_multi_avg_fn(0.5)), AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.5)
    )  # fmt: skip
    for scale in (1.0, 0.5):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
        for average, source in ((ema, convert(model)), (theirs, model)):
            average.update_parameters(source)
    same_math(logits(ema, x), logits(theirs, x))
    assert calls(ema, x) == FUSED


def test_a_bf16_copy() -> None:
    model, x = bottlenecks(), images(4, 64, 64)
    half = copy.deepcopy(convert(model.float())).bfloat16()
    assert is_converted(half) and half.conv1.weight.dtype == torch.bfloat16
    eager = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(eager).double()
    x = x.bfloat16()
    no_worse_than(logits(half, x), logits(eager, x), logits(exact, x.double()))


# Graphs


def test_torchscript() -> None:
    for make in (basics, bottlenecks):
        model, x = make((2, 1, 1, 1)), images()
        scripted = torch.jit.script(convert(model))
        same_math(logits(scripted, x), logits(model, x))
        same_math(logits(scripted, images(3, 40, 48)), logits(model, images(3, 40, 48)))
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        same_math(logits(torch.jit.load(buffer), x), logits(model, x))
        frozen = torch.jit.freeze(scripted)
        same_math(logits(frozen, x), logits(model, x))


@pytest.mark.parametrize("grad", (True, False), ids=("grad", "no_grad"))
def test_jit_trace(grad: bool) -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(convert(model), x)
    same_math(logits(traced, images(3)), logits(model, images(3)))
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    assert "resnet_triton::" not in str(loaded.inlined_graph), "its operators are not needed to load it"
    same_math(logits(loaded, x), logits(model, x))


def test_fx_records_blocks_as_leaves() -> None:
    model, x = bottlenecks(), images()
    converted = convert(model)
    graph = fx.symbolic_trace(converted)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == [
        "conv1", "bn1", "relu", "maxpool", "layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0", "avgpool", "fc"
    ]  # fmt: skip
    same_math(logits(graph, x), logits(model, x))
    assert calls(graph, x)["block_tail"] == 5
    same_math(logits(pickle.loads(pickle.dumps(graph)), x), logits(model, x))


def test_export_with_dynamic_sizes() -> None:
    model, x = bottlenecks((2, 1, 1, 1)), images(2, 64, 64)
    smallest = {"min": 33}  # below, the last stage has one row, whose strides PyTorch treats as another case
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h", **smallest), 3: torch.export.Dim("w", **smallest)}
    program = torch.export.export(convert(model), (x,), dynamic_shapes=(sizes,))
    ours = [str(n.target) for n in program.graph.nodes if "resnet_triton" in str(n.target)]
    assert len(ours) == sum(FUSED.values())
    assert not [n for n in program.graph.nodes if "conv2d" in str(n.target)]
    exported = program.module()
    for shape in ((2, 64, 64), (5, 64, 64), (3, 34, 96), (2, 33, 47)):
        same_math(logits(exported, images(*shape)), logits(model, images(*shape)))
    assert sorted(program.state_dict) == sorted(model.state_dict())
    inference = program.run_decompositions({})
    same_math(logits(inference.module(), x), logits(model, x))


# Compilers


def test_one_fullgraph_for_eight_batch_sizes() -> None:
    model = bottlenecks((1, 1, 1, 1))
    counter = CompileCounter()
    compiled = torch.compile(convert(model), fullgraph=True, backend=counter)
    with torch.no_grad():
        for n in (2, 3, 4, 5, 6, 7, 8, 16):
            same_math(compiled(images(n)), model(images(n)))
    assert counter.frame_count <= 2, "one with sizes, one with symbols"


def test_one_fullgraph_for_many_image_sizes() -> None:
    model = bottlenecks((1, 1, 1, 1))
    counter = CompileCounter()
    compiled = torch.compile(convert(model), fullgraph=True, backend=counter, dynamic=True)
    with torch.no_grad():
        for h, w in ((32, 32), (32, 64), (48, 40), (33, 47)):
            same_math(compiled(images(2, h, w)), model(images(2, h, w)))
    assert counter.frame_count <= 2


def test_inductor_compiles_the_whole_model() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile for the CPU needs a C++ compiler")
    eager, x = randomise(tv.resnet18()), images(2, dtype=torch.float32)
    exact = logits(copy.deepcopy(eager).double(), x.double())
    compiled = torch.compile(convert(eager), fullgraph=True)
    expected = logits(eager.to(memory_format=torch.channels_last), x)
    no_worse_than(logits(compiled, x), expected, exact)
    assert is_converted(compiled._orig_mod)


@pytest.mark.parametrize("make", (basics, bottlenecks))
def test_compiled_gradients_with_bn_in_eval_mode(make) -> None:
    model, x = make((1, 1, 1, 1)), images()
    counter = CompileCounterWithBackend("aot_eager")
    converted = convert(model)
    compiled = torch.compile(converted, fullgraph=True, backend=counter)
    compiled(x).square().sum().backward()
    model(x).square().sum().backward()
    for (name, a), b in zip(converted.named_parameters(), model.parameters(), strict=True):
        assert a.grad.stride() == a.stride(), name
        same_math(a.grad, b.grad)
    assert counter.frame_count == 1


def test_compiled_training_mode() -> None:
    model, x = basics((1, 1, 1, 1)).train(), images(4)
    converted = convert(model)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    model(x).square().sum().backward()
    for a, b in zip(converted.parameters(), model.parameters(), strict=True):
        same_math(a.grad, b.grad)
    for a, b in zip(converted.buffers(), model.buffers(), strict=True):
        same_math(a.double(), b.double())


def test_a_compiled_model_sees_hooks_and_modes_that_come_later() -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    converted = convert(model)
    compiled = torch.compile(converted, backend="eager")
    same_math(logits(compiled, x), logits(model, x))
    for m in (model, converted):
        m.layer2[0].bn2.eps = 0.5
        m.layer3[0].relu = nn.SiLU()
    same_math(logits(compiled, x), logits(model, x))
    for m in (model, converted):
        m.train()
    same_math(compiled(x), model(x))
    for a, b in zip(converted.buffers(), model.buffers(), strict=True):
        same_math(a.double(), b.double())


def test_regional_compilation_of_stages() -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    converted = convert(model)
    converted.layer1 = torch.compile(converted.layer1, backend="eager")
    converted.layer2[0] = torch.compile(converted.layer2[0], backend="eager")
    converted.layer3.compile(backend="eager")
    same_math(logits(converted, x), logits(model, x))


def test_functional_call_and_meta_device() -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    converted = convert(model)
    halved = {name: p * 0.5 for name, p in model.named_parameters()}
    ours, theirs = (torch.func.functional_call(m, halved, (x,)) for m in (converted, model))
    same_math(ours.detach(), theirs.detach())
    out = converted.to("meta")(x.to("meta"))
    assert out.shape == (2, 10) and out.device.type == "meta"


def test_gradients_of_a_function_of_the_weights() -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    gradients = []
    for m in (convert(model), model):
        loss = lambda weights, m=m: torch.func.functional_call(m, weights, (x,)).square().sum()  # noqa: E731
        gradients.append(torch.func.grad(loss)(dict(m.named_parameters())))
    for name, expected in gradients[1].items():
        same_math(gradients[0][name], expected)


class Wrapped(Tensor):
    """A tensor that holds another and knows PyTorch's operators only, as torchao's quantised weights do."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.namespace == "aten", f"{func} is not known"
        args = [a.inner if isinstance(a, cls) else a for a in args]
        out = func(*args, **(kwargs or {}))
        return cls(out) if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default) else out


@pytest.mark.parametrize("path", ("fc", "conv1", "bn1", "layer1.0.conv2", "layer1.0.downsample.0", "layer1.1.bn1"))
def test_weights_of_other_classes_than_tensor(path: str) -> None:
    model, x = bottlenecks(), images()
    expected, converted = logits(model, x), convert(model)
    for _ in range(2):
        same_math(logits(converted, x), expected)
        m = converted.get_submodule(path)
        m.weight = nn.Parameter(Wrapped(m.weight.detach()), requires_grad=False)
    same_math(logits(convert(converted), x), expected)


def test_checkpointed_blocks() -> None:
    from torch.utils.checkpoint import checkpoint_sequential

    model, x = bottlenecks(), torch.randn(2, 64, 8, 8, dtype=torch.float64)
    converted = convert(model)
    checkpoint_sequential(converted.layer1, 2, x, use_reentrant=False).square().sum().backward()
    model.layer1(x).square().sum().backward()
    for a, b in zip(converted.layer1.parameters(), model.layer1.parameters(), strict=True):
        same_math(a.grad, b.grad)


# Distributed


@pytest.fixture
def process_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", (False, True), ids=("eager", "compiled"))
@pytest.mark.filterwarnings("error:.*Grad strides do not match bucket view strides.*")
def test_ddp(process_group, compiled: bool) -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    wrapped = DistributedDataParallel(convert(model))
    step = torch.compile(wrapped, backend="aot_eager") if compiled else wrapped
    for _ in range(2):
        wrapped.zero_grad()
        step(x).square().sum().backward()
    model(x).square().sum().backward()
    for a, b in zip(wrapped.module.parameters(), model.parameters(), strict=True):
        same_math(a.grad, b.grad)
    with pytest.raises(ValueError, match="DistributedDataParallel wrapper"):
        convert(wrapped)


def test_ddp_is_converted_inplace(process_group) -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    wrapped = convert(DistributedDataParallel(copy.deepcopy(model)), inplace=True)
    assert is_converted(wrapped.module)
    same_math(logits(wrapped, x), logits(model, x))
    assert calls(wrapped, x) == {**FUSED, "block_tail": 4}


# torchvision around the model


@pytest.mark.parametrize(
    "taps",
    (
        {"layer1": "a", "layer2": "b", "layer3": "c", "layer4": "d"},
        {"maxpool": "p", "layer2": "b"},
        {"relu": "r", "layer1": "a"},
        {"bn1": "n", "layer1": "a"},
        {"conv1": "c", "layer3": "x"},
        {"layer4": "last"},
        {"layer1": "a", "avgpool": "g"},
    ),
    ids=lambda taps: "+".join(taps),
)
@pytest.mark.parametrize("make", (basics, bottlenecks))
def test_intermediate_layer_getter(make, taps: dict[str, str]) -> None:
    getter, x = IntermediateLayerGetter(make(), taps), images()
    converted = convert(getter)
    out, expected = logits(converted, x), logits(getter, x)
    assert type(out) is OrderedDict and list(out) == list(expected) == list(taps.values())
    for name, value in expected.items():
        same_math(out[name], value)
    counts = calls(converted, x)
    last = int(next((name[-1] for name in reversed(taps) if name.startswith("layer")), 4))
    assert counts["block_tail"] == (5 if "avgpool" in taps else (2, 3, 4, 5)[last - 1])
    assert counts.get("aten", 0) == ("conv1" in taps or "bn1" in taps)
    assert type(unconvert(converted)) is IntermediateLayerGetter
    assert type(pickle.loads(pickle.dumps(converted))) is type(converted)


def test_create_feature_extractor_of_a_converted_model() -> None:
    model, x = bottlenecks(), images()
    nodes = {"relu": "stem", "layer1": "a", "layer2.0": "b", "layer4": "d", "flatten": "f"}
    extractor = create_feature_extractor(convert(model), nodes)
    out, expected = logits(extractor, x), logits(create_feature_extractor(model, nodes), x)
    assert list(out) == list(expected)
    for name, value in expected.items():
        same_math(out[name], value)
    assert calls(extractor, x)["block_tail"] == 5


def test_a_feature_extractor_holds_no_blocks(caplog) -> None:
    extractor = create_feature_extractor(bottlenecks((1, 1, 1, 1)), ["layer1"])
    with caplog.at_level(logging.WARNING, "resnet_triton"):
        assert convert(extractor, inplace=True) is extractor
    assert "found no residual block" in caplog.text


def detector() -> FasterRCNN:
    torch.manual_seed(1)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    model = FasterRCNN(backbone, 5, min_size=64, max_size=96, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_test=50,
                       rpn_pre_nms_top_n_train=200, rpn_post_nms_top_n_train=50, box_score_thresh=0.0)  # fmt: skip
    return randomise(model.double())


def test_detector_with_frozen_bn() -> None:
    model = detector()
    converted = convert(model, strict=True)
    image = [torch.rand(3, 64, 80, dtype=torch.float64), torch.rand(3, 50, 64, dtype=torch.float64)]
    ours, theirs = logits(converted, image), logits(model, image)
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b) and len(b["boxes"]) > 10
        assert torch.equal(a["labels"], b["labels"])
        same_math(a["boxes"], b["boxes"])
        same_math(a["scores"], b["scores"])
    assert calls(converted, image)["block_tail"] == 8


def test_a_training_step_of_a_detector() -> None:
    model = detector()
    converted = convert(model)
    image = [torch.rand(3, 64, 64, dtype=torch.float64)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 60.0]], dtype=torch.float64)
    target = [{"boxes": boxes, "labels": torch.tensor([1, 2])}]
    losses = []
    for m in (converted, model):
        m.train()
        torch.manual_seed(0)
        losses.append(m(image, target))
        sum(losses[-1].values()).backward()
    assert list(losses[0]) == list(losses[1])
    for a, b in zip(losses[0].values(), losses[1].values(), strict=True):
        same_math(a.detach().double(), b.detach().double())
    for (name, a), b in zip(converted.named_parameters(), model.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad and (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            same_math(a.grad, b.grad)
    assert converted.backbone.body.layer2[0].conv1.weight.grad is not None
    assert converted.backbone.body.layer1[0].conv1.weight.grad is None, "frozen by trainable_layers"


def test_fasterrcnn_resnet50_fpn() -> None:
    model = randomise(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64).double())
    image = [torch.rand(3, 64, 64, dtype=torch.float64)]
    converted = convert(model, strict=True)
    for a, b in zip(logits(converted, image), logits(model, image), strict=True):
        same_math(a["boxes"], b["boxes"])
    assert calls(converted, image)["block_tail"] == 16
    assert type(converted.backbone.body).__name__ == "FusedIntermediateLayerGetter"


def test_segmentation_with_dilated_stages() -> None:
    model = randomise(fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True).double())
    x = images(1, 48, 48)
    converted = convert(model, strict=True)
    ours, theirs = logits(converted, x), logits(model, x)
    for name in ("out", "aux"):
        same_math(ours[name], theirs[name])
    assert calls(converted, x)["block_tail"] == 16


# Training


def test_fine_tuning_with_frozen_layers_and_a_new_head() -> None:
    """Two optimizer steps end at the same weights."""
    models = []
    for wrap in (convert, lambda m: m):
        model = wrap(bottlenecks())
        model.requires_grad_(False)
        torch.manual_seed(5)
        model.fc = nn.Linear(2048, 3).double()
        model.layer4.requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)
        for step in range(2):
            optimizer.zero_grad(set_to_none=step == 0)
            loss = nn.functional.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 0]))
            loss.backward()
            optimizer.step()
        assert model.layer3[0].conv1.weight.grad is None
        models.append(model)
    assert (models[1].layer4[0].conv2.weight - bottlenecks().layer4[0].conv2.weight).abs().max() > 1e-6
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        same_math(a.double(), b.double())


def test_training_then_eval_agrees() -> None:
    """A training step with batch statistics, then inference with the new running statistics."""
    models = [convert(basics()), basics()]
    for model in models:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        nn.functional.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        model.eval()
    same_math(logits(models[0], images()), logits(models[1], images()))
    assert calls(models[0], images())["block_tail"] == 5


def test_gradients_of_inputs_and_of_a_tapped_stage() -> None:
    """Saliency maps and Grad-CAM: a gradient at the images, and a hook that keeps a stage's output and gradient."""
    results = []
    for model in (convert(bottlenecks()), bottlenecks()):
        kept: list[Tensor] = []

        def keep(m: nn.Module, args: tuple[Tensor], out: Tensor, kept: list[Tensor] = kept) -> None:
            out.retain_grad()
            kept.append(out)

        model.layer3.register_forward_hook(keep)
        x = images().requires_grad_()
        model(x)[:, 3].sum().backward()
        results.append((x.grad, kept[0].detach(), kept[0].grad))
    for a, b in zip(*results, strict=True):
        assert b.count_nonzero() > 0
        same_math(a, b)


def test_inference_mode_and_threads() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, x = bottlenecks((1, 1, 1, 1)), images()
    converted = convert(model)
    with torch.inference_mode():
        same_math(converted(x).clone(), model(x).clone())
    with ThreadPoolExecutor(4) as pool:
        for out in pool.map(lambda _: logits(converted, x), range(8)):
            same_math(out, logits(model, x))


def test_fold_then_export_and_script() -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    folded = fold(model)
    program = torch.export.export(folded, (x,))
    same_math(logits(program.module(), x), logits(model, x))
    same_math(logits(torch.jit.script(folded), x), logits(model, x))
    assert not [name for name in folded.state_dict() if "running" in name]


def test_second_derivatives_are_right_or_refused() -> None:
    """A gradient penalty must not silently vanish from a loss, whatever gradient came in."""
    for square in (False, True):
        results = []
        for model in (bottlenecks((1, 1, 1, 1)), convert(bottlenecks((1, 1, 1, 1)))):
            x = images().requires_grad_()
            out = model(x).square().sum() if square else model(x).sum()
            (grad,) = torch.autograd.grad(out, x, create_graph=True)
            try:
                (model(x).mean() + grad.square().sum()).backward()
            except RuntimeError as error:
                assert "once_differentiable" in str(error)
                results = []
                break
            results.append(model.layer2[0].conv1.weight.grad)
        if results:
            same_math(results[1], results[0])

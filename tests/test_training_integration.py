"""Fused training with the rest of PyTorch: autocast, compilers, checkpointing, optimizers, EMA, other libraries."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._inductor.config
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models import resnet as tv
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import resnet_triton
from resnet_triton import convert, unconvert, use_backend
from tests.comparers import GRADIENT, no_worse_than, same_math
from tests.networks import Calls, basics, bottlenecks, images, randomise

MEMORY = ("gram", "stored")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Sequential):
    """A projected and a plain bottleneck, pool and classifier; in training mode and fp64."""

    def __init__(self, channels: int = 8) -> None:
        k = 2 * channels
        shortcut = nn.Sequential(nn.Conv2d(channels, k, 1, 2, bias=False), nn.BatchNorm2d(k))
        blocks = (tv.Bottleneck(channels, k // 4, 2, shortcut), tv.Bottleneck(k, k // 4))
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(k, 5))
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                nn.init.uniform_(m.bias, -0.3, 0.3)
        self.double().train()


def batch(n: int = 4, channels: int = 8) -> Tensor:
    return torch.randn(n, channels, 8, 6, generator=torch.Generator().manual_seed(n)).double()


def targets(n: int) -> Tensor:
    return torch.arange(n) % 5


def loss(model: Any, x: Tensor) -> Tensor:
    return cross_entropy(model(x).double(), targets(len(x)))


def fused(model: nn.Module, x: Tensor, memory: str = "gram") -> dict[str, int]:
    """A step's gradients, and how often each operator ran in its forward."""
    with use_backend("auto", memory=memory), Calls() as counter:
        loss(model, x).backward()
    return dict(counter.counts)


def same(ours: nn.Module, plain: nn.Module, gradients: bool = True) -> None:
    """Equal parameters, gradients and buffers."""
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        same_math(p.detach(), q.detach())
        assert (p.grad is None) == (q.grad is None), name
        if gradients and p.grad is not None and q.grad is not None:
            assert p.grad.stride() == p.stride(), name
            same_math(p.grad, q.grad)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        same_math(a.double(), b.double())


# Mixed precision


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_keeps_parameters_and_gradients_in_fp32(dtype: torch.dtype, memory: str) -> None:
    exact, x = Net(64), batch(16, 64)
    plain = copy.deepcopy(exact).float()
    ours = convert(plain)
    for model in (ours, plain):
        with torch.autocast("cpu", dtype), use_backend("auto", memory=memory):
            y = model(x.float())
        assert y.dtype == dtype
        cross_entropy(y.float(), targets(len(x))).backward()
    loss(exact, x).backward()
    for (name, p), q, r in zip(ours.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.stride() == p.stride(), name
        no_worse_than(p.grad, q.grad, r.grad, GRADIENT)
    for a, b, c in zip(ours.buffers(), plain.buffers(), exact.buffers(), strict=True):
        assert a.dtype == b.dtype
        if a.is_floating_point():
            no_worse_than(a, b, c, GRADIENT)


def test_autocast_changes_no_wide_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where forward and backward both run within: moments and vectors stay as wide as without autocast."""
    from resnet_triton.training import reference

    dtypes: set[torch.dtype] = set()

    def noting(f: Callable) -> Callable:
        def step(*arguments):
            out = f(*arguments)
            dtypes.update(t.dtype for t in out)
            return out

        return step

    for name in ("gram", "matrix_wgrad"):
        monkeypatch.setattr(reference, name, noting(getattr(reference, name)))
    ours = convert(Net().float())
    with torch.autocast("cpu", torch.bfloat16), use_backend("auto", memory="gram"):
        loss(ours, batch().float()).backward()
    assert dtypes == {torch.float32}


def test_gradient_scaler_steps_and_skips() -> None:
    models = [convert(Net().float())]
    models.append(unconvert(models[0]))
    exact = copy.deepcopy(models[1]).double()
    for model in models:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with torch.autocast("cpu", torch.float16), use_backend("auto", memory="gram"):
            value = cross_entropy(model(batch().float()), targets(4))
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**10
        gradients = [p.grad.clone() for p in model.parameters()]
        weights = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16), use_backend("auto", memory="gram"):
            value = cross_entropy(model(batch().float()), targets(4))
        scaler.scale(value * 1e30).backward()  # infinite in fp16
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**9
        for name, p in model.named_parameters():
            assert torch.equal(p, weights[name]), "an overflowing step must be skipped"
        for p, g in zip(model.parameters(), gradients, strict=True):
            p.grad = g
    loss(exact, batch()).backward()
    for p, q, r in zip(models[0].parameters(), models[1].parameters(), exact.parameters(), strict=True):
        no_worse_than(p.grad, q.grad, r.grad, GRADIENT)


def test_a_bf16_network() -> None:
    exact = basics((1, 1, 1, 1)).train()
    for t in exact.state_dict().values():
        t.copy_(t.bfloat16())
    plain, x = copy.deepcopy(exact).bfloat16(), images(8, 64, 64).bfloat16()
    ours = convert(plain)
    outputs = []
    for model in (ours, plain, exact):
        with use_backend("auto", memory="stored"):
            y = model(x.to(model.fc.weight.dtype))
        y.sum().backward()
        outputs.append(y.detach())
    no_worse_than(*outputs)
    for p, q, r in zip(ours.parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert p.grad.dtype == torch.bfloat16
        no_worse_than(p.grad, q.grad, r.grad, GRADIENT)


# Compilers


@pytest.mark.parametrize("memory", MEMORY)
def test_one_fullgraph_for_many_batch_sizes(memory: str) -> None:
    """Forward, backward and running statistics."""
    plain = Net()
    ours, counter = convert(plain), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for n in (2, 3, 4, 5, 8, 13):
        with use_backend("auto", memory=memory):
            loss(compiled, batch(n)).backward()
        loss(plain, batch(n)).backward()
    same(ours, plain)
    assert counter.frame_count <= 2


def test_the_stem_and_basic_blocks_compile() -> None:
    plain, x = basics((1, 1, 1, 1)).train(), images(4)
    ours, counter = convert(plain), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    for scale in (1, 2):
        with use_backend("auto", memory="stored"):
            compiled(scale * x).square().sum().backward()
        plain(scale * x).square().sum().backward()
    same(ours, plain)
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert counter.frame_count == 1 and names


def test_compiled_options_of_bn_and_frozen_parts() -> None:
    plain = Net()
    plain[0].bn1.momentum, plain[0].bn2.track_running_stats, plain[1].bn2 = None, False, nn.Identity()
    plain[1].bn3.eval()
    plain[0].conv1.requires_grad_(False)
    plain[0].bn3.weight.requires_grad_(False)
    plain[0].conv2.bias = nn.Parameter(torch.randn(4).double())
    plain[1].conv1.weight = plain[0].conv3.weight.__class__(torch.randn(4, 16, 1, 1).double())
    ours = convert(plain)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        with use_backend("auto", memory="gram"):
            loss(compiled, batch()).backward()
        loss(plain, batch()).backward()
    same(ours, plain)


def test_one_weight_in_two_places_compiles() -> None:
    plain: Any = tv.BasicBlock(8, 8).double().train()
    plain.conv2.weight, plain.bn2.weight = plain.conv1.weight, plain.bn1.weight
    ours = convert(plain)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with use_backend("auto", memory="stored"):
        compiled(batch()).square().sum().backward()
    plain(batch()).square().sum().backward()
    same(ours, plain)


def test_compiled_autocast() -> None:
    ours = convert(Net().float())
    twin = copy.deepcopy(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for model in (compiled, twin):
        with torch.autocast("cpu", torch.bfloat16), use_backend("auto", memory="gram"):
            value = model(batch().float())
        assert value.dtype == torch.bfloat16
        value.float().square().sum().backward()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_inductor() -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile for the CPU needs a C++ compiler")
    plain = tv.BasicBlock(8, 8).double().train()
    ours = convert(plain)
    with use_backend("auto", memory="stored"), torch._inductor.config.patch(compile_threads=1):
        torch.compile(ours, fullgraph=True)(batch()).square().sum().backward()
    plain(batch()).square().sum().backward()
    same(ours, plain)


# Activations: accumulation, checkpointing, hooks on what is saved


@pytest.mark.parametrize("memory", MEMORY)
def test_gradients_accumulate(memory: str) -> None:
    plain = Net()
    ours = convert(plain)
    for n in (3, 4, 5):
        assert fused(ours, batch(n), memory)["train_block"] == 2
        loss(plain, batch(n)).backward()
    same(ours, plain)


def test_a_graph_can_be_walked_twice_and_in_parts() -> None:
    plain = Net()
    ours = convert(plain)
    for model in (ours, plain):
        with use_backend("auto", memory="gram"):
            value = loss(model, batch())
        value.backward(retain_graph=True)
        torch.autograd.backward(value, inputs=[model[0].conv1.weight, model[1].bn3.bias])
    same(ours, plain)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("memory", MEMORY)
def test_checkpointed_blocks_update_running_statistics_once(memory: str, reentrant: bool) -> None:
    """PyTorch's own modules do so twice; the reference here runs without checkpointing."""
    plain = Net()
    ours = convert(plain)
    x = batch().requires_grad_()
    with use_backend("auto", memory=memory):
        for _ in range(2):
            y = x
            for block in (ours[0], ours[1]):
                y = checkpoint(block, y, use_reentrant=reentrant)
            for m in (ours[2], ours[3], ours[4]):
                y = m(y)
            cross_entropy(y, targets(4)).backward()
    for _ in range(2):
        loss(plain, batch()).backward()
    same(ours, plain)
    assert ours[0].bn1.num_batches_tracked == 2


def test_a_checkpointed_sequence_of_stages() -> None:
    plain = basics((1, 1, 1, 1)).train()
    ours, x = convert(plain), torch.randn(4, 64, 16, 16).double().requires_grad_()
    stages = [[m.layer1, m.layer2, m.layer3] for m in (ours, plain)]
    with use_backend("auto", memory="stored"):
        checkpoint_sequential(stages[0], 2, x, use_reentrant=False).square().sum().backward()
    nn.Sequential(*stages[1])(x).square().sum().backward()
    same(ours, plain)


def test_compiled_checkpointing_updates_running_statistics_once() -> None:
    plain = Net()
    ours = convert(plain)

    def step(x: Tensor) -> Tensor:
        return checkpoint(ours[0], x, use_reentrant=False).square().sum()

    with use_backend("auto", memory="gram"):
        torch.compile(step, backend="aot_eager")(batch()).backward()
    plain[0](batch()).square().sum().backward()
    same(ours, plain)


def test_saved_tensors_pass_through_hooks() -> None:
    plain = Net()
    ours = convert(plain)
    with torch.autograd.graph.save_on_cpu(), use_backend("auto", memory="gram"):
        value = loss(ours, batch())
    value.backward()
    loss(plain, batch()).backward()
    same(ours, plain)


def test_a_weight_changed_before_the_backward_is_noticed() -> None:
    ours: Any = convert(Net())
    with use_backend("auto", memory="gram"):
        value = loss(ours, batch())
    with torch.no_grad():
        ours[0].conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# Copies


def test_copies_and_pickles_of_a_model_in_training() -> None:
    plain = Net()
    ours = convert(plain)
    fused(ours, batch(3)), loss(plain, batch(3)).backward()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        reference = copy.deepcopy(plain)
        reference.zero_grad(), twin.zero_grad()
        assert fused(twin, batch())["train_block"] == 2
        loss(reference, batch()).backward()
        same(twin, reference)
    ours.zero_grad(), plain.zero_grad()
    fused(ours, batch(5)), loss(plain, batch(5)).backward()
    same(ours, plain)


def test_moving_average_and_statistics_of_it() -> None:
    plain = Net()
    models = [convert(plain), plain]
    averages = [AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True) for m in models]
    for model, average in zip(models, averages, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        with use_backend("auto", memory="gram"):
            for n in (3, 4, 5):
                optimizer.zero_grad()
                loss(model, batch(n)).backward()
                optimizer.step()
                average.update_parameters(model)
    same(averages[0], averages[1], gradients=False)
    with use_backend("auto", memory="gram"):
        update_bn([batch(3), batch(4)], averages[0])
    update_bn([batch(3), batch(4)], averages[1])
    same(averages[0], averages[1], gradients=False)
    for average in averages:
        average.eval()
    with torch.no_grad():
        same_math(averages[0](batch()), averages[1](batch()))


# Optimizers

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD, foreach": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-4, nesterov=True, foreach=True),
    "SGD, fused": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=1e-4, fused=True),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    plain = Net()
    models = [convert(plain), plain]
    for model in models:
        optimizer = OPTIMIZERS[name](model.parameters())
        for n in (3, 4, 5):
            optimizer.zero_grad()
            with use_backend("auto", memory="gram"):
                loss(model, batch(n)).backward()
            optimizer.step()
    same(*models)


# Modes, backends, hooks


def test_train_and_eval_alternate_on_the_same_modules() -> None:
    """What runs is decided once and remembered; every change of mode is seen."""
    plain = bottlenecks((2, 1, 1, 1))
    ours, x = convert(plain), images(6)

    def both(f: Callable[[Any], Any]) -> None:
        f(ours), f(plain)

    def check(expected: dict[str, int]) -> None:
        with use_backend("auto", memory="stored"), Calls() as counter:
            y = ours(x)
        same_math(y.detach(), plain(x).detach())
        assert dict(counter.counts) == expected

    training = {"train_stem": 1, "train_block": 5, "head": 1}
    inference = {"stem": 1, "conv_bn_act": 1, "block_tail": 5, "head": 1}
    for _ in range(2):
        both(lambda m: m.train())
        check(training)
        both(lambda m: m.eval())
        with torch.no_grad():
            check(inference)
    both(lambda m: m.train())
    both(lambda m: m.layer2[0].bn2.eval())
    check(training)
    both(lambda m: m.layer2.eval())
    check({"train_stem": 1, "train_block": 4, "conv_bn_act": 1, "block_tail": 1, "head": 1})
    both(lambda m: m.eval())
    both(lambda m: m.layer2[0].bn2.train())
    check({"stem": 1, "conv_bn_act": 2, "block_tail": 4, "train_block": 1, "head": 1})
    same(ours, plain)


def test_backends_change_within_a_process() -> None:
    """Between calls of the same modules, and between a forward and its backward."""
    plain = Net()
    ours = convert(plain)
    settings: list[tuple[dict[str, str], int]] = [
        ({"name": "auto", "memory": "gram"}, 2),
        ({"name": "auto"}, 0),
        ({"name": "auto", "memory": "stored"}, 2),
        ({"name": "cudnn", "memory": "gram"}, 0),
        ({"name": "auto", "memory": "gram"}, 2),
    ]
    for setting, expected in settings:
        with use_backend(**setting), Calls() as counter:
            value = loss(ours, batch())
        assert counter.counts["train_block"] == expected, setting
        with use_backend("cudnn", memory="stored"):
            value.backward()
        loss(plain, batch()).backward()
    same(ours, plain)


@pytest.mark.parametrize("place", ("1", "1.bn2", "1.conv3", "0.downsample.1", "1.relu"))
def test_hooks_fire_with_the_same_values(place: str) -> None:
    plain = Net()
    ours = convert(plain)
    seen: list[list[Tensor]] = []
    for model in (ours, plain):
        for m in model.modules():
            if type(m) is nn.ReLU:
                m.inplace = False  # not with PyTorch's backward hooks
        seen.append([])
        for handle in (
            model.get_submodule(place).register_forward_hook(lambda m, x, y, s=seen[-1]: s.append(y.detach().clone())),
            model.get_submodule(place).register_full_backward_hook(lambda m, x, y, s=seen[-1]: s.append(y[0].clone())),
        ):
            assert handle.id >= 0
    counts = fused(ours, batch())
    loss(plain, batch()).backward()
    same(ours, plain)
    assert counts.get("train_block", 0) == (2 if place == "1" else 1)
    assert len(seen[0]) == len(seen[1]) > 1
    for a, b in zip(*seen, strict=True):
        same_math(a, b)


def test_a_model_whose_middle_is_hooked_shares_no_masks() -> None:
    """Grad-CAM on one stage: its gradient is not masked by the next block's ReLU."""
    kept: list[list[Tensor]] = []
    models = [bottlenecks((2, 1, 1, 1)).train()]
    models.insert(0, convert(models[0]))
    for model in models:
        kept.append([])

        def keep(m: nn.Module, x: Any, y: Tensor, kept: list[Tensor] = kept[-1]) -> None:
            y.register_hook(lambda grad: kept.append(grad.clone()))

        model.layer1[0].register_forward_hook(keep)
        model.layer2.register_forward_hook(keep)
        with use_backend("auto", memory="stored"):
            model(images(6)).square().sum().backward()
    same(*models)
    for a, b in zip(*kept, strict=True):
        same_math(a, b)


# Other libraries


def test_timm_deep_stem_and_average_pool() -> None:
    timm = pytest.importorskip("timm")
    resnet = timm.models.resnet
    options = {"stem_width": 32, "stem_type": "deep", "avg_down": True, "num_classes": 5}  # as resnet50d
    plain = randomise(resnet.ResNet(resnet.Bottleneck, [2, 1, 1, 1], **options).double()).train()
    ours = convert(plain, strict=True)
    counts = fused(ours, images(6), "stored")
    loss(plain, images(6)).backward()
    same(ours, plain)
    assert counts["train_block"] == 3 + 5 and "aten" not in counts


def test_timm_resnet50d_in_the_gram_form() -> None:
    timm = pytest.importorskip("timm")
    plain = timm.create_model("resnet50d", num_classes=5).float().train()
    ours, x = convert(plain), images(2, 64, 64, torch.float32)
    counts = fused(ours, x)
    assert counts["train_block"] == 3 + 16 and "aten" not in counts
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_timm_drop_path_and_attention_train_unit_by_unit() -> None:
    timm = pytest.importorskip("timm")
    resnet = timm.models.resnet
    options: dict[str, Any] = {"num_classes": 5, "block_args": {"attn_layer": "se"}, "drop_path_rate": 0.5}
    plain = randomise(resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], **options).double()).train()
    ours, counts = convert(plain), {}
    for model in (ours, plain):
        torch.manual_seed(4)
        counts[model] = fused(model, images(4), "stored")
    same(ours, plain)
    assert counts[ours]["train_block"] == 4 * 2 + 3


def test_a_detector_trains_with_batch_statistics() -> None:
    """torchvision's FPN taps every stage."""
    image = [torch.rand(3, 64, 64, dtype=torch.float64), torch.rand(3, 60, 64, dtype=torch.float64)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 60.0]], dtype=torch.float64)
    target = [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    few = {f"rpn_{when}_nms_top_n_train": 50 for when in ("pre", "post")}
    plain = randomise(FasterRCNN(backbone, 5, min_size=64, max_size=96, **few).double()).train()
    ours = convert(plain)
    losses = []
    for model in (ours, plain):
        torch.manual_seed(0)
        with use_backend("auto", memory="stored"), Calls() as counter:
            losses.append(sum(model(image, target).values()))
        losses[-1].backward()
        if model is ours:
            assert counter.counts["train_block"] == 8
    same_math(losses[0].detach(), losses[1].detach())
    same(ours, plain)


@pytest.mark.parametrize("kind", ("basic", "bottleneck"))
def test_hugging_face(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64, 64, 64], depths=[2, 1, 1, 1], num_labels=5, layer_type=kind
    )
    plain = randomise(transformers.ResNetForImageClassification(config).double()).train()
    ours = convert(plain)
    for model in (ours, plain):
        with use_backend("auto", memory="gram" if kind == "bottleneck" else "stored"), Calls() as counter:
            model(images(6), labels=targets(6)).loss.backward()
        if model is ours:
            assert counter.counts["train_block"] == 5 and counter.counts["train_stem"] == 1
    same(ours, plain)


# torchvision's reference script


def weight_decay_groups(model: nn.Module, decay: float, norm_decay: float) -> list[dict[str, Any]]:
    """Parameters of normalisations, told by their modules' classes, and the others, as the script groups them."""
    classes = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
    norms = [p for m in model.modules() if isinstance(m, classes) for p in m.parameters(recurse=False)]
    known = {id(p) for p in norms}
    others = [p for p in model.parameters() if id(p) not in known]
    return [{"params": norms, "weight_decay": norm_decay}, {"params": others, "weight_decay": decay}]


def test_the_calls_of_torchvisions_reference_script() -> None:
    """``--model triton_resnet50 --norm-weight-decay 0 --label-smoothing 0.1 --model-ema --clip-grad-norm 1``"""
    resnet_triton.register()
    ours = torchvision.models.get_model("triton_resnet50", weights=None, num_classes=5).double()
    plain = torchvision.models.get_model("resnet50", weights=None, num_classes=5).double()
    plain.load_state_dict(ours.state_dict())
    averages, losses = [], []
    for model in (ours, plain):
        model.train()
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        optimizer = torch.optim.SGD(weight_decay_groups(model, 1e-4, 0.0), lr=0.01, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        with use_backend("auto", memory="stored"):
            for _ in range(2):
                value = criterion(model(images(8, 40, 40)), targets(8))
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average.update_parameters(model)
                losses.append(value.detach())
            scheduler.step()
        model.eval(), average.eval()
        assert all(key.startswith("module.") or key == "n_averaged" for key in average.state_dict())
        averages.append(average)
    assert losses[1] != losses[0]
    same(averages[0], averages[1], gradients=False)
    with torch.inference_mode():
        same_math(averages[0](images(2)).clone(), averages[1](images(2)).clone())

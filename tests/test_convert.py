"""``convert`` and ``unconvert``: same logits, same model to look at, PyTorch's modules wherever one is not as known."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torchvision.models import resnet as tv
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_triton
from resnet_triton import convert, fold, unconvert
from tests.comparers import identical, no_worse_than, same_math
from tests.networks import basics, bottlenecks, calls, images, randomise

#: What a fully fused ``bottlenecks((2, 1, 1, 1))`` or ``basics((2, 1, 1, 1))`` runs. A basic block's first
#: convolution is an op of its own; a bottleneck's runs with the end of the block before it.
FUSED = {"stem": 1, "conv_bn_act": 1, "block_tail": 5, "head": 1}
FUSED_BASIC = {"stem": 1, "conv_bn_act": 5, "block_tail": 5, "head": 1}


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    """state_dicts with the same keys in the same order and the same bits."""
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for key, value in first.items():
        identical(second[key], value)


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# Parity


@pytest.mark.parametrize("depth", (18, 34, 50, 101, 152))
def test_logits_are_torchvisions(depth: int) -> None:
    eager = randomise(getattr(tv, f"resnet{depth}")())
    x = images(2, 48, 40, torch.float32)
    expected = logits(copy.deepcopy(eager).to(memory_format=torch.channels_last), x)
    exact = logits(copy.deepcopy(eager).double(), x.double())
    assert exact.std() > 1e-3 and exact[0].sub(exact[1]).abs().max() > 1e-3
    with torch.device("meta"):
        built = getattr(resnet_triton, f"resnet{depth}")().eval()
    built.load_state_dict(eager.state_dict(), assign=True)
    no_worse_than(logits(built, x), expected, exact)
    converted = convert(eager, inplace=True)
    assert calls(converted, x)["block_tail"] == sum(tv_blocks(converted))
    no_worse_than(logits(converted, x), expected, exact)
    no_worse_than(logits(fold(converted, inplace=True), x), expected, exact)


def tv_blocks(model: nn.Module) -> list[int]:
    return [len(getattr(model, f"layer{i}")) for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("make", (basics, bottlenecks))
def test_bf16_logits_err_no_more_than_eagers(make) -> None:
    exact_model = make()
    model = copy.deepcopy(exact_model).bfloat16()
    for a, b in zip(exact_model.state_dict().values(), model.state_dict().values(), strict=True):
        a.copy_(b)
    x = images(4, 64, 64).bfloat16()
    expected, exact = logits(model, x), logits(exact_model, x.double())
    no_worse_than(logits(convert(model), x), expected, exact)
    no_worse_than(logits(fold(exact_model).bfloat16(), x), expected, exact)


def test_autocast_follows_eagers() -> None:
    model = bottlenecks(dtype=torch.float32)
    x = images(4, 64, 64, torch.float32)
    converted = convert(model)
    exact = logits(model.double(), x.double())
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = logits(converted, x), logits(model, x)
    assert out.dtype == torch.bfloat16
    no_worse_than(out, expected, exact)


@pytest.mark.parametrize(
    "options",
    (
        {"width_per_group": 128},
        {"replace_stride_with_dilation": (False, True, True)},
        {"zero_init_residual": True},
        {"norm_layer": FrozenBatchNorm2d},
        {"norm_layer": lambda c: nn.BatchNorm2d(c, eps=0.02, momentum=None)},
        {"norm_layer": nn.SyncBatchNorm},
    ),
    ids=("wide", "dilated", "zero_init_residual", "frozen", "eps", "sync"),
)
def test_variants_run_fused_and_exact(options: dict) -> None:
    if options.get("zero_init_residual") or "norm_layer" in options:
        model = tv.ResNet(tv.Bottleneck, [2, 1, 1, 1], num_classes=10, **options).double().eval()
        for m in model.modules():
            if hasattr(m, "running_var"):
                m.running_mean.normal_(0, 0.3)
                m.running_var.uniform_(0.5, 1.5)
    else:
        model = bottlenecks(**options)
    converted, x = convert(model, strict=True), images()
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x) == FUSED


@pytest.mark.parametrize("shape", ((1, 3, 32, 32), (3, 3, 33, 47), (2, 3, 1, 1), (1, 3, 7, 64), (0, 3, 32, 32)))
@pytest.mark.parametrize("make", (basics, bottlenecks))
def test_any_batch_and_image_size(make, shape: tuple[int, ...]) -> None:
    model, x = make((1, 1, 1, 1)), torch.randn(shape, dtype=torch.float64)
    out, expected = logits(convert(model), x), logits(model, x)
    if shape[0]:
        same_math(out, expected)
    else:
        identical(out, expected)


def test_any_memory_layout_of_the_images() -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    converted = convert(model)
    for strided in (
        x.to(memory_format=torch.channels_last),
        x.repeat(1, 1, 2, 2)[:, :, ::2, 1::2],
        x[:1].expand(2, -1, -1, -1),
        x.transpose(2, 3),
    ):
        same_math(logits(converted, strided), logits(model, strided))


# What convert changes, and what it does not


@pytest.mark.parametrize("make", (basics, bottlenecks))
def test_only_classes_and_weight_strides_change(make) -> None:
    model = make()
    before = copy.deepcopy(model)
    converted = convert(model)
    assert type(model) is tv.ResNet and type(model.layer1) is nn.Sequential
    assert_same_state(before, model)
    assert_same_state(model, converted)
    assert [n for n, _ in converted.named_modules()] == [n for n, _ in model.named_modules()]
    assert [(n, p.requires_grad) for n, p in converted.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    for (name, a), b in zip(converted.named_modules(), model.modules(), strict=True):
        assert isinstance(a, type(b)), name
        assert a is not b
        stage = type(b) is nn.Sequential and "downsample" not in name
        changed = stage or isinstance(b, (tv.ResNet, tv.BasicBlock, tv.Bottleneck))
        assert (type(a) is not type(b)) == changed, name
        assert type(a).__name__ == ("Fused" if changed else "") + type(b).__name__
        assert a.__dict__.keys() == b.__dict__.keys(), name
        if isinstance(a, nn.Conv2d):
            assert a.weight.is_contiguous(memory_format=torch.channels_last), name
    text = repr(converted)
    assert "FusedResNet(" in text and "(0): Fused" in text and "(conv1): Conv2d(3, 64" in text
    assert text.replace("Fused", "") == repr(model)


def test_inplace_returns_the_same_object_and_keeps_parameters() -> None:
    model = bottlenecks()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert convert(model, inplace=True) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert optimizer.param_groups[0]["params"][0] is model.conv1.weight
    assert calls(model, images()) == FUSED


def test_convert_is_idempotent_and_unconvert_its_inverse() -> None:
    model, x = bottlenecks(), images()
    once = convert(model)
    twice = convert(once)
    assert [type(m) for m in twice.modules()] == [type(m) for m in once.modules()]
    assert calls(twice, x) == FUSED
    back = unconvert(once)
    assert [type(m) for m in back.modules()] == [type(m) for m in model.modules()]
    assert type(once) is not tv.ResNet, "unconvert without inplace changed its argument"
    identical(logits(back, x), logits(model.to(memory_format=torch.channels_last), x))
    assert calls(back, x) == {"aten": 1 + 3 * 5 + 4}
    assert unconvert(once, inplace=True) is once and type(once.layer1[0]) is tv.Bottleneck
    assert_same_state(once, model)


def test_parts_can_be_converted_and_called_alone() -> None:
    model, x = bottlenecks(), torch.randn(2, 64, 9, 9, dtype=torch.float64)
    block, stage = convert(model.layer1[0]), convert(model.layer1)
    same_math(logits(block, x), logits(model.layer1[0], x))
    same_math(logits(stage, x), logits(model.layer1, x))
    assert calls(block, x) == {"conv_bn_act": 1, "block_tail": 1}
    assert calls(stage, x) == {"conv_bn_act": 1, "block_tail": 2}
    sliced = convert(model).layer1[:1]
    same_math(logits(sliced, x), logits(model.layer1[0], x))


def test_blocks_inside_foreign_modules_are_found() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            resnet = bottlenecks()
            self.entry = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
            self.mixed = nn.Sequential(*resnet.layer1, nn.Dropout(0.5), resnet.layer2)
            self.parts = nn.ModuleDict({"last": resnet.layer3[0]})

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["last"](self.mixed(self.entry(x)))

    model, x = Net().eval(), images()
    converted = convert(model, strict=True)
    assert type(converted) is Net and type(converted.mixed) is nn.Sequential
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x) == {"aten": 1, "conv_bn_act": 4, "block_tail": 4}


def test_a_subclass_without_its_own_forward_is_known() -> None:
    class MyBlock(tv.Bottleneck):
        """Another constructor, another name."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.note = "mine"

    class MyNet(tv.ResNet):
        """A ResNet with a projector that its forward does not call."""

        def __init__(self) -> None:
            super().__init__(MyBlock, [2, 1, 1, 1], num_classes=10)
            self.projector = nn.Linear(10, 3)

    model, x = randomise(MyNet().double()), images()
    converted = convert(model, strict=True)
    assert isinstance(converted, MyNet) and isinstance(converted.layer1[0], MyBlock)
    assert type(converted.layer1[0]).__name__ == "FusedMyBlock" and converted.layer1[0].note == "mine"
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x) == FUSED


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    class MyBlock(tv.Bottleneck):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class MyNet(tv.ResNet):
        def _forward_impl(self, x: Tensor) -> Tensor:
            return -super()._forward_impl(x)

    model, x = randomise(tv.ResNet(MyBlock, [1, 1, 1, 1], num_classes=10).double()), images()
    converted = convert(model)
    assert type(converted.layer1[0]) is MyBlock and type(converted.layer1) is nn.Sequential
    same_math(logits(converted, x), logits(model, x))

    model = randomise(MyNet(tv.Bottleneck, [1, 1, 1, 1], num_classes=10).double())
    converted = convert(model)
    assert type(converted) is MyNet and type(converted.layer1).__name__ == "FusedSequential"
    same_math(logits(converted, x), logits(model, x))


def test_children_out_of_order_or_unused_do_not_matter() -> None:
    model, x = bottlenecks(), images()
    pool = model.maxpool
    del model.maxpool
    model.maxpool = pool  # now the last child
    model.auxiliary = nn.Linear(5, 5).double()  # never called by forward
    model.bn1, model.layer3 = model.bn1, model.layer3
    converted = convert(model)
    assert [n for n, _ in converted.named_children()][-2:] == ["maxpool", "auxiliary"]
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x) == FUSED


def test_one_module_in_two_places() -> None:
    model, x = bottlenecks(), images()
    model.layer1 = nn.Sequential(model.layer1[1], model.layer1[1], model.layer1[1])
    model.layer1[0].conv1 = nn.Conv2d(256, 64, 1).double()
    model.maxpool = nn.Conv2d(64, 256, 1).double()
    model.avgpool = model.extra = model.layer1
    model.layer2 = model.layer1
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Flatten()
    converted = convert(model)
    assert converted.layer2 is converted.layer1 and converted.layer1[2] is converted.layer1[0]
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x)["block_tail"] == 9


def test_training_script_surgery_before_convert() -> None:
    """A smaller stem and a dropout before the classifier, as in fine-tuning scripts."""
    model, x = bottlenecks(), images()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False).double()
    model.maxpool = nn.Identity()
    model.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(2048, 4)).double()
    converted = convert(model.eval())
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x) == {"conv_bn_act": 2, "block_tail": 5}


# Errors and warnings


@pytest.mark.parametrize("function", (convert, unconvert, fold))
@pytest.mark.parametrize("thing", (None, tv.resnet18, {"weight": torch.zeros(1)}))
def test_not_a_module(function, thing: object) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__} takes an nn.Module, got {type(thing).__name__}"):
        function(thing)


def silu(model: tv.ResNet) -> None:
    model.layer2[0].relu = nn.SiLU()


def reflect(model: tv.ResNet) -> None:
    model.layer3[0].conv2.padding_mode = "reflect"


def group_norm(model: tv.ResNet) -> None:
    model.layer1[1].bn3 = nn.GroupNorm(32, 256)


def oblong(model: tv.ResNet) -> None:
    model.layer1[0].conv2.stride = model.layer1[0].downsample[0].stride = (2, 1)


def pooled_shortcut(model: tv.ResNet) -> None:
    model.layer2[0].downsample = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(256, 512, 1), nn.BatchNorm2d(512))


def patched(model: tv.ResNet) -> None:
    model.layer4[0].forward = lambda x: x


STRUCTURE = {
    silu: "layer2.0: relu is SiLU; fused blocks apply nn.ReLU",
    reflect: "layer3.0: conv2 has padding_mode='reflect'",
    group_norm: "layer1.1: bn3 is GroupNorm; fused blocks take BatchNorm2d",
    oblong: r"layer1.0: conv2 has stride=\(2, 1\)",
    pooled_shortcut: "layer2.0: downsample is not nn.Sequential",
    patched: "layer4.0: its forward was replaced on the instance",
}


@pytest.mark.parametrize("change", STRUCTURE, ids=lambda f: f.__name__)
def test_strict_names_what_cannot_be_fused_and_changes_nothing(change) -> None:
    model = bottlenecks()
    change(model)
    types = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=STRUCTURE[change]) as error:
        convert(model, inplace=True, strict=True)
    assert "strict=False" in str(error.value)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("change", STRUCTURE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ("before", "after"))
def test_a_changed_block_falls_back_and_only_it(change, when: str) -> None:
    model, x = bottlenecks(), images()
    converted = convert(model) if when == "after" else None
    for m in (model, converted):
        if m is not None:
            torch.manual_seed(0)
            change(m)
            m.double().eval()
    converted = converted or convert(model)
    if change is patched:  # its lambda changes the width
        converted.fc = model.fc = nn.Linear(1024, 10).double()
    same_math(logits(converted, x), logits(model, x))
    counts = calls(converted, x)
    assert counts["block_tail"] == 4, "the other four blocks run fused"
    assert counts["stem"] == counts["head"] == 1


def test_resnext_fuses_all_but_its_grouped_convolutions_and_strict_says_why() -> None:
    model = randomise(tv.resnext50_32x4d(num_classes=10).double())
    with pytest.raises(ValueError, match=r"layer1.0: conv2 has groups=32; fused blocks support groups=1"):
        convert(model, strict=True)
    converted, x = convert(model), images()
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x) == {"stem": 1, "conv_bn_act": 16 * 2 + 4, "aten": 16, "head": 1}


#: Operators of a forward with one changed block: four whole blocks (two runs of them, each with a first convolution of
#: its own, or three), and the parts of the changed one that can be fused.
PARTS = {
    silu: {"conv_bn_act": 2 + 4},
    reflect: {"conv_bn_act": 2 + 3, "aten": 1},
    group_norm: {"conv_bn_act": 2 + 2, "aten": 1, "add_relu": 1},
    oblong: {"conv_bn_act": 2 + 2, "aten": 2},
    pooled_shortcut: {"conv_bn_act": 2 + 3, "aten": 1},
}


@pytest.mark.parametrize("change", PARTS, ids=lambda f: f.__name__)
def test_what_can_be_fused_of_a_changed_block_is(change) -> None:
    model = bottlenecks()
    change(model)
    model.double().eval()
    assert calls(convert(model), images()) == {"stem": 1, "block_tail": 4, "head": 1, **PARTS[change]}


def test_a_model_without_blocks_is_said_to_be_unknown(caplog) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(ValueError, match="strict=True, but Sequential has no residual block"):
        convert(model, strict=True)
    with caplog.at_level(logging.WARNING, "resnet_triton"):
        converted = convert(model)
    assert "found no residual block that it knows in Sequential; it runs as before" in caplog.text
    assert type(converted) is nn.Sequential
    caplog.clear()
    with caplog.at_level(logging.WARNING, "resnet_triton"):
        convert(convert(bottlenecks()))
    assert not caplog.records


def test_a_scripted_model_is_left_alone(caplog) -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    scripted = torch.jit.script(model)
    with caplog.at_level(logging.WARNING, "resnet_triton"):
        same_math(logits(convert(scripted), x), logits(model, x))
    assert "found no residual block" in caplog.text
    with pytest.raises(ValueError, match="has no residual block"):
        convert(scripted, strict=True)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", (compiled, nn.DataParallel))
def test_wrappers_are_entered_only_inplace(wrap) -> None:
    model, x = bottlenecks(), images()
    expected = logits(model, x)
    wrapped = wrap(model)
    same_math(logits(wrapped, x), expected)
    for function in (convert, unconvert, fold):
        with pytest.raises(
            ValueError, match=rf"{type(wrapped).__name__} wrapper.*{function.__name__} the model before"
        ):
            function(wrapped)
    assert type(model) is tv.ResNet
    assert convert(wrapped, inplace=True) is wrapped
    assert isinstance(model, tv.ResNet) and type(model) is not tv.ResNet
    same_math(logits(wrapped, x), expected)
    unconvert(wrapped, inplace=True)
    assert type(model) is tv.ResNet


# Checked on every call

#: Where a hook is, and what runs then: aten convolutions, stem, first convolutions, block ends, head.
HOOKED = {
    "conv1": {**FUSED, "stem": 0, "aten": 1},
    "bn1": {**FUSED, "stem": 0, "aten": 1},
    "relu": {**FUSED, "stem": 0, "aten": 1},
    "maxpool": FUSED,
    "layer1": FUSED,
    "layer1.0": {**FUSED, "conv_bn_act": 3},
    "layer1.1.conv2": {"stem": 1, "aten": 3, "conv_bn_act": 2, "block_tail": 4, "head": 1},
    "layer2.0.bn3": {"stem": 1, "aten": 4, "conv_bn_act": 2, "block_tail": 4, "head": 1},
    "layer2.0.relu": {"stem": 1, "aten": 4, "conv_bn_act": 2, "block_tail": 4, "head": 1},
    "layer2.0.downsample": {"stem": 1, "aten": 4, "conv_bn_act": 2, "block_tail": 4, "head": 1},
    "layer2.0.downsample.1": {"stem": 1, "aten": 4, "conv_bn_act": 2, "block_tail": 4, "head": 1},
    "layer4": FUSED,
    "avgpool": {**FUSED, "head": 0},
    "fc": {**FUSED, "head": 0},
    "": FUSED,
}


def nonzero(counts: dict[str, int]) -> dict[str, int]:
    return {name: n for name, n in counts.items() if n}


@pytest.mark.parametrize("place", HOOKED)
@pytest.mark.parametrize("kind", ("forward", "pre"))
def test_forward_hooks_fire_with_the_same_values(place: str, kind: str) -> None:
    def listen(model: nn.Module):
        seen: list[Tensor] = []
        m = model.get_submodule(place)
        if kind == "forward":
            handle = m.register_forward_hook(lambda _, args, out: seen.extend((args[0].clone(), out.clone())))
        else:
            handle = m.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        return seen, handle

    model, x = bottlenecks(), images()
    converted = convert(model)
    expected, _ = listen(model)
    seen, handle = listen(converted)
    same_math(logits(converted, x), logits(model, x))
    assert len(seen) == len(expected) > 0
    for a, b in zip(seen, expected, strict=True):
        same_math(a, b)
    if place in ("layer1", "layer4"):  # the stage is called on its own: its first convolution starts afresh
        counts = calls(converted, x)
        assert "aten" not in counts and counts["block_tail"] == 5
    else:
        assert calls(converted, x) == nonzero(HOOKED[place])
    handle.remove()
    seen.clear()
    assert calls(converted, x) == FUSED and not seen


@pytest.mark.parametrize("place", ("layer1", "layer1.1", "layer2.0.conv2", "fc"))
@pytest.mark.parametrize("kind", ("backward", "pre"))
def test_backward_hooks_fire_with_the_same_values(place: str, kind: str) -> None:
    def listen(model: nn.Module) -> list[Tensor]:
        seen: list[Tensor] = []
        m = model.get_submodule(place)
        if kind == "backward":
            m.register_full_backward_hook(lambda _, inputs, outputs: seen.extend((inputs[0], outputs[0])))
        else:
            m.register_full_backward_pre_hook(lambda _, outputs: seen.append(outputs[0]))
        model(images()).square().sum().backward()
        return seen

    model = bottlenecks()
    converted = convert(model)
    for a, b in zip(listen(converted), listen(model), strict=True):
        same_math(a, b)
    for (name, a), b in zip(converted.named_parameters(), model.parameters(), strict=True):
        assert b.grad.count_nonzero() > 0, name
        same_math(a.grad, b.grad)


def test_a_hook_may_change_what_it_sees() -> None:
    model, x = bottlenecks(), images()
    converted = convert(model)
    plain = logits(model, x)
    for m in (model, converted):
        m.layer2[0].conv2.register_forward_hook(lambda _, args, out: out + 1)
        m.layer3.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    same_math(logits(converted, x), logits(model, x))
    assert (logits(model, x) - plain).abs().max() > 1e-3


def test_a_global_hook_sees_every_module() -> None:
    model, x = bottlenecks((1, 1, 1, 1)), images()
    converted = convert(model)

    def visited(m: nn.Module) -> list[str]:
        names = {id(child): name for name, child in m.named_modules()}
        seen: list[str] = []
        handle = register_module_forward_hook(lambda child, args, out: seen.append(names[id(child)]))
        try:
            same_math(logits(m, x), expected)
        finally:
            handle.remove()
        return seen

    expected = logits(model, x)
    assert visited(converted) == visited(model)
    assert calls(converted, x) == {**FUSED, "block_tail": 4}


def test_weights_statistics_and_eps_are_read_anew() -> None:
    model, x = bottlenecks(), images()
    converted = convert(model)
    logits(converted, x)
    for change in (
        lambda m: m.layer1[0].conv2.weight.data.mul_(1.5),
        lambda m: m.layer2[0].bn2.running_var.add_(0.5),
        lambda m: setattr(m.layer3[0].bn1, "eps", 0.3),
        lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}),
        lambda m: setattr(m.layer1[1].conv1, "weight", nn.Parameter(torch.full((64, 256, 1, 1), 0.01).double())),
        lambda m: setattr(m.fc, "bias", None),
        lambda m: setattr(m.layer1[0], "bn2", nn.Identity()),
        lambda m: setattr(m.layer1[0].conv3, "bias", nn.Parameter(torch.linspace(-1, 1, 256).double())),
    ):
        before = logits(model, x)
        for m in (model, converted):
            change(m)
        assert not torch.equal(logits(model, x), before)
        same_math(logits(converted, x), logits(model, x))
        assert calls(converted, x) == FUSED


def test_one_bn_in_training_mode() -> None:
    model, x = bottlenecks(), images()
    converted = convert(model)
    for m in (model, converted):
        m.layer2[0].bn2.train()
    same_math(logits(converted, x), logits(model, x))
    for a, b in zip(converted.buffers(), model.buffers(), strict=True):
        same_math(a.double(), b.double())
    assert model.layer2[0].bn2.num_batches_tracked == 1
    assert calls(converted, x) == {"stem": 1, "aten": 4, "conv_bn_act": 2, "block_tail": 4, "head": 1}
    converted.eval()
    assert calls(converted, x) == FUSED


@pytest.mark.parametrize("make", (basics, bottlenecks))
def test_training_mode_is_pytorchs_own(make) -> None:
    model, x = make().train(), images(4)
    converted = convert(model)
    same_math(converted(x), model(x))
    for m in (converted, model):
        m(x * 0.7).square().sum().backward()
    for (name, a), b in zip(converted.named_buffers(), model.buffers(), strict=True):
        assert not name.endswith("tracked") or b == 2
        same_math(a.double(), b.double())
    for a, b in zip(converted.parameters(), model.parameters(), strict=True):
        same_math(a.grad, b.grad)
    assert "block_tail" not in calls(converted, x)


def test_training_mode_is_bitwise_the_same_on_equal_strides() -> None:
    model = bottlenecks(dtype=torch.float32).train().to(memory_format=torch.channels_last)
    converted, x = convert(model), images(4, dtype=torch.float32)
    for m in (converted, model):
        m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x)))))
    for a, b in zip(converted.buffers(), model.buffers(), strict=True):
        identical(a, b)


def test_gradients_with_bn_in_eval_mode() -> None:
    for make, expected in ((basics, FUSED_BASIC), (bottlenecks, FUSED)):
        model, x = make(), images()
        converted = convert(model)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        converted(ours).square().sum().backward()
        model(theirs).square().sum().backward()
        same_math(ours.grad, theirs.grad)
        for (name, a), b in zip(converted.named_parameters(), model.named_parameters(), strict=True):
            assert name == b[0] and a.grad.stride() == a.stride(), name
            same_math(a.grad, b[1].grad)
        assert calls(converted, x) == expected


@pytest.mark.parametrize(
    "place", ("", "layer2", "layer2.0", "layer1.0.conv2", "layer1.1.bn1", "conv1", "maxpool", "fc")
)
def test_a_forward_replaced_on_an_instance_is_called(place: str) -> None:
    """accelerate and others put a wrapped forward on the instance."""
    model, x = bottlenecks(), images()
    converted = convert(model)
    for m in (model, converted):
        target = m.get_submodule(place)
        original = target.forward
        target.forward = lambda value, original=original: original(value) * 1.25
    plain = logits(bottlenecks(), x)
    assert (logits(model, x) - plain).abs().max() > 1e-6
    same_math(logits(converted, x), logits(model, x))
    again = convert(model)  # patched before convert
    same_math(logits(again, x), logits(model, x))


def test_a_forward_impl_replaced_on_an_instance_is_called() -> None:
    model, x = bottlenecks(), images()

    def pooled_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))

    converted = convert(model)
    for m in (model, converted):
        m._forward_impl = pooled_features.__get__(m)
    assert logits(model, x).shape == (2, 2048)
    same_math(logits(converted, x), logits(model, x))
    same_math(logits(convert(model), x), logits(model, x))


def test_another_module_in_place_of_a_child_is_called() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = bottlenecks(), images()
    converted = convert(model)
    for m in (model, converted):
        torch.manual_seed(0)
        m.layer1[0].conv2 = Doubled(64, 64, 3, padding=1, bias=False).double()
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x) == {"stem": 1, "aten": 1, "conv_bn_act": 2 + 3, "block_tail": 4, "head": 1}
    for m in (model, converted):
        m.layer2 = nn.Conv2d(256, 512, 3, bias=False).double()
        nn.init.constant_(m.layer2.weight, 1e-3)
        m.layer1.append(nn.Dropout(0.5).eval())
        m.avgpool = nn.AdaptiveMaxPool2d(1)
    same_math(logits(converted, x), logits(model, x))


def test_reparametrised_convolutions_fall_back() -> None:
    """weight_norm and pruning compute the weight when it is read or the convolution is called."""
    from torch.nn.utils import parametrizations, prune

    model, x = bottlenecks(), images()
    converted = convert(model)
    for m in (model, converted):
        torch.manual_seed(0)
        parametrizations.weight_norm(m.layer1[1].conv1)
        prune.ln_structured(m.layer2[0].conv2, "weight", 0.5, n=1, dim=0)
        m.layer1[1].conv1.parametrizations.weight.original0.data.mul_(1.5)
    same_math(logits(converted, x), logits(model, x))
    assert calls(converted, x)["aten"] == 1 + 4
    same_math(logits(convert(model), x), logits(model, x))


def test_torchvision_is_not_changed() -> None:
    before = tv.Bottleneck.forward, tv.ResNet.forward, nn.Sequential.forward
    convert(bottlenecks())
    assert (tv.Bottleneck.forward, tv.ResNet.forward, nn.Sequential.forward) == before
    assert torchvision.models.resnet18 is tv.resnet18


@pytest.mark.parametrize("cls, name", ((tv.BasicBlock, "forward"), (tv.ResNet, "_forward_impl")))
def test_a_method_that_was_patched_on_the_class_is_not_bypassed(monkeypatch, cls: type[nn.Module], name: str) -> None:
    original = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, x: 2 * original(self, x))
    model, x = basics((1, 1, 1, 1)), images()
    same_math(convert(model)(x), model(x))

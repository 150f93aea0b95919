"""The models against torchvision's: weights, keys, children, logits, options and errors; and the CIFAR "
"family."""

from __future__ import annotations

import functools
import inspect
import pickle

import pytest
import torch
import torchvision
import torchvision.models.resnet as tv
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_triton
from resnet_triton import models
from resnet_triton.models import BasicBlock, Bottleneck, CifarResNet, PlainBlock, ResNet, ZeroPad
from resnet_triton.weights import _enum_name, named_weights
from tests import comparers

LAYERS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
    "resnet152": (Bottleneck, [3, 8, 36, 3]),
}
PEERS = {BasicBlock: tv.BasicBlock, Bottleneck: tv.Bottleneck}


def pair(block, layers, **kwargs) -> tuple[ResNet, tv.ResNet]:
    """The same network from both packages, each made under the same seed."""
    torch.manual_seed(3)
    ours = ResNet(block, layers, **kwargs)
    torch.manual_seed(3)
    return ours, tv.ResNet(PEERS[block], layers, **kwargs)


def images(n: int = 2, size: int = 48, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(7))


def assert_same_network(ours: nn.Module, theirs: nn.Module) -> None:
    """Names, order, types, settings and values of every child, parameter and buffer, bit by bit."""
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key
    settings = [[(n, m.extra_repr(), m.training) for n, m in model.named_modules()] for model in (ours, theirs)]
    assert settings[0] == settings[1]
    assert [n for n, p in ours.named_parameters() if p.requires_grad] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("name", LAYERS)
def test_same_seed_gives_torchvisions_network_and_logits(name: str) -> None:
    plain, theirs = pair(*LAYERS[name])
    assert_same_network(plain, theirs)
    torch.manual_seed(3)
    built = getattr(models, name)()
    assert isinstance(built, ResNet)
    assert_same_network(built, theirs)
    x = images(1)
    with torch.no_grad():
        expected = theirs.eval()(x)
        assert torch.equal(plain.eval()(x), expected)
        torch.testing.assert_close(built.eval()(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", models.BUILDERS)
def test_every_builder_makes_torchvisions_architecture(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = models.BUILDERS[name]().eval(), torchvision.models.get_model(name).eval()
        assert ours(images(1)).shape == (1, 1000)
    shapes = [{key: tuple(value.shape) for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])
    settings = [[(n, m.extra_repr()) for n, m in model.named_modules()] for model in (ours, theirs)]
    assert settings[0] == settings[1]
    # The figures of the docstring, and the weights that torchvision has for it.
    weights = torchvision.models.get_model_weights(name).DEFAULT
    millions, gmacs = weights.meta["num_params"] / 1e6, weights.meta["_ops"]
    assert f"{millions:.1f} M parameters, {gmacs:.1f} GMAC" in str(models.BUILDERS[name].__doc__)
    assert named_weights(_enum_name(ours), "DEFAULT") is weights


def test_a_builder_keeps_what_makes_its_architecture() -> None:
    with torch.device("meta"):
        assert models.resnext50_32x4d(groups=32, width_per_group=4, num_classes=3).fc.out_features == 3
        for name, kwargs in (("resnext50_32x4d", {"groups": 64}), ("wide_resnet50_2", {"width_per_group": 64})):
            parameter = next(iter(kwargs))
            for build in (models.BUILDERS[name], getattr(torchvision.models, name)):
                with pytest.raises(ValueError, match=rf"'{parameter}' expected value \d+ but got 64"):
                    build(**kwargs)


@pytest.mark.parametrize("option", ["resnext", "wide"])
def test_converted_grouped_and_wide_networks(option: str) -> None:
    ours, theirs = pair(Bottleneck, [1, 1, 1, 1], num_classes=5, **OPTIONS[option][1])
    converted = resnet_triton.convert(ours.double().eval())
    x = images(1).double()
    with torch.no_grad():
        comparers.same_math(converted(x), theirs.double().eval()(x))
    plan = resnet_triton.explain(converted, (2, 3, 64, 64), device="NVIDIA H200", dtype=torch.bfloat16)
    rows = [row for row in plan.rows if row.name.endswith(".conv2")]
    assert len(rows) == 4
    grouped = ["conv2 has groups=32; fused blocks support groups=1" in row.reason for row in rows]
    assert grouped == [option == "resnext"] * 4
    assert option == "wide" or {row.realisation for row in rows} == {"cudnn"}


OPTIONS = {
    "zero_init": (Bottleneck, {"zero_init_residual": True}),
    "zero_init_basic": (BasicBlock, {"zero_init_residual": True}),
    "dilated": (Bottleneck, {"replace_stride_with_dilation": [False, True, True]}),
    "dilated_all": (Bottleneck, {"replace_stride_with_dilation": (True, True, True)}),
    "group_norm": (BasicBlock, {"norm_layer": functools.partial(nn.GroupNorm, 8)}),
    "frozen_norm": (Bottleneck, {"norm_layer": FrozenBatchNorm2d}),
    "plain_norm": (BasicBlock, {"norm_layer": functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=None)}),
    "resnext": (Bottleneck, {"groups": 32, "width_per_group": 4}),
    "wide": (Bottleneck, {"width_per_group": 128}),
    "classes": (BasicBlock, {"num_classes": 7}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_give_torchvisions_network_and_logits(option: str) -> None:
    block, kwargs = OPTIONS[option]
    ours, theirs = pair(block, [1, 2, 1, 1], **{"num_classes": 5, **kwargs})
    assert_same_network(ours, theirs)
    x = images()
    # In training mode the statistics of the batch, and the running statistics that it leaves behind, agree
    # too.
    for training in (True, False):
        assert torch.equal(ours.train(training)(x), theirs.train(training)(x))
    assert_same_network(ours, theirs)


def test_zero_init_residual_starts_every_block_as_its_shortcut() -> None:
    for block, name in ((BasicBlock, "bn2"), (Bottleneck, "bn3")):
        model = ResNet(block, [2, 1, 1, 1], zero_init_residual=True).eval()
        assert all(not getattr(m, name).weight.any() for m in model.modules() if isinstance(m, block))
        x = images(channels=64 * block.expansion, size=8)
        assert torch.equal(model.layer1[1](x), x.relu())


def test_gradients_equal_torchvisions() -> None:
    ours, theirs = pair(Bottleneck, [1, 1, 1, 1], num_classes=5)
    for model in (ours, theirs):
        model(images()).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_signatures_are_torchvisions() -> None:
    for ours, theirs in ((ResNet, tv.ResNet), (BasicBlock, tv.BasicBlock), (Bottleneck, tv.Bottleneck)):
        a, b = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        theirs = [(p.name, p.kind, p.default) for p in b.values()]
        assert [(p.name, p.kind, p.default) for p in a.values()][: len(theirs)] == theirs
        assert all(p.kind is p.KEYWORD_ONLY for p in list(a.values())[len(theirs) :])
    for name, build in models.BUILDERS.items():
        assert build is getattr(resnet_triton, name) and build.__name__ == name
        assert build.__doc__ and "weights:" in build.__doc__
        assert pickle.loads(pickle.dumps(build)) is build
        a = inspect.signature(build).parameters
        assert [p.name for p in a.values()] == ["weights", "progress", "kwargs"]
        assert a["weights"].kind is a["progress"].kind is inspect.Parameter.KEYWORD_ONLY
    # Read by detection and segmentation code.
    ours, theirs = pair(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, False, True])
    for name in ("inplanes", "dilation", "groups", "base_width", "_norm_layer"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.layer4[0].stride == theirs.layer4[0].stride


BAD = {
    "two_dilations": (
        Bottleneck,
        {"replace_stride_with_dilation": [True, False]},
        "replace_stride_with_dilation",
    ),
    "four_dilations": (
        Bottleneck,
        {"replace_stride_with_dilation": [False] * 4},
        "replace_stride_with_dilation",
    ),
    "dilations_number": (Bottleneck, {"replace_stride_with_dilation": 3}, None),
    "basic_groups": (BasicBlock, {"groups": 2}, "groups"),
    "basic_width": (BasicBlock, {"width_per_group": 128}, "base_width"),
    "basic_dilated": (
        BasicBlock,
        {"replace_stride_with_dilation": [False, False, True], "layers": [1, 1, 1, 2]},
        None,
    ),
    "three_stages": (BasicBlock, {"layers": [1, 1, 1]}, None),
    "classes_text": (BasicBlock, {"num_classes": "ten"}, None),
    "unknown": (BasicBlock, {"num_class": 10}, "num_class"),
    "width_text": (Bottleneck, {"width_per_group": "64"}, None),
    "identity_zero_init": (BasicBlock, {"zero_init_residual": True, "norm_layer": nn.Identity}, None),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_torchvisions(case: str) -> None:
    block, kwargs, named = BAD[case]
    kwargs = dict(kwargs)
    layers = kwargs.pop("layers", [1, 1, 1, 1])
    with pytest.raises(Exception) as theirs:
        tv.ResNet(PEERS[block], layers, **kwargs)
    with pytest.raises(Exception) as ours:
        ResNet(block, layers, **kwargs)
    assert ours.type is theirs.type
    assert named is None or (named in str(ours.value) and named in str(theirs.value))


def test_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match=r"3-element tuple.*got \[True\]"):
        models.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(ValueError, match=r"groups=1 and base_width=64, got groups=4 and base_width=32"):
        models.resnet18(groups=4, width_per_group=32)
    with pytest.raises(NotImplementedError, match=r"dilation=1, got dilation=2.*Bottleneck"):
        models.resnet34(replace_stride_with_dilation=[False, True, True])
    with pytest.raises(TypeError, match="pretrained"):
        models.resnet18(pretrained=True)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_torchscript_fx_and_export_of_the_plain_model(block) -> None:
    model = ResNet(block, [1, 1, 1, 1], num_classes=3).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.jit.script(model)(x), expected)
        graph = torch.fx.symbolic_trace(model)
        assert torch.equal(graph(x), expected)
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},))
        torch.testing.assert_close(exported.module()(images(3))[:2], expected)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"].count(
        "layer1.0.relu"
    ) == block.expansion // 4 + 2


@pytest.mark.parametrize(("depth", "shortcut"), [(8, "A"), (20, "B"), (20, "C"), (20, "A-both"), (32, "none")])
def test_cifar_resnet(depth: int, shortcut: str) -> None:
    model = CifarResNet(depth, shortcut=shortcut).eval()
    main_path = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(main_path) == depth
    shortcuts = [n for n, m in model.named_modules() if n.endswith("downsample")]
    blocks = [f"layer{k}.{i}.downsample" for k in (1, 2, 3) for i in range((depth - 2) // 6)]
    where_sizes_change = ["layer2.0.downsample", "layer3.0.downsample"]
    assert shortcuts == {"C": blocks, "none": []}.get(shortcut, where_sizes_change)
    x = images(size=32)
    sizes = {}
    for name in ("layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(lambda m, i, o, name=name: sizes.update({name: tuple(o.shape[1:])}))
    assert model(x).shape == (2, 10)
    assert sizes == {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}


def test_cifar_resnet_converted_agrees_with_the_plain_one() -> None:
    torch.manual_seed(5)
    plain = CifarResNet(14, num_classes=7, in_channels=1).eval()
    torch.manual_seed(5)
    ours = models.cifar_resnet(14, num_classes=7, in_channels=1).eval()
    assert isinstance(ours, CifarResNet)
    assert_same_network(ours, plain)
    x = images(channels=1, size=28)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.jit.script(plain)(x), plain(x))
    assert torch.equal(torch.fx.symbolic_trace(plain)(x), plain(x))


@pytest.mark.parametrize("depth", [18, 2, -4, 0, 21, 20.0, "20", True])
def test_cifar_resnet_refuses_other_depths(depth) -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n\+2.*got"):
        models.cifar_resnet(depth)


def test_zeros_come_behind_the_channels_or_on_both_sides() -> None:
    """As fb.resnet.torch's and akamaster's networks do: the weights of the two are not interchangeable."""
    x = images(channels=4, size=5)
    behind, both = ZeroPad(4, 8, 2)(x), ZeroPad(4, 8, 2, both=True)(x)
    assert behind.shape == both.shape == (2, 8, 3, 3)
    pixels = x[:, :, ::2, ::2]
    assert torch.equal(behind[:, :4], pixels) and not behind[:, 4:].any()
    assert torch.equal(both[:, 2:6], pixels) and not both[:, :2].any() and not both[:, 6:].any()
    assert ZeroPad(4, 8, 2)(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_plain_networks_are_the_residual_ones_without_the_addition() -> None:
    torch.manual_seed(2)
    residual = CifarResNet(8, shortcut="A").eval()
    torch.manual_seed(2)
    plain = CifarResNet(8, shortcut="none").eval()
    assert_same_network(nn.ModuleList([plain.conv1, plain.fc]), nn.ModuleList([residual.conv1, residual.fc]))
    assert list(plain.state_dict()) == list(residual.state_dict())
    assert {type(m) for m in plain.modules()} & {BasicBlock, PlainBlock, ZeroPad} == {PlainBlock}
    x = images(channels=16, size=8)
    block = plain.layer1[0]
    assert torch.equal(block(x), block.bn2(block.conv2(block.bn1(block.conv1(x)).relu())).relu())


def test_first_1x1_takes_the_stride_of_the_papers_networks() -> None:
    ours, theirs = pair(Bottleneck, [1, 2, 1, 1], num_classes=3)
    torch.manual_seed(3)
    v1 = ResNet(Bottleneck, [1, 2, 1, 1], num_classes=3, stride_in_1x1=True, caffe_pool=True, conv1_bias=True)
    assert [(b.conv1.stride, b.conv2.stride) for b in (v1.layer1[0], v1.layer2[0], v1.layer2[1])] == [
        ((1, 1), (1, 1)),
        ((2, 2), (1, 1)),
        ((1, 1), (1, 1)),
    ]
    extra = set(v1.state_dict()) - set(theirs.state_dict())
    assert extra == {"conv1.bias"} and set(ours.state_dict()) == set(theirs.state_dict())
    x = torch.arange(36.0).view(1, 1, 6, 6)
    assert v1.maxpool(x).flatten().tolist() == [14, 16, 17, 26, 28, 29, 32, 34, 35]  # windows from 0, the last cut off
    assert v1(images(1)).shape == (1, 3)


def test_networks_by_name() -> None:
    with torch.device("meta"):
        for name, kind in (
            ("resnet18", ResNet),
            ("plain18", ResNet),
            ("resnet20", CifarResNet),
            ("cifar_resnet8", CifarResNet),
            ("cifar_plain14", CifarResNet),
            ("preact_cifar_resnet29", models.PreActCifarResNet),
        ):
            assert isinstance(models.build_by_name(name, num_classes=7), kind), name
        assert models.build_by_name("resnet20").shortcut == "A" == models.build_by_name("cifar_resnet20").shortcut
        assert models.build_by_name("cifar_plain20").shortcut == "none" == models.build_by_name("plain34").shortcut
        assert models.build_by_name("resnet18", shortcut="C").shortcut == "C"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.build_by_name("cifar_resnet19"), r"depth must be 6n\+2"),
        (lambda: models.build_by_name("resnet19"), "'resnet19' is not known"),
        (lambda: models.build_by_name("plain19"), "'plain19' is not known; did you mean plain18"),
        (lambda: models.build_by_name("cifar_resnet"), "not known.*cifar_resnetN"),
        (lambda: models.build_by_name("resnet18", shortcuts="A"), "unexpected keyword argument 'shortcuts'"),
        (lambda: models.resnet18(shortcut="D"), "shortcut must be one of 'A', 'A-both', 'B', 'C', 'none', got 'D'"),
        (lambda: models.cifar_resnet(8, shortcut="b"), "shortcut must be one of"),
        (lambda: models.plain18(shortcut="A"), "'shortcut' expected value none but got A.*makes the network a plain18"),
        (lambda: models.plain18(zero_init_residual=True), "plain network"),
        (lambda: models.resnet50(shortcut="none"), "plain network.*got Bottleneck"),
        (lambda: models.resnet18(stride_in_1x1=True), "stride_in_1x1=True needs Bottleneck.*got BasicBlock"),
        (lambda: models.resnet50(stride_in_1x1=True, weights="DEFAULT"), "torchvision has no weights for this"),
        (lambda: models.plain18(weights="DEFAULT"), "torchvision has no weights for this"),
    ],
)
def test_what_the_papers_networks_refuse(build, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build()

"""PReLU behind convolutions: values, gradients, what the plan chooses, converted modules, and the PReLU-nets."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet as tv

from resnet_triton import convert, explain, fold, functional, plan, unconvert, use_backend
from resnet_triton.cli.convert import parts_of
from resnet_triton.codegen import planned_for
from resnet_triton.convert import is_converted
from resnet_triton.kernels.config import PRELU_KERNELS, Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.macs import multiply_adds, parameters
from resnet_triton.models import build_by_name, prelu
from tests import networks
from tests.comparers import identical, same_math

F64 = torch.float64


def prelu_of(channels: int) -> nn.PReLU:
    """Slopes of either sign."""
    m = nn.PReLU(channels).double()
    with torch.no_grad():
        m.weight.copy_(torch.linspace(-0.4, 0.9, channels) if channels > 1 else torch.tensor([0.3]))
    return m


@pytest.mark.parametrize("bn", [False, True], ids=["bias", "bn"])
@pytest.mark.parametrize("slopes", [1, 8])
def test_value_and_gradients_are_those_of_the_modules(slopes: int, bn: bool) -> None:
    torch.manual_seed(0)
    conv, act = nn.Conv2d(4, 8, 3, 2, 1).double(), prelu_of(slopes)
    norm = networks.randomise(nn.Sequential(nn.BatchNorm2d(8)).double())[0] if bn else nn.Identity()
    x, residual = (torch.randn(*size, dtype=F64, requires_grad=True) for size in ((2, 4, 7, 6), (2, 8, 4, 3)))
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var) if bn else (None,) * 4
    expected = act(norm(conv(x)) + residual)
    operands = (x, conv.weight, conv.bias, *vectors)
    ours = functional.conv_bn_act(*operands, residual=residual, stride=2, padding=1, slope=act.weight)
    direct = torch.ops.resnet_triton.conv_bn_act(*operands, residual, 1e-5, False, 2, 1, 1, act.weight)
    leaves = [x, residual, conv.weight, conv.bias, act.weight, *norm.parameters()]
    gradients = [torch.autograd.grad(y.square().sum(), leaves, retain_graph=True) for y in (expected, ours, direct)]
    for y, found in zip((ours, direct), gradients[1:], strict=True):
        same_math(y, expected)
        for a, b in zip(found, gradients[0], strict=True):
            same_math(a, b)
    with torch.no_grad():  # a call without slope, as in programs exported earlier
        plain = torch.ops.resnet_triton.conv_bn_act(*operands, residual, 1e-5, True, 2, 1, 1)
        same_math(plain, (norm(conv(x)) + residual).relu())


def test_second_derivatives_and_the_operators_contract() -> None:
    torch.manual_seed(1)
    x, weight, slope = (torch.randn(*s, dtype=F64, requires_grad=True) for s in ((1, 2, 3, 3), (3, 2, 1, 1), (3,)))
    assert torch.autograd.gradgradcheck(lambda *a: functional.conv_bn_act(*a[:2], slope=a[2]), (x, weight, slope))
    arguments = (x, weight, *[None] * 6, 1e-5, False, 1, 0, 1, slope)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.resnet_triton.conv_bn_act.default, arguments, test_utils=checks)


def test_frozen_slopes_and_autocast() -> None:
    x, weight, slope = torch.randn(1, 4, 3, 3), torch.randn(8, 4, 1, 1, requires_grad=True), torch.tensor([0.5])
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.conv_bn_act(x, weight, slope=slope)
    assert y.dtype == torch.bfloat16
    identical(y, F.prelu(F.conv2d(x.bfloat16(), weight.bfloat16()), slope.bfloat16()))
    (d_weight,) = torch.autograd.grad(y.float().sum(), weight)
    assert d_weight.isfinite().all() and d_weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("slope", "relu", "message"),
    [
        (torch.ones(3), False, r"slope must be \[K\] = \[8\] or \[1\], got \(3,\)"),
        (torch.ones(8, 1), False, r"slope must be \[K\] = \[8\] or \[1\], got \(8, 1\)"),
        (
            torch.ones(8, dtype=torch.int64),
            False,
            r"slope is torch.int64 on cpu, weight is on cpu; it must be floating",
        ),
        (torch.ones(8), True, r"relu=True came with a slope; PReLU takes the place of the ReLU: pass relu=False"),
    ],
)
def test_wrong_slopes_are_named(slope: Tensor, relu: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.resnet_triton.conv_bn_act(
            torch.ones(1, 4, 2, 2), torch.ones(8, 4, 1, 1), *[None] * 6, 1e-5, relu, 1, 0, 1, slope
        )


def test_the_plan_ends_convolutions_of_real_layers_in_prelu() -> None:
    """And never chooses a kernel without it, also where one is the fastest with a ReLU."""
    target = planned_for(90)
    assert target is not None
    biased, added = Epilogue(bias=True, prelu=True), Epilogue(bn=True, residual=True, prelu=True)
    assert (str(biased), str(added)) == ("bias+prelu", "bn+add+prelu")
    choose = {
        "conv_tma": (ConvShape(1, 56, 56, 64, 64, 3, 3, 1, 1), biased),
        "conv1x1": (ConvShape(32, 56, 56, 64, 256), added),
        "conv_pointer": (ConvShape(32, 55, 55, 56, 12), biased),
        plan.ONE_PASS: (ConvShape(32, 56, 56, 64, 64, 3, 3, 1, 1), added),
    }
    for realisation, (shape, epilogue) in choose.items():
        choice = plan.choose_conv(shape, epilogue, torch.bfloat16, "tf32", target, "auto")
        assert choice.realisation == realisation
    shape = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)
    kernels = {"relu": "conv_rolling", "prelu": "conv_tma"}
    for name, kernel in kernels.items():
        epilogue = Epilogue(bn=True, relu=name == "relu", prelu=name == "prelu")
        config = plan.own_config(shape, epilogue, torch.bfloat16, "tf32", target)
        assert config.kernel == kernel and epilogue.runs_in(config)
    assert "conv_rolling" not in PRELU_KERNELS


class Net(nn.Module):
    """Convolutions with and without BN, PReLU with a slope a channel and one for all, ReLU, and other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), prelu_of(8),
            nn.Conv2d(8, 8, 3, padding=1), prelu_of(1), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.Conv2d(16, 16, 3, groups=2), prelu_of(16),
        )  # fmt: skip
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(2)
    return networks.randomise(Net().double())


def test_a_sequence_with_prelu_runs_fused(model: nn.Module) -> None:
    converted, x = convert(model), networks.images(2, 12, 14)
    assert is_converted(converted.body) and not is_converted(converted)
    assert networks.calls(converted, x) == {"conv_bn_act": 4, "aten": 1}, "the grouped convolution is PyTorch's"
    folded = fold(model)
    assert type(folded.body[1]) is nn.Identity and networks.calls(folded, x) == {"conv_bn_act": 4, "aten": 1}
    with torch.no_grad():
        expected = model(x)
        for m in (converted, folded, unconvert(converted), torch.fx.symbolic_trace(converted)):
            same_math(m(x), expected)
        same_math(torch.export.export(converted, (x,)).module()(x), expected)
    gradients = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (converted, model)]
    for a, b in zip(*gradients, strict=True):
        same_math(a, b)
    assert list(converted.state_dict()) == list(model.state_dict())
    assert [type(m) for m in unconvert(converted).modules()] == [type(m) for m in model.modules()]


def test_what_is_not_fused_is_named(model: nn.Module) -> None:
    converted = convert(model)
    (part,) = parts_of(converted)
    assert (part.name, part.kind, part.fused) == ("body", "Sequential", "in part") and "groups=2" in part.reason
    rows = explain(converted.float(), (2, 3, 12, 14), device="NVIDIA H200").rows
    ops = {row.name: row.op for row in rows if row.op.startswith("conv")}
    assert ops["body.0"].endswith(" bn+prelu") and ops["body.3"].endswith(" bias+prelu")
    with pytest.raises(ValueError, match=r"body\.10: its convolution has groups=2"):
        convert(model, strict=True)
    alone = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    assert not is_converted(convert(alone)), "nothing in it can end in PReLU"


def test_hooks_are_called_and_batch_statistics_train(model: nn.Module) -> None:
    converted, x, seen = convert(model), networks.images(2, 12, 14), []
    hook = converted.body[4].register_forward_hook(lambda *_: seen.append("prelu"))
    assert networks.calls(converted, x) == {"conv_bn_act": 3, "aten": 2} and seen == ["prelu"]
    hook.remove()
    trained = [copy.deepcopy(m).train() for m in (converted, model)]
    with use_backend("auto", memory="stored"):
        assert networks.calls(copy.deepcopy(trained[0]), x) == {"train_block": 1, "conv_bn_act": 3, "aten": 1}
        outputs = [m(x) for m in trained]
    same_math(*outputs)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(m.parameters())) for m, y in zip(trained, outputs, strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        same_math(a, b)
    for a, b in zip(trained[0].buffers(), trained[1].buffers(), strict=True):
        same_math(a.double(), b.double())


def test_prelu_in_residual_blocks_goes_into_their_units() -> None:
    """A block as a whole takes ReLU only, and says so; its convolutions end in PReLU, the last one behind the sum."""
    torch.manual_seed(3)
    block = networks.randomise(nn.Sequential(tv.BasicBlock(8, 8)).double())
    block[0].relu = prelu_of(8)
    converted, x = convert(block), torch.randn(2, 8, 5, 6, dtype=F64)
    assert networks.calls(converted, x) == {"conv_bn_act": 2}
    with torch.no_grad():
        same_math(converted(x), block(x))
    (part,) = parts_of(converted)
    assert part.reason == "relu is PReLU; fused blocks apply nn.ReLU" and part.fused == "in part"
    rows = explain(converted.float(), (2, 8, 5, 6), device="NVIDIA H200").rows
    assert [row.op.rpartition(" ")[2] for row in rows] == ["bn+prelu", "bn+add+prelu"]


@pytest.mark.parametrize(("name", "widths", "depth"), [("A", (256, 512, 512), 5), ("C", (384, 768, 896), 6)])
def test_parameters_and_multiply_adds_of_prelu_nets(name: str, widths: tuple[int, ...], depth: int) -> None:
    """Counted layer by layer: kernels, biases and slopes; and pixels times kernels."""
    convs = [(3, 96, 7, 112)]
    for width, pixels in zip(widths, (56, 28, 14), strict=True):
        convs += [(convs[-1][1], width, 3, pixels)] + [(width, width, 3, pixels)] * (depth - 1)
    cells = 7 * 7 + 3 * 3 + 2 * 2 + 1
    linears = [(widths[-1] * cells, 4096), (4096, 4096), (4096, 1000)]
    count = sum(c * k * r * r + 2 * k for c, k, r, _ in convs) + sum(c * k + 2 * k for c, k in linears) - 1000
    macs = sum(c * k * r * r * p * p for c, k, r, p in convs) + sum(c * k for c, k in linears)
    with torch.device("meta"):
        net = build_by_name("prelu_net", model=name)
    assert (parameters(net), multiply_adds(net, (1, 3, 224, 224))) == (count, macs)
    assert {"A": 178_032_072, "C": 330_623_944}[name] == count
    assert len(convs) + len(linears) == {"A": 19, "C": 22}[name]
    with pytest.raises(ValueError, match="model must be one of A, B, C, got 'D'"):
        build_by_name("prelu_net", model="D")


def test_a_small_prelu_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every convolution and PReLU is one operator; images of any size; the weights are drawn for the slopes."""
    monkeypatch.setitem(prelu.MODELS, "small", ((8, 8, 16), 1))
    torch.manual_seed(4)
    net = prelu.prelu_net("small", num_classes=7, channelwise=False).eval()
    assert net.features[1].weight.tolist() == [0.25]
    hidden = net.classifier[3].weight
    assert hidden.std().item() == pytest.approx((2 / (1 + 0.25**2) / 4096) ** 0.5, rel=0.01)
    with torch.no_grad():
        for size in ((33, 40), (64, 64)):
            x = networks.images(1, *size, dtype=torch.float32)
            assert networks.calls(net, x) == {"conv_bn_act": 4} and net(x).shape == (1, 7)
            plain = unconvert(net)
            x, y = x.double(), plain.double().features(x.double())
            levels = [F.adaptive_max_pool2d(y, side).flatten(1) for side in (7, 3, 2, 1)]
            same_math(convert(plain)(x), plain.classifier(torch.cat(levels, 1)))

"""Pre-activation blocks in the interpreter: a 1x1 that normalises what it loads, the pass, and whole blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnet_triton import convert, explain, preact, reference, use_backend
from resnet_triton.kernels.bn_act import launch_bn_act
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.conv1x1 import launch_conv1x1
from resnet_triton.kernels.conv_stats import launch_conv_stats
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import Normalised, launch_bn_vectors
from resnet_triton.kernels.train_passes import launch_bn_backward
from resnet_triton.models import PreActBasicBlock, PreActBottleneck, PreActCifarResNet
from resnet_triton.models.preact import ZeroPad, _projection
from resnet_triton.training.reference import merge
from tests.cases import EPS, FULL, ConvInputs, Guarded, conv_inputs, integers
from tests.comparers import GRADIENT, identical, no_worse_than
from tests.interpreter.test_conv_stats import config_of as conv_stats_config
from tests.interpreter.test_conv_stats import moments_of, parts_of, small
from tests.interpreter.test_training_interpreted import check, lively
from tests.networks import randomise


def lead_of(shape: ConvShape, affine: bool = True) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """gamma, beta, mean and var of a BN in front whose result is exact."""
    _, gamma, beta, mean, var = conv_inputs(ConvShape(1, 1, 1, 8, shape.c), FULL, affine=affine).vectors
    return gamma, beta, mean, var


def behind(inputs: ConvInputs, lead: tuple[Tensor | None, ...]) -> ConvInputs:
    """The same convolution on ``relu(bn(x))``, rounded to the dtype of x."""
    x = inputs.x.permute(0, 3, 1, 2).double()
    gamma, beta, mean, var = (None if v is None else v.double() for v in lead)
    scale, shift = reference.scale_shift(None, gamma, beta, mean, var, EPS)
    h = (x * scale[:, None, None] + shift[:, None, None]).relu()
    return inputs.replaced(x=h.to(inputs.x.dtype).permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("shape", "tiling", "dtype", "affine"),
    [
        pytest.param(ConvShape(3, 9, 11, 24, 40), (64, 64, 64, 0, 1), torch.bfloat16, True, id="overhang"),
        pytest.param(ConvShape(2, 5, 7, 72, 40), (32, 16, 32, 1, 1), torch.float16, False, id="persistent"),
        pytest.param(ConvShape(1, 5, 7, 96, 16), (16, 16, 32, 0, 2), torch.float32, True, id="split"),
    ],
)
def test_a_1x1_normalises_what_it_loads(shape, tiling, dtype, affine, counts) -> None:
    bm, bn, bk, persistent, split = tiling
    inputs, lead = conv_inputs(shape, FULL, dtype), lead_of(shape, affine)
    guarded = Guarded()
    y = guarded.output(shape.m, shape.k, dtype=dtype)
    x, w = guarded.input(inputs.x).view(shape.m, shape.c), guarded.input(inputs.w).view(shape.k, shape.c)
    residual = guarded.input(inputs.residual).view(shape.m, shape.k)
    operands = Operands(residual, *(guarded.input(v) for v in inputs.vectors), eps=EPS, relu=True)
    prologue = launch_bn_vectors(*(guarded.input(v) for v in lead), EPS)
    config = ConvConfig("conv1x1", (1, 1, bm), bn, bk, persistent=persistent, split=split)
    launch_conv1x1(x, w, y, operands, config, "ieee", prologue)
    guarded.verify()
    assert counts["bn_vectors"] == counts["conv1x1"] == 1
    expected = behind(inputs, lead).expected()
    assert expected.count_nonzero() > 0
    identical(y.view(expected.shape), expected)


def test_nan_passes_through_the_prologue() -> None:
    shape = ConvShape(1, 2, 8, 16, 16)
    inputs, lead = conv_inputs(shape), lead_of(shape)
    inputs.x[0, 1, 3, 5] = float("nan")
    y = torch.empty(16, 16, dtype=torch.float16)
    config = ConvConfig("conv1x1", (1, 1, 16), 16, 16)
    launch_conv1x1(
        inputs.x.view(16, 16), inputs.w.view(16, 16), y, Operands(), config, "ieee", launch_bn_vectors(*lead, EPS)
    )
    assert y[11].isnan().all() and y.isnan().sum() == 16


def test_the_pass_writes_elsewhere_than_it_reads() -> None:
    shape = ConvShape(2, 3, 7, 40, 40)
    x, lead = integers(2, 3, 7, 40, dtype=torch.bfloat16), lead_of(shape)
    guarded = Guarded()
    y, before = guarded.output(2, 3, 7, 40, dtype=torch.bfloat16), guarded.input(x)
    launch_bn_act(y, Operands(None, None, *lead, eps=EPS, relu=True), before)
    guarded.verify()
    identical(y, behind(conv_inputs(shape, dtype=torch.bfloat16).replaced(x=x), lead).x)


@pytest.mark.parametrize(
    ("shape", "box", "parts", "dtype"),
    [
        (ConvShape(2, 8, 8, 16, 16, 3, 3, 1, 1), (1, 4, 8), 2, torch.bfloat16),
        (ConvShape(4, 4, 4, 32, 40), (1, 1, 16), 2, torch.float16),
        (ConvShape(1, 4, 8, 16, 16, 3, 3, 1, 1), (1, 4, 4), 1, torch.float32),
    ],
    ids=str,
)
def test_a_convolution_adds_the_shortcut_before_its_statistics(shape, box, parts, dtype) -> None:
    config, inputs, guarded = conv_stats_config(box), small(shape, dtype, True), Guarded()
    residual = integers(shape.n, shape.p, shape.q, shape.k, dtype=dtype)
    expected = (inputs.expected() + residual.double()).to(dtype)
    y = guarded.output(*residual.shape, dtype=dtype)
    statistics = guarded.output(parts, 3, shape.k, dtype=torch.float32)
    x, w, addend = (guarded.input(t) for t in (inputs.x, inputs.w, residual))
    prologue = Normalised(guarded.input(inputs.scale), guarded.input(inputs.shift))
    launch_conv_stats(x, w, y, statistics, shape, prologue, config, "ieee", addend)
    guarded.verify()
    identical(y, expected)
    identical(statistics, moments_of(expected, parts_of(shape, config, parts), parts).float())


def test_a_rolling_kernel_adds_no_shortcut() -> None:
    shape = ConvShape(1, 4, 16, 16, 16, 3, 3, 1, 1)
    inputs, config = small(shape, torch.bfloat16, False), ConvConfig("conv_stats_rolling", (1, 1, 16), 16, 16)
    with pytest.raises(ValueError, match="adds no residual"):
        launch_conv_stats(inputs.x, inputs.w, inputs.x.clone(), None, shape, None, config, "ieee", inputs.x)


def test_an_overhanging_tile_adds_the_shortcut() -> None:
    shape = ConvShape(3, 5, 3, 16, 24, 3, 3, 1, 1)
    inputs, guarded = small(shape, torch.bfloat16, True), Guarded()
    residual = integers(3, 5, 3, 24, dtype=torch.bfloat16)
    expected = (inputs.expected() + residual.double()).to(torch.bfloat16)
    y, statistics = torch.empty_like(residual), torch.empty(2, 3, 24)
    prologue, addend = Normalised(inputs.scale, inputs.shift), guarded.input(residual)
    launch_conv_stats(inputs.x, inputs.w, y, statistics, shape, prologue, conv_stats_config((2, 4, 4)), "ieee", addend)
    identical(y, expected)
    count, mean, m2 = merge(statistics)
    assert count.eq(shape.m).all()
    exact = expected.double().flatten(0, 2)
    no_worse_than(mean, exact.float().mean(0), exact.mean(0))
    no_worse_than(m2 / count, exact.float().var(0, False), exact.var(0, False))


def test_bn_backward_adds_the_shortcuts_gradient() -> None:
    dz, c, added = (integers(3, 5, 7, 24, dtype=torch.bfloat16) for _ in range(3))
    g, guarded = integers(3, 24), Guarded()
    out = guarded.output(3, 5, 7, 24, dtype=torch.bfloat16)
    launch_bn_backward(guarded.input(dz), guarded.input(c), guarded.input(g), out, guarded.input(added))
    guarded.verify()
    identical(out, (g[0] * dz + g[1] + g[2] * c + added).bfloat16())


BLOCKS = {
    "basic": lambda: PreActBasicBlock(16, 16),
    "basic, padded": lambda: PreActBasicBlock(16, 32, 2, ZeroPad(16, 32, 2), "both"),
    "bottleneck": lambda: PreActBottleneck(32, 8),
    "bottleneck, projection": lambda: PreActBottleneck(16, 8, 2, _projection(16, 32, 2), "both", stride_in_1x1=True),
    "bottleneck, no lead": lambda: PreActBottleneck(16, 8, 1, _projection(16, 32, 1), "none"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_inference_runs_as_explained(name, counts) -> None:
    block = randomise(BLOCKS[name]()).half().eval().to(memory_format=torch.channels_last)
    x = torch.randn(3, block.conv1.in_channels, 6, 8).half().to(memory_format=torch.channels_last)
    with torch.no_grad():
        eager, exact = block(x), copy.deepcopy(block).double()(x.double())
        ours = convert(block)
        counts.clear()
        with use_backend("triton"):
            y, ran = ours(x), dict(counts)
            rows = explain(ours, x.shape).rows
    no_worse_than(y, eager, exact)
    leads = block.preact == "branch" and isinstance(block, PreActBottleneck)
    assert ran.get("bn_vectors", 0) == leads == sum(row.op.startswith("bn+relu+conv") for row in rows)
    assert ran.get("bn_act", 0) == (block.bn1 is not None and not leads) == sum(row.op == "bn+relu" for row in rows)
    own = [row.realisation for row in rows if row.realisation != "aten"]  # zero padding is PyTorch's
    assert sum(ran.values()) == len(own) + leads


@pytest.mark.parametrize("name", ["basic", "bottleneck", "bottleneck, projection"])
def test_training_errs_no_more_than_pytorch(name, counts) -> None:
    block = lively(BLOCKS[name]())
    x = torch.randn(2, block.conv1.in_channels, 4, 4).bfloat16()
    with torch.no_grad():
        upstream = torch.randn_like(copy.deepcopy(block)(x.float())).bfloat16()
    ran = check(block, x, upstream, "stored", counts)
    if block.preact == "branch":
        convs = 3 if isinstance(block, PreActBottleneck) else 2
        assert ran["conv_stats"] == ran["dgrad"] == ran["wgrad"] == convs
        assert ran["moments"] == 1 and not ran.keys() & {"masked_sums", "bn_apply"}


def test_blocks_hand_on_the_statistics(counts) -> None:
    """Two blocks and the BN behind them: one pass for the statistics of the first sum, none for the others."""
    blocks = nn.Sequential(PreActBottleneck(32, 8), PreActBottleneck(32, 8)).train()
    end, x = nn.BatchNorm2d(32), torch.randn(2, 32, 4, 4).requires_grad_()
    with torch.no_grad():
        for p in (*blocks.parameters(), *end.parameters()):
            p.add_(torch.randn_like(p) / 8)
    ours, ours_end, ours_x = convert(blocks), copy.deepcopy(end), x.detach().clone().requires_grad_()
    exact, exact_end = copy.deepcopy(blocks).double(), copy.deepcopy(end).double()
    with use_backend("triton", memory="stored"):
        counts.clear()
        y, stats = preact.run_blocks([preact.read(block) for block in ours], ours_x, ours_end)
        y = preact.bn_relu(y, ours_end, stats)
        assert counts["moments"] == 1 and counts["finalise"] == 7
        y.square().sum().backward()
    exact_x = x.detach().double().requires_grad_()
    for m, n, t in ((blocks, end, x), (exact, exact_end, exact_x)):
        n(m(t)).relu().square().sum().backward()
    no_worse_than(ours_x.grad, x.grad, exact_x.grad, GRADIENT)
    no_worse_than(ours_end.running_var, end.running_var, exact_end.running_var)


def test_a_network_in_fp32(counts) -> None:
    model = randomise(PreActCifarResNet(20, num_classes=8, bottleneck=True)).eval()
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), use_backend("triton"):
        y = convert(model)(x)
    with torch.no_grad():
        no_worse_than(y, model(x), model.double()(x.double()), GRADIENT)
    assert counts["bn_vectors"] == 3 and counts["bn_act"] == 3, "a block of each stage; two stages' first, and the end"

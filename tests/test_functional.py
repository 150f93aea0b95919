"""``functional`` on PyTorch's operators (CPU): against modules composed by hand, in any layout, and with bad input.

The same functions on our kernels are tested in ``tests/interpreter/test_ops_interpreted.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_triton import functional, reference, use_backend
from resnet_triton.functional import ConvBN
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import EPILOGUES, EPS, conv_inputs, integers
from tests.comparers import identical, no_worse_than, same_math

BACKENDS = ["auto", "cudnn"]


def conv_bn(k: int, c: int, r: int, stride: int = 1, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Convolution and BN in evaluation mode with statistics that are not the initial ones."""
    layers = nn.Sequential(nn.Conv2d(c, k, r, stride, r // 2, bias=False), nn.BatchNorm2d(k, eps=1e-3)).to(dtype).eval()
    bn = layers[1]
    with torch.no_grad():
        for tensor in (bn.weight, bn.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (bn.bias, bn.running_mean):
            tensor.normal_()
    return layers.requires_grad_(False)


def unit_of(layers: nn.Sequential) -> ConvBN:
    conv, bn = layers
    return ConvBN(
        conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps,
        conv.stride[0], conv.padding[0], conv.dilation[0],
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
def test_conv_bn_act_is_exact_on_integers(epilogue: Epilogue, backend: str) -> None:
    inputs = conv_inputs(ConvShape(2, 9, 8, 20, 24, 3, 3, 2, 1), epilogue, torch.float32)
    x, weight = inputs.x.permute(0, 3, 1, 2), inputs.w.permute(0, 3, 1, 2)
    residual = None if inputs.residual is None else inputs.residual.permute(0, 3, 1, 2)
    with use_backend(backend):
        out = functional.conv_bn_act(
            x, weight, *inputs.vectors, residual=residual, eps=EPS, relu=epilogue.relu, stride=2, padding=1
        )
    y = F.conv2d(x.double(), weight.double(), None, 2, 1)
    column = lambda v: v.double()[:, None, None]  # noqa: E731
    if epilogue.bias:
        y = y + column(inputs.bias)
    if epilogue.bn:
        y = (y - column(inputs.mean)) / column(inputs.var + EPS).sqrt() * column(inputs.gamma) + column(inputs.beta)
    if epilogue.residual:
        y = y + residual.double()
    if epilogue.relu:
        y = y.clamp(min=0)
    assert y.count_nonzero() > 0
    identical(out, y.float())
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_onednn_post_ops_are_no_worse_than_eager(dtype: torch.dtype, bias: bool) -> None:
    x, weight = torch.randn(2, 32, 9, 9).to(dtype), (torch.randn(24, 32, 3, 3) / 17).to(dtype)
    b, residual = torch.randn(24).to(dtype) if bias else None, torch.randn(2, 24, 9, 9).to(dtype)
    for r in (None, residual):
        out = functional.conv_bn_act(x, weight, b, residual=r, padding=1)
        eager = reference.conv_bn_act(x, weight, b, residual=r, padding=1)
        wide = (None if t is None else t.double() for t in (x, weight, b))
        exact = reference.conv_bn_act(*wide, residual=None if r is None else r.double(), padding=1)
        no_worse_than(out, eager, exact)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded"])
def test_any_layout_in_channels_last_out(layout: str) -> None:
    def lay_out(t: Tensor) -> Tensor:
        if layout == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return t.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "sliced":
            return torch.stack((t, t.new_full(t.shape, float("nan"))), -1)[..., 0]
        return t[:1].expand_as(t) if layout == "expanded" else t

    x, weight, residual = (lay_out(t) for t in (integers(2, 8, 6, 6), integers(8, 8, 3, 3), integers(2, 8, 6, 6)))
    out = functional.conv_bn_act(x, weight, residual=residual, padding=1)
    identical(out, (F.conv2d(x.double(), weight.double(), None, 1, 1) + residual).relu().float())
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 8, 6, 6), (2, 1, 6, 6), (2, 8, 1, 1), (1, 1, 1, 1), (0, 8, 6, 6)], ids=str)
def test_shapes_whose_strides_are_ambiguous(size: tuple[int, ...]) -> None:
    x, weight = integers(*size), integers(4, size[1], 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = functional.conv_bn_act(x.contiguous(memory_format=layout), weight, padding=1)
        identical(out, F.conv2d(x.double(), weight.double(), None, 1, 1).relu().float())
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_inputs_are_not_changed_and_outputs_are_new() -> None:
    x, residual = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)
    weight = torch.randn(8, 8, 1, 1)
    before = [t.clone() for t in (x, residual, weight)]
    outputs = [
        functional.conv_bn_act(x, weight, residual=residual),
        functional.add_relu(x, residual),
        functional.bottleneck(x, ConvBN(weight), ConvBN(weight), ConvBN(weight)),
        *functional.block_tail(x, residual, ConvBN(weight), next=ConvBN(weight)),
        *functional.fold_bn(weight, None, None, None, torch.zeros(8), torch.ones(8), 0.0),
    ]
    storages = {t.untyped_storage().data_ptr() for t in (x, residual, weight)}
    assert not storages & {t.untyped_storage().data_ptr() for t in outputs}
    for tensor, value in zip((x, residual, weight), before, strict=True):
        identical(tensor, value)


@pytest.mark.parametrize("bn", [False, True])
def test_nan_passes_the_relu(bn: bool) -> None:
    """On PyTorch's separate operators. oneDNN's fused ReLU makes zero of NaN, as under torch.compile on the CPU."""
    x = torch.zeros(1, 4, 2, 2)
    x[0, 0, 0, 0] = float("nan")
    statistics = (torch.zeros(4), torch.ones(4)) if bn else (None, None)
    with use_backend("cudnn"):
        out = functional.conv_bn_act(x, torch.ones(4, 4, 1, 1), None, None, None, *statistics, residual=x)
    assert out[0, :, 0, 0].isnan().all() and out.isnan().sum() == 4
    assert functional.add_relu(x, x)[0, 0, 0, 0].isnan()


# Blocks


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("downsample", [False, True])
@pytest.mark.parametrize("following", [False, True])
@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_block_tail_is_the_composition(kind: str, downsample: bool, following: bool, backend: str) -> None:
    c, k, stride = (8, 12, 2) if downsample else (12, 12, 1)
    conv2 = conv_bn(k if kind == "basic" else 5, 5, 3, 1 if kind == "basic" else stride)
    conv3 = conv_bn(k, 5, 1) if kind == "bottleneck" else None
    down, after = conv_bn(k, c, 1, stride) if downsample else None, conv_bn(7, k, 1) if following else None
    shortcut = torch.randn(2, c, 8, 6).double()
    t = torch.randn(2, 5, 8 // stride, 6 // stride).double() if kind == "basic" else torch.randn(2, 5, 8, 6).double()
    with use_backend(backend):
        y, t_next = functional.block_tail(
            t, shortcut, unit_of(conv2), conv3 and unit_of(conv3),
            downsample=down and unit_of(down), next=after and unit_of(after),
        )  # fmt: skip
    hidden = conv2(t) if conv3 is None else conv3(conv2(t).relu())
    expected = (hidden + (down(shortcut) if down else shortcut)).relu()
    same_math(y, expected)
    if after is None:
        assert t_next is None
    else:
        same_math(t_next, after(expected).relu())


@pytest.mark.parametrize("downsample", [False, True])
def test_bottleneck_is_the_composition(downsample: bool) -> None:
    conv1, conv2, conv3 = conv_bn(5, 12, 1), conv_bn(5, 5, 3, 2 if downsample else 1), conv_bn(12, 5, 1)
    down = conv_bn(12, 12, 1, 2) if downsample else None
    x = torch.randn(2, 12, 8, 6).double()
    y = functional.bottleneck(x, unit_of(conv1), unit_of(conv2), unit_of(conv3), downsample=down and unit_of(down))
    same_math(y, (conv3(conv2(conv1(x).relu()).relu()) + (down(x) if down else x)).relu())


# Stem, head, folding, addition


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (17, 30), (1, 1)], ids=str)
def test_stem_is_the_composition(size: tuple[int, int], pool: bool) -> None:
    layers = conv_bn(8, 3, 7, 2)
    unit = unit_of(layers)
    x = torch.randn(2, 3, *size).double()
    out = functional.stem(x, *unit.tensors, eps=unit.eps, pool=pool)
    expected = layers(x).relu()
    same_math(out, F.max_pool2d(expected, 3, 2, 1) if pool else expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_stem_of_photographs(layout: str) -> None:
    pixels = torch.randint(0, 256, (2, 20, 24, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    weight = torch.randn(8, 3, 7, 7).double()
    x = pixels if layout == "NHWC" else pixels.permute(0, 3, 1, 2)
    out = functional.stem(x, weight, normalize=(mean, std), layout=layout)
    # mean and std are fp32, whatever the weight's dtype is
    column = lambda v: torch.tensor(v, dtype=torch.float32).double()[:, None, None]  # noqa: E731
    image = (pixels.permute(0, 3, 1, 2).double() / 255 - column(mean)) / column(std)
    same_math(out, F.max_pool2d(F.conv2d(image, weight, None, 2, 3).relu(), 3, 2, 1))


def test_stem_without_normalisation_divides_bytes_by_255() -> None:
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    weight = torch.randn(4, 3, 7, 7).double()
    same_math(functional.stem(pixels, weight), functional.stem(pixels.double() / 255, weight))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (3, 5)], ids=str)
def test_head_is_the_composition(size: tuple[int, int], bias: bool) -> None:
    x, weight = torch.randn(3, 16, *size).double(), torch.randn(10, 16).double()
    b = torch.randn(10).double() if bias else None
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        same_math(functional.head(image, weight, b), F.linear(x.mean((2, 3)), weight, b))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_fold_bn_gives_the_same_convolution(bias: bool, affine: bool) -> None:
    layers = conv_bn(8, 6, 3)
    unit = unit_of(layers)._replace(bias=torch.randn(8).double() if bias else None)
    if not affine:
        unit = unit._replace(gamma=None, beta=None)
    weight, shift = functional.fold_bn(*unit.tensors, unit.eps)
    assert weight.shape == unit.weight.shape and shift.shape == (8,)
    x = torch.randn(2, 6, 5, 5).double()
    expected = reference.conv_bn_act(x, *unit.tensors, eps=unit.eps, relu=False, padding=1)
    same_math(F.conv2d(x, weight, shift, 1, 1), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "K innermost", "expanded"])
def test_fold_bn_keeps_a_layout_with_k_outermost(layout: str) -> None:
    weight = torch.randn(8, 6, 3, 3)
    expected_strides = weight.stride()
    if layout == "channels_last":
        weight = weight.contiguous(memory_format=torch.channels_last)
        expected_strides = weight.stride()
    elif layout == "K innermost":
        weight = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    elif layout == "expanded":
        weight = weight[:, :1].expand(8, 6, 3, 3)
    folded, _ = functional.fold_bn(weight, None, None, None, torch.zeros(8), torch.full((8,), 0.25), 0.0)
    identical(folded, weight * 2)
    assert folded.stride() == expected_strides


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (7,), (2, 3)], ids=str)
def test_add_relu(size: tuple[int, ...]) -> None:
    x, y = integers(*size), integers(*size)
    out = functional.add_relu(x, y)
    identical(out, (x + y).clamp(min=0))
    if len(size) == 4:
        assert out.is_contiguous(memory_format=torch.channels_last)


# Autocast


def test_autocast_is_casting_by_hand() -> None:
    """Inputs, weights and biases become bf16; BN vectors stay fp32."""
    x, shortcut = torch.randn(2, 8, 6, 6), torch.randn(2, 16, 6, 6)
    w1, w3, bias = torch.randn(16, 8, 3, 3), torch.randn(16, 16, 1, 1), torch.randn(16)
    bn = (torch.rand(16), torch.randn(16), torch.randn(16), torch.rand(16) + 0.5)
    image, stem_weight, fc = torch.randn(1, 3, 16, 16), torch.randn(8, 3, 7, 7), torch.randn(5, 16)

    def run(cast: Callable[[Tensor], Tensor]) -> list[Tensor]:
        units = (ConvBN(cast(w1), None, *bn, padding=1), ConvBN(cast(w3), cast(bias), *bn), ConvBN(cast(w3)))
        y, t = functional.block_tail(cast(x), cast(shortcut), units[0], units[1], next=units[2])
        return [
            functional.conv_bn_act(cast(x), cast(w1), cast(bias), *bn, residual=cast(shortcut), padding=1),
            y,
            t,
            functional.bottleneck(cast(shortcut), units[1], units[2], units[1]),
            functional.stem(cast(image), cast(stem_weight)),
            functional.head(cast(shortcut), cast(fc)),
        ]

    by_hand = run(lambda t: t.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        out = run(lambda t: t)
        wide = functional.conv_bn_act(x.double(), w1.double(), padding=1)
    assert wide.dtype == torch.float64, "autocast leaves fp64 alone, as PyTorch does"
    for a, b in zip(out, by_hand, strict=True):
        assert a.dtype == torch.bfloat16
        identical(a, b)


def test_photographs_under_autocast_take_the_weights_dtype() -> None:
    pixels, weight = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8), torch.randn(4, 3, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = functional.stem(pixels, weight)
    identical(out, functional.stem(pixels, weight.bfloat16()))


# Bad input

X, W = torch.randn(2, 8, 6, 6), torch.randn(12, 8, 3, 3)
V = torch.ones(12)
BAD_CONVS = [
    (
        "x without a batch",
        {"x": X[0]},
        r"x must be \[N, C, H, W\], got \(8, 6, 6\); add a batch dimension with x\[None\]",
    ),
    ("a flat weight", {"weight": W[:, :, 0, 0]}, r"weight must be \[K, C, R, S\], got \(12, 8\)"),
    (
        "another dtype",
        {"x": X.half()},
        r"x has dtype torch.float16, weight has torch.float32; .*\.to\(\), or run under torch.autocast",
    ),
    ("integers", {"x": X.int(), "weight": W.int()}, r"x has dtype torch.int32, .*both must be the same floating type"),
    (
        "other channels",
        {"x": X[:, :6]},
        r"x has 6 channels, weight expects 8; grouped convolutions are not fused: use torch",
    ),
    ("a short bias", {"bias": V[:5]}, r"bias must be \[K\] = \[12\], got \(5,\)"),
    (
        "a bias of another dtype",
        {"bias": V.half()},
        r"bias has dtype torch.float16, weight has torch.float32; convert one",
    ),
    (
        "a square gamma",
        {"gamma": torch.ones(12, 1), "mean": V, "var": V},
        r"gamma must be \[K\] = \[12\], got \(12, 1\)",
    ),
    ("a long var", {"mean": V, "var": torch.ones(13)}, r"var must be \[K\] = \[12\], got \(13,\)"),
    ("mean alone", {"mean": V}, r"mean and var belong together; got only one"),
    ("var alone", {"var": V}, r"mean and var belong together; got only one"),
    (
        "gamma without statistics",
        {"gamma": V},
        r"gamma or beta came without mean and var; pass all of a BatchNorm's statistics",
    ),
    ("beta without statistics", {"beta": V}, r"gamma or beta came without mean and var"),
    (
        "a smaller residual",
        {"residual": torch.randn(2, 12, 6, 6)},
        r"residual must be \(2, 12, 4, 4\) torch.float32, got \(2, 12, 6, 6\)",
    ),
    ("a residual to broadcast", {"residual": torch.randn(1, 12, 1, 1)}, r"residual must be \(2, 12, 4, 4\)"),
    (
        "a residual of another dtype",
        {"residual": torch.randn(2, 12, 4, 4).half()},
        r"residual must be .* torch.float32, got .* torch.float16",
    ),
    (
        "a filter larger than the image",
        {"x": X[:, :, :2]},
        r"a 3x3 filter \(dilation 1\) does not fit x of 2x6 with padding 0",
    ),
    ("too much dilation", {"dilation": 3}, r"a 3x3 filter \(dilation 3\) does not fit x of 6x6"),
    ("stride 0", {"stride": 0}, r"stride=0, dilation=1 must be at least 1, padding=0 at least 0"),
    ("negative padding", {"padding": -1}, r"padding=-1 at least 0"),
    (
        "mean that requires grad",
        {"mean": V.clone().requires_grad_(), "var": V},
        r"mean requires grad; .* pass mean.detach\(\)",
    ),
    (
        "var that requires grad",
        {"mean": V, "var": V.clone().requires_grad_()},
        r"var requires grad; .* pass var.detach\(\)",
    ),
    ("a weight elsewhere", {"weight": W.to("meta")}, r"weight is on meta, x on cpu; move both to one device"),
    ("a mean elsewhere", {"mean": V.to("meta"), "var": V}, r"mean is on meta, x on cpu; move both to one device"),
    ("a residual elsewhere", {"residual": torch.randn(2, 12, 4, 4, device="meta")}, r"residual is on meta, x on cpu"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in BAD_CONVS], ids=[c[0] for c in BAD_CONVS])
@pytest.mark.parametrize("differentiating", [False, True])
def test_bad_convolutions_are_refused(change: dict, message: str, differentiating: bool) -> None:
    arguments = {"x": X, "weight": W, **change}
    if differentiating and arguments["weight"].is_floating_point():
        arguments["weight"] = arguments["weight"].clone().requires_grad_()
    with pytest.raises(ValueError, match=message):
        functional.conv_bn_act(**arguments)


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in BAD_CONVS], ids=[c[0] for c in BAD_CONVS])
def test_bad_convolutions_are_refused_while_tracing(change: dict, message: str) -> None:
    """The shape function raises the same, so torch.export and meta tensors report it too."""
    here, elsewhere = ("meta", "cpu") if "meta" in message else (None, None)
    arguments = {"x": X, "weight": W, **change}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            on_meta = torch.empty_like(value, device="meta")
            arguments[name] = on_meta.requires_grad_() if value.requires_grad else on_meta
            if value.is_meta:
                arguments[name] = torch.zeros(value.shape)
    if here:
        message = message.replace("meta", "?").replace("cpu", here).replace("?", elsewhere)
    with pytest.raises(ValueError, match=message):
        functional.conv_bn_act(**arguments)


def test_meta_tensors_give_shapes() -> None:
    x, weight = torch.empty(2, 8, 6, 6, device="meta"), torch.empty(12, 8, 3, 3, device="meta")
    out = functional.conv_bn_act(x, weight, stride=2, padding=1)
    assert out.is_meta and out.shape == (2, 12, 3, 3) and out.is_contiguous(memory_format=torch.channels_last)
    assert functional.head(x, weight[:, :, 0, 0]).shape == (2, 12)
    image, stem = torch.empty(2, 3, 224, 224, device="meta"), torch.empty(64, 3, 7, 7, device="meta")
    assert functional.stem(image, stem).shape == (2, 64, 56, 56)


def test_bad_blocks_are_refused() -> None:
    unit = ConvBN(torch.randn(8, 8, 1, 1))
    wide = ConvBN(torch.randn(12, 8, 1, 1))
    with pytest.raises(ValueError, match=r"residual must be \(2, 12, 6, 6\) .* got \(2, 8, 6, 6\)"):
        functional.block_tail(X, X, wide)
    with pytest.raises(ValueError, match=r"x has 12 channels, weight expects 8"):
        functional.block_tail(X, torch.randn(2, 12, 6, 6), wide, next=unit)
    with pytest.raises(ValueError, match=r"residual must be \(2, 8, 3, 3\)"):
        functional.bottleneck(X, unit, unit._replace(stride=2), unit)
    with pytest.raises(ValueError, match=r"var requires grad"):
        functional.bottleneck(X, unit._replace(mean=V[:8], var=torch.ones(8, requires_grad=True)), unit, unit)


BAD_STEMS = [
    (
        "four channels",
        {"x": torch.randn(1, 4, 16, 16)},
        r"stem takes x \[N, 3, H, W\] and weight \[K, 3, 7, 7\], got \(1, 4, 16, 16\)",
    ),
    ("NHWC by mistake", {"x": torch.randn(1, 16, 16, 3)}, r"an NHWC batch enters as x.permute\(0, 3, 1, 2\)"),
    ("a 3x3 stem", {"weight": torch.randn(4, 3, 3, 3)}, r"weight \[K, 3, 7, 7\], got .* and \(4, 3, 3, 3\)"),
    (
        "another dtype",
        {"x": torch.randn(1, 3, 16, 16).half()},
        r"x must be uint8 or the weight's dtype torch.float32, got torch.float16",
    ),
    ("an unknown layout", {"layout": "CHWN"}, r"layout must be 'NCHW' or 'NHWC', got 'CHWN'"),
    ("two means", {"normalize": ((0.5, 0.5), (1, 1, 1))}, r"normalize must be \(mean, std\) of three values each"),
    ("no pixels", {"x": torch.randn(1, 3, 0, 16)}, r"x has no pixels: \(1, 3, 0, 16\)"),
    ("a short bias", {"bias": torch.ones(3)}, r"bias must be \[K\] = \[4\], got \(3,\)"),
    ("var that requires grad", {"mean": torch.ones(4), "var": torch.ones(4, requires_grad=True)}, r"var requires grad"),
    ("a weight elsewhere", {"weight": torch.randn(4, 3, 7, 7, device="meta")}, r"weight is on meta, x on cpu"),
    (
        "an integer weight",
        {"x": torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "weight": torch.ones(4, 3, 7, 7).int()},
        r"weight .*torch.int32",
    ),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in BAD_STEMS], ids=[c[0] for c in BAD_STEMS])
def test_bad_stems_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.stem(**{"x": torch.randn(1, 3, 16, 16), "weight": torch.randn(4, 3, 7, 7), **change})


def test_the_op_wants_both_normalisation_vectors() -> None:
    with pytest.raises(ValueError, match=r"norm_mean and norm_std belong together; got only one"):
        torch.ops.resnet_triton.stem(
            torch.randn(1, 3, 16, 16),
            torch.randn(4, 3, 7, 7),
            None,
            None,
            None,
            None,
            None,
            torch.ones(3),
            None,
            0.0,
            True,
        )


BAD_HEADS = [
    (
        "a flat x",
        {"x": torch.randn(2, 8)},
        r"head takes x \[N, C, H, W\] and weight \[K, C\], got \(2, 8\) and \(5, 8\)",
    ),
    ("other channels", {"weight": torch.randn(5, 9)}, r"got \(2, 8, 6, 6\) and \(5, 9\)"),
    (
        "another dtype",
        {"weight": torch.randn(5, 8).half()},
        r"x has dtype torch.float32, weight torch.float16; both must be",
    ),
    ("a short bias", {"bias": torch.ones(4)}, r"bias must be \[5\], got \(4,\)"),
    ("a weight elsewhere", {"weight": torch.randn(5, 8, device="meta")}, r"weight is on meta, x on cpu; move both"),
    ("integers", {"x": X.int(), "weight": torch.ones(5, 8).int()}, r"both must be the same floating type"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in BAD_HEADS], ids=[c[0] for c in BAD_HEADS])
def test_bad_heads_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        functional.head(**{"x": X, "weight": torch.randn(5, 8), **change})


BAD_FOLDS = [
    ("a long mean", {"mean": torch.ones(13)}, r"mean must be \[K\] = \[12\], got \(13,\)"),
    ("a short gamma", {"gamma": torch.ones(3)}, r"gamma must be \[K\] = \[12\], got \(3,\)"),
    (
        "var that requires grad",
        {"var": torch.ones(12, requires_grad=True)},
        r"var requires grad; .* pass var.detach\(\)",
    ),
    (
        "a var elsewhere",
        {"var": torch.ones(12, device="meta")},
        r"var is on meta, weight on cpu; move both to one device",
    ),
    ("an integer weight", {"weight": W.int()}, r"weight must be floating point, got torch.int32"),
]


@pytest.mark.parametrize(("change", "message"), [c[1:] for c in BAD_FOLDS], ids=[c[0] for c in BAD_FOLDS])
def test_bad_folds_are_refused(change: dict, message: str) -> None:
    good = {"weight": W, "bias": None, "gamma": None, "beta": None, "mean": V, "var": V}
    with pytest.raises(ValueError, match=message):
        functional.fold_bn(**{**good, **change})


@pytest.mark.parametrize(
    "y",
    [torch.randn(2, 8, 6, 5), torch.randn(1, 8, 1, 1), X.half(), X.to("meta")],
    ids=["shape", "broadcast", "dtype", "device"],
)
def test_bad_additions_are_refused(y: Tensor) -> None:
    with pytest.raises(
        ValueError,
        match=r"add_relu takes two tensors of one shape, dtype and device, got \(2, 8, 6, 6\) torch.float32 cpu and",
    ):
        functional.add_relu(X, y)


# Backends


def test_the_triton_backend_on_the_cpu_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    image, weight = torch.randn(1, 3, 16, 16), torch.randn(4, 3, 7, 7)
    calls: dict[str, Callable[[], object]] = {
        r"3x3/1 2x6x6x8->12": lambda: functional.conv_bn_act(X, W),
        "stem": lambda: functional.stem(image, weight),
        "head": lambda: functional.head(X, torch.randn(5, 8)),
        "fold_bn": lambda: functional.fold_bn(W, None, None, None, V, V),
        "add_relu": lambda: functional.add_relu(X, X),
    }
    for what, call in calls.items():
        with (
            use_backend("triton"),
            pytest.raises(
                RuntimeError,
                match=rf"cannot run {what}: kernels need a CUDA tensor, or TRITON_INTERPRET=1; .*use_backend\('auto'\)",
            ),
        ):
            call()


def test_everything_documented_is_there() -> None:
    assert set(functional.__all__) == {n for n in functional.__all__ if hasattr(functional, n)}
    assert {"conv_bn_act", "block_tail", "bottleneck", "stem", "head", "fold_bn", "add_relu", "ConvBN"} <= set(
        functional.__all__
    )

"""The functional interface under ``use_backend("triton")``: right kernel, exact result, any layout, every op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton import functional, reference, use_backend
from resnet_triton.functional import ConvBN
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.shapes import BLOCKS, resnet_convs
from tests.cases import EPS, FULL, ConvInputs, conv_inputs, integers, misaligned, sliced
from tests.comparers import GRADIENT, identical, no_worse_than

DTYPES = [torch.float16, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def apply(inputs: ConvInputs, **changes: object) -> Tensor:
    """``functional.conv_bn_act`` of exact inputs, as ``[N,P,Q,K]``."""
    s = inputs.shape
    arguments = {
        "x": inputs.x.permute(0, 3, 1, 2),
        "weight": inputs.w.permute(0, 3, 1, 2),
        "residual": None if inputs.residual is None else inputs.residual.permute(0, 3, 1, 2),
        **dict(zip(("bias", "gamma", "beta", "mean", "var"), inputs.vectors, strict=True)),
        **changes,
    }
    y = functional.conv_bn_act(
        **arguments, eps=inputs.eps, relu=inputs.epilogue.relu,
        stride=s.stride, padding=s.padding, dilation=s.dilation,
    )  # fmt: skip
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y.permute(0, 2, 3, 1)


def scaled(shape: ConvShape) -> ConvShape:
    """A quarter of the channels, and images of 8, 6, 4 and 3 pixels for 56, 28, 14 and 7."""
    pixels = {56: 8, 28: 6, 14: 4, 7: 3}[shape.h]
    return replace(shape, n=2, h=pixels, w=pixels, c=shape.c // 4, k=shape.k // 4)


DISTINCT = sorted({(scaled(site.shape), site.epilogue) for depth in BLOCKS for site in resnet_convs(depth, 1)}, key=str)


def test_the_list_of_convolutions_is_complete() -> None:
    """7 of ResNet-18/34 and 16 more of ResNet-50 would be too few: shape and epilogue together make these."""
    assert {(s.r, s.stride) for s, _ in DISTINCT} == {(1, 1), (1, 2), (3, 1), (3, 2)}
    assert {s.c for s, _ in DISTINCT} == {16, 32, 64, 128, 256, 512} == {s.k for s, _ in DISTINCT}


@pytest.mark.parametrize(("shape", "epilogue"), DISTINCT, ids=[f"{s} {e}" for s, e in DISTINCT])
def test_every_convolution_of_resnet_18_to_152(shape: ConvShape, epilogue: Epilogue, counts) -> None:
    inputs = conv_inputs(shape, epilogue)
    identical(apply(inputs), inputs.expected())
    assert counts == {"conv1x1" if shape.pointwise else "conv_tma": 1}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        (ConvShape(2, 5, 7, 24, 40), "conv1x1"),
        (ConvShape(2, 5, 7, 24, 40, 3, 3, 1, 1), "conv_tma"),
        (ConvShape(2, 6, 8, 32, 40, 3, 3, 2, 1), "conv_tma"),
        (ConvShape(2, 5, 7, 32, 40, 3, 3, 2, 1), "conv_pointer"),
        (ConvShape(2, 6, 8, 20, 39, 3, 3, 1, 1), "conv_pointer"),
        (ConvShape(2, 6, 8, 20, 39), "conv_pointer"),
        (ConvShape(2, 7, 7, 16, 24, 3, 3, 3, 0), "conv_pointer"),
    ],
    ids=str,
)
def test_the_shape_chooses_the_kernel(shape: ConvShape, kernel: str, dtype: torch.dtype, counts) -> None:
    inputs = conv_inputs(shape, Epilogue(True, True, True, True), dtype, vector_dtype=dtype)
    identical(apply(inputs), inputs.expected())
    assert counts == {kernel: 1}


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced channels": lambda t: sliced(t, 1),
    "sliced columns": lambda t: sliced(t, 3),
    "misaligned": lambda t: misaligned(t.contiguous(memory_format=torch.channels_last)),
    "expanded": lambda t: t[:1, :, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [ConvShape(2, 5, 7, 16, 24), ConvShape(2, 6, 6, 16, 24, 3, 3, 2, 1), ConvShape(2, 5, 5, 12, 20, 3, 3, 1, 1)],
    ids=["conv1x1", "conv_tma", "conv_pointer"],
)
def test_any_layout_of_any_argument(layout: str, shape: ConvShape) -> None:
    lay_out = LAYOUTS[layout]
    inputs = conv_inputs(shape, FULL)
    for name, tensor in (("x", inputs.x), ("weight", inputs.w), ("residual", inputs.residual)):
        argument = lay_out(tensor.permute(0, 3, 1, 2))
        field = "w" if name == "weight" else name
        expected = inputs.replaced(**{field: argument.permute(0, 2, 3, 1).contiguous()}).expected()
        identical(apply(inputs, **{name: argument}), expected)


def test_vectors_of_any_stride() -> None:
    inputs = conv_inputs(ConvShape(2, 5, 7, 16, 24), Epilogue(True, True, True, True))
    names = ("bias", "gamma", "beta", "mean", "var")
    vectors = {n: sliced(v.half() if n == "bias" else v, 0) for n, v in zip(names, inputs.vectors, strict=True)}
    identical(apply(inputs, **vectors), inputs.expected())
    one = inputs.replaced(var=torch.tensor([0.1875]).expand(24))
    identical(apply(one, bias=inputs.bias.half()), one.expected())


def test_results_repeat_bit_by_bit() -> None:
    x, w = torch.randn(2, 32, 9, 9).half(), torch.randn(24, 32, 3, 3).half()
    first = functional.conv_bn_act(x, w, padding=1)
    for _ in range(3):
        identical(functional.conv_bn_act(x, w, padding=1), first)


def test_an_image_gives_the_same_bits_in_any_batch() -> None:
    x, w = torch.randn(5, 32, 9, 9).half(), torch.randn(24, 32, 3, 3).half()
    whole = functional.conv_bn_act(x, w, padding=1)
    identical(functional.conv_bn_act(x[3:4], w, padding=1), whole[3:4])


def test_an_empty_batch_launches_nothing(counts) -> None:
    out = functional.conv_bn_act(torch.empty(0, 16, 8, 8), torch.randn(24, 16, 3, 3), padding=1, stride=2)
    assert out.shape == (0, 24, 4, 4)
    assert functional.head(torch.empty(0, 16, 8, 8), torch.randn(10, 16)).shape == (0, 10)
    assert functional.stem(torch.empty(0, 3, 32, 32), torch.randn(8, 3, 7, 7)).shape == (0, 8, 8, 8)
    assert functional.add_relu(torch.empty(0, 4, 2, 2), torch.empty(0, 4, 2, 2)).shape == (0, 4, 2, 2)
    assert not counts


def test_double_precision_is_refused() -> None:
    x, w = torch.randn(1, 16, 4, 4).double(), torch.randn(16, 16, 1, 1).double()
    with pytest.raises(RuntimeError, match=r"float64 is not one of float32.*use_backend\('auto'\)"):
        functional.conv_bn_act(x, w)
    with pytest.raises(RuntimeError, match=r"add_relu: torch.float64 is not one of"):
        functional.add_relu(x, x)


# Blocks


def unit(k: int, c: int, r: int = 1, stride: int = 1, dtype: torch.dtype = torch.float16) -> ConvBN:
    """A random convolution whose output has about the scale of its input."""
    weight = (torch.randn(k, c, r, r) * (2 / (c * r * r)) ** 0.5).to(dtype)
    mean, var = torch.randn(k) / 4, torch.rand(k) + 0.5
    return ConvBN(weight, None, torch.rand(k) + 0.5, torch.randn(k) / 4, mean, var, 1e-5, stride, r // 2)


def to(u: ConvBN | None, dtype: torch.dtype) -> ConvBN | None:
    """The unit with all its tensors in another dtype."""
    return u and ConvBN(*(None if t is None else t.to(dtype) for t in u.tensors), *u[6:])


def one_by_one(x: Tensor, u: ConvBN, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    return reference.conv_bn_act(x, *u.tensors, residual, u.eps, relu, u.stride, u.padding, u.dilation)


def plain_tail(t, shortcut, conv2, conv3, downsample, next):
    """``block_tail`` in plain PyTorch."""
    if downsample:
        shortcut = one_by_one(shortcut, downsample, relu=False)
    y = one_by_one(one_by_one(t, conv2), conv3, shortcut) if conv3 else one_by_one(t, conv2, shortcut)
    return y, one_by_one(y, next) if next else None


TAILS = {
    "basic": ((2, 16, 6, 6), (2, 16, 6, 6), unit(16, 16, 3), None, None, None),
    "basic, projection": ((2, 32, 3, 3), (2, 16, 6, 6), unit(32, 32, 3), None, unit(32, 16, 1, 2), None),
    "bottleneck": ((2, 16, 6, 6), (2, 64, 6, 6), unit(16, 16, 3), unit(64, 16), None, None),
    "bottleneck, projection, next": (
        (2, 16, 6, 6), (2, 32, 6, 6), unit(16, 16, 3, 2), unit(64, 16), unit(64, 32, 1, 2), unit(24, 64)
    ),
    "bottleneck, next": ((2, 16, 5, 5), (2, 64, 5, 5), unit(16, 16, 3), unit(64, 16), None, unit(16, 64)),
}  # fmt: skip


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_tail_is_no_worse_than_eager(name: str, dtype: torch.dtype, counts) -> None:
    t_size, shortcut_size, *units = TAILS[name]
    conv2, conv3, downsample, following = (to(u, dtype) for u in units)
    t, shortcut = torch.randn(t_size).relu().to(dtype), torch.randn(shortcut_size).relu().to(dtype)
    out = functional.block_tail(t, shortcut, conv2, conv3, downsample=downsample, next=following)
    assert sum(counts.values()) == sum(u is not None for u in units)
    eager = plain_tail(t, shortcut, conv2, conv3, downsample, following)
    exact = plain_tail(
        t.double(), shortcut.double(), *(to(u, torch.float64) for u in (conv2, conv3, downsample, following))
    )
    for ours, theirs, reference_output in zip(out, eager, exact, strict=True):
        if reference_output is None:
            assert ours is None
        else:
            no_worse_than(ours, theirs, reference_output)


def test_bottleneck_is_its_first_convolution_and_its_tail() -> None:
    x = torch.randn(2, 32, 6, 6).half()
    conv1, conv2, conv3, down = unit(16, 32), unit(16, 16, 3, 2), unit(64, 16), unit(64, 32, 1, 2)
    t = functional.conv_bn_act(x, *conv1.tensors)
    y, none = functional.block_tail(t, x, conv2, conv3, downsample=down)
    assert none is None
    identical(functional.bottleneck(x, conv1, conv2, conv3, downsample=down), y)


# Other ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (23, 37)], ids=str)
def test_stem_is_no_worse_than_eager(dtype: torch.dtype, pool: bool, size: tuple[int, int], counts) -> None:
    x = torch.randn(2, 3, *size).to(dtype)
    weight = (torch.randn(24, 3, 7, 7) / 12).to(dtype)
    vectors = (torch.rand(24) + 0.5, torch.randn(24), torch.randn(24), torch.rand(24) + 0.5)
    out = functional.stem(x, weight, None, *vectors, pool=pool)
    together = pool and dtype != torch.float32  # fp32 takes too many registers
    assert counts["space_to_depth"] == 1 and counts["stem_pool"] == together
    assert counts["max_pool"] == (pool and not together)
    assert (counts["conv_tma"] + counts["conv_pointer"] > 0) is not together
    eager = reference.stem(x, weight, None, *vectors, pool=pool)
    wide = (v.double() for v in vectors)
    no_worse_than(out, eager, reference.stem(x.double(), weight.double(), None, *wide, pool=pool))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_stem_of_photographs(layout: str) -> None:
    """uint8 pixels, scaled and normalised while they are read."""
    pixels = torch.randint(0, 256, (2, 30, 34, 3), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    weight = (torch.randn(16, 3, 7, 7) / 12).half()
    x = pixels if layout == "NHWC" else pixels.permute(0, 3, 1, 2)
    out = functional.stem(x, weight, normalize=(mean, std), layout=layout)
    image = (pixels.permute(0, 3, 1, 2).double() / 255 - torch.tensor(mean).double()[:, None, None]) / torch.tensor(
        std
    ).double()[:, None, None]
    eager = reference.stem(image.half(), weight)
    no_worse_than(out, eager, reference.stem(image, weight.double()))


def test_stem_of_expanded_normalisation() -> None:
    """Statistics of any stride."""
    x, weight = torch.rand(1, 3, 16, 16), torch.randn(8, 3, 7, 7)
    half = torch.tensor([0.5]).expand(3)
    out = functional.stem(x, weight, normalize=(half, half))
    no_worse_than(out, reference.stem(x * 2 - 1, weight), reference.stem(x.double() * 2 - 1, weight.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [10, 1000])
def test_head_is_no_worse_than_eager(dtype: torch.dtype, classes: int, counts) -> None:
    x = torch.randn(3, 64, 7, 7).to(dtype)
    weight, bias = (torch.randn(classes, 64) / 8).to(dtype), torch.randn(classes).to(dtype)
    out = functional.head(x, weight, bias)
    assert counts["global_avg_pool"] == 1 and sum(counts.values()) == 2
    exact = reference.head(x.double(), weight.double(), bias.double())
    no_worse_than(out, reference.head(x, weight, bias), exact)


def test_head_takes_any_layout() -> None:
    x, weight, bias = integers(3, 64, 4, 4), integers(16, 64), integers(16)
    expected = reference.head(x, weight, bias)
    identical(functional.head(sliced(x, 3), weight.t().contiguous().t(), sliced(bias, 0)), expected)
    identical(functional.head(x, misaligned(weight), misaligned(bias)), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fold_bn_is_exact_on_powers_of_two(dtype: torch.dtype, counts) -> None:
    inputs = conv_inputs(ConvShape(1, 3, 3, 20, 24, 3, 3), Epilogue(bn=True, bias=True), dtype)
    weight, vectors = inputs.w.permute(0, 3, 1, 2), (inputs.bias.to(dtype), *inputs.vectors[1:])
    out = functional.fold_bn(weight, *vectors, EPS)
    assert counts == {"fold_bn": 1}
    for ours, expected in zip(out, reference.fold_bn(weight, *vectors, EPS), strict=True):
        identical(ours, expected)
    assert out[0].stride() == weight.stride()


FOLD_LAYOUTS = {
    "contiguous": lambda w: w.contiguous(),
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "K innermost": lambda w: w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda w: sliced(w, 1),
    "expanded": lambda w: w[:, :1].expand_as(w),
}


@pytest.mark.parametrize("layout", FOLD_LAYOUTS)
def test_fold_bn_takes_any_layout(layout: str) -> None:
    inputs = conv_inputs(ConvShape(1, 3, 3, 20, 24, 3, 3), Epilogue(bn=True, bias=True))
    weight = FOLD_LAYOUTS[layout](inputs.w.permute(0, 3, 1, 2))
    vectors = [inputs.bias.half(), *inputs.vectors[1:]]
    expected = reference.fold_bn(weight.contiguous(), *vectors, EPS)
    strided = [sliced(v, 0) for v in vectors]
    for ours, theirs in zip(functional.fold_bn(weight, *strided, EPS), expected, strict=True):
        identical(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 20, 5, 7), (2, 1, 1, 1), (5, 3), (2051,)], ids=str)
def test_add_relu(dtype: torch.dtype, size: tuple[int, ...], counts) -> None:
    x, y = integers(*size, dtype=dtype), integers(*size, dtype=dtype)
    identical(functional.add_relu(x, y), (x + y).relu())
    x.view(-1)[0] = float("nan")
    identical(functional.add_relu(x, y), (x + y).relu())
    assert counts == {"add_relu": 2}


def test_add_relu_takes_any_layout() -> None:
    x, y = integers(2, 8, 6, 6), integers(2, 8, 6, 6)
    for a in (x, sliced(x, 1), sliced(x, 3), x.contiguous(memory_format=torch.channels_last)):
        for b in (y, y.transpose(2, 3).contiguous().transpose(2, 3)):
            identical(functional.add_relu(a, b), (x + y).relu())
    row = y[:1, :, :1].expand_as(y)
    identical(functional.add_relu(x, row), (x + row).relu())


# Training through the kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_no_worse_than_eager(dtype: torch.dtype) -> None:
    """The forward runs here, so masks come from our rounding and not from eager's."""
    units = [to(u, dtype) for u in (unit(16, 32), unit(16, 16, 3, 2), unit(64, 16), unit(64, 32, 1, 2))]
    x = torch.randn(2, 32, 6, 6).to(dtype)
    grad = torch.randn(2, 64, 3, 3)

    def gradients(run, kind: torch.dtype) -> list[Tensor]:
        leaf = x.to(kind).requires_grad_()
        own = [ConvBN(*(t if t is None else t.clone() for t in u.tensors), *u[6:]) for u in units]
        if kind != dtype:
            own = [to(u, kind) for u in own]
        parameters = [leaf] + [u.weight.requires_grad_() for u in own] + [u.gamma.requires_grad_() for u in own]
        return list(torch.autograd.grad(run(leaf, *own), parameters, grad.to(kind)))

    def eager(x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, down: ConvBN) -> Tensor:
        return plain_tail(one_by_one(x, conv1), x, conv2, conv3, down, None)[0]

    def ours(x: Tensor, conv1: ConvBN, conv2: ConvBN, conv3: ConvBN, down: ConvBN) -> Tensor:
        return functional.bottleneck(x, conv1, conv2, conv3, downsample=down)

    for a, b, exact in zip(
        gradients(ours, dtype), gradients(eager, dtype), gradients(eager, torch.float64), strict=True
    ):
        no_worse_than(a, b, exact, GRADIENT)


def test_whole_forward_and_backward_of_stem_and_head() -> None:
    """A tiny network: only our kernels run in the forward, and its gradients exist."""
    x = torch.randn(2, 3, 32, 32)
    stem_weight, weight = torch.randn(16, 3, 7, 7, requires_grad=True), torch.randn(10, 16, requires_grad=True)

    def network(stem, head) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(head(stem(x, stem_weight), weight), torch.tensor([1, 2]))
        return torch.autograd.grad(loss, (stem_weight, weight))

    exact = [stem_weight.double(), weight.double()]
    loss = F.cross_entropy(reference.head(reference.stem(x.double(), exact[0]), exact[1]), torch.tensor([1, 2]))
    for a, b, c in zip(
        network(functional.stem, functional.head),
        network(reference.stem, reference.head),
        torch.autograd.grad(loss, exact),
        strict=True,
    ):
        no_worse_than(a, b, c, GRADIENT)

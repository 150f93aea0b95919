"""Whole training blocks through the kernels: outputs, gradients, which kernels ran, repeats, and masks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet as tv

from resnet_triton import convert, use_backend
from tests.comparers import GRADIENT, identical, no_worse_than

MEMORY = ("gram", "stored")
FORWARD_KERNELS = {"conv_stats", "finalise"}
BACKWARD_KERNELS = {"bn_gradients", "bn_backward", "dgrad", "wgrad", "sum_parts"}
GRAM_KERNELS = {
    "gram_products", "gram_stats", "expand", "gram_rows", "gram_dw", "gram_matrix", "gram_columns", "gram_dgrad",
}  # fmt: skip
STORED_KERNELS = {"bn_apply", "masked_sums"}
STEM_KERNELS = {"space_to_depth", "pack_stem_weight", "bn_relu_pool", "bn_relu_pool_backward", "unpack_stem_wgrad"}


def projected(c: int, k: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: tv.BasicBlock(16, 16),
    "basic, projection of stride 2": lambda: tv.BasicBlock(16, 32, 2, projected(16, 32, 2)),
    "bottleneck": lambda: tv.Bottleneck(32, 8),
    "bottleneck, projection": lambda: tv.Bottleneck(16, 8, 1, projected(16, 32, 1)),
    "bottleneck, projection of stride 2": lambda: tv.Bottleneck(32, 16, 2, projected(32, 64, 2)),
}


def lively(m: Any, decided: bool = False) -> Any:
    """Training mode, BN parameters that matter, weights that bf16 holds: their rounding would hide other errors.

    With ``decided``, no value comes near a ReLU's zero. In fp16 hardly one in a thousand is so near that rounding moves
    it to the other side; whether that happens to us or to PyTorch is chance, and outweighs all other errors.
    """
    with torch.no_grad():
        for bn in m.modules():
            if isinstance(bn, nn.BatchNorm2d):
                bn.weight.uniform_(0.5, 1.5)
                bn.bias.normal_(0, 0.2)
                if decided:
                    bn.bias.add_(torch.where(torch.rand(bn.bias.shape) < 0.6, 9.0, -9.0))
        for p in m.parameters():
            p.copy_(p.bfloat16())
    return m.train()


def step(m: nn.Module, x: Tensor, upstream: Tensor, needs_input: bool = True) -> dict[str, Tensor]:
    """Output and gradients by name; under autocast where ``x`` is of 16 bits."""
    m = m.to(memory_format=torch.channels_last)
    m.zero_grad()
    x = x.clone(memory_format=torch.channels_last).requires_grad_(needs_input)
    with torch.autocast("cpu", x.dtype if x.itemsize == 2 else torch.bfloat16, enabled=x.itemsize == 2):
        y = m(x)
    y.backward(upstream.to(y.dtype))
    grads = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **({"x": x.grad} if x.grad is not None else {}), **grads}


def check(m: nn.Module, x: Tensor, upstream: Tensor, memory: str, counts, needs_input: bool = True) -> dict[str, int]:
    """Our step errs at most as the comparers allow beside PyTorch's; returns the launches."""
    exact = step(copy.deepcopy(m).double(), x.double(), upstream.double(), needs_input)
    eager = step(copy.deepcopy(m), x, upstream, needs_input)
    ours_model = convert(m)
    counts.clear()
    with use_backend("triton", memory=memory):
        ours = step(ours_model, x, upstream, needs_input)
    launched = dict(counts)
    assert ours.keys() == eager.keys() and len(ours) == len(eager)
    for name, value in ours.items():
        try:
            no_worse_than(value, eager[name], exact[name], *(() if name == "y" else (GRADIENT,)))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    return launched


def inputs(m: Any, dtype: torch.dtype, h: int = 8, w: int = 6) -> tuple[Tensor, Tensor]:
    """Images behind a ReLU, and a gradient of the output."""
    x = torch.randn(3, m.conv1.in_channels, h, w).relu().to(dtype)
    with torch.no_grad():
        upstream = torch.randn_like(copy.deepcopy(m)(x.float()))
    return x, upstream.to(dtype)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("dtype", "memory"), [(torch.bfloat16, "gram"), (torch.float16, "stored")], ids=str)
def test_a_block_errs_no_more_than_pytorch(name: str, dtype: torch.dtype, memory: str, counts) -> None:
    """Every step of it on its kernel."""
    block: Any = lively(BLOCKS[name](), dtype == torch.float16)
    ran = check(block, *inputs(block, dtype), memory, counts)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in block.modules())
    projection = block.downsample is not None
    grams = (1 + projection) * (isinstance(block, tv.Bottleneck) and memory == "gram")
    kinds = FORWARD_KERNELS | (BACKWARD_KERNELS - {"sum_parts"}) | (GRAM_KERNELS if grams else STORED_KERNELS)
    assert ran.keys() - {"sum_parts"} == kinds
    assert ran["conv_stats"] == ran["finalise"] == ran["bn_gradients"] == ran["dgrad"] == convolutions - grams
    assert ran["wgrad"] == convolutions - grams + 2 * grams, "second moments and dz^T a, in the Gram form"
    for kernel in GRAM_KERNELS - {"expand"} if grams else ():
        assert ran[kernel] == grams
    assert ran.get("expand", 0) == (grams > 0)
    assert ran.get("bn_apply", 0) == (not grams) and ran.get("masked_sums", 0) == (0 if grams else 1 + projection)


def test_gram_in_fp16_and_stored_in_bf16(counts) -> None:
    for dtype, memory in ((torch.float16, "gram"), (torch.bfloat16, "stored")):
        block: Any = lively(BLOCKS["bottleneck, projection of stride 2"](), dtype == torch.float16)
        check(block, *inputs(block, dtype), memory, counts)


@pytest.mark.parametrize("memory", MEMORY)
def test_repeats_are_equal_bit_by_bit(memory: str) -> None:
    block = lively(BLOCKS["bottleneck, projection"]())
    x, upstream = inputs(block, torch.bfloat16)
    ours = convert(block)
    with use_backend("triton", memory=memory):
        one, two = ({k: v.clone() for k, v in step(copy.deepcopy(ours), x, upstream).items()} for _ in range(2))
    for name, value in one.items():
        identical(value, two[name])


class Small(nn.Module):
    """The ImageNet stem, one bottleneck with a projection, one without, and a head, in torchvision's order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 7, 2, 3, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(tv.Bottleneck(16, 8, 1, projected(16, 32, 1)), tv.Bottleneck(32, 8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


def resnet() -> Any:
    """torchvision's container around :class:`Small`'s layers, which is what is recognised with its stem."""
    net, small = tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], num_classes=8), Small()
    for name, child in small.named_children():
        setattr(net, name, child)
    net.layer2 = net.layer3 = net.layer4 = nn.Sequential()
    return net


@pytest.mark.parametrize("memory", ["gram"])  # the other form of a block: above
def test_a_network_trains_one_step_like_pytorch(memory: str, counts) -> None:
    """Stem, two bottlenecks and head; images need no gradient."""
    net = lively(resnet())
    x = torch.randn(3, 3, 16, 16).bfloat16()
    ran = check(net, x, torch.randn(3, 8).bfloat16(), memory, counts, needs_input=False)
    assert ran.keys() >= FORWARD_KERNELS | BACKWARD_KERNELS | STEM_KERNELS
    assert (ran.keys() >= GRAM_KERNELS) == (memory == "gram") and (ran.keys() >= STORED_KERNELS) == (memory == "stored")
    assert ran["bn_relu_pool"] == ran["bn_relu_pool_backward"] == 1


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_the_masks_of_the_forward_and_the_backward_are_one(dtype: torch.dtype) -> None:
    """Where relu(bn(c)) is 0, dgrad passes nothing; where it is positive, nothing is lost; also next to zero.

    The shift is minus the product for one value of c a channel, rounded: many values meet zero or come within an ulp.
    """
    from resnet_triton.training import reference, steps

    n, c, h, w = 2, 16, 8, 8
    values = torch.randn(c).to(dtype)
    raw = values[None, :, None, None].expand(n, c, h, w).clone(memory_format=torch.channels_last)
    ulp = torch.randint(-1, 2, raw.shape)
    raw = torch.where(ulp == 0, raw, torch.where(ulp > 0, raw * (1 + torch.finfo(dtype).eps), raw)).to(dtype)
    raw = raw.contiguous(memory_format=torch.channels_last)
    scale = torch.rand(c) + 0.5
    product = values.double() * scale.double()
    shift = -product.float()
    shift[::4] = torch.nextafter(shift[::4], torch.tensor(torch.inf))
    stats = torch.stack([torch.zeros(c), torch.ones(c), torch.ones(c), scale, shift])
    exact = raw.double() * scale.double()[:, None, None] + shift.double()[:, None, None]
    lazy = reference.Lazy(raw, stats)
    weight = torch.eye(c).view(c, c, 1, 1)
    upstream = torch.ones_like(raw)
    with use_backend("triton", memory="stored"):
        forward = steps.materialised(lazy).raw
        dx, _ = steps.dgrad(steps.Gradient(upstream), weight, (1, 0, 1), lazy, None, 1, None)
        masked, _ = steps.masked_sums(upstream, None, raw, stats)
        through, _ = steps.conv(lazy, weight, (1, 0, 1), False)
    zeros = torch.zeros(c)
    back = reference.GramBackward(
        torch.zeros(c, c), zeros, zeros, torch.eye(c).to(dtype), torch.zeros(c, c, dtype=dtype), torch.ones(c), zeros
    )
    with use_backend("triton", memory="gram"):
        gram, _ = steps.gram_dgrad(upstream, back, lazy, 1, True, True, weight)
    assert (exact.abs() < 1e-6).sum() > 100 and (exact == 0).sum() + (exact > 0).sum() > 100
    identical(through, forward)
    positive = exact.float() > 0  # one rounding, as an FMA has: a positive sum may not be rounded to zero
    assert positive.any() and (~positive).any()
    for name, grad in (("dgrad", dx), ("masked_sums", masked), ("gram_dgrad", gram)):
        passes = grad != 0
        assert int((passes & ~positive).sum()) == 0, f"{name}: a gradient where the forward was 0"
        assert int((~passes & positive).sum()) == 0, f"{name}: none where the forward was positive"
    tiny = positive & (forward == 0)
    assert dtype == torch.float16 or not tiny.any(), "only fp16 rounds a small positive value to 0"

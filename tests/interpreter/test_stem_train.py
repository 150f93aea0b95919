"""``kernels/stem_train.py`` in the interpreter: the stem's raw convolution, its statistics, its weight's gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.kernels import stem, stem_train
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape, cdiv, out_size
from tests.cases import Guarded, integers
from tests.comparers import GRADIENT, identical, no_worse_than
from tests.interpreter.test_stem import cells_of, packed

PAIRS, WINDOWS = (
    [ConvConfig("conv_stats", (1, 4, 8), 16, bk), ConvConfig("wgrad", (1, 4, 8), 16, bk, 4, 2, split=2)]
    for bk in (stem_train.PAIR, stem_train.WINDOW)
)
CASES = {
    "no overhang": (1, 16, 32, 16, torch.float16, PAIRS),
    "odd everything, filters past the last block": (1, 15, 17, 24, torch.bfloat16, PAIRS),
    "several boxes, odd columns of output": (2, 18, 30, 16, torch.float16, PAIRS),
    "one column, so no odd ones": (3, 1, 1, 8, torch.float16, PAIRS),
    "fp32": (1, 10, 7, 8, torch.float32, PAIRS),
    "windows": (2, 9, 22, 16, torch.bfloat16, WINDOWS),
    "one window": (2, 2, 2, 8, torch.float16, WINDOWS),
}


def gradient_of(dc: Tensor, x: Tensor) -> Tensor:
    """The weight's gradient in plain PyTorch, for ``dc [N,P,Q,K]``."""
    return torch.nn.grad.conv2d_weight(x, (dc.shape[3], 3, 7, 7), dc.permute(0, 3, 1, 2), 2, 3)


def shape_of(x: Tensor, k: int) -> ConvShape:
    return ConvShape(x.shape[0], x.shape[2], x.shape[3], 3, k, 7, 7, 2, 3)


def conv_stats(x: Tensor, weight: Tensor, config: ConvConfig = PAIRS[0], aligned: bool = True) -> tuple[Tensor, Tensor]:
    """The output ``[N,P,Q,K]`` and the parts, from guarded buffers."""
    shape = shape_of(x, len(weight))
    guarded = Guarded()
    c = guarded.output(shape.n, shape.p, shape.q, shape.k, dtype=x.dtype)
    parts = guarded.output(stem_train.stem_stats_parts(shape, config), 3, shape.k, dtype=torch.float32)
    xs = guarded.input(cells_of(x, *stem.stem_cells(*x.shape[2:], aligned)))
    stem_train.launch_stem_conv_stats(xs, guarded.input(packed(weight)), c, parts, config, "ieee")
    guarded.verify()
    return c, parts


def wgrad(dc: Tensor, x: Tensor, dw: Tensor, config: ConvConfig = PAIRS[1]) -> None:
    """Runs the kernels on guarded inputs; no more shares than there are boxes."""
    tn, th, tw = config.box
    n, p, q, _ = dc.shape
    columns = q // min(q, stem_train.WINDOW // config.bk)
    config = replace(config, split=min(config.split, cdiv(n, tn) * cdiv(p, th) * cdiv(columns, tw)))
    guarded = Guarded()
    xs = guarded.input(cells_of(x, *stem.stem_cells(*x.shape[2:], True)))
    stem_train.launch_stem_wgrad(guarded.input(dc), xs, dw, config, "ieee")
    guarded.verify()


def merged(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and M2 of all parts, in fp64."""
    counts, means, squares = parts.double().unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    return total, mean, squares.sum(0) + (counts * (means - mean) ** 2).sum(0)


def check_statistics(parts: Tensor, c: Tensor) -> None:
    """Those of the rounded output, as good as fp32 makes them."""
    rows = c.reshape(-1, c.shape[3])
    count, mean, m2 = merged(parts)
    identical(count, torch.full_like(count, len(rows)))
    exact_m2 = rows.double().var(0, unbiased=False) * len(rows)
    no_worse_than(mean.float(), rows.float().mean(0), rows.double().mean(0))
    no_worse_than(m2.float(), rows.float().var(0, unbiased=False) * len(rows), exact_m2)


@pytest.mark.parametrize(("n", "h", "w", "k", "dtype", "configs"), CASES.values(), ids=CASES)
def test_conv_stats_is_exact(n, h, w, k, dtype, configs, counts) -> None:
    x, weight = integers(n, 3, h, w, dtype=dtype, low=-1, high=1), integers(k, 3, 7, 7, dtype=dtype, low=-1, high=1)
    c, parts = conv_stats(x, weight, configs[0])
    assert counts == {"conv_stats": min(c.shape[2], 2) if configs is PAIRS else 1}
    identical(c, F.conv2d(x.double(), weight.double(), stride=2, padding=3).permute(0, 2, 3, 1).to(dtype))
    check_statistics(parts, c)


@pytest.mark.parametrize(("n", "h", "w", "k", "dtype", "configs"), CASES.values(), ids=CASES)
def test_wgrad_is_exact(n, h, w, k, dtype, configs, counts) -> None:
    x = integers(n, 3, h, w, dtype=dtype)
    dc = integers(n, out_size(h, 7, 2, 3), out_size(w, 7, 2, 3), k, dtype=dtype)
    guarded = Guarded()
    dw = guarded.output(k, 3, 7, 7, dtype=torch.float32)
    wgrad(dc, x, dw, configs[1])
    guarded.verify()
    assert counts["wgrad"] == (min(dc.shape[2], 2) if configs is PAIRS else 1) and counts["unpack_stem_wgrad"] == 1
    identical(dw, gradient_of(dc.double(), x.double()).float())


@pytest.mark.parametrize("configs", [PAIRS, WINDOWS], ids=["pairs", "windows"])
def test_shares_of_several_boxes_repeat_bitwise(configs) -> None:
    x, weight = integers(2, 3, 13, 33, dtype=torch.float16), integers(8, 3, 7, 7, dtype=torch.float16)
    xs, packed_w = cells_of(x, *stem.stem_cells(13, 33, True)), packed(weight)
    c, parts, again = torch.empty(2, 7, 17, 8).half(), torch.empty(2, 3, 8), torch.empty(2, 3, 8)
    stem_train.launch_stem_conv_stats(xs, packed_w, c, parts, configs[0], "ieee")
    check_statistics(parts, c)
    stem_train.launch_stem_conv_stats(xs, packed_w, c, again, configs[0], "ieee")
    identical(parts, again)
    first = torch.full((8, 3, 7, 7), float("nan")).contiguous(memory_format=torch.channels_last)
    wgrad(c, x, first, configs[1])
    identical(first, gradient_of(c.double(), x.double()).float())
    second = torch.empty_like(first)
    wgrad(c, x, second, configs[1])
    identical(first, second)


def test_without_statistics() -> None:
    x, weight = integers(1, 3, 9, 9, dtype=torch.float16), integers(8, 3, 7, 7, dtype=torch.float16)
    c = torch.empty(1, 5, 5, 8).half()
    xs = cells_of(x, *stem.stem_cells(9, 9, True))
    stem_train.launch_stem_conv_stats(xs, packed(weight), c, None, PAIRS[0], "ieee")
    identical(c, F.conv2d(x.double(), weight.double(), stride=2, padding=3).permute(0, 2, 3, 1).half())


def test_large_mean_and_small_variance() -> None:
    # sums of squares would lose all of it
    x = 1 + torch.randn(1, 3, 16, 16) / 64
    weight = torch.full((8, 3, 7, 7), 8.0)
    weight[:, :, :, 4:] = torch.randn(8, 1, 1, 1)
    c, parts = conv_stats(x, weight, aligned=False)
    check_statistics(parts, c)


def test_random_values_are_as_good_as_eager() -> None:
    x, weight, dc = torch.randn(1, 3, 14, 18).half(), (torch.randn(16, 3, 7, 7) / 12).half(), torch.randn(1, 7, 9, 16)
    c, parts = conv_stats(x, weight)
    eager = F.conv2d(x, weight, stride=2, padding=3).permute(0, 2, 3, 1)
    no_worse_than(c, eager, F.conv2d(x.double(), weight.double(), stride=2, padding=3).permute(0, 2, 3, 1))
    check_statistics(parts, c)
    dw = torch.empty(16, 3, 7, 7)
    wgrad(dc.half(), x, dw)
    exact = gradient_of(dc.half().double(), x.double())
    no_worse_than(dw, gradient_of(dc.half().float(), x.float()), exact, GRADIENT)


def test_nan_stays_in_its_channels_and_taps() -> None:
    x, weight = integers(1, 3, 9, 9, dtype=torch.float16), integers(8, 3, 7, 7, dtype=torch.float16)
    weight[3, 0, 0, 0] = float("nan")
    _, parts = conv_stats(x, weight)
    channels = torch.arange(8) == 3
    identical(parts[:, 1].isnan().any(0), channels)
    identical(parts[:, 2].isnan().any(0), channels)
    dc = integers(1, 5, 5, 8, dtype=torch.float16)
    dc[0, 2, 2, 5] = float("inf")
    dw = torch.empty(8, 3, 7, 7)
    wgrad(dc, x.abs() + 1, dw)
    identical(dw.isfinite().flatten(1).all(1), torch.arange(8) != 5)


def test_empty_batch_launches_nothing(counts) -> None:
    xs, c, dw = torch.empty(0, 7, 8, 16), torch.empty(0, 4, 4, 8), torch.full((8, 3, 7, 7), float("nan"))
    rows = stem_train.stem_stats_parts(ConvShape(0, 8, 8, 3, 8, 7, 7, 2, 3), PAIRS[0])
    parts = torch.full((rows, 3, 8), float("nan"))
    stem_train.launch_stem_conv_stats(xs, torch.zeros(8, 4, 4, 16), c, parts, PAIRS[0], "ieee")
    stem_train.launch_stem_wgrad(c, xs, dw, PAIRS[1], "ieee")
    assert not counts and not dw.any() and not parts.any()


def test_what_does_not_fit_is_refused() -> None:
    xs, c, w = torch.zeros(1, 7, 8, 16), torch.zeros(1, 4, 4, 8), torch.zeros(8, 4, 4, 16)
    with pytest.raises(ValueError, match="multiple of 2"):
        stem_train.launch_stem_conv_stats(xs, w, c, torch.zeros(9, 3, 8), PAIRS[0], "ieee")
    with pytest.raises(ValueError, match="bk=32 or bk=64"):
        stem_train.launch_stem_wgrad(c, xs, torch.zeros(8, 3, 7, 7), ConvConfig("wgrad", (1, 4, 8), 16, 16), "ieee")


@pytest.mark.parametrize("itemsize", [2, 4])
def test_configurations(itemsize: int) -> None:
    large, small = ConvShape(256, 224, 224, 3, 64, 7, 7, 2, 3), ConvShape(1, 5, 5, 3, 8, 7, 7, 2, 3)
    for configs in (stem_train.stem_stats_configs, stem_train.stem_wgrad_configs):
        for config in configs(large, itemsize):
            columns = 112 * config.bk // stem_train.WINDOW
            assert 112 % config.box[1] == columns % config.box[2] == 256 % config.box[0] == 0, "boxes waste pixels"
        assert all(config.bn == 16 for config in configs(small, itemsize))
    assert all(config.split == stem_train.SHARES for config in stem_train.stem_wgrad_configs(large, itemsize))
    assert stem_train.stem_wgrad_config(small, itemsize).split == 1
    assert stem_train.stem_stats_parts(large, stem_train.stem_stats_config(large, itemsize)) <= 4 * stem_train.SHARES

"""``kernels/stem.py`` in the interpreter: cells, packed weights and the convolution on them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.kernels import stem
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import out_size
from tests.cases import EPS, VARIANCES, Guarded, integers
from tests.comparers import identical, no_worse_than

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
TMA = ConvConfig("conv_tma", (1, 4, 8), 16, 32)
POINTER = ConvConfig("conv_pointer", (1, 1, 64), 16, 16)


def image(n: int, h: int, w: int, dtype: torch.dtype, layout: str) -> Tensor:
    """Small integers, or all of uint8's range, as ``[n, 3, h, w]`` in one of several memory layouts."""
    x = torch.randint(0, 256, (n, 3, h, w)).to(dtype) if dtype == torch.uint8 else integers(n, 3, h, w, dtype=dtype)
    if layout == "nhwc":
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "cropped":  # a window of a larger image that has its columns as rows in memory
        larger = torch.full((n, 4, w + 3, h + 2), 99).to(dtype)
        larger[:, 1:, 2 : w + 2, 1 : h + 1] = x.transpose(2, 3)
        return larger[:, 1:, 2 : w + 2, 1 : h + 1].transpose(2, 3)
    return x


def normalised(x: Tensor, dtype: torch.dtype, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """What the first pass makes of a pixel, computed in ``dtype``."""
    value = x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)
    if mean is None:
        return value
    return (value - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]


def cells_of(value: Tensor, hs: int, ws: int) -> Tensor:
    """Space-to-depth in plain PyTorch."""
    n, _, h, w = value.shape
    padded = F.pad(value, (4, 2 * ws - 4 - w, 4, 2 * hs - 4 - h))
    cells = padded.reshape(n, 3, hs, 2, ws, 2).permute(0, 2, 4, 3, 5, 1).reshape(n, hs, ws, 12)
    return F.pad(cells, (0, 4))


def packed(w: Tensor) -> Tensor:
    """The packed weight in plain PyTorch."""
    window = F.pad(w, (1, 0, 1, 0)).reshape(w.shape[0], 3, 4, 2, 4, 2)
    return F.pad(window.permute(0, 2, 4, 3, 5, 1).reshape(w.shape[0], 4, 4, 12), (0, 4)).contiguous()


def space_to_depth(x: Tensor, dtype: torch.dtype, mean=None, std=None, aligned: bool = True) -> Tensor:
    """Runs the kernel into a guarded buffer."""
    guarded = Guarded()
    out = guarded.output(x.shape[0], *stem.stem_cells(*x.shape[2:], aligned), stem.CELL_CHANNELS, dtype=dtype)
    stem.launch_space_to_depth(x, out, mean, std)
    guarded.verify()
    return out


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("h", "w"), [(224, 224), (1, 1), (2, 2), (7, 9), (33, 65)])
def test_stem_cells(h: int, w: int, aligned: bool) -> None:
    hs, ws = stem.stem_cells(h, w, aligned)
    assert hs == out_size(h, 7, 2, 3) + 3
    assert ws - out_size(w, 7, 2, 3) in ((3, 4) if aligned else (3,))
    assert not aligned or ws % 2 == 0
    assert 2 * hs >= h + 4 and 2 * ws >= w + 4, "some pixels have no cell"


@pytest.mark.parametrize(
    ("dtype", "layout", "out"),
    [
        (torch.uint8, "nhwc", torch.float16),
        (torch.uint8, "nchw", torch.bfloat16),
        (torch.float16, "nhwc", torch.float16),
        (torch.float16, "cropped", torch.float32),
        (torch.bfloat16, "cropped", torch.bfloat16),
        (torch.float32, "nchw", torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("n", "h", "w"), [(2, 5, 9), (1, 1, 1), (1, 4, 2)])
def test_space_to_depth_is_exact(n: int, h: int, w: int, dtype, layout: str, out, counts) -> None:
    x = image(n, h, w, dtype, layout)
    if dtype == torch.uint8:
        x = x // 128 * 255  # 0 and 1 once scaled
    cells = space_to_depth(x, out)
    assert counts == {"space_to_depth": 1}
    identical(cells, cells_of(normalised(x, torch.double), *cells.shape[1:3]).to(out))


def test_space_to_depth_of_rows_wider_than_a_block() -> None:
    x = image(1, 3, 301, torch.float16, "nhwc")
    cells = space_to_depth(x, torch.float16, aligned=False)
    assert cells.shape[2] > 128
    identical(cells, cells_of(x, *cells.shape[1:3]))


@pytest.mark.parametrize(
    ("dtype", "layout"), [(torch.uint8, "nchw"), (torch.uint8, "nhwc"), (torch.float32, "nchw")], ids=str
)
def test_space_to_depth_normalises(dtype: torch.dtype, layout: str) -> None:
    x = image(1, 6, 31, dtype, layout)
    cells = space_to_depth(x, torch.float32, MEAN, STD)
    eager, exact = (cells_of(normalised(x, d, MEAN, STD), *cells.shape[1:3]) for d in (torch.float32, torch.double))
    no_worse_than(cells, eager, exact)
    padding = cells_of(torch.ones(x.shape), *cells.shape[1:3]) == 0
    assert (cells[padding] == 0).all(), "padding and the four spare channels are zero after the normalisation"


def test_space_to_depth_normalises_exactly() -> None:
    x = image(1, 5, 5, torch.float32, "nchw") / 8
    mean, std = torch.tensor([0.5, -1.0, 0.25]), torch.tensor([0.25, 2.0, 0.5])
    cells = space_to_depth(x, torch.float16, mean, std, aligned=False)
    identical(cells, cells_of(normalised(x, torch.double, mean, std), *cells.shape[1:3]).half())


def test_space_to_depth_keeps_nan_and_infinity_in_their_pixels() -> None:
    x = image(1, 6, 6, torch.float32, "nhwc")
    x[0, 1, 2, 3] = float("nan")
    x[0, 2, 5, 0] = float("inf")
    cells = space_to_depth(x, torch.float32)
    identical(cells, cells_of(x, *cells.shape[1:3]))


def test_space_to_depth_beyond_32_bit_offsets() -> None:
    # untouched pages take no memory: planes are 2^30 bytes apart, columns 2^28
    plane, column = 2**30 + 4096, 2**28
    x = torch.empty(2 * plane + 3 * column + 4096, dtype=torch.uint8).as_strided((1, 3, 2, 4), (1, plane, 64, column))
    x.copy_(torch.randint(0, 2, x.shape, dtype=torch.uint8) * 255)
    cells = space_to_depth(x, torch.float16)
    identical(cells, cells_of(normalised(x, torch.double), *cells.shape[1:3]).half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pack_stem_weight(memory_format: torch.memory_format, dtype: torch.dtype, counts) -> None:
    w = torch.randn(5, 3, 7, 7).contiguous(memory_format=memory_format)
    guarded = Guarded()
    out = guarded.output(5, 4, 4, stem.CELL_CHANNELS, dtype=dtype)
    stem.launch_pack_stem_weight(w, out)
    guarded.verify()
    assert counts == {"pack_stem_weight": 1}
    identical(out, packed(w).to(dtype))


@pytest.mark.parametrize("config", [TMA, POINTER], ids=["conv_tma", "conv_pointer"])
@pytest.mark.parametrize(
    ("n", "h", "w", "k", "dtype"),
    [
        pytest.param(2, 16, 24, 16, torch.float16, id="even number of columns"),
        pytest.param(1, 13, 21, 24, torch.float16, id="odd everything, filters past the last block"),
        pytest.param(3, 1, 1, 8, torch.float16, id="one column, so no odd ones"),
        pytest.param(1, 10, 6, 8, torch.float32, id="fp32"),
        pytest.param(1, 10, 6, 8, torch.bfloat16, id="bf16"),
    ],
)
def test_stem_conv_is_exact(n: int, h: int, w: int, k: int, dtype: torch.dtype, config: ConvConfig, counts) -> None:
    x, weight = integers(n, 3, h, w, dtype=dtype, low=-1, high=1), integers(k, 3, 7, 7, dtype=dtype, low=-1, high=1)
    gamma, beta, mean = integers(3, k)
    var = torch.tensor(VARIANCES)[torch.randint(0, 4, (k,))]
    p, q = out_size(h, 7, 2, 3), out_size(w, 7, 2, 3)
    guarded = Guarded()
    xs = guarded.input(cells_of(x, *stem.stem_cells(h, w, config is TMA)))
    y = guarded.output(n, p, q, k, dtype=dtype)
    operands = Operands(gamma=gamma, beta=beta, mean=mean, var=var, eps=EPS, relu=True)
    stem.launch_stem_conv(xs, guarded.input(packed(weight)), y, operands, config, "ieee")
    guarded.verify()
    assert counts == {config.kernel: min(q, 2) if config is TMA else 1}
    raw = F.conv2d(x.double(), weight.double(), stride=2, padding=3).permute(0, 2, 3, 1)
    identical(y, ((raw - mean) * gamma / (var.double() + EPS).sqrt() + beta).relu().to(dtype))


@pytest.mark.parametrize("config", [TMA, POINTER], ids=["conv_tma", "conv_pointer"])
def test_stem_conv_of_a_photograph_like_batch(config: ConvConfig) -> None:
    x = image(1, 18, 17, torch.uint8, "nhwc")
    weight = torch.randn(16, 3, 7, 7) / 12
    xs = space_to_depth(x, torch.float16, MEAN, STD, aligned=config is TMA)
    w16 = torch.empty(16, 4, 4, stem.CELL_CHANNELS, dtype=torch.float16)
    stem.launch_pack_stem_weight(weight, w16)
    y = torch.full((1, 9, 9, 16), float("nan"), dtype=torch.float16)
    stem.launch_stem_conv(xs, w16, y, Operands(), config, "ieee")
    exact = F.conv2d(normalised(x, torch.double, MEAN, STD), weight.double(), stride=2, padding=3)
    eager = F.conv2d(normalised(x, torch.float32, MEAN, STD).half(), weight.half(), stride=2, padding=3)
    no_worse_than(y, eager.permute(0, 2, 3, 1), exact.permute(0, 2, 3, 1))


@pytest.mark.parametrize("columns", [7, 8, 11])
def test_stem_conv_takes_any_width_with_tma(columns: int) -> None:
    x, weight = integers(1, 3, 8, 8, dtype=torch.float16), integers(8, 3, 7, 7, dtype=torch.float16)
    guarded = Guarded()
    y = guarded.output(1, 4, 4, 8, dtype=torch.float16)
    stem.launch_stem_conv(guarded.input(cells_of(x, 7, columns)), packed(weight), y, Operands(), TMA, "ieee")
    guarded.verify()
    identical(y, F.conv2d(x.double(), weight.double(), stride=2, padding=3).permute(0, 2, 3, 1).half())


def test_stem_conv_rejects() -> None:
    xs, w, y = torch.zeros(1, 5, 8, 16), torch.zeros(8, 4, 4, 16), torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="residual"):
        stem.launch_stem_conv(xs, w, y, Operands(residual=y), TMA, "ieee")
    with pytest.raises(ValueError, match="7 columns"):
        stem.launch_stem_conv(xs, w, y, Operands(), POINTER, "ieee")


@pytest.mark.parametrize("config", [TMA, POINTER], ids=["conv_tma", "conv_pointer"])
def test_empty_batch_launches_nothing(config: ConvConfig, counts) -> None:
    xs = torch.empty(0, *stem.stem_cells(8, 8, config is TMA), 16)
    stem.launch_space_to_depth(torch.empty(0, 3, 8, 8), xs, None, None)
    stem.launch_stem_conv(xs, torch.zeros(8, 4, 4, 16), torch.empty(0, 4, 4, 8), Operands(), config, "ieee")
    assert not counts


def test_stem_config() -> None:
    large = stem.stem_config(256, 112, 112, 64, 2, tma=True)
    assert (large.kernel, large.bm, large.bn, large.bk, large.warps) == ("conv_tma", 256, 64, 32, 4)
    assert 112 % large.box[1] == 56 % large.box[2] == 256 % large.box[0] == 0, "the boxes waste pixels"
    assert stem.stem_config(1, 112, 112, 64, 2, tma=True).bm < 256, "one image leaves multiprocessors idle"
    assert stem.stem_config(256, 112, 112, 64, 4, tma=True).bk == 32
    assert stem.stem_config(256, 112, 112, 64, 2, tma=False).kernel == "conv_pointer"
    assert stem.stem_config(256, 112, 112, 60, 2, tma=True).kernel == "conv_pointer", "120-byte rows of output"

"""``kernels.geometry``: sizes against PyTorch's own, bytes and FLOPs against numbers counted by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from resnet_triton.kernels.geometry import INT32_MAX, ChainShape, ConvShape, cdiv, out_size


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_output_sizes_are_pytorchs(stride: int) -> None:
    for h, w, r, s, padding, dilation in itertools.product((1, 6, 7, 13), (5, 8), (1, 3), (1, 2, 7), (0, 1, 3), (1, 2)):
        shape = ConvShape(2, h, w, 3, 4, r, s, stride, padding, dilation)
        x, weight = torch.empty(2, 3, h, w, device="meta"), torch.empty(4, 3, r, s, device="meta")
        try:
            expected = F.conv2d(x, weight, None, stride, padding, dilation).shape
        except RuntimeError:  # the filter is larger than the padded image
            assert min(shape.p, shape.q) < 1, shape
        else:
            assert (2, 4, shape.p, shape.q) == expected, shape


def test_pooling_sizes_are_pytorchs() -> None:
    for size in range(1, 30):
        x = torch.empty(1, 1, size, size, device="meta")
        assert out_size(size, 3, 2, 1) == F.max_pool2d(x, 3, 2, 1).shape[2]


def test_gemm_sizes_of_a_known_convolution() -> None:
    """The first 3x3 of ResNet-50's second stage, batch 256."""
    shape = ConvShape(256, 56, 56, 128, 128, 3, 3, 2, 1)
    assert (shape.p, shape.q) == (28, 28)
    assert shape.m == 256 * 28 * 28 == 200_704
    assert shape.reduction == 1152
    assert shape.macs == 200_704 * 1152 * 128
    assert shape.pixels_read == 256 * 56 * 56
    x, w, y = 256 * 56 * 56 * 128, 128 * 1152, 200_704 * 128
    assert shape.bytes_moved(2) == 2 * (x + w + y)
    assert shape.bytes_moved(4, residual=True) == 4 * (x + w + 2 * y)


def test_resnet50_has_four_gigamacs() -> None:
    """4.09 GMAC an image, as torchvision documents it: 0.118 of them in the stem, 0.002 in the head."""
    from resnet_triton.shapes import resnet_convs, stem_conv

    macs = [site.shape.macs for site in resnet_convs(50, 1)]
    assert len(macs) == 52
    assert stem_conv(1).shape.macs == 112 * 112 * 64 * 147
    assert round((sum(macs) + stem_conv(1).shape.macs + 2048 * 1000) / 1e9, 2) == 4.09


def test_a_strided_1x1_reads_a_quarter_of_the_image() -> None:
    assert ConvShape(4, 8, 8, 16, 32, stride=2).pixels_read == 4 * 4 * 4
    assert ConvShape(4, 8, 8, 16, 32, 3, 3, 2, 1).pixels_read == 4 * 8 * 8
    assert ConvShape(4, 8, 8, 16, 32, padding=1).pixels_read == 4 * 8 * 8


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"r": 3}, False),
        ({"s": 3}, False),
        ({"stride": 2}, False),
        ({"padding": 1}, False),
        ({"dilation": 2}, True),
    ],
)
def test_pointwise(change: dict[str, int], expected: bool) -> None:
    assert ConvShape(1, 8, 8, 16, 16, **change).pointwise is expected


def test_int32_limit_counts_elements_of_input_and_output() -> None:
    at_limit = ConvShape(1, 1, INT32_MAX, 1, 1)
    assert at_limit.fits_int32
    assert not ConvShape(1, 1, INT32_MAX + 1, 1, 1).fits_int32
    assert not ConvShape(1, 1, INT32_MAX // 2, 1, 3).fits_int32  # the output alone
    assert not ConvShape(1, 1, INT32_MAX // 2, 3, 1).fits_int32  # the input alone


def test_ceiling_division() -> None:
    for a, b in itertools.product(range(40), range(1, 9)):
        assert cdiv(a, b) == (a // b) + (a % b > 0)


def test_str() -> None:
    assert str(ConvShape(2, 8, 9, 16, 32, 3, 5, 2, 1)) == "3x5/2 2x8x9x16->32"
    assert str(ConvShape(2, 8, 9, 16, 32, 3, 3, 1, 2, 2)) == "3x3/1 d2 2x8x9x16->32"


FIRST, CONV = ConvShape(2, 8, 8, 64, 32), ConvShape(2, 8, 8, 32, 32, 3, 3, 1, 1)
EXPAND, PROJECT = ConvShape(2, 8, 8, 32, 128), ConvShape(2, 8, 8, 64, 128)


def test_a_chain_with_the_first_convolution_reads_its_input_once() -> None:
    apart, whole = ChainShape(CONV, EXPAND, PROJECT), ChainShape(CONV, EXPAND, PROJECT, first=FIRST)
    assert apart.source == (2, 8, 8, 32) and whole.source == whole.shortcut == (2, 8, 8, 64)
    assert whole.convs == (FIRST, CONV, PROJECT, EXPAND)
    assert whole.macs == apart.macs + FIRST.macs
    assert whole.weight_bytes(2) == apart.weight_bytes(2) + 2 * FIRST.weights
    assert whole.bytes_moved(2) == 2 * 2 * 8 * 8 * (64 + 128) + whole.weight_bytes(2)
    assert apart.bytes_moved(2) == 2 * 2 * 8 * 8 * (32 + 64 + 128) + apart.weight_bytes(2)
    assert str(whole) == f"64-> {apart}"


def test_a_strided_block_reads_all_of_its_input_for_the_first_convolution() -> None:
    conv, expand = ConvShape(2, 8, 8, 32, 32, 3, 3, 2, 1), ConvShape(2, 4, 4, 32, 128)
    shape = ChainShape(conv, expand, ConvShape(2, 8, 8, 64, 128, stride=2), first=FIRST)
    assert shape.bytes_moved(2) == 2 * 2 * (8 * 8 * 64 + 4 * 4 * 128) + shape.weight_bytes(2)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        pytest.param((None, EXPAND, None), "conv must read what first computes, got .* and None", id="no 3x3"),
        pytest.param((ConvShape(2, 8, 8, 16, 32, 3, 3, 1, 1), EXPAND, PROJECT), "conv must read", id="channels"),
        pytest.param((CONV, EXPAND, None), r"first must read the shortcut \(2, 8, 8, 128\)", id="identity of 128"),
        pytest.param((CONV, EXPAND, ConvShape(2, 8, 8, 16, 128)), "first must read the shortcut", id="projection"),
    ],
)
def test_a_first_convolution_that_does_not_fit_is_refused(parts: tuple, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ChainShape(*parts, first=FIRST)
    with pytest.raises(ValueError, match="first must be a 1x1 convolution of stride 1"):
        ChainShape(*parts, first=ConvShape(2, 8, 8, 64, 32, 3, 3, 1, 1))

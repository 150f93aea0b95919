"""``kernels.config``: validation, JSON round trip, and the heuristic over every convolution of ResNet-18 to 152."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from resnet_triton.kernels.config import (
    KERNELS,
    ConvConfig,
    Epilogue,
    alternatives,
    heuristic,
    least_waste_box,
    next_power_of_two,
    runs_on,
    tma_describable,
)
from resnet_triton.kernels.geometry import ConvShape, cdiv
from resnet_triton.shapes import BLOCKS, resnet_convs

SHAPES = sorted(
    {site.shape for depth, n in itertools.product(BLOCKS, (1, 2, 32, 256)) for site in resnet_convs(depth, n)}, key=str
)
ODD = [
    ConvShape(2, 9, 11, 3, 64, 7, 7, 2, 3),
    ConvShape(1, 5, 5, 1, 1),
    ConvShape(3, 7, 7, 16, 24, 3, 3, 2, 1),
    ConvShape(3, 8, 8, 20, 24, 3, 3, 1, 1),
    ConvShape(3, 8, 8, 24, 24, 3, 3, 2, 1),
    ConvShape(3, 8, 8, 48, 24, 3, 3, 2, 1),
    ConvShape(3, 9, 9, 16, 24, 3, 3, 3, 0),
    ConvShape(300, 1, 1, 2048, 1000),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "winograd"}, r"kernel='winograd' is unknown; allowed: conv_tma, conv1x1, conv_pointer"),
        ({"box": (8, 8)}, r"box=\(8, 8\) must be \(images, rows, columns\)"),
        ({"box": (3, 8, 8)}, r"box must be a power of two \(box: its product\), got 192"),
        ({"box": (-2, -8, 8)}, r"box=\(-2, -8, 8\) must be .* positive ints"),
        ({"box": (2, 8, 8.0)}, r"box=\(2, 8, 8.0\) must be .* positive ints"),
        ({"box": (0, 8, 8)}, r"positive ints"),
        ({"bn": 48}, r"bn must be a power of two .* got 48"),
        ({"bk": 0}, r"bk must be a power of two .* got 0"),
        ({"warps": 3}, r"warps must be a power of two .* got 3"),
        ({"bn": "64"}, r"bn must be a power of two .* got '64'"),
        ({"box": (1, 1, 8)}, r"box, bn and bk must be at least 16 for the tensor cores"),
        ({"bk": 8}, r"at least 16 for the tensor cores"),
        ({"stages": 0}, r"stages must be a positive int, got 0"),
        ({"stages": 2.5}, r"stages must be a positive int, got 2.5"),
        ({"kernel": "conv1x1", "persistent": -1}, r"persistent must be programs per multiprocessor or 0, got -1"),
        ({"persistent": 1}, r"persistent=1 is for conv1x1, conv_stats, conv_stats_rolling, got kernel='conv_tma'"),
        ({"split": 0}, r"split must be an int from 1 to 16, got 0"),
        ({"split": 17}, r"split must be an int from 1 to 16, got 17"),
        ({"split": True}, r"split must be an int from 1 to 16, got True"),
        ({"split": 2, "kernel": "conv_pointer"}, r"split=2 is for conv_tma, conv1x1 .*got kernel='conv_pointer'"),
        ({"split": 2, "kernel": "conv1x1", "persistent": 1}, r"split=2 is for .* not persistent .*persistent=1"),
        ({"pdl": 1}, r"pdl must be True or False, got 1"),
        ({"pdl": True, "kernel": "conv_chain"}, r"pdl is for conv_tma, conv1x1, conv_pointer, got kernel='conv_chain'"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    good = {"kernel": "conv_tma", "box": (2, 8, 8), "bn": 64, "bk": 64}
    assert ConvConfig(**good).bm == 128
    with pytest.raises(ValueError, match=message):
        ConvConfig(**{**good, **change})


def test_json_round_trip() -> None:
    config = ConvConfig("conv1x1", (1, 1, 128), 64, 32, warps=8, stages=4, persistent=2)
    assert ConvConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config = ConvConfig("conv1x1", (1, 1, 128), 64, 32, split=4, pdl=True)
    assert ConvConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        None,
        {"kernel": "conv_tma", "box": [2, 8, 8], "bn": 64},
        {"kernel": "conv1x1", "box": [1, 1, 64], "bn": 64, "bk": 64, "cluster": 2},
    ],
)
def test_a_dict_with_missing_or_unknown_fields_is_refused(data: Any) -> None:
    with pytest.raises(ValueError, match=r"a configuration needs kernel, box, bn, bk \(optional: .*split, pdl\), got"):
        ConvConfig.from_dict(data)


def test_str() -> None:
    assert str(ConvConfig("conv_tma", (2, 8, 8), 64, 32)) == "2x8x8 n64 k32 w4 s3"
    assert str(ConvConfig("conv1x1", (1, 1, 128), 64, 32, 8, 4)) == "128 n64 k32 w8 s4"
    assert str(ConvConfig("conv1x1", (1, 1, 128), 64, 32, persistent=2)) == "128 n64 k32 w4 s3 p2"
    assert str(ConvConfig("conv1x1", (1, 1, 64), 64, 64, split=4)) == "64 n64 k64 w4 s3 /4"
    assert str(ConvConfig("conv_tma", (1, 8, 8), 64, 64, split=16, pdl=True)) == "1x8x8 n64 k64 w4 s3 /16 pdl"
    assert str(Epilogue(bn=True, bias=True, residual=True, relu=True)) == "bias+bn+add+relu"
    assert str(Epilogue()) == "-"


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_heuristic_fits_every_shape(itemsize: int, tma: bool) -> None:
    for shape, config in ((s, c) for s in SHAPES + ODD for c in alternatives(s, itemsize, tma)):
        assert runs_on(config, shape, itemsize), (shape, config)
        assert tma or config.kernel == "conv_pointer"
        if config.kernel != "conv_pointer":
            assert (config.kernel == "conv1x1") == shape.pointwise, shape
            assert config.kernel == "conv_rolling" or config.bk * itemsize <= 128, "a box's row fits the swizzle"
            assert config.bn < 2 * shape.k or config.bn == 16
        # operands of all stages and the output tile of sm_90's 227 KiB (sm_80: 163 KiB)
        shared = config.stages * (config.bm + config.bn) * config.bk * itemsize
        assert shared <= (227 if tma else 163) * 1024, (shape, config, shared)


def test_the_heuristic_uses_tensor_maps_wherever_they_can_describe_the_shape() -> None:
    assert {heuristic(s, 2, True).kernel for s in SHAPES if s.pointwise} == {"conv1x1"}
    strided_odd = {s for s in SHAPES if s.stride == 2 and s.h % 2}
    assert not strided_odd
    assert {heuristic(s, 2, True).kernel for s in SHAPES if not s.pointwise} == {"conv_tma"}


def test_the_heuristic_is_the_first_alternative() -> None:
    for shape in SHAPES + ODD:
        configs = alternatives(shape, 2, True)
        assert heuristic(shape, 2, True) == configs[0]
        assert len(set(configs)) == len(configs)


def test_the_heuristic_shrinks_tiles_for_small_batches() -> None:
    one, many = (heuristic(ConvShape(n, 14, 14, 256, 256, 3, 3, 1, 1), 2, True) for n in (1, 256))
    assert one.bm == 64
    assert many.bm == 128


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        (ConvShape(1, 8, 8, 8, 8), 2, True),
        (ConvShape(1, 8, 8, 4, 8), 2, False),
        (ConvShape(1, 8, 8, 8, 4), 2, False),
        (ConvShape(1, 8, 8, 4, 4), 4, True),
        (ConvShape(1, 8, 8, 16, 8, 3, 3, 2, 1), 2, True),
        (ConvShape(1, 7, 8, 16, 8, 3, 3, 2, 1), 2, False),
        (ConvShape(1, 8, 7, 16, 8, 3, 3, 2, 1), 2, False),
        (ConvShape(1, 8, 8, 8, 8, 3, 3, 2, 1), 2, False),
        (ConvShape(1, 9, 9, 16, 8, 3, 3, 3, 1), 2, False),
        (ConvShape(1, 7, 7, 16, 8, 3, 3, 1, 1), 2, True),
    ],
    ids=str,
)
def test_what_tensor_maps_can_describe(shape: ConvShape, itemsize: int, expected: bool) -> None:
    assert tma_describable(shape, itemsize) is expected


@pytest.mark.parametrize(
    ("config", "shape", "expected"),
    [
        (ConvConfig("conv1x1", (1, 1, 64), 64, 64), ConvShape(1, 8, 8, 16, 16), True),
        (ConvConfig("conv1x1", (1, 1, 64), 64, 64), ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1), False),
        (ConvConfig("conv1x1", (1, 1, 64), 64, 64), ConvShape(1, 8, 8, 16, 16, stride=2), False),
        (ConvConfig("conv1x1", (1, 1, 512), 64, 64), ConvShape(1, 8, 8, 16, 16), False),
        (ConvConfig("conv1x1", (1, 1, 64), 512, 64), ConvShape(1, 8, 8, 16, 16), False),
        (ConvConfig("conv_tma", (512, 1, 1), 64, 64), ConvShape(1, 8, 8, 16, 16), False),
        (ConvConfig("conv_tma", (2, 8, 8), 64, 64), ConvShape(1, 8, 8, 16, 16), True),
        (ConvConfig("conv_tma", (2, 8, 8), 64, 64), ConvShape(1, 8, 8, 16, 16, 3, 3, 2, 1), False),
        (ConvConfig("conv_tma", (2, 8, 8), 64, 16), ConvShape(1, 8, 8, 16, 16, 3, 3, 2, 1), True),
        (ConvConfig("conv_tma", (2, 8, 8), 64, 16), ConvShape(1, 7, 7, 16, 16, 3, 3, 2, 1), False),
        (ConvConfig("conv_tma", (1, 8, 8), 64, 64, split=9), ConvShape(1, 8, 8, 64, 16, 3, 3, 1, 1), True),
        (ConvConfig("conv_tma", (1, 8, 8), 64, 64, split=10), ConvShape(1, 8, 8, 64, 16, 3, 3, 1, 1), False),
        (ConvConfig("conv1x1", (1, 1, 64), 64, 64, split=2), ConvShape(1, 8, 8, 72, 16), True),
        (ConvConfig("conv1x1", (1, 1, 64), 64, 64, split=2), ConvShape(1, 8, 8, 64, 16), False),
        (ConvConfig("conv_pointer", (1, 1, 512), 512, 16), ConvShape(1, 7, 7, 3, 1, 3, 3, 3, 1), True),
    ],
    ids=str,
)
def test_what_a_configuration_runs_on(config: ConvConfig, shape: ConvShape, expected: bool) -> None:
    assert runs_on(config, shape, 2) is expected


@pytest.mark.parametrize("bm", [16, 64, 128, 256])
def test_the_box_wastes_least(bm: int) -> None:
    sides = [1 << i for i in range(bm.bit_length())]
    for n, p, q in itertools.product((1, 3, 32), (1, 7, 14, 56), (7, 14, 28)):
        shape = ConvShape(n, p, q, 16, 16)
        box = least_waste_box(shape, bm)

        def tiles(box: tuple[int, int, int], sizes=(n, p, q)) -> int:
            a, b, c = (cdiv(size, side) for size, side in zip(sizes, box, strict=True))
            return a * b * c

        assert box[0] * box[1] * box[2] == bm
        best = min(tiles(b) for b in itertools.product(sides, repeat=3) if b[0] * b[1] * b[2] == bm)
        assert tiles(box) == best, (shape, box)


def test_known_boxes() -> None:
    """Without waste at batch 256, as the design lists them."""
    assert least_waste_box(ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), 128) == (2, 8, 8)
    assert least_waste_box(ConvShape(256, 28, 28, 64, 64, 3, 3, 1, 1), 128) == (8, 4, 4)
    assert least_waste_box(ConvShape(256, 14, 14, 64, 64, 3, 3, 1, 1), 128) == (32, 2, 2)
    assert least_waste_box(ConvShape(256, 7, 7, 64, 64, 3, 3, 1, 1), 128) == (128, 1, 1)


def test_next_power_of_two() -> None:
    assert [next_power_of_two(i) for i in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]


def test_every_kernel_is_reachable() -> None:
    assert {config.kernel for s in SHAPES + ODD for config in alternatives(s, 2, True)} == set(KERNELS)

"""Rolling convolutions on the host: where they are offered, how their strips are cut, priced, planned and tuned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_triton import cost, plan
from resnet_triton.devices import Target, target_of
from resnet_triton.kernels.config import ConvConfig, Epilogue, alternatives, count_tiles, rolling_config, runs_on
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.shapes import resnet_convs
from resnet_triton.tuner import candidates

H200, A100 = target_of("NVIDIA H200"), target_of("NVIDIA A100-SXM4-80GB")
BN_RELU, BN_ADD_RELU = Epilogue(bn=True, relu=True), Epilogue(bn=True, residual=True, relu=True)
#: Round numbers: 10 multiprocessors at 1 GHz, 1 TB/s, 2 TB/s, 100 TFLOP/s.
TOY = Target("toy", 90, 10, 1.0, 232448, 1.0, 2.0, (("float16", 100.0), ("tf32", 50.0), ("ieee", 10.0)))


def same(n: int, side: int, c: int, k: int | None = None) -> ConvShape:
    return ConvShape(n, side, side, c, k or c, 3, 3, 1, 1)


def offered(shape: ConvShape, itemsize: int = 2, tma: bool = True) -> bool:
    return any(config.kernel == "conv_rolling" for config in alternatives(shape, itemsize, tma))


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (same(256, 56, 64), ConvConfig("conv_rolling", (8, 49, 8), 64, 64, 4, 2)),
        (same(256, 28, 128), ConvConfig("conv_rolling", (16, 50, 4), 64, 128, 4, 2)),
        (same(256, 32, 16), ConvConfig("conv_rolling", (2, 4, 32), 16, 16, 4, 2)),
        (same(3, 5, 32, 40), ConvConfig("conv_rolling", (4, 1, 16), 64, 32, 4, 2)),
    ],
    ids=str,
)
def test_known_strips(shape: ConvShape, config: ConvConfig) -> None:
    assert rolling_config(shape) == config


@pytest.mark.parametrize("multiprocessors", [20, 132])
def test_strips_are_one_wave_and_leave_out_nothing(multiprocessors: int) -> None:
    for n in (1, 7, 32, 256):
        for shape in (same(n, 56, 64), same(n, 28, 128), same(n, 13, 32, 200)):
            config = rolling_config(shape, multiprocessors)
            tn, rows, tw = config.box
            resident = 128 // shape.c
            blocks = -(-shape.k // config.bn)
            assert count_tiles(config, shape) <= multiprocessors * resident
            assert count_tiles(config, shape) // blocks * rows >= -(-n // tn) * -(-shape.q // tw) * (shape.p + 1)


def test_where_they_are_offered() -> None:
    assert offered(same(256, 56, 64)) and offered(same(32, 28, 128)) and offered(same(256, 14, 64, 24))
    assert not offered(same(1, 56, 64)), "strips of a row or two multiply mostly what is not stored"
    assert not offered(same(256, 56, 64), itemsize=4) and not offered(same(256, 56, 64), tma=False)
    assert not offered(same(256, 14, 256)) and not offered(same(256, 14, 48))
    for change in ({"stride": 2}, {"padding": 0}, {"dilation": 2}, {"r": 1, "s": 1, "padding": 0}):
        assert not offered(replace(same(256, 56, 64), **change)), change


def test_what_a_configuration_runs_on() -> None:
    config = rolling_config(same(256, 56, 64))
    assert runs_on(replace(config, box=(8, 1000, 8)), same(256, 56, 64), 2), "rows are no side of a tensor map's box"
    assert not runs_on(replace(config, box=(512, 4, 1)), same(256, 56, 64), 2)
    assert not runs_on(config, same(256, 56, 32), 2)
    assert not runs_on(config, same(256, 56, 64, 60), 2)


def test_the_limits_of_a_known_kernel() -> None:
    """3 images of 15 x 16 pixels in 2 x 2 columns of 16 rows, 6 rows a program: 11 strips, two waves of ten."""
    shape, epilogue = ConvShape(3, 15, 16, 64, 64, 3, 3, 1, 1), Epilogue(residual=True)
    p = cost.predict(shape, epilogue, ConvConfig("conv_rolling", (2, 6, 8), 64, 64, 4, 2), torch.half, "tf32", TOY)
    pixels, steps, box, weights = 3 * 15 * 16, 8, 16 * 64, 9 * 64 * 64
    assert p.hbm == pytest.approx(2 * (3 * pixels * 64 + weights) / 1e6)
    assert p.l2 == pytest.approx(11 * steps * (3 + 1) * box * 2 / 2e6)
    assert p.shared == pytest.approx(20 * steps * (6 * box + weights) * 2 / 128 / 10_000)
    assert p.tensor == pytest.approx(20 * steps * 2 * 16 * weights / 100e6)
    assert p.extra == pytest.approx(cost.LAUNCH_US + 20 * weights * 2 / 2e6)
    values, products = 16 * 64 / 128, 9 * 4 * 16 / 64
    step = cost.ROLLING_INSTRUCTIONS + cost.ROLLING_PER_PRODUCT * products
    step += (cost.ROLLING_PER_VALUE + cost.ROLLING_RESIDUAL_PER_VALUE) * values
    assert p.issue == pytest.approx(20 * (cost.ROLLING_START + steps * step) / 10_000)
    assert p.us == max(p.limits.values()) + p.extra


@pytest.mark.parametrize(
    ("tile", "itemsize", "residual", "needed"),
    [
        (((8, 49, 8), 64, 64, 4, 1), 2, False, 81928),
        (((8, 49, 8), 64, 64, 4, 2), 2, False, 106536),
        (((8, 49, 8), 64, 64, 4, 2), 2, True, 114728),
        (((8, 49, 8), 64, 64, 4, 3), 2, True, 139312),
        (((16, 49, 8), 64, 64, 8, 2), 2, True, 155688),
        (((16, 50, 4), 64, 128, 4, 1), 2, False, 163848),
        (((16, 50, 4), 64, 128, 4, 2), 2, True, 213032),
        (((2, 49, 32), 16, 16, 4, 2), 2, True, 14888),
        (((8, 49, 8), 32, 64, 4, 2), 4, True, 139304),
    ],
)
def test_shared_memory_is_that_of_the_machine_code(tile: tuple, itemsize: int, residual: bool, needed: int) -> None:
    """``needed`` is what the compiler allotted on sm_90 (triton 3.6)."""
    estimate = cost.shared_bytes(ConvConfig("conv_rolling", *tile), itemsize, residual)
    assert needed <= estimate <= needed + cost.BARRIERS


def test_large_batches_roll() -> None:
    """By their predicted times, and not where machine code without spills is not known."""
    for depth, batch in ((18, 256), (50, 256), (50, 64)):
        for _, shape, epilogue in resnet_convs(depth, batch):
            config = plan.own_config(shape, epilogue, torch.bfloat16, "tf32", H200)
            rolls = (shape.r, shape.stride) == (3, 1) and shape.c <= 128
            assert (config.kernel == "conv_rolling") == rolls, shape
            assert cost.fits(config, shape, 2, epilogue.residual, H200)
    for target in (A100, replace(H200, name="sm_100", sm=100)):
        configs = plan.own_configs(same(256, 56, 64), torch.bfloat16, "tf32", target)
        assert "conv_rolling" not in {config.kernel for config in configs}
    one = plan.own_config(same(1, 56, 64), BN_RELU, torch.bfloat16, "tf32", H200)
    assert one.kernel != "conv_rolling"


@pytest.mark.parametrize("epilogue", [BN_RELU, BN_ADD_RELU], ids=str)
@pytest.mark.parametrize("shape", [same(256, 56, 64), same(256, 28, 128)], ids=str)
def test_the_tuner_tries_other_strips(shape: ConvShape, epilogue: Epilogue) -> None:
    found = candidates(shape, torch.bfloat16, H200, epilogue=epilogue)
    kernels = [config.kernel for config in found]
    assert kernels.count("conv_rolling") >= 2 and kernels.count("conv_tma") >= 2
    assert all(cost.fits(config, shape, 2, epilogue.residual, H200) for config in found)
    assert len({config.box[1] for config in found if config.kernel == "conv_rolling"}) >= 2

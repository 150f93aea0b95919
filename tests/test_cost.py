"""``cost``: every limit against a number worked out by hand, and how predictions move with the shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_triton import cost
from resnet_triton.devices import Target, known_devices, target_of
from resnet_triton.kernels.config import ConvConfig, Epilogue, heuristic
from resnet_triton.kernels.geometry import ChainShape, ConvShape

#: Round numbers: 10 multiprocessors at 1 GHz, 1 TB/s, 2 TB/s, 100 TFLOP/s.
TOY = Target("toy", 90, 10, 1.0, 232448, 1.0, 2.0, (("float16", 100.0), ("tf32", 50.0), ("ieee", 10.0)))
SHAPE = ConvShape(1, 32, 32, 64, 64, 3, 3, 1, 1)
CONFIG = ConvConfig("conv_tma", (1, 8, 16), 64, 32)
PLAIN, FULL = Epilogue(), Epilogue(bn=True, residual=True, relu=True)


def predict(shape=SHAPE, epilogue=PLAIN, config=CONFIG, dtype=torch.half, precision="tf32", target=TOY):
    return cost.predict(shape, epilogue, config, dtype, precision, target)


def test_the_five_limits_of_a_known_kernel() -> None:
    """8 tiles of 128x64, one wave of 10; 18 steps of 32 channels."""
    p = predict()
    x, w, y = 32 * 32 * 64, 64 * 9 * 64, 32 * 32 * 64
    assert p.hbm == pytest.approx(2 * (x + w + y) / 1e12 * 1e6)
    assert p.l2 == pytest.approx(8 * 576 * (128 + 64) * 2 / 2e12 * 1e6)
    assert p.tensor == pytest.approx(10 * 2 * 128 * 64 * 576 / 100e12 * 1e6)
    assert p.shared == pytest.approx(10 * 576 * 2 * (2 * 128 + 64 + 2 * 64) / 128 / (10 * 1000))
    instructions = 18 * cost.LOOP_INSTRUCTIONS + cost.EPILOGUE_INSTRUCTIONS + 64 * cost.EPILOGUE_PER_VALUE
    assert p.issue == pytest.approx(10 * instructions * 4 / 4 / (10 * 1000))
    assert p.us == max(p.hbm, p.l2, p.shared, p.tensor, p.issue) + cost.LAUNCH_US
    assert getattr(p, p.limit) + cost.LAUNCH_US == p.us


def test_the_limit_is_named() -> None:
    assert cost.Prediction(hbm=3, l2=1).limit == "hbm"
    assert cost.Prediction(hbm=1, l2=0, shared=0, tensor=0, issue=5).limit == "issue"
    assert cost.Prediction(hbm=1, tensor=2).us == 2 + cost.LAUNCH_US


def test_a_partial_wave_costs_a_whole_one() -> None:
    full = predict(replace(SHAPE, n=5))  # 40 tiles are 4 waves
    assert predict(replace(SHAPE, n=4)).tensor == full.tensor
    assert predict(replace(SHAPE, n=6)).tensor > full.tensor


def test_a_residual_costs_bytes_and_instructions() -> None:
    with_residual, without = predict(epilogue=FULL), predict(epilogue=Epilogue(bn=True, relu=True))
    y = 32 * 32 * 64 * 2
    assert with_residual.hbm - without.hbm == pytest.approx(y / 1e6)
    assert with_residual.l2 > without.l2 and with_residual.issue > without.issue
    assert with_residual.tensor == without.tensor


def test_overhanging_boxes_are_paid_for() -> None:
    """7x7 images under 8x8 boxes: the tiles of an 8x8 image, the bytes of a 7x7 one."""
    config = ConvConfig("conv_tma", (2, 8, 8), 64, 32)
    seven, eight = (predict(ConvShape(8, n, n, 64, 64, 3, 3, 1, 1), config=config) for n in (7, 8))
    assert seven.tensor == eight.tensor and seven.hbm < eight.hbm


def test_gathering_pointers_issues_more() -> None:
    pointer = ConvConfig("conv_pointer", (1, 1, 128), 64, 32)
    assert predict(config=pointer).issue > predict().issue
    assert predict(config=pointer).tensor == predict().tensor


def test_precision_of_fp32() -> None:
    tf32, exact = (predict(dtype=torch.float32, precision=p) for p in ("tf32", "ieee"))
    assert exact.tensor == pytest.approx(5 * tf32.tensor)
    assert exact.hbm == tf32.hbm == 2 * predict().hbm


@pytest.mark.parametrize("name", known_devices())
def test_predictions_respect_the_roofline_and_grow_with_the_batch(name: str) -> None:
    target = target_of(name)
    for shape in (SHAPE, ConvShape(1, 56, 56, 64, 256), ConvShape(1, 14, 14, 256, 256, 3, 3, 1, 1)):
        before = 0.0
        for n in (1, 8, 64, 512):
            batch = replace(shape, n=n)
            config = heuristic(batch, 2, target.tma)
            p = cost.predict(batch, FULL, config, torch.bfloat16, "tf32", target)
            roof = max(
                batch.bytes_moved(2, True) / target.hbm_tb_s / 1e6,
                2 * batch.macs / target.tflops(torch.bfloat16, "tf32") / 1e6,
            )
            assert p.us >= roof + cost.LAUNCH_US * 0.999
            assert p.us >= before
            before = p.us
        # 512 images are 64 times 8 images, but for launch and partial waves
        assert p.us > 30 * (roof / 512) * 8


def test_a_shared_reduction() -> None:
    """8 tiles by 2 programs are two waves of 10, each of 9 steps; 8 bytes of each partial sum are moved."""
    shared, alone = (predict(epilogue=FULL, config=replace(CONFIG, split=n)) for n in (2, 1))
    x, w, y = 32 * 32 * 64, 64 * 9 * 64, 32 * 32 * 64
    parts = 4 * 2 * y
    assert cost.workspace_bytes(replace(CONFIG, split=2), SHAPE) == 2 * parts
    assert cost.workspace_bytes(CONFIG, SHAPE) == 0
    assert shared.hbm == pytest.approx((2 * (x + w) + parts) / 1e6)
    assert shared.l2 == pytest.approx((16 * 288 * (128 + 64) * 2 + parts) / 2e6)
    assert shared.tensor == alone.tensor
    assert shared.extra == pytest.approx(2 * cost.LAUNCH_US + (parts + 2 * 2 * y) / 1e6)
    assert shared.us == pytest.approx(max(shared.limits.values()) + shared.extra)
    assert "extra" not in shared.limits and shared.limit in shared.limits


def test_a_share_of_a_remainder_is_paid_for() -> None:
    """18 steps by 4 programs: the longest share has 5."""
    four, exact = (predict(replace(SHAPE, c=c), config=replace(CONFIG, split=4)) for c in (64, 71))
    wave = 4 * 10 * 2 * 128 * 64 / 100e6
    assert four.tensor == pytest.approx(wave * 5 * 32) and exact.tensor == pytest.approx(wave * 7 * 32)


def test_a_dependent_launch() -> None:
    dependent, ordinary = (predict(config=replace(CONFIG, pdl=pdl)) for pdl in (True, False))
    assert ordinary.us - dependent.us == pytest.approx(cost.DEPENDENT_LAUNCH_SAVES_US)
    assert dependent.limits == ordinary.limits and 0 < cost.DEPENDENT_LAUNCH_SAVES_US < cost.LAUNCH_US
    twice = predict(config=replace(CONFIG, pdl=True, split=2))
    assert predict(config=replace(CONFIG, split=2)).us - twice.us == pytest.approx(2 * cost.DEPENDENT_LAUNCH_SAVES_US)


def test_a_shared_tile_is_staged_in_fp32() -> None:
    config = ConvConfig("conv_tma", (1, 8, 16), 128, 16, stages=1)
    assert cost.shared_bytes(config, 2) == 128 * 128 * 2 + cost.BARRIERS
    assert cost.shared_bytes(replace(config, split=2), 2, residual=True) == 128 * 128 * 4 + cost.BARRIERS


def test_the_librarys_separate_passes() -> None:
    """BN reads and writes the output, addition reads two and writes one, ReLU reads and writes."""
    y = 32 * 32 * 64 * 2
    plain = cost.unfused_bytes(SHAPE, PLAIN, 2)
    assert plain == SHAPE.bytes_moved(2)
    assert cost.unfused_bytes(SHAPE, FULL, 2) == plain + 7 * y
    alone, together = (cost.predict_unfused(SHAPE, e, torch.half, "tf32", TOY) for e in (PLAIN, FULL))
    assert together.hbm - alone.hbm == pytest.approx(7 * y / 1e6 + 3 * cost.LAUNCH_US)
    assert alone.tensor == pytest.approx(2 * SHAPE.macs / 100e12 * 1e6 / 0.85)


def test_steps_that_only_move_bytes() -> None:
    assert cost.memory_us(4_000_000, TOY) == pytest.approx(4 + cost.LAUNCH_US)
    assert cost.memory_us(4_000_000, TOY, 3) == pytest.approx(4 + 3 * cost.LAUNCH_US)
    assert cost.memory_us(1, target_of("cpu")) is None


def test_bytes_of_stem_and_head() -> None:
    shape = ConvShape(2, 224, 224, 3, 64, 7, 7, 2, 3)
    cells = 2 * 115 * 116 * 16
    assert cost.stem_bytes(shape, 2) == 2 * (2 * 224 * 224 * 3 + 2 * cells + 2 * 112 * 112 * 64)
    assert cost.stem_bytes(shape, 2, pool=True) == 2 * (2 * 224 * 224 * 3 + 2 * cells + 2 * 56 * 56 * 64)
    odd = ConvShape(1, 225, 227, 3, 64, 7, 7, 2, 3)  # 113 x 114 outputs, an even number of columns of cells
    assert (cost.cells_size(odd), cost.pooled_size(odd)) == (116 * 118 * 16, 57 * 57 * 64)
    assert cost.head_bytes(4, 2048, 1000, 49, 2) == 2 * (4 * 2048 * 51 + 2048 * 1000 + 4 * 1000)


def test_the_stem_with_its_pool_computes_each_strips_halo_again() -> None:
    shape, config = ConvShape(4, 224, 224, 3, 64, 7, 7, 2, 3), ConvConfig("stem_pool", (1, 56, 64), 64, 64)
    predicted = cost.predict_stem_pool(shape, config, torch.half, TOY)
    # 2 x 2 strips an image, of 64 columns and four rows more than they store, by a window of 4 x 64 channels
    rows = 20 * (56 + 4)  # two waves of ten multiprocessors
    assert predicted.tensor == pytest.approx(2 * rows * 64 * 64 * 256 / 100e12 * 1e6)
    cells, pooled = 2 * cost.cells_size(shape), 2 * cost.pooled_size(shape)
    assert predicted.hbm == pytest.approx((cells + pooled) / 1e6)
    image = 2 * 4 * 224 * 224 * 3
    assert predicted.extra == pytest.approx((image + cells) / 1e6 + 3 * cost.LAUNCH_US)


def test_a_chain_on_rolling_rows_waits_for_its_boxes() -> None:
    """One row of tiles is one program; two programs hide what they wait for behind each other, one alone does not."""
    conv, expand = ConvShape(80, 7, 8, 64, 64, 3, 3, 1, 1), ConvShape(80, 7, 8, 64, 256)
    shape = ChainShape(conv, expand, reduce=ConvShape(80, 7, 8, 256, 64))
    two = ConvConfig("chain_rolling", (8, 8, 8), 32, 64, 4, 3)
    one = replace(two, box=(16, 8, 8), bn=64, warps=8)
    small, large = (cost.predict_chain(shape, config, torch.half, "tf32", TOY) for config in (two, one))
    # 10 and 5 programs of 8 rows of tiles, which compute two rows more of the 3x3: one wave each
    macs = 64 * (10 * 9 * 64 * 64 + 8 * 2 * 64 * 256)
    assert small.tensor == pytest.approx(10 * 2 * macs / 100e12 * 1e6)
    assert large.tensor == pytest.approx(2 * small.tensor)
    waiting = 10 * 4 * cost.LOAD_US
    assert large.us == pytest.approx(cost.LAUNCH_US + max(large.tensor, large.issue) + waiting)
    assert small.us == pytest.approx(cost.LAUNCH_US + max(small.tensor, small.issue) + waiting)
    # with two such programs on a multiprocessor, it is busy for twice as long while each waits as long as before
    both = cost.predict_chain(
        replace(shape, **{k: replace(v, n=160) for k, v in vars(shape).items() if isinstance(v, ConvShape)}),
        two, torch.half, "tf32", TOY,
    )  # fmt: skip
    assert both.us < 2 * small.us - waiting / 2

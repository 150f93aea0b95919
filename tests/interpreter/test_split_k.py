"""Split-K in the interpreter: shares of the reduction with and without a remainder, every epilogue, the workspace."""

from __future__ import annotations

import pytest
import torch

from resnet_triton.kernels import conv1x1, conv_fwd, split_k
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.conv1x1 import launch_conv1x1
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.split_k import launch_split_k_epilogue
from tests.cases import EPILOGUES, FULL, PLAIN, Guarded, conv_inputs
from tests.comparers import identical
from tests.interpreter.launching import check_close, check_exact, run

#: 9 steps of 16 channels and 18; 7 steps of a pointwise convolution. Every size overhangs its tile.
THREE, STRIDED = ConvShape(3, 5, 7, 16, 24, 3, 3, 1, 1), ConvShape(3, 6, 8, 32, 24, 3, 3, 2, 1)
ONE, WIDE = ConvShape(3, 5, 7, 112, 40), ConvShape(1, 5, 7, 264, 24)
LAUNCHED = {"conv_tma": conv_fwd, "conv1x1": conv1x1}


@pytest.fixture(autouse=True)
def fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second kernel of large tiles: in the interpreter each program costs alike."""
    monkeypatch.setattr(split_k, "ROWS", 64)


def config(shape: ConvShape, split: int, bn: int = 16, bk: int = 16) -> ConvConfig:
    kernel, box = ("conv1x1", (1, 1, 64)) if shape.pointwise else ("conv_tma", (2, 4, 8))
    return ConvConfig(kernel, box, bn, bk, split=split)


@pytest.mark.parametrize(
    ("shape", "split"),
    [(THREE, 2), (THREE, 3), (THREE, 4), (STRIDED, 16), (ONE, 2), (ONE, 3), (ONE, 4), (WIDE, 16)],
    ids=str,
)
def test_exact_shares(shape: ConvShape, split: int) -> None:
    """``WIDE`` has 17 steps, the last of which is half outside; most splits leave a remainder."""
    check_exact(conv_inputs(shape, FULL), config(shape, split, bn=32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [STRIDED, ONE], ids=str)
def test_exact_dtypes(shape: ConvShape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tiles that a GPU runs."""
    monkeypatch.undo()
    assert split_k.ROWS == 8
    check_exact(conv_inputs(shape, FULL, dtype), config(shape, 2, bn=64))


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("shape", [ConvShape(2, 4, 3, 16, 24, 3, 1, 1, 1), ConvShape(2, 4, 3, 48, 24)], ids=str)
def test_exact_epilogues(shape: ConvShape, epilogue: Epilogue) -> None:
    check_exact(conv_inputs(shape, epilogue), config(shape, 2, bn=32))


def test_exact_bn_without_gamma_and_beta() -> None:
    check_exact(conv_inputs(ONE, Epilogue(bn=True), affine=False), config(ONE, 4, bn=64))


def test_one_step_a_program() -> None:
    shape = ConvShape(1, 4, 4, 64, 16)
    check_exact(conv_inputs(shape), config(shape, 4))
    with pytest.raises(ValueError, match=r"split=8 shares a reduction of 4 steps; allowed: at most 4\. Use a smaller"):
        run(conv_inputs(shape), config(shape, 8))
    three = ConvShape(1, 4, 4, 16, 16, 3, 3, 1, 1)
    with pytest.raises(ValueError, match="split=10 shares a reduction of 9 steps"):
        run(conv_inputs(three), config(three, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_close(dtype: torch.dtype) -> None:
    check_close(conv_inputs(STRIDED, Epilogue(True, True, True, True), dtype), config(STRIDED, 4, bn=32))
    check_close(conv_inputs(ONE, PLAIN, dtype), config(ONE, 7, bn=64))


@pytest.mark.parametrize("shape", [STRIDED, ONE], ids=str)
def test_repeats_and_other_tiles_are_bitwise_equal(shape: ConvShape) -> None:
    inputs = conv_inputs(shape, FULL)
    inputs = inputs.replaced(x=torch.randn(inputs.x.shape).half(), w=torch.randn(inputs.w.shape).half())
    first = run(inputs, config(shape, 3, bn=64))
    identical(run(inputs, config(shape, 3, bn=64)), first)
    identical(run(inputs, config(shape, 3, bn=32)), first)


@pytest.mark.parametrize("shape", [THREE, ONE], ids=str)
def test_nan_and_inf_propagate_as_in_pytorch(shape: ConvShape) -> None:
    inputs = conv_inputs(shape, FULL)
    x, residual = inputs.x.clone(), inputs.residual.clone()
    x[0, 3, 4, 5] = float("nan")
    x[1, 0, 0, -1] = float("inf")
    residual[2, 4, 4, 2] = float("nan")
    residual[2, 4, 0, 3] = float("-inf")
    inputs = inputs.replaced(x=x, residual=residual)
    expected = inputs.expected()
    assert expected.isnan().any() and expected.isfinite().any() and expected.isinf().any()
    identical(run(inputs, config(shape, 2, bn=64)), expected)


@pytest.mark.parametrize("shape", [THREE, STRIDED, ONE], ids=str)
def test_the_workspace_is_written_whole_and_nothing_beside_it(
    shape: ConvShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts as NaN inside and has guard bands: a value that is not written, or read too far, shows."""
    guarded, made = Guarded(), []

    def new_parts(y: torch.Tensor, split: int, steps: int) -> torch.Tensor:
        made.append(guarded.output(split, *y.shape, dtype=torch.float32))
        return made[-1]

    tiling = config(shape, 3, bn=64)
    monkeypatch.setattr(LAUNCHED[tiling.kernel], "new_parts", new_parts)
    check_exact(conv_inputs(shape, FULL), tiling)
    guarded.verify()
    assert len(made) == 1 and made[0].isfinite().all()


def test_parts_are_added_in_order() -> None:
    """1e8 and -1e8 cancel before 1 is added, in this order and in no other."""
    parts = torch.tensor([1e8, -1e8, 1.0])[:, None, None].expand(3, 5, 8).contiguous()
    for order, total in (([0, 1, 2], 1.0), ([2, 0, 1], 0.0)):
        y = torch.empty(5, 8)
        launch_split_k_epilogue(parts[order], y, Operands(), pdl=False)
        identical(y, torch.full((5, 8), total))


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_k, "needs_int64", lambda *tensors: True)
    check_exact(conv_inputs(ONE, FULL), config(ONE, 2, bn=64))


def test_gaps_in_the_output_are_refused() -> None:
    inputs = conv_inputs(ConvShape(1, 4, 4, 64, 16))
    y = torch.empty(16, 32, dtype=torch.half)[:, :16]
    x, w = inputs.x.view(16, 64), inputs.w.view(16, 64)
    with pytest.raises(ValueError, match=r"y has strides \(32, 1\); a split reduction needs it dense\. Use split=1\."):
        launch_conv1x1(x, w, y, Operands(), config(inputs.shape, 2), "ieee")


@pytest.mark.parametrize("shape", [THREE, ONE, ConvShape(1, 5, 5, 3, 8, 3, 3, 2, 1)], ids=str)
def test_dependent_launch_is_left_out_in_the_interpreter(shape: ConvShape) -> None:
    tiling = config(shape, 2, bn=64) if shape.c > 3 else ConvConfig("conv_pointer", (1, 1, 16), 16, 16)
    check_exact(conv_inputs(shape, FULL), ConvConfig(**{**tiling.to_dict(), "pdl": True}))

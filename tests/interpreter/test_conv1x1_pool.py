"""``conv1x1_pool`` in the interpreter: images that fill a tile or not, channels that overhang, NaN in a neighbour."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import reference
from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.conv1x1_pool import launch_conv1x1_pool, pool_config
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ConvShape
from tests.cases import FULL, ConvInputs, Guarded, conv_inputs
from tests.comparers import identical, no_worse_than


def run(inputs: ConvInputs, config: ConvConfig) -> Tensor:
    """The averages ``[N, K]``."""
    s, guarded = inputs.shape, Guarded()
    pooled = guarded.output(s.n, s.k, dtype=inputs.x.dtype)
    vectors = (guarded.input(v) for v in inputs.vectors)
    operands = Operands(guarded.input(inputs.residual), *vectors, eps=inputs.eps, relu=True)
    launch.COUNTS.clear()
    w = guarded.input(inputs.w).view(s.k, s.c)
    launch_conv1x1_pool(guarded.input(inputs.x), w, pooled, operands, config, "ieee")
    assert launch.COUNTS == {"conv1x1_pool": 1}
    guarded.verify()
    return pooled


def averages(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Of ``[N,P,Q,K]``: exact sums, times the reciprocal in fp32, rounded once."""
    n, p, q, k = y.shape
    total = y.double().view(n, p * q, k).sum(1)
    return (total.float() * torch.tensor(1 / (p * q), dtype=torch.float32)).to(dtype)


def tile(bm: int, bn: int = 32) -> ConvConfig:
    return ConvConfig("conv1x1_pool", (1, 1, bm), bn, 16)


CASES = [
    pytest.param(ConvShape(5, 4, 4, 32, 64), tile(64), id="four images a tile, one left over"),
    pytest.param(ConvShape(3, 7, 7, 16, 40), tile(128), id="two of 7x7, channels overhang"),
    pytest.param(ConvShape(6, 7, 7, 24, 32), tile(256), id="five of 7x7"),
    pytest.param(ConvShape(2, 5, 9, 16, 16), tile(64, 16), id="one image a tile"),
    pytest.param(ConvShape(1, 8, 8, 16, 16), tile(64, 16), id="an image that fills the tile"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "config"), CASES)
def test_exact(shape: ConvShape, config: ConvConfig, dtype: torch.dtype) -> None:
    inputs = conv_inputs(shape, FULL, dtype)
    identical(run(inputs, config), averages(inputs.expected(), dtype))


@pytest.mark.parametrize("epilogue", [Epilogue(residual=True, relu=True), Epilogue(True, True, True, True)], ids=str)
def test_exact_epilogues(epilogue: Epilogue) -> None:
    inputs = conv_inputs(ConvShape(3, 4, 5, 16, 32), epilogue)
    identical(run(inputs, tile(64)), averages(inputs.expected(), torch.float16))


def test_nan_and_inf_stay_in_their_image() -> None:
    inputs = conv_inputs(ConvShape(4, 4, 4, 16, 16), FULL)
    residual = inputs.residual.clone()
    residual[1, 2, 3, 4], residual[2, 0, 0, 5] = float("nan"), float("inf")
    inputs = inputs.replaced(residual=residual)
    out = run(inputs, tile(64, 16))
    identical(out, averages(inputs.expected(), torch.float16))
    assert out[1, 4].isnan() and out[2, 5].isinf() and out.isfinite().sum() == out.numel() - 2


def test_close_and_repeatable() -> None:
    torch.manual_seed(0)
    shape = ConvShape(6, 7, 7, 64, 64)
    inputs = conv_inputs(shape, FULL)
    inputs = inputs.replaced(
        x=torch.randn(inputs.x.shape).half(),
        w=(torch.randn(inputs.w.shape) / 8).half(),
        residual=torch.randn(inputs.residual.shape).half(),
    )

    def compute(dtype: torch.dtype) -> Tensor:
        x, w, residual = (t.permute(0, 3, 1, 2).to(dtype) for t in (inputs.x, inputs.w, inputs.residual))
        vectors = (None if v is None else v.to(torch.promote_types(dtype, torch.float32)) for v in inputs.vectors)
        return reference.conv_bn_act(x, w, *vectors, residual, inputs.eps, True).mean((2, 3))

    out = run(inputs, tile(256))
    no_worse_than(out, compute(torch.float16), compute(torch.float64))
    identical(run(inputs, tile(256)), out)


def test_configurations() -> None:
    assert pool_config(256, 49, 512, 2048, 2) == ConvConfig("conv1x1_pool", (1, 1, 256), 128, 64, 8)
    assert pool_config(1, 49, 512, 2048, 2).bm == 64, "no wider than the batch"
    for refused in ((256, 400, 512, 2048, 2), (256, 9, 512, 2048, 2), (256, 49, 512, 2048, 4), (256, 49, 510, 2044, 2)):
        assert pool_config(*refused) is None, "more pixels than a tile, too few, fp32, rows of no 16 bytes"
    inputs = conv_inputs(ConvShape(1, 9, 9, 16, 16), FULL)
    with pytest.raises(ValueError, match="images of at most 64 pixels, got 81"):
        run(inputs, tile(64, 16))

"""``kernels/batch_norm.py`` in the interpreter: folding batch normalisation into a convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton.kernels.batch_norm import launch_fold_bn
from tests.cases import EPS, VARIANCES, Guarded, integers
from tests.comparers import identical, no_worse_than

DTYPES = [torch.float16, torch.float32, torch.bfloat16]


def fold(w: Tensor, bias, gamma, beta, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Runs the kernel, everything guarded; the weight's output has the layout of ``w``."""
    guarded = Guarded()
    nhwc = w.dim() == 4 and not w.is_contiguous()
    rows = w.permute(0, 2, 3, 1) if nhwc else w
    w_out = guarded.output(*rows.shape, dtype=w.dtype)
    b_out = guarded.output(w.shape[0], dtype=w.dtype)
    vectors = (guarded.input(v) for v in (bias, gamma, beta, mean, var))
    launch_fold_bn(guarded.input(rows), *vectors, eps, w_out, b_out)
    guarded.verify()
    return w_out.permute(0, 3, 1, 2) if nhwc else w_out, b_out


def reference(w: Tensor, bias, gamma, beta, mean: Tensor, var: Tensor, eps: float, dtype=torch.double):
    """The same in plain PyTorch, computed in ``dtype``."""
    one, zero = torch.ones_like(mean, dtype=dtype), torch.zeros_like(mean, dtype=dtype)
    bias, gamma, beta = (d if v is None else v.to(dtype) for v, d in ((bias, zero), (gamma, one), (beta, zero)))
    scale = gamma / (var.to(dtype) + eps).sqrt()
    return w.to(dtype) * scale.view(-1, *(1,) * (w.dim() - 1)), beta + (bias - mean.to(dtype)) * scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("present", ["", "bias", "gamma", "beta", "bias gamma beta"])
def test_fold_bn_is_exact(present: str, dtype: torch.dtype, counts) -> None:
    k = 6
    w, mean = integers(k, 5, 3, 3, dtype=dtype), integers(k)
    var = torch.tensor(VARIANCES)[torch.randint(0, 4, (k,))]
    optional = [integers(k) if name in present.split() else None for name in ("bias", "gamma", "beta")]
    outs = fold(w, *optional, mean, var, EPS)
    assert counts == {"fold_bn": 1}
    for out, expected in zip(outs, reference(w, *optional, mean, var, EPS), strict=True):
        identical(out, expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        pytest.param((3, 130, 3, 3), torch.contiguous_format, id="rows longer than a block"),
        pytest.param((3, 130, 3, 3), torch.channels_last, id="channels_last"),
        pytest.param((2, 3, 7, 7), torch.channels_last, id="stem"),
        pytest.param((4, 1, 1, 1), torch.contiguous_format, id="rows of one"),
        pytest.param((5, 24), torch.contiguous_format, id="matrix"),
    ],
)
def test_fold_bn_is_no_worse_than_eager(shape, memory_format, dtype) -> None:
    w = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    bias, gamma, beta, mean = torch.randn(4, shape[0])
    operands = (w, bias.to(dtype), gamma, beta, mean, torch.rand(shape[0]) + 0.1, 1e-3)
    for out, eager, exact in zip(
        fold(*operands), reference(*operands, torch.float32), reference(*operands), strict=True
    ):
        no_worse_than(out, eager.to(dtype), exact)


def test_fold_bn_of_zero_variance_and_nan() -> None:
    w = torch.randn(3, 4)
    gamma, beta, mean = torch.randn(3, 3)
    operands = (w, None, gamma, beta, mean, torch.tensor([0.0, float("nan"), 1.0]), 1e-5)
    for out, eager, exact in zip(
        fold(*operands), reference(*operands, torch.float32), reference(*operands), strict=True
    ):
        assert out[1].isnan().all()
        no_worse_than(out, eager, exact)


def test_fold_bn_in_place() -> None:
    w = integers(4, 6)
    gamma, beta, mean = integers(3, 4)
    operands = (w, None, gamma, beta, mean, torch.tensor(VARIANCES), EPS)
    w_expected, b_expected = reference(*operands)
    b_out = torch.empty(4)
    launch_fold_bn(*operands, w, b_out)
    identical(w, w_expected.float())
    identical(b_out, b_expected.float())


def test_folded_convolution_is_convolution_and_norm() -> None:
    x, w = integers(1, 3, 5, 5), integers(4, 3, 3, 3)
    gamma, beta, mean = integers(3, 4)
    var = torch.tensor(VARIANCES)
    w_out, b_out = fold(w, None, gamma, beta, mean, var, EPS)
    identical(F.conv2d(x, w_out, b_out), F.batch_norm(F.conv2d(x, w), mean, var, gamma, beta, eps=EPS))


def test_no_filters_launch_nothing(counts) -> None:
    empty = torch.empty(0)
    launch_fold_bn(torch.empty(0, 3, 3, 3), None, None, None, empty, empty, 1e-5, torch.empty(0, 3, 3, 3), empty)
    assert not counts

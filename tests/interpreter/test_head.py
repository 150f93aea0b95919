"""``kernels/head.py`` in the interpreter: global average pool and fully connected layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels.head import head_config, launch_head
from tests.cases import Guarded, integers
from tests.comparers import identical, no_worse_than


def head(x: Tensor, weight: Tensor, bias: Tensor | None, tma: bool = True) -> Tensor:
    """Runs the head with its own configuration, everything guarded."""
    (n, _, _, c), k = x.shape, weight.shape[0]
    guarded = Guarded()
    pooled, logits = guarded.output(n, c, dtype=x.dtype), guarded.output(n, k, dtype=x.dtype)
    config = head_config(n, c, k, x.element_size(), tma)
    inputs = (guarded.input(t) for t in (x, weight, bias))
    launch_head(*inputs, pooled, logits, config, "ieee")
    guarded.verify()
    return logits


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize(
    ("n", "c", "k", "dtype", "tma", "kernel"),
    [
        pytest.param(3, 24, 40, torch.float16, True, "conv1x1", id="neither C nor K fills a block"),
        pytest.param(17, 64, 24, torch.float32, True, "conv1x1", id="fp32"),
        pytest.param(3, 24, 40, torch.bfloat16, True, "conv1x1", id="bf16"),
        pytest.param(3, 24, 10, torch.float16, True, "conv_pointer", id="20-byte rows of logits"),
        pytest.param(2, 12, 16, torch.float16, True, "conv_pointer", id="24-byte rows of features"),
        pytest.param(3, 24, 40, torch.float16, False, "conv_pointer", id="no TMA"),
        pytest.param(1, 8, 1, torch.float32, True, "conv_pointer", id="one class"),
    ],
)
def test_head_is_exact(n, c, k, dtype, tma, kernel, biased, counts) -> None:
    # sixteen pixels of -2, 0 or 2 and ternary weights: features of up to 5 bits, logits of up to 8
    x = integers(n, 4, 4, c, dtype=dtype, low=-1, high=1) * 2
    x[:, 1:] = 0
    weight = integers(k, c, dtype=dtype, low=-1, high=1)
    bias = integers(k, dtype=dtype) if biased else None
    logits = head(x, weight, bias, tma)
    assert counts == {"global_avg_pool": 1, kernel: 1}
    expected = x.double().mean((1, 2)) @ weight.double().T + (bias.double() if biased else 0)
    identical(logits, expected.to(dtype))


@pytest.mark.parametrize(
    ("k", "dtype"), [(40, torch.float16), (10, torch.float16), (40, torch.bfloat16), (40, torch.float32)], ids=str
)
def test_head_is_no_worse_than_eager(k: int, dtype: torch.dtype) -> None:
    x, weight, bias = (
        torch.randn(3, 7, 7, 96).relu().to(dtype),
        (torch.randn(k, 96) / 10).to(dtype),
        torch.randn(k).to(dtype),
    )
    eager = torch.nn.functional.linear(x.mean((1, 2)), weight, bias)
    no_worse_than(head(x, weight, bias), eager, x.double().mean((1, 2)) @ weight.double().T + bias)


def test_nan_stays_in_its_image() -> None:
    x = integers(3, 2, 2, 16)
    x[1, 0, 1, 5] = float("nan")
    identical(head(x, torch.ones(8, 16), None), x.mean((1, 2)) @ torch.ones(16, 8))


def test_empty_batch_launches_nothing(counts) -> None:
    config = head_config(0, 16, 8, 4, tma=True)
    launch_head(
        torch.empty(0, 7, 7, 16), torch.ones(8, 16), None, torch.empty(0, 16), torch.empty(0, 8), config, "ieee"
    )
    assert not counts


def test_head_config() -> None:
    imagenet = head_config(256, 2048, 1000, 2, tma=True)
    assert (imagenet.kernel, imagenet.bm, imagenet.bn, imagenet.bk) == ("conv1x1", 64, 32, 64)
    assert head_config(1, 2048, 1000, 2, tma=True).bm == 16
    assert head_config(4096, 2048, 1000, 2, tma=True).bn == 128
    assert head_config(256, 2048, 10, 2, tma=True).kernel == "conv_pointer"
    assert head_config(256, 2048, 12, 4, tma=True).kernel == "conv1x1"
    assert head_config(256, 2048, 1000, 2, tma=False).kernel == "conv_pointer"

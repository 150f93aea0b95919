"""``backend``: the process-wide switch, and which precision fp32 convolutions take from PyTorch's settings."""

from __future__ import annotations

import pytest
import torch

import resnet_triton
from resnet_triton.backend import BACKENDS, current_backend, dot_precision, use_backend


def test_it_is_public() -> None:
    assert resnet_triton.use_backend is use_backend
    assert current_backend() == "auto"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_block_uses_its_backend(name: str) -> None:
    with use_backend(name):
        assert current_backend() == name
    assert current_backend() == "auto"


def test_blocks_nest() -> None:
    with use_backend("triton"):
        with use_backend("cudnn"):
            assert current_backend() == "cudnn"
        assert current_backend() == "triton"


def test_an_exception_restores_the_backend() -> None:
    with use_backend("cudnn"):
        with pytest.raises(KeyError), use_backend("triton"):
            raise KeyError
        assert current_backend() == "cudnn"


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_an_unknown_name_lists_the_known_ones(name: str | None) -> None:
    with (
        pytest.raises(ValueError, match=r"use_backend got name=.*; allowed are 'auto', 'triton', 'cudnn'"),
        use_backend(name),
    ):
        raise AssertionError("the block must not run")
    assert current_backend() == "auto"


def test_it_decorates_functions() -> None:
    @use_backend("cudnn")
    def inside() -> str:
        return current_backend()

    assert [inside(), inside(), current_backend()] == ["cudnn", "cudnn", "auto"]


@pytest.fixture
def settings():
    """PyTorch's precision settings, restored afterwards: setting one of them changes others."""
    cudnn = torch.backends.cudnn
    legacy, places = cudnn.allow_tf32, ()
    if hasattr(cudnn, "fp32_precision"):
        places = (torch.backends, cudnn, cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    yield torch.backends
    for place in places:
        place.fp32_precision = "none"
    cudnn.allow_tf32 = legacy
    for place, value in zip(places, before, strict=True):
        place.fp32_precision = value
    assert [place.fp32_precision for place in places] == before and cudnn.allow_tf32 == legacy


def test_allow_tf32_decides_for_fp32(settings) -> None:
    for allow, expected in ((True, "tf32"), (False, "ieee"), (True, "tf32")):
        settings.cudnn.allow_tf32 = allow
        assert dot_precision(torch.float32) == expected


def test_the_settings_of_torch_2_9(settings) -> None:
    """The convolutions' own setting wins, then cuDNN's, then the global one; unset means exact."""
    if not hasattr(settings.cudnn, "fp32_precision"):
        assert torch.__version__ < "2.9"
        return
    for conv, cudnn, everything, expected in (
        ("tf32", "none", "none", "tf32"),
        ("ieee", "tf32", "tf32", "ieee"),
        ("none", "tf32", "ieee", "tf32"),
        ("none", "ieee", "tf32", "ieee"),
        ("none", "none", "tf32", "tf32"),
        ("none", "none", "ieee", "ieee"),
        ("none", "none", "none", "ieee"),
    ):
        settings.fp32_precision = everything
        settings.cudnn.fp32_precision = cudnn
        settings.cudnn.conv.fp32_precision = conv
        assert dot_precision(torch.float32) == expected, (conv, cudnn, everything)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_types_ignore_the_settings(dtype: torch.dtype, settings) -> None:
    results = set()
    for allow in (True, False):
        settings.cudnn.allow_tf32 = allow
        results.add(dot_precision(dtype))
    assert len(results) == 1

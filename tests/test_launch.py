"""``kernels.launch``: counters, index width and what tensor maps can describe. No triton needed."""

from __future__ import annotations

import pytest
import torch

from resnet_triton.kernels import launch


def test_counters(counts) -> None:
    launch.count("conv_tma")
    launch.count("conv_tma")
    assert counts == {"conv_tma": 2}


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), (None, False)])
def test_interpreting(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert launch.interpreting() is expected


def test_span_of_strided_tensors() -> None:
    x = torch.empty(4, 5, 6)
    assert launch.span(x) == 120
    assert launch.span(x[:, :, ::2]) == 3 * 30 + 4 * 6 + 2 * 2 + 1
    assert launch.span(x[:1, :1, :1].expand(4, 5, 6)) == 1


def test_index_width() -> None:
    limit = launch.INT32_MAX
    small, large = (torch.empty(n, dtype=torch.int8, device="meta") for n in (limit, limit + 1))
    assert not launch.needs_int64(small, None)
    assert launch.needs_int64(small, large)
    assert launch.needs_int64(torch.empty(2, limit, dtype=torch.int8, device="meta")[:, :1])


def test_tensor_maps_need_dense_channels_and_16_bytes() -> None:
    x = torch.empty(2, 4, 4, 16, dtype=torch.half)
    assert launch.tma_ready(x)
    assert launch.tma_ready(x[..., :8])
    assert launch.tma_ready(x[..., 8:])
    assert not launch.tma_ready(x[..., 4:])  # starts at 8 bytes
    assert not launch.tma_ready(x[..., ::2])
    assert not launch.tma_ready(torch.empty(2, 4, 4, 12, dtype=torch.half))
    assert launch.tma_ready(torch.empty(2, 4, 4, 12))


def test_a_device_without_cuda() -> None:
    cpu = torch.device("cpu")
    assert launch.has_tma(cpu)
    assert launch.multiprocessors(cpu) == 4


@pytest.mark.gpu
def test_a_cuda_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert launch.multiprocessors(device) == torch.cuda.get_device_properties(device).multi_processor_count
    assert launch.has_tma(device) == (torch.cuda.get_device_capability(device)[0] >= 9)

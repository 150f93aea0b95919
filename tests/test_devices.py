"""``devices``: the shipped records, names and torch devices, and the estimate for a GPU without a record."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from resnet_triton import devices
from resnet_triton.devices import Target, known_devices, target_of


@pytest.mark.parametrize("name", known_devices())
def test_shipped_records_are_complete_and_plausible(name: str) -> None:
    target = known_devices()[name]
    assert target_of(name) is target
    assert target.name == name and target.is_cuda and target.source
    assert target.sm in (80, 86, 89, 90, 100, 103, 120)
    assert target.tma == (target.sm >= 90)
    assert 10 <= target.multiprocessors <= 200
    assert 1 <= target.clock_ghz <= 3
    assert 96 * 1024 <= target.shared_memory <= 232448
    assert 0.2 <= target.hbm_tb_s < target.l2_tb_s, "L2 is faster than device memory"
    half, tf32, exact = (
        target.tflops(d, p) for d, p in ((torch.half, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee"))
    )
    assert half > tf32 >= exact > 0
    assert target.tflops(torch.bfloat16, "ieee") == half, "precision is about fp32 only"


def test_the_cpu_and_the_interpreter() -> None:
    assert target_of("cpu") == Target("cpu") == target_of(torch.device("cpu"))
    assert not target_of("cpu").is_cuda and not target_of("cpu").tma
    interpreter = target_of(torch.device("cpu"), True)
    assert interpreter.name == "interpreter" and interpreter.tma and not interpreter.is_cuda
    assert target_of("meta") == Target("meta")


def test_an_unknown_name_lists_the_known_ones() -> None:
    message = r"device='NVIDIA H300' is neither a torch device nor a known name; did you mean 'NVIDIA H200'.*known: "
    with pytest.raises(ValueError, match=message) as error:
        target_of("NVIDIA H300")
    assert all(repr(name) in str(error.value) for name in known_devices())


def test_cuda_without_a_gpu_says_what_to_name_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target_of.cache_clear()
    for device in ("cuda:0", torch.device("cuda")):
        with pytest.raises(
            ValueError, match=r"device='cuda.*no CUDA device here; name one to plan for it: .*'NVIDIA H200'"
        ):
            target_of(device)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretends that CUDA has a device with the given properties."""

    def pretend(**properties: object) -> Target:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
        target_of.cache_clear()
        return target_of("cuda")

    yield pretend
    target_of.cache_clear()


def test_a_present_gpu_is_found_by_its_name(gpu) -> None:
    assert gpu(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132) is known_devices()["NVIDIA H200"]


def test_a_gpu_without_a_record_is_scaled_from_the_nearest_architecture(gpu) -> None:
    target = gpu(name="NVIDIA A30", major=8, minor=0, multi_processor_count=54, shared_memory_per_block_optin=1000)
    base = known_devices()["NVIDIA A100-SXM4-80GB"]
    assert (target.name, target.sm, target.multiprocessors, target.shared_memory) == ("NVIDIA A30", 80, 54, 1000)
    assert target.clock_ghz == base.clock_ghz and not target.tma
    assert target.hbm_tb_s == base.hbm_tb_s / 2 and target.l2_tb_s == base.l2_tb_s / 2
    assert target.tflops(torch.half, "tf32") == base.tflops(torch.half, "tf32") / 2
    assert target.source == "scaled from NVIDIA A100-SXM4-80GB, not measured"


def test_a_hopper_without_a_record(gpu) -> None:
    target = gpu(name="NVIDIA GH200 480GB", major=9, minor=0, multi_processor_count=132)
    assert target.sm == 90 and target.tma and target.shared_memory == 232448


def test_records_are_hashable_keys() -> None:
    """The planner caches by target."""
    assert len({*known_devices().values(), *known_devices().values()}) == len(known_devices())
    assert devices.known_devices() is known_devices()

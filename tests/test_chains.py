"""Which convolutions of a block's end share a kernel by prediction, and where none does."""

from __future__ import annotations

import pytest
import torch

from resnet_triton import chains, cost, plan
from resnet_triton.chains import Tail, bottleneck_tails, choose_chain
from resnet_triton.devices import Target, target_of
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape

H200 = target_of("NVIDIA H200")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _nothing_is_measured(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan.forget()
    yield
    plan.forget()


def chosen(batch: int, target: Target = H200, dtype: torch.dtype = BF16, backend: str = "auto") -> dict:
    tails = bottleneck_tails(50, batch, 224)
    return {name: choose_chain(tail, dtype, "tf32", target, backend) for name, tail in tails}


def test_seven_of_the_eight_joints_of_the_first_stages_are_chained() -> None:
    """The eighth is the stem's."""
    found = chosen(256)
    joints = [name for name, chain in found.items() if name < "layer3" and chain and "reduce" in chain.holds]
    assert len(joints) == 7
    assert not any(chain for name, chain in found.items() if name >= "layer4"), "512 channels fit no tile"
    first = found["layer1.0"]
    assert first and first.holds == {"first", "conv", "project", "reduce"}


@pytest.mark.parametrize("batch", (1, 2, 4, 8, 32, 256))
def test_a_chain_never_leaves_multiprocessors_idle(batch: int) -> None:
    for chain in filter(None, chosen(batch).values()):
        assert cost.chain_programs(chain.shape, chain.choice.tiling) >= H200.multiprocessors
    if batch == 1:
        assert not any(chosen(batch).values())


def test_the_choice_is_the_same_every_time() -> None:
    first = chosen(256)
    plan.forget()
    assert chosen(256) == first


def test_where_no_chain_runs() -> None:
    for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA L4"):
        assert not any(chosen(256, target_of(name)).values()), "no TMA"
    blackwell = Target("a B200", 100, 148, 1.9, 232448, 7.0, 9.0, H200.tensor_tflops)
    reason = chains.refusal_of_chains(blackwell, BF16, "tf32")
    assert reason == "chains are tiled for sm_90; a B200 is sm_100" and not any(chosen(256, blackwell).values())
    assert "float32 do not fit" in (chains.refusal_of_chains(H200, torch.float32, "tf32") or "")
    assert not any(chosen(256, dtype=torch.float32).values())
    assert not any(chosen(256, backend="cudnn").values())


def test_equal_times_go_to_the_fewest_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved() -> int:
        return sum(chain.shape.bytes_moved(2) for chain in chosen(256).values() if chain)

    before = moved()
    monkeypatch.setattr(chains, "EQUAL", 1.0)
    plan.forget()
    fastest = chosen(256)
    assert sum(bool(chain) for chain in fastest.values()) <= sum(bool(chain) for chain in chosen(256).values())
    assert moved() != before


def test_what_is_no_chain() -> None:
    """A basic block's last convolution, a first one without the 3x3 behind it, a next one that is strided."""
    added, plain = Epilogue(bn=True, residual=True, relu=True), Epilogue(bn=True, relu=True)
    basic = Tail(ConvShape(1, 8, 8, 64, 64, 3, 3, 1, 1), None, None, None, (added, None, None, None))
    assert not list(chains.ways(basic))
    conv, last = ConvShape(1, 8, 8, 64, 64, 3, 3, 1, 1), ConvShape(1, 8, 8, 64, 256)
    strided = ConvShape(1, 8, 8, 256, 64, 1, 1, 2)
    tail = Tail(last, conv, None, strided, (added, plain, None, plain), 1, ConvShape(1, 8, 8, 256, 64), plain)
    assert {frozenset(holds) for holds, _ in chains.ways(tail)} == {frozenset({"conv"}), frozenset({"first", "conv"})}

"""The micro-benchmarks and the tuner's validation in the interpreter: they compute what they say they check."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import limits
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.measure import ConvProblem


@pytest.fixture
def small(monkeypatch) -> None:
    """The measurements at sizes for the interpreter, on the CPU, with invented times."""

    def run_once(run, repeats: int = 1, warmup: int = 0) -> list[float]:
        run()
        return [1.0]

    monkeypatch.setattr(limits, "DEVICE", "cpu")
    monkeypatch.setattr(limits, "DISTINCT_BYTES", 6 * 128 * 128)
    monkeypatch.setattr(limits, "_multiprocessors", lambda: 2)
    monkeypatch.setattr(limits, "_clock_under_load", lambda run: 1755)
    monkeypatch.setattr(limits, "event_ms", run_once)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rank", [2, 4])
def test_l2(small, rank: int, shared: bool) -> None:
    result = limits.measure_l2(rows=128, stages=3, warps=4, programs=2, rank=rank, shared=shared, steps=7)
    assert result["status"] == "ok"
    assert result["value"] == pytest.approx(4 * 7 * 128 * 128 / 1e9, abs=1e-3)


def test_copies(small) -> None:
    assert limits.measure_copy(1 << 20)["status"] == "ok"
    assert limits.measure_copy_tma(1 << 18)["status"] == "ok"


def test_mma(small) -> None:
    assert limits.measure_mma(64, 32, 4, steps=3, chunks=2)["status"] == "ok"


def test_matmul(small) -> None:
    result = limits.measure_matmul("bfloat16", 64)
    assert result["unit"] == "TFLOP/s" and result["sm_clock_mhz"] == 1755


def test_validation_accepts_right_and_refuses_wrong(monkeypatch) -> None:
    shape, epilogue = ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1), Epilogue(bn=True, residual=True, relu=True)
    problem = ConvProblem(shape, epilogue, torch.float16, "cpu")
    config = ConvConfig("conv_tma", (1, 8, 8), 16, 16)
    assert problem.validate(config) is None
    run = problem.run_ours

    def one_element_off(config: ConvConfig, i: int = 0) -> tuple[torch.Tensor, ...]:
        outs = run(config, i)
        outs[0][0, 7, 7, 15] += 0.5
        return outs

    monkeypatch.setattr(problem, "run_ours", one_element_off)
    assert "error" in (problem.validate(config) or "")
    monkeypatch.setattr(problem, "run_ours", lambda config: problem.outputs())  # writes nothing: NaN
    assert "error nan" in (problem.validate(config) or "")

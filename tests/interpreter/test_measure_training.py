"""The tuner's validation of steps of training in the interpreter: it accepts what is right and refuses what is not."""

from __future__ import annotations

import pytest
import torch

from resnet_triton.devices import target_of
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.training.measure import TrainProblem
from resnet_triton.training.plan import Work, candidates_of

STEPS = {
    "dgrad with sums": Work("dgrad", ConvShape(1, 4, 4, 16, 16), prologue=True, moments=True),
    "gram": Work("gram", ConvShape(1, 4, 4, 16, 16), prologue=True),
    "expand and what follows": Work("expand", ConvShape(1, 4, 4, 16, 32), following=16),
}


@pytest.mark.parametrize("name", STEPS)
def test_validation_accepts_right_and_refuses_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work = STEPS[name]
    config = candidates_of(work, torch.bfloat16, "tf32", target_of("NVIDIA H200"))[0]
    problem = TrainProblem(work, torch.bfloat16, "cpu")
    assert problem.validate(config) is None
    outs = problem.run_ours(config)
    for wrong in range(len(problem.compared(outs))):

        def one_element_off(config, wrong: int = wrong) -> tuple[torch.Tensor, ...]:
            changed = [out.clone() for out in outs]
            last = changed[min(wrong, len(outs) - 1)]
            last[(-1,) * last.dim()] += 9.0
            return tuple(changed)

        monkeypatch.setattr(problem, "run_ours", one_element_off)
        assert "error" in (problem.validate(config) or "")
    new = torch.empty
    monkeypatch.setattr(problem, "run_ours", lambda config: tuple(new(out.shape, dtype=out.dtype) for out in outs))
    assert "error nan" in (problem.validate(config) or ""), "writes nothing"
    assert not torch.are_deterministic_algorithms_enabled()

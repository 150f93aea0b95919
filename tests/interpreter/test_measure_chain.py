"""The tuner's validation of chains in the interpreter: it accepts what is right and refuses what is not."""

from __future__ import annotations

import pytest
import torch

from resnet_triton.kernels.config import ConvConfig
from resnet_triton.measure import ChainProblem
from tests.interpreter.chains import chain

CASES = {
    "conv_chain": (
        chain(1, 8, 8, 16, 32, stride=2, project=(16, 2), reduce=16, subsample=2),
        ConvConfig("conv_chain", (1, 4, 4), 16, 16, 4, 2),
    ),
    "conv_chain from the first 1x1": (
        chain(1, 5, 6, 16, 32, project=(16, 1), first=True),
        ConvConfig("conv_chain", (1, 8, 8), 16, 16, 4, 2),
    ),
    "chain_rolling": (chain(1, 5, 8, 16, 32), ConvConfig("chain_rolling", (2, 3, 8), 16, 16, 4, 2)),
}


@pytest.mark.parametrize("kernel", CASES)
def test_validation_accepts_right_and_refuses_wrong(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, config = CASES[kernel]
    problem = ChainProblem(shape, torch.bfloat16, "cpu")
    assert len(problem.outputs()) == (2 if shape.reduce else 1)
    assert problem.validate(config) is None
    run = problem.run_ours
    for i in range(len(problem.outputs())):

        def one_element_off(config: ConvConfig, i: int = i) -> tuple[torch.Tensor, ...]:
            outs = run(config)
            outs[i].view(-1)[-1] += 1.0
            return outs

        monkeypatch.setattr(problem, "run_ours", one_element_off)
        assert "error" in (problem.validate(config) or "")
    monkeypatch.setattr(problem, "run_ours", lambda config: problem.outputs())  # writes nothing: NaN
    assert "error nan" in (problem.validate(config) or "")

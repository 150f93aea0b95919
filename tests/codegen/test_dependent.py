"""Programmatic dependent launch in machine code: nothing touches memory before the wait, and all programs wait."""

from __future__ import annotations

import re

import pytest
import torch

from resnet_triton.codegen import Launch, compile_launch, conv_launches
from resnet_triton.kernels import dependent
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ConvShape

FULL = Epilogue(bn=True, bias=True, residual=True, relu=True)
THREE, STRIDED = ConvShape(1, 14, 14, 128, 128, 3, 3, 1, 1), ConvShape(1, 14, 14, 128, 128, 3, 3, 2, 1)
ONE, ODD = ConvShape(1, 14, 14, 512, 128), ConvShape(1, 15, 15, 64, 64, 3, 3, 2, 1)
BOX, ROW = (1, 8, 8), (1, 1, 64)
#: Waits for the kernels before; lets the next one start; reads, writes, prefetches or reduces in global memory.
WAIT, RELEASE, MEMORY = "ACQBULK", "PREEXIT", r"(UTMA\w*|UBLK\w*|LD|LDG\w*|ST|STG|ATOM\w*|RED\w*|CCTL\w*)(\.|$)"


def launches(shape: ConvShape, config: ConvConfig) -> list[Launch]:
    return conv_launches(shape, FULL, torch.bfloat16, "tf32", config, 132)


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (THREE, ConvConfig("conv_tma", BOX, 64, 64, pdl=True)),
        (STRIDED, ConvConfig("conv_tma", BOX, 64, 64, split=4, pdl=True)),
        (ONE, ConvConfig("conv1x1", ROW, 64, 64, pdl=True)),
        (ONE, ConvConfig("conv1x1", ROW, 64, 64, split=8, pdl=True)),
        (ConvShape(64, 14, 14, 512, 128), ConvConfig("conv1x1", ROW, 64, 64, persistent=1, pdl=True)),
        (ODD, ConvConfig("conv_pointer", ROW, 64, 32, pdl=True)),
    ],
    ids=str,
)
def test_every_program_waits_before_it_touches_memory(shape: ConvShape, config: ConvConfig) -> None:
    found = launches(shape, config)
    assert [launch.kernel.__name__ for launch in found] == [config.kernel, "split_k_epilogue"][: 1 + (config.split > 1)]
    for launch in found:
        assert launch.kwargs["launch_pdl"] is True
        listing = compile_launch(launch, 90).listing.instructions
        code = [i.opcode for i in listing]
        wait, release = code.index(WAIT), code.index(RELEASE)
        touched = [i for i, opcode in enumerate(code) if re.match(MEMORY, opcode)]
        assert touched and wait < release < touched[0]
        passed_by = listing[wait].predicate or any(re.match("BRA|EXIT|BSSY", opcode) for opcode in code[:wait])
        assert not passed_by, "a program may go on without waiting"


@pytest.mark.parametrize(
    ("shape", "config"),
    [
        (THREE, ConvConfig("conv_tma", BOX, 64, 64, split=2)),
        (ONE, ConvConfig("conv1x1", ROW, 64, 64)),
        (ODD, ConvConfig("conv_pointer", ROW, 64, 32)),
    ],
    ids=str,
)
def test_ordinary_launches_know_nothing_of_it(shape: ConvShape, config: ConvConfig) -> None:
    for launch in launches(shape, config):
        assert launch.kwargs["launch_pdl"] is False
        listing = compile_launch(launch, 90).listing
        assert listing.count(WAIT) == listing.count(RELEASE) == 0


def test_not_below_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ConvConfig("conv_pointer", ROW, 64, 32, pdl=True)
    device = torch.device("cpu")
    assert dependent.dependent_launch(config, device)
    monkeypatch.setattr(dependent, "has_tma", lambda device: False)
    assert not dependent.dependent_launch(config, device)

"""The machine code of every shipped program: no spills, fits, uses the hardware, issues little, no worse than before.

A test is one program of ``aot.cases``: all of ResNet-18 to 152 at 224 px and batch 1, 32 and 256 on sm_90, and each
kernel once per dtype on sm_80 and sm_100. The golden figures are of one triton version; see ``aot.regressions``.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import triton

from resnet_triton import aot

GOLDEN = json.loads(aot.GOLDEN.read_text())
REGENERATE = "if this is intended, run `python -m resnet_triton.aot --golden` and commit tests/codegen/golden.json"
OTHER_TRITON = f"golden.json was written with triton {GOLDEN['triton']}, this is {triton.__version__}"
CASES = {case.name: case for sm in aot.ARCHITECTURES for case in aot.cases(sm)}


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_program(case: aot.Case) -> None:
    metrics = aot.measure(case)
    problems = aot.problems(case, metrics)
    assert not problems, f"{case.uses[0].label}: {'; '.join(problems)}"
    if GOLDEN["triton"] == triton.__version__ and case.name in GOLDEN["cases"]:
        worse = aot.regressions(metrics, GOLDEN["cases"][case.name])
        assert not worse, f"{'; '.join(worse)}: {REGENERATE}"


@pytest.mark.skipif(GOLDEN["triton"] != triton.__version__, reason=OTHER_TRITON)
def test_golden_lists_the_shipped_programs() -> None:
    new, gone = CASES.keys() - GOLDEN["cases"].keys(), GOLDEN["cases"].keys() - CASES.keys()
    assert not new and not gone, f"new: {sorted(new)}, gone: {sorted(gone)}; {REGENERATE}"


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    name = next(case.name for case in CASES.values() if case.kernel == "add_relu")
    assert aot.main(["--sm", "90", "--only", name, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "## sm_90: 1 programs, planned for NVIDIA H200" in out
    assert "| add_relu | bfloat16 |" in out
    with pytest.raises(SystemExit):
        aot.main(["--golden", "--only", name])


def test_a_case_that_does_not_compile_names_itself_and_the_reason() -> None:
    case = next(case for case in CASES.values() if case.kernel == "add_relu")
    broken = replace(case, name="broken", launch=case.launch._replace(kwargs={**case.launch.kwargs, "num_warps": 3}))
    with pytest.raises(RuntimeError, match=r"broken does not compile for sm_90: .*num_warps"):
        aot.compile_case(broken)


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="sm=75 is not checked; allowed: 80, 90, 100"):
        aot.cases(75)

"""The machine code of every shipped program: no spills, fits, uses the hardware, issues little, no worse than before.

A test is one program of ``aot.cases``: all of ResNet-18 to 152 at 224 px and batch 1, 32 and 256 on sm_90, and each
kernel once per dtype on sm_80 and sm_100; those of training are in ``test_training_codegen.py``. The golden figures are
of one triton version; see ``golden.regressions``.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from resnet_triton import aot, chains, codegen, golden, plan, tune, tuning
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.shapes import resnet_convs
from resnet_triton.sites import ChainSite
from resnet_triton.tuning import ChainEntry, Entry

GOLDEN = json.loads(golden.GOLDEN.read_text())
REGENERATE = golden.ACCEPT
CASES = {case.name: case for sm in aot.ARCHITECTURES for case in aot.cases(sm)}


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line takes the programs of sm_90 from here: to list those of training takes seconds each time."""
    programs, real = [case for case in CASES.values() if case.name.startswith("sm90-")], aot.cases
    monkeypatch.setattr(aot, "cases", lambda sm=90, limit=None: programs[:limit] if sm == 90 else real(sm, limit))


@pytest.mark.parametrize("case", [case for case in CASES.values() if not case.training], ids=lambda case: case.name)
def test_program(case: codegen.Case) -> None:
    metrics = codegen.measure(case)
    problems = golden.problems(case, metrics)
    assert not problems, f"{case.uses[0].label}: {'; '.join(problems)}"
    if GOLDEN["triton"] == triton.__version__ and case.name in GOLDEN["cases"]:
        worse = golden.regressions(metrics, GOLDEN["cases"][case.name])
        assert not worse, f"{'; '.join(worse)}: {REGENERATE}"


def test_tails_hold_every_convolution_once() -> None:
    tails = dict(chains.bottleneck_tails(50, 2, 224))
    sites = list(resnet_convs(50, 2))
    parts = [conv for tail in tails.values() for conv, _ in tail.sites().values()]
    assert len(parts) == len(sites) and sum(conv.macs for conv in parts) == sum(site.shape.macs for site in sites)
    assert tails["layer1.0"].first == sites[0].shape and tails["layer1.0"].subsample == 1
    assert not any(tail.first for name, tail in tails.items() if name != "layer1.0")
    end, start = tails["layer1.2"], tails["layer2.0"]
    assert end.subsample == 2 and end.reduce == ConvShape(2, 56, 56, 256, 128)
    assert start.project == ConvShape(2, 28, 28, 256, 512) and start.conv and start.conv.stride == 2
    assert tails["layer4.2"].reduce is None


def test_chains_are_cases() -> None:
    """Of every stage whose tiles fit a multiprocessor, with all that follows the 3x3 where that fits too."""
    found = {use.label.split(" batch ")[0]: use for case in CASES.values() for use in case.uses if use.fused}
    assert {f"resnet50 layer{stage}.0" for stage in (1, 2, 3)} <= found.keys()
    assert found["resnet50 layer1.1"].fused == "conv+expand+reduce"
    assert {case.dtype for case in CASES.values() if case.uses[0].fused} == {torch.bfloat16, torch.float16}


def test_golden_lists_the_shipped_programs() -> None:
    new, gone = CASES.keys() - GOLDEN["cases"].keys(), GOLDEN["cases"].keys() - CASES.keys()
    assert not new and not gone, f"new: {sorted(new)}, gone: {sorted(gone)}; {REGENERATE}"


@pytest.mark.usefixtures("listed")
def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    name = next(case.name for case in CASES.values() if case.kernel == "add_relu")
    assert aot.main(["--sm", "90", "--only", name, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "## sm_90: 1 programs, planned for NVIDIA H200" in out
    assert "| add_relu | bfloat16 |" in out
    with pytest.raises(SystemExit):
        aot.main(["--golden", "--only", name])
    tables = []
    for jobs in ("1", "2"):
        assert aot.main(["--sm", "80", "--limit", "2", "--jobs", jobs]) == 0
        tables.append(capsys.readouterr().out)
    assert "sm_80: 2 programs" in tables[0] and tables[0] == tables[1]


@pytest.mark.usefixtures("listed")
def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, what changed, how to accept it; worse, new and gone programs are exit code 1."""
    case = next(case for case in CASES.values() if case.kernel == "add_relu")
    record = golden.golden_record(codegen.measure(case))
    path = tmp_path / "golden.json"

    def run(version: str = triton.__version__, **changed: float) -> tuple[int, str]:
        cases = {case.name: {**record, **changed}} if changed != {"absent": True} else {}
        path.write_text(json.dumps({"triton": version, "cases": cases}))
        code = aot.main(["--sm", "90", "--only", case.name, "--diff", str(path)])
        out = capsys.readouterr().out
        assert "sm_90: 1 programs" in out
        return code, out.partition("changes since golden.json:\n")[2]

    assert run() == (0, "  nothing changed in 1 programs\n")
    code, out = run(registers=record["registers"] - 20, tma_loads=2, issue=record["issue"] * 2)
    assert code == 1 and f"registers {record['registers'] - 20} -> {record['registers']} (worse)" in out
    assert "tma_loads 2 -> 0" in out and "issue" in out and out.count("(worse)") == 1 and golden.ACCEPT in out
    code, out = run(registers=record["registers"] - 1)
    assert code == 0 and "registers" in out and "(worse)" not in out
    code, out = run(absent=True)
    assert code == 1 and out.startswith(f"  new: {case.name}")
    code, out = run(version="0.0", registers=1)
    assert code == 0 and "not compared: golden.json is of triton 0.0" in out
    path.write_text("{")
    with pytest.raises(SystemExit) as end:
        aot.main(["--sm", "90", "--only", case.name, "--diff", str(path)])
    assert end.value.code == 2 and "golden.json is no golden file" in capsys.readouterr().err


def test_what_is_worse() -> None:
    before = {"registers": 100, "spills": 0, "shared": 49152, "mma": 8, "tma_loads": 6, "tma_stores": 1, "issue": 1.0}
    before |= {"loop 0": 0.5, "loop 1": 0.8}
    for name, still, worse in (
        ("registers", 108, 109),
        ("spills", 0, 4),
        ("shared", 50176, 50177),
        ("issue", 1.04, 1.06),
        ("loop 1", 0.83, 0.85),
    ):
        assert not golden.changes({**before, name: still}, before).get(name, "").endswith("(worse)")
        assert golden.changes({**before, name: worse}, before)[name].endswith("(worse)")
    assert golden.changes({**before, "mma": 4}, before) == {"mma": "mma 8 -> 4"}
    del before["loop 1"]
    now = {**before, "loop 0": 0.9, "loop 2": 2.0}
    assert golden.changes(now, before) == {"loop 0": "loop 0 0.5 -> 0.9 (worse)", "loop 2": "loop 2 appeared"}
    assert golden.changes(before, now)["loop 2"] == "loop 2 disappeared"
    lines, bad = golden.diff({})
    if GOLDEN["triton"] == triton.__version__:
        assert bad and len(lines) == len(GOLDEN["cases"]) and lines[0].startswith("gone: ")


def test_shipped_tuned_configurations_are_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the architecture; the user's own tuned files change nothing."""
    config = ConvConfig("conv_tma", (2, 8, 8), 256, 64, 8, 2)
    shape = ConvShape(32, 28, 28, 128, 256, 3, 3, 1, 1)
    chain = ChainShape(None, ConvShape(32, 28, 28, 128, 512), subsample=2)
    chained = ConvConfig("conv_chain", (2, 8, 8), 32, 64, 8, 2)
    entries = [
        Entry(shape, "bfloat16", False, config, 1.0, 2.0),
        ChainEntry(chain, "bfloat16", chained, 1.0, 2.0),
    ]
    tuning.save(tmp_path / "NVIDIA_H200.json", "NVIDIA H200", entries)
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(tmp_path))
    plan.forget()
    assert {case.name for case in aot.cases(80)} == {name for name in CASES if name.startswith("sm80")}
    monkeypatch.setattr(tuning, "shipped_dir", lambda: tmp_path)
    plan.forget()
    new = [case for case in aot.cases(90) if case.name not in CASES]
    assert [(case.config, case.uses[0].label) for case in new] == [
        (config, f"NVIDIA H200 {shape}"),
        (chained, f"NVIDIA H200 {chain}"),
    ]
    assert {case.name for case in aot.cases(80)} == {name for name in CASES if name.startswith("sm80")}
    plan.forget()


def test_misfits_are_found_without_a_gpu() -> None:
    """What the tuner drops: registers that spill, too much shared memory, a program that does not compile."""
    shape, epilogue = ConvShape(32, 14, 14, 64, 256), Epilogue(bn=True, residual=True, relu=True)

    def why(config: ConvConfig, shared_memory: int = 232448) -> str | None:
        work = {"shape": vars(shape), "epilogue": vars(epilogue), "dtype": "bfloat16", "precision": "tf32"}
        gpu = {"sm": 90, "multiprocessors": 132, "shared_memory": shared_memory}
        row = {"payload": {**work, **gpu, "config": config.to_dict()}}
        return tune.compile_row(row, None).get("detail")

    chain = ChainSite(ChainShape(None, ConvShape(32, 14, 14, 64, 256)), torch.bfloat16)
    gpu = {"sm": 90, "multiprocessors": 132, "shared_memory": 1000}
    config = ConvConfig("conv_chain", (1, 8, 8), 64, 64, 4, 2)
    row = {"payload": {**chain.payload(), **gpu, "config": config.to_dict()}}
    assert "shared memory, the limit is 1000" in tune.compile_row(row, None)["detail"]
    good = ConvConfig("conv1x1", (1, 1, 64), 64, 64)
    assert why(good) is None
    assert re.fullmatch(r"needs \d+ bytes of shared memory, the limit is 1000", why(good, 1000) or "")
    assert re.match(r"spills \d+ bytes a thread", why(ConvConfig("conv1x1", (1, 1, 64), 256, 64, 2)) or "")


def test_a_case_that_does_not_compile_names_itself_and_the_reason() -> None:
    case = next(case for case in CASES.values() if case.kernel == "add_relu")
    broken = replace(case, name="broken", launch=case.launch._replace(kwargs={**case.launch.kwargs, "num_warps": 3}))
    with pytest.raises(RuntimeError, match=r"broken does not compile for sm_90: .*num_warps"):
        codegen.compile_case(broken)


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="sm=75 is not checked; allowed: 80, 90, 100"):
        aot.cases(75)

"""The programs of training steps: which there are, and a sample of them and of other configurations compiled.

``python -m resnet_triton.aot --diff --alternatives`` compiles them all.
"""

from __future__ import annotations

from math import prod

import pytest
import torch
import triton

from resnet_triton import aot, codegen, golden
from resnet_triton.kernels.config import TRAIN_KERNELS
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.nests import Loop, longest_of, nest_of_training
from resnet_triton.training import plan
from resnet_triton.training.programs import Program, TrainingStep
from tests.codegen.test_codegen import CASES, GOLDEN, REGENERATE, listed

__all__ = ["listed"]  # a fixture

TRAINING = [case for case in CASES.values() if case.training]
TARGET = codegen.planned_for(90)
assert TARGET is not None
ALTERNATIVES = aot.alternatives()


def kind(case: codegen.Case) -> tuple:
    """What makes the machine code of two programs different in kind; in other dtypes than bf16, the kernel alone."""
    if case.dtype != torch.bfloat16:
        return case.kernel, case.dtype, case.precision
    given = codegen.arguments(case.launch)
    taps = given.get("R", 1) * given.get("S", 1)
    return case.kernel, case.operands, case.dtype, case.precision, taps > 1, given.get("STRIDE")


def sample(cases: list[codegen.Case]) -> list[codegen.Case]:
    """One program of each kind, the one with the largest tile; in other dtypes than bf16, only those with products."""
    found: dict[tuple, codegen.Case] = {}
    for case in cases:
        if case.dtype != torch.bfloat16 and not case.config:
            continue
        kept = found.setdefault(kind(case), case)
        if case.config and kept.config and case.config.bm * case.config.bn > kept.config.bm * kept.config.bn:
            found[kind(case)] = case
    return list(found.values())


@pytest.mark.parametrize("case", sample(TRAINING), ids=lambda case: case.name)
def test_program(case: codegen.Case) -> None:
    metrics = codegen.measure(case)
    problems = golden.problems(case, metrics)
    assert not problems, f"{case.uses[0].label}: {'; '.join(problems)}"
    assert not case.config or metrics.pressure is not None
    if GOLDEN["triton"] == triton.__version__ and case.name in GOLDEN["cases"]:
        worse = golden.regressions(metrics, GOLDEN["cases"][case.name])
        assert not worse, f"{'; '.join(worse)}: {REGENERATE}"


@pytest.mark.parametrize("case", sample(ALTERNATIVES)[::6], ids=lambda case: case.name)
def test_alternatives_do_not_spill(case: codegen.Case) -> None:
    assert codegen.misfit([case.launch], 90, codegen.SHARED_LIMIT[90]) is None


def test_every_kernel_of_a_step_is_there() -> None:
    assert {case.config.kernel for case in TRAINING if case.config} == set(TRAIN_KERNELS)
    others = {case.kernel for case in TRAINING if not case.config}  # besides those of inference
    assert others >= {
        "finalise", "bn_apply", "bn_gradients", "bn_backward", "masked_sums", "sum_parts", "bn_relu_pool",
        "bn_relu_pool_backward", "moments", "unpack_stem_wgrad", "gram_products", "gram_stats", "gram_rows",
        "gram_dw", "gram_matrix", "gram_columns",
    }  # fmt: skip
    numerics = {(case.dtype, case.precision) for case in TRAINING}
    assert numerics == set(aot.NUMERICS)
    given = {(case.kernel, case.operands) for case in TRAINING if case.dtype == torch.bfloat16}
    assert {("expand", text) for text in ("bn", "bn+project", "bn+following", "bn+following+project")} <= given
    assert {("dgrad", "bn+mask+parts"), ("dgrad", "bn_backward+add+mask"), ("dgrad", "bn_backward")} <= given
    assert {("conv_stats", "parts"), ("conv_stats", "bn+parts"), ("wgrad", "bn+parts")} <= given


def test_alternatives_are_what_the_plan_may_choose() -> None:
    chosen = {(case.kernel, case.config) for case in TRAINING}
    assert len({case.name for case in ALTERNATIVES} - CASES.keys()) == len(ALTERNATIVES) > 200
    assert {case.kernel for case in ALTERNATIVES} >= {"conv_stats", "dgrad", "wgrad", "expand", "gram_dgrad"}
    work = plan.Work("wgrad", ConvShape(256, 28, 28, 128, 128, 3, 3, 1, 1))  # of ResNet-18
    offered = plan.configs_of(work, torch.bfloat16, "tf32", 132)
    known = chosen | {(case.kernel, case.config) for case in ALTERNATIVES}
    assert {("wgrad", config) for config in offered} <= known


@pytest.mark.parametrize("step", [TrainingStep(50, 32, 224, True, True), TrainingStep(18, 32)], ids=str)
def test_loops_hold_the_products_of_the_step(step: TrainingStep) -> None:
    """All tiles together multiply what the step has to, and at most twice that: overhanging tiles, padded channels."""
    programs = [p for p in step.programs(torch.bfloat16, "tf32", TARGET) if p.config]
    assert programs
    for program in programs:
        assert program.work is not None
        rows, columns, depth = plan.gemm(program.work)
        wanted: float = rows * columns * depth * program.share
        if program.work.project:
            wanted += program.work.project.macs
        wanted += rows * columns * program.work.following
        nest = nest_of_training(program.launch.kernel.__name__, codegen.arguments(program.launch))
        done = nest.tiles * sum(loop.work for loop in nest.loops)
        # a rolling strip has two rows more, the stem's cells have zeros around 7x7
        assert 0.99 * wanted <= done <= 2.2 * wanted, program.label
        if nest.walks:
            assert nest.tiles >= prod(program.launch.grid) // 2, program.label


def test_labels_name_the_layer_and_the_step() -> None:
    found: list[Program] = TrainingStep(50, 32, 224, True, True).programs(torch.bfloat16, "tf32", TARGET)
    labels = [program.label for program in found]
    for label in (
        "resnet50 conv1 stem batch 32",
        "resnet50 layer1.0.conv2 fprop batch 32",
        "resnet50 layer1.0.conv3 expand+fprop batch 32",
        "resnet50 layer2.0.downsample.0 gram batch 32",
        "resnet50 layer4.2.conv3 gram_dgrad batch 32",
        "resnet50 layer1.0.conv1 dgrad batch 32",
        "resnet50 conv1 stem_wgrad batch 32",
    ):
        assert label in labels, label


def test_the_longest_loop_of_a_nest() -> None:
    nest = (Loop(2, 5), Loop(3, 1, (Loop(4, 10), Loop(1, 90)), taken=2))
    assert longest_of(nest) == Loop(2, 90)
    assert longest_of((Loop(7, 3),)) == Loop(7, 3)


def test_taps_at_the_border() -> None:
    """A 3x3 on four boxes of a row and column each way: the outer ones leave the image with one tap of three."""
    given = {
        "N": 1, "H": 8, "W": 8, "P": 8, "Q": 8, "K": 16, "C": 16, "R": 3, "S": 3, "STRIDE": 1, "PAD": 1, "DIL": 1,
        "TN": 1, "TH": 4, "TW": 4, "BN": 16, "BK": 16, "scale": 1,
    }  # fmt: skip
    nest = nest_of_training("conv_stats", given)
    # of 6 rows of taps 2 leave it, of 6 columns 2: 36 - 16 of 36
    assert nest.loops == (Loop(9, 16 * 16 * 16, taken=5),) and nest.walks and nest.tiles == 4


@pytest.mark.usefixtures("listed")
def test_the_command_line_covers_training(capsys: pytest.CaptureFixture[str]) -> None:
    case = next(case for case in TRAINING if case.kernel == "bn_backward")
    assert aot.main(["--sm", "90", "--only", case.name, "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "## sm_90: 0 programs" in out and "## sm_90, training: 1 programs, planned for NVIDIA H200" in out
    assert f"| bn_backward | bfloat16 | - | {case.operands or '-'} |" in out
    assert GOLDEN["triton"] != triton.__version__ or case.name in GOLDEN["cases"]
    assert aot.main(["--sm", "90", "--only", case.name, "--diff"]) == 0
    assert "nothing changed in 1 programs" in capsys.readouterr().out


def test_heavy_loops_have_a_reason() -> None:
    case = next(case for case in TRAINING if case.config and case.kernel == "wgrad" and "bn" in case.operands)
    metrics = codegen.measure(case)
    reason = golden.heavy_loop(case, metrics)
    assert (reason is not None) == (max(loop.pressure for loop in metrics.loops) > golden.LOOP_GOAL)

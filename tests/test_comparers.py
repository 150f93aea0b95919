"""The comparers fail where they should: a tolerance that lets everything pass tests nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cases import GUARD, Guarded, misaligned, sliced
from tests.comparers import FORWARD, WORST, errors, identical, no_worse_than, same_math
from tests.conftest import BUDGET, rung, skip_is_allowed

NAN = float("nan")


def test_identical() -> None:
    x = torch.tensor([1.0, NAN, float("inf")])
    identical(x, x.clone())
    for other in (
        torch.tensor([1.0, NAN, 2.0]),
        torch.tensor([1.0, 1.0, float("inf")]),
        torch.tensor([NAN, NAN, float("inf")]),
        torch.nextafter(x, torch.tensor(5.0)),
        x.double(),
        x[None],
    ):
        with pytest.raises(AssertionError):
            identical(x, other)
    with pytest.raises(AssertionError, match=r"1 of 3 values differ; first at \(2,\): inf, expected 2.0"):
        identical(x, torch.tensor([1.0, NAN, 2.0]))
    identical(torch.tensor([True]), torch.tensor([True]))
    with pytest.raises(AssertionError):
        identical(torch.tensor([True]), torch.tensor([False]))


def test_no_worse_than() -> None:
    reference = torch.randn(1000).double()
    noise = torch.randn(1000).double() * 1e-3
    eager = (reference + noise).float()
    no_worse_than(eager, eager, reference)
    no_worse_than((reference + 1.9 * noise.roll(1)).float(), eager, reference)
    with pytest.raises(AssertionError, match=r"RMS error .* is 2.10 times eager's .*; allowed: 2.0"):
        no_worse_than((reference + 2.1 * noise.roll(1)).float(), eager, reference)
    one_wrong = eager.clone()
    one_wrong[7] += 2 * FORWARD * WORST * noise.abs().max()
    with pytest.raises(AssertionError, match="worst error"):
        no_worse_than(one_wrong, eager, reference)
    with pytest.raises(AssertionError, match=r"dtype torch.float32, eager has torch.float64"):
        no_worse_than(eager, reference, reference)


def test_an_exact_eager_leaves_half_a_unit_in_the_last_place() -> None:
    reference = torch.ones(8).double()
    eps = torch.finfo(torch.half).eps
    no_worse_than(torch.full((8,), 1 - eps / 2).half(), reference.half(), reference)
    with pytest.raises(AssertionError, match="RMS"):
        no_worse_than(torch.full((8,), 1 + eps).half(), reference.half(), reference)


def test_nan_only_where_the_reference_has_it() -> None:
    reference = torch.tensor([1.0, NAN, float("inf")]).double()
    assert errors(reference.half(), reference) == (0.0, 0.0)
    with pytest.raises(AssertionError):
        errors(torch.tensor([1.0, 0.0, float("inf")]), reference)
    with pytest.raises(AssertionError, match="NaN where the reference is finite"):
        errors(torch.tensor([NAN, NAN, float("inf")]), reference)
    with pytest.raises(AssertionError, match="must be float64"):
        errors(reference, reference.float())


def test_same_math() -> None:
    x = torch.randn(100).double()
    same_math(x * (1 + 1e-15), x)
    with pytest.raises(AssertionError, match="error"):
        same_math(x + 1e-9, x)
    with pytest.raises(AssertionError, match=r"dtype torch\.float32"):
        same_math(x.float(), x)


def test_guards_notice_stray_writes() -> None:
    for offset in (-1, 6):
        guarded = Guarded()
        x, y = guarded.input(torch.ones(2, 3)), guarded.output(2, 3, dtype=torch.half)
        assert y.isnan().all() and y.shape == (2, 3)
        y.fill_(1)
        guarded.verify()
        for tensor in (y, x):
            neighbour = tensor.as_strided((1,), (1,), GUARD + offset)
            before = neighbour.clone()
            neighbour.fill_(3)
            with pytest.raises(AssertionError, match="guard band"):
                guarded.verify()
            neighbour.copy_(before)
    guarded = Guarded()
    guarded.input(torch.ones(2, 3)).mul_(2)
    with pytest.raises(AssertionError, match="input 0"):
        guarded.verify()


def test_layouts_keep_the_values() -> None:
    x = torch.randn(2, 3, 4)
    identical(sliced(x, 1), x)
    identical(misaligned(x), x)
    assert not sliced(x, 1).is_contiguous() and misaligned(x).data_ptr() % 16


def test_skips_need_a_reason_from_the_list() -> None:
    assert skip_is_allowed("Skipped: needs a CUDA device")
    assert skip_is_allowed("Skipped: could not import 'timm': No module named 'timm'")
    assert not skip_is_allowed("Skipped: could not import 'torch': No module named 'torch'")
    assert not skip_is_allowed("Skipped: flaky")


def test_the_longest_path_of_the_budget_counts() -> None:
    assert rung("tests/test_plan.py") == "tests"
    assert rung("tests/interpreter/test_stem.py") == "tests/interpreter"
    assert rung("tests/test_packaging.py") == "tests/test_packaging.py"
    assert rung("bench/test_speed.py") is None
    assert all(set(entry) == {"test_cpu_s", "total_minutes"} for entry in BUDGET.values())


SAMPLE = """
import time

import pytest


def test_burns():
    start = time.process_time()
    while time.process_time() - start < 0.5:
        pass


def test_skips():
    pytest.skip("no idea")


@pytest.mark.gpu
def test_needs_a_gpu():
    import torch

    assert torch.cuda.is_available()


def test_passes():
    pass
"""


def test_a_slow_test_and_a_baseless_skip_fail(tmp_path: Path) -> None:
    """The hooks of tests/conftest.py in a project of their own, whose cap is 0.3 s."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (folder / "budget.toml").write_text('["tests"]\ntest_cpu_s = 0.3\ntotal_minutes = 1\n')
    (folder / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra -p no:cacheprovider\nmarkers = gpu: needs one\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "tests"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    failed = set(re.findall(r"^FAILED tests/test_sample.py::(\w+)", run.stdout, re.MULTILINE))
    assert failed == {"test_burns", "test_skips"}, run.stdout
    assert "tests/budget.toml allows 0.3 s" in run.stdout and "not in ALLOWED_SKIPS" in run.stdout

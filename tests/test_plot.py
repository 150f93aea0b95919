"""Pictures: what a plan's plot shows, that it is the same each time, and what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import resnet_triton
from resnet_triton.explain import Plan, Row
from resnet_triton.plot import check_path

H200 = "NVIDIA H200"


def plan(*rows: Row) -> Plan:
    """A plan of these rows."""
    return Plan(rows, H200, "bfloat16", (2, 3, 64, 64), "cudnn")


ROWS = (
    Row("conv1", "conv", "conv1x1", "", 1.5, None, 1_000_000, "unmeasured", "tensor"),
    Row("conv1", "conv", "conv1x1", "", 2.5, None, 1_000_000, "unmeasured", "l2"),
    Row("conv2", "conv", "cudnn", "", 4.0, None, 2_000_000, "unmeasured; predicted 9.0 us (issue)", "hbm"),
)


def drawn(path: Path, *rows: Row) -> str:
    """The SVG of a plan of these rows."""
    pytest.importorskip("matplotlib")
    plan(*rows).plot(path)
    return path.read_text()


def test_a_plot_names_steps_limits_and_runners(tmp_path):
    text = drawn(tmp_path / "a.svg", *ROWS)
    assert text.count("conv1 conv") == 2, "steps of one name must not share a bar"
    for words in (
        "tensor",
        "l2",
        "predicted, not measured",
        "this package's kernels",
        "cudnn",
        H200,
        "2 x 3 x 64 x 64",
    ):
        assert words in text
    assert ">issue<" not in text, "the limit of a kernel that does not run"


def test_a_plot_tells_measured_from_predicted(tmp_path):
    measured = replace(ROWS[0], predicted_us=None, measured_us=3.0, reason="measured 3.0 us against 5.0 us by cudnn")
    assert "measured; pale: predicted" in drawn(tmp_path / "a.svg", measured, *ROWS[1:])
    text = drawn(tmp_path / "b.svg", measured)
    assert "microseconds (measured)" in text and "predicted" not in text


def test_without_times_only_bytes_are_drawn(tmp_path):
    text = drawn(tmp_path / "a.svg", *(replace(row, predicted_us=None) for row in ROWS))
    assert "MB through memory" in text and "microseconds" not in text
    assert "svg" in drawn(tmp_path / "empty.svg")


def test_equal_plans_give_equal_files(tmp_path):
    assert drawn(tmp_path / "a.svg", *ROWS) == drawn(tmp_path / "b.svg", *ROWS)
    for suffix in (".png", ".pdf"):
        for name in "ab":
            plan(*ROWS).plot(tmp_path / f"{name}{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("name", ["plot", "plot.jpeg2", "plot.txt"])
def test_an_unknown_suffix_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"allowed: \.svg, \.png, \.pdf"):
        plan(*ROWS).plot(tmp_path / name)
    assert check_path("A.SVG").name == "A.SVG"


def test_without_matplotlib_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plan(*ROWS).plot(tmp_path / "a.svg")


def test_a_network_is_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    model = resnet_triton.resnet18().eval()
    resnet_triton.explain(model, (256, 3, 224, 224), device=H200).plot(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "layer4.1.conv2" in text and "hbm" in text

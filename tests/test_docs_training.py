"""What docs/training.md says: its figures are those of its scripts, and what it names exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

import resnet_triton
from resnet_triton.explain import Row

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/training.md").read_text()


def example(name: str):
    return runpy.run_path(str(ROOT / f"docs/examples/{name}.py"))["main"]


def test_the_errors_are_those_of_the_script(capsys) -> None:
    end, block = example("gram_error")([])
    printed = capsys.readouterr().out.strip().splitlines()
    (stated,) = [fence for fence in PAGE.split("```") if fence.strip().startswith("relative RMS errors")]
    pairs = list(zip(printed, stated.strip().splitlines(), strict=True))
    number = r"\d\.\de[-+]\d\d"
    for ours, theirs in pairs:
        assert re.split(number, ours) == re.split(number, theirs)
        for value, claimed in zip(re.findall(number, ours), re.findall(number, theirs), strict=True):
            # a machine may add in another order
            assert float(value) == pytest.approx(float(claimed), rel=0.15 if float(claimed) > 1e-5 else 2, abs=1e-8)
    assert all(end["gram"][i] < min(end["stored"][i], end["PyTorch"][i]) / 5 for i in (1, 4, 5, 6))
    assert all(gram <= 1.1 * eager for eager, gram in zip(block["PyTorch"], block["gram"], strict=True))


def test_the_saved_bytes_are_those_of_the_script() -> None:
    """At 64 px, where every feature map is 2/7 as wide as at 224 px."""
    (stated,) = [fence for fence in PAGE.split("```") if fence.strip().startswith("PyTorch ")]
    found = example("train_memory")(["--size", "64"])
    rows = [line.split() for line in stated.strip().splitlines()]
    assert [row[0] for row in rows] == list(found)
    for name, megabytes, *_, ratio in rows:
        assert found[name] * (7 / 2) ** 2 / 1e6 == pytest.approx(float(megabytes), rel=0.005)
        assert float(megabytes) / float(rows[0][1]) == pytest.approx(float(ratio.rstrip("x")), abs=0.005)


def test_what_the_page_names_exists() -> None:
    section = PAGE.split("## Where it lives")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for _, files, names in rows:
        source = "".join((ROOT / path).read_text() for path in re.findall(r"`([^`]+)`", files))
        wanted = re.findall(r"`([^`]+)`", names)
        assert wanted and [n for n in wanted if not re.search(rf"^(?:def|class) {n}\b", source, re.M)] == []
    inner = [*re.findall(r"`([\w/]+\.py): (\w+)`", PAGE), ("training/block.py", "_recomputed")]
    for path, name in inner:
        file = ROOT / path if (ROOT / path).exists() else ROOT / "resnet_triton" / path
        assert f"def {name}(" in file.read_text()


def test_the_guard_is_the_one_of_the_page() -> None:
    from resnet_triton.kernels import gram_bn
    from resnet_triton.training import reference

    assert "64 * 2^-23 *" in PAGE and "1e-3 * (var_k + eps)" in PAGE
    assert (reference.ROUNDINGS, reference.DOUBTFUL) == (64, 1e-3) == (gram_bn.ULPS, gram_bn.DOUBTFUL)
    assert torch.finfo(torch.float32).eps == 2.0**-23


def test_the_diagram_shows_what_a_block_runs() -> None:
    """The steps of the diagram's block between two others, as planned for an H200 with our kernels everywhere."""
    three = resnet_triton.convert(nn.Sequential(*(Bottleneck(256, 64) for _ in range(3))).train())

    def rows(chains: bool) -> list[Row]:
        with resnet_triton.use_backend("triton", chains=chains):
            plan = resnet_triton.explain(three, (256, 256, 56, 56), dtype=torch.bfloat16, device="NVIDIA H200")
        return [row for row in plan.rows if row.name.startswith("1.") and row.realisation != "aten"]

    chained = [row.op.split()[0] for row in rows(chains=True)]
    assert "expand+fprop" in chained and chained.count("fprop") == 1
    ran = [row.realisation.removesuffix("_rolling") for row in rows(chains=False)]
    forward, backward = ran[:4], ran[4:]
    assert forward == ["conv_stats", "conv_stats", "gram", "expand"]
    assert backward == ["wgrad", "gram_dgrad", "bn_backward", "wgrad", "dgrad", "wgrad", "dgrad"]
    (diagram,) = [fence for fence in PAGE.split("```") if fence.lstrip().startswith("forward, downwards")]
    lines = diagram.splitlines()
    down = re.findall(r"[│^v] (\w+)", "\n".join(line[:48] for line in lines))
    up = re.findall(r"│ (\w+)", "\n".join(line[48:] for line in reversed(lines)))
    for drawn, names in ((down, forward), (up, backward)):
        assert [word for word in drawn if word in names] == names
    for name, megabytes in re.findall(r"\[(\w+) (\d\.\d\d)\]", diagram):
        channels = 256 if name in ("x", "y", "dx", "dz3") else 64
        assert float(megabytes) == round(56 * 56 * channels * 2 / 1e6, 2)

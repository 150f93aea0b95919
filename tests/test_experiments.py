"""``resnet-triton experiment``: verdicts from numbers, exact constructions, and every command once on tiny nets.

The nets of the commands have 8 and 14 layers and see the digits at 8 pixels for one epoch: what they learn does not
matter here. They are trained once for all tests.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_triton.cli import main
from resnet_triton.cli.experiment import EXPERIMENTS
from resnet_triton.convert import unconvert
from resnet_triton.experiments import construction, cost, degradation, nets, output, pool, responses, runs, shortcuts
from resnet_triton.experiments.nets import Net
from resnet_triton.experiments.output import Images
from resnet_triton.experiments.plan import DEFAULTS, default_plan
from resnet_triton.experiments.spread import HIGHER, LOWER, UNDECIDED, compare
from resnet_triton.runs.data import Request
from tools import experiments_page

SMALL = ("--size", "8", "--batch-size", "256", "--epochs", "1", "--device", "cpu")
TWO = (*SMALL, "--depths", "8", "14", "--seeds", "2")


def experiment(name: str, folder: Path, *arguments: str) -> int:
    return main(["experiment", name, "--output", str(folder), *arguments])


def refused(capsys: pytest.CaptureFixture[str], name: str, folder: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert experiment(name, folder, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.splitlines()[-1]


# Spread and verdicts, on numbers


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    (
        ((0.30, 0.31, 0.32), (0.10, 0.11, 0.12), HIGHER),
        ((0.10, 0.11, 0.12), (0.30, 0.31, 0.32), LOWER),
        ((0.10, 0.13, 0.16), (0.12, 0.15, 0.18), UNDECIDED),  # within the spread
        ((0.10, 0.11, 0.40), (0.01, 0.02, 0.03), UNDECIDED),  # apart, but one run makes the difference
        ((0.9,), (0.1, 0.1), UNDECIDED),  # one run has no spread
        ((0.2, 0.2), (0.2, 0.2), UNDECIDED),
        ((0.2, 0.2), (0.1, 0.1), HIGHER),  # no spread at all
    ),
)
def test_groups_of_runs_differ_beyond_their_spread_or_are_not_told_apart(first, second, outcome):
    assert compare(first, second).outcome == outcome


def test_a_difference_is_in_standard_deviations_of_single_runs():
    found = compare((0.5, 0.7), (0.1, 0.3))
    assert found.difference == pytest.approx(0.4)
    assert found.deviations == pytest.approx(0.4 / 0.02**0.5)  # each group: variance 2 * 0.1^2 / 1
    assert compare((0.9,), (0.1,)).deviations is None
    # three images of a thousand are no difference where no run happened to differ from another
    assert compare((0.003, 0.003), (0.001, 0.001), resolution=0.001).outcome == UNDECIDED
    assert compare((0.004, 0.004), (0.001, 0.001), resolution=0.001).outcome == HIGHER


HIGH, MIDDLE, LOW = [0.30, 0.31, 0.32], [0.20, 0.21, 0.22], [0.01, 0.02, 0.03]


@pytest.mark.parametrize(
    ("plain", "residual", "outcome"),
    (
        ((LOW, HIGH), (LOW, LOW), degradation.AS_IN_PAPER),
        ((LOW, HIGH), (MIDDLE, LOW), degradation.AS_IN_PAPER),
        ((LOW, HIGH), (LOW, MIDDLE), degradation.PARTLY),
        ((LOW, LOW), (LOW, LOW), degradation.NOT_DECIDED),
        ((LOW, HIGH), (LOW, HIGH), degradation.NOT_DECIDED),
        ((LOW, [0.01, 0.3, 0.6]), (LOW, LOW), degradation.NOT_DECIDED),
        ((LOW[:1], HIGH[:1]), (LOW[:1], LOW[:1]), degradation.NOT_DECIDED),
        ((HIGH, MIDDLE), (LOW, LOW), degradation.NOT_AS_IN_PAPER),
        ((LOW, MIDDLE), (LOW, HIGH), degradation.NOT_AS_IN_PAPER),
    ),
)
def test_the_verdict_follows_from_the_training_errors(plain, residual, outcome):
    errors = {"plain": dict(zip((20, 56), plain, strict=True)), "residual": dict(zip((20, 56), residual, strict=True))}
    lines, facts = degradation.verdict(errors, 1 / 1438)
    assert facts["outcome"] == outcome
    assert lines[-1] == f"Verdict: {outcome}."


def test_the_verdict_in_words():
    lines, facts = degradation.verdict({"plain": {20: LOW, 32: LOW, 56: HIGH}, "residual": {20: LOW, 56: LOW}}, 1e-3)
    assert lines[0] == (
        "plain: the training error of 56 layers is higher than that of 20 layers (+29.00 points, 29.0 standard "
        "deviations of single runs)."
    )
    assert lines[1].startswith(
        "residual: the training error of 56 layers is not told apart from that of 20 layers by 3"
    )
    pairs = [(pair["shallow"], pair["deep"], pair["outcome"]) for pair in facts["training_error"]["plain"]]
    assert pairs == [(20, 56, HIGHER), (20, 32, UNDECIDED), (32, 56, HIGHER)]
    lines, facts = degradation.verdict({"plain": {20: LOW, 56: HIGH}}, 1e-3)
    assert facts["outcome"] is None and len(lines) == 1
    assert degradation.verdict({"plain": {20: LOW[:1], 56: HIGH[:1]}}, 1e-3)[0][0].endswith(
        "by one run each (+29.00 points, one run says nothing about the spread)."
    )


def test_shortcuts_are_compared_by_test_error():
    errors = {"residual": {20: MIDDLE}, "residual-B": {20: LOW}, "residual-C": {20: LOW}}
    lines, facts = shortcuts.verdict(errors, 1e-3)
    assert [(pair["of"], pair["against"], pair["outcome"]) for pair in facts["test_error"]] == [
        ("B", "A", LOWER),
        ("C", "B", UNDECIDED),
    ]
    assert lines[0].startswith("20 layers: the test error of option B (2.00%) is lower than that of option A (21.00%)")


def test_responses_are_compared_between_kinds_and_depths():
    table = [
        {"kind": kind, "depth": depth, "seed": seed, "layer": layer, "name": "", "std": std + 0.001 * seed}
        for kind, depth, std in (("plain", 20, 0.9), ("residual", 20, 0.5), ("plain", 56, 0.9), ("residual", 56, 0.3))
        for seed in range(3)
        for layer in range(2)
    ]
    lines, facts = responses.judge({"": table}, None)
    found = {(pair["of"], pair["against"]): pair["outcome"] for pair in facts["responses"]}
    assert found == {
        ("residual-20", "plain-20"): LOWER,
        ("residual-56", "plain-56"): LOWER,
        ("plain-56", "plain-20"): UNDECIDED,
        ("residual-56", "residual-20"): LOWER,
    }
    assert "The responses of residual-56 (0.301, mean over its layers) are smaller than those of plain-56" in lines[1]


# Files


def test_tables_read_back_to_the_same_bits(tmp_path):
    rows = [
        {"kind": "plain", "depth": 20, "error": 0.1 + 0.2, "sd": None, "equal": True},
        {"kind": "a, b", "depth": 56, "error": 1e-17, "sd": 2.0, "equal": False},
    ]
    (tmp_path / "t.csv").write_text(output.as_csv(rows))
    assert output.read_csv(tmp_path / "t.csv") == rows
    assert output.as_csv([]) == "\n"


def test_data_and_their_defaults(capsys, tmp_path):
    assert default_plan("digits") is DEFAULTS["digits"]
    for kind in DEFAULTS:
        spec = kind + ":folder" * (kind == "cifar10")
        found = replace(default_plan(spec), data=spec)
        settings = found.settings("m", 1, nn.Linear(2, 2), 50_000)
        assert (settings.data, settings.seed, settings.size) == (kind, 1, found.size)
        assert settings.epochs >= 8 and settings.lr in (0.05, 0.1)
    cifar = replace(DEFAULTS["cifar10"], data="cifar10:folder")
    paper = cifar.settings("m", 0, nn.Linear(2, 2), 50_000)
    assert (paper.iterations, paper.batch_size, paper.schedule) == (64_000, 128, "step")
    onward = construction.goes_on(cifar, 4, 0.01).settings("m", 0, nn.Linear(2, 2), 50_000)
    assert (onward.iterations, onward.epochs, onward.lr, onward.schedule) == (None, 4, 0.01, "cosine")
    assert "--data 'imagefolder:x' is not known here" in refused(
        capsys, "degradation", tmp_path, "--data", "imagefolder:x"
    )
    assert "depth must be 6n+2" in refused(capsys, "degradation", tmp_path, "--depths", "8", "21", *SMALL)
    assert "the second must be deeper" in refused(capsys, "construction", tmp_path, "--depths", "14", "8", *SMALL)


# Commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of ``degradation`` and its trained nets."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    found = tmp_path_factory.mktemp("experiments")
    assert experiment("degradation", found, *TWO, "--jobs", "1") == 0
    return found


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a net was trained")

    monkeypatch.setattr(pool, "train", refuse)


def test_degradation_writes_every_epoch_a_summary_a_picture_and_its_conditions(folder):
    report, content = output.read(folder, "degradation")
    table, summary = report.tables[""], report.tables["summary"]
    assert len(table) == 2 * 2 * 2  # kinds, depths, seeds; one epoch
    assert list(table[0]) == ["kind", "depth", "seed", *runs.COLUMNS]
    for row in table:
        assert round(row["train_error_eval"] * 1438, 6).is_integer() and round(row["test_error"] * 359, 6).is_integer()
    line = summary[1]
    errors = [row["test_error"] for row in table if (row["kind"], row["depth"]) == (line["kind"], line["depth"])]
    assert line["test_error_mean"] == pytest.approx(sum(errors) / 2)
    assert line["test_error_sd"] == pytest.approx(abs(errors[0] - errors[1]) / 2**0.5)
    assert {row["parameters"] for row in summary if row["depth"] == 8} == {75_002}  # plain and option A alike
    assert content["environment"]["torch"] == torch.__version__ and content["settings"]["seeds"] == 2
    assert content["command"].startswith("resnet-triton experiment degradation --kinds plain residual --data digits")
    assert report.lines == content["verdict"] == (folder / "degradation.txt").read_text().splitlines()
    assert (folder / "degradation.png").stat().st_size > 5000


@pytest.mark.usefixtures("no_training")
def test_finished_runs_are_not_repeated_and_the_recorded_command_gives_the_same(folder, tmp_path, capsys):
    before = (folder / "degradation.csv").read_bytes()
    command = output.read(folder, "degradation")[1]["command"].split()
    assert main([*command[1:], "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out)["experiment"] == "degradation"
    assert (folder / "degradation.csv").read_bytes() == before
    assert experiment("degradation", folder, *TWO) == 0
    out, err = capsys.readouterr()
    assert "8 trained nets are needed, 8 of them are there" in err and "Verdict: " in out


def test_runs_of_other_settings_are_refused_and_damaged_ones_named(folder, tmp_path, capsys):
    message = refused(capsys, "degradation", folder, *TWO, "--lr", "0.01")
    assert "plain-8-seed-0.json' is of another run, which has lr = 0.05 instead of 0.01. Choose another" in message
    shutil.copytree(folder / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "plain-8-seed-0.json").write_text("{")
    assert "is damaged" in refused(capsys, "degradation", tmp_path, *TWO)


def test_several_processes_train_the_same_bits_as_one(folder, tmp_path, capsys):
    assert experiment("degradation", tmp_path, *SMALL, "--depths", "8", "--seeds", "1", "--jobs", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["outcome"] is None  # there is one depth
    one, other = (output.read(place, "degradation")[0].tables[""] for place in (folder, tmp_path))
    wanted = [row for row in one if (row["depth"], row["seed"]) == (8, 0)]
    assert len(other) == 2
    for mine, theirs in zip(other, wanted, strict=True):
        assert {**mine, "seconds": None} == {**theirs, "seconds": None}


def test_ctrl_c_keeps_the_finished_runs(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    real = pool.train

    def train(run, *arguments):
        if run.net.kind == "residual":
            os.kill(os.getpid(), 2)
        return real(run, *arguments)

    monkeypatch.setattr(pool, "train", train)
    few = (*SMALL, "--depths", "8", "--seeds", "1", "--jobs", "1")
    assert experiment("degradation", tmp_path, *few) == 130
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1] == "resnet-triton experiment: interrupted"
    assert "stopped: 1 of 2 nets are trained and kept; the same command goes on from there" in err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "plain-8-seed-0.json",
        "plain-8-seed-0.safetensors",
    ]


@pytest.mark.usefixtures("no_training")
def test_responses_of_the_trained_nets(folder, capsys):
    assert experiment("responses", folder, *TWO) == 0
    table = output.read(folder, "responses")[0].tables[""]
    assert len(table) == 2 * 2 * (7 + 13)  # a stem and two convolutions a block
    assert [row["name"] for row in table[:3]] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert all(0.01 < row["std"] < 10 for row in table)
    assert "mean over its layers" in capsys.readouterr().out


def test_a_response_is_what_bn_gives_before_relu_and_addition():
    data = runs.data_of(DEFAULTS["digits"], 0)
    model = nets.build(Net("residual", 8), 10, 1).eval()
    few = type("Few", (), {"__len__": lambda self: 300, "__getitem__": lambda self, request: data.train[request]})()
    found = responses.deviations(model, few)
    x = data.train[Request(None, range(300))][0]
    plain = unconvert(model)
    with torch.no_grad():
        stem = plain.bn1(plain.conv1(x))
        block = plain.layer1[0]
        inner = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(torch.relu(stem))))))
    assert found["conv1"] == pytest.approx(stem.double().std(correction=0).item(), rel=1e-5)
    assert found["layer1.0.conv2"] == pytest.approx(inner.double().std(correction=0).item(), rel=1e-5)
    with pytest.raises(NotImplementedError, match="conv1 has no BN behind it"):
        responses.normalised_convolutions(nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 3)}))


def test_construction_trains_on_and_reports(folder, capsys):
    arguments = (*TWO[:-1], "1", "--jobs", "1")
    assert experiment("construction", folder, *arguments) == 0
    report, content = output.read(folder, "construction")
    assert [row["equal"] for row in report.tables["check"]] == [True, True]
    assert len(report.tables[""]) == 2 * 4 and content["settings"]["further_lr"] == pytest.approx(0.005)
    assert "unchanged bit for bit in 1 of 1 nets" in capsys.readouterr().out
    start = {row["net"]: row for row in report.tables[""] if row["kind"] == "residual"}
    assert start[construction.BUILT_ON]["depth"] == 14 and start[construction.SHALLOW_ON]["depth"] == 8


def test_shortcuts_differ_in_parameters(folder, capsys):
    assert experiment("shortcuts", folder, *SMALL, "--depths", "8", "--seeds", "1", "--jobs", "1", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["test_error"]) == 2
    summary = output.read(folder, "shortcuts")[0].tables["summary"]
    parameters = [row["parameters"] for row in summary]
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters[1] - parameters[0] == projections
    assert parameters[2] - parameters[1] == 16 * 16 + 2 * 16


# Construction, exactly


@pytest.mark.parametrize("kind", nets.STAGED)
def test_appended_blocks_leave_outputs_as_they_are_bit_for_bit(kind):
    model = nets.build(Net(kind, 8), 10, 3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 3)
    model.eval()
    deep = construction.deepened(model, Net(kind, 26), 10, 3)
    assert len(list(construction.appended(model, deep))) == 9
    x = torch.randn(5, 3, 17, 15)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(deep(x), expected)
        assert torch.equal(unconvert(deep)(x), unconvert(model)(x))
        # the blocks are there: without them as they are, outputs change
        for block in construction.appended(model, deep):
            nn.init.ones_(block.bn2.bias)
        assert not torch.equal(deep(x), expected)


def test_deeper_residual_nets_also_begin_to_train_with_the_same_outputs():
    model = nets.build(Net("residual", 8), 10, 1).train()
    deep = construction.deepened(model, Net("residual", 14), 10, 1).train()
    x = torch.randn(6, 1, 12, 12)
    assert torch.equal(deep(x), model(x))


def test_what_cannot_be_deepened_is_refused():
    model = nets.build(Net("residual", 14), 10, 1)
    with pytest.raises(ValueError, match="residual-8 lacks"):
        construction.deepened(model, Net("residual", 8), 10, 1)
    with pytest.raises(ValueError, match="'preact' cannot be deepened; allowed: plain"):
        construction.deepened(model, Net("preact", 20), 10, 1)
    with pytest.raises(ValueError, match="kind 'dense' is not known"):
        nets.build(Net("dense", 8), 10, 1)


# Cost


def test_cost_measures_what_is_asked_for(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    small = [
        cost.Entry("CIFAR plain", "cifar_plain56", {}, 8),
        cost.Entry("CIFAR residual", "cifar_resnet56", {}, 8),
        cost.Entry("CIFAR residual", "cifar_resnet8", {"shortcut": "B"}, 8),
    ]
    monkeypatch.setattr(cost, "FAMILY", small)
    arguments = ("--families", "CIFAR plain", "CIFAR residual", "--minutes", "0.001", "--device", "cpu", "--batch", "2")
    assert experiment("cost", tmp_path, *arguments) == 0
    assert "cifar_resnet56 against cifar_plain56: 1.00x the parameters" in capsys.readouterr().out
    report, content = output.read(tmp_path, "cost")
    plain, residual, _ = report.tables[""]
    assert plain["parameters"] == residual["parameters"] == 853_018
    assert plain["multiply_adds"] == residual["multiply_adds"] and plain["depth"] == 56
    assert plain["latency_ms_p20"] <= plain["latency_ms"] <= plain["latency_ms_p80"] and plain["rounds"] >= 3
    assert plain["weights_mb"] > 3.4 and plain["activations_mb"] > 2 * 2 * 16 * 8 * 8 * 4 / 1e6
    assert report.lines == content["verdict"]


def test_the_peak_of_memory_is_that_of_the_call():
    held = torch.ones(1000)

    def call() -> torch.Tensor:
        half = held + 1
        whole = torch.cat([half, half])
        del half
        return whole * 2

    assert cost.peak_bytes(call, torch.device("cpu")) in range(16_000, 16_400)


def test_what_is_set_against_each_other_is_measured():
    known = {(entry.family, entry.model) for entry in cost.FAMILY}
    assert {each for pair in cost.COMPARED for each in pair} <= known
    assert Images(1438, 359).test == 359


# The page


def test_the_page_has_the_numbers_of_its_files():
    page, results = experiments_page.DOCS / experiments_page.PAGE, experiments_page.DOCS / experiments_page.RESULTS
    text = page.read_text()
    assert experiments_page.filled(text, results) == text
    assert [mark[1] for mark in experiments_page.MARKS.findall(text)] == list(EXPERIMENTS)
    for name in EXPERIMENTS:
        if (results / f"{name}.json").exists():
            report, content = output.read(results, name)
            assert report.lines == content["verdict"]
            assert (experiments_page.DOCS / experiments_page.IMAGES / experiments_page.picture(name)).is_file()


def test_the_page_is_filled_from_new_results(folder, tmp_path):
    assert experiments_page.take(folder, tmp_path / "results")[0] == "degradation"
    text = "before\n<!-- results: degradation -->\nstale\n<!-- end -->\n<!-- results: cost -->\n<!-- end -->\nafter\n"
    new = experiments_page.filled(text, tmp_path / "results")
    _, summary = output.read(tmp_path / "results", "degradation")[0].tables.values()
    assert (
        "stale" not in new
        and new.startswith("before\n")
        and new.endswith(f"{experiments_page.NOT_RUN}\n<!-- end -->\nafter\n")
    )
    assert "    resnet-triton experiment degradation" in new and "Seeds 0 to 1" in new and "- Verdict: " in new
    assert f"{100 * summary[0]['test_error_mean']:.2f} ± {100 * summary[0]['test_error_sd']:.2f}" in new
    assert experiments_page.filled(new, tmp_path / "results") == new
    experiments_page.draw(tmp_path / "results", tmp_path)
    assert (tmp_path / "experiment-degradation.png").is_file()

"""Steps of training that were measured: what files hold of them, what the plan makes of the times, what is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_triton import cli, convert, explain, plan, resnet18, resnet50, tune, tuning
from resnet_triton.cli import tune as command
from resnet_triton.devices import Target, target_of
from resnet_triton.entries import TrainEntry
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.plan import Choice
from resnet_triton.sites import merged, site_of, sites_of
from resnet_triton.training import plan as training
from resnet_triton.training.measure import TrainProblem
from resnet_triton.training.plan import GRAM_STEPS, TUNED_STEPS, Work, candidates_of
from resnet_triton.training.sites import TrainSite, training_sites
from resnet_triton.tuner import Timing, Trial
from tests import networks, tune_rows

H200 = target_of("NVIDIA H200")
SIBLING = replace(H200, name="NVIDIA Sibling")
BF16 = torch.bfloat16
POINTWISE = ConvShape(256, 56, 56, 64, 256)
DGRAD = Work("dgrad", ConvShape(256, 28, 28, 128, 128, 3, 3, 1, 1), prologue=True, moments=True)
WGRAD = Work("wgrad", POINTWISE, prologue=True, moments=True)
EXPAND = Work("expand", POINTWISE, project=ConvShape(256, 112, 112, 64, 256, stride=2))
NEXT = Work("conv_stats", ConvShape(256, 56, 56, 256, 64), moments=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No measurements but those in this folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "shipped_dir", lambda: tmp_path / "shipped")
    plan.forget()
    yield tmp_path
    plan.forget()


def candidates(work: Work) -> tuple[ConvConfig, ...]:
    return candidates_of(work, BF16, "tf32", H200)


def entry(work: Work, us: float, library_us: float | None = None, config: ConvConfig | None = None) -> TrainEntry:
    """Of its last candidate if no configuration is given."""
    theirs = (900.0 if work.has_library else 0.0) if library_us is None else library_us
    return TrainEntry(work, "bfloat16", config or candidates(work)[-1], us, theirs, versions={"torch": "2.11"})


def store(folder: Path, *entries: Any, of: Target = H200) -> Path:
    path = folder / tuning.file_name(of.name)
    tuning.save(path, of.name, entries, of.sm)
    plan.forget()
    return path


def choose(work: Work, backend: str = "auto", target: Target = H200) -> Choice:
    return training.choose(work, BF16, "tf32", target, backend)


# Files


def test_steps_come_back_as_written(folder: Path) -> None:
    entries = [entry(work, 10.0) for work in (DGRAD, WGRAD, EXPAND, replace(EXPAND, project=None, following=64))]
    path = store(folder, *entries)
    assert tuning.load(path) == entries and tuning.read(path).training == tuple(entries)
    tuning.merge(path, H200.name, [entry(WGRAD, 9.0)])
    assert [found.us for found in tuning.load(path)] == [10.0, 9.0, 10.0, 10.0]


def test_a_file_of_the_format_before_is_read(folder: Path) -> None:
    data = {"format": 2, "device": H200.name, "sm": 90, "entries": [], "chains": []}
    path = folder / "x.json"
    path.write_text(json.dumps(data))
    assert tuning.load(path) == []
    path.write_text(json.dumps({**data, "training": []}))
    with pytest.raises(ValueError, match="the file has unknown keys 'training'"):
        tuning.read(path)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("work", "step"), "fprop", r"training\[0\].work.step is 'fprop', allowed: 'conv_stats', 'dgrad'"),
        (("work", "shape", "n"), 0, r"work.shape.n is 0, allowed: an integer from 1"),
        (("work", "backward"), 1, r"work.backward is 1, allowed: true or false"),
        (("work", "residual_stride"), 3, r"work.residual_stride is 3, allowed: an integer from 0 to 2"),
        (("work", "project"), {"n": 1}, r"work.project lacks"),
        (("work", "moved"), 0, r"work has unknown keys 'moved'"),
        (("config", "kernel"), "wgrad", r"config.kernel is 'wgrad', allowed: 'dgrad'"),
        (("config", "split"), 500, r"config.split is 500, allowed: an integer from 1 to 16"),
        (("library_us",), 0, r"library_us is 0, allowed: positive microseconds"),
        (("precision",), "tf32", r"precision is 'tf32', allowed: ''"),
    ],
)
def test_a_broken_entry_is_named(folder: Path, path: tuple[str, ...], value: Any, message: str) -> None:
    file = store(folder, entry(DGRAD, 1.0))
    data = json.loads(file.read_text())
    place = data["training"][0]
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        tuning.read(file)


def test_the_gram_form_has_no_library_to_be_compared_with(folder: Path) -> None:
    file = store(folder, entry(EXPAND, 1.0))
    file.write_text(file.read_text().replace('"library_us": 0.0', '"library_us": 5.0'))
    with pytest.raises(ValueError, match=r"library_us is 5\.0, allowed: 0, for a step that no library has"):
        tuning.read(file)


# What the plan makes of the times


def test_a_measured_step_is_taken_with_its_configuration(folder: Path) -> None:
    config = candidates(DGRAD)[-1]
    assert choose(DGRAD).config != config, "the case tests nothing"
    store(folder, entry(DGRAD, 100.0))
    choice = choose(DGRAD)
    assert (choice.realisation, choice.config, choice.measured_us) == ("dgrad", config, 100.0)
    assert choice.reason == "measured 100.0 us against 900.0 us by cudnn" and choice.predicted_us is None


def test_the_faster_of_the_measured_times_wins(folder: Path) -> None:
    store(folder, entry(DGRAD, 901.0))
    choice = choose(DGRAD)
    assert (choice.realisation, choice.config, choice.measured_us) == ("cudnn", None, 900.0)
    assert choose(DGRAD, "triton").measured_us == 901.0
    assert choose(DGRAD, "cudnn").measured_us is None
    alone = training.alone(Work("dgrad", DGRAD.shape), BF16, "tf32", H200, choice)
    assert alone.measured_us is None and alone.predicted_us, "the time is that of the passes too"


def test_the_gram_form_takes_its_best_configuration(folder: Path) -> None:
    store(folder, entry(EXPAND, 5000.0))
    choice = choose(EXPAND)
    assert (choice.config, choice.measured_us) == (candidates(EXPAND)[-1], 5000.0)
    assert choice.reason == "measured 5000.0 us; the Gram form has no library"


def test_other_work_is_not_what_was_measured(folder: Path) -> None:
    store(folder, entry(DGRAD, 100.0))
    for change in ({"residual_stride": 1}, {"moments": False}, {"prologue": False}):
        assert choose(replace(DGRAD, **change)).measured_us is None
    for batch, near in ((128, True), (512, True), (127, False)):
        other = replace(DGRAD, shape=replace(POINTWISE if DGRAD.shape is None else DGRAD.shape, n=batch))
        choice = choose(other)
        assert (choice.measured_us is not None) == near and ("at batch 256" in choice.reason) == near


def test_shares_of_the_pixels_follow_the_gpu(folder: Path) -> None:
    """A weight gradient's tile measured with other shares is taken with those that are right here."""
    first = candidates(WGRAD)[0]
    store(folder, entry(WGRAD, 100.0, config=replace(first, split=7)))
    assert choose(WGRAD).config == first
    store(folder, entry(WGRAD, 100.0, config=replace(first, bn=first.bn // 2)))
    assert choose(WGRAD).measured_us is None, "a configuration that is none of ours is not run"


def test_the_device_comes_before_its_sibling(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(plan, "_warned", set())
    store(folder, entry(DGRAD, 100.0), entry(WGRAD, 800.0), of=SIBLING)
    choice = choose(DGRAD)
    assert (choice.config, choice.measured_us) == (candidates(DGRAD)[-1], None) and choice.predicted_us
    assert choice.reason == "unmeasured here; 100.0 us against 900.0 us by cudnn on NVIDIA Sibling"
    assert choose(WGRAD).realisation == "cudnn", "no clear win there"
    assert "steps of training" in caplog.text and "resnet50 --train --batch 256 --dtype bf16" in caplog.text
    store(folder, entry(DGRAD, 50.0))
    assert choose(DGRAD).measured_us == 50.0


def test_measured_times_say_whether_the_next_convolution_is_computed_ahead(folder: Path) -> None:
    apart = replace(EXPAND, project=None)
    both = replace(apart, following=64)

    def chained() -> bool:
        return training.chains(apart, 64, BF16, "tf32", H200, "auto")

    store(folder, entry(both, 100.0), entry(apart, 60.0), entry(NEXT, 41.0))
    assert chained()
    store(folder, entry(both, 100.0), entry(apart, 60.0), entry(NEXT, 45.0, library_us=39.0))
    assert not chained(), "the library computes what follows in 39"
    before = chained
    store(folder)
    by_prediction = before()
    store(folder, entry(both, 1e6))
    assert chained() == by_prediction, "one measured time alone says nothing"


def test_explain_shows_the_measured_time(folder: Path) -> None:
    model = networks.bottlenecks((2, 1, 1, 1)).to(BF16).train()
    shape = (32, 3, 64, 64)
    sites = {site.work: site for site in sites_of(convert(model), shape, BF16, H200)}
    work = next(work for work in sites if work.step == "wgrad" and work.shape.r == 3)
    store(folder, entry(work, 12.5))
    times = [row.measured_us for row in explain(convert(model), shape, device=H200.name).rows]
    assert times.count(12.5) == len(sites[work].layers)


# What is worth measuring


@pytest.mark.parametrize(("build", "count", "steps"), [(resnet18, 50, 5), (resnet50, 99, 8)])
def test_the_steps_of_a_network(build, count: int, steps: int) -> None:
    found = merged(sites_of(build().to(BF16).train(), (256, 3, 224, 224), BF16, H200))
    assert len(found) == count and len({site.key for site in found}) == count
    assert len({site.work.step for site in found}) == steps and {site.work.step for site in found} <= {*TUNED_STEPS}
    assert sum(site.share for site in found) == pytest.approx(1.0)
    assert [site.share for site in found] == sorted((site.share for site in found), reverse=True)
    for site in found:
        assert site.layers and (site.library_us(H200) > 0) == (site.work.step not in GRAM_STEPS)
        configs = site.candidates(H200)
        assert 0 < len(configs) <= 8 and len(set(configs)) == len(configs) and site.measured(H200) is None
        assert {config.kernel for config in configs} <= {*site.work.kernels}
        again = site_of(json.loads(json.dumps(site.payload())))
        assert again == TrainSite(site.work, BF16) and again.key == site.key
    works = {site.work for site in found}
    assert all(replace(work, backward=False) in works for work in works), "a stored gradient is a choice"
    wgrads = [site for site in found if site.work.step == "wgrad" and site.work.backward]
    assert all(name.startswith("layer") for site in wgrads for name in site.layers)


def test_what_is_measured_does_not_depend_on_what_was(folder: Path) -> None:
    model = convert(networks.basics((1, 1, 1, 1)).to(BF16).train())
    before = sites_of(model, (32, 3, 64, 64), BF16, H200)
    store(folder, *(entry(site.work, 10.0, 1.0) for site in before))
    assert sites_of(model, (32, 3, 64, 64), BF16, H200) == before


def test_nothing_to_measure_without_a_tensor_memory_accelerator() -> None:
    model = convert(networks.basics((1, 1, 1, 1)).to(BF16).train())
    with pytest.raises(ValueError, match=r"nothing to tune: .*A100.* has no tensor memory accelerator"):
        training_sites(model, (32, 3, 64, 64), BF16, target_of("NVIDIA A100-SXM4-80GB"))


def test_the_entry_of_a_step() -> None:
    site, config = TrainSite(EXPAND, BF16), candidates(EXPAND)[0]
    found = site.entry([Trial(config, "ok", Timing(3.0, 0.0))])
    assert found == TrainEntry(EXPAND, "bfloat16", config, 3.0, 0.0) and found.versions["torch"] == torch.__version__
    assert site.read_entry(json.loads(json.dumps(found.to_dict()))) == found
    assert site.entry([Trial(config, "error")]) is None and site.entry([]) is None


# How it is measured


TINY = (
    Work("conv_stats", ConvShape(2, 6, 6, 16, 16, 3, 3, 2, 1), prologue=True, moments=True),
    Work("dgrad", ConvShape(2, 6, 6, 16, 32), backward=True, residual_stride=2),
    Work("wgrad", ConvShape(2, 6, 6, 16, 32), backward=True),
    Work("wgrad", ConvShape(2, 6, 6, 16, 32), prologue=True, moments=True),
    Work("gram", ConvShape(2, 6, 6, 16, 16, stride=2)),
    Work("expand", ConvShape(2, 3, 3, 16, 32), project=ConvShape(2, 6, 6, 16, 32, stride=2)),
    Work("expand", ConvShape(2, 6, 6, 16, 32), following=16),
    Work("gram_dgrad", ConvShape(2, 6, 6, 16, 32), prologue=True),
    Work("gram_dgrad", ConvShape(2, 6, 6, 16, 32, stride=2)),
    Work("stem_conv_stats", ConvShape(1, 16, 16, 3, 16, 7, 7, 2, 3), moments=True),
    Work("stem_wgrad", ConvShape(1, 16, 16, 3, 16, 7, 7, 2, 3)),
)


@pytest.mark.parametrize("work", TINY, ids=lambda work: TrainSite(work, BF16).beside)
def test_the_library_computes_what_the_reference_does(work: Work) -> None:
    """In fp32 on the CPU, beside fp64; what is timed beside ours gives the same as what errors are measured of."""
    problem = TrainProblem(work, torch.float32, "cpu")
    problem._prepare_reference()
    with torch.no_grad():
        assert all(found.l2 < 2e-3 for found in problem._library_errors)
        assert all(wanted.isfinite().all() and wanted.std() > 1e-3 for wanted in problem._wanted)
        sides = problem.baselines()
        assert set(sides) == ({"library"} if work.has_library else set())
        for run in sides.values():
            for a, b in zip(problem.compared(run(0)), problem._wanted, strict=True):
                assert torch.allclose(a.double(), b, rtol=1e-3, atol=1e-3)


def test_a_step_without_a_library_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from resnet_triton import measure

    problem = TrainProblem(TINY[4], torch.float16, "cpu", sets=2)
    captured: list[int] = []
    monkeypatch.setattr(TrainProblem, "_capture", lambda self, run, launches: captured.append(launches))
    monkeypatch.setattr(measure, "target_of", lambda device: H200)
    monkeypatch.setattr(measure, "interleaved", lambda graphs, rounds: {name: [0.9, 1.2, 1.8] for name in graphs})
    timing = problem.time(candidates(TINY[4])[0])
    assert len(captured) == 1 and captured[0] % 2 == 0
    assert timing.us == pytest.approx(1200 / captured[0]) and timing.library_us == 0.0


def test_steps_are_tuned_in_worker_processes_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same journal and file as of convolutions; a second call runs nothing again; the plan takes the result."""
    monkeypatch.setenv("TUNE_LOG", str(folder / "log"))
    sites, out = [TrainSite(DGRAD, BF16, layers=("a",)), TrainSite(EXPAND, BF16, layers=("b",))], folder
    for _ in range(2):
        report = tune.tune(sites, H200, out, handler="tests.tune_rows:measure", compiler=None)
        assert [result.entry.us for result in report.results if result.entry] == [5.0, 10.0]
        runs = (folder / "log").read_text().splitlines()
    assert len(runs) == sum(len(site.candidates(H200)) + 2 for site in sites), "each once, the best two twice"
    choice = choose(DGRAD)
    assert (choice.config, choice.measured_us) == (candidates(DGRAD)[tune_rows.BEST], 5.0)
    assert choose(EXPAND).measured_us == 10.0


def test_forcing_a_choice_ends_with_its_block() -> None:
    told = Choice("dgrad", candidates(DGRAD)[-1], "told")
    with training.forcing(DGRAD, told):
        assert choose(DGRAD) is told and choose(WGRAD) is not told
    assert choose(DGRAD) is not told


# The command


def test_a_dry_run_lists_the_steps_of_training(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["tune", "--model", "torchvision:resnet18", "--train", "--size", "64", "--device", H200.name]
    assert cli.main([*arguments, "--batch", "8", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["training"]
    assert len(rows) > 40 and all(row["work"]["shape"]["n"] == 8 and row["predicted_us"] > 0 for row in rows)
    assert all(row["measured_us"] is None and row["predicted_library_us"] > 0 for row in rows)
    store(folder, entry(site_of({"work": rows[0]["work"], "dtype": "bfloat16", "precision": "tf32"}).work, 7.5))
    assert cli.main([*arguments, "--batch", "8", "--dry-run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"{len(rows)} steps of training, ")
    assert sum(line.endswith(" 7.5") for line in out) == 1


def test_the_command_reports_steps_of_training(monkeypatch, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """By default at batch 256; a step of the Gram form has no library beside it."""

    def planted(sites, target, output: Path, **options) -> tune.Report:
        assert {site.shape.n for site in sites} == {256} and all(isinstance(site, TrainSite) for site in sites)
        sites = [TrainSite(DGRAD, BF16, layers=("a",)), TrainSite(EXPAND, BF16, layers=("b",))]
        found = [entry(DGRAD, 100.0), entry(EXPAND, 30.0)]
        results = [tune.Result(site, one, "", {"ok": 3}) for site, one in zip(sites, found, strict=True)]
        options["progress"](tune.Progress(6, 6, tuple(results)))
        return tune.Report(output / "NVIDIA_H200.json", tuple(results), ())

    monkeypatch.setattr(command, "_device", lambda args: ("cuda", H200))
    monkeypatch.setattr(command, "tune", planted)
    arguments = ["tune", "--model", "resnet18", "--train", "--size", "64", "--output", str(folder)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert "9.00x" in printed.out and "2 of 2 steps of training measured on NVIDIA H200" in printed.out
    assert "a 3x3/1 256x28x28x128->128 bf16: 100.0 us, cudnn 900.0 us, 9.00x" in printed.err
    assert "bf16: 30.0 us\n" in printed.err

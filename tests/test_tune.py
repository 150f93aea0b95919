"""``tune`` and ``resnet-triton tune`` without a GPU: times are planted, processes and their deaths are real."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resnet_triton import cli, convert, measure, plan, tune, tuning
from resnet_triton.cli import tune as command
from resnet_triton.devices import target_of
from resnet_triton.entries import chain_shape_of
from resnet_triton.journal import Journal
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.sites import AnySite, ChainSite, Site, merged, sites_of
from resnet_triton.steps import Recorder
from resnet_triton.tune import Report, Result
from resnet_triton.tuner import Timing
from resnet_triton.tuning import ChainEntry, Entry
from tests import networks, tune_rows

H200 = target_of("NVIDIA H200")
SITES = [
    Site(
        ConvShape(32, 14, 14, 256, 256, 3, 3, 1, 1), Epilogue(bn=True, relu=True), torch.bfloat16, "tf32", ("a",), 0.6
    ),
    Site(ConvShape(32, 14, 14, 256, 1024), Epilogue(True, False, True, True), torch.bfloat16, "tf32", ("b",), 0.4),
]
CHAIN = ChainSite(
    ChainShape(ConvShape(32, 28, 28, 128, 128, 3, 3, 1, 1), ConvShape(32, 28, 28, 128, 512)),
    torch.bfloat16, ("layer2.1.conv3", "layer2.2.conv3"), 0.2, 0.1,
)  # fmt: skip
HANDLER, COMPILER = "tests.tune_rows:measure", "tests.tune_rows:compile_ahead"
run_tune = functools.partial(tune.tune, SITES, H200, handler=HANDLER, compiler=None)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the results, and one in place of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("RESNET_TRITON_CONFIG_DIR", raising=False)
    monkeypatch.setenv("TUNE_LOG", str(tmp_path / "log"))
    (tmp_path / "log").touch()
    plan.forget()
    yield tmp_path / "out"
    plan.forget()


def runs(folder: Path) -> list[str]:
    """The configurations that ran, in order."""
    return [line.partition(" ")[2] for line in (folder.parent / "log").read_text().splitlines()]


def names(site: AnySite) -> list[str]:
    return [str(config) for config in site.candidates(H200)]


# Which convolutions


def sites(model, batch: int = 2, size: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[Site]:
    return sites_of(convert(model), (batch, 3, size, size), dtype, H200)


def test_the_convolutions_are_those_that_really_launch() -> None:
    """Two equal blocks are one site; the stem runs on cells and is none; the projection has its own shape."""
    found = {(site.shape, site.epilogue.residual): site for site in sites(networks.basics((2, 1, 1, 1)).float())}
    block = ConvShape(2, 16, 16, 64, 64, 3, 3, 1, 1)
    assert len(found) == 2 + 3 * 3
    assert found[block, False].layers == ("layer1.0.conv1", "layer1.1.conv1")
    assert found[block, True].layers == ("layer1.0.conv2", "layer1.1.conv2")
    assert found[ConvShape(2, 16, 16, 64, 128, 1, 1, 2), False].layers == ("layer2.0.downsample.0",)
    assert sum(site.share for site in found.values()) == pytest.approx(1.0)


def test_several_batches_are_merged_by_their_share_of_the_network() -> None:
    model = convert(networks.basics((1, 1, 1, 1)).float())
    runs = [sites_of(model, (batch, 3, 64, 64), torch.bfloat16, H200) for batch in (1, 64)]
    found = merged([*runs[0], *runs[1], *runs[0]])
    assert len(found) == len(runs[0]) + len(runs[1])
    assert [site.share for site in found] == sorted((site.share for site in found), reverse=True)
    doubled = {site.key: site for site in found}
    for site in runs[0]:
        assert doubled[site.key].share == pytest.approx(2 * site.share) and doubled[site.key].layers == site.layers


def test_a_model_without_such_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing to tune: no convolution .*resnet-triton explain"):
        sites_of(torch.nn.Conv2d(3, 8, 3), (1, 3, 8, 8), torch.float16, H200)
    with pytest.raises(ValueError, match=r"nothing to tune: Tesla V100 is sm_70; kernels need sm_80"):
        sites_of(torch.nn.Conv2d(3, 8, 3), (1, 3, 8, 8), torch.float16, replace(H200, name="Tesla V100", sm=70))


# Measuring


def test_the_planted_best_is_found_beside_a_killer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that kills its process costs itself only; one that the compiler finds unfit never runs."""
    monkeypatch.setenv("TUNE_KILLER", "256")
    kept = Entry(ConvShape(8, 7, 7, 64, 64), "float16", False, ConvConfig("conv1x1", (1, 1, 64), 64, 64), 1.0, 2.0)
    file = folder / tuning.file_name(H200.name)
    tuning.save(file, H200.name, [kept])
    seen = []
    report = run_tune(folder, compiler=COMPILER, compilers=1, progress=seen.append)
    assert report.file == file and not report.left
    assert [result.site for result in report.results] == SITES
    for site, result in zip(SITES, report.results, strict=True):
        assert result.entry is not None and result.entry.config == site.candidates(H200)[tune_rows.BEST]
        assert (result.entry.us, result.entry.library_us) == (5.0, 20.0)
        crashed = {"crashed": 1} if site is SITES[0] else {}
        assert result.outcome == {"ok": len(names(site)) - 1 - len(crashed), "unfit": 1, **crashed}
        unfit = site.candidates(H200)[tune_rows.UNFIT]
        assert result.dropped == (f"{unfit.kernel} {unfit}: spills",)
        assert names(site)[tune_rows.UNFIT] not in runs(folder)[: len(names(site))]
    assert set(tuning.load(file)) == {kept, *(result.entry for result in report.results)}
    assert tuning.load(file)[1].versions["torch"] == torch.__version__
    assert (seen[-1].candidates, seen[-1].of) == (len(names(SITES[0])) + len(names(SITES[1])),) * 2
    assert [result for progress in seen for result in progress.fresh] == list(report.results)
    # what is measured is what the plan takes
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folder))
    plan.forget()
    choice = plan.choose_conv(SITES[0].shape, SITES[0].epilogue, torch.bfloat16, "tf32", H200, "auto")
    assert choice.config == SITES[0].candidates(H200)[tune_rows.BEST] and choice.measured_us == 5.0
    # a second call measures nothing, but puts the results into a file that lost them
    file.unlink()
    before = runs(folder)
    assert run_tune(folder) == report
    assert runs(folder) == before and len(tuning.load(file)) == 2


def test_a_chain_is_tuned_like_a_convolution(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [SITES[1], CHAIN]
    report = tune.tune(sites, H200, folder, handler=HANDLER, compiler=None)
    conv, chain = (result.entry for result in report.results)
    assert isinstance(conv, Entry) and isinstance(chain, ChainEntry)
    found = CHAIN.candidates(H200)
    assert (chain.shape, chain.config, chain.us) == (CHAIN.shape, found[tune_rows.BEST], 5.0)
    assert report.results[1].outcome == {"ok": len(found)}
    assert tuning.load(report.file) == [conv, chain]
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(folder))
    plan.forget()
    assert CHAIN.measured(H200) == chain and SITES[1].measured(H200) == conv
    assert tune.tune(sites, H200, folder, handler=HANDLER, compiler=None) == report, "the journal knows both"


def test_a_killed_call_is_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of the command ends its worker too, and costs no candidate."""
    monkeypatch.setenv("TUNE_NAP", "0.2")
    process = multiprocessing.get_context("fork").Process(target=run_tune, args=(folder,))
    process.start()
    give_up = time.monotonic() + 60
    while len(runs(folder)) < 3:
        assert time.monotonic() < give_up and process.is_alive()
        time.sleep(0.02)
    process.kill()
    process.join()
    worker = int((folder.parent / "log").read_text().split()[0])
    while alive(worker):
        assert time.monotonic() < give_up
        time.sleep(0.02)
    before = len(runs(folder))
    finished = tune.journal_of(folder / tuning.file_name(H200.name)).finished
    left = [c for c in SITES[0].candidates(H200) if f"{SITES[0].key} / {c.kernel} {c}" not in finished]
    assert len(names(SITES[0])) - before <= len(left) <= len(names(SITES[0])) - 2
    monkeypatch.setenv("TUNE_NAP", "0")
    report = run_tune(folder)
    assert [r.entry and r.entry.config for r in report.results] == [s.candidates(H200)[tune_rows.BEST] for s in SITES]
    assert [r.outcome for r in report.results] == [{"ok": len(names(site))} for site in SITES]
    again = runs(folder)[before:]
    assert again[: len(left)] == list(map(str, left)), (
        "the one that was running is done again, the finished ones are not"
    )


def test_an_interruption_costs_no_candidate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a candidate runs: its process ends, and the journal says that it was not the candidate's fault."""
    monkeypatch.setenv("TUNE_NAP", "30")

    armed: list[bool] = []

    def interrupt(progress: tune.Progress) -> None:
        if runs(folder) and not armed:
            armed.append(True)
            signal.setitimer(signal.ITIMER_REAL, 0.1)  # while the main thread waits

    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_tune(folder, progress=interrupt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    journal = tune.journal_of(folder / "NVIDIA_H200.json")
    assert not journal.open() and not journal.finished
    assert set(journal.interrupted) == {SITES[0].row_key, f"{SITES[0].key} / conv_tma {runs(folder)[0]}"}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_time_box_is_kept(folder: Path) -> None:
    begun = time.monotonic()
    report = run_tune(folder, minutes=0.01)
    assert time.monotonic() - begun < 10
    assert report.left == tuple(SITES) and not report.results and not report.file.exists()


@pytest.mark.parametrize("text", ["{", '{"format": 99}'], ids=["corrupt", "newer"])
def test_a_bad_file_in_the_way_is_left_alone(folder: Path, text: str) -> None:
    folder.mkdir()
    file = folder / tuning.file_name(H200.name)
    file.write_text(text)
    with pytest.raises(
        ValueError, match=f"{file.name} .*; delete it|{file.name} .*upgrade resnet-triton, or delete it"
    ):
        run_tune(folder)
    assert file.read_text() == text and not runs(folder)


def test_a_second_call_at_once_is_refused(folder: Path) -> None:
    folder.mkdir()
    with (
        tuning.locked((folder / tuning.file_name(H200.name)).with_suffix(".tuning")),
        pytest.raises(OSError, match="another process tunes into"),
    ):
        run_tune(folder)


def test_results_of_other_code_do_not_count(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "x.json"
    folder.mkdir()
    tune.journal_of(file).finish("key", "ok")
    assert tune.journal_of(file).finished
    monkeypatch.setattr(tuning, "versions", lambda: {"triton": "9.9"})
    assert not tune.journal_of(file).finished


# The command


def test_a_dry_run_lists_a_torchvision_model(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["tune", "--model", "torchvision:resnet18", "--batch", "1", "--size", "64", "--device", "NVIDIA H200"]
    assert cli.main([*arguments, "--dtype", "bf16", "fp32", "--dry-run", "--json", "--output", str(folder)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "NVIDIA H200" and found["file"] == str(folder / "NVIDIA_H200.json")
    rows = found["convolutions"]
    assert len(rows) == 2 * 14
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    assert {(row["dtype"], row.get("precision")) for row in rows} == {("bfloat16", None), ("float32", "tf32")}
    assert all(row["measured_us"] is None and row["predicted_us"] > 0 and row["candidates"] >= 4 for row in rows)
    assert not folder.exists()
    assert cli.main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "14 convolutions" in out and "layer1.0.conv1 and 1 more" in out and out.count("not measured") == 14


def test_a_dry_run_lists_chains_behind_the_convolutions(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    arguments = ["tune", "--model", "resnet50", "--batch", "32", "--size", "64", "--device", "NVIDIA H200", "--dry-run"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    chains = found["chains"]
    assert chains and all(row["candidates"] > 0 and row["predicted_us"] > 0 for row in chains)
    assert [row["gain"] for row in chains] == sorted((row["gain"] for row in chains), reverse=True)
    assert all("epilogue" in row for row in found["convolutions"])
    config = ConvConfig("conv_chain", (1, 8, 8), 64, 64)
    entry = ChainEntry(chain_shape_of(chains[0]["shape"]), "bfloat16", config, 7.5, 9.0)
    tuning.merge(tuning.cache_dir() / "NVIDIA_H200.json", "NVIDIA H200", [entry])
    plan.forget()
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith(f"{len(found['convolutions'])} convolutions and {len(chains)} chains, ")
    (line,) = [line for line in out if line.endswith(" 7.5")]
    assert f"{entry.shape}" in line and " chain " in line


def test_a_dry_run_shows_what_is_measured(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    shape = ConvShape(1, 16, 16, 64, 64, 3, 3, 1, 1)
    entry = Entry(shape, "bfloat16", True, ConvConfig("conv_tma", (1, 8, 8), 64, 64), 1.5, 2.0)
    tuning.merge(tuning.cache_dir() / "NVIDIA_H200.json", "NVIDIA H200", [entry])
    assert cli.main(["tune", "--model", "resnet18", "--batch", "1", "--size", "64", "--dry-run"]) == 0
    printed = capsys.readouterr()
    (line,) = [line for line in printed.out.splitlines() if line.endswith(" 1.5")]
    assert "layer1.0.conv2 and 1 more" in line
    if not torch.cuda.is_available():
        assert "planned for NVIDIA H200" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dry-run", "--device", "NVIDIA H300"], "known: 'NVIDIA H200'"),
        (["--dry-run", "--device", "cpu"], "--device 'cpu' is no GPU"),
        (["--minutes", "0"], "must be a number of minutes above 0"),
        (["--minutes", "nan"], "must be a number of minutes above 0"),
        (["--batch", "0"], "must be an integer above 0"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune"]) == 2
    message = (
        "resnet-triton tune: tuning needs a CUDA device, and there is none; --dry-run lists what would be measured\n"
    )
    assert capsys.readouterr().err == message


def planted_report(folder: Path) -> Report:
    good = Entry(SITES[0].shape, "bfloat16", False, SITES[0].candidates(H200)[0], 10.0, 15.0)
    results = (
        Result(SITES[0], good, "", {"ok": 11, "unfit": 1}, ("conv_tma x: spills",)),
        Result(SITES[1], None, "none of 12 works", {"error": 12}),
        Result(CHAIN, ChainEntry(CHAIN.shape, "bfloat16", CHAIN.candidates(H200)[0], 20.0, 50.0), "", {"ok": 7}),
    )
    return Report(folder / "NVIDIA_H200.json", results, (SITES[1],))


@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_command_prints(
    as_json: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 where no candidate of a convolution works."""

    def planted(sites, target, output: Path, *, device: str, minutes: float, fresh: bool, progress) -> Report:
        assert (len(sites), output, device, minutes, fresh) == (14, folder, "cuda", 2.5, False)
        report = planted_report(output)
        progress(tune.Progress(24, 24, report.results))
        return report

    monkeypatch.setattr(command, "_device", lambda args: ("cuda", H200))
    monkeypatch.setattr(command, "tune", planted)
    arguments = ["--model", "resnet18", "--batch", "1", "--size", "64", "--minutes", "2.5", "--output", str(folder)]
    assert cli.main(["tune", *arguments, *(["--json"] if as_json else [])]) == 1
    printed = capsys.readouterr()
    if as_json:
        found = json.loads(printed.out)
        assert not printed.err
        assert [row.get("us") for row in found["convolutions"]] == [10.0, None] and len(found["left"]) == 1
        (chain,) = found["chains"]
        assert (chain["us"], chain["library_us"], chain["gain"]) == (20.0, 50.0, 0.1)
        assert chain["shape"]["conv"]["c"] == 128 and chain["shape"]["reduce"] is None
        assert found["convolutions"][0]["config"]["kernel"] == "conv_tma"
        assert found["convolutions"][0]["dropped"] == ["conv_tma x: spills"]
    else:
        assert "10.0" in printed.out and "1.50x" in printed.out and "11 ok, 1 unfit" in printed.out
        assert "1 candidates were dropped before they ran" in printed.out
        assert "3 of 3 convolutions and 1 chains measured on NVIDIA H200" in printed.out
        assert "1 are left" in printed.out and "2.50x" in printed.out and "layer2.1.conv3 and 1 more" in printed.out
        assert "none of 12 works" in printed.err and "10.0 us, cudnn 15.0 us, 1.50x" in printed.err


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments, **options) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_device", lambda args: ("cuda", H200))
    monkeypatch.setattr(command, "tune", interrupted)
    assert cli.main(["tune", "--model", "resnet18", "--batch", "1", "--size", "64"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


# At a first call


class Problem:
    """A convolution whose second candidate is fastest."""

    def __init__(self, *arguments) -> None:
        self.times = iter((9.0, 4.0, *range(10, 30)))

    def validate(self, config: ConvConfig) -> None:
        return None

    def time(self, config: ConvConfig) -> Timing:
        return Timing(float(next(self.times)), 20.0)


def test_a_first_call_measures_once_and_keeps_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    site = SITES[0]
    monkeypatch.setattr(measure, "ConvProblem", Problem)
    monkeypatch.setattr(plan, "AUTOTUNE", True)
    monkeypatch.setattr(tune, "_tried", set())
    arguments = (site.shape, site.epilogue, site.dtype, site.precision, H200)
    assert not tune.tune_now(*arguments), "there is no such GPU here"
    monkeypatch.setattr(tune, "_runs_on", lambda target: True)
    with Recorder(H200):
        assert plan.choose_conv(*arguments, "auto").measured_us is None, "explain measures nothing"
    choice = plan.choose_conv(*arguments, "auto")
    assert choice.measured_us is not None
    (entry,) = tuning.load(tuning.cache_dir() / "NVIDIA_H200.json")
    assert entry.config == choice.config
    assert not tune.tune_now(*arguments)


def test_a_first_call_that_cannot_measure_goes_on(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def full(*arguments) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(measure, "ConvProblem", full)
    monkeypatch.setattr(tune, "_runs_on", lambda target: True)
    monkeypatch.setattr(tune, "_tried", set())
    site = SITES[1]
    assert not tune.tune_now(site.shape, site.epilogue, site.dtype, site.precision, H200)
    assert "stays unmeasured: CUDA out of memory" in caplog.text
    assert not (tuning.cache_dir() / "NVIDIA_H200.json").exists()


def test_the_journal_lies_beside_the_file(folder: Path) -> None:
    assert tune.journal_of(folder / "NVIDIA_H200.json").path == folder / "NVIDIA_H200.jsonl"
    assert isinstance(tune.journal_of(folder / "NVIDIA_H200.json"), Journal)

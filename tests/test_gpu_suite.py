"""`bench/gpu_suite.py` without a GPU: planted faults cost their own row, calls resume, time is kept."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_suite
from bench import report as bench_report
from bench.gpu import check, limits, precompile, report, steps, training, tune
from bench.gpu import suite as suite_module
from bench.gpu.check_run import CHECKS
from bench.gpu.rows import Row, child_env, run_rows
from resnet_triton import chains, codegen, results, tuning
from resnet_triton.devices import known_devices
from resnet_triton.journal import Journal
from resnet_triton.kernels.config import ALL_KERNELS, CHAIN_KERNELS, END_KERNELS, TRAIN_KERNELS, ConvConfig
from resnet_triton.results import Row as Result
from resnet_triton.sites import Site, site_of
from resnet_triton.training import plan
from tests import gpu_suite_rows

ROOT = Path(__file__).resolve().parents[1]
H200 = known_devices()["NVIDIA H200"]
HANDLER = "tests.gpu_suite_rows:handle"


def suite(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, "bench/gpu_suite.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=child_env())


def started(out: Path) -> int:
    return sum('"event": "start"' in line for line in (out / "journal.jsonl").read_text().splitlines())


def rows_for(tmp_path: Path, **what: str) -> list[Row]:
    payload = {"log": str(tmp_path / "log")}
    return [
        Row(key, f"kernel {key}", f"config {key}", 2.0 if do == "hang" else 60.0, {**payload, "do": do})
        for key, do in what.items()
    ]


def test_planted_faults_cost_their_row_only(tmp_path) -> None:
    rows = rows_for(tmp_path, a="ok", b="signal", c="ok", d="wrong", e="hang", f="raise", g="ok")
    journal = Journal(tmp_path / "journal.jsonl", "code")
    run_rows(rows, HANDLER, journal, deadline=time.monotonic() + 60)
    status = {key: journal.finished[key]["status"] for key in "abcdefg"}
    assert status == dict(a="ok", b="crashed", c="ok", d="wrong", e="hung", f="error", g="ok")  # noqa: C408
    details = {key: journal.finished[key]["detail"] for key in "bdef"}
    assert "SIGSEGV" in details["b"] and "no end after 2.0 s" in details["e"]
    assert "RuntimeError: planted" in details["f"] and details["d"] == "planted"
    problems = report.problems(journal.finished.values())
    text = report.table({"device": "x", "seconds": 1.0, "steps": [], "problems": problems})
    for key, status in zip("bdef", ("crashed", "wrong", "hung", "error"), strict=True):
        assert f"! {status}: {key} [kernel {key} config {key}]" in text
    # a second call has nothing to do; one with other code does it all again
    before = (tmp_path / "log").read_text().split()
    assert before == list("abcdefg")
    run_rows(rows, HANDLER, Journal(tmp_path / "journal.jsonl", "code"), deadline=time.monotonic() + 60)
    assert (tmp_path / "log").read_text().split() == before
    changed = Journal(tmp_path / "journal.jsonl", "other code")
    run_rows(rows[:1], HANDLER, changed, deadline=time.monotonic() + 60)
    assert list(changed.finished) == ["a"]


def test_planted_faults_in_the_tuner_cost_their_candidate_only(tmp_path) -> None:
    journal = Journal(tmp_path / "journal.jsonl", "code")
    row = Row("tune whole", "tuner", "all", 60.0, {})
    run_rows([row], "tests.gpu_suite_rows:tune", journal, deadline=time.monotonic() + 60)
    configs = [str(config) for config in gpu_suite_rows.CONFIGS]
    status = {r["config"]: r["status"] for key, r in journal.finished.items() if " / " in key}
    wanted = ("crashed", "hung", "error", "wrong", "ok", "ok")
    assert status == dict(zip(configs, wanted, strict=True))
    assert journal.finished["tune whole"]["status"] == "ok"
    entries, _ = tune.results(with_layer(journal))
    assert [e.config for e in entries] == gpu_suite_rows.CONFIGS[5:]


def with_layer(journal: Journal) -> Journal:
    journal.finished["tune whole"]["layer"] = {}
    return journal


def test_time_box(tmp_path) -> None:
    """The row that runs at the deadline is stopped and done again by the next call; later ones never start."""
    log = {"log": str(tmp_path / "log"), "do": "nap"}
    rows = [Row(str(i), "-", "-", 60.0, {**log, "s": s}) for i, s in enumerate((0.01, 300, 0.01))]
    journal = Journal(tmp_path / "journal.jsonl")
    begun = time.monotonic()
    run_rows(rows, HANDLER, journal, deadline=begun + 6)
    assert time.monotonic() - begun < 12
    assert list(journal.finished) == ["0"] and not journal.open()
    rows[1] = Row("1", "-", "-", 60.0, {**log, "s": 0.01})
    run_rows(rows, HANDLER, journal, deadline=time.monotonic() + 60, workers=2)
    assert sorted(journal.finished) == ["0", "1", "2"]
    assert sorted((tmp_path / "log").read_text().split()) == ["0", "1", "1", "2"]


def test_worker_that_cannot_start_is_reported(tmp_path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    rows = rows_for(tmp_path, a="ok")
    run_rows(rows, "tests.no_such_module:handle", journal, deadline=time.monotonic() + 60)
    assert journal.finished["a"]["status"] == "crashed"
    assert "no_such_module" in journal.finished["a"]["detail"]


def test_dry_run_end_to_end(tmp_path, capsys) -> None:
    arguments = ("--dry-run", "--minutes", "2", "--out", tmp_path, "--steps", "environment,limits,check,tune")
    done = suite(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not measured: no CUDA device" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "environment.json", "limits.json", "check.csv", "dry-run.json", "layers.csv", "journal.jsonl", "summary.json",
    }  # fmt: skip
    with (tmp_path / "check.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(check.dry_rows()) and {line["status"] for line in lines} == {"ok"}
    assert {line["kernel"] for line in lines} >= {
        "conv_tma", "conv1x1", "conv_pointer", *CHAIN_KERNELS, *END_KERNELS, "bn_act", "max_pool", "fold_bn",
    }  # fmt: skip
    entries = tuning.load(tmp_path / "dry-run.json")
    assert [entry.config.kernel for entry in entries] == ["conv_tma", "conv1x1", "conv_chain", "wgrad"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [step["name"] for step in summary["steps"]] == ["environment", "limits", "check", "tune"]
    assert summary["problems"] == []
    # the table comes last
    assert done.stdout.strip().splitlines()[-1].startswith("tune")
    count = started(tmp_path)
    capsys.readouterr()
    assert gpu_suite.main([str(argument) for argument in arguments]) == 0
    assert f"{len(lines)} ok of {len(lines)}" in capsys.readouterr().out
    unchanged = json.loads((tmp_path / "summary.json").read_text())["code"] == summary["code"]
    assert started(tmp_path) == count or not unchanged, "finished rows are run again only if their code was edited"


def test_whole_call_keeps_its_time(tmp_path) -> None:
    (tmp_path / "layers.csv").write_text("of an earlier call")
    begun = time.monotonic()
    out = str(tmp_path)
    assert gpu_suite.main(["--dry-run", "--minutes", "0.05", "--out", out, "--steps", "check,tune", "--fresh"]) == 0
    assert time.monotonic() - begun < 25
    assert not (tmp_path / "layers.csv").exists()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "no time" in {step["state"] for step in summary["steps"]}


def test_list_and_refusals(tmp_path, capsys) -> None:
    assert gpu_suite.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [
        "environment",
        "limits",
        "check",
        "tune",
        "train",
        "bench",
    ]
    assert gpu_suite.main(["--steps", "limits,tests", "--out", str(tmp_path)]) == 2
    assert "unknown tests" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu_suite.main(["--out", str(tmp_path / "none")]) == 2
        refusal = "gpu_suite: no CUDA device: run this on a machine with a GPU, or try it with --dry-run"
        assert capsys.readouterr().err.strip() == refusal
        assert not (tmp_path / "none").exists()


def test_results_of_another_gpu_are_refused(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "environment.json").write_text(json.dumps({"device": {"name": "Other GPU"}}))
    assert gpu_suite.main(["--dry-run", "--out", str(tmp_path)]) == 2
    assert "holds results of Other GPU, this is dry-run" in capsys.readouterr().err


def test_visit_where_every_row_fails(tmp_path, monkeypatch, capsys) -> None:
    """The steps of a real visit on a pretended H200: the failures are reported, every step is reached."""
    device = {"name": "NVIDIA H200", "sm": 90, "multiprocessors": 132, "shared_memory": 232448}
    environment = {"device": device, "nvidia_smi": {}, "torch": "2", "triton": "3"}
    broken = rows_for(tmp_path, a="raise", b="raise", c="wrong")

    def pretended(options, started: float) -> suite_module.Suite:
        return suite_module.Suite(options.out, 60 * options.minutes, False, started, environment)

    monkeypatch.setattr(gpu_suite, "open_suite", pretended)
    monkeypatch.setattr(check, "HANDLER", HANDLER)
    monkeypatch.setattr(check, "compile_jobs", lambda target: [])
    monkeypatch.setattr(check, "rows", lambda target: broken)
    monkeypatch.setattr(check, "sanitizer_rows", lambda target: [])
    monkeypatch.setattr(steps, "pytest_gpu", lambda suite, deadline: None)
    monkeypatch.setattr(tune, "HANDLER", HANDLER)
    monkeypatch.setattr(tune, "compile_jobs", lambda target: [])
    monkeypatch.setattr(tune, "rows", lambda target: [Row("tune x", "tuner", "all", 60.0, broken[0].payload)])
    monkeypatch.setattr(limits, "rows", lambda: [Row("limit x", "none", "-", 60.0, {"what": "no such measurement"})])
    monkeypatch.setattr(steps, "CHECK_WORKERS", 1)
    names = "environment,limits,check,tune"
    assert gpu_suite.main(["--minutes", "2", "--out", str(tmp_path), "--steps", names]) == 1
    out = capsys.readouterr().out
    assert "check        done" in out and "2 error, 1 wrong of 3" in out
    assert "! error: a [kernel a config a] and 2 more alike RuntimeError: planted" in out
    assert "! wrong: c [kernel c config c] planted" in out
    assert "0 of 1 convolutions, chains and steps of training" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {p["key"] for p in summary["problems"]} == {"a", "b", "c", "tune x", "limit x"}
    assert json.loads((tmp_path / "limits.json").read_text())["devices.json"] == {"NVIDIA H200": None}


def test_rows_of_a_real_visit() -> None:
    """The queue for an H200: unique names, every kernel and dtype, ResNet-50's convolutions in bf16 first."""
    rows = check.rows(H200)
    assert len({row.key for row in rows}) == len(rows)
    assert all(row.key.startswith("resnet50.") and "bfloat16" in row.key for row in rows[:20])
    conv = [row for row in rows if row.payload["what"] == "conv"]
    found = {(row.payload["dtype"], row.kernel) for row in conv}
    assert found >= {(d, k) for d in check.DTYPES if d != "ieee" for k in ("conv_tma", "conv1x1", "conv_pointer")}
    assert {kernel for dtype, kernel in found if dtype == "ieee"} == {"conv_pointer"}
    assert {row.payload["what"] for row in (*rows, *training.check_rows(H200))} == set(CHECKS)
    tuned = tune.rows(H200)
    assert len({row.key for row in tuned}) == len(tuned)
    assert {row.payload["shape"]["n"] for row in tuned[:20]} == {256}
    measured = limits.rows()
    assert len({row.key for row in measured}) == len(measured)
    trained = [row for row in tuned if "work" in row.payload]
    assert len(trained) > 80 and trained == tuned[-len(trained) :], "behind everything else"
    chained = [row for row in tuned if "chain" in row.payload]
    assert {chain["chain"]["expand"]["n"] for chain in (row.payload for row in chained)} == {256, 32}
    assert tuned.index(chained[0]) == len(tune.sites(50, 256, "float16", H200)), "behind the convolutions of batch 256"
    jobs = precompile.distinct([*check.compile_jobs(H200), *tune.compile_jobs(H200)])
    assert len(jobs) > 1000 and json.loads(json.dumps(jobs)) == jobs
    json.dumps([row.payload for row in [*rows, *tuned, *measured]])


def test_training_of_a_real_visit() -> None:
    """Every training kernel has its check, its small case for compute-sanitizer, and its time; names are unique."""
    checked, timed = training.check_rows(H200), training.timed_rows(H200)
    sanitized = training.sanitizer_rows(H200)
    for rows in (checked, timed, sanitized):
        assert len({row.key for row in rows}) == len(rows)
        json.dumps([row.payload for row in rows])
    for rows in (checked, sanitized):
        assert {row.kernel for row in rows} >= {*TRAIN_KERNELS}
        models = [row.payload for row in rows if row.payload["what"] == "train model"]
        launched = {kernel for payload in models for kernel in payload["kernels"]}
        assert launched >= {"finalise", "bn_apply", "bn_relu_pool", "bn_relu_pool_backward", "expand", "gram_dgrad"}
    for dtype in check.DTYPES:
        found = {row.kernel for row in checked if row.payload.get("dtype") == dtype}
        assert found >= {"conv_stats", "dgrad", "wgrad", "expand", "gram_dgrad"}, dtype
    steps_timed = [row for row in timed if row.payload["what"] == "step"]
    assert {row.kernel for row in steps_timed} >= {"conv_stats", "dgrad", "wgrad", "expand", "gram_dgrad"}
    assert {row.payload["work"]["step"] for row in steps_timed} == {*plan.TUNED_STEPS}
    assert timed[0].payload["group"]["model"] == "resnet50" and timed[0].payload["group"]["batch"] == 256
    peers = [row for row in timed if row.key.endswith("with torch.compile")]
    assert [row.payload["group"]["model"] for row in peers] == ["resnet50", "resnet18"]
    older = known_devices()["NVIDIA A100-SXM4-80GB"]
    assert not training.check_rows(older) and not training.sanitizer_rows(older)
    assert {row.payload["what"] for row in training.timed_rows(older)} == {"network"}


def test_training_dry_run(tmp_path) -> None:
    """The train step alone: checks in the interpreter, a network on the CPU, results that the report reads."""
    out = str(tmp_path / "run")
    assert gpu_suite.main(["--dry-run", "--minutes", "5", "--out", out, "--steps", "environment,train"]) == 0
    with (tmp_path / "run/check.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(training.dry_rows()) and {line["status"] for line in lines} == {"ok"}
    assert {line["kernel"] for line in lines} >= {"conv_stats", "dgrad", "wgrad", "expand", "gram_dgrad"}
    (rows, _) = results.load(tmp_path / "run/training.json")
    by_name = {row.provider: row for row in rows}
    assert set(by_name) == {"eager channels_last", "ours"} and by_name["ours"].status == "ok"
    assert by_name["ours"].train_step_time > 0 and by_name["ours"].saved_mb_per_image > 0
    ((found, _),) = bench_report.found_in(tmp_path)
    assert found == rows


def test_times_of_a_step_replace_those_of_a_call_before(tmp_path) -> None:
    """A network measured with a slow peer takes the place of the quick run; a failure does not."""
    made = suite_module.Suite(tmp_path, 60.0, True, 0.0, {"device": None})

    def row(ms: float, status: str = "ok") -> dict:
        return vars(Result("training", "cpu", "ours", "resnet50", "float32", status, train_step_time=ms))

    for key, rows in (("train a", [row(2.0)]), ("train b", [row(1.0)]), ("train c", [row(0.0, "failed: planted")])):
        made.training.start(key)
        made.training.finish(key, "ok", rows=rows, environment={"device": "cpu"})
    steps.write_training(made)
    ((found,), env) = results.load(tmp_path / "training.json")
    assert found.train_step_time == 1.0 and env == {"device": "cpu"}


def test_chains_of_a_real_visit() -> None:
    """As planned at batch 256 and 32, with whatever a chain leaves out; both kernels; odd sizes; gamma 0; repeats."""
    rows = check.rows(H200)
    blocks = [row for row in rows if row.payload["what"] == "block"]
    planned = {row.key for row in blocks if row.payload["config"] is None}
    for dtype, batches in (("bfloat16", (256, 32)), ("float16", (32,))):
        for batch in batches:
            for _, tail in chains.bottleneck_tails(50, batch, 224):
                chain = chains.choose_chain(tail, getattr(torch, dtype), "tf32", H200, "triton")
                kernel = chain and chain.choice.realisation
                shape = str(chains.chain_shape(tail, frozenset(tail.sites()) - {"last"}))
                assert chain is None or any(f" {shape} {dtype} {kernel}" in key for key in planned)
    assert sum("last gamma 0" in key for key in planned) == 3 and any("225x225" in key for key in planned)
    assert any(row.payload["pool"] and row.kernel == "conv1x1_pool" for row in blocks)
    for kernel in CHAIN_KERNELS:
        assert any(row.payload["config"] and row.kernel == kernel for row in blocks)
        assert any(row.payload["what"] == "repeat block" and row.kernel == kernel for row in rows)
    sanitized = {row.kernel for row in check.sanitizer_rows(H200)}
    assert sanitized >= {*ALL_KERNELS, "bn_act", "max_pool", "fold_bn", "add_relu"}


def test_where_chains_do_not_run_none_is_checked() -> None:
    older = known_devices()["NVIDIA A100-SXM4-80GB"]
    kernels = {row.kernel for row in (*check.rows(older), *check.sanitizer_rows(older))}
    assert not kernels & {*CHAIN_KERNELS, *END_KERNELS, "conv_rolling"} and "conv_pointer" in kernels
    assert not any({"chain", "work"} & set(row.payload) for row in tune.rows(older))


def test_jobs_of_chains_are_their_real_launches() -> None:
    jobs = [job for job in precompile.distinct(check.compile_jobs(H200)) if "chain" in job]
    assert len(jobs) > 20
    for job in jobs[:3] + jobs[-3:]:
        config, site = ConvConfig.from_dict(job["config"]), site_of(job)
        (launch,) = codegen.chain_launches(site.shape, site.dtype, "tf32", config, 132, torch.float32)
        assert launch.kernel.__name__ == config.kernel and launch.kwargs["num_warps"] == config.warps


def test_large_rows_are_large() -> None:
    rows = [row for row in check.rows(H200) if row.payload["what"] == "large conv"]
    assert len(rows) == 3
    for row in rows:
        s = check.ConvShape(**row.payload["shape"])
        assert max(s.n * s.h * s.w * s.c, s.m * s.k) > 2**31


def test_device_record_is_what_the_planner_reads() -> None:
    def row(value: float, status: str = "ok", **more: object) -> dict:
        return {"value": value, "status": status, "config": "c", **more}

    results = {
        "limit copy torch": row(4.2),
        "limit l2 distinct a": row(5.9),
        "limit l2 distinct b": row(9.9, "wrong"),
        "limit l2 shared a": row(7.0),
        "limit matmul bfloat16": row(780.0, sm_clock_mhz=1755),
        "limit matmul tf32": row(400.0),
    }
    device = {"sm": 90, "multiprocessors": 132, "shared_memory": 232448, "torch": "2", "triton": "3", "driver": "5"}
    record = limits.record(results, device)
    assert record is not None
    shipped = json.loads((ROOT / "resnet_triton/devices.json").read_text())["NVIDIA H200"]
    assert set(record) == set(shipped) and set(record["tensor_tflops"]) == set(shipped["tensor_tflops"])
    assert record["l2_tb_s"] == 5.9, "a wrong result does not count"
    assert record["tensor_tflops"] == {"bfloat16": 780.0, "float16": 780.0, "tf32": 400.0}
    assert limits.record({}, device) is None


def test_totals_need_every_layer() -> None:
    lines = []
    for site in tune.sites(50, 256, "bfloat16", H200):
        epilogue = str(site.epilogue) if isinstance(site, Site) else tune.CHAIN
        lines.append({"shape": str(site.shape), "dtype": "bfloat16", "epilogue": epilogue})
        lines[-1] |= {"ours_us": 100.0, "cudnn_passes_us": 250.0, "cudnn_conv_us": 90.0, "speedup": 2.5}
    (total,) = tune.totals(lines, H200)
    assert total["convs"] == 52 and total["ours_ms"] == pytest.approx(5.2) and total["speedup"] == 2.5
    assert tune.totals(lines[1:], H200) == []

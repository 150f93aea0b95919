"""The bench: its gate, clock and files, and a tiny run of `pytest bench/` with a wrong provider among others."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")

from bench import RESULTS, bounds, groups, layers, plots, report, training, training_layers, training_providers
from bench.conftest import Lab
from bench.gpu.suite import BESIDE
from resnet_triton import chains, compare, errors, plan, providers, results, tables, timing, tuning
from resnet_triton.compare import Group
from resnet_triton.devices import known_devices
from resnet_triton.kernels.config import ALL_KERNELS, TRAIN_KERNELS, ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.results import NO_CUDA, Row
from resnet_triton.shapes import BN_ADD_RELU

ROOT = Path(__file__).resolve().parent.parent

PLANTED = """
import torch
from resnet_triton import providers

def wrong(model, x, dtype):
    call = providers.ours(model, x, dtype)
    return lambda: call() * 1.001

def greedy(model, x, dtype):
    if len(x) > 1:
        raise torch.OutOfMemoryError("planted")
    return lambda: model(x)

providers.PROVIDERS.append(providers.Provider("ours planted", wrong, ours=True, devices=("cpu",)))
providers.PROVIDERS.append(providers.Provider("greedy", greedy, devices=("cpu",)))
"""


def run_bench(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess:
    """A smoke run of the bench in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "pytest", *args, "-p", "no:cacheprovider"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    settings = {"RESNET_TRITON_BENCH": "smoke", "RESNET_TRITON_BENCH_RESULTS": str(tmp_path), "OMP_NUM_THREADS": "1"}
    settings["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(
        command, cwd=ROOT, env=inherited | settings | env, capture_output=True, text=True, timeout=300
    )


def test_a_wrong_provider_gets_no_speed_and_fails_and_the_others_are_measured(tmp_path):
    (tmp_path / "planted.py").write_text(PLANTED)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    stats = tmp_path / "stats.json"
    done = run_bench(
        tmp_path, "bench/test_models.py", "-p", "planted", f"--benchmark-json={stats}", PYTHONPATH=path, CXX="missing"
    )

    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    rows, env = results.load(tmp_path / "cpu" / "partial.json")
    assert not (tmp_path / "cpu" / "latest.json").exists()
    by_name = {(row.provider, row.device): row for row in rows}
    wrong = by_name["ours planted", "cpu"]
    assert wrong.status.startswith("WRONG: RMS error")
    assert wrong.samples == [] and wrong.infer_samples_per_sec is None and wrong.speedup is None
    for name in ("eager", "eager channels_last", "ours", "ours folded", "greedy"):
        assert by_name[name, "cpu"].status == "ok" and by_name[name, "cpu"].rounds >= 3
    assert by_name["torch.compile", "cpu"].status == "needs g++"
    assert len({row.rounds for row in rows if row.status == "ok"}) == 1
    assert env["torch"] == torch.__version__

    halved = "batch 2 ran out of memory (greedy, float32), all use batch 1"
    assert {row.infer_batch_size for row in rows if row.device == "cpu"} == {1}
    assert all(row.note == halved for row in rows if row.device == "cpu")
    assert f"resnet18: {halved}" in done.stdout

    table = done.stdout[done.stdout.index("throughput and accuracy") :]
    (planted,) = (line for line in table.splitlines() if "ours planted  " in line)
    assert planted.split("ours planted")[1].strip() == wrong.status
    (eager,) = (line for line in table.splitlines() if "float32   eager  " in line)
    assert "1.00x" in eager
    assert "needs g++" in table and NO_CUDA in table

    for row in rows:  # nothing but a prediction on a row that no GPU measured
        if row.device == "cuda":
            assert row.status == NO_CUDA
            assert row.infer_samples_per_sec is row.infer_step_time is row.error is row.tflops is None
            assert (row.predicted_step_time is None) == (row.predicted_for is None)

    kept = {bench["extra_info"]["provider"]: bench for bench in json.loads(stats.read_text())["benchmarks"]}
    assert set(kept) == {"eager", "eager channels_last", "ours", "ours folded", "greedy"}
    ours = by_name["ours", "cpu"]
    assert kept["ours"]["stats"]["data"] == ours.samples
    assert kept["ours"]["group"] == "resnet18 batch 1 float32"


def test_the_bench_refuses_interpreter_and_workers(tmp_path):
    done = run_bench(tmp_path, "bench/", TRITON_INTERPRET="1")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and "unset TRITON_INTERPRET" in done.stderr


@pytest.mark.parametrize(
    ("error", "eager", "dtype", "ours", "right"),
    [
        (2e-6, 1e-6, "float32", True, True),
        (2.1e-6, 1e-6, "float32", True, False),
        (9e-6, 1e-6, "float32", False, True),
        (11e-6, 1e-6, "float32", False, False),
        (2e-3, 0.0, "bfloat16", True, True),  # half a unit in the last place
        (5e-3, 1e-3, "bfloat16", True, False),
        (float("inf"), float("inf"), "float16", True, False),
    ],
)
def test_gate(error, eager, dtype, ours, right):
    found = errors.gate(errors.Error(error, error), errors.Error(eager, eager), dtype, ours)
    assert found.startswith("ok" if right else "WRONG")


def test_gate_of_one_value_among_many():
    """What the root mean square hides, the largest error shows."""
    exact = torch.ones(1_000_000, dtype=torch.float64)
    eager = errors.relative_error(exact + 1e-6, exact)
    wrong = exact + 1e-6
    wrong[7] += 4e-6
    assert errors.relative_error(wrong, exact).rms < 1.1 * eager.rms
    assert errors.gate(errors.relative_error(wrong, exact), eager, "float32", True).startswith("WRONG: largest error")
    assert errors.gate(errors.relative_error(exact + 1.9e-6, exact), eager, "float32", True) == "ok"


def test_relative_error():
    exact = torch.tensor([[1.0, -4.0]], dtype=torch.float64)
    assert errors.relative_error(exact.float() + 0.5, exact) == (0.125, 0.125)
    assert errors.relative_error(torch.tensor([[1.0, -3.0]]), exact) == (0.5**0.5 / 4, 0.25)
    assert errors.relative_error(exact.float() * float("nan"), exact) == errors.UNUSABLE
    assert errors.relative_error(exact.float()[:, :1], exact) == errors.UNUSABLE
    assert errors.relative_error(exact.float(), exact) == errors.EXACT


def test_calls_are_interleaved_and_the_first_one_rotates():
    order, made = [], iter(range(1000))

    def clock(call):
        order.append(call())
        return timing.Sample(float(next(made)))

    calls = {name: (lambda name=name: name) for name in "abc"}
    samples = timing.interleave(calls, clock, 0.0, warmup=1, min_rounds=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [s.seconds for s in samples["a"]] == [3, 8, 10, 12]  # none of the warm-up
    assert {len(found) for found in samples.values()} == {4}


def test_rounds_follow_the_budget():
    samples = timing.interleave({"a": lambda: None}, timing.cpu_clock, 60.0, max_rounds=7)
    assert len(samples["a"]) == 7
    assert timing.interleave({}, timing.cpu_clock, 1.0) == {}


def test_other_processes_are_noticed():
    if timing.busy_seconds() is None:
        return  # no /proc/stat: nothing is claimed, which the report shows as an empty cell
    with timing.Bystanders() as bystanders:
        subprocess.run([sys.executable, "-c", "s = sum(range(10**8))"], check=True)
    assert bystanders.share is not None and bystanders.share > 0.5 / len(os.sched_getaffinity(0))


def test_percentiles():
    assert timing.percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


@pytest.fixture
def rows() -> list[Row]:
    measured = Row("models", "cpu", "ours", "resnet18", "float32", infer_batch_size=2, infer_gmacs=1.5)
    compare.fill_times(measured, [timing.Sample(s) for s in (0.01, 0.02, 0.04)])
    missing = Row("models", "cpu", "torch.compile", "resnet18", "float32", "needs g++", infer_batch_size=2)
    gpu = [Row("models", "cuda", name, "resnet18", "bfloat16", NO_CUDA, infer_batch_size=2) for name in "abc"]
    gpu[0].predicted_step_time, gpu[0].predicted_for = 1.25, "NVIDIA H200"
    return [measured, missing, *gpu]


def test_what_compares_and_draws_is_no_part_of_what_is_checked():
    """A change of these modules keeps the GPU suite's results, so no kernel, op or plan may depend on them."""
    package = ROOT / "resnet_triton"
    names = {Path(name).stem for name in BESIDE}
    assert names <= {path.stem for path in package.glob("*.py")}
    for path in package.glob("*.py"):
        if path.name not in BESIDE:
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            used = {node.module for node in nodes if node.level and node.module in names}
            assert used <= ({"plot"} if path.name == "explain.py" else set()), path.name


def test_throughput(rows):
    assert rows[0].infer_samples_per_sec == pytest.approx(100)
    assert rows[0].infer_step_time == pytest.approx(20)
    assert rows[0].tflops == pytest.approx(2 * 1.5 * 100 / 1e3)


def test_files_are_written_and_read_again(rows, tmp_path):
    env = results.environment()
    path = results.save(tmp_path / results.folder_name("NVIDIA H200 (a/b)"), rows, env)
    assert path.parent.name == "NVIDIA_H200_a_b_"
    assert results.load(path) == (rows, env)
    with path.with_suffix(".csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[0]["infer_samples_per_sec"]) == pytest.approx(100)
    assert table[1]["infer_samples_per_sec"] == "" and table[1]["status"] == "needs g++"
    assert {"infer_step_time", "infer_batch_size", "infer_img_size", "param_count", "infer_gmacs"} <= set(table[0])


@pytest.mark.parametrize("text", ["", "{}", '{"format": 0}', '{"format": 1, "rows": [{"a": 1}], "environment": {}}'])
def test_a_foreign_file_is_named(tmp_path, text):
    (tmp_path / "latest.json").write_text(text)
    with pytest.raises(ValueError, match=r"latest\.json is no result of a bench"):
        results.load(tmp_path / "latest.json")


def test_tables(rows):
    env = results.environment()
    assert tables.busy(rows) is None
    rows[0].others_cpu = 0.4
    text = "\n".join(report.terminal(rows, env))
    assert (
        "100" in text
        and "needs g++" in text
        and "while 1 of 1 rows were timed, other processes took up to 40% of its cores" in text
    )
    assert "not measured: no CUDA device; predicted 1.25 ms on NVIDIA H200" in text
    assert "b; c" in text, "rows without a prediction share a line"
    assert "top-1" not in text.split("images/s from")[0], "empty columns are left out"
    page = report.page([(rows, env)])
    assert page.startswith("<!-- Generated by")
    for section in page.split("\n\n"):
        assert len({line.count("|") for line in section.splitlines() if line.startswith("|")}) <= 1


def test_report_command(rows, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    page = tmp_path / "docs" / "performance.md"
    assert report.main(["--results", str(tmp_path), "--page", str(page)]) == 1
    results.save(tmp_path / "cpu", rows, results.environment())
    assert report.main(["--results", str(tmp_path), "--page", str(page)]) == 0
    assert "resnet18" in page.read_text() and "resnet18" in capsys.readouterr().out
    assert {file.name for file in (page.parent / "images").iterdir()} == {"cpu-throughput.svg", "roofline.svg"}
    assert all(f"](images/{file.name})" in page.read_text() for file in (page.parent / "images").iterdir())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report.main(["--results", str(tmp_path), "--page", str(page)]) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


def test_roofline_fills_only_what_was_measured_on_its_device(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    layer = layers.conv_layers(plots.BATCH, ("layer1.0.conv2",))[0]
    row = Row("layers", "NVIDIA H200", layers.OURS, layer.name, "bfloat16", infer_batch_size=plots.BATCH)
    row.infer_gmacs = layer.macs / plots.BATCH / 1e9
    unmeasured = results.Row(**vars(row))
    compare.fill_times(row, [timing.Sample(1e-4)] * 3)
    elsewhere = results.Row(**{**vars(row), "device": "NVIDIA L4"})
    assert plots.on_roofline([row, unmeasured, elsewhere]) == [row]
    plots.draw_roofline([row], tmp_path / "some.svg")
    plots.draw_roofline([elsewhere], tmp_path / "none.svg")
    some, none = ((tmp_path / f"{name}.svg").read_text() for name in ("some", "none"))
    assert "predicted and measured" in some and "3x3, measured" in some
    assert "predicted, not measured" in none and "3x3, measured" not in none


def test_a_step_that_does_not_fit_is_halved(monkeypatch):
    def greedy(layer, device, dtype, budget_s):
        if layer.batch > 1:
            raise torch.OutOfMemoryError("planted")
        return {layers.OURS: layers._row(layer, device, dtype, layers.OURS)}

    monkeypatch.setattr(layers, "_measure", greedy)
    for layer in (layers.conv_layers(4, layers.FEW[:1])[0], layers.other_layers(4)[1]):
        lab = Lab()
        row = layers.measure(layer, "cpu", "float32", 0.0, lab)[layers.OURS]
        assert row.infer_batch_size == 1
        assert row.model.split()[0] == layer.name.split()[0]
        halved = [f"batch {n} ran out of memory, all use batch {n // 2}" for n in (4, 2)]
        assert lab.said == [f"{layer.name}: {text}" for text in halved]


def test_the_committed_page_is_what_its_results_say():
    found = report.found_in(RESULTS)
    assert report.PAGE.read_text() == report.page(found), "python -m bench.report"
    for name in re.findall(r"\]\((.+\.svg)\)", report.PAGE.read_text()):
        assert (report.PAGE.parent / name).read_text().rstrip().endswith("</svg>")


def test_what_limits_each_step():
    for network in bounds.bounds():
        rows, (head, *lines) = network.plan.rows, network.steps()
        assert len(lines) == len(rows) and head == list(bounds.COLUMNS)
        assert sum(row.measured_us or row.predicted_us for row in rows) == pytest.approx(network.plan.predicted_us)
        for row, prediction in zip(rows, network.predictions, strict=True):
            if prediction is not None and row.measured_us is None:  # the same cost model priced the plan
                assert prediction.us == pytest.approx(row.predicted_us) and prediction.limit == row.limit
                assert max(us for name, us in prediction.limits.items() if name != row.limit) <= prediction.us
        _, *limits = network.limits()
        assert {line[0] for line in limits} == {row.limit for row in rows} and all(line[-1] for line in limits)
    page = report.page([])
    assert "Predictions are not measurements" in page
    assert bounds.NOT_MEASURED in page and page.count("layer4.2.conv3") == 1


def test_the_page_knows_no_tuned_file_of_the_user(tmp_path, monkeypatch):
    shape, entry = ConvShape(256, 7, 7, 512, 2048), ConvConfig("conv1x1", (1, 1, 128), 128, 64)
    measured = tuning.Entry(shape, "bfloat16", True, entry, 3.0, 9.0)
    tuning.save(tmp_path / tuning.file_name("NVIDIA H200"), "NVIDIA H200", [measured], 90)
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", str(tmp_path))
    plan.forget()
    target = known_devices()["NVIDIA H200"]
    assert plan.choose_conv(shape, BN_ADD_RELU, torch.bfloat16, "tf32", target, "auto").measured_us == 3.0
    assert bounds._bounds("resnet50", 256) == bounds.bounds()[0]
    monkeypatch.undo()
    plan.forget()


def test_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert providers.no_cxx_compiler("cpu") == "needs g++"
    assert providers.no_cxx_compiler("cuda") is None
    monkeypatch.setenv("CXX", sys.executable)
    assert providers.no_cxx_compiler("cpu") is None


def test_bfloat16_only_where_the_cpu_has_it(monkeypatch):
    monkeypatch.setattr(providers, "cpu_has_bfloat16", lambda: False)
    assert providers.weak_dtype("cpu", "bfloat16").startswith("not measured: this CPU emulates")
    assert providers.weak_dtype("cpu", "float32") is None
    assert providers.weak_dtype("cuda", "bfloat16") is None


def test_a_failing_peer_is_a_row_and_not_an_error(monkeypatch):
    def broken(model, x, dtype):
        raise RuntimeError("no\nidea")

    peer = providers.Provider("peer", broken)
    monkeypatch.setattr(providers, "PROVIDERS", [providers.EAGER, peer])
    rows = groups.measure(Group("cpu", "resnet18", 1, 32, ("float32",), 0.0))
    assert rows["float32", "peer"].status == "failed: RuntimeError: no"
    assert rows["float32", "eager"].rounds == 3
    assert rows["float32", "eager"].param_count == pytest.approx(11.69, abs=0.01)


def test_every_kernel_has_a_row():
    few = layers.kernel_layers(256, few=True)
    found = {kernel for layer in few for kernel in layer.kernels}
    assert found == {*ALL_KERNELS, "stem", "max_pool", "bn_act", "head", "add_relu", "fold_bn"}
    assert len(few) <= len(found)
    assert len({layer.name for layer in layers.kernel_layers(256, few=False)}) >= 40


def test_a_kernel_without_a_gpu_has_a_prediction_only():
    kernels = {layer.kernels: layer for layer in layers.kernel_layers(256, few=True)}
    for name in ("conv1x1", "conv_chain", "bn_act"):
        row = layers.unmeasured(kernels[name,], "bfloat16")
        assert row.status == NO_CUDA and row.infer_step_time is None and row.predicted_for == "NVIDIA H200"
        assert 0 < row.predicted_step_time < 10 and row.note == name


def test_chains_compete_with_one_kernel_a_convolution():
    found = groups.unmeasured(Group("cuda", "resnet50", 256, 224, ("bfloat16",), 1.0))
    chained, apart = (found["bfloat16", name] for name in ("ours", "ours, one kernel a convolution"))
    assert chained.predicted_step_time < apart.predicted_step_time
    assert apart.status == NO_CUDA and apart.infer_samples_per_sec is None


@pytest.mark.parametrize("name", ("layer1.0", "layer1.2", "layer2.0", "layer4.2"))
def test_a_blocks_end_is_the_same_operator_by_operator(name):
    """Projection, a stage's last block, stride 2, and the average over the image."""
    tail = dict(chains.bottleneck_tails(50, 2, 32))[name]
    layer = layers.tail_layer(name, tail, pool=name == "layer4.2")
    rows = layers._measure(layer, "cpu", "float32", 0.0)
    assert set(rows) == {layers.EAGER, layers.OURS}
    assert all(row.status == "ok" for row in rows.values())
    outputs = layer.ours(*layer.tensors())
    assert [tuple(out.shape) for out in outputs] == {
        "layer1.0": [(2, 256, 8, 8), (2, 64, 8, 8)],
        "layer1.2": [(2, 256, 4, 4), (2, 128, 8, 8)],
        "layer2.0": [(2, 512, 4, 4), (2, 128, 4, 4)],
        "layer4.2": [(2, 2048, 1, 1)],
    }[name]


def test_a_step_on_the_cpu_is_checked_and_timed():
    (layer,) = layers.conv_layers(1, ("layer4.1.conv2",))
    rows = layers.measure(layer, "cpu", "float32", 0.0)
    assert set(rows) == {layers.EAGER, layers.OURS, layers.FOLDED}
    assert all(row.status == "ok" and row.rounds == 3 for row in rows.values())


def test_every_training_kernel_has_a_row_and_a_prediction():
    target = training_layers.h200()
    found = training_layers.one_each(target)
    assert {config.kernel for _, config in found} >= {*TRAIN_KERNELS}
    assert len({training_layers.title(work) for work, _ in training_layers.all_steps(target)}) >= 100
    for work, config in found:
        (row,) = training_layers.rows_of(work, config, "cuda", target, None)
        assert row.status == NO_CUDA and row.train_step_time is None and row.predicted_for == "NVIDIA H200"
        assert 0 < row.predicted_step_time < 10 and "plan: " in row.note


def test_a_training_step_without_a_gpu_has_a_prediction_only():
    group = training.TrainGroup("cuda", "resnet50", 256, 224, ("bfloat16",), 1.0)
    found = {name: row for (_, name), row in training.unmeasured(group).items()}
    assert all(row.status == NO_CUDA and row.train_samples_per_sec is None for row in found.values())
    assert 5 < found["ours"].predicted_step_time < found['ours memory="stored"'].predicted_step_time < 60
    assert found["torch.compile max-autotune"].predicted_step_time is None
    text = "\n".join(report.terminal(list(found.values()), results.environment()))
    assert "predicted" in text and "each of ours gated at 3x eager's" in text


def test_a_wrong_gradient_gets_no_speed(monkeypatch):
    class Wrong(training_providers.Step):
        def gradients(self):
            found = super().gradients()
            return found | {"layer1.0.conv1.weight": found["layer1.0.conv1.weight"] * 1.001}

    def wrong(model, x, dtype):
        return Wrong(training_providers._trained(model), x, dtype)

    def broken(model, x, dtype):
        raise RuntimeError("planted")

    extra = [providers.Provider("ours wrong", wrong, ours=True), providers.Provider("broken", broken)]
    kept = [training_providers.EAGER, training_providers.OURS]
    monkeypatch.setattr(training_providers, "PROVIDERS", kept + extra)
    monkeypatch.setattr(training, "CPU_CHECK", (4, 32))
    group = training.TrainGroup("cpu", "resnet18", 4, 32, ("float32",), 0.0)
    rows = {name: row for (_, name), row in training.measure(group).items()}
    assert rows["ours wrong"].status.startswith("WRONG: gradient of layer1.0.conv1.weight")
    assert rows["ours wrong"].samples == [] and rows["ours wrong"].speedup is None
    assert rows["broken"].status == "failed: RuntimeError: planted"
    eager, ours = rows["eager channels_last"], rows["ours"]
    assert ours.status == eager.status == "ok" and ours.rounds == eager.rounds == 3
    assert ours.error == eager.error == ours.eager_error
    parts = ours.train_fwd_time + ours.train_bwd_time + ours.train_opt_time
    assert parts == pytest.approx(ours.train_step_time, rel=0.5)
    assert ours.saved_mb_per_image == pytest.approx(eager.saved_mb_per_image, rel=0.01)


def test_gradients_are_those_of_every_step():
    """The learning rate is 0: a step that is called again gives the same gradients."""
    model, x = training.build_model("resnet18"), training.images_of(2, 32)
    step = training_providers.ours_gram(model, x, torch.float32)
    step()
    first = {name: grad.clone() for name, grad in step.gradients().items()}
    step()
    assert len(first) == 62 and all(torch.equal(grad, first[name]) for name, grad in step.gradients().items())


def test_training_results_of_a_visit_lie_beside_those_of_the_bench(rows, tmp_path):
    trained = Row("training", "NVIDIA H200", "ours", "resnet50", "bfloat16", train_batch_size=256, train_step_time=20.0)
    before = Row("training", "NVIDIA H200", "ours", "resnet50", "bfloat16", train_batch_size=256, train_step_time=30.0)
    env = results.environment()
    results.save(tmp_path / "gpu", [*rows, before], env)
    results.save(tmp_path / "gpu", [trained], env, "training")
    ((found, _),) = report.found_in(tmp_path)
    assert found == [*rows, trained] and "### Training" in report.page([(found, env)])

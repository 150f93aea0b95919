"""`resnet-triton bench` and the comparison behind it, with planted providers and a planted clock."""

from __future__ import annotations

import csv
import json
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_triton
from resnet_triton import cli, compare, graphs, providers, results
from resnet_triton.compare import Group
from resnet_triton.convert import is_converted
from resnet_triton.errors import tensors_of
from resnet_triton.providers import Provider
from resnet_triton.results import OK, WRONG, Row
from resnet_triton.timing import Sample
from resnet_triton.verdict import EQUAL, FASTER, NOT_MEASURED, SLOWER, verdict
from tests.comparers import identical


class Tiny(nn.Module):
    """A convolution with BN, and a linear layer of ``classes``."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class Timed:
    """A call that a planted clock says took ``seconds``."""

    def __init__(self, call: Callable[[], Any], seconds: float) -> None:
        self.call, self.seconds = call, seconds

    def __call__(self) -> Any:
        return self.call()


def provider(name: str, seconds: float = 1.0, ours: bool = False, change: Callable[[Any], Any] = lambda out: out):
    """A provider that computes as eager does, changed by ``change``, in ``seconds``."""

    def build(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Timed:
        model, x = providers._cast(model, dtype, torch.contiguous_format), x.to(dtype)
        return Timed(lambda: change(model(x)), seconds)

    return Provider(name, build, ours=ours)


@pytest.fixture
def compete(monkeypatch) -> Callable[..., None]:
    """Makes these the providers, timed by a clock that takes each one's word, give or take 1 %."""

    def choose(*found: Provider) -> None:
        monkeypatch.setattr(providers, "PROVIDERS", list(found))
        wobble = iter([0.99, 1.0, 1.01] * 10_000)
        monkeypatch.setattr(compare, "clock_for", lambda device: lambda call: Sample(call.seconds * next(wobble)))

    return choose


def measure(model: nn.Module, batch: int = 2, dtypes: tuple[str, ...] = ("float32",), **options: Any) -> list[Row]:
    """Rows of a group of tiny images."""
    group = Group("cpu", "tiny", batch, 8, dtypes, 0.0)
    images = torch.randn(max(batch, compare.EXTRA_IMAGES), 3, 8, 8)
    return list(compare.measure(group, model, images, **options).values())


def test_rows_have_speed_errors_and_sizes(compete):
    compete(provider("eager", 2.0), provider("ours", 1.0, ours=True))
    seen = []
    eager, ours = measure(Tiny().eval(), finish=lambda row, out: seen.append((row.provider, tuple(out.shape))))
    assert ours.speedup == pytest.approx(2, rel=0.05) and ours.rounds == 3
    assert ours.error == eager.error and 0 < ours.error < 1e-5
    assert ours.param_count == pytest.approx((8 * 27 + 16 + 36) / 1e6)
    assert ours.infer_gmacs == pytest.approx((9 * 8 * 27 + 32) / 1e9)
    assert seen == [("eager", (2, 4)), ("ours", (2, 4))]


def test_a_group_goes_on_with_the_batch_that_fits(compete):
    calls: list[weakref.ref] = []
    alive_at_build = []

    def counted(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Timed:
        alive_at_build.append(sum(ref() is not None for ref in calls))
        call = provider("").build(model, x, dtype)
        calls.append(weakref.ref(call))
        return call

    def greedy(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Timed:
        call = provider("").build(model, x, dtype)
        if len(x) > 2:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            except RuntimeError as error:  # as a compiler wraps it
                raise ValueError("backend failed") from error
        return call

    compete(Provider("eager", counted), Provider("greedy", greedy), provider("ours", ours=True))
    said = []

    class Listener(compare.Watch):
        def say(self, text: str) -> None:
            said.append(text)

    rows = measure(Tiny().eval(), batch=8, watch=Listener())
    assert [row.infer_batch_size for row in rows] == [2, 2, 2] and {row.status for row in rows} == {OK}
    steps = [f"batch {n} ran out of memory (greedy, float32), all use batch {n // 2}" for n in (8, 4)]
    assert said == [f"tiny: {text}" for text in steps]
    assert all(row.note == "; ".join(steps) for row in rows)
    assert alive_at_build == [0, 0, 0], "calls of the larger batch still hold their memory"


def test_memory_may_run_out_while_timing(compete, monkeypatch):
    compete(provider("eager"), provider("ours", ours=True))
    clock = compare.clock_for("cpu")

    def greedy(call: Timed) -> Sample:
        if len(call()) > 1:
            raise torch.OutOfMemoryError("planted")
        return clock(call)

    monkeypatch.setattr(compare, "clock_for", lambda device: greedy)
    assert [row.infer_batch_size for row in measure(Tiny().eval())] == [1, 1]


def test_one_image_that_does_not_fit_costs_its_provider_only(compete):
    def greedy(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Timed:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    compete(provider("eager"), Provider("greedy", greedy), provider("ours", ours=True))
    rows = measure(Tiny().eval(), batch=2)
    assert [row.status.split(":")[0] for row in rows] == [OK, "failed", OK]
    assert [row.infer_batch_size for row in rows] == [1, 1, 1]
    assert not compare.is_out_of_memory(RuntimeError("out of resource: shared memory"))


def test_few_values_are_judged_by_more_images(compete):
    """With one value, eager may be right by luck; that must not make ours wrong."""
    model = Tiny(classes=1).eval()
    found = {}
    for name in ("eager", "other"):
        compete(provider(name), provider("ours", ours=True))
        found[name] = measure(model, batch=1, dtypes=("bfloat16",))
    eager, ours = found["eager"]
    images = torch.randn(compare.EXTRA_IMAGES, 3, 8, 8)
    assert eager.eager_error >= eager.error == ours.error
    lucky = compare._Judge(Group("cpu", "tiny", 1, 8, ("bfloat16",), 0.0), model, images)
    with torch.no_grad():
        rounded = model.bfloat16()(images.bfloat16()).double()
    exact = torch.cat([lucky.outputs[0], lucky.more[0]])
    deviation = (rounded - exact)[1:].square().mean().sqrt().item()
    assert lucky._extra_error(torch.bfloat16).rms == pytest.approx(deviation / exact.abs().max().item(), rel=1e-12)


def test_one_tiny_image_has_no_bn_statistics():
    model = resnet_triton.resnet18()
    with pytest.raises(ValueError, match=r"shape \(1, 3, 32, 32\) are too few pixels .* or load weights"):
        compare.calibrate(model, torch.randn(1, 3, 32, 32))
    assert not model.training and model.bn1.momentum == 0.1


def test_every_output_is_checked(compete):
    class Pyramid(Tiny):
        def forward(self, x: Tensor) -> dict[str, Any]:
            low = self.conv(x)
            return {"low": low, "rest": (1e-6 * self.bn(low), None), "index": low.argmax(1)}

    def change(out: dict[str, Any]) -> dict[str, Any]:
        return {**out, "rest": (out["rest"][0] * 1.01, None)}

    compete(provider("eager"), provider("ours", ours=True, change=change), provider("ours too", ours=True))
    _, wrong, right = measure(Pyramid().eval())
    assert wrong.status.startswith(WRONG) and wrong.samples == [] and right.status == OK
    compete(provider("eager"), provider("ours", ours=True, change=lambda out: out["low"]))
    assert measure(Pyramid().eval())[1].status.startswith(WRONG)
    with pytest.raises(ValueError, match="must return floating-point tensors"):
        tensors_of({"index": torch.zeros(1, dtype=torch.long)})

    class Scalar(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sum()

    with pytest.raises(ValueError, match="one entry an image"):
        measure(Scalar().eval())


def test_a_new_network_is_calibrated_and_a_trained_one_is_told_apart():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=3, zero_init_residual=True)
    assert compare.untrained(model)
    compare.calibrate(model, torch.randn(4, 3, 64, 64))
    assert not compare.untrained(model) and not model.training
    assert model.layer1[0].bn2.weight.eq(compare.LAST_GAMMA).all() and model.bn1.momentum == 0.1
    assert not compare.untrained(nn.Linear(2, 2))


def row(name: str, ms: float | None, status: str = OK, spread: float = 0.05) -> Row:
    """A row of one provider, timed or not."""
    made = Row("models", "cpu", name, "tiny", "float32", status, infer_batch_size=4)
    if ms is not None:
        made.infer_step_time, made.step_time_p20, made.step_time_p80 = ms, ms * (1 - spread), ms * (1 + spread)
    return made


@pytest.mark.parametrize(
    ("rows", "outcome", "text"),
    [
        (
            [row("eager", 15.3), row("torch.compile", 12.0), row("ours", 13.0), row("ours folded", 10.0)],
            FASTER,
            "ours folded: 1.53x faster than eager, 1.20x faster than torch.compile",
        ),
        (
            [row("eager", 15.0), row("torch.compile", 10.2), row("ours", 10.0)],
            EQUAL,
            "ours: 1.50x faster than eager, equal to torch.compile (1.02x, p20-p80 overlap)",
        ),
        (
            [row("eager", 15.0), row("torch.compile", 8.0), row("ours", 10.0)],
            SLOWER,
            "ours: 1.50x faster than eager, slower than torch.compile (0.80x its speed)",
        ),
        ([row("eager", 9.0), row("ours", None, "WRONG: error 1"), row("ours folded", 1.0)], WRONG, "ours: error 1"),
        ([row("eager", 9.0), row("ours", None, "failed: KeyError: x")], NOT_MEASURED, "failed: KeyError: x"),
        ([row("eager", None, "not measured: emulated"), row("ours", 1.0)], NOT_MEASURED, "not measured: emulated"),
        ([row("eager", 9.0), row("torch.compile", None, "needs g++"), row("ours", 3.0)], FASTER, None),
    ],
)
def test_verdicts(rows, outcome, text):
    found = verdict(rows)
    assert (found.batch, found.dtype, found.outcome) == (4, "float32", outcome)
    assert text is None or found.text == text


USER_MODEL = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs ``resnet-triton bench`` on a model of the user's folder: exit code, stdout, stderr."""
    (tmp_path / "my_tiny_model.py").write_text(USER_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "Bystanders", _Alone)

    def run(*args: str) -> tuple[int, str, str]:
        common = ["bench", "--model", "my_tiny_model:build", "--device", "cpu", "--size", "8", "--minutes", "0.00001"]
        code = cli.main([*common, *args])
        return code, *capsys.readouterr()

    return run


class _Alone:
    """A machine on which nothing else runs."""

    share = 0.0

    def __enter__(self) -> _Alone:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_exit_codes(bench, compete):
    compete(provider("eager", 1.53), provider("torch.compile", 1.1), provider("ours", 1.0, ours=True))
    code, out, err = bench("--batch", "1", "4")
    assert code == 0 and err == ""
    for batch in (1, 4):
        words = f"batch {batch}, float32: faster: ours: 1.53x faster than eager, 1.10x faster than torch.compile"
        assert words in out.splitlines()
    assert "random weights" in out and "nothing in this model runs fused" in out

    compete(provider("eager", 1.0), provider("ours", 1.005, ours=True))
    code, out, _ = bench()
    assert code == 0 and "batch 32, float32: equal: ours: equal to eager" in out

    compete(provider("eager", 1.0), provider("ours", 2.0, ours=True))
    code, out, _ = bench()
    assert code == 1 and "slower: ours: slower than eager (0.50x its speed)" in out

    compete(provider("eager", 1.0), provider("ours", 0.1, ours=True, change=lambda out: 1.01 * out))
    code, out, _ = bench()
    assert code == 1 and "float32: WRONG: ours: RMS error" in out
    (line,) = (line for line in out.splitlines() if "  ours  " in line)
    assert line.split("ours")[1].strip().startswith("WRONG") and "faster" not in out

    def broken(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Timed:
        raise KeyError("planted")

    compete(provider("eager", 1.0), Provider("ours", broken, ours=True))
    code, out, _ = bench()
    assert code == 1 and "float32: not measured: failed: KeyError: 'planted'" in out


def test_an_emulated_dtype_is_no_answer(bench, compete, monkeypatch):
    monkeypatch.setattr(providers, "cpu_has_bfloat16", lambda: False)
    compete(provider("eager"), provider("ours", ours=True))
    code, out, _ = bench("--dtype", "bf16")
    assert code == 2 and "bfloat16: not measured: not measured: this CPU emulates" in out


def test_json_and_files(bench, compete, tmp_path):
    compete(provider("eager", 2.0), provider("ours", 1.0, ours=True))
    code, out, err = bench("--json", "--output", "r.json", "--dtype", "fp32", "fp32", "--batch", "2")
    report = json.loads(out)
    assert code == 0 and err == ""
    assert [v["outcome"] for v in report["verdicts"]] == ["faster"]
    assert {row["infer_batch_size"] for row in report["rows"]} == {2}
    rows, env = results.load(tmp_path / "r.json")
    assert [row.provider for row in rows] == ["eager", "ours"] and env == report["environment"]
    assert [vars(row) for row in rows] == report["rows"]
    bench("--output", "r.csv", "--batch", "2")
    with (tmp_path / "r.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["provider"] for line in table] == ["eager", "ours"] and float(table[1]["infer_samples_per_sec"]) > 1
    code, _, err = bench("--output", "r.csv")
    assert code == 2 and "--force" in err
    assert bench("--output", "r.csv", "--force", "--batch", "2")[0] == 0


def test_a_batch_too_large_is_halved_and_said(bench, compete):
    def greedy(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Timed:
        if len(x) > 3:
            raise torch.OutOfMemoryError("planted")
        return provider("").build(model, x, dtype)

    compete(provider("eager", 2.0), Provider("ours", greedy, ours=True))
    code, out, err = bench("--batch", "6")
    assert code == 0
    assert err == "my_tiny_model:build: batch 6 ran out of memory (ours, float32), all use batch 3\n"
    assert "batch 3, float32: faster" in out


def test_providers_are_chosen_by_the_names_of_the_table(bench, compete):
    compete(provider("eager"), provider("torch.compile max-autotune"), provider("ours + graph", ours=True))
    code, out, _ = bench("--providers", "ours-graph")
    assert code == 0 and "max-autotune" not in out and "ours + graph: equal to eager" in out
    assert "max-autotune" in bench("--providers", "ours + graph", "torch.compile max-autotune")[1]
    code, _, err = bench("--providers", "nobody")
    assert code == 2 and "allowed: eager, torch.compile-max-autotune, ours-graph" in err
    code, _, err = bench("--providers", "eager")
    assert code == 2 and "add one of: ours-graph" in err


def test_a_builder_of_this_package_competes_against_its_plain_form(bench, compete):
    converted = []

    def seen(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Timed:
        converted.append(any(is_converted(m) for m in model.modules()))
        return provider("").build(model, x, dtype)

    compete(Provider("eager", seen), provider("ours", ours=True))
    assert bench("--model", "resnet18", "--size", "32", "--batch", "1")[0] == 0
    assert converted == [False]


def test_the_graph_provider_captures_the_converted_model(monkeypatch):
    captured = []

    def graph(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        captured.append((any(is_converted(m) for m in model.modules()), example.dtype, example.is_cuda))
        return model

    model = resnet_triton.unconvert(resnet_triton.resnet18(num_classes=3).eval())
    x = torch.randn(1, 3, 32, 32)
    monkeypatch.setattr(graphs, "graph", graph)
    with torch.inference_mode():
        assert providers.ours_graph(model, x, torch.float64)().shape == (1, 3)
    assert captured == [(True, torch.float64, False)]
    monkeypatch.undo()
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="needs a CUDA device"):
            providers.ours_graph(model, x, torch.float32)


@pytest.mark.gpu
def test_the_graph_provider_equals_ours_on_a_gpu():
    model = resnet_triton.unconvert(resnet_triton.resnet18(num_classes=3).eval()).cuda()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        plain, graphed = (build(model, x, torch.bfloat16)() for build in (providers.ours, providers.ours_graph))
    identical(graphed, plain)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--channels", "4"], "does not take an image of shape (1, 4, 8, 8)"),
        (["--output", "table.txt"], ".json, .csv"),
        (["--output", "missing/r.json"], "missing"),
        (["--device", "tpu"], "allowed: cpu, cuda"),
        (["--minutes", "0"], "above 0"),
        (["--batch", "0"], "above 0"),
        (["--model", "my_tiny_model:nothing"], "nothing"),
    ],
)
def test_wrong_arguments_are_named(bench, args, words):
    code, out, err = bench(*args)
    assert code == 2 and words in err and out == ""
    assert "Traceback" not in err


def test_the_real_providers_on_a_small_network(bench, monkeypatch):
    """All that need no compiler, and an image that is not square."""
    pytest.importorskip("torchvision")
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, _ = bench("--model", "torchvision:resnet18", "--size", "32", "48", "--batch", "2")
    assert code in (0, 1) and "WRONG" not in out and "needs g++" in out
    assert "images of 32 x 48 pixels" in out and "nothing in this model" not in out
    (line,) = (line for line in out.splitlines() if line.startswith("batch 2, float32: "))
    assert line.split(": ")[1] in (FASTER, EQUAL, SLOWER) and "eager channels_last" in line

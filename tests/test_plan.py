"""``plan``: what runs where, and the reason that is given. No GPU: plans are made for device names."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from resnet_triton import cli, cost, onednn, plan, tune, tuning
from resnet_triton.backend import BACKENDS
from resnet_triton.devices import Target, known_devices, target_of
from resnet_triton.kernels.config import ConvConfig, Epilogue, runs_on
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.plan import ONE_PASS, Choice, choose_conv, choose_head, choose_stem, choose_step
from resnet_triton.shapes import resnet_convs
from resnet_triton.tuning import Entry

H200, A100 = target_of("NVIDIA H200"), target_of("NVIDIA A100-SXM4-80GB")
VOLTA = replace(A100, name="Tesla V100", sm=70)
CPU, INTERPRETER = target_of("cpu"), Target("interpreter")
SHAPE = ConvShape(256, 56, 56, 64, 256)
FULL, PLAIN = Epilogue(bn=True, residual=True, relu=True), Epilogue()
CONFIG = ConvConfig("conv1x1", (1, 1, 128), 64, 64)


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the store of measurements answers, instead of files."""
    answer: dict[str, Any] = {"entry": None}
    monkeypatch.setattr(tuning, "lookup", lambda *arguments: answer["entry"])
    monkeypatch.setattr(tuning, "lookup_sibling", lambda *arguments: answer.get("sibling"))
    monkeypatch.setattr(plan, "_warned", set())
    plan.forget()
    yield answer
    plan.forget()


def choose(shape=SHAPE, epilogue=FULL, dtype=torch.half, target=H200, backend="auto", precision="tf32"):
    return choose_conv(shape, epilogue, dtype, precision, target, backend)


def entry(us: float, library_us: float, config: ConvConfig = CONFIG) -> Entry:
    return Entry(SHAPE, "float16", True, config, us, library_us)


# Where kernels cannot run

REFUSALS = [
    (CPU, torch.float32, r"kernels need a CUDA tensor, or TRITON_INTERPRET=1; the tensors are on cpu"),
    (Target("meta"), torch.float32, r"kernels need a CUDA tensor, or TRITON_INTERPRET=1; the tensors are on meta"),
    (VOLTA, torch.half, r"Tesla V100 is sm_70; kernels need sm_80 or later"),
    (H200, torch.float64, r"torch.float64 is not one of float32, float16, bfloat16"),
    (INTERPRETER, torch.float64, r"torch.float64 is not one of float32, float16, bfloat16"),
]


@pytest.mark.parametrize(("target", "dtype", "reason"), REFUSALS)
def test_the_triton_backend_says_why_not_and_the_way_out(target: Target, dtype: torch.dtype, reason: str) -> None:
    message = rf"use_backend\('triton'\) cannot run .*{reason}\. Use use_backend\('auto'\)\."
    with pytest.raises(RuntimeError, match=message.replace(".*", "1x1/1 256x56x56x64->256: ", 1)):
        choose(target=target, dtype=dtype, backend="triton")
    with pytest.raises(RuntimeError, match=message.replace(".*", "max_pool: ", 1)):
        choose_step("max_pool", target, dtype, "triton")


@pytest.mark.parametrize(("target", "dtype", "reason"), REFUSALS[2:4])
def test_on_a_gpu_the_library_serves_and_the_plan_says_why(target: Target, dtype: torch.dtype, reason: str) -> None:
    for choice in (choose(target=target, dtype=dtype), choose_step("add_relu", target, dtype, "auto")):
        assert choice.realisation == "cudnn" and not choice.fused and choice.config is None
        assert reason in choice.reason


def test_without_triton_the_library_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "triton_importable", lambda: False)
    assert choose().reason == "triton is not installed"
    assert not choose().fused
    with pytest.raises(RuntimeError, match="triton is not installed"):
        choose(backend="triton")


def test_a_broken_triton_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # import raises ImportError
    plan.triton_importable.cache_clear()
    assert not plan.triton_importable()
    monkeypatch.undo()
    plan.triton_importable.cache_clear()


# The CPU


@pytest.mark.parametrize(
    ("epilogue", "dtype", "backend", "realisation", "reason"),
    [
        (FULL, torch.float32, "auto", "aten", r"fold\(model\)"),
        (FULL, torch.float32, "cudnn", "aten", r"not folded"),
        (Epilogue(bias=True, residual=True, relu=True), torch.float32, "auto", "onednn", r"oneDNN post-ops"),
        (PLAIN, torch.bfloat16, "auto", "onednn", r"oneDNN post-ops"),
        (PLAIN, torch.float32, "cudnn", "aten", r"use_backend\('cudnn'\)"),
        (PLAIN, torch.float64, "auto", "aten", r"oneDNN does not fuse torch.float64"),
        (PLAIN, torch.half, "auto", "aten", r"oneDNN does not fuse torch.float16"),
    ],
)
def test_the_cpu(
    epilogue: Epilogue, dtype: torch.dtype, backend: str, realisation: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "available", lambda: True)
    choice = choose(epilogue=epilogue, dtype=dtype, target=CPU, backend=backend)
    assert choice.realisation == realisation and not choice.fused
    assert re.search(reason, choice.reason)
    assert choice.predicted_us is None and choice.measured_us is None


def test_the_interpreter_runs_every_shape_with_its_heuristic() -> None:
    for site in resnet_convs(50, 2):
        choice = choose(site.shape, site.epilogue, target=INTERPRETER, backend="triton")
        assert choice.fused and runs_on(choice.tiling, site.shape, 2)
        assert choice.realisation == choice.tiling.kernel
        assert choice.predicted_us is None


# Measured


def test_a_faster_kernel_runs(entries) -> None:
    entries["entry"] = entry(50.0, 80.0)
    choice = choose()
    assert (choice.realisation, choice.config, choice.measured_us, choice.predicted_us) == (
        "conv1x1",
        CONFIG,
        50.0,
        None,
    )
    assert choice.reason == "measured 50.0 us against 80.0 us by cudnn"


def test_a_slower_kernel_does_not(entries) -> None:
    entries["entry"] = entry(80.1, 80.0)
    choice = choose()
    assert (choice.realisation, choice.config, choice.measured_us) == ("cudnn", None, 80.0)
    assert choice.reason == "measured 80.1 us against 80.0 us by cudnn"


def test_a_slower_kernel_runs_if_asked_for(entries) -> None:
    entries["entry"] = entry(90.0, 80.0)
    assert choose(backend="triton").config == CONFIG
    assert not choose(backend="cudnn").fused


@pytest.mark.parametrize(
    ("config", "target"),
    [
        (ConvConfig("conv_tma", (2, 8, 8), 512, 64), H200),  # a box of 512 channels
        (ConvConfig("conv1x1", (1, 1, 128), 64, 64), A100),  # tensor maps on a GPU without
        (ConvConfig("conv1x1", (1, 1, 256), 256, 128, 8, 8), H200),  # a megabyte of shared memory
    ],
)
def test_a_measurement_of_a_kernel_that_cannot_run_is_not_believed(config: ConvConfig, target: Target, entries) -> None:
    entries["entry"] = entry(1.0, 80.0, config)
    for backend in BACKENDS:
        choice = choose(target=target, backend=backend)
        assert choice.measured_us is None and choice.config != config


def test_a_measurement_of_the_pointer_kernel_holds_without_tma(entries) -> None:
    entries["entry"] = entry(50.0, 80.0, ConvConfig("conv_pointer", (1, 1, 128), 64, 64))
    assert choose(target=A100).measured_us == 50.0


def test_a_measurement_at_another_batch_says_which(entries) -> None:
    entries["entry"] = entry(50.0, 80.0)
    assert choose(replace(SHAPE, n=200)).reason == "measured 50.0 us against 80.0 us by cudnn at batch 256"


# Measured on another GPU of the architecture


@pytest.mark.parametrize(("us", "fused"), [(60.0, True), (70.0, False)])
def test_a_siblings_configuration_serves_where_it_won_clearly(us: float, fused: bool, entries, caplog) -> None:
    config = replace(CONFIG, stages=4)
    entries["sibling"] = ("NVIDIA GH200", entry(us, 80.0, config))
    choice = choose()
    assert (choice.config is not None) is fused, "else the library computes the products"
    assert choice.measured_us is None, "a time of another GPU is no measurement here"
    assert choice.predicted_us and choice.config == (config if fused else None)
    assert choice.reason.startswith(f"unmeasured here; {us} us against 80.0 us by cudnn on NVIDIA GH200")
    assert choose(backend="triton").config == config
    choose(replace(SHAPE, n=128))
    (text,) = warned(caplog)
    assert "those of NVIDIA GH200 (also sm_90) serve" in text
    assert "`resnet-triton tune --model resnet50 --batch 256 --dtype fp16`" in text


def test_a_siblings_configuration_that_does_not_fit_is_passed_over(entries) -> None:
    entries["sibling"] = ("NVIDIA GH200", entry(1.0, 80.0, ConvConfig("conv1x1", (1, 1, 256), 256, 128, 8, 8)))
    assert choose().reason.startswith("unmeasured; predicted")


def test_its_own_measurement_comes_first(entries) -> None:
    entries["entry"] = entry(50.0, 80.0)
    entries["sibling"] = ("NVIDIA GH200", entry(1.0, 80.0, replace(CONFIG, stages=4)))
    assert choose().config == CONFIG


# At the first call


@pytest.fixture
def measured_now(entries, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """``RESNET_TRITON_AUTOTUNE=1``, and a GPU that measures 50 us; notes what was measured."""
    calls: list[tuple] = []

    def tune_now(*arguments) -> bool:
        calls.append(arguments)
        entries["entry"] = entry(50.0, 80.0)
        return True

    monkeypatch.setattr(tune, "tune_now", tune_now)
    monkeypatch.setattr(plan, "AUTOTUNE", True)
    return calls


def test_a_first_call_measures_only_if_asked_for(measured_now, monkeypatch, caplog) -> None:
    assert choose().measured_us == 50.0
    assert measured_now == [(SHAPE, FULL, torch.half, "tf32", H200)]
    assert choose().measured_us == 50.0 and len(measured_now) == 1
    assert not warned(caplog)
    monkeypatch.setattr(plan, "AUTOTUNE", False)
    monkeypatch.setattr(tuning, "lookup", lambda *arguments: None)
    plan.forget()
    assert choose().measured_us is None and len(measured_now) == 1


def test_a_first_call_measures_nothing_that_would_not_run(measured_now) -> None:
    choose(backend="cudnn")
    choose(target=CPU, dtype=torch.float32)
    choose(dtype=torch.float64)
    assert not measured_now


# Unmeasured


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "resnet_triton" and r.levelno == logging.WARNING]


def test_a_clear_win_runs_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    """A memory-bound 1x1 with everything fused: seven passes saved."""
    choice = choose()
    assert choice.realisation == "conv1x1" and choice.predicted_us and choice.measured_us is None
    assert choice.reason.startswith("unmeasured; predicted ") and "by cudnn" in choice.reason
    choose(replace(SHAPE, n=128))
    (text,) = warned(caplog)
    assert "NVIDIA H200" in text and "`resnet-triton tune --model resnet50 --batch 256 --dtype fp16`" in text


def test_the_command_names_dtype_and_precision() -> None:
    command = plan.tune_command(8, torch.float32, "ieee")
    assert command == "resnet-triton tune --model resnet50 --batch 8 --dtype fp32 --precision ieee"
    options = cli.parser().parse_args(command.split()[1:])
    assert (options.batch, options.dtype, options.precision) == ([8], ["fp32"], "ieee")


def test_no_clear_win_leaves_it_to_the_library(caplog: pytest.LogCaptureFixture) -> None:
    choice = choose(ConvShape(256, 14, 14, 1024, 1024, 3, 3, 1, 1), PLAIN)
    assert choice.realisation == "cudnn" and choice.config is None
    assert choice.reason.startswith("unmeasured; predicted ")
    assert not warned(caplog)


def test_the_margin_is_the_documented_one(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose()
    library_us = choose(backend="cudnn").predicted_us
    share = choice.predicted_us / library_us
    assert share <= plan.CLEAR_WIN
    monkeypatch.setattr(plan, "CLEAR_WIN", share * 0.999)
    plan.forget()
    assert choose().realisation == "cudnn"
    monkeypatch.setattr(plan, "CLEAR_WIN", share * 1.001)
    plan.forget()
    assert choose().fused


@pytest.mark.parametrize("name", known_devices())
@pytest.mark.parametrize("dtype", plan.KERNEL_DTYPES, ids=str)
def test_every_layer_has_a_plan_on_every_device(name: str, dtype: torch.dtype) -> None:
    target = target_of(name)
    for site in resnet_convs(50, 32):
        forced = choose(site.shape, site.epilogue, dtype, target, "triton")
        assert forced.fused and runs_on(forced.tiling, site.shape, dtype.itemsize)
        assert target.tma or forced.realisation == "conv_pointer"
        assert not choose(site.shape, site.epilogue, dtype, target, "cudnn").fused
        free = choose(site.shape, site.epilogue, dtype, target)
        assert free.predicted_us and free.reason
        if free.realisation == ONE_PASS:
            assert free.predicted_us < cost.predict_unfused(site.shape, site.epilogue, dtype, "tf32", target).us
        elif free.fused:
            assert free.predicted_us == forced.predicted_us


def test_a_librarys_convolution_gets_one_pass_behind_it_where_that_is_shorter() -> None:
    shape = ConvShape(256, 7, 7, 512, 512, 3, 3, 1, 1)
    chosen = choose(shape, Epilogue(bn=True, relu=True), torch.bfloat16)
    assert chosen.realisation == ONE_PASS and chosen.config is None and chosen.fused
    assert "us with one pass behind it" in chosen.reason
    size, output = 2, shape.m * shape.k * 2
    moved = plan.conv_bytes(shape, Epilogue(bn=True, relu=True), chosen, size)
    assert moved == shape.bytes_moved(size) + 2 * output
    only_bn = choose(shape, Epilogue(bn=True), torch.bfloat16)
    assert only_bn.realisation == "cudnn", "PyTorch has one pass there too"
    assert choose(shape, backend="cudnn").realisation == "cudnn"


def test_the_bn_of_the_librarys_projection_waits_for_a_kernel_that_adds_it() -> None:
    def postpones(project: Epilogue = Epilogue(bn=True), batch: int = 256, backend: str = "auto") -> bool:  # noqa: B008
        site, last = ConvShape(batch, 7, 7, 1024, 2048), ConvShape(batch, 7, 7, 512, 2048)
        added = Epilogue(bn=True, residual=True, relu=True)
        return plan.postpones_bn((site, project), (last, added), torch.bfloat16, "tf32", H200, backend)

    assert postpones()
    assert not postpones(Epilogue()), "there is nothing to wait"
    assert not postpones(backend="cudnn") and not postpones(backend="triton")
    assert not postpones(batch=1), "both run on kernels of this package there"


# Steps that only move bytes


@pytest.mark.parametrize(
    ("ours", "theirs", "fused"), [((10**8, 1), (3 * 10**8, 3), True), ((10**8, 1), (10**8, 1), False)]
)
def test_a_step_runs_where_it_clearly_saves_bytes(ours, theirs, fused: bool) -> None:
    choice = choose_step("max_pool", H200, torch.half, "auto", ours, theirs)
    assert choice.fused is fused
    assert choice.realisation == ("max_pool" if fused else "cudnn")
    assert choice.reason.startswith("unmeasured; predicted")
    assert choose_step("max_pool", H200, torch.half, "triton", ours, theirs).realisation == "max_pool"
    assert choose_step("max_pool", H200, torch.half, "cudnn", ours, theirs).realisation == "cudnn"


def test_steps_on_the_cpu() -> None:
    choice = choose_step("max_pool", CPU, torch.float32, "auto")
    assert choice.realisation == "aten" and "need a CUDA tensor" in choice.reason and choice.predicted_us is None


def test_stem_and_head_carry_a_tiling_only_where_kernels_run() -> None:
    shape = ConvShape(256, 224, 224, 3, 64, 7, 7, 2, 3)
    stem = choose_stem(shape, Epilogue(bn=True, relu=True), torch.half, H200, "triton")
    head = choose_head(256, 2048, 1000, torch.half, H200, "triton")
    assert (stem.realisation, head.realisation) == ("stem", "head")
    assert stem.tiling.kernel == "conv_tma" and head.tiling.kernel == "conv1x1"
    for choice in (
        choose_stem(shape, Epilogue(bn=True, relu=True), torch.half, H200, "cudnn"),
        choose_head(256, 2048, 1000, torch.half, H200, "cudnn"),
    ):
        assert choice.config is None
        with pytest.raises(AssertionError, match="cudnn has no configuration"):
            _ = choice.tiling
    old = choose_stem(shape, Epilogue(bn=True, relu=True), torch.half, A100, "triton")
    assert old.tiling.kernel == "conv_pointer"


def stem_with_pool(
    dtype: torch.dtype = torch.bfloat16, target: Target = H200, backend: str = "auto", n: int = 256, k: int = 64
) -> Choice:
    shape = ConvShape(n, 224, 224, 3, k, 7, 7, 2, 3)
    return choose_stem(shape, Epilogue(bn=True, relu=True), dtype, target, backend, pool=True)


@pytest.mark.parametrize("backend", ("auto", "triton"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_the_stem_runs_with_its_pool_in_one_kernel(dtype: torch.dtype, backend: str) -> None:
    choice = stem_with_pool(dtype, backend=backend)
    assert (choice.realisation, choice.tiling.kernel) == ("stem_pool", "stem_pool")
    assert choice.reason.startswith("use_backend" if backend == "triton" else "unmeasured; predicted")
    apart = choose_stem(ConvShape(256, 224, 224, 3, 64, 7, 7, 2, 3), Epilogue(bn=True, relu=True), dtype, H200, backend)
    assert apart.realisation == "stem" and choice.predicted_us < apart.predicted_us + 120


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": torch.float32}, "no room for fp32"),
        ({"k": 96}, "room for 64 filters in its registers, these are 96"),
        ({"target": A100}, "needs a tensor memory accelerator"),
        ({"target": replace(H200, name="next", sm=100)}, "fitted to the registers of sm_90, this is sm_100"),
    ],
    ids=str,
)
def test_the_stem_says_why_its_pool_is_a_step_of_its_own(change: dict, why: str) -> None:
    choice = stem_with_pool(backend="triton", **change)
    assert choice.realisation == "stem" and why in choice.reason


def test_the_stem_with_its_pool_stays_with_the_library() -> None:
    assert stem_with_pool(backend="cudnn").realisation == "cudnn"
    assert stem_with_pool(target=CPU).realisation == "aten"
    one = stem_with_pool(n=1)
    assert one.realisation == "cudnn" and "in one kernel with the max-pool" in one.reason


def test_a_head_of_ten_classes_is_gathered() -> None:
    """Rows of 20 bytes are no multiple of 16."""
    assert choose_head(256, 2048, 10, torch.half, H200, "triton").tiling.kernel == "conv_pointer"


def test_choices_are_cached() -> None:
    assert choose() is choose()


@pytest.mark.parametrize("shape", [SHAPE, ConvShape(32, 28, 28, 128, 128, 3, 3, 1, 1)])
def test_exact_fp32_has_no_tensor_core_to_feed_by_tma(shape: ConvShape) -> None:
    exact = choose(shape, dtype=torch.float32, backend="triton", precision="ieee")
    assert exact.realisation == "conv_pointer"
    assert choose(shape, dtype=torch.float32, backend="triton", precision="tf32").realisation != "conv_pointer"

"""``info``: on every kind of machine, planted as facts, the report says in words why kernels run or do not."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import resnet_triton
from resnet_triton import plan, platforms
from resnet_triton.devices import target_of
from resnet_triton.platforms import Facts, Gpu

ROOT = Path(__file__).resolve().parent.parent
HOPPER, TURING, INSTINCT = Gpu("NVIDIA H200", 90), Gpu("Tesla T4", 75), Gpu("AMD Instinct MI300X", 94)
#: A Linux machine on which kernels run.
GOOD = Facts(
    torch="2.11.0+cu130",
    cuda="13.0",
    gpus=(HOPPER,),
    driver="580.65.06",
    device_files=True,
    triton="3.6.0",
    triton_wanted="3.6.0",
)
NO_GPU = replace(GOOD, gpus=())
FOLD = "PyTorch's operators run instead; resnet_triton.fold(model) is the fastest form on the CPU"

MACHINES = {
    "no_driver": (
        replace(NO_GPU, driver=None, device_files=False),
        "no: no NVIDIA driver was found (torch is built for CUDA 13.0). " + FOLD,
    ),
    "old_driver": (
        replace(NO_GPU, driver="535.104.05"),
        "no: driver 535.104.05 < 580 needed by torch 2.11.0+cu130 (CUDA 13.0): update the driver, or install a torch "
        "built for an older CUDA. " + FOLD,
    ),
    "old_driver_cuda12": (
        replace(NO_GPU, driver="470.82", torch="2.8.0+cu128", cuda="12.8"),
        "no: driver 470.82 < 525 needed by torch 2.8.0+cu128 (CUDA 12.8)",
    ),
    "old_driver_that_works": (replace(GOOD, driver="535.104.05"), "yes"),  # with a forward compatibility package
    "cpu_build": (
        replace(NO_GPU, torch="2.11.0+cpu", cuda=None, driver=None),
        "no: torch 2.11.0+cpu is built without CUDA, and no NVIDIA driver was found. " + FOLD,
    ),
    "cpu_build_beside_a_gpu": (
        replace(NO_GPU, torch="2.11.0+cpu", cuda=None),
        "no: torch 2.11.0+cpu is built without CUDA, though NVIDIA driver 580.65.06 is here: install a CUDA build",
    ),
    "rocm": (
        replace(GOOD, torch="2.11.0+rocm6.4", cuda=None, hip="6.4.1", gpus=(INSTINCT,), driver=None),
        "no: torch 2.11.0+rocm6.4 is a ROCm build (HIP 6.4.1); kernels are written for NVIDIA GPUs. MIOpen runs",
    ),
    "rocm_without_a_gpu": (replace(NO_GPU, cuda=None, hip="6.4.1", driver=None), "no: torch 2.11.0+cu130 is a ROCm"),
    "turing": (
        replace(GOOD, gpus=(TURING,)),
        "no: Tesla T4 is sm_75; kernels need sm_80 (Ampere) or later. cuDNN runs instead",
    ),
    "turing_beside_hopper": (replace(GOOD, gpus=(TURING, HOPPER)), "yes"),
    "hidden": (
        replace(NO_GPU, visible_devices=""),
        "no: CUDA_VISIBLE_DEVICES='' hides every GPU: unset it, or name one, such as 0. " + FOLD,
    ),
    "hidden_by_minus_one": (replace(NO_GPU, visible_devices="-1"), "no: CUDA_VISIBLE_DEVICES='-1' hides every GPU"),
    "no_such_device": (
        replace(NO_GPU, visible_devices="7"),
        "no: torch 2.11.0+cu130 finds no CUDA device with CUDA_VISIBLE_DEVICES='7'. " + FOLD,
    ),
    "container": (
        replace(NO_GPU, device_files=False),
        "no: NVIDIA driver 580.65.06 is loaded, but this process sees no GPU: start the container with --gpus all",
    ),
    "cuda_fails": (
        replace(NO_GPU, cuda_error="Unexpected error from cudaGetDeviceCount()"),
        "no: torch 2.11.0+cu130 finds no CUDA device: Unexpected error from cudaGetDeviceCount(). " + FOLD,
    ),
    "no_triton": (
        replace(GOOD, triton=None),
        "no: triton is not installed: pip install 'triton==3.6.0'. cuDNN runs instead",
    ),
    "broken_triton": (
        replace(GOOD, triton_error="ImportError: libtriton.so: undefined symbol"),
        "no: triton 3.6.0 cannot be imported (ImportError: libtriton.so: undefined symbol): "
        "pip install --force-reinstall --no-deps 'triton==3.6.0'",
    ),
    "ancient_triton": (
        replace(GOOD, triton="2.1.0", triton_error="No module named 'triton.tools.tensor_descriptor'"),
        "no: triton 2.1.0 cannot be imported",
    ),
    "linux_on_another_cpu": (
        replace(GOOD, machine="ppc64le", triton=None),
        "no: triton is not installed; it publishes no wheels for Linux on ppc64le. cuDNN runs instead",
    ),
    "linux_on_arm": (replace(GOOD, machine="aarch64"), "yes"),
    "macos": (
        Facts(system="Darwin", machine="arm64"),
        "no: macOS has neither CUDA nor triton; PyTorch runs on the CPU or, after model.to('mps'), on Apple's GPU",
    ),
    "windows": (
        replace(GOOD, system="Windows", machine="AMD64", triton=None, device_files=False),
        "no: triton is not installed; it publishes no wheels for Windows, and runs in WSL 2. cuDNN runs instead",
    ),
    "windows_without_a_gpu": (
        Facts(system="Windows", machine="AMD64", torch="2.11.0+cpu"),
        "no: torch 2.11.0+cpu is built without CUDA, and no NVIDIA driver was found",
    ),
    "interpreter": (
        replace(NO_GPU, interpret=True, backend="triton"),
        "interpreted (TRITON_INTERPRET=1): on CPU tensors under use_backend('triton'), to check results; unset it to "
        "compile kernels",
    ),
    "interpreter_unused": (
        replace(GOOD, interpret=True),
        "interpreted (TRITON_INTERPRET=1): on CPU tensors under use_backend('triton'), to check results; unset it to "
        "compile kernels; now use_backend is 'auto': PyTorch's operators run",
    ),
    "interpreter_without_triton": (
        replace(NO_GPU, interpret=True, triton=None, driver=None),
        "no: no NVIDIA driver was found",
    ),
    "good": (GOOD, "yes"),
    "future_cuda": (replace(GOOD, cuda="14.1"), "yes"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_is_told_why(name: str) -> None:
    facts, words = MACHINES[name]
    text = platforms.kernels(facts)
    assert text == words if words.endswith(("yes", FOLD)) else text.startswith(words)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (GOOD, []),
        (replace(GOOD, triton="3.6.0+git1234"), []),
        (replace(GOOD, triton="3.4.0"), ["triton 3.4.0 is older than the 3.6.0 that torch 2.11.0+cu130 requires"]),
        (replace(GOOD, triton="3.10.1"), ["triton 3.10.1 is newer than the 3.6.0 that torch 2.11.0+cu130 requires"]),
        (replace(GOOD, triton_wanted=None), []),
        (replace(GOOD, gpus=(HOPPER, TURING)), ["Tesla T4 is sm_75: kernels need sm_80 or later, cuDNN runs there"]),
        (replace(GOOD, gpus=(TURING,)), []),  # then that is the reason, not a remark
    ],
)
def test_remarks(facts: Facts, words: list[str]) -> None:
    found = platforms.remarks(facts)
    assert len(found) == len(words)
    assert all(remark.startswith(start) for remark, start in zip(found, words, strict=True))


# Finding the facts


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@builder)\n",
            "580.65.06",
        ),
        ("NVRM version: NVIDIA UNIX aarch64 Kernel Module  570.26  Tue Jan  7\nGCC version: gcc 12.2.0\n", "570.26"),
        ("garbage", None),
    ],
)
def test_the_driver_version_of_the_kernel_module(
    text: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platforms.shutil, "which", lambda program: None)
    (tmp_path / "version").write_text(text)
    assert platforms.driver_version(tmp_path / "version") == version


@pytest.mark.parametrize(("answer", "version"), [("echo 560.35.03", "560.35.03"), ("echo failed; exit 9", None)])
def test_the_driver_version_by_nvidia_smi(
    answer: str, version: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setattr(platforms.shutil, "which", lambda name: str(program))
    assert platforms.driver_version(tmp_path / "absent") == version


def test_the_facts_of_this_machine() -> None:
    facts = platforms.probe()
    assert facts.torch == torch.__version__ and facts.cuda == torch.version.cuda
    assert bool(facts.gpus) == torch.cuda.is_available()
    assert facts.backend == "auto" and not facts.interpret


def test_what_torch_complains_about_is_kept_and_not_printed(monkeypatch: pytest.MonkeyPatch, recwarn) -> None:
    def complaining() -> bool:
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", complaining)
    assert platforms.probe().cuda_error == "CUDA initialization: The NVIDIA driver on your system is too old"
    assert not recwarn


def test_a_broken_triton_is_a_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "installed", lambda name: "3.6.0")
    monkeypatch.setitem(sys.modules, "triton.tools.tensor_descriptor", None)
    assert "tensor_descriptor" in (platforms.probe().triton_error or "")


def test_info_reports_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "probe", lambda: replace(NO_GPU, driver="535.104.05", triton="3.4.0"))
    monkeypatch.setenv("RESNET_TRITON_CONFIG_DIR", "/somewhere")
    report = resnet_triton.info()
    text = str(report)
    assert report.kernels.startswith("no: driver 535.104.05 < 580") and report.kernels in text
    assert report.versions["driver"] == "535.104.05" and "driver       535.104.05" in text
    assert len(report.remarks) == 1 and f"note         {report.remarks[0]}" in text
    assert "RESNET_TRITON_CONFIG_DIR=/somewhere" in text
    assert json.loads(json.dumps(report.to_dict()))["kernels"] == report.kernels


# Where kernels cannot run, everything else does


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretends that torch has one GPU."""

    def pretend(gpu: Gpu, hip: str | None = None) -> None:
        major, minor = divmod(gpu.sm, 10)
        properties = SimpleNamespace(name=gpu.name, major=major, minor=minor, multi_processor_count=40)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", hip)
        clear()

    def clear() -> None:
        target_of.cache_clear()
        plan.forget()

    yield pretend
    monkeypatch.undo()
    clear()


@pytest.mark.parametrize(
    ("gpu", "hip", "reason"),
    [(TURING, None, "Tesla T4 is sm_75; kernels need sm_80 or later"), (INSTINCT, "6.4", "MI300X runs on ROCm")],
    ids=["turing", "rocm"],
)
def test_a_gpu_without_kernels_runs_the_library(gpu: Gpu, hip: str | None, reason: str, machine) -> None:
    machine(gpu, hip)
    model = resnet_triton.convert(resnet_triton.models.ResNet(resnet_triton.models.BasicBlock, [1, 1, 1, 1]).eval())
    for form in (model, resnet_triton.fold(model)):
        steps = resnet_triton.explain(form, (2, 3, 64, 64), device="cuda", dtype=torch.float16).rows
        assert {row.realisation for row in steps} == {"cudnn"}
        assert any(reason in row.reason for row in steps)
    assert reason in resnet_triton.info().devices["cuda:0"]
    with resnet_triton.use_backend("triton"), pytest.raises(RuntimeError, match=r"use_backend\('triton'\) cannot run"):
        resnet_triton.explain(model, (2, 3, 64, 64), device="cuda", dtype=torch.float16)
    planned = resnet_triton.explain(model, (64, 3, 224, 224), device="NVIDIA H200", dtype=torch.bfloat16).rows
    assert any(row.realisation != "cudnn" for row in planned), "a plan for another machine is about that machine"


@pytest.mark.parametrize("device", ["mps", "xpu", "meta"])
def test_a_device_that_is_neither_cpu_nor_cuda_runs_pytorch(device: str) -> None:
    model = resnet_triton.models.ResNet(resnet_triton.models.BasicBlock, [1, 1, 1, 1]).eval()
    for form in (resnet_triton.convert(model), resnet_triton.fold(model)):
        steps = resnet_triton.explain(form, (2, 3, 64, 64), device=device).rows
        assert {row.realisation for row in steps} == {"aten"}
        assert any(f"the tensors are on {device}" in row.reason for row in steps)


def test_nothing_but_torch_is_needed() -> None:
    """As on a machine without triton, torchvision, timm and the rest."""
    code = """
        import sys

        class Absent:
            names = {"triton", "torchvision", "timm", "transformers", "matplotlib", "PIL"}

            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in self.names:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Absent())
        import torch
        import resnet_triton

        model = resnet_triton.resnet18(num_classes=3).eval()
        x = torch.zeros(1, 3, 32, 32)
        with torch.inference_mode():
            for form in (model, resnet_triton.convert(model), resnet_triton.fold(model)):
                print(tuple(form(x).shape), len(resnet_triton.explain(form, (1, 3, 32, 32)).rows) > 10)
        resnet_triton.info()
        print(sorted(Absent.names & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(1, 3) True"] * 3 + ["[]"]

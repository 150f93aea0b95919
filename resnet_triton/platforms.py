"""Why kernels of this package run on a machine or do not: facts about the machine, and what follows from them in words.

Every rule is a function of :class:`Facts` alone, so each platform can be checked on any other. :func:`probe` finds the
facts here. Where kernels cannot run, PyTorch's own operators do.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from . import backend

OLDEST_SM = 80

#: Oldest NVIDIA driver branch for each major version of CUDA. Within a major version every minor one runs on it:
#: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, table 1 (also in the release
#: notes of the CUDA toolkit). Triton brings its own assembler, so its programs need no newer driver than that.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

#: Where triton publishes wheels for Linux.
TRITON_MACHINES = ("x86_64", "AMD64", "aarch64", "arm64")


@dataclass(frozen=True)
class Gpu:
    """One CUDA (or ROCm) device that torch can use.

    Args:
        name: as torch names it.
        sm: compute capability times ten.
    """

    name: str
    sm: int


@dataclass(frozen=True)
class Facts:
    """What was found on a machine.

    Args:
        system, machine: as ``platform.system()`` and ``platform.machine()`` give them.
        torch: its version.
        cuda, hip: version that torch is built for, or None.
        gpus: devices that torch can use.
        cuda_error: what torch said when it looked for them, if it complained.
        driver: version of the NVIDIA driver, or None where none was found.
        device_files: whether the system shows an NVIDIA device to this process (a container may hide them).
        visible_devices: ``CUDA_VISIBLE_DEVICES``, or None where it is not set.
        triton: version of the installed triton, or None.
        triton_error: why it cannot be imported, or None.
        triton_wanted: the version that this torch requires, where it names one.
        interpret: whether ``TRITON_INTERPRET`` is 1.
        backend: the backend in force.
    """

    system: str = "Linux"
    machine: str = "x86_64"
    torch: str = "2.11.0"
    cuda: str | None = None
    hip: str | None = None
    gpus: tuple[Gpu, ...] = ()
    cuda_error: str | None = None
    driver: str | None = None
    device_files: bool = False
    visible_devices: str | None = None
    triton: str | None = None
    triton_error: str | None = None
    triton_wanted: str | None = None
    interpret: bool = False
    backend: str = "auto"


# Rules: why kernels cannot run, or None


def why_rocm(facts: Facts) -> str | None:
    """A ROCm build of torch."""
    if not facts.hip:
        return None
    return f"torch {facts.torch} is a ROCm build (HIP {facts.hip}); kernels are written for NVIDIA GPUs"


def why_macos(facts: Facts) -> str | None:
    """macOS, where neither CUDA nor triton exists."""
    if facts.system != "Darwin":
        return None
    return "macOS has neither CUDA nor triton; PyTorch runs on the CPU or, after model.to('mps'), on Apple's GPU"


def why_cpu_build(facts: Facts) -> str | None:
    """A torch without CUDA."""
    if facts.cuda or facts.hip or facts.system == "Darwin":
        return None
    if facts.driver is None:
        return f"torch {facts.torch} is built without CUDA, and no NVIDIA driver was found"
    return (
        f"torch {facts.torch} is built without CUDA, though NVIDIA driver {facts.driver} is here: install a CUDA build "
        "of torch (https://pytorch.org/get-started/locally)"
    )


def why_no_driver(facts: Facts) -> str | None:
    """No NVIDIA driver."""
    if facts.driver is not None or facts.gpus:
        return None
    return f"no NVIDIA driver was found (torch is built for CUDA {facts.cuda})"


def why_old_driver(facts: Facts) -> str | None:
    """A driver older than torch's CUDA needs."""
    if facts.driver is None or facts.cuda is None or facts.gpus:  # forward compatibility packages may make it work
        return None
    needed = OLDEST_DRIVER.get(_leading_number(facts.cuda))
    if needed is None or _leading_number(facts.driver) >= needed:
        return None
    return (
        f"driver {facts.driver} < {needed} needed by torch {facts.torch} (CUDA {facts.cuda}): update the driver, "
        "or install a torch built for an older CUDA"
    )


def why_hidden(facts: Facts) -> str | None:
    """GPUs that a setting or a container hides."""
    if facts.gpus:
        return None
    if facts.visible_devices is not None and not re.match(r"\s*(\d|GPU-|MIG-)", facts.visible_devices):
        return f"CUDA_VISIBLE_DEVICES={facts.visible_devices!r} hides every GPU: unset it, or name one, such as 0"
    if facts.system == "Linux" and not facts.device_files:
        return (
            f"NVIDIA driver {facts.driver} is loaded, but this process sees no GPU: start the container with --gpus all"
        )
    return None


def why_no_device(facts: Facts) -> str | None:
    """Any other reason for which torch finds no device."""
    if facts.gpus:
        return None
    setting = "" if facts.visible_devices is None else f" with CUDA_VISIBLE_DEVICES={facts.visible_devices!r}"
    said = f": {facts.cuda_error}" if facts.cuda_error else ""
    return f"torch {facts.torch} finds no CUDA device{setting}{said}"


def why_old_gpu(facts: Facts) -> str | None:
    """Only GPUs that are too old."""
    if any(gpu.sm >= OLDEST_SM for gpu in facts.gpus):
        return None
    found = ", ".join(f"{gpu.name} is sm_{gpu.sm}" for gpu in facts.gpus)
    return f"{found}; kernels need sm_{OLDEST_SM} (Ampere) or later"


def why_no_triton(facts: Facts) -> str | None:
    """A triton that is missing or broken."""
    if facts.triton and not facts.triton_error:
        return None
    wanted = f"triton=={facts.triton_wanted}" if facts.triton_wanted else "triton"
    if facts.triton:
        return (
            f"triton {facts.triton} cannot be imported ({facts.triton_error}): "
            f"pip install --force-reinstall --no-deps '{wanted}'"
        )
    if facts.system != "Linux":
        wsl = ", and runs in WSL 2" if facts.system == "Windows" else ""
        return f"triton is not installed; it publishes no wheels for {facts.system}{wsl}"
    if facts.machine not in TRITON_MACHINES:
        return f"triton is not installed; it publishes no wheels for Linux on {facts.machine}"
    return f"triton is not installed: pip install '{wanted}'"


#: In the order of asking: the first that answers names what to mend first.
RULES: tuple[Callable[[Facts], str | None], ...] = (
    why_macos,
    why_rocm,
    why_cpu_build,
    why_no_driver,
    why_old_driver,
    why_hidden,
    why_no_device,
    why_old_gpu,
    why_no_triton,
)


def why_not(facts: Facts) -> str | None:
    """Why no compiled kernel can run with these facts, or None."""
    return next((reason for rule in RULES if (reason := rule(facts))), None)


def runs_instead(facts: Facts) -> str:
    """What computes where kernels do not."""
    if facts.gpus:
        return "MIOpen runs instead" if facts.hip else "cuDNN runs instead"
    return "PyTorch's operators run instead; resnet_triton.fold(model) is the fastest form on the CPU"


def kernels(facts: Facts) -> str:
    """``"yes"``, or ``"no: "`` with the reason and what runs instead, or what the interpreter is for."""
    if facts.interpret and not why_no_triton(facts):
        auto = "" if facts.backend == "triton" else f"; now use_backend is {facts.backend!r}: PyTorch's operators run"
        return (
            "interpreted (TRITON_INTERPRET=1): on CPU tensors under use_backend('triton'), to check results; unset it "
            f"to compile kernels{auto}"
        )
    reason = why_not(facts)
    return f"no: {reason}. {runs_instead(facts)}" if reason else "yes"


def remarks(facts: Facts) -> list[str]:
    """What may go wrong although kernels run."""
    found = []
    if facts.triton and facts.triton_wanted and facts.triton.split("+")[0] != facts.triton_wanted:
        age = "older" if _version(facts.triton) < _version(facts.triton_wanted) else "newer"
        found.append(
            f"triton {facts.triton} is {age} than the {facts.triton_wanted} that torch {facts.torch} requires: "
            f"pip install 'triton=={facts.triton_wanted}'"
        )
    found += [
        f"{gpu.name} is sm_{gpu.sm}: kernels need sm_{OLDEST_SM} or later, cuDNN runs there"
        for gpu in facts.gpus
        if gpu.sm < OLDEST_SM and not facts.hip and not why_old_gpu(facts)
    ]
    return found


def _leading_number(version: str) -> int:
    return int(version.split(".")[0])


def _version(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


# Finding the facts


def probe() -> Facts:
    """The facts of this machine and process."""
    gpus, error = _gpus()
    triton = installed("triton")
    return Facts(
        system=platform.system(),
        machine=platform.machine(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        hip=torch.version.hip,
        gpus=gpus,
        cuda_error=error,
        driver=driver_version(),
        device_files=any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists(),  # dxg: WSL 2
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        triton=triton,
        triton_error=_triton_error() if triton else None,
        triton_wanted=_triton_wanted(),
        interpret=os.environ.get("TRITON_INTERPRET") == "1",
        backend=backend.current_backend(),
    )


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def driver_version(proc: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA driver, from the kernel module or nvidia-smi (WSL 2, Windows), or None."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+\.\d[\d.]*)\s", proc.read_text())
    except OSError:
        found = None
    if found:
        return found[1]
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"^\d+\.\d[\d.]*", answer)
    return found[0] if found else None


def _gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """Devices that torch can use, and what it complained about."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            gpus = tuple(_gpu(index) for index in range(count))
        except RuntimeError as error:
            return (), _first_line(error)
    return gpus, next((_first_line(warning.message) for warning in caught), None)


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, properties.major * 10 + properties.minor)


def _triton_error() -> str | None:
    try:
        importlib.import_module("triton.tools.tensor_descriptor")  # absent before 3.4
    except Exception as error:  # a broken installation raises more than ImportError
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _triton_wanted() -> str | None:
    try:
        required = metadata.requires("torch") or ()
    except metadata.PackageNotFoundError:
        return None
    versions = (re.match(r"triton\s*\(?==\s*([\w.]+)", requirement) for requirement in required)
    return next((found[1] for found in versions if found), None)


def _first_line(message: object) -> str:
    return (str(message).splitlines() or [""])[0]

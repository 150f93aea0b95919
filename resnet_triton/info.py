"""``info``: what this package can use here, and why not, in words."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata

import torch

from . import plan, tuning
from ._version import __version__
from .backend import current_backend
from .devices import known_devices, target_of

#: Every environment variable that the package reads, with its meaning.
ENVIRONMENT = {
    "RESNET_TRITON_CONFIG_DIR": "folder of tuned configurations, looked up before the user's cache and the shipped",
    "XDG_CACHE_HOME": "the user's cache is $XDG_CACHE_HOME/resnet_triton (default ~/.cache/resnet_triton)",
    "TRITON_INTERPRET": "1 before triton is imported: kernels run in Triton's interpreter on CPU tensors",
}


@dataclass(frozen=True)
class Info:
    """What :func:`info` returns; ``str()`` is the report.

    Args:
        versions: of this package, Python, torch, triton, torchvision, CUDA and cuDNN ("-" where absent).
        devices: per CUDA device: name, and ``"usable"`` or why not.
        kernels: whether kernels can run here at all, or why not.
        tuned: files of measured configurations by device name.
        backend: the backend in force.
        environment: variables that are set, of those that the package reads.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    kernels: str
    tuned: dict[str, list[str]]
    backend: str
    environment: dict[str, str]

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name:12} {version}" for name, version in self.versions.items()]
        lines += ["", f"kernels      {self.kernels}", f"backend      {self.backend}"]
        lines += [f"{name:12} {state}" for name, state in self.devices.items()] or ["devices      no CUDA device"]
        for device, files in self.tuned.items():
            lines.append(f"tuned        {device}: {', '.join(files) or 'no measured configurations'}")
        lines += [f"{name}={value}" for name, value in self.environment.items()]
        return "\n".join(lines)


def info() -> Info:
    """Collects versions, devices with what is usable and why not, tuned files, and the environment."""
    devices, names = {}, []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            target = target_of(torch.device("cuda", index))
            names.append(target.name)
            devices[f"cuda:{index}"] = f"{target.name}: {plan.refusal(target, torch.float32) or 'usable'}"
    tuned = {
        name: [str(f / tuning.file_name(name)) for f in tuning.search_path() if (f / tuning.file_name(name)).is_file()]
        for name in dict.fromkeys([*names, *known_devices()])
    }
    return Info(
        versions={
            "resnet-triton": __version__,
            "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
            "torch": torch.__version__,
            "triton": _version("triton"),
            "torchvision": _version("torchvision"),
            "cuda": torch.version.cuda or "-",
            "cudnn": str(torch.backends.cudnn.version() or "-"),
        },
        devices=devices,
        kernels=_kernels(devices),
        tuned=tuned,
        backend=current_backend(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "-"


def _kernels(devices: dict[str, str]) -> str:
    if not plan.triton_importable():
        where = "install it with pip" if sys.platform == "linux" else f"it does not support {platform.system()}"
        return f"no: triton cannot be imported ({where}); PyTorch's operators run instead"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "in the interpreter: CPU tensors under use_backend('triton'), for checking only"
    if torch.version.hip:
        return "no: this is a ROCm build of torch; kernels are written for NVIDIA GPUs"
    if not devices:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"no: no CUDA device ({built}); the CPU path runs: resnet_triton.fold(model) is its fastest form"
    return "yes" if any(state.endswith("usable") for state in devices.values()) else "no: see the devices"

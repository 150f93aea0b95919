"""``info``: what this package can use here, and why not, in words."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass

import torch

from . import plan, platforms, tuning
from ._version import __version__
from .backend import current_backend
from .devices import known_devices, target_of

#: Every environment variable that the package reads, with its meaning.
ENVIRONMENT = {
    "RESNET_TRITON_CONFIG_DIR": "folder of tuned configurations, looked up before the user's cache and the shipped",
    "RESNET_TRITON_AUTOTUNE": "1: a convolution that was not measured is measured when it first runs on a GPU",
    "XDG_CACHE_HOME": "the user's cache is $XDG_CACHE_HOME/resnet_triton (default ~/.cache/resnet_triton)",
    "TRITON_INTERPRET": "1 before triton is imported: kernels run in Triton's interpreter on CPU tensors",
}


@dataclass(frozen=True)
class Info:
    """What :func:`info` returns; ``str()`` is the report.

    Args:
        versions: of this package, Python, torch, triton, torchvision, CUDA, cuDNN and the driver ("-" where absent).
        devices: per CUDA device: name, and ``"usable"`` or why not.
        kernels: ``"yes"``, or why kernels cannot run here and what runs instead.
        remarks: what may go wrong although kernels run.
        tuned: files of measured configurations by device name.
        backend: the backend in force.
        environment: variables that are set, of those that the package reads.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    kernels: str
    remarks: list[str]
    tuned: dict[str, list[str]]
    backend: str
    environment: dict[str, str]

    def to_dict(self) -> dict:
        """A JSON-ready dict."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name:12} {version}" for name, version in self.versions.items()]
        lines += ["", f"kernels      {self.kernels}", *(f"note         {remark}" for remark in self.remarks)]
        lines.append(f"backend      {self.backend}")
        lines += [f"{name:12} {state}" for name, state in self.devices.items()] or ["devices      no CUDA device"]
        for device, files in self.tuned.items():
            lines.append(f"tuned        {device}: {', '.join(files) or 'no measured configurations'}")
        lines += [f"{name}={value}" for name, value in self.environment.items()]
        return "\n".join(lines)


def info() -> Info:
    """Collects versions, devices with what is usable and why not, tuned files, and the environment."""
    facts = platforms.probe()
    devices, names = {}, []
    for index in range(len(facts.gpus)):
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
            "triton": facts.triton or "-",
            "torchvision": platforms.installed("torchvision") or "-",
            "cuda": facts.cuda or "-",
            "cudnn": str(torch.backends.cudnn.version() or "-"),
            "driver": facts.driver or "-",
        },
        devices=devices,
        kernels=platforms.kernels(facts),
        remarks=platforms.remarks(facts),
        tuned=tuned,
        backend=current_backend(),
        environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    )

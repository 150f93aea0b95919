"""What the planner knows about a device: a record per GPU name, read from ``devices.json``."""

from __future__ import annotations

import difflib
import functools
import json
from dataclasses import dataclass
from importlib import resources

import torch


@dataclass(frozen=True)
class Target:
    """Where a plan is made for.

    Args:
        name: device name as ``torch.cuda.get_device_name`` gives it, ``"cpu"``, or ``"interpreter"``.
        sm: compute capability times ten (90 for Hopper); 0 without a GPU.
        multiprocessors, clock_ghz, shared_memory: count, GHz, bytes a program may use.
        hbm_tb_s, l2_tb_s: bandwidth of device memory, and from L2 to the multiprocessors, in TB/s.
        tensor_tflops: dense matrix rate in TFLOP/s by dtype name, with ``"tf32"`` and ``"ieee"`` for fp32.
        source: where these figures come from.
    """

    name: str
    sm: int = 0
    multiprocessors: int = 0
    clock_ghz: float = 0.0
    shared_memory: int = 0
    hbm_tb_s: float = 0.0
    l2_tb_s: float = 0.0
    tensor_tflops: tuple[tuple[str, float], ...] = ()
    source: str = ""

    @property
    def is_cuda(self) -> bool:
        """Whether kernels are compiled for this target."""
        return self.sm > 0

    @property
    def tma(self) -> bool:
        """Whether it has the tensor memory accelerator; the interpreter models one."""
        return self.sm >= 90 or self.name == "interpreter"

    def tflops(self, dtype: torch.dtype, precision: str) -> float:
        """Matrix rate in TFLOP/s for operands of ``dtype`` (``precision`` tells TF32 from exact fp32)."""
        key = precision if dtype == torch.float32 else str(dtype).removeprefix("torch.")
        return dict(self.tensor_tflops)[key]


@functools.cache
def known_devices() -> dict[str, Target]:
    """The shipped records by device name."""
    data = json.loads(resources.files(__package__).joinpath("devices.json").read_text())
    return {name: _target(name, record) for name, record in data.items()}


def _target(name: str, record: dict) -> Target:
    fields = dict(record)
    rates = {**fields.pop("tensor_tflops"), "ieee": fields.pop("fp32_tflops")}
    return Target(name, tensor_tflops=tuple(rates.items()), **fields)


@functools.cache
def target_of(device: torch.device | str, interpreted: bool = False) -> Target:
    """The target behind a ``torch.device`` or a shipped device name (which needs no GPU).

    Raises:
        ValueError: for a name that is neither a device nor a shipped record.
    """
    if isinstance(device, str):
        known = known_devices()
        if device in known:
            return known[device]
        try:
            device = torch.device(device)
        except RuntimeError:
            close = difflib.get_close_matches(str(device), known, 2, 0.7)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            names = ", ".join(map(repr, known))
            raise ValueError(
                f"device={device!r} is neither a torch device nor a known name; {hint}known: {names}"
            ) from None
    if device.type != "cuda":
        return Target("interpreter" if interpreted else device.type)
    if not torch.cuda.is_available():
        names = ", ".join(map(repr, known_devices()))
        raise ValueError(f"device={str(device)!r}: no CUDA device here; name one to plan for it: {names}")
    properties = torch.cuda.get_device_properties(device)
    if properties.name in known_devices():
        return known_devices()[properties.name]
    return _estimate(properties)


def _estimate(properties) -> Target:
    """A record for a GPU without one: its own counts, per-multiprocessor rates of the nearest shipped architecture."""
    sm = properties.major * 10 + properties.minor
    base = min(known_devices().values(), key=lambda known: abs(known.sm - sm))
    scale = properties.multi_processor_count / base.multiprocessors
    return Target(
        properties.name,
        sm,
        properties.multi_processor_count,
        base.clock_ghz,
        getattr(properties, "shared_memory_per_block_optin", base.shared_memory),
        base.hbm_tb_s * scale,
        base.l2_tb_s * scale,
        tuple((name, rate * scale) for name, rate in base.tensor_tflops),
        f"scaled from {base.name}, not measured",
    )

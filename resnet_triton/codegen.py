"""Compiles one kernel launch ahead of time, without a GPU, and measures its machine code.

The launchers themselves say what to compile: they run on meta tensors, which have sizes but no memory, while a stand-in
for Triton's JIT notes the launch. So a case has exactly the signature, constants and divisibility hints of run time.

Two numbers say whether instructions get in the way. A multiprocessor issues four instructions a cycle, so a tile needs
``instructions * warps / 4`` issue cycles:

    pressure    issue cycles / cycles of the tensor cores, for one iteration of a loop with products, and for one tile,
                the whole kernel: every loop by its trip count
    issue/roof  issue time / the slowest other limit of the cost model for the layer: device memory, L2, tensor
                cores, and the launch itself

Tensor-core cycles are multiply-adds, padding included, over ``MACS_PER_CYCLE``: 2048 for 16-bit operands on sm_90, half
of that for TF32. A memory-bound layer may have a high pressure and yet lose nothing; its issue/roof tells. What a
persistent kernel does once a program is spread evenly over the tiles of its programs. Kernels without matrix
instructions have instructions per output element instead (thread instructions; every loop counts once).
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import cost, sass
from .devices import Target, known_devices
from .issue import IssueCount, count_issued
from .kernels.config import ConvConfig, Epilogue, count_tiles
from .kernels.geometry import ChainShape, ConvShape, cdiv
from .nests import SMALL_PRODUCTS, Loop, longest_of, nest_of, nest_of_training
from .repeats import repeats

#: The device each architecture is planned for.
DEVICES = {80: "NVIDIA A100-SXM4-80GB", 90: "NVIDIA H200"}
#: Bytes of shared memory that one program may have.
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
#: Multiply-adds of a multiprocessor in one cycle: 16-bit tensor core, and fp32 without it.
MACS_PER_CYCLE = {80: 1024, 90: 2048, 100: 4096}
FFMA_PER_CYCLE = {80: 64, 90: 128, 100: 128}
REGISTERS, SHARED_PER_SM, WARPS_PER_SM = 65536, {80: 167936, 90: 233472, 100: 233472}, 64


class Launch(NamedTuple):
    """What a launcher handed to Triton: the kernel, its grid and its arguments."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Use:
    """One layer that runs a case.

    Args:
        label: the network's depth, the layer and the batch.
        programs: of the launch.
        bytes: through device memory.
        outputs: elements written.
        shape: of a convolution or a chain of them, else None.
        prediction: of a training kernel with products, else None.
        tiles: of a training kernel with products, else 0.
    """

    label: str
    programs: int
    bytes: int
    outputs: int
    shape: ConvShape | ChainShape | None = None
    prediction: cost.Prediction | None = None
    tiles: int = 0

    @property
    def fused(self) -> str:
        """The convolutions of a chain by name, ``""`` for anything else."""
        if not isinstance(self.shape, ChainShape):
            return ""
        names = [name for name in ("first", "conv", "expand", "project", "reduce") if getattr(self.shape, name)]
        kept = f"/{self.shape.subsample}" if self.shape.subsample > 1 else ""
        return "+".join(names).replace("expand", f"expand{kept}")


@dataclass(frozen=True)
class Case:
    """One program to compile.

    Args:
        name: unique; says everything that the machine code depends on.
        kernel: the kernel's name.
        sm: architecture, 90 for sm_90.
        dtype: of activations and weights.
        precision: ``"tf32"`` or ``"ieee"``, which matters for fp32 alone.
        config: of a convolution or a chain, else None.
        epilogue: of a convolution, else None.
        uses: the layers that run it.
        launch: the arguments; not compared.
        training: whether it belongs to a training step.
        operands: what a kernel of a training step is given besides what it always needs, in words.
    """

    name: str
    kernel: str
    sm: int
    dtype: torch.dtype
    precision: str
    config: ConvConfig | None
    epilogue: Epilogue | None
    uses: tuple[Use, ...]
    launch: Launch = field(compare=False, repr=False)
    training: bool = False
    operands: str = ""

    @property
    def loops(self) -> tuple[Loop, ...]:
        """The loops with products, for one output tile; empty for a kernel without any."""
        if self.small_products or (self.training and self.config):
            loops = nest_of_training(self.kernel, arguments(self.launch)).loops
            return loops if self.tensor_cores else (longest_of(loops),)
        shape = self.uses[0].shape
        return nest_of(shape, self.config) if shape and self.config else ()

    @property
    def persistent(self) -> bool:
        """Whether a program walks over several tiles."""
        if self.training and self.config:
            return nest_of_training(self.kernel, arguments(self.launch)).walks
        return self.launch.kwargs.get("PROGRAMS", 0) > 0

    @property
    def small_products(self) -> bool:
        """Whether its products are TF32's, of the small matrices behind 16-bit filters."""
        return self.kernel in SMALL_PRODUCTS and self.dtype != torch.float32

    @property
    def tensor_cores(self) -> bool:
        """Whether its products belong on tensor cores: convolutions and small matrices, but for exact fp32."""
        if self.small_products:
            return True
        return self.config is not None and (self.dtype != torch.float32 or self.precision == "tf32")


@dataclass(frozen=True)
class Compiled:
    """A compiled case.

    Args:
        listing: its machine code.
        shared_bytes: of shared memory that the compiler allotted.
        warps: of a program.
        repeats: how many times warps compute the same product, see :mod:`.repeats`.
    """

    listing: sass.Listing
    shared_bytes: int
    warps: int
    repeats: int


class LoopMetrics(NamedTuple):
    """A loop with products: ``depth`` (0 outermost), instructions of a warp in one iteration, and their pressure.

    Both without the loops inside it.
    """

    depth: int
    step_instructions: float
    pressure: float


@dataclass(frozen=True)
class Metrics:
    """What the machine code of a case looks like.

    Args:
        registers: per thread.
        spill_bytes: local memory per thread.
        local_accesses: loads and stores of local memory.
        shared_bytes: per program.
        resident: programs that fit one multiprocessor, by registers, shared memory and warps.
        tensor_core, ffma: matrix instructions and fp32 multiply-adds in the listing.
        tma_loads, tma_stores: instructions in the listing.
        loops: those with products, in the order of execution, each before those inside it.
        tile_instructions: issued by one warp for one tile in all.
        pressure: issue cycles over tensor-core cycles for one tile; None without products.
        per_output: thread instructions per output element.
        limit: the slowest of the other limits, for the worst use; ``""`` without a device record.
        issue_over_roof: issue time over that limit's, for the worst use; None without a device record.
        tensor_bound: whether some use needs the tensor cores longer than device memory and the launch. L2 is left out,
            because its bandwidth is the least certain figure of a device record.
    """

    registers: int
    spill_bytes: int
    local_accesses: int
    shared_bytes: int
    resident: int
    tensor_core: int
    ffma: int
    tma_loads: int
    tma_stores: int
    loops: tuple[LoopMetrics, ...]
    tile_instructions: float
    pressure: float | None
    per_output: float
    limit: str
    issue_over_roof: float | None
    tensor_bound: bool


# Tracing the launchers and compiling


class _Device:
    """Stands in for Triton's driver: names the architecture, has no device."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_device(self) -> str:
        return f"sm_{self.sm} without a device"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.sm, 32)


@contextlib.contextmanager
def _architecture(sm: int) -> Iterator[None]:
    """While active, Triton compiles for this architecture."""
    previous = driver._active
    driver.set_active(_Device(sm))
    try:
        yield
    finally:
        driver.set_active(previous)


def arguments(launch: Launch) -> dict[str, Any]:
    """The arguments of a launch by name."""
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.kwargs


def trace(launcher: Callable[[], object], multiprocessors: int) -> list[Launch]:
    """Runs a launcher on meta tensors and returns what it would have launched.

    Args:
        launcher: calls one or more ``launch_...`` functions.
        multiprocessors: of the device to pretend.

    Raises:
        RuntimeError: the interpreter is on.
    """
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("TRITON_INTERPRET is set: kernels cannot be compiled in this process; unset it")
    from .kernels import conv1x1, expand

    launches: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(kernel, tuple(grid), args, kwargs))

    with (
        patch.object(JITFunction, "run", record),
        patch.object(conv1x1, "multiprocessors", lambda device: multiprocessors),
        patch.object(expand, "multiprocessors", lambda device: multiprocessors),
    ):
        launcher()
    return launches


def specialization(launch: Launch, sm: int) -> list[tuple[str, Any]]:
    """Type and specialised value of each argument, as the JIT sees them: what the machine code depends on."""
    with _architecture(sm):
        *_, binder = launch.kernel.device_caches[driver.active.get_current_device()]
        _, special, _ = binder(*launch.args, **launch.kwargs, debug=False)
    return special


def conv_launches(
    shape: ConvShape,
    epilogue: Epilogue,
    dtype: torch.dtype,
    precision: str,
    config: ConvConfig,
    multiprocessors: int,
    vectors: torch.dtype = torch.float32,
) -> list[Launch]:
    """What one convolution launches; ``vectors`` is the dtype of BN's vectors and the bias."""
    from .kernels.dispatch import launch_conv
    from .kernels.epilogue import Operands

    def meta(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    x, w = meta(shape.n, shape.h, shape.w, shape.c), meta(shape.k, shape.r, shape.s, shape.c)
    y = meta(shape.n, shape.p, shape.q, shape.k)
    bias = meta(shape.k, of=vectors) if epilogue.bias else None
    gamma, beta, mean, var = (meta(shape.k, of=vectors) if epilogue.bn else None for _ in range(4))
    residual = torch.empty_like(y) if epilogue.residual else None
    later = (None, *(meta(shape.k, of=vectors) for _ in range(4)), 1e-5) if epilogue.residual_bn else None
    slope = meta(shape.k, of=vectors) if epilogue.prelu else None
    operands = Operands(residual, bias, gamma, beta, mean, var, 1e-5, epilogue.relu, later, slope)
    return trace(lambda: launch_conv(x, w, y, shape, operands, config, precision), multiprocessors)


def chain_launches(
    shape: ChainShape,
    dtype: torch.dtype,
    precision: str,
    config: ConvConfig,
    multiprocessors: int,
    vectors: torch.dtype = torch.float32,
) -> list[Launch]:
    """What a chain launches, every convolution with BN; ``vectors`` is the dtype of BN's vectors."""
    from .kernels.chain import ChainUnits, Unit, launch_chain
    from .kernels.epilogue import Operands

    def meta(*sizes: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=of, device="meta")

    def unit(conv: ConvShape) -> Unit:
        gamma, beta, mean, var = (meta(conv.k, of=vectors) for _ in range(4))
        return Unit(meta(conv.k, conv.r, conv.s, conv.c), Operands(None, None, gamma, beta, mean, var, 1e-5))

    present: dict[str, Any] = {name: unit(conv) for name, conv in shape.named.items()}
    units = ChainUnits(**{"conv": None, **present})
    t, y, after = meta(*shape.source), meta(*shape.stored), shape.reduce
    shortcut = t if shape.first else meta(*shape.shortcut)
    t_next = meta(after.n, after.p, after.q, after.k) if after else None
    return trace(lambda: launch_chain(t, shortcut, y, t_next, units, shape, config, precision), multiprocessors)


def compile_launch(launch: Launch, sm: int) -> Compiled:
    """Compiles one launch for an architecture; a later launch of the same program finds it in Triton's cache.

    Raises:
        RuntimeError: the compiler refuses; the message is its reason.
    """
    try:
        with _architecture(sm):
            kernel, grid, args, kwargs = launch
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
    except Exception as error:  # the compiler raises anything from RuntimeError to its own classes
        root: BaseException = error
        while root.__cause__:
            root = root.__cause__
        raise RuntimeError(str(root)) from error
    listing = sass.disassemble(binary.asm["cubin"])
    return Compiled(listing, binary.metadata.shared, binary.metadata.num_warps, repeats(binary.asm["ttgir"]))


@functools.cache
def compile_case(case: Case) -> Compiled:
    """Compiles a case for its architecture.

    Raises:
        RuntimeError: the compiler refuses; the message names the case.
    """
    try:
        return compile_launch(case.launch, case.sm)
    except RuntimeError as error:
        raise RuntimeError(f"{case.name} does not compile for sm_{case.sm}: {error}") from error


def misfit(launches: list[Launch], sm: int, shared_memory: int) -> str | None:
    """Compiles launches and says why they are not worth running: they spill, or need too much shared memory; or None.

    Raises:
        RuntimeError: the compiler refuses.
    """
    for launch in launches:
        compiled = compile_launch(launch, sm)
        spilled, accesses = compiled.listing.stack_bytes, compiled.listing.count(sass.LOCAL)
        if spilled or accesses:
            return f"spills {spilled} bytes a thread ({accesses} accesses to local memory)"
        if compiled.shared_bytes > shared_memory:
            return f"needs {compiled.shared_bytes} bytes of shared memory, the limit is {shared_memory}"
    return None


# Measuring


def measure(case: Case, compiled: Compiled | None = None) -> Metrics:
    """Measures a case's machine code (compiles it if it is not given)."""
    compiled = compiled or compile_case(case)
    listing = compiled.listing
    try:
        counted = count_issued(
            listing, case.loops, compiled.warps, compiled.repeats, case.persistent, case.tensor_cores
        )
    except ValueError as error:
        raise RuntimeError(f"{case.name}: {error}") from error
    instructions = counted.per_tile(min(_tiles(case, use) / use.programs for use in case.uses))
    first = case.uses[0]

    def pressure(issued: float, macs: float) -> float:
        return issued * compiled.warps / 4 / (macs / _macs_per_cycle(case))

    macs = sum(loop.work for loop in case.loops)
    threads = 32 * compiled.warps
    roofs = [_roofs(case, use) for use in case.uses]
    limit, ratio = _issue_over_roof(case, compiled, counted, roofs)
    return Metrics(
        registers=listing.registers,
        spill_bytes=listing.stack_bytes,
        local_accesses=listing.count(sass.LOCAL),
        shared_bytes=compiled.shared_bytes,
        resident=_resident(case.sm, compiled),
        tensor_core=listing.count(sass.TENSOR_CORE),
        ffma=listing.count(sass.FFMA),
        tma_loads=listing.count("UTMALDG"),
        tma_stores=listing.count("UTMASTG"),
        loops=tuple(LoopMetrics(loop.depth, loop.step, pressure(loop.step, loop.macs)) for loop in counted.loops),
        tile_instructions=instructions,
        pressure=pressure(instructions, macs) if macs else None,
        per_output=instructions * threads * _tiles(case, first) / first.outputs,
        limit=limit,
        issue_over_roof=ratio,
        tensor_bound=any(roof.get("tensor", 0) > max(roof["hbm"], roof["launch"]) for roof in roofs if roof),
    )


def _tiles(case: Case, use: Use) -> int:
    """Output tiles of a launch: its programs, but for kernels that walk."""
    if case.training:
        return use.tiles or use.programs
    if not case.persistent:
        return use.programs
    assert isinstance(use.shape, ConvShape) and case.config
    return count_tiles(case.config, use.shape)


def _macs_per_cycle(case: Case) -> float:
    """Multiply-adds of a multiprocessor in one cycle."""
    if case.tensor_cores:
        return MACS_PER_CYCLE[case.sm] / (2 if case.dtype == torch.float32 or case.small_products else 1)
    return FFMA_PER_CYCLE[case.sm]


def _resident(sm: int, compiled: Compiled) -> int:
    registers = -(-compiled.listing.registers // 8) * 8 * 32 * compiled.warps
    shared = compiled.shared_bytes + 1024  # what the system keeps of each program
    return min(REGISTERS // registers, SHARED_PER_SM[sm] // shared, WARPS_PER_SM // compiled.warps)


def _roofs(case: Case, use: Use) -> dict[str, float]:
    """Microseconds of each limit but instruction issue; empty without a device record."""
    target = planned_for(case.sm)
    if target is None:
        return {}
    roofs = {"hbm": use.bytes / target.hbm_tb_s / 1e6, "launch": cost.LAUNCH_US}
    if use.prediction is not None:
        return roofs | {name: getattr(use.prediction, name) for name in ("hbm", "l2", "tensor")}
    if case.config is None:
        return roofs
    if case.kernel == "stem_pool":
        macs = use.programs * sum(loop.work for loop in case.loops)
        return roofs | {"tensor": 2 * macs / target.tflops(case.dtype, case.precision) / 1e6}
    if isinstance(use.shape, ChainShape):
        prediction = cost.predict_chain(use.shape, case.config, case.dtype, case.precision, target)
    elif use.shape and case.epilogue:
        prediction = cost.predict(use.shape, case.epilogue, case.config, case.dtype, case.precision, target)
    else:
        return roofs
    return roofs | {name: getattr(prediction, name) for name in ("hbm", "l2", "tensor")}


def _issue_over_roof(
    case: Case, compiled: Compiled, counted: IssueCount, roofs: list[dict[str, float]]
) -> tuple[str, float | None]:
    """The largest ratio over the uses, and the limit it is over."""
    target = planned_for(case.sm)
    if target is None:
        return "", None
    ratios = []
    for use, roof in zip(case.uses, roofs, strict=True):
        tiles = _tiles(case, use)
        cycles = counted.per_tile(tiles / use.programs) * compiled.warps / 4
        issue = cdiv(tiles, target.multiprocessors) * cycles / (target.clock_ghz * 1e3)
        limit = max(roof, key=roof.__getitem__)
        ratios.append((issue / roof[limit], limit))
    ratio, limit = max(ratios)
    return limit, ratio


def planned_for(sm: int) -> Target | None:
    """The device record that an architecture is planned for, or None."""
    return known_devices()[DEVICES[sm]] if sm in DEVICES else None

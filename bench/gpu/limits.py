"""Measures the limits that the cost model prices a kernel by, and writes them as a record for `devices.json`.

Device memory (copies by PyTorch and by TMA), L2 -> multiprocessors by TMA (distinct lines, and the same lines for every
program), tensor cores (matrix products by PyTorch; a bare loop of tensor-core instructions), and what a launch costs on
the GPU and on the host. Random data: zeros run faster than real data does.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from resnet_triton.journal import Journal
from resnet_triton.measure import exact_fp32, spread

from .rows import Row

COLS = 32  # int32 columns of a box: 128 bytes, the widest swizzled line
DISTINCT_BYTES = 24 << 20  # well inside the L2 of the GPUs this is for, and far beyond one multiprocessor
COPY_BYTES = 4 << 30
REPEATS = 10
DEVICE = "cuda"
Result = dict[str, Any]


def rows() -> list[Row]:
    """One row per measurement, in the order of their worth."""
    found = [
        Row(
            "limit matmul bfloat16",
            "torch.matmul",
            "8192^3 bfloat16",
            60,
            {"what": "matmul", "dtype": "bfloat16", "size": 8192},
        )
    ]
    found.append(Row("limit copy torch", "copy_", "4 GiB", 60, {"what": "copy"}))
    # rows of a box, num_stages (one less box is in flight), warps, programs per multiprocessor, rank, shared lines
    sweep = [(128, 5, 4, 2, 2, False), (64, 5, 4, 4, 2, False), (128, 5, 4, 2, 4, False), (128, 5, 4, 2, 2, True)]
    sweep += [(rows, s, 4, n, 2, False) for rows, s, n in itertools.product((64, 128), (3, 5), (1, 2, 4))]
    sweep += [(256, 3, 8, 2, 2, False), (128, 5, 8, 2, 2, False), (64, 5, 4, 4, 2, True), (128, 5, 4, 2, 4, True)]
    for box, stages, warps, programs, rank, shared in dict.fromkeys(sweep):
        config = f"{box}x128B{' 4d' if rank == 4 else ''} s{stages} w{warps} {programs}/SM"
        what = {"what": "l2", "rows": box, "stages": stages, "warps": warps, "programs": programs}
        kind = "shared" if shared else "distinct"
        found.append(Row(f"limit l2 {kind} {config}", "tma_read", config, 60, {**what, "rank": rank, "shared": shared}))
    found.append(Row("limit launch", "empty", "-", 60, {"what": "launch"}))
    for rate in ("float16", "tf32", "ieee"):
        size = 8192 if rate == "float16" else 4096
        what = {"what": "matmul", "dtype": rate, "size": size}
        found.append(Row(f"limit matmul {rate}", "torch.matmul", f"{size}^3 {rate}", 60, what))
    found.append(Row("limit copy tma", "tma_copy", "128x128B s4 w4", 60, {"what": "copy_tma"}))
    for bm, bn, warps in ((128, 256, 8), (128, 128, 4), (64, 256, 4)):
        what = {"what": "mma", "bm": bm, "bn": bn, "warps": warps}
        found.append(Row(f"limit mma {bm}x{bn} w{warps}", "mma_loop", f"{bm}x{bn}x64 w{warps}", 60, what))
    return found


def run_row(row: dict[str, Any], journal: Journal) -> Result:
    """Handler of a row: ``value`` with its ``unit``, and ``spread`` ((80th - 20th percentile) / median)."""
    payload = dict(row["payload"])
    return MEASURES[payload.pop("what")](**payload)


def event_ms(run: Callable[[], object], repeats: int = REPEATS, warmup: int = 3) -> list[float]:
    """GPU milliseconds of each run."""
    for _ in range(warmup):
        run()
    marks = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        marks.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in marks]


def _rate(amount: float, times_ms: list[float], unit: str) -> Result:
    """``amount`` (bytes or FLOP) per median time, in tera-units a second."""
    return {
        "value": round(amount / statistics.median(times_ms) / 1e9, 3),
        "unit": unit,
        "spread": round(spread(times_ms), 4),
        "repeats": len(times_ms),
    }


def measure_copy(size: int = COPY_BYTES) -> Result:
    """A device-to-device copy by PyTorch, counting bytes read and bytes written."""
    source = _random_int32(size // 4)
    target = torch.empty_like(source)
    result = _rate(2 * size, event_ms(lambda: target.copy_(source)), "TB/s")
    return {**result, "status": "ok" if torch.equal(source, target) else "wrong"}


def measure_copy_tma(size: int = COPY_BYTES, box: int = 128) -> Result:
    """The same copy by TMA loads and stores."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .limit_kernels import tma_copy

    source = _random_int32(size // 4).view(-1, COLS)
    target = torch.full_like(source, -1)
    boxes = source.shape[0] // box
    x, y = (TensorDescriptor.from_tensor(t, [box, COLS]) for t in (source, target))
    programs = 2 * _multiprocessors()
    times = event_ms(lambda: tma_copy[(programs,)](x, y, boxes, PROGRAMS=programs, ROWS=box, STAGES=4, num_warps=4))
    return {**_rate(2 * size, times, "TB/s"), "status": "ok" if torch.equal(source, target) else "wrong"}


def measure_l2(rows: int, stages: int, warps: int, programs: int, rank: int, shared: bool, steps: int = 2000) -> Result:
    """Bytes that TMA loads bring into the multiprocessors, from lines that stay in L2."""
    from .limit_kernels import tma_read

    boxes = DISTINCT_BYTES // (rows * COLS * 4)
    data = _random_int32(boxes * rows * COLS).view(-1, COLS)
    grid = programs * _multiprocessors()
    out = torch.zeros(grid * rows, COLS, dtype=torch.int32, device=DEVICE)
    described = describe_boxes(data, rows, rank)

    def run() -> None:
        tma_read[(grid,)](
            described, out, boxes, steps, SHARED=shared, RANK=rank, ROWS=rows, COLS=COLS, STAGES=stages, num_warps=warps
        )

    result = _rate(grid * steps * rows * COLS * 4, event_ms(run), "TB/s")
    # program 0 is checked: the exclusive or of the boxes it read
    wanted = expected_xor(data.view(boxes, rows, COLS), 0, grid, steps, shared)
    return {**result, "status": "ok" if torch.equal(out[:rows], wanted) else "wrong"}


def describe_boxes(data: torch.Tensor, rows: int, rank: int):
    """The tensor descriptor of :func:`.limit_kernels.tma_read` over ``data [.., COLS]``."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    if rank == 2:
        return TensorDescriptor.from_tensor(data, [rows, COLS])
    return TensorDescriptor.from_tensor(data.view(-1, 8, 8, COLS), [rows // 64, 8, 8, COLS])


def expected_xor(boxes: torch.Tensor, program: int, programs: int, steps: int, shared: bool) -> torch.Tensor:
    """What one program of :func:`.limit_kernels.tma_read` stores; ``boxes [boxes, ROWS, COLS]``."""
    count = boxes.shape[0]
    reads = Counter(step % count if shared else (program + step * programs) % count for step in range(steps))
    wanted = torch.zeros_like(boxes[0])
    for box, times in reads.items():
        if times % 2:
            wanted ^= boxes[box]
    return wanted


def measure_matmul(dtype: str, size: int) -> Result:
    """A square matrix product by PyTorch (cuBLAS) on random data."""
    kind = torch.float32 if dtype in ("tf32", "ieee") else getattr(torch, dtype)
    a, b = (torch.randn(size, size, device=DEVICE).to(kind) for _ in range(2))
    with exact_fp32():
        torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
        times = event_ms(lambda: a @ b, repeats=20)
        clock = _clock_under_load(lambda: a @ b) if dtype == "bfloat16" else None
    return {**_rate(2 * size**3, times, "TFLOP/s"), "sm_clock_mhz": clock}


def measure_mma(bm: int, bn: int, warps: int, steps: int = 4000, chunks: int = 4) -> Result:
    """Tensor-core instructions in a loop, both operands in shared memory."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .limit_kernels import mma_loop

    a, b = (torch.randn(n, 64, device=DEVICE).to(torch.bfloat16) / 64 for n in (bm, bn))
    programs = 2 * _multiprocessors()
    out = torch.empty(programs * bm, bn, device=DEVICE)
    x, y = TensorDescriptor.from_tensor(a, [bm, 64]), TensorDescriptor.from_tensor(b, [bn, 64])

    def run() -> None:
        mma_loop[(programs,)](x, y, out, steps, BM=bm, BN=bn, BK=64, CHUNKS=chunks, num_warps=warps)

    result = _rate(2.0 * programs * steps * chunks * bm * bn * 64, event_ms(run), "TFLOP/s")
    wanted = (a.double() @ b.double().T) * steps * chunks
    good = torch.allclose(out[:bm].double(), wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())
    return {**result, "status": "ok" if good else "wrong"}


def measure_launch(launches: int = 1000) -> Result:
    """GPU time per launch in a CUDA graph; host time per launch of small kernels and of a PyTorch operator."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .limit_kernels import empty, empty_tma

    x = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    tiles = [torch.zeros(16, 16, dtype=torch.int32, device=DEVICE) for _ in range(3)]

    def plain() -> None:
        empty[(1,)](x, SIZE=1, num_warps=1)

    def with_descriptors() -> None:
        boxes = [TensorDescriptor.from_tensor(t, [16, 16]) for t in tiles]
        empty_tma[(1,)](*boxes, SIZE=16, num_warps=1)

    def operator() -> None:
        x.add_(1)

    host = {}
    for name, run in (("kernel", plain), ("kernel_three_descriptors", with_descriptors), ("torch_add", operator)):
        times = []
        for _ in range(5):
            run()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(launches // 5):
                run()
            times.append((time.perf_counter() - start) / (launches // 5) * 1e6)
            torch.cuda.synchronize()
        host[name] = round(statistics.median(times), 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            plain()
    times = event_ms(graph.replay)
    us = statistics.median(times) / launches * 1e3
    return {"value": round(us, 3), "unit": "us", "spread": round(spread(times), 4), "host_us": host}


MEASURES: dict[str, Callable[..., Result]] = {
    "copy": measure_copy,
    "copy_tma": measure_copy_tma,
    "l2": measure_l2,
    "matmul": measure_matmul,
    "mma": measure_mma,
    "launch": measure_launch,
}


def _random_int32(count: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=DEVICE)


def _multiprocessors() -> int:
    return torch.cuda.get_device_properties("cuda").multi_processor_count


def _clock_under_load(run: Callable[[], object]) -> int | None:
    """The SM clock in MHz while the GPU works (read only), or None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits", "--id=0"]
    for _ in range(1000):
        run()
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        return int(answer.strip().splitlines()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None
    finally:
        torch.cuda.synchronize()


def record(results: dict[str, dict[str, Any]], device: dict[str, Any]) -> dict[str, Any] | None:
    """The entry of ``devices.json`` from the rows' results (by key); None while one of its figures is missing.

    Args:
        device: ``sm``, ``multiprocessors``, ``shared_memory``, and ``torch``, ``triton``, ``driver`` versions.
    """
    good = {key: r for key, r in results.items() if r.get("status") == "ok"}

    def best(start: str) -> dict[str, Any] | None:
        return max((r for key, r in good.items() if key.startswith(start)), key=lambda r: r["value"], default=None)

    hbm, l2, bf16 = best("limit copy torch"), best("limit l2 distinct"), best("limit matmul bfloat16")
    if hbm is None or l2 is None or bf16 is None:
        return None
    rates = {"bfloat16": bf16["value"]}
    for name, fallback in (("float16", 1.0), ("tf32", 0.5)):
        found = best(f"limit matmul {name}")
        rates[name] = found["value"] if found else bf16["value"] * fallback
    ieee = best("limit matmul ieee")
    clock = (bf16.get("sm_clock_mhz") or 0) / 1e3
    return {
        "sm": device["sm"],
        "multiprocessors": device["multiprocessors"],
        "clock_ghz": clock or 1.755,
        "shared_memory": device["shared_memory"],
        "hbm_tb_s": hbm["value"],
        "l2_tb_s": l2["value"],
        "tensor_tflops": rates,
        "fp32_tflops": ieee["value"] if ieee else 60,
        "source": f"measured by bench/gpu_suite.py: 4 GiB copy, L2 by TMA ({l2['config']}), matmul by cuBLAS; "
        f"torch {device.get('torch')}, triton {device.get('triton')}, driver {device.get('driver')}",
    }

"""The micro-benchmarks compile for sm_90 to what they claim to measure, and programs are compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu import limit_kernels, precompile
from bench.gpu.rows import ROOT, child_env
from resnet_triton.devices import known_devices
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.tuner import candidates

BOX, CUBE = "tensordesc<i32[128, 32]>", "tensordesc<i32[2, 8, 8, 32]>"


def ptx(kernel, signature: dict[str, str], warps: int = 4, **constants) -> str:
    names = kernel.arg_names
    full = {name: signature.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if full[name].startswith("*")}
    source = ASTSource(kernel, full, values, hints)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm["ptx"]


@pytest.mark.parametrize("stages", [3, 5])
@pytest.mark.parametrize("rank, box", [(2, BOX), (4, CUBE)])
def test_tma_read_is_pipelined(rank: int, box: str, stages: int) -> None:
    text = ptx(
        limit_kernels.tma_read, {"x": box, "out": "*i32", "boxes": "i32", "steps": "i32"},
        SHARED=False, RANK=rank, ROWS=128, COLS=32, STAGES=stages,
    )  # fmt: skip
    # one load ahead of the loop per buffer that is in flight, and the one in the loop
    assert text.count("cp.async.bulk.tensor") == stages
    assert "st.local" not in text


def test_tma_copy_loads_and_stores() -> None:
    text = ptx(
        limit_kernels.tma_copy, {"x": BOX, "y": BOX, "boxes": "i32"}, PROGRAMS=264, ROWS=128, STAGES=4
    )  # fmt: skip
    assert "cp.async.bulk.tensor.2d.shared" in text and "cp.async.bulk.tensor.2d.global" in text


@pytest.mark.parametrize("bm, bn, warps", [(128, 256, 8), (128, 128, 4), (64, 256, 4)])
def test_mma_loop_runs_on_tensor_cores_from_shared_memory(bm: int, bn: int, warps: int) -> None:
    a, b = (f"tensordesc<bf16[{n}, 64]>" for n in (bm, bn))
    text = ptx(
        limit_kernels.mma_loop, {"a": a, "b": b, "out": "*fp32", "steps": "i32"}, warps,
        BM=bm, BN=bn, BK=64, CHUNKS=4,
    )  # fmt: skip
    assert text.count("wgmma.mma_async") >= 16
    assert "ldmatrix" not in text and "st.local" not in text


def test_launch_probes_compile() -> None:
    tile = "tensordesc<i32[16, 16]>"
    assert "st.global" in ptx(limit_kernels.empty, {"x": "*i32"}, 1, SIZE=1)
    text = ptx(limit_kernels.empty_tma, {"x": tile, "y": tile, "z": tile}, 1, SIZE=16)
    assert text.count("cp.async.bulk.tensor") == 3


def test_precompile_fills_the_cache(tmp_path) -> None:
    """The second process finds in the cache what the first one compiled, and reports what does not compile."""
    target, epilogue = known_devices()["NVIDIA H200"], Epilogue(bn=True, residual=True, relu=True)
    shape, dtype = ConvShape(8, 14, 14, 64, 64, 3, 3, 1, 1), torch.bfloat16
    jobs = [
        precompile.job(shape, epilogue, dtype, "tf32", config, dtype)
        for config in candidates(shape, dtype, target, epilogue=epilogue)[:2]
    ]
    # more elements than Triton's limit for one tensor
    jobs.append({**jobs[0], "config": {**jobs[0]["config"], "box": [32768, 1, 1]}})
    env = child_env({"TRITON_CACHE_DIR": str(tmp_path)})

    def run() -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "bench.gpu.precompile", "--processes", "1"]
        return subprocess.run(command, input=json.dumps(jobs), cwd=ROOT, env=env, capture_output=True, text=True)

    first = run()
    assert first.returncode == 1 and "3 of 3 compiled" in first.stdout, first.stdout + first.stderr
    assert first.stdout.count("failed: ") == 1 and "32768x1x1" in first.stdout
    cubins = sorted(tmp_path.rglob("*.cubin"))
    assert len(cubins) == 2
    before = [os.stat(path).st_mtime_ns for path in cubins]
    assert run().returncode == 1
    assert sorted(tmp_path.rglob("*.cubin")) == cubins
    assert [os.stat(path).st_mtime_ns for path in cubins] == before

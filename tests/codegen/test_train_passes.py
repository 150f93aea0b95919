"""Machine code of a training step's small kernels: nothing spills, wide accesses, products on tensor cores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_triton import codegen, sass
from resnet_triton.kernels import gram_bn, train_passes
from tests.codegen.test_stem_pool import meta

GRAM = ("gram_products", "gram_stats", "gram_rows", "gram_dw", "gram_matrix", "gram_columns")


def programs(launcher) -> dict[str, tuple[codegen.Launch, codegen.Compiled]]:
    """Each launch's kernel by name; none spills or needs much shared memory."""
    found = {}
    for launch in codegen.trace(launcher, 132):
        program = codegen.compile_launch(launch, 90)
        name = launch.kernel.__name__
        assert not program.listing.stack_bytes and not program.listing.count(sass.LOCAL), name
        assert 2 * (program.shared_bytes + 1024) <= codegen.SHARED_PER_SM[90], name
        found[name] = launch, program
    return found


def gram(k: int, c: int, dtype: torch.dtype, count: int) -> None:
    def vector(size: int) -> Tensor:
        return meta(size)

    w, s2, s1, stats = meta(k, c, dtype=dtype), meta(c, c), meta(c), meta(5, k)
    doubtful = meta(1, dtype=torch.int32)
    gram_bn.launch_gram_stats(w, s2, s1, count, vector(k), vector(k), 1e-5, stats, doubtful)
    gram_bn.launch_gram_backward(
        w, meta(k, c), vector(k), s2, s1, count, stats, meta(k, c), vector(k), vector(k), meta(k, c, dtype=dtype),
        meta(c, c, dtype=dtype), vector(c), vector(c),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("k", "c", "dtype", "count"),
    [(2048, 512, torch.bfloat16, 2**31 + 1), (1024, 256, torch.float32, 1)],  # counts of 64 bits, and a constant
    ids=str,
)
def test_gram(k: int, c: int, dtype: torch.dtype, count: int) -> None:
    found = programs(lambda: gram(k, c, dtype, count))
    assert tuple(found) == GRAM
    for name in ("gram_products", "gram_dw", "gram_matrix"):
        # two or three products stand for an exact one, but not of fp32 weights; the estimate is always of bf16
        expected = dtype != torch.float32 or name == "gram_products"
        assert (found[name][1].listing.count(sass.TENSOR_CORE) > 0) == expected, name


@pytest.mark.parametrize(
    ("m", "c", "dtype"),
    [(256 * 112 * 112, 64, torch.bfloat16), (1001, 24, torch.float32)],
    ids=str,
)
def test_passes(m: int, c: int, dtype: torch.dtype) -> None:
    x, vector = meta(m, c, dtype=dtype), meta(c)
    parts = meta(train_passes.masked_sums_parts(m, c), 2, c)

    def launch() -> None:
        train_passes.launch_masked_sums(x, x, x, x, parts)
        train_passes.launch_bn_gradients(parts, meta(5, c), m, meta(3, c), vector, vector)
        train_passes.launch_bn_backward(x, x, meta(3, c), x)

    found = programs(launch)
    assert found["masked_sums"][0].grid[0] <= train_passes.PROGRAMS
    per_thread = {"masked_sums": 3 * 32, "bn_backward": 2 * train_passes.ROWS * (64 if c == 64 else 32) // 128}
    for name, elements in per_thread.items():
        loads = [i for i in found[name][1].listing.instructions if i.opcode.startswith("LDG") and ".128" in i.opcode]
        assert len(loads) >= elements * x.element_size() // 16, f"{name} loads 16 bytes at a time"

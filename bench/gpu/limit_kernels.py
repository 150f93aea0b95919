"""Micro-benchmark kernels for the limits of a GPU: L2 -> multiprocessor by TMA, copies by TMA, the tensor cores.

They run real data through the unit in question and do little else. Each keeps its result live, so that nothing is
optimised away, and has an exact expectation that the tests check in the interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def tma_read(
    x, out, boxes, steps, SHARED: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Every program reads ``steps`` boxes of ROWS x COLS int32 and stores their xor in ``out [programs*ROWS, COLS]``.

    ``x`` describes ``[boxes*ROWS, COLS]`` (RANK 2), or the same as ``[boxes*ROWS/64, 8, 8, COLS]`` (RANK 4, the boxes
    of a convolution). SHARED: all programs read the same boxes at the same time, else each its own.
    """
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    acc = tl.zeros((ROWS, COLS), tl.int32)
    # num_stages on the loop pipelines loads although no tl.dot uses them
    for step in tl.range(0, steps, num_stages=STAGES):
        box = step % boxes if SHARED else (program + step * programs) % boxes
        if RANK == 2:  # noqa: SIM108
            value = x.load([box * ROWS, 0])
        else:
            value = x.load([box * (ROWS // 64), 0, 0, 0]).reshape(ROWS, COLS)
        acc ^= value
    rows = program * ROWS + tl.arange(0, ROWS)
    tl.store(out + rows[:, None] * COLS + tl.arange(0, COLS)[None, :], acc)


@triton.jit
def tma_copy(x, y, boxes, PROGRAMS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr):
    """``y = x`` box by box; both describe ``[boxes*ROWS, COLS]``."""
    for box in tl.range(tl.program_id(0), boxes, PROGRAMS, num_stages=STAGES):
        y.store([box * ROWS, 0], x.load([box * ROWS, 0]))


@triton.jit
def mma_loop(
    a, b, out, steps, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """``out[program] = steps * CHUNKS * a b^T`` with both operands resting in shared memory: the tensor cores alone.

    ``a`` and ``b`` describe ``[BM, BK]`` and ``[BN, BK]``; ``out [programs*BM, BN]``.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    left = a.load([0, 0])
    right = b.load([0, 0])
    for _ in range(steps):
        for _chunk in tl.static_range(CHUNKS):
            acc = tl.dot(left, right.T, acc)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    tl.store(out + rows[:, None] * BN + tl.arange(0, BN)[None, :], acc)


@triton.jit
def empty(x, SIZE: tl.constexpr):
    """Stores one number: what a launch costs besides its work."""
    tl.store(x, SIZE)


@triton.jit
def empty_tma(x, y, z, SIZE: tl.constexpr):
    """Stores one box; three tensor descriptors in the arguments, as a convolution has."""
    y.store([0, 0], x.load([0, 0]))
    z.store([0, 0], tl.zeros((SIZE, 16), tl.int32))

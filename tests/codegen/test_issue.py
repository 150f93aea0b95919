"""Counting instructions: in listings whose numbers are known by hand, and in small kernels whose loops are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from resnet_triton import codegen
from resnet_triton.issue import IssueCount, LoopCount, count_issued
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.nests import Loop, nest_of
from resnet_triton.sass import Listing
from tests.codegen.listings import listing

MMA = "HGMMA.64x64x16.F32.BF16 R8, R8"
MACS = 64 * 64 * 16  # of one such instruction, with four warps


def counted(parsed: Listing, *nest: Loop, **options: Any) -> IssueCount:
    return count_issued(parsed, nest, 4, **options)


# By hand


def test_a_loop_counts_by_its_trips() -> None:
    parsed = listing("MOV R0, R1", f"top: {MMA}", "IADD R0, R0", "@P0 BRA ->top", "STG [R2], R8", "EXIT")
    counts = counted(parsed, Loop(9, MACS))
    assert counts == IssueCount((LoopCount(0, 3, 9, MACS),), 3, 0)
    assert counts.per_tile(1) == 30


def test_unrolled_and_peeled_iterations() -> None:
    parsed = listing(MMA, f"top: {MMA}", MMA, "@P0 BRA ->top", "STG [R2], R8", "EXIT")
    assert counted(parsed, Loop(9, MACS)) == IssueCount((LoopCount(0, 1.5, 8, MACS),), 3, 0)


def test_loops_one_after_another() -> None:
    parsed = listing(
        "MOV R0, R1",
        f"first: {MMA}",
        "IADD R0, R0",
        "@P0 BRA ->first",
        "MOV R0, R1",
        f"second: {MMA}",
        MMA,
        "@P0 BRA ->second",
        MMA,  # the second loop's last iteration
        MMA,
        "EXIT",
    )
    counts = counted(parsed, Loop(9, MACS), Loop(4, 2 * MACS))
    assert counts == IssueCount((LoopCount(0, 3, 9, MACS), LoopCount(0, 3, 3, 2 * MACS)), 5, 0)
    # the order tells which is which, whatever their trips
    assert [loop.times for loop in counted(parsed, Loop(5, MACS), Loop(10, 2 * MACS)).loops] == [5, 9]


@pytest.mark.parametrize("first", [True, False])
def test_a_loop_that_was_unrolled_completely(first: bool) -> None:
    parsed = listing("MOV R0, R1", MMA, MMA, f"top: {MMA}", "@P0 BRA ->top", "EXIT")
    gone, kept = Loop(2, MACS), Loop(7, MACS)
    counts = counted(parsed, *((gone, kept) if first else (kept, gone)))
    assert counts == IssueCount((LoopCount(0, 2, 7, MACS),), 4, 0)


def nested(*inside: str) -> Listing:
    return listing(
        "MOV R0, R1",
        f"row: {MMA}",
        "@P0 BRA ->next",
        "MOV R0, R1",  # behind a condition
        *inside,
        "STG [R2], R8",
        "next: IADD R0, R0",
        "@P1 BRA ->row",
        "EXIT",
    )


def test_nested_loops_behind_a_condition() -> None:
    parsed = nested(f"column: {MMA}", "FADD R8, R8", "@P2 BRA ->column")
    counts = counted(parsed, Loop(6, MACS, (Loop(3, MACS),), taken=4))
    row, column = counts.loops
    assert (row.depth, row.step, row.times, row.macs) == (0, 4 + 2 * 4 / 6, 6, MACS)
    assert (column.depth, column.step, column.times, column.macs) == (1, 3, 12, MACS)
    assert (counts.tile, counts.program) == (2, 0)
    assert counts.per_tile(1) == 6 * 4 + 4 * 2 + 12 * 3 + 2
    # without a condition in the source, every iteration passes everything
    always = counted(parsed, Loop(6, MACS, (Loop(3, MACS),)))
    assert always.per_tile(1) == 6 * 6 + 18 * 3 + 2


def test_products_that_warps_repeat_are_no_unrolled_loop() -> None:
    parsed = listing(f"top: {MMA}", MMA, "@P0 BRA ->top", "EXIT")
    assert counted(parsed, Loop(8, MACS)).loops == (LoopCount(0, 1.5, 8, MACS),)
    assert counted(parsed, Loop(8, MACS), repeats=2).loops == (LoopCount(0, 3, 8, MACS),)


def test_an_inner_loop_that_was_unrolled_completely() -> None:
    parsed = nested(MMA, "FADD R8, R8", MMA, "FADD R8, R8")
    (row,) = counted(parsed, Loop(6, MACS, (Loop(2, MACS),), taken=3)).loops
    assert (row.step, row.times, row.macs) == (4 + 3 / 6 * 6, 6, 2 * MACS)


def test_an_inner_loop_whose_last_iteration_was_peeled() -> None:
    parsed = nested(f"column: {MMA}", "@P2 BRA ->column", MMA)
    row, column = counted(parsed, Loop(6, MACS, (Loop(3, MACS),), taken=6)).loops
    assert (row.step, row.times, row.macs) == (4 + 3, 6, 2 * MACS)
    assert (column.step, column.times, column.macs) == (2, 12, MACS)


@pytest.mark.parametrize(
    "nest",
    [
        (Loop(9, 4 * MACS),),  # an iteration holds more than the loop
        (Loop(9, 3 * MACS // 2),),
        (Loop(9, MACS, (Loop(9, 2 * MACS),)),),
        (Loop(9, MACS), Loop(9, 5 * MACS)),
    ],
)
def test_what_the_source_does_not_explain_is_an_error(nest: tuple[Loop, ...]) -> None:
    parsed = listing(MMA, f"top: {MMA}", MMA, "@P0 BRA ->top", "STG [R2], R8", "EXIT")
    with pytest.raises(ValueError, match=r"products 65536 \+ \[131072\] in the listing.* do not fit"):
        counted(parsed, *nest)


def test_a_flattened_loop_counts_its_epilogue_once_a_tile() -> None:
    parsed = listing(
        "MOV R0, R1",  # once a program, as the exit
        f"top: {MMA}",
        "@P0 BRA ->next",
        "FADD R8, R8",  # only in a tile's last step
        "UTMASTG [R2], R8",
        "next: IADD R0, R0",
        "@P1 BRA ->top",
        "EXIT",
    )
    counts = counted(parsed, Loop(4, MACS), persistent=True)
    assert counts == IssueCount((LoopCount(0, 4 + 2 / 4, 4, MACS),), 0, 2)
    assert counts.per_tile(tiles_per_program=10) == 4 * 4 + 2 + 0.2


def test_nested_persistent_loops() -> None:
    parsed = listing(
        "MOV R0, R1",
        "tile: MOV R8, RZ",
        f"step: {MMA}",
        "@P0 BRA ->step",
        "STG [R2], R8",
        "@P1 BRA ->tile",
        "EXIT",
    )
    assert counted(parsed, Loop(4, MACS), persistent=True) == IssueCount((LoopCount(0, 2, 4, MACS),), 3, 2)


def test_waiting_is_not_counted() -> None:
    poll = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"
    parsed = listing(
        f"top: {poll}",
        "@!P0 BRA ->wait",
        f"go: {MMA}",
        "@P1 BRA ->top",
        "STG [R2], R8",
        "EXIT",
        f"wait: {poll}",
        "@!P0 BRA ->wait",
        "BRA ->go",
    )
    assert counted(parsed, Loop(5, MACS)) == IssueCount((LoopCount(0, 4, 5, MACS),), 2, 0)


def test_without_products_everything_counts_once() -> None:
    parsed = listing("LDG R4, [R2]", "@P0 BRA ->end", "STG [R2], R4", "end: EXIT", "NOP")
    assert counted(parsed) == IssueCount((), 4, 0)


def test_instructions_that_do_not_say_their_size() -> None:
    """The largest loop is taken for the only one, and is not unrolled."""
    parsed = listing("UTCHMMA gdesc[UR4]", "top: UTCHMMA gdesc[UR4]", "@P0 BRA ->top", "EXIT")
    assert counted(parsed, Loop(9, 1 << 20)) == IssueCount((LoopCount(0, 2, 8, 1 << 20),), 2, 0)
    with pytest.raises(ValueError, match="do not fit"):
        counted(parsed, Loop(9, 1 << 20), Loop(2, 1 << 20))


def test_fp32_multiply_adds() -> None:
    """They also belong to addresses and epilogues: a few more are no peeled iteration."""
    parsed = listing("FFMA R0, R1", "top: FFMA R8, R8", "FFMA R9, R9", "@P0 BRA ->top", "FFMA R8, R8", "EXIT")
    counts = counted(parsed, Loop(9, 32 * 4), tensor_cores=False)
    assert counts == IssueCount((LoopCount(0, 1.5, 9, 32 * 4),), 3, 0)


# Of compiled kernels


@triton.jit
def two_loops(x, w, v, y, STEPS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A product of STEPS steps, then one of its result in COLUMNS steps with two products each."""
    m0 = tl.program_id(0) * BM
    acc = tl.zeros((BM, 64), tl.float32)
    for i in range(STEPS):
        acc = tl.dot(x.load([m0, i * 64]), w.load([0, i * 64]).T, acc)
    h = acc.to(tl.bfloat16)
    after = tl.zeros((BM, 64), tl.float32)
    for j in range(COLUMNS):
        o = tl.dot(h, v.load([j * BN, 0]).T).to(tl.bfloat16)
        after = tl.dot(o, v.load([j * BN, 0]), after)
    y.store([m0, 0], after.to(tl.bfloat16))


@triton.jit
def rows_and_columns(
    x, w, v, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Down the rows, two products each; from the third row on, COLUMNS steps of a product with the rows before."""
    m0 = tl.program_id(0) * ROWS * BM
    before = tl.zeros((BM, 64), tl.float32)
    for row in tl.range(ROWS + 2, num_stages=1):
        x_row = x.load([m0 + row * BM, 0])
        done = tl.dot(x_row, w.load([0, 0]).T, before)
        before = tl.dot(x_row, w.load([64, 0]).T)
        if row >= 2:
            h = done.to(tl.bfloat16)
            for j in range(COLUMNS):
                o = tl.dot(h, v.load([j * BN, 0]).T)
                y.store([m0 + row * BM, j * BN], o.to(tl.bfloat16))


def compiled(launcher, *args: torch.Tensor, **constants: int) -> codegen.Compiled:
    def boxes() -> None:
        bm, bn = constants["BM"], constants["BN"]
        tiles = [[bm, 64], [64, 64], [bn, 64], [bm, 64]]
        descriptors = [TensorDescriptor.from_tensor(t, tile) for t, tile in zip(args, tiles, strict=True)]
        launcher[(1,)](*descriptors, **constants, num_warps=4, num_stages=2)

    (launch,) = codegen.trace(boxes, 1)
    return codegen.compile_launch(launch, 90)


def meta(*sizes: int) -> torch.Tensor:
    return torch.empty(sizes, dtype=torch.bfloat16, device="meta")


def products(parsed: Listing) -> int:
    return parsed.count("HGMMA")


@pytest.mark.parametrize("steps, columns", [(9, 4), (12, 1)])
def test_two_loops_of_a_kernel(steps: int, columns: int) -> None:
    bm, bn = 128, 64
    program = compiled(
        two_loops, meta(bm, 64 * steps), meta(64, 64 * steps), meta(bn * columns, 64), meta(bm, 64),
        STEPS=steps, COLUMNS=columns, BM=bm, BN=bn,
    )  # fmt: skip
    nest = Loop(steps, bm * 64 * 64), Loop(columns, 2 * bm * bn * 64)
    counts = count_issued(program.listing, nest, program.warps)
    # 64 x 64 x 16 an instruction: 2 x 4 of them make up the product of a step
    assert products(program.listing) == (8 + 16)
    assert (counts.loops[0].depth, counts.loops[0].times, counts.loops[0].macs) == (0, steps, bm * 64 * 64)
    assert len(counts.loops) == (2 if columns > 1 else 1)
    if columns > 1:
        assert counts.loops[1].times == columns and counts.loops[1].macs == 2 * bm * bn * 64
    assert all(20 < loop.step < 400 for loop in counts.loops)
    assert 50 < counts.tile < len(program.listing.instructions)


def test_nested_loops_of_a_kernel() -> None:
    rows, columns, bm, bn = 14, 4, 64, 64
    program = compiled(
        rows_and_columns, meta(bm * (rows + 2), 64), meta(128, 64), meta(bn * columns, 64), meta(bm * (rows + 2), 256),
        ROWS=rows, COLUMNS=columns, BM=bm, BN=bn,
    )  # fmt: skip
    nest = Loop(rows + 2, 2 * bm * 64 * 64, (Loop(columns, bm * bn * 64),), taken=rows)
    counts = count_issued(program.listing, [nest], program.warps)
    row, column = counts.loops
    assert products(program.listing) == 4 + 4 + 4
    assert (row.depth, row.times, row.macs) == (0, rows + 2, 2 * bm * 64 * 64)
    assert (column.depth, column.times, column.macs) == (1, rows * columns, bm * bn * 64)
    # every instruction is counted somewhere, once
    once = row.step + column.step + counts.tile
    assert once <= len(program.listing.instructions)


@triton.jit
def small_product(x, y, SIZE: tl.constexpr):
    """A product of SIZE rows and columns, depth 64."""
    y.store([0, 0], tl.dot(x.load([0, 0]), x.load([0, 0]).T).to(tl.bfloat16))


@pytest.mark.parametrize(
    "size, warps, times, instruction",
    [(64, 4, 1, "HGMMA"), (64, 8, 1, "HGMMA"), (64, 16, 1, "HGMMA"), (16, 4, 2, "HMMA"), (32, 4, 1, "HMMA")],
)
def test_repeated_products(size: int, warps: int, times: int, instruction: str) -> None:
    """Every warp has its own part of a product, or some have the same."""
    describe = TensorDescriptor.from_tensor
    x, y = describe(meta(size, 64), [size, 64]), describe(meta(size, size), [size, size])
    (launch,) = codegen.trace(lambda: small_product[(1,)](x, y, SIZE=size, num_warps=warps), 1)
    program = codegen.compile_launch(launch, 90)
    assert program.listing.count(instruction) > 0
    assert program.repeats == times
    counts = count_issued(program.listing, [Loop(1, size * size * 64)], warps, program.repeats)
    assert not counts.loops  # all of it fits without a loop, which the count would refuse otherwise


# What the kernels say of themselves


def test_nests_hold_all_products_of_a_launch() -> None:
    """By the multiply-adds of the shapes, where tiles cover the output without waste."""
    n, c, k = 4, 64, 256
    conv, expand = ConvShape(n, 8, 8, c, c, 3, 3, 1, 1), ConvShape(n, 8, 8, c, k)
    project, reduce = ConvShape(n, 8, 8, 128, k), ConvShape(n, 8, 8, k, 128)

    def work(shape: ConvShape | ChainShape, config: ConvConfig, tiles: int) -> int:
        return tiles * sum(loop.work for loop in nest_of(shape, config))

    tma = ConvConfig("conv_tma", (2, 8, 8), 64, 32)
    assert work(conv, tma, 2) == conv.macs
    for parts in ((conv, expand), (None, expand), (conv, expand, project), (conv, expand, project, reduce)):
        chain = ChainShape(*parts)
        assert work(chain, ConvConfig("conv_chain", (2, 8, 8), 64, 64), 2) == chain.macs
    assert work(expand, ConvConfig("conv1x1", (1, 1, 64), 64, 32), 4 * 4) == expand.macs
    split = ConvConfig("conv1x1", (1, 1, 64), 64, 32, split=2)
    assert work(expand, split, 4 * 4 * 2) == expand.macs
    stem = ConvConfig("stem_pool", (4, 56, 16), 64, 64)  # 112 x 112 outputs, two rows of 14 useful columns
    assert work(conv, stem, 2 * 8) == 4 * 112 * (8 * 16) * 64 * 256 * (56 + 4) // 56
    rolling = ConvConfig("conv_rolling", (4, 8, 8), 64, 64)
    assert work(conv, rolling, 1) == conv.macs * 10 // 8  # two rows more than are stored
    chain = ChainShape(conv, expand, None, reduce)
    assert work(chain, ConvConfig("chain_rolling", (4, 8, 8), 64, 64), 1) == chain.macs + conv.macs * 2 // 8

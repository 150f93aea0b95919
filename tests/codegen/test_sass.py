"""Reading machine code: listings, basic blocks and loops that are known by hand."""

from __future__ import annotations

import pytest

from resnet_triton import sass
from tests.codegen.listings import listing


def test_parse() -> None:
    parsed = listing("a: @!P0 LDG.E.128 R4, [R2.64]", "BRA.U UP1, ->a", "EXIT")
    assert (parsed.registers, parsed.stack_bytes) == (40, 8)
    assert parsed.instructions[0] == sass.Instruction(0, "!P0", "LDG.E.128", "R4, [R2.64]")
    assert parsed.instructions[0].name == "LDG"
    assert parsed.count("LDG") == 1
    with pytest.raises(RuntimeError, match="no instructions"):
        sass.parse("")


def test_loops_and_their_nesting() -> None:
    blocks = sass.blocks_of(
        listing(
            "MOV R0, R1",
            "outer: MOV R2, R3",
            "inner: FADD R2, R2",
            "@P0 BRA ->inner",
            "@P1 BRA ->next",
            "FMUL R2, R2",  # some iterations only
            "next: @P2 BRA ->outer",
            "EXIT",
            "NOP",  # behind the end, nobody comes here
        ).instructions
    )
    assert [[i.name for i in block.instructions] for block in blocks] == [
        ["MOV"], ["MOV"], ["FADD", "BRA"], ["BRA"], ["FMUL"], ["BRA"], ["EXIT"],
    ]  # fmt: skip
    inner, outer = sass.loops_of(blocks)
    assert (inner.header, inner.blocks, inner.always) == (2, {2}, {2})
    assert (outer.header, outer.blocks, outer.always) == (1, {1, 2, 3, 4, 5}, {1, 2, 3, 5})


def test_order_follows_the_jumps_not_the_addresses() -> None:
    blocks = sass.blocks_of(listing("BRA ->b", "a: EXIT", "b: MOV R0, R1", "BRA ->a").instructions)
    assert sass.in_order(blocks) == [0, 2, 1]

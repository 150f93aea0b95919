"""Reading machine code: counting in a listing whose numbers are known by hand."""

from __future__ import annotations

import pytest

from resnet_triton import sass


def listing(*lines: str) -> sass.Listing:
    """A listing from ``"label: opcode operands"`` lines; a branch names its target's label."""
    labels = {line.split(":")[0]: 16 * i for i, line in enumerate(lines) if ":" in line}
    text = ["REG:40 STACK:8"]
    for i, line in enumerate(lines):
        code = line.split(":")[-1].strip()
        for label, address in labels.items():
            code = code.replace(f"->{label}", f"0x{address:x}")
        text.append(f"        /*{16 * i:04x}*/    {code} ;    /* 0x0 */")
    return sass.parse("\n".join(text))


def test_parse() -> None:
    parsed = listing("a: @!P0 LDG.E.128 R4, [R2.64]", "BRA.U UP1, ->a", "EXIT")
    assert (parsed.registers, parsed.stack_bytes) == (40, 8)
    assert parsed.instructions[0] == sass.Instruction(0, "!P0", "LDG.E.128", "R4, [R2.64]")
    assert parsed.instructions[0].name == "LDG"
    assert parsed.count("LDG") == 1
    with pytest.raises(RuntimeError, match="no instructions"):
        sass.parse("")


def test_a_loop_counts_by_its_steps() -> None:
    parsed = listing("MOV R0, R1", "top: HGMMA.64x64x16 R8, R8", "IADD R0, R0", "@P0 BRA ->top", "STG [R2], R8", "EXIT")
    counted = sass.count_issued(parsed, steps=9, mma_per_step=1)
    assert (counted.step, counted.tile, counted.program, counted.trips) == (3, 3, 0, 9)
    assert counted.per_tile(1) == 30


def test_unrolled_and_peeled_steps() -> None:
    mma = "HGMMA.64x64x16 R8, R8"
    parsed = listing(mma, f"top: {mma}", mma, "@P0 BRA ->top", "STG [R2], R8", "EXIT")
    counted = sass.count_issued(parsed, steps=9, mma_per_step=1)
    assert (counted.step, counted.tile, counted.trips) == (1.5, 3, 8)
    with pytest.raises(ValueError, match="does not fit"):
        sass.count_issued(parsed, steps=9, mma_per_step=4)


def test_flattened_loop_counts_its_epilogue_once_a_tile() -> None:
    parsed = listing(
        "MOV R0, R1",  # once a program, as the exit
        "top: HGMMA.64x64x16 R8, R8",
        "@P0 BRA ->next",
        "FADD R8, R8",  # only in a tile's last step
        "UTMASTG [R2], R8",
        "next: IADD R0, R0",
        "@P1 BRA ->top",
        "EXIT",
    )
    counted = sass.count_issued(parsed, steps=4, mma_per_step=1)
    assert (counted.step, counted.tile, counted.program) == (4, 2, 2)
    assert counted.per_tile(tiles_per_program=10) == 4 * 4 + 2 + 0.2


def test_nested_persistent_loops() -> None:
    parsed = listing(
        "MOV R0, R1",
        "tile: MOV R8, RZ",
        "step: HGMMA.64x64x16 R8, R8",
        "@P0 BRA ->step",
        "STG [R2], R8",
        "@P1 BRA ->tile",
        "EXIT",
    )
    counted = sass.count_issued(parsed, steps=4, mma_per_step=1)
    assert (counted.step, counted.tile, counted.program) == (2, 3, 2)


def test_waiting_is_not_counted() -> None:
    poll = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2"
    parsed = listing(
        f"top: {poll}",
        "@!P0 BRA ->wait",
        "go: HGMMA.64x64x16 R8, R8",
        "@P1 BRA ->top",
        "STG [R2], R8",
        "EXIT",
        f"wait: {poll}",
        "@!P0 BRA ->wait",
        "BRA ->go",
    )
    counted = sass.count_issued(parsed, steps=5, mma_per_step=1)
    assert (counted.step, counted.tile) == (4, 2)


def test_without_a_loop_everything_counts_once() -> None:
    parsed = listing("LDG R4, [R2]", "@P0 BRA ->end", "STG [R2], R4", "end: EXIT", "NOP")
    counted = sass.count_issued(parsed, steps=0)
    assert (counted.step, counted.tile, counted.program) == (0, 4, 0)

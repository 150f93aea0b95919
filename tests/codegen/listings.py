"""Listings written by hand, as ``cuobjdump`` would print them."""

from __future__ import annotations

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

"""Whether warps compute the same products: read from Triton's layouts, because the machine code does not tell.

A tile that is smaller than what a program's warps cover together is computed by several of them, each the same.
"""

from __future__ import annotations

import re

_LAYOUT = re.compile(
    r"^(#\w+) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[(\d+), (\d+)\].*?instrShape = \[(\d+), (\d+)", re.M
)
_PRODUCT = re.compile(r"(?:tt\.dot|warp_group_dot) .*-> tensor<(\d+)x(\d+)xf32, (#\w+)>")


def repeats(ttgir: str) -> int:
    """How often the most repeated product of a program is computed, from its Triton GPU IR; 1 is as it should be."""
    layouts = {name: tuple(map(int, sizes)) for name, *sizes in _LAYOUT.findall(ttgir)}
    found = [1]
    for rows, columns, name in _PRODUCT.findall(ttgir):
        if name in layouts:
            down, across, m, n = layouts[name]
            found.append(max(1, down * m // int(rows)) * max(1, across * n // int(columns)))
    return max(found)

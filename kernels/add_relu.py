"""Residual addition and ReLU in one elementwise pass: ``out = relu(x + y)``, summed in fp32.

For blocks whose last convolution does not run here; those that do add in the convolution's epilogue.
"""

import torch
import triton
import triton.language as tl

from .epilogue import relu
from .geometry import cdiv
from .launch import count

BLOCK = 2048


@triton.jit
def add_relu(x, y, out, SIZE, BLOCK: tl.constexpr):
    """BLOCK consecutive elements."""
    # the block's start is one 64-bit scalar; the lanes stay 32-bit
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < SIZE - start
    a = tl.load(x + start + lane, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(y + start + lane, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + lane, relu(a + b).to(out.dtype.element_ty), mask=inside)


def launch_add_relu(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """Launches :func:`add_relu` on tensors of equal shape and equal dense strides; ``out`` may be ``x`` or ``y``."""
    size = out.numel()
    if size == 0:
        return
    count("add_relu")
    add_relu[(cdiv(size, BLOCK),)](x, y, out, size, BLOCK=BLOCK, num_warps=4)

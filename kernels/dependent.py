"""Programmatic dependent launch: a kernel's programs start while the kernel before it in the stream still drains.

Such a kernel must wait, before it touches memory, until the kernels before it have finished and what they wrote is
visible. The hardware waits only for the kernel directly before. That is enough, because every program here waits before
it does anything else: a kernel that has finished has waited for its own predecessor, and so on back to one that was
launched in the ordinary way, which starts after everything before it. By the same chain nothing is overwritten that an
earlier kernel may still read. Nothing is loaded before the wait, not even a weight: a kernel directly before may have
cast it or changed its layout.
"""

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .config import ConvConfig
from .launch import has_tma, interpreting


@triton.jit
def wait_for_inputs():
    """Waits until all earlier kernels have finished, then lets the next one start. Every program calls it first."""
    gdc_wait()
    gdc_launch_dependents()


def dependent_launch(config: ConvConfig, device: torch.device) -> bool:
    """Whether to launch dependently: as ``config.pdl`` says from sm_90 on, never in the interpreter.

    It changes when programs start and nothing of the result, so a configuration that asks for it runs anywhere.
    """
    return config.pdl and has_tma(device) and not interpreting()

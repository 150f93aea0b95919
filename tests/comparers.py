"""Every tolerance of the test-suite, with its reason. Tests compare through this module and hold no numbers.

`identical`     integers whose sums are representable leave no room for rounding: bit by bit.
`no_worse_than` floating point: our error against an fp64 reference, in units of PyTorch eager's error.
`trajectory`    the same, after many steps of training.
`same_math`     two fp64 computations of one formula in different orders.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Our error in units of eager's. Forward: one rounding where eager has one an operator, so 1 is expected; 2 absorbs
#: another order of summation. Gradients: up to three roundings in a row (mask, BN, convolution).
FORWARD = 2.0
GRADIENT = 3.0

#: The largest of a few dozen errors is a matter of chance: two draws from one distribution differ by up to this factor
#: on top. A single wrong value is off by far more.
WORST = 2.0

#: After many steps of training, in units of eager's error again: every step multiplies what the ones before left, ours
#: and eager's alike, but how much they left in the directions that grow is a matter of chance.
TRAJECTORY = 10.0

#: Share of the largest reference value by which two fp64 computations may differ: eps (2e-16) times the longest
#: reduction of these tests (about 5,000) times a margin of 10.
SAME_MATH = 1e-11

#: Finite differences against fp64 gradients. Step 1e-6 leaves a truncation error of about 1e-6 times the third
#: derivative and a rounding error of about 1e-10; ten times that is far below any wrong term of a formula.
GRADCHECK = {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-4}


def identical(out: Tensor, expected: Tensor) -> None:
    """Asserts equal shape, dtype and bits, NaN equal to NaN; the message says how many differ and shows the first."""
    assert out.shape == expected.shape, f"shape {tuple(out.shape)}, expected {tuple(expected.shape)}"
    assert out.dtype == expected.dtype, f"dtype {out.dtype}, expected {expected.dtype}"
    differs = ~((out == expected) | (out.isnan() & expected.isnan())) if out.is_floating_point() else out != expected
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(differs.sum())} of {out.numel()} values differ; "
            f"first at {first}: {out[first].item()}, expected {expected[first].item()}"
        )


def errors(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """Root mean square and largest deviation from an fp64 reference; NaN or Inf only where the reference has them."""
    assert reference.dtype == torch.float64, f"the reference must be float64, got {reference.dtype}"
    assert out.shape == reference.shape, f"shape {tuple(out.shape)}, expected {tuple(reference.shape)}"
    finite = reference.isfinite()
    identical(out.double()[~finite], reference[~finite])
    deviation = (out.double() - reference)[finite].abs()
    if deviation.numel() == 0:
        return 0.0, 0.0
    assert not deviation.isnan().any(), "NaN where the reference is finite"
    return math.sqrt(deviation.square().mean().item()), deviation.max().item()


def no_worse_than(out: Tensor, eager: Tensor, reference: Tensor, k: float = FORWARD) -> None:
    """Asserts that ``out`` errs at most ``k`` times as much as ``eager`` of the same dtype.

    That is the root mean square over the tensor; the worst value may err ``k * WORST`` times as much as eager's worst.
    An eager result may be exact by luck: half a unit in the last place of the largest value is always allowed.
    """
    assert out.dtype == eager.dtype, f"dtype {out.dtype}, eager has {eager.dtype}"
    scale = reference[reference.isfinite()].abs().max().item() if reference.numel() else 0.0
    floor = torch.finfo(out.dtype).eps / 2 * scale
    ours, theirs = errors(out, reference), errors(eager, reference)
    for name, mine, other, allowed in zip(("RMS", "worst"), ours, theirs, (k, k * WORST), strict=True):
        assert mine <= max(allowed * other, floor), (
            f"{name} error {mine:.3g} is {mine / (other or math.nan):.2f} times eager's {other:.3g}; allowed: {allowed}"
        )


def trajectory(out: Tensor, eager: Tensor, reference: Tensor) -> None:
    """Asserts that ``out``, many steps of training later, is as near ``reference`` as ``eager`` but for chance."""
    no_worse_than(out, eager, reference, TRAJECTORY)


def same_math(out: Tensor, reference: Tensor) -> None:
    """Asserts that two fp64 results of one formula agree but for the order of their sums."""
    assert out.dtype == torch.float64, f"dtype {out.dtype}, expected float64"
    _, worst = errors(out, reference)
    scale = reference.abs().max().item() if reference.numel() else 0.0
    assert worst <= SAME_MATH * max(scale, 1.0), f"error {worst:.3g} at a scale of {scale:.3g}"

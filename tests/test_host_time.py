"""The host's part of a forward: how it is measured, and a bound on what one forward of ResNet-50 calls."""

from __future__ import annotations

import pytest
import torch
import torchvision

from resnet_triton import convert
from resnet_triton.host_time import calls_of, cpu_us, host_time, only_allocating
from tests.comparers import identical
from tests.networks import basics, images

#: Functions, Python's and C's, that one forward of a converted ResNet-50 may call before any kernel is launched. The
#: same on every machine, unlike a time.
CALLS = 800


def test_resnet50_calls_few_functions() -> None:
    model = convert(torchvision.models.resnet50().eval())
    measured = host_time(model, torch.zeros(1, 3, 32, 32), repeats=5)
    assert 0 < measured.calls <= CALLS
    assert measured.dispatch_us > 0 and measured.plan_us > 0


def test_operators_only_allocate_within_the_block_and_compute_again_after_it() -> None:
    model, x = convert(basics()), images()
    with torch.no_grad():
        expected = model(x)
        with only_allocating() as restart:
            for _ in range(2):
                restart()
                out = model(x)
                assert out.shape == expected.shape and out.dtype == expected.dtype
            counts = calls_of(lambda: (restart(), model(x)))
        identical(model(x), expected)
    assert not any("conv2d" in name for name in counts) and counts["block_tail"] > 0


def test_implementations_come_back_after_an_error() -> None:
    model, x = convert(basics()), images()
    with torch.no_grad():
        expected = model(x)
        with pytest.raises(KeyError), only_allocating():
            raise KeyError
        identical(model(x), expected)


def test_calls_are_counted_and_time_is_of_this_thread() -> None:
    counts = calls_of(lambda: [len("a") for _ in range(7)])
    assert counts["len"] == 7
    busy = cpu_us(lambda: sum(range(20_000)), repeats=20)
    idle = cpu_us(lambda: None, repeats=20)
    assert 0 <= idle < busy

"""The end of a residual block through the operators: what shares a kernel, what is stored, and that it is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resnet_triton import chains, functional, plan, reference, tail, use_backend
from resnet_triton.functional import ConvBN
from tests.comparers import identical, no_worse_than

DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _kernels():
    """Decisions are remembered; what a test makes of them must not be."""
    plan.forget()
    with torch.no_grad(), use_backend("triton"):
        yield
    plan.forget()


def unit(k: int, c: int, kernel: int = 1, stride: int = 1, dtype: torch.dtype = torch.float16) -> ConvBN:
    weight = (torch.randn(k, c, kernel, kernel) / (c * kernel**2) ** 0.5).to(dtype)
    bn = (torch.rand(k) + 0.5, torch.randn(k) / 2, torch.randn(k) / 4, torch.rand(k) + 0.5)
    return ConvBN(weight, None, *bn, stride=stride, padding=kernel // 2)


def plain(x: Tensor, u: ConvBN, residual: Tensor | None = None, relu: bool = True) -> Tensor:
    vectors = (None if v is None or x.dtype != torch.float64 else v.double() for v in u.vectors)
    if x.dtype != torch.float64:
        vectors = iter(u.vectors)
    return reference.conv_bn_act(x, u.weight.to(x.dtype), *vectors, residual, u.eps, relu, u.stride, u.padding)


def whole(x: Tensor, first: ConvBN, second: ConvBN, third: ConvBN, project: ConvBN | None, after: ConvBN | None):
    """A bottleneck and the next one's first convolution, one PyTorch operator after another."""
    shortcut = x if project is None else plain(x, project, relu=False)
    y = plain(plain(plain(x, first), second), third, shortcut)
    return y, None if after is None else plain(y, after)


def compare(outs, theirs, exact) -> None:
    for out, other, right in zip(outs, theirs, exact, strict=True):
        assert (out is None) == (right is None)
        if out is not None:
            no_worse_than(out, other, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", (1, 2))
def test_a_block_and_the_next_ones_reduction_are_one_kernel(step: int, dtype: torch.dtype, counts: Counter) -> None:
    x = torch.randn(2, 64, 9, 6).relu().to(dtype)
    first, second, third, project = (
        unit(64, 64, dtype=dtype), unit(64, 64, 3, dtype=dtype), unit(128, 64, dtype=dtype), unit(128, 64, dtype=dtype)
    )  # fmt: skip
    after = unit(64, 128, dtype=dtype)
    units = (first, second, third)
    out = functional.block_and_next(x, *units, downsample=project, next=after, subsample=step)
    assert counts.total() <= 2 and counts.keys() & {"conv_chain", "chain_rolling"}
    sizes = [tuple(t.shape) for t in out]
    assert sizes == [(2, 128, -(-9 // step), -(-6 // step)), (2, 64, 9, 6)]
    theirs, exact = whole(x, *units, project, after), whole(x.double(), *units, project, after)
    kept = [(y[:, :, ::step, ::step], t) for y, t in (theirs, exact)]
    compare(out, *kept)
    again = functional.block_and_next(x, *units, downsample=project, next=after, subsample=step)
    for a, b in zip(out, again, strict=True):
        identical(a, b)


@pytest.mark.parametrize(
    "holds", [h for h, _ in chains.ways(next(iter(chains.bottleneck_tails(50, 1, 64)))[1])], ids=sorted
)
def test_every_way_to_share_a_kernel_is_right(
    holds: frozenset[str], counts: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each chain, with the rest of the block's end beside it."""

    def only(sizes: chains.Tail, *others: object) -> chains.Chain | None:
        shape = chains.chain_shape(sizes, holds)
        configs = chains.configs_of(shape, torch.float16, others[2])
        return chains.Chain(shape, chains.Choice(configs[0].kernel, configs[0], "the test says so"), holds)

    monkeypatch.setattr(chains, "choose_chain", only)
    x = torch.randn(2, 64, 5, 7).relu().half()
    units = unit(64, 64), unit(64, 64, 3), unit(128, 64)
    project, after = unit(128, 64), unit(64, 128)
    out = functional.block_and_next(x, *units, downsample=project, next=after)
    assert counts.total() == 5 - len(holds)
    compare(out, whole(x, *units, project, after), whole(x.double(), *units, project, after))


def test_without_chains_every_convolution_has_a_kernel(counts: Counter) -> None:
    x = torch.randn(1, 64, 4, 4).relu().half()
    units, after = (unit(64, 64), unit(64, 64, 3), unit(64, 64)), unit(64, 64)
    together = functional.block_and_next(x, *units, next=after)
    counts.clear()
    with use_backend("triton", chains=False):
        apart = functional.block_and_next(x, *units, next=after)
    assert counts.total() == 4 and not counts.keys() & {"conv_chain", "chain_rolling"}
    exact = whole(x.double(), *units, None, after)
    compare(together, apart, exact)


@pytest.mark.parametrize("pixels", ((4, 4), (2, 2)), ids=str)
def test_the_average_of_the_last_block(pixels: tuple[int, int], counts: Counter) -> None:
    """Within the last convolution, and behind it where images are too small."""
    x, shortcut = torch.randn(3, 64, *pixels).relu().half(), torch.randn(3, 128, *pixels).relu().half()
    second, third = unit(64, 64, 3), unit(128, 64)
    out, none = functional.block_tail(x, shortcut, second, third, pool=True)
    fused = pixels == (4, 4)
    assert none is None and out.shape == (3, 128, 1, 1)
    assert (counts["conv1x1_pool"], counts["global_avg_pool"]) == (fused, not fused)

    def average(cast: Callable[[Tensor], Tensor]) -> Tensor:
        return plain(plain(cast(x), second), third, cast(shortcut)).mean((2, 3), keepdim=True)

    no_worse_than(out, average(lambda t: t), average(Tensor.double))


def test_a_projections_bn_may_wait_until_it_is_added(counts: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    x, shortcut = torch.randn(2, 32, 4, 5).half(), torch.randn(2, 16, 4, 5).half()
    second, third, project = unit(32, 32, 3), unit(64, 32), unit(64, 16)
    expected = functional.block_tail(x, shortcut, second, third, downsample=project)[0]
    counts.clear()
    decide = tail._decide
    monkeypatch.setattr(tail, "_decide", lambda *args: decide(*args)._replace(chain=None, bn_waits=True))
    out = functional.block_tail(x, shortcut, second, third, downsample=project)[0]
    assert counts["conv1x1"] == 2 and counts.total() == 3

    def exact(t: Tensor, s: Tensor) -> Tensor:
        return plain(plain(t, second), third, plain(s, project, relu=False))

    no_worse_than(out, exact(x, shortcut), exact(x.double(), shortcut.double()))
    no_worse_than(expected, exact(x, shortcut), exact(x.double(), shortcut.double()))


def test_bad_combinations() -> None:
    x = torch.randn(1, 64, 4, 4).half()
    second, third, after = unit(64, 64, 3), unit(64, 64), unit(64, 64)
    with pytest.raises(ValueError, match="pool comes alone; got subsample=1, pool=True, next present"):
        functional.block_tail(x, x, second, third, next=after, pool=True)
    with pytest.raises(ValueError, match=r"subsample must be at least 1.*got subsample=0"):
        functional.block_tail(x, x, second, third, subsample=0)
    with pytest.raises(ValueError, match=r"the shortcut must be|residual must be"):
        functional.block_tail(x, x[:, :, :3], second, third)

"""``expand`` in the interpreter: identity and projection, channels whole and in chunks, overhanging tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.expand import Following, Project, expand_configs, launch_expand
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import Normalised
from tests.cases import Guarded, integers
from tests.comparers import identical, no_worse_than

#: Whole channels up to 32 in one chunk.
TILE = ConvConfig("expand", (1, 1, 32), 32, 32, 4, 2)


@dataclass(frozen=True)
class Inputs:
    """Operands of one launch; vectors are ``[2, channels]``: scale and shift."""

    c2: Tensor
    prologue: Tensor | None
    w3: Tensor
    third: Tensor
    shortcut: Tensor
    wd: Tensor | None = None
    projected: Tensor | None = None
    stride: int = 1


def inputs(
    n: int, p: int, q: int, c: int, k: int, cx: int = 0, stride: int = 1, odd: int = 0,
    prologue: bool = True, dtype: torch.dtype = torch.float16,
) -> Inputs:  # fmt: skip
    """Small integers. ``odd`` is by how much less than ``stride`` times its output the projection's image is."""
    h, w = p * stride - odd, q * stride - odd
    return Inputs(
        integers(n, p, q, c, dtype=dtype),
        integers(2, c, low=-1, high=2) if prologue else None,
        integers(k, c, dtype=dtype, low=-1, high=1),
        integers(2, k, low=-1, high=2),
        integers(n, h, w, cx, dtype=dtype) if cx else integers(n, p, q, k, dtype=dtype, low=-9, high=9),
        integers(k, cx, dtype=dtype, low=-1, high=1) if cx else None,
        integers(2, k, low=-1, high=2) if cx else None,
        stride,
    )


def normals(given: Inputs) -> Inputs:
    """The same sizes, random normal values."""

    def like(t: Tensor | None) -> Tensor | None:
        return None if t is None else (torch.randn(t.shape) * (t.shape[-1] ** -0.5 if t.dim() == 2 else 1)).to(t.dtype)

    def vectors(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.stack((torch.rand(t.shape[1]) + 0.5, torch.randn(t.shape[1]) / 2))

    return Inputs(
        like(given.c2), vectors(given.prologue), like(given.w3), vectors(given.third), like(given.shortcut),
        like(given.wd), vectors(given.projected), given.stride,
    )  # fmt: skip


def computed(given: Inputs, dtype: torch.dtype) -> Tensor:
    """The formula step by step in ``dtype``: ``torch.float64``, or what eager PyTorch does in another."""
    c2, w3, shortcut = (t.to(dtype) for t in (given.c2, given.w3, given.shortcut))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def bn(t: Tensor, vectors: Tensor) -> Tensor:
        scale, shift = vectors.to(wide)
        return (t.to(wide) * scale + shift).to(dtype)

    if given.prologue is not None:
        c2 = bn(c2, given.prologue).relu().to(given.c2.dtype).to(dtype)
    if given.wd is not None:
        s = given.stride
        shortcut = bn(shortcut[:, ::s, ::s] @ given.wd.to(dtype).T, given.projected)
    return (bn(c2 @ w3.T, given.third) + shortcut).relu()


def run(given: Inputs, config: ConvConfig, precision: str = "ieee") -> Tensor:
    guarded = Guarded()
    n, p, q, _ = given.c2.shape

    def normalised(vectors: Tensor | None) -> Normalised | None:
        return None if vectors is None else Normalised(*(guarded.input(v) for v in vectors))

    shortcut = guarded.input(given.shortcut)
    if given.wd is not None:
        bn = normalised(given.projected)
        shortcut = Project(shortcut, guarded.input(given.wd), bn.scale, bn.shift, given.stride)
    y = guarded.output(n, p, q, given.w3.shape[0], dtype=given.c2.dtype)
    launch.COUNTS.clear()
    launch_expand(
        guarded.input(given.c2), normalised(given.prologue), guarded.input(given.w3), normalised(given.third),
        shortcut, y, config, precision,
    )  # fmt: skip
    assert launch.COUNTS == {"expand": 1}
    guarded.verify()
    return y


def check_exact(given: Inputs, config: ConvConfig) -> None:
    expected = computed(given, torch.float64).to(given.c2.dtype)
    assert expected.isfinite().all() and expected.count_nonzero() > 0, "the case tests nothing"
    identical(run(given, config), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"n": 2, "p": 4, "q": 4, "c": 32, "k": 64}, id="no waste"),
        pytest.param({"n": 3, "p": 5, "q": 3, "c": 24, "k": 72}, id="overhang in rows, columns and channels"),
        pytest.param({"n": 1, "p": 3, "q": 5, "c": 72, "k": 40}, id="chunks of channels"),
        pytest.param({"n": 2, "p": 3, "q": 3, "c": 16, "k": 32, "prologue": False}, id="no prologue"),
        pytest.param({"n": 3, "p": 5, "q": 3, "c": 16, "k": 72, "cx": 24}, id="projection"),
        pytest.param({"n": 1, "p": 3, "q": 5, "c": 40, "k": 32, "cx": 72}, id="projection in chunks"),
        pytest.param({"n": 1, "p": 3, "q": 5, "c": 24, "k": 40, "cx": 72}, id="its pixels in chunks alone"),
    ],
)
def test_exact(given: dict, dtype: torch.dtype) -> None:
    check_exact(inputs(**given, dtype=dtype), TILE)


@pytest.mark.parametrize("box", [(2, 4, 4), (16, 1, 2)], ids=str)
@pytest.mark.parametrize("odd", [0, 1], ids=["even", "odd"])
def test_exact_projection_of_stride_2(odd: int, box: tuple[int, int, int]) -> None:
    check_exact(inputs(3, 3, 3, 16, 40, 24, 2, odd), replace(TILE, box=box))
    check_exact(inputs(1, 2, 3, 48, 32, 72, 2, odd), replace(TILE, box=box))


def test_columns_are_shared_among_programs_only_where_rows_are_few() -> None:
    check_exact(inputs(4, 8, 8, 16, 80), replace(TILE, bn=16))
    check_exact(inputs(1, 2, 2, 16, 80), replace(TILE, bn=16))


@pytest.mark.parametrize("cx", [0, 24], ids=["identity", "projection"])
def test_exact_in_halves_of_a_block(cx: int) -> None:
    check_exact(inputs(2, 3, 4, 48, 200, cx), replace(TILE, bn=128))


def test_projection_is_right_where_a_scale_is_zero() -> None:
    given = inputs(2, 3, 3, 16, 32, 16)
    given.third[0, ::2] = 0
    given.projected[0, 1::4] = 0
    check_exact(given, TILE)


@pytest.mark.parametrize("cx", [0, 16], ids=["identity", "projection"])
def test_nan_and_inf_propagate(cx: int) -> None:
    given = inputs(1, 4, 5, 16, 32, cx)
    given.third[0].clamp_(min=1)
    given.c2[0, 1, 2, 3] = float("nan")
    given.shortcut[0, 3, 3, 7] = float("nan")
    given.shortcut[0, 2, 1, 5] = float("inf")
    expected = computed(given, torch.float64).half()
    assert expected.isnan().any() and expected.isfinite().any()
    identical(run(given, TILE), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cx", [0, 48], ids=["identity", "projection"])
def test_close(cx: int, dtype: torch.dtype) -> None:
    given = normals(inputs(2, 4, 5, 48, 64, cx, dtype=dtype))
    no_worse_than(run(given, TILE), computed(given, dtype), computed(given, torch.float64))


def test_tiling_and_repeats_do_not_change_a_bit() -> None:
    given = normals(inputs(3, 4, 5, 24, 48, 24))
    first = run(given, TILE)
    for config in (TILE, replace(TILE, box=(1, 1, 64), bn=16)):
        identical(run(given, config), first)


def run_following(given: Inputs, w: Tensor, parts: int, config: ConvConfig) -> tuple[Tensor, Tensor, Tensor]:
    """``y``, the next block's raw output and its parts."""
    guarded = Guarded()
    (n, p, q, _), k = given.c2.shape, given.w3.shape[0]
    y, c = (guarded.output(n, p, q, channels, dtype=given.c2.dtype) for channels in (k, w.shape[0]))
    sums = guarded.output(parts, 3, w.shape[0], dtype=torch.float32)
    shortcut = guarded.input(given.shortcut)
    if given.wd is not None:
        shortcut = Project(shortcut, guarded.input(given.wd), *given.projected, given.stride)
    launch_expand(
        guarded.input(given.c2), Normalised(*given.prologue), guarded.input(given.w3), Normalised(*given.third),
        shortcut, y, config, "ieee", Following(guarded.input(w), c, sums),
    )  # fmt: skip
    guarded.verify()
    return y, c, sums


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        pytest.param((3, 4, 5, 24, 72), TILE, id="identity"),
        pytest.param((3, 4, 5, 16, 64, 24), TILE, id="projection"),
        pytest.param((2, 3, 3, 16, 64, 24, 2, 1), replace(TILE, box=(2, 4, 4)), id="stride 2 of an odd image"),
    ],
)
@pytest.mark.parametrize("parts", [1, 3])
def test_the_next_convolution_and_its_statistics(
    sizes: tuple, config: ConvConfig, parts: int, dtype: torch.dtype
) -> None:
    given = inputs(*sizes, dtype=dtype)
    w = integers(16, sizes[4], dtype=dtype, low=-1, high=1)
    y, c, sums = run_following(given, w, parts, config)
    expected = computed(given, torch.float64).to(dtype)
    identical(y, expected)
    identical(c, (expected.double() @ w.double().T).to(dtype))
    count, mean, m2 = sums.double().unbind(1)
    rows = c.flatten(0, 2)
    identical(count.sum(0), torch.full((16,), float(len(rows)), dtype=torch.float64))
    merged = (count * mean).sum(0) / len(rows)
    spread = (m2 + count * (mean - merged).square()).sum(0)
    variance = rows.double().var(0, correction=0)
    for out, right in ((merged, rows.double().mean(0)), (spread / len(rows), variance)):
        no_worse_than(out.half(), right.half(), right)


def test_the_next_convolution_needs_whole_channels() -> None:
    given = inputs(1, 2, 2, 48, 32)
    with pytest.raises(ValueError, match=r"all of 48 channels in one chunk .* got bk=32 and 16 filters"):
        run_following(given, integers(16, 32, dtype=torch.float16), 1, TILE)


def test_refused() -> None:
    given = inputs(1, 2, 2, 16, 32, 16, 2)
    with pytest.raises(ValueError, match=r"stride must be 1 or 2, got 3"):
        run(replace(given, stride=3), TILE)
    with pytest.raises(ValueError, match=r"pixels 1x2x2 of c2, got \(1, 4, 4\) at stride 1"):
        run(replace(given, stride=1), TILE)


@pytest.mark.parametrize("filters", (8, 24, 96))
def test_no_configuration_for_following_filters_that_are_no_power_of_two(filters: int) -> None:
    """What :func:`launch_expand` refuses is not offered."""
    assert expand_configs(ConvShape(2, 8, 8, 16, 64), 2, None, 16)
    assert expand_configs(ConvShape(2, 8, 8, 16, 64), 2, None, filters) == []

"""``kernels/wgrad.py`` and ``kernels/sum_parts.py`` interpreted: weight gradients, channel sums, Gram matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import BNBackward, Normalised
from resnet_triton.kernels.sum_parts import launch_sum_parts
from resnet_triton.kernels.wgrad import (
    MOST_PART_BYTES,
    gram_configs,
    launch_gram,
    launch_wgrad,
    tap_group,
    wgrad_configs,
    wgrad_workspace_bytes,
)
from tests.cases import Guarded, integers
from tests.comparers import GRADIENT, identical, no_worse_than

#: Each kind of convolution in ResNet-18 to 152 and in CIFAR's, with few channels and pixels. Every size overhangs.
CONVS = [
    ConvShape(3, 7, 5, 16, 16, 3, 3, 1, 1),
    ConvShape(2, 5, 6, 64, 64, 3, 3, 1, 1),
    ConvShape(3, 10, 6, 16, 16, 3, 3, 2, 1),
    ConvShape(3, 6, 10, 16, 32, 3, 3, 2, 1),
    ConvShape(3, 7, 5, 16, 64),
    ConvShape(3, 7, 5, 64, 16),
    ConvShape(3, 7, 5, 64, 32),
    ConvShape(3, 7, 5, 16, 32, stride=2),
    ConvShape(3, 6, 10, 64, 128, stride=2),
    ConvShape(2, 9, 7, 16, 24, 3, 3, 1, 2, 2),
    ConvShape(3, 8, 8, 24, 16, 3, 3, 2, 2, 2),
]
THREE, STRIDED, ONE, SLICED = CONVS[0], CONVS[2], CONVS[4], CONVS[7]
#: Pixels of x that no box of dy meets: no filter column covers dy, the padding is no multiple of the dilation.
UNUSUAL = [
    ConvShape(2, 7, 9, 16, 24, 3, 3, 1, 0),
    ConvShape(2, 6, 5, 16, 24, 3, 3, 1, 2),
    ConvShape(2, 7, 9, 16, 24, 3, 3, 1, 1, 2),
    ConvShape(2, 5, 6, 16, 24, 1, 3, 1, 1),
    ConvShape(2, 5, 6, 16, 24, 1, 1, 1, 1),
]
PROLOGUES = [(kind, normalised) for kind in ("none", "mask", "bn") for normalised in (False, True)]


def config(bn: int = 32, bk: int = 32, split: int = 1, box: tuple[int, int, int] = (2, 4, 8), warps: int = 4):
    return ConvConfig("wgrad", box, bn, bk, warps, 2, split=split)


class Case:
    """Integers for one gradient, and what is expected of it."""

    def __init__(self, shape: ConvShape, kind: str, normalised: bool, dtype: torch.dtype = torch.float16) -> None:
        s = self.shape = shape
        self.x = integers(s.n, s.h, s.w, s.c, dtype=dtype)
        self.dy = integers(s.n, s.p, s.q, s.k, dtype=dtype)
        self.other = None if kind == "none" else integers(*self.dy.shape, dtype=dtype)
        self.g = integers(3, s.k, low=-1, high=2) if kind == "bn" else None
        self.vectors = integers(2, s.c, low=-1, high=2) if normalised else None

    def gradients(self, cast=Tensor.double) -> tuple[Tensor, Tensor]:
        """dw ``[K,R,S,C]`` and the sums, computed in the dtype that ``cast`` gives."""
        s, d, h = self.shape, cast(self.dy), cast(self.x)
        if self.g is not None:
            g1, g2, g3 = self.g.to(d.dtype)
            d = g1 * d + g2 + g3 * cast(self.other)
        elif self.other is not None:
            d = torch.where(self.other > 0, d, torch.zeros_like(d))
        if self.vectors is not None:
            h = (h * self.vectors[0].to(h.dtype) + self.vectors[1].to(h.dtype)).relu()
        nchw = [t.permute(0, 3, 1, 2) for t in (h, d)]
        dw = conv2d_weight(nchw[0], (s.k, s.c, s.r, s.s), nchw[1], s.stride, s.padding, s.dilation)
        return dw.permute(0, 2, 3, 1), d.sum((0, 1, 2))

    def run(self, tiling: ConvConfig, summed: bool = True, precision: str = "ieee") -> tuple[Tensor, Tensor | None]:
        """dw and the sums of the kernel, which touches nothing else."""
        s, guarded = self.shape, Guarded()
        dw = guarded.output(s.k, s.r, s.s, s.c, dtype=torch.float32)
        sums = guarded.output(s.k, dtype=torch.float32) if summed else None
        other, g, vectors = (guarded.input(t) for t in (self.other, self.g, self.vectors))
        launch.COUNTS.clear()
        launch_wgrad(
            guarded.input(self.dy), guarded.input(self.x), dw, sums, s, other if g is None else BNBackward(other, g),
            None if vectors is None else Normalised(*vectors), tiling, precision,
        )  # fmt: skip
        assert {"wgrad": 1, **({"sum_parts": 1} if tiling.split > 1 else {})} == launch.COUNTS
        guarded.verify()
        return dw, sums

    def check(self, tiling: ConvConfig) -> None:
        dw, sums = self.gradients()
        assert dw.count_nonzero() and sums.count_nonzero(), "the case tests nothing"
        out, out_sums = self.run(tiling)
        identical(out, dw.float())
        identical(out_sums, sums.float())


@pytest.mark.parametrize("shape", CONVS + UNUSUAL, ids=str)
def test_exact_shapes(shape: ConvShape) -> None:
    Case(shape, "bn", True).check(config(64, 64))


@pytest.mark.parametrize("shape", [THREE, ONE], ids=str)
@pytest.mark.parametrize(("kind", "normalised"), PROLOGUES)
def test_exact_prologues(kind: str, normalised: bool, shape: ConvShape) -> None:
    Case(shape, kind, normalised).check(config(split=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [STRIDED, ONE], ids=str)
def test_exact_dtypes(shape: ConvShape, dtype: torch.dtype) -> None:
    Case(shape, "bn", True, dtype).check(config())
    Case(shape, "mask", False, dtype).check(config(split=2))


@pytest.mark.parametrize("box", [(8, 1, 4), (1, 16, 8), (16, 4, 2)], ids=str)
@pytest.mark.parametrize("shape", [THREE, STRIDED], ids=str)
def test_exact_boxes(shape: ConvShape, box: tuple[int, int, int]) -> None:
    """One row of pixels is padded as a whole; boxes may be larger than the image."""
    Case(shape, "none", True).check(config(box=box))


@pytest.mark.parametrize(("tile", "group"), [(16, (3, 3)), (32, (1, 3)), (64, (1, 1))], ids=str)
@pytest.mark.parametrize("shape", [THREE, STRIDED], ids=str)
def test_exact_tap_groups(shape: ConvShape, tile: int, group: tuple[int, int]) -> None:
    tiling = config(tile, tile, 2, warps=1)
    assert tap_group(shape, tiling) == group
    Case(shape, "none", True).check(tiling)


@pytest.mark.parametrize("kind", ["none", "bn"])
def test_exact_rows_of_padding(kind: str) -> None:
    """Boxes of whole rows and one filter row a program: the gradient is zeroed where x is padding."""
    tiling = config(32, 32, 2, (2, 1, 8), warps=1)
    assert tap_group(THREE, tiling) == (1, 3)
    Case(ConvShape(3, 5, 8, 16, 24, 3, 3, 1, 1), kind, True).check(tiling)


@pytest.mark.parametrize(
    ("kind", "normalised", "box"),
    [("none", True, (2, 4, 8)), ("bn", False, (16, 2, 2)), ("mask", True, (1, 2, 16))],
    ids=str,
)
def test_exact_halves_of_columns(kind: str, normalised: bool, box: tuple[int, int, int]) -> None:
    """128 input channels a program and stride 2: a box of either half of the columns for the taps of a filter row."""
    tiling = config(16, 128, 2, box)
    assert tap_group(STRIDED, tiling) == (1, 3)
    Case(STRIDED, kind, normalised).check(tiling)


def test_exact_strided_tap_of_wide_blocks() -> None:
    tiling = config(64, 128, warps=1)
    assert tap_group(STRIDED, tiling) == (1, 1)
    Case(STRIDED, "mask", True).check(tiling)


@pytest.mark.parametrize("split", [2, 5, 6])
def test_exact_splits(split: int) -> None:
    """Six boxes of pixels."""
    shape = ConvShape(3, 8, 4, 16, 16, 3, 3, 1, 1)
    Case(shape, "bn", True).check(config(split=split, box=(1, 4, 4)))


def test_blocks_of_channels() -> None:
    """The sums come once, from the first block of input channels."""
    Case(ConvShape(2, 3, 5, 40, 24, 1, 3, 1, 1), "mask", True).check(config(16, 16))
    Case(ConvShape(2, 9, 5, 40, 24), "mask", True).check(config(16, 16, 2))


def test_without_sums() -> None:
    case = Case(THREE, "none", True)
    for split in (1, 2):
        dw, sums = case.run(config(split=split), summed=False)
        assert sums is None
        identical(dw, case.gradients()[0].float())


@pytest.mark.parametrize("shape", [THREE, ONE], ids=str)
def test_repeats_are_bitwise_equal(shape: ConvShape) -> None:
    case = Case(shape, "mask", False)
    case.x, case.dy = torch.randn(case.x.shape).half(), torch.randn(case.dy.shape).half()
    first = case.run(config(split=2))
    for out, again in zip(first, case.run(config(split=2)), strict=True):
        identical(out, again)


@pytest.mark.parametrize("shape", [THREE, STRIDED, ONE], ids=str)
def test_close(shape: ConvShape) -> None:
    case = Case(shape, "none", True)
    case.x, case.dy = torch.randn(case.x.shape).half(), torch.randn(case.dy.shape).half()
    case.vectors = torch.stack((torch.rand(shape.c) + 0.5, torch.randn(shape.c)))
    out, sums = case.run(config(split=2))
    eager = case.gradients(lambda t: t)
    exact = case.gradients()
    no_worse_than(out.half(), eager[0], exact[0], GRADIENT)
    no_worse_than(sums.half(), eager[1], exact[1], GRADIENT)


def test_nan_propagates() -> None:
    case = Case(ONE, "mask", True)
    case.x[1, 2, 3, 4] = float("nan")
    case.dy[0, 1, 2, 5] = float("nan")
    case.other[0, 1, 2, 5] = 1
    dw, sums = case.run(config(split=2))
    expected = torch.zeros(dw.shape, dtype=torch.bool)
    expected[..., 4] = expected[5] = True
    identical(dw.isnan(), expected)
    assert sums.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("kind", ["none", "mask"])
def test_inputs_with_gaps(kind: str) -> None:
    """Channels dense, images and rows with gaps, as a slice of a larger batch has them."""
    case = Case(THREE, kind, False)
    s = case.shape
    dw, sums = torch.empty(s.k, 3, 3, s.c), torch.empty(s.k)
    wide = torch.full((s.n, s.h, s.w + 2, s.c + 8), float("nan"), dtype=torch.float16)
    wide[:, :, : s.w, : s.c] = case.x
    launch_wgrad(case.dy, wide[:, :, : s.w, : s.c], dw, sums, s, case.other, None, config(), "ieee")
    identical(dw, case.gradients()[0].float())


def gram(x: Tensor, vectors: Tensor | None, stride: int, tiling: ConvConfig) -> tuple[Tensor, Tensor]:
    guarded, c = Guarded(), x.shape[-1]
    s2, s1 = guarded.output(c, c, dtype=torch.float32), guarded.output(c, dtype=torch.float32)
    prologue = None if vectors is None else Normalised(*guarded.input(vectors))
    launch.COUNTS.clear()
    launch_gram(guarded.input(x), s2, s1, stride, prologue, tiling, "ieee")
    assert launch.COUNTS["wgrad"] == 1
    guarded.verify()
    return s2, s1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("stride", "c", "tile", "split"), [(1, 32, 32, 2), (2, 32, 32, 2), (1, 40, 16, 1), (2, 16, 64, 1)]
)
def test_gram(stride: int, c: int, tile: int, split: int, normalised: bool, dtype: torch.dtype) -> None:
    x, vectors = integers(3, 7, 5, c, dtype=dtype), integers(2, c, low=-1, high=2) if normalised else None
    s2, s1 = gram(x, vectors, stride, config(tile, tile, split))
    h = x[:, ::stride, ::stride].double().flatten(0, 2)
    if vectors is not None:
        h = (h * vectors[0] + vectors[1]).relu()
    assert h.count_nonzero()
    identical(s2, (h.T @ h).float())
    identical(s1, h.sum(0).float())


@pytest.mark.parametrize("h", [6, 7])
def test_what_no_tensor_map_describes(h: int) -> None:
    shape = ConvShape(1, h, 13 - h, 16, 16, 3, 3, 2, 1)
    with pytest.raises(ValueError, match=f"stride 2 on {h}x{13 - h} pixels; allowed"):
        Case(shape, "none", False).run(config())


def test_more_shares_than_boxes() -> None:
    with pytest.raises(ValueError, match="split=9 shares 4 boxes of pixels; allowed: at most 4"):
        Case(ConvShape(1, 16, 14, 16, 16), "none", False).run(config(split=9))


@pytest.mark.parametrize(("rows", "length", "tail"), [(1, 5, 0), (3, 700, 24), (19, 64, 8)])
def test_sum_parts(rows: int, length: int, tail: int) -> None:
    guarded = Guarded()
    parts = integers(rows, length + tail)
    out = guarded.output(length, dtype=torch.float32)
    rest = guarded.output(tail, dtype=torch.float32) if tail else None
    launch_sum_parts(guarded.input(parts), out, rest)
    guarded.verify()
    identical(torch.cat((out, rest)) if tail else out, parts.sum(0))


def test_sum_parts_names_a_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"out and tail have 4 elements together; parts \(2, 5\)"):
        launch_sum_parts(torch.zeros(2, 5), torch.zeros(4))


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [THREE, STRIDED, ONE, SLICED, ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1), ConvShape(256, 7, 7, 512, 2048)],
    ids=str,
)
def test_configurations(shape: ConvShape, itemsize: int) -> None:
    """Each shares the boxes there are, within the workspace; the first is tried on the small shapes."""
    configs = wgrad_configs(shape, itemsize, True, True)
    assert len(set(configs)) == len(configs) > 0
    for tiling in configs:
        assert wgrad_workspace_bytes(shape, tiling) <= 1.05 * MOST_PART_BYTES
    if shape.n < 8:
        Case(shape, "mask", True, {2: torch.float16, 4: torch.float32}[itemsize]).check(configs[0])


@pytest.mark.parametrize(("c", "stride"), [(16, 1), (64, 2)])
def test_gram_configurations(c: int, stride: int) -> None:
    x = integers(3, 7, 5, c, dtype=torch.float16)
    s2, s1 = gram(x, None, stride, gram_configs(ConvShape(3, 7, 5, c, c, stride=stride), 2)[0])
    h = x[:, ::stride, ::stride].double().flatten(0, 2)
    identical(s2, (h.T @ h).float())
    identical(s1, h.sum(0).float())

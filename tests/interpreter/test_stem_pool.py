"""``kernels/stem_pool.py`` in the interpreter: the stem's convolution, BN, ReLU and max-pool in one kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton import functional, plan, reference, use_backend
from resnet_triton.kernels import stem, stem_pool
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import out_size
from tests.cases import EPS, VARIANCES, Guarded, integers
from tests.comparers import identical, no_worse_than
from tests.interpreter.test_stem import cells_of, packed


def config(tn: int = 1, rows: int = 64, tw: int = 64) -> ConvConfig:
    return ConvConfig("stem_pool", (tn, rows, tw), 64, 64, 4, 2)


def run(x: Tensor, weight: Tensor, operands: Operands, tiling: ConvConfig, aligned: bool = True) -> Tensor:
    """The pooled output ``[n, i, j, k]`` for an image and a filter in PyTorch's layouts."""
    (n, _, h, w), k = x.shape, weight.shape[0]
    sizes = [out_size(out_size(side, 7, 2, 3), 3, 2, 1) for side in (h, w)]
    guarded = Guarded()
    xs = guarded.input(cells_of(x, *stem.stem_cells(h, w, aligned)))
    y = guarded.output(n, *sizes, k, dtype=x.dtype)
    stem_pool.launch_stem_pool(xs, guarded.input(packed(weight)), y, operands, tiling, "ieee")
    guarded.verify()
    return y


def expected(x: Tensor, weight: Tensor, o: Operands) -> Tensor:
    """The same in fp64, not rounded."""
    y = F.conv2d(x.double(), weight.double(), None if o.bias is None else o.bias.double(), 2, 3)
    if o.var is not None:
        vectors = [None if v is None else v.double() for v in (o.mean, o.var, o.gamma, o.beta)]
        y = F.batch_norm(y, *vectors, eps=o.eps)
    return F.max_pool2d(y.relu(), 3, 2, 1).permute(0, 2, 3, 1)


def operands(k: int, bn: bool = True, affine: bool = True, bias: bool = False) -> Operands:
    """Vectors for which every result is an integer or a half."""
    gamma, beta, mean = (integers(k, low=low, high=high) for low, high in ((-2, 2), (-7, 7), (-4, 4)))
    return Operands(
        bias=integers(k, low=-5, high=5) if bias else None,
        gamma=gamma if bn and affine else None,
        beta=beta if bn and affine else None,
        mean=mean if bn else None,
        var=torch.tensor(VARIANCES)[torch.randint(0, 4, (k,))] if bn else None,
        eps=EPS,
        relu=True,
    )


CASES = {
    "one tile": (1, 16, 20, 16, torch.float16, config(), {}),
    "strips of rows and of columns, which both overhang": (1, 23, 36, 16, torch.float16, config(2, 4, 8), {}),
    "images that overhang": (3, 12, 18, 16, torch.float16, config(2, 64, 32), {}),
    "odd rows and columns of the convolution": (1, 17, 33, 16, torch.float16, config(4, 64, 16), {}),
    "even rows, odd columns": (1, 11, 14, 16, torch.float16, config(4, 6, 16), {}),
    "one pixel": (2, 1, 1, 8, torch.float16, config(4, 2, 16), {}),
    "two columns": (1, 9, 4, 8, torch.float16, config(4, 8, 16), {}),
    "64 filters and a bias": (1, 9, 9, 64, torch.float16, config(4, 8, 16), {"bias": True}),
    "bias without BN": (1, 9, 10, 24, torch.float16, config(4, 8, 16), {"bn": False, "bias": True}),
    "no vectors": (1, 9, 10, 8, torch.float16, config(4, 8, 16), {"bn": False}),
    "BN without gamma and beta": (1, 9, 10, 8, torch.float16, config(4, 8, 16), {"affine": False}),
    "bf16": (1, 13, 10, 8, torch.bfloat16, config(4, 4, 16), {}),
    "fp32": (1, 13, 10, 8, torch.float32, config(4, 4, 16), {}),
}


@pytest.mark.parametrize(("n", "h", "w", "k", "dtype", "tiling", "vectors"), CASES.values(), ids=CASES)
def test_is_exact(n, h, w, k, dtype, tiling, vectors, counts) -> None:
    x, weight = integers(n, 3, h, w, dtype=dtype, low=-1, high=1), integers(k, 3, 7, 7, dtype=dtype, low=-1, high=1)
    vectors = operands(k, **vectors)
    exact = expected(x, weight, vectors)
    assert exact.count_nonzero() > 0
    identical(run(x, weight, vectors, tiling), exact.to(dtype))
    assert counts == {"stem_pool": 1}


def test_padding_never_wins() -> None:
    """Where every value inside is negative, the result is 0, not what a window outside the image would give."""
    x, weight = torch.ones(1, 3, 9, 9).half(), -torch.ones(8, 3, 7, 7).half()
    vectors = Operands(bias=torch.full((8,), 20.0), relu=True)  # 20 outside, at most 20 - 48 inside
    y = run(x, weight, vectors, config(4, 2, 16))
    assert (y == 0).all()
    identical(y, expected(x, weight, vectors).half())


def test_is_close_and_repeats_bitwise() -> None:
    n, k, dtype = 2, 16, torch.float16
    x, weight = torch.randn(n, 3, 26, 35).to(dtype), (torch.randn(k, 3, 7, 7) / 12).to(dtype)
    vectors = Operands(
        gamma=torch.randn(k), beta=torch.randn(k), mean=torch.randn(k) / 4, var=torch.rand(k) + 0.5, eps=1e-5, relu=True
    )
    y = run(x, weight, vectors, config(2, 8, 32))
    norm = F.batch_norm(F.conv2d(x, weight, None, 2, 3), vectors.mean, vectors.var, vectors.gamma, vectors.beta)
    eager = F.max_pool2d(norm.relu(), 3, 2, 1).permute(0, 2, 3, 1)
    no_worse_than(y, eager, expected(x, weight, vectors))
    identical(run(x, weight, vectors, config(2, 8, 32)), y)
    identical(run(x, weight, vectors, config(1, 6, 64), aligned=False), y)


def test_nan_and_infinity_stay_in_their_windows() -> None:
    """A NaN reaches what the convolution on cells makes of it, which is an 8x8 window; nothing further."""
    x, weight = integers(1, 3, 40, 40, dtype=torch.float16), integers(8, 3, 7, 7, dtype=torch.float16)
    vectors = operands(8)
    clean = run(x, weight, vectors, config(4, 8, 16))
    x[0, 1, 20, 20] = float("nan")
    y = run(x, weight, vectors, config(4, 8, 16))
    exact = expected(x, weight, vectors)
    assert y[exact.isnan()].isnan().all() and exact.isnan().any()
    touched = torch.zeros(10, 10, dtype=torch.bool)
    touched[4:7, 4:7] = True
    identical(y[:, ~touched], clean[:, ~touched])
    x[0, 1, 20, 20] = float("inf")
    y = run(x, weight.abs() + 1, Operands(relu=True), config(4, 8, 16))
    identical(y[0, 5, 5], torch.full((8,), float("inf")).half())


def test_rejects() -> None:
    xs, w, y = torch.zeros(1, 5, 8, 16), torch.zeros(8, 4, 4, 16), torch.zeros(1, 1, 2, 8)
    with pytest.raises(ValueError, match="has a ReLU and no residual"):
        stem_pool.launch_stem_pool(xs, w, y, Operands(), config(), "ieee")
    with pytest.raises(ValueError, match="has a ReLU and no residual"):
        stem_pool.launch_stem_pool(xs, w, y, Operands(residual=y, relu=True), config(), "ieee")
    for tiling in (
        ConvConfig("stem_pool", (1, 3, 64), 64, 64),
        ConvConfig("stem_pool", (1, 4, 64), 64, 32),
        ConvConfig("stem_pool", (1, 4, 64), 16, 64),
    ):
        with pytest.raises(ValueError, match="stem_pool of 24 filters needs bn >= 24, bk=64, even"):
            stem_pool.launch_stem_pool(xs, w, torch.zeros(1, 1, 2, 24), Operands(relu=True), tiling, "ieee")


def test_empty_batch_launches_nothing(counts) -> None:
    xs = torch.empty(0, 5, 8, 16)
    stem_pool.launch_stem_pool(
        xs, torch.zeros(8, 4, 4, 16), torch.empty(0, 1, 2, 8), Operands(relu=True), config(), "ieee"
    )
    assert not counts


def test_configs() -> None:
    found = stem_pool.stem_pool_configs(112, 64, 2)
    assert {c.bm for c in found} == {64} and {c.box[1] for c in found} == {112, 56, 28, 14, 8, 4}
    assert stem_pool.stem_pool_configs(1, 64, 2)
    assert not stem_pool.stem_pool_configs(112, 128, 2), "registers hold 64 filters"
    assert not stem_pool.stem_pool_configs(112, 64, 4), "fp32 spills"


def test_a_driver_that_refuses_the_overlapping_map(monkeypatch: pytest.MonkeyPatch, caplog, counts) -> None:
    """The stem and its max-pool then run one after the other, which is said once."""
    monkeypatch.setattr(plan, "_no_overlap", set())
    x, weight = torch.randn(1, 3, 10, 12).half(), (torch.randn(16, 3, 7, 7) / 12).half()

    def refuse(error: str):
        def launch(*_: object) -> None:
            raise RuntimeError(error)

        monkeypatch.setattr("resnet_triton.kernels.stem_pool.launch_stem_pool", launch)

    try:
        with torch.no_grad(), use_backend("triton"):
            expected = F.max_pool2d(F.relu(F.conv2d(x, weight, stride=2, padding=3)), 3, 2, 1)
            refuse("out of memory")
            with pytest.raises(RuntimeError, match="out of memory"):
                functional.stem(x, weight)
            refuse("Triton Error [CUDA]: invalid argument")
            counts.clear()
            y = functional.stem(x, weight)
            assert counts["stem_pool"] == 0 and counts["max_pool"] == 1
            no_worse_than(y, expected, reference.stem(x.double(), weight.double()))
            functional.stem(x, weight)
        assert len([r for r in caplog.records if "refuses the tensor map" in r.message]) == 1
    finally:
        monkeypatch.undo()
        plan.forget()

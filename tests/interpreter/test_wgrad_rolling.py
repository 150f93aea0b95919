"""``kernels/wgrad_rolling.py`` interpreted: shares that begin anywhere, overhangs, prologue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resnet_triton import use_backend
from resnet_triton.devices import known_devices
from resnet_triton.kernels import launch
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.kernels.prologue import BNBackward, Normalised
from resnet_triton.kernels.wgrad import MOST_PART_BYTES, launch_wgrad, wgrad_configs, wgrad_workspace_bytes
from resnet_triton.kernels.wgrad_rolling import rolling_steps, rolling_wgrad_configs
from resnet_triton.training import plan, steps
from resnet_triton.training.reference import Lazy
from resnet_triton.training.steps import Gradient
from tests.cases import Guarded, integers
from tests.comparers import GRADIENT, identical, no_worse_than
from tests.interpreter.test_wgrad import Case as Whole

#: Images, columns and channels overhang; all columns and channels fit; images do, and one row is all there is.
SHAPES = [
    ConvShape(3, 3, 7, 16, 24, 3, 3, 1, 1),
    ConvShape(2, 4, 8, 32, 16, 3, 3, 1, 1),
    ConvShape(4, 1, 5, 40, 16, 3, 3, 1, 1),
]
LAYER = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)


def config(split: int = 1, box: tuple[int, int, int] = (2, 1, 8), tile: int = 32) -> ConvConfig:
    return ConvConfig("wgrad_rolling", box, tile, tile, 8, 2, split=split)


class Case(Whole):
    """Integers for one gradient; the kernel has no sums and no prologue of dy."""

    def __init__(self, shape: ConvShape, normalised: bool, dtype: torch.dtype = torch.float16) -> None:
        super().__init__(shape, "none", normalised, dtype)

    def gradient(self) -> torch.Tensor:
        return self.gradients()[0].float()

    def launched(self, tiling: ConvConfig) -> torch.Tensor:
        s, guarded = self.shape, Guarded()
        dw = guarded.output(s.k, 3, 3, s.c, dtype=torch.float32)
        vectors = guarded.input(self.vectors)
        launch.COUNTS.clear()
        launch_wgrad(
            guarded.input(self.dy), guarded.input(self.x), dw, None, s, None,
            None if vectors is None else Normalised(*vectors), tiling, "ieee",
        )  # fmt: skip
        assert {"wgrad_rolling": 1, **({"sum_parts": 1} if tiling.split > 1 else {})} == launch.COUNTS
        guarded.verify()
        return dw


@pytest.mark.parametrize(("dtype", "normalised"), [(torch.float16, False), (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact(shape: ConvShape, dtype: torch.dtype, normalised: bool) -> None:
    case = Case(shape, normalised, dtype)
    expected = case.gradient()
    assert expected.count_nonzero(), "the case tests nothing"
    identical(case.launched(config()), expected)


@pytest.mark.parametrize("split", [2, 5, 16])
def test_shares_begin_in_any_row(split: int) -> None:
    """Sixteen rows of tiles, among them those between columns of tiles: a share may be a row of zeros."""
    case = Case(ConvShape(5, 3, 8, 16, 16, 3, 3, 1, 1), True)
    identical(case.launched(config(split, (4, 1, 4), 16)), case.gradient())


@pytest.mark.parametrize("box", [(4, 1, 4), (1, 1, 16), (16, 1, 1)], ids=str)
def test_boxes(box: tuple[int, int, int]) -> None:
    """Boxes may be wider than the image, and of more images than there are."""
    case = Case(ConvShape(3, 2, 5, 16, 16, 3, 3, 1, 1), True)
    identical(case.launched(config(2, box, 16)), case.gradient())


def test_close_and_bitwise_repeatable() -> None:
    case = Case(ConvShape(3, 4, 6, 16, 16, 3, 3, 1, 1), True)
    case.x, case.dy = torch.randn(case.x.shape).half(), torch.randn(case.dy.shape).half()
    case.vectors = torch.stack((torch.rand(16) + 0.5, torch.randn(16)))
    dw = case.launched(config(3, tile=16))
    identical(dw, case.launched(config(3, tile=16)))
    no_worse_than(dw.half(), case.gradients(lambda t: t)[0], case.gradients()[0], GRADIENT)


def test_nan_propagates() -> None:
    case = Case(ConvShape(1, 3, 4, 16, 16, 3, 3, 1, 1), True)
    case.x[0, 1, 2, 4] = float("nan")
    case.dy[0, 0, 1, 5] = float("nan")
    wrong = case.launched(config(box=(4, 1, 4), tile=16)).isnan()
    assert wrong[:, :, :, 4].all() and wrong[5, 1:, :, :].all(), "a NaN meets every pixel of its channel"
    wrong[:, :, :, 4] = wrong[5] = False
    assert not wrong.any()


def test_configurations() -> None:
    """64 channels in 16 bits and nothing on the way of dy; the shares fit the workspace."""
    shape = LAYER
    first, *others = wgrad_configs(shape, 2, True)
    assert [first] == rolling_wgrad_configs(shape, 2) and {c.kernel for c in others} == {"wgrad"}
    assert first.kernel == "wgrad_rolling" and 100 < first.split <= rolling_steps(shape, first)
    assert wgrad_workspace_bytes(shape, first) <= 1.05 * MOST_PART_BYTES
    assert {c.kernel for c in wgrad_configs(shape, 2, True, True) + wgrad_configs(shape, 4)} == {"wgrad"}
    for other in (ConvShape(8, 56, 56, 64, 64, 3, 3, 2, 1), ConvShape(8, 56, 56, 64, 128, 3, 3, 1, 1)):
        assert not rolling_wgrad_configs(other, 2)


def test_the_plan_takes_and_names_it() -> None:
    """For ResNet-50's second convolutions of 64 channels; where sums are wanted, ``wgrad`` runs."""
    target, work = known_devices()["NVIDIA H200"], plan.Work("wgrad", LAYER, prologue=True)
    choice = plan.choose(work, torch.bfloat16, "tf32", target, "auto")
    assert choice.realisation == choice.tiling.kernel == "wgrad_rolling" and "against" in choice.reason
    summed = plan.choose(replace(work, moments=True), torch.bfloat16, "tf32", target, "triton")
    assert summed.realisation == summed.tiling.kernel == "wgrad"


def test_a_step_runs_it() -> None:
    case = Case(ConvShape(1, 2, 4, 64, 64, 3, 3, 1, 1), False)
    x, dy = (t.permute(0, 3, 1, 2) for t in (case.x, case.dy))
    launch.COUNTS.clear()
    with use_backend("triton"):
        dw = steps.wgrad(Gradient(dy), Lazy(x), torch.empty(64, 64, 3, 3), (1, 1, 1))
    assert launch.COUNTS["wgrad_rolling"] == 1 and not launch.COUNTS["wgrad"]
    identical(dw.permute(0, 2, 3, 1), case.gradient())


def test_what_it_refuses() -> None:
    case = Case(ConvShape(1, 4, 4, 16, 16, 3, 3, 1, 1), False)
    with pytest.raises(ValueError, match="split=6 shares 5 rows of tiles; allowed: at most 5"):
        case.launched(config(6))
    with pytest.raises(ValueError, match="with boxes of one row, got"):
        case.launched(config(box=(2, 2, 8)))
    with pytest.raises(ValueError, match="neither sums nor a prologue of dy"):
        case.run(config())
    dy = BNBackward(case.dy, integers(3, 16))
    with pytest.raises(ValueError, match="neither sums nor a prologue of dy"):
        launch_wgrad(case.dy, case.x, torch.empty(16, 3, 3, 16), None, case.shape, dy, None, config(), "ieee")

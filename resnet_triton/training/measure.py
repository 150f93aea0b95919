"""One step of training on a GPU, ours and the library's with its passes: checked in wide arithmetic, timed in turns.

Both sides are the functions of :mod:`.steps` themselves, told how to run, so what is measured is what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import backend, cost
from ..devices import Target
from ..kernels.config import ConvConfig
from ..kernels.geometry import ConvShape, cdiv
from ..measure import Errors, Problem
from ..plan import Choice
from . import plan, reference, steps
from .block import Unit
from .plan import Work
from .reference import GramBackward, Lazy, wide

#: Errors that are as good as none: what rounding operands to the dtype of the products does. Sums over pixels are
#: fp32 on both sides, but the library's operands are not always rounded.
ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 2.0**-22}
ROUNDING_TF32 = 2.0**-10
EPS = 1e-5


class TrainProblem(Problem):
    """One step of training with products.

    Args:
        work: what is computed.
        dtype, device, seed, sets: as for :class:`..measure.Problem`.
    """

    def __init__(
        self,
        work: Work,
        dtype: torch.dtype,
        device: torch.device | str = "cuda",
        *,
        seed: int = 0,
        sets: int | None = None,
    ) -> None:
        super().__init__(dtype, device, seed, sets, plan.moved_bytes(work, dtype))
        assert work.shape is not None
        self.work, self.shape = work, work.shape
        self.operands = [self._operands() for _ in range(self.sets)]
        self._kept: dict[int, tuple[Tensor, ...]] = {}  # outputs rotate as the operands do

    def run_ours(self, config: ConvConfig, i: int = 0) -> tuple[Tensor, ...]:
        return self._forced(Choice(self.work.step, config, "being measured"), i)

    def outputs(self) -> tuple[Tensor, ...]:
        return ()  # made anew by each run; see :meth:`validate`

    def unfused(self, i: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def convert(t: Tensor) -> Tensor:
            return t.to(dtype if t.dtype == self.dtype else wide(dtype))

        with backend.use_backend("cudnn"):
            return self._run({name: convert(t) for name, t in self.operands[i].items()})

    def baselines(self) -> dict[str, Callable[[int], object]]:
        """The library's convolution with this package's passes around it, which is what would run instead."""
        if not self.work.has_library:
            return {}
        return {"library": lambda i: self._forced(Choice("cudnn", None, "being measured"), i)}

    def predict(self, config: ConvConfig, target: Target) -> cost.Prediction:
        return plan.predict(self.work, config, self.dtype, backend.dot_precision(self.dtype), target)

    def validate(self, config: ConvConfig) -> str | None:
        if not self._wanted:
            self._prepare_reference()
        with _nan_in_new_tensors():  # an element that nothing writes is found
            return super().validate(config)

    def _prepare_reference(self) -> None:
        super()._prepare_reference()
        least = ROUNDING[self.dtype]
        if self.dtype == torch.float32 and backend.dot_precision(self.dtype) == "tf32":
            least = ROUNDING_TF32
        self._library_errors = tuple(Errors(max(e.l2, least), max(e.largest, least)) for e in self._library_errors)

    def compared(self, found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Sums as one, moments as mean and variance: the rest does not depend on how many programs there were."""
        if self.work.step in ("conv_stats", "stem_conv_stats") and len(found) == 2:
            count, mean, m2 = reference.merge(found[1])
            return found[0], mean, m2 / count
        if self.work.step in ("dgrad", "gram_dgrad") and len(found) == 2:
            return found[0], *found[1].sum(0)
        return found

    def _forced(self, choice: Choice, i: int) -> tuple[Tensor, ...]:
        with plan.forcing(self.work, choice):
            self._kept[i] = self._run(self.operands[i])
        return self._kept[i]

    def _run(self, o: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The step on operands of any dtype, as chosen; its outputs."""
        work, s = self.work, self.shape
        geometry = (s.stride, s.padding, s.dilation)
        h = Lazy(o["x"], o.get("stats"))
        found: Any
        if work.step == "conv_stats":
            found = steps.conv(h, o["w"], geometry, work.moments, o.get("residual"))
        elif work.step == "stem_conv_stats":
            found = steps.stem_conv(o["x"], o["w"], work.moments)
        elif work.step == "stem_wgrad":
            found = (steps.stem_wgrad(o["dz"], o["x"], o["w"]),)
        elif work.step == "gram":
            found = steps.gram(h, s.stride, o["w"])
        elif work.step == "gram_dgrad":
            back = GramBackward(*(o[name] for name in ("none", "none", "none", "wp", "mm", "rho", "v")))
            found = steps.gram_dgrad(o["dz"], back, h, s.stride, work.prologue, work.prologue, o["w"])
        elif work.step == "expand":
            return self._expand(h, o)
        else:
            dc = steps.Gradient(o["dz"], o.get("c"), o.get("g"))
            if work.step == "dgrad":
                sign = None if work.prologue else o["x"]
                found = steps.dgrad(
                    dc, o["w"], geometry, h, o.get("residual"), max(1, work.residual_stride), sign
                )  # fmt: skip
            elif work.moments:
                found = steps.matrix_wgrad(dc.dz, h, s.stride, o["w"])
            else:
                found = (steps.wgrad(dc, h, o["w"], geometry),)
        return tuple(t for t in found if t is not None)

    def _expand(self, h: Lazy, o: dict[str, Tensor]) -> tuple[Tensor, ...]:
        work = self.work
        project = following = None
        if work.project is not None:
            unit = Unit(o["wd"], None, None, None, None, EPS, (work.project.stride, 0, 1))
            project = (unit, o["project_stats"])
        if work.following:
            following = Unit(o["w_next"], None, None, None, None, EPS, (1, 0, 1))
        y, then = steps.expand(h, o["w"], o["out_stats"], o["shortcut"], project, following)
        if following is None:
            return (y,)
        if then is None:
            c, parts = steps.conv(Lazy(y), following.weight, following.geometry, True)
            assert parts is not None
            then = c, steps.finalise(parts, None, None, EPS, "")
        c, stats = then
        return y, c, stats[reference.MEAN], stats[reference.VAR]

    # Operands

    def _operands(self) -> dict[str, Tensor]:
        """One set, by name: activations and weights channels_last, images as they come."""
        work, s = self.work, self.shape
        made = {"w": self._filters(s)}
        if work.step.startswith("stem"):
            made["x"] = self.random(s.n, s.c, s.h, s.w).to(self.dtype)
        else:
            x = self.random(s.n, s.h, s.w, s.c)
            made["x"] = self._pixels(x if work.prologue else x.relu_())
        if work.prologue or work.step == "expand":  # which never has an input that is stored
            made["stats"] = self._stats(s.c)
        if work.step in ("dgrad", "wgrad", "gram_dgrad", "stem_wgrad"):
            made["dz"] = self._pixels(self.random(s.n, s.p, s.q, s.k))
        if work.backward:
            made["c"] = self._pixels(self.random(s.n, s.p, s.q, s.k))
            made["g"] = torch.stack([1 + self.random(s.k) / 4, self.random(s.k) / 8, self.random(s.k) / 8])
        if work.residual_stride and work.step == "conv_stats":
            made["residual"] = self._pixels(self.random(s.n, s.p, s.q, s.k))
        elif work.residual_stride:
            sizes = (s.n, cdiv(s.h, work.residual_stride), cdiv(s.w, work.residual_stride), s.c)
            made["residual"] = self._pixels(self.random(*sizes))
        if work.step == "expand":
            made |= self._expand_operands()
        if work.step == "gram_dgrad":
            made |= {
                "wp": self.random(s.k, s.c).mul_(s.k**-0.5).to(self.dtype), "none": self.random(0),
                "mm": self.random(s.c, s.c).mul_(s.c**-0.5).to(self.dtype),
                "rho": torch.full_like(self.random(s.c), 0.25), "v": self.random(s.c) / 8,
            }  # fmt: skip
        return made

    def _expand_operands(self) -> dict[str, Tensor]:
        work, s = self.work, self.shape
        made = {"out_stats": self._stats(s.k)}
        source = work.project or ConvShape(s.n, s.p, s.q, s.k, s.k)
        made["shortcut"] = self._pixels(self.random(source.n, source.h, source.w, source.c).relu_())
        if work.project is not None:
            made |= {"wd": self._filters(work.project), "project_stats": self._stats(s.k)}
        if work.following:
            made["w_next"] = self._filters(ConvShape(s.n, s.p, s.q, s.k, work.following))
        return made

    def _pixels(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).permute(0, 3, 1, 2)

    def _filters(self, s: ConvShape) -> Tensor:
        weight = self.random(s.k, s.r, s.s, s.c).mul_((2 / s.reduction) ** 0.5)
        return self._pixels(weight)

    def _stats(self, k: int) -> Tensor:
        gamma, beta, mean, var = (self.random(k) / 4 for _ in range(4))
        return reference.stats_from(mean, 1 + var.abs(), 1 + gamma, beta, EPS)


@contextlib.contextmanager
def _nan_in_new_tensors() -> Iterator[None]:
    """Within the block, torch fills what it allocates with NaN."""
    on, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)

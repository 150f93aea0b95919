"""Random operands of the checks, PyTorch's and fp64 results of the same, and how results are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from resnet_triton import functional, reference
from resnet_triton.backend import dot_precision, use_backend
from resnet_triton.entries import chain_shape_of
from resnet_triton.functional import ConvBN
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.measure import errors
from resnet_triton.steps import UNIT

from .check import torch_dtype

EPS = 1e-5
Result = dict[str, Any]
T = TypeVar("T")


@contextmanager
def precision_of(dtype: str) -> Iterator[None]:
    """TF32 on for every dtype but ``"ieee"``."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype != "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def verdict(outs: Sequence[Tensor], library: Sequence[Tensor], wanted: Sequence[Tensor], factor: float = 2.0) -> Result:
    """The worst of several results: errors of ours and of the library against ``wanted`` (fp64)."""
    worst: Result = {"ratio": -1.0}
    wrong = None
    for out, theirs, right in zip(outs, library, wanted, strict=True):
        ours, other = errors(out, right), errors(theirs, right)
        wrong = wrong or ours.exceeds(other, factor)
        ratio = ours.l2 / other.l2 if other.l2 else float(ours.l2 > 0)
        if not ratio <= worst["ratio"]:  # also for NaN
            worst = {"error": ours.l2, "library_error": other.l2, "ratio": round(ratio, 3)}
    return {"status": "wrong" if wrong else "ok", "detail": wrong or "", **worst}


def poison(like: Tensor) -> None:
    """Fills memory that the allocator hands out next for a tensor of this size with NaN."""
    if like.is_cuda:
        torch.empty_like(like).fill_(float("nan"))


def ran(kernel: str, run: Callable[[], T]) -> T:
    """The result of ``run`` under our backend; raises if it did not launch the kernel."""
    from resnet_triton.kernels.launch import COUNTS

    before = COUNTS[kernel]
    with use_backend("triton"):
        out = run()
    if COUNTS[kernel] == before:
        raise AssertionError(f"{kernel} was not launched")
    return out


def wide(tensor: Tensor | None) -> Tensor | None:
    """The same in fp64."""
    return None if tensor is None else tensor.double()


def image(n: int, c: int, h: int, w: int, dtype: torch.dtype, device: str) -> Tensor:
    """A random non-negative channels_last activation."""
    x = torch.empty(n, c, h, w, dtype=dtype, device=device, memory_format=torch.channels_last)
    return x.normal_().relu_()


def norm(k: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random gamma, beta, mean, var (fp32)."""
    gamma, beta, mean, var = (torch.randn(k, device=device) for _ in range(4))
    return 1 + gamma / 4, beta / 4, mean / 4, 1 + var.abs()


class Conv:
    """Random operands of one convolution with its epilogue, ``N,C,H,W``."""

    def __init__(self, shape: dict, epilogue: dict, dtype: str, device: str) -> None:
        s = self.shape = ConvShape(**shape)
        e = self.epilogue = Epilogue(**epilogue)
        kind = torch_dtype(dtype)
        self.x = image(s.n, s.c, s.h, s.w, kind, device)
        weight = torch.randn(s.k, s.r, s.s, s.c, device=device) * (2 / s.reduction) ** 0.5
        self.weight = weight.to(kind).permute(0, 3, 1, 2)
        self.vectors: list[Tensor | None] = [torch.randn(s.k, device=device) if e.bias else None]
        self.vectors += norm(s.k, device) if e.bn else [None] * 4
        self.residual = image(s.n, s.k, s.p, s.q, kind, device) if e.residual else None
        self.geometry = (s.stride, s.padding, s.dilation)

    def planned(self) -> Tensor:
        """Through the public function."""
        stride, padding, dilation = self.geometry
        bias, gamma, beta, mean, var = self.vectors
        return functional.conv_bn_act(
            self.x, self.weight, bias, gamma, beta, mean, var, residual=self.residual, eps=EPS,
            relu=self.epilogue.relu, stride=stride, padding=padding, dilation=dilation,
        )  # fmt: skip

    def launched(self, config: ConvConfig) -> Tensor:
        """By an explicit configuration, into NaN."""
        from resnet_triton.kernels.dispatch import launch_conv
        from resnet_triton.kernels.epilogue import Operands

        s, x = self.shape, self.x.permute(0, 2, 3, 1)
        y = torch.full((s.n, s.p, s.q, s.k), float("nan"), dtype=x.dtype, device=x.device)
        residual = None if self.residual is None else self.residual.permute(0, 2, 3, 1)
        bias, gamma, beta, mean, var = self.vectors
        operands = Operands(residual, bias, gamma, beta, mean, var, EPS, self.epilogue.relu)
        launch_conv(x, self.weight.permute(0, 2, 3, 1), y, s, operands, config, dot_precision(x.dtype))
        return y.permute(0, 3, 1, 2)

    def ours(self, config: dict | None) -> Tensor:
        """As planned, or with a given configuration."""
        if config is None:
            return self.planned()
        return self.launched(ConvConfig.from_dict(config))

    def eager(self, images: slice = slice(None)) -> Tensor:
        """By PyTorch in the same dtype, of some images."""
        return self._reference(images, lambda t: t)

    def exact(self, images: slice = slice(None)) -> Tensor:
        """In fp64, of some images."""
        return self._reference(images, wide)

    def _reference(self, images: slice, cast: Callable[[Tensor | None], Tensor | None]) -> Tensor:
        x, weight = cast(self.x[images]), cast(self.weight)
        assert x is not None and weight is not None
        bias, gamma, beta, mean, var = map(cast, self.vectors)
        residual = None if self.residual is None else cast(self.residual[images])
        relu, (stride, padding, dilation) = self.epilogue.relu, self.geometry
        return reference.conv_bn_act(
            x, weight, bias, gamma, beta, mean, var, residual, EPS, relu, stride, padding, dilation
        )


class Block:
    """Random operands of a block's end, ``N,C,H,W``.

    Args:
        shape: of its convolutions, as a chain's.
        dtype, device: of activations and weights.
        zero_last: whether the gamma of the BN before the addition is 0, as where training begins.
        pool: whether the average over the image is wanted.
    """

    def __init__(self, shape: dict, dtype: str, device: str, zero_last: bool, pool: bool) -> None:
        s = self.shape = chain_shape_of(shape)
        kind, self.pool = torch_dtype(dtype), pool

        def unit(conv: ConvShape | None) -> ConvBN | None:
            if conv is None:
                return None
            weight = torch.randn(conv.k, conv.r, conv.s, conv.c, device=device) * (2 / conv.reduction) ** 0.5
            places = (conv.stride, conv.padding, conv.dilation)
            return ConvBN(weight.to(kind).permute(0, 3, 1, 2), None, *norm(conv.k, device), EPS, *places)

        def pixels(n: int, h: int, w: int, c: int) -> Tensor:
            return image(n, c, h, w, kind, device)

        self.t = pixels(*s.source)
        self.shortcut = self.t if s.first else pixels(*s.shortcut)
        units = {name: unit(getattr(s, name)) for name in ("first", "conv", "expand", "project", "reduce")}
        if zero_last and units["expand"] is not None and units["expand"].gamma is not None:
            units["expand"].gamma.zero_()
        self.units = {name: each for name, each in units.items() if each is not None}

    def planned(self) -> list[Tensor]:
        """Through the public function: y, and what follows."""
        return self._through(functional, lambda t: t)

    def launched(self, config: ConvConfig) -> list[Tensor]:
        """By an explicit configuration, into NaN."""
        from resnet_triton.kernels.chain import ChainUnits, Unit, launch_chain
        from resnet_triton.kernels.epilogue import Operands

        s, t = self.shape, self.t.permute(0, 2, 3, 1)
        sizes = [s.stored] + ([] if s.reduce is None else [(s.reduce.n, s.reduce.p, s.reduce.q, s.reduce.k)])
        outs = [torch.full(size, float("nan"), dtype=t.dtype, device=t.device) for size in sizes]
        units = {
            name: Unit(unit.weight.permute(0, 2, 3, 1), Operands(None, *unit.vectors, eps=EPS, relu=name != "project"))
            for name, unit in self.units.items()
        }
        shortcut = t if s.first else self.shortcut.permute(0, 2, 3, 1)
        after = outs[1] if len(outs) > 1 else None
        parts: dict[str, Any] = {"conv": None, **units}
        launch_chain(t, shortcut, outs[0], after, ChainUnits(**parts), s, config, dot_precision(t.dtype))
        return [out.permute(0, 3, 1, 2) for out in outs]

    def ours(self, config: dict | None) -> list[Tensor]:
        """As planned, or with a given configuration."""
        return self.planned() if config is None else self.launched(ConvConfig.from_dict(config))

    def eager(self) -> list[Tensor]:
        """By PyTorch in the same dtype, operator by operator."""
        return self._through(reference, lambda t: t)

    def exact(self) -> list[Tensor]:
        """In fp64, nothing between the convolutions rounded."""
        return self._through(reference, wide)

    def _through(self, module: Any, cast: Callable[[Any], Any]) -> list[Tensor]:
        units = {
            name: unit._replace(**{field: cast(getattr(unit, field)) for field in UNIT})
            for name, unit in self.units.items()
        }
        convs = [units[name] for name in ("first", "conv", "expand") if name in units]
        then = {"downsample": units.get("project"), "next": units.get("reduce"), "pool": self.pool}
        run, inputs = module.block_tail, [cast(self.t), cast(self.shortcut)]
        if self.shape.first:
            run, inputs = module.block_and_next, inputs[:1]
        y, after = run(*inputs, *convs, subsample=self.shape.subsample, **then)
        return [y] if after is None else [y, after]


def network(depth: int, dtype: str, batch: int, size: int, device: str) -> tuple[torch.nn.Module, Tensor]:
    """A ResNet with random weights and the BN statistics of random images, and other images."""
    try:
        import torchvision.models as zoo
    except (ImportError, RuntimeError):
        import resnet_triton.models as zoo
    model = getattr(zoo, f"resnet{depth}")().to(device)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain average of all batches
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(batch, 3, size, size, device=device))
    model = model.eval().requires_grad_(False).to(torch_dtype(dtype), memory_format=torch.channels_last)
    x = torch.randn(batch, 3, size, size, device=device).to(torch_dtype(dtype))
    return model, x.contiguous(memory_format=torch.channels_last)

"""Inputs and expected outputs of chains of convolutions, and the checks that every chain kernel has to pass."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from resnet_triton import reference
from resnet_triton.kernels import launch
from resnet_triton.kernels.chain import ChainUnits, Unit, launch_chain
from resnet_triton.kernels.config import ConvConfig, Epilogue
from resnet_triton.kernels.epilogue import Operands
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from tests.cases import VARIANCES, ConvInputs, Guarded, conv_inputs, integers
from tests.comparers import identical, no_worse_than

#: The convolutions of a chain, and whether a ReLU follows each before anything is added.
RELU = {"first": True, "conv": True, "expand": True, "project": False, "reduce": True}


@dataclass(frozen=True)
class ChainInputs:
    """Inputs of one chain: of each convolution's :class:`ConvInputs` only the weight and the vectors count."""

    shape: ChainShape
    t: Tensor
    shortcut: Tensor
    conv: ConvInputs | None
    expand: ConvInputs
    project: ConvInputs | None
    reduce: ConvInputs | None
    first: ConvInputs | None = None

    @property
    def units(self) -> dict[str, ConvInputs]:
        """The convolutions that are present, by name."""
        return {name: unit for name in RELU if (unit := getattr(self, name)) is not None}

    def replaced(self, **changes: object) -> ChainInputs:
        """The same with some fields changed."""
        return replace(self, **changes)


def chain(
    n: int, h: int, w: int, mid: int, wide: int, stride: int = 1, dilation: int = 1,
    project: tuple[int, int] | None = None, reduce: int | None = None, subsample: int = 1, conv: bool = True,
    first: bool = False,
) -> ChainShape:  # fmt: skip
    """A bottleneck block, with its first 1x1 or from behind it.

    Args:
        n, h, w: images, rows and columns of the 3x3's input, or of the chain's where it begins behind the 3x3.
        mid, wide: channels of the 3x3 and of the block's output.
        stride, dilation: of the 3x3.
        project: channels of the shortcut and the stride of the 1x1 on it, or None for an identity.
        reduce: channels of the next block's first 1x1, or None.
        subsample: of the stored output.
        conv: whether the 3x3 is part of the chain.
        first: whether the 1x1 in front of it is.
    """
    middle = ConvShape(n, h, w, mid, mid, 3, 3, stride, dilation, dilation) if conv else None
    p, q = (middle.p, middle.q) if middle else (h, w)
    shortcut = None
    if project is not None:
        channels, step = project
        shortcut = ConvShape(n, step * p, step * q, channels, wide, stride=step)
    after = ConvShape(n, p, q, wide, reduce) if reduce else None
    before = ConvShape(n, h, w, project[0] if project else wide, mid) if first else None
    return ChainShape(middle, ConvShape(n, p, q, mid, wide), shortcut, after, subsample, before)


def chain_inputs(
    shape: ChainShape,
    dtype: torch.dtype = torch.float16,
    bn: bool = True,
    bias: bool = False,
    affine: bool = True,
    vector_dtype: torch.dtype = torch.float32,
) -> ChainInputs:
    """Random small integers; ``affine`` is whether BN has gamma and beta."""

    def unit(conv: ConvShape | None) -> ConvInputs | None:
        if conv is None:
            return None
        inputs = conv_inputs(conv, Epilogue(bn=bn, bias=bias), dtype, affine, vector_dtype)
        if not bn:
            return inputs
        # scales of at most 1 keep three convolutions in a row within fp16
        small = torch.tensor(VARIANCES[2:], dtype=vector_dtype)
        return inputs.replaced(var=small[torch.randint(0, 2, (conv.k,))])

    # a wide range, so that sums with a projection are not representable in 16 bits
    shortcut = integers(*shape.shortcut, dtype=dtype, low=-99, high=99)
    t = integers(*shape.source, dtype=dtype)
    if shape.first is not None:
        shortcut = t
    return ChainInputs(shape, t, shortcut, **{name: unit(getattr(shape, name)) for name in RELU})


def forward(inputs: ChainInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``y, t_next`` by the unfused reference computed in ``dtype``, NHWC.

    In fp64, ``h``, ``y`` and ``t_next`` are rounded to the dtype of the inputs, and nothing else is; in any other
    dtype, every operator rounds.
    """
    exact = dtype == torch.float64
    rounded = inputs.t.dtype if exact else dtype

    def convolve(name: str, x: Tensor, residual: Tensor | None = None) -> Tensor:
        unit = inputs.units[name]
        s = unit.shape
        vectors = (None if v is None else v.double() if exact else v for v in unit.vectors)
        if unit.bias is not None and not exact:
            vectors = (unit.bias.to(dtype), *unit.vectors[1:])
        w = unit.w.permute(0, 3, 1, 2).to(dtype)
        return reference.conv_bn_act(x, w, *vectors, residual, unit.eps, RELU[name], s.stride, s.padding, s.dilation)

    h, shortcut = (t.permute(0, 3, 1, 2).to(dtype) for t in (inputs.t, inputs.shortcut))
    if inputs.first is not None:
        h = convolve("first", h).to(rounded).to(dtype)
    if inputs.conv is not None:
        h = convolve("conv", h).to(rounded).to(dtype)
    if inputs.project is not None:
        shortcut = convolve("project", shortcut)
    y = convolve("expand", h, shortcut).to(rounded)
    t_next = None
    if inputs.reduce is not None:
        t_next = convolve("reduce", y.to(dtype)).to(rounded).permute(0, 2, 3, 1)
    step = inputs.shape.subsample
    return y.permute(0, 2, 3, 1)[:, ::step, ::step], t_next


def expected(inputs: ChainInputs) -> tuple[Tensor, Tensor | None]:
    """``y, t_next`` by the fp64 reference, with the roundings that a chain makes."""
    return forward(inputs, torch.float64)


def run(inputs: ChainInputs, config: ConvConfig, precision: str = "ieee") -> tuple[Tensor, Tensor | None]:
    """``y, t_next`` of ``config.kernel``; only that kernel runs, and no stray element is written or used.

    Inputs that are one tensor stay one.
    """
    guarded, dtype = Guarded(), inputs.t.dtype
    y = guarded.output(*inputs.shape.stored, dtype=dtype)
    t_next = None
    if (s := inputs.shape.reduce) is not None:
        t_next = guarded.output(s.n, s.p, s.q, s.k, dtype=dtype)
    t = guarded.input(inputs.t)
    shortcut = t if inputs.shortcut is inputs.t else guarded.input(inputs.shortcut)
    units = {
        name: Unit(
            guarded.input(unit.w),
            Operands(None, *(guarded.input(v) for v in unit.vectors), eps=unit.eps, relu=RELU[name]),
        )
        for name, unit in inputs.units.items()
    }
    launch.COUNTS.clear()
    parts = ChainUnits(**{name: units.get(name) for name in RELU})
    launch_chain(t, shortcut, y, t_next, parts, inputs.shape, config, precision)
    assert {config.kernel: 1} == launch.COUNTS
    guarded.verify()
    return y, t_next


def check_exact(inputs: ChainInputs, config: ConvConfig) -> None:
    """Bit by bit the fp64 reference, rounded where a chain rounds."""
    for out, right in zip(run(inputs, config), expected(inputs), strict=True):
        if right is None:
            assert out is None
            continue
        assert right.isfinite().all() and right.count_nonzero() > 0, "the case tests nothing"
        identical(out, right)


def check_close(inputs: ChainInputs, config: ConvConfig) -> None:
    """Random normal values: no worse than eager PyTorch of the same dtype, which runs every operator by itself."""
    normal = normals(inputs)
    eager = forward(normal, normal.t.dtype)
    # the right result is of the whole chain in fp64: nothing between the convolutions is rounded
    wide = forward(normal.replaced(t=normal.t.double(), shortcut=normal.shortcut.double()), torch.float64)
    for out, theirs, right in zip(run(normal, config), eager, wide, strict=True):
        if out is not None:
            no_worse_than(out, theirs, right)


def normals(inputs: ChainInputs) -> ChainInputs:
    """Random normal values of the same shapes and dtypes."""
    dtype = inputs.t.dtype

    def unit(u: ConvInputs | None) -> ConvInputs | None:
        if u is None:
            return None
        k = u.shape.k
        return u.replaced(
            w=(torch.randn(u.w.shape) / u.shape.reduction**0.5).to(dtype),
            bias=None if u.bias is None else torch.randn(k).to(dtype),
            gamma=None if u.gamma is None else torch.rand(k) + 0.5,
            beta=None if u.beta is None else torch.randn(k),
            mean=None if u.mean is None else torch.randn(k) / 4,
            var=None if u.var is None else torch.rand(k) + 0.5,
            eps=1e-5,
        )

    t = torch.randn(inputs.t.shape).to(dtype)
    shortcut = t if inputs.shortcut is inputs.t else torch.randn(inputs.shortcut.shape).to(dtype)
    return inputs.replaced(
        t=t,
        shortcut=shortcut,
        **{name: unit(getattr(inputs, name)) for name in RELU},
    )

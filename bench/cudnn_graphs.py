"""cuDNN's own fused graphs, a peer of single steps on a GPU where its Python frontend is installed.

A step is one graph: convolution and what stands before and behind it, NHWC, with 16 bits and float32 between its
operations. cuDNN decides whether it has a kernel for the whole graph, and its heuristics choose that kernel; a step is
never split. What cuDNN refuses is a row that says so.

The graphs were built for an H200 without a device (`tests/test_cudnn_graphs.py`), with version 1.32 of the frontend and
9.19 of cuDNN. They were never run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.training import reference
from resnet_triton.training.plan import Work

PROVIDER = "cuDNN fused"
ABSENT = "not installed: pip install nvidia-cudnn-frontend"
REFUSED = "not supported by cuDNN"
EVERY_STEP = "every step"  # that a machine without it has not
#: Steps whose prologues cuDNN takes with vectors in the dtype of the tensors; cuDNN 9.19 has them in float16 only.
NARROW = ("conv_stats", "wgrad")
Run = Callable[[], tuple[Tensor, ...]]
Target = Mapping[str, Any]


class NotSupported(Exception):
    """Why a step has no graph."""


@dataclass(frozen=True)
class Peer:
    """What a row says of it.

    Args:
        status: ``"ok"``, or why there is no time.
        note: the operations of its graph.
        us: microseconds; error: of its first result, as the other sides' are.
    """

    status: str
    note: str = ""
    us: float | None = None
    error: float | None = None


def installed() -> bool:
    """Whether cuDNN's Python frontend is there."""
    return find_spec("cudnn") is not None


@functools.cache
def this_gpu() -> Target:
    """The current CUDA device."""
    import cudnn

    return {"handle": cudnn.create_handle()}


class Graph:
    """One graph of cuDNN: operations are added, then it is built, then it runs on tensors.

    Args:
        dtype: float16 or bfloat16.
        target: what ``cudnn.pygraph`` needs to know of the device, as :func:`this_gpu` has it.

    Raises:
        NotSupported: for another dtype.
    """

    def __init__(self, dtype: torch.dtype, target: Target) -> None:
        import cudnn

        if dtype.itemsize != 2:
            raise NotSupported(f"not asked of cuDNN in {dtype}, only in float16 and bfloat16")
        kind = cudnn.data_type
        self._kinds = {torch.float16: kind.HALF, torch.bfloat16: kind.BFLOAT16, torch.float32: kind.FLOAT}
        self._cudnn, self.dtype, self._target = cudnn, dtype, target
        wide = {"intermediate_data_type": kind.FLOAT, "compute_data_type": kind.FLOAT}
        self._graph = cudnn.pygraph(io_data_type=self._kinds[dtype], **wide, **target)
        self._inputs: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {}
        self._outputs: list[tuple[Any, tuple[int, ...], torch.dtype]] = []
        self.operations: list[str] = []

    def input(self, name: str, *sizes: int, dtype: torch.dtype | None = None) -> Any:
        """A tensor ``[N,C,H,W]`` that is given, NHWC in memory."""
        dtype = dtype or self.dtype
        node = self._graph.tensor(name=name, dim=list(sizes), stride=_nhwc(sizes), data_type=self._kinds[dtype])
        self._inputs[name] = node, sizes, dtype
        return node

    def vector(self, name: str, k: int, dtype: torch.dtype = torch.float32) -> Any:
        """A vector over channels that is given."""
        return self.input(name, 1, k, 1, 1, dtype=dtype)

    def add(self, operation: str, **operands: Any) -> Any:
        """The result of an operation of ``cudnn.pygraph``."""
        self.operations.append(operation)
        return getattr(self._graph, operation)(**operands)

    def affine(self, x: Any, name: str, k: int, dtype: torch.dtype = torch.float32) -> Any:
        """``x * scale + shift`` per channel."""
        scaled = self.add("scale", input=x, scale=self.vector(f"{name} scale", k, dtype))
        return self.add("bias", input=scaled, bias=self.vector(f"{name} shift", k, dtype))

    def total(self, x: Any, k: int) -> None:
        """Outputs the sums over all pixels."""
        self.output(self.add("reduction", input=x, mode=self._cudnn.reduction_mode.ADD), 1, k, 1, 1, wide=True)

    def output(self, node: Any, *sizes: int, wide: bool = False) -> None:
        """Makes a result an output; float32 if ``wide``."""
        dtype = torch.float32 if wide else self.dtype
        shaped(node, *sizes).set_output(True).set_data_type(self._kinds[dtype])
        self._outputs.append((node, sizes, dtype))

    def build(self) -> None:
        """Compiles it.

        Raises:
            NotSupported: cuDNN has no kernel for it.
        """
        modes = [self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK]
        try:
            self._graph.validate()
            self._graph.build_operation_graph()
            self._graph.create_execution_plans(modes)
            self._graph.check_support()
            self._graph.build_plans()
        except self._cudnn.cudnnGraphNotSupportedError as error:
            missing = "PREREQUISITE_MISSING" in str(error)
            text = f"{REFUSED} {self._cudnn.backend_version_string()} in {str(self.dtype)[6:]}"
            raise NotSupported(text + (", which found no driver or no NVRTC" if missing else "")) from error

    def bind(self, tensors: Mapping[str, Tensor]) -> Run:
        """A run on tensors by name. Its outputs are the same tensors every time.

        Raises:
            ValueError: a tensor that is not what the graph was built for.
        """
        given = {name: tensors[name] for name in self._inputs}
        for name, (_, sizes, dtype) in self._inputs.items():
            t = given[name]
            if (t.shape, t.dtype) != (sizes, dtype) or not t.is_contiguous(memory_format=torch.channels_last):
                raise ValueError(f"{name} is {t.dtype} {tuple(t.shape)} {t.stride()}, not {dtype} {sizes} in NHWC")
        device = next(iter(given.values())).device
        layout = torch.channels_last
        outs = tuple(
            torch.empty(sizes, dtype=dtype, device=device, memory_format=layout).fill_(float("nan"))
            for _, sizes, dtype in self._outputs
        )
        workspace = torch.empty(max(1, self._graph.get_workspace_size()), dtype=torch.uint8, device=device)
        pack = {node: _pointer(given[name]) for name, (node, *_) in self._inputs.items()}
        pack |= {node: _pointer(out) for (node, *_), out in zip(self._outputs, outs, strict=True)}
        handle = self._target["handle"]

        def run() -> tuple[Tensor, ...]:
            self._cudnn.set_stream(handle=handle, stream=_stream())
            self._graph.execute(pack, _pointer(workspace), handle=handle)
            return outs

        run.given = given  # type: ignore[attr-defined]  # whose memory the pointers are of
        return run


def _nhwc(sizes: tuple[int, ...]) -> list[int]:
    _, c, h, w = sizes
    return [c * h * w, 1, c * w, c]


def _pointer(t: Tensor) -> Any:
    return t.data_ptr()


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream


def shaped(node: Any, *sizes: int) -> Any:
    """A result whose sizes cuDNN cannot know."""
    return node.set_dim(list(sizes)).set_stride(_nhwc(sizes))


def _geometry(s: ConvShape) -> dict[str, list[int]]:
    return {"padding": [s.padding] * 2, "stride": [s.stride] * 2, "dilation": [s.dilation] * 2}


def _conv(g: Graph, s: ConvShape, x: Any) -> Any:
    return g.add("conv_fprop", image=x, weight=g.input("w", s.k, s.c, s.r, s.s), **_geometry(s))


# Inference


def unit(s: ConvShape, epilogue: Epilogue, dtype: torch.dtype, target: Target) -> Graph:
    """``[relu](conv(x) * scale + shift [+ residual])``, built.

    Raises:
        NotSupported: cuDNN refuses it.
    """
    g = Graph(dtype, target)
    y = g.affine(_conv(g, s, g.input("x", s.n, s.c, s.h, s.w)), "bn", s.k)
    if epilogue.residual:
        y = g.add("add", a=y, b=g.input("residual", s.n, s.k, s.p, s.q))
    if epilogue.relu:
        y = g.add("relu", input=y)
    g.output(y, s.n, s.k, s.p, s.q)
    g.build()
    return g


def unit_operands(x: Tensor, w: Tensor, bn: tuple[Tensor, ...], eps: float) -> dict[str, Tensor]:
    """Tensors by name of a :func:`unit`; ``bn`` is gamma, beta, mean, variance and the residual if there is one."""
    gamma, beta, mean, var = (v.float() for v in bn[:4])
    stats = reference.stats_from(mean, var, gamma, beta, eps)
    return {"x": x, "w": w, **_affine("bn", stats, torch.float32), **dict(zip(["residual"], bn[4:], strict=False))}


def _affine(name: str, stats: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    vectors = {"scale": stats[reference.SCALE], "shift": stats[reference.SHIFT]}
    return {f"{name} {which}": v.to(dtype).view(1, -1, 1, 1) for which, v in vectors.items()}


# Training


class TrainingStep:
    """A step of training as one graph, built.

    Args:
        work: what is computed.
        dtype: float16 or bfloat16.
        target: as for :class:`Graph`.

    Raises:
        NotSupported: cuDNN refuses it, or its graphs have no such operation.
    """

    def __init__(self, work: Work, dtype: torch.dtype, target: Target) -> None:
        step = work.step.removeprefix("stem_")
        if step not in FORMS or work.project is not None or work.following or work.residual_stride > 1:
            raise NotSupported("no graph of cuDNN's: it has no operation for it")
        self.work = work
        *others, last = FORMS[step]
        for form in others:
            try:
                self.graph = self._built(form, dtype, target)
                return
            except NotSupported:
                continue
        self.graph = self._built(last, dtype, target)

    def _built(self, form: Callable[[Graph, Work], None], dtype: torch.dtype, target: Target) -> Graph:
        graph = Graph(dtype, target)
        form(graph, self.work)
        graph.build()
        return graph

    @property
    def note(self) -> str:
        """Its operations."""
        text = " ".join(self.graph.operations)
        return f"{text}; images NHWC beforehand" if self.work.step.startswith("stem") else text

    def bind(self, o: Mapping[str, Tensor]) -> Run:
        """A run on one set of the operands of :class:`resnet_triton.training.measure.TrainProblem`."""
        found = {name: t.contiguous(memory_format=torch.channels_last) for name, t in o.items() if t.dim() == 4}
        narrow = self.graph.dtype if self.work.step in NARROW else torch.float32
        for name, dtype in (("stats", narrow), ("out_stats", torch.float32)):
            found |= _affine(name, o[name], dtype) if name in o else {}
        for i, row in enumerate(o.get("g", ())):
            found[f"g{i}"] = row.view(1, -1, 1, 1)
        return self.graph.bind(found)

    def results(self, outs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs as the step's own kernel returns them."""
        first, *sums = outs
        work, vectors = self.work, [v.flatten() for v in sums]
        if not vectors:
            return outs
        if work.step == "wgrad":
            return first.flatten(1), *vectors
        if work.step == "dgrad":
            return first, torch.stack(vectors)[None]
        assert work.shape is not None
        count = work.shape.n * work.shape.p * work.shape.q
        total, squares = (v.double() for v in vectors)
        return first, torch.stack([torch.full_like(total, count), total / count, squares - total**2 / count])[None]


def _lazy(g: Graph, work: Work) -> Any:
    """The input of a forward convolution, normalised as it is loaded if the step says so."""
    s = work.shape
    assert s is not None
    x = g.input("x", s.n, s.c, s.h, s.w)
    if not work.prologue and work.step != "expand":
        return x
    return g.add("relu", input=g.affine(x, "stats", s.c, g.dtype if work.step in NARROW else torch.float32))


def _raw(g: Graph, work: Work) -> Any:
    """Outputs the raw output of a convolution."""
    s = work.shape
    assert s is not None
    y = _conv(g, s, _lazy(g, work))
    if work.residual_stride:
        y = g.add("add", a=y, b=g.input("residual", s.n, s.k, s.p, s.q))
    g.output(y, s.n, s.k, s.p, s.q)
    return y


def _with_genstats(g: Graph, work: Work) -> None:
    y = _raw(g, work)
    if work.moments:
        assert work.shape is not None
        for node in g.add("genstats", input=y):
            g.output(node, 1, work.shape.k, 1, 1, wide=True)


def _with_reductions(g: Graph, work: Work) -> None:
    y = _raw(g, work)
    if work.moments:
        assert work.shape is not None
        g.total(y, work.shape.k)
        g.total(g.add("mul", a=y, b=y), work.shape.k)


def _gradient(g: Graph, work: Work) -> Any:
    """The gradient that comes in: of the raw output, formed as it is loaded if the step says so."""
    s = work.shape
    assert s is not None
    sizes = s.n, s.k, s.p, s.q
    dz = g.input("dz", *sizes)
    if not work.backward:
        return dz
    c = g.add("scale", input=g.input("c", *sizes), scale=g.vector("g2", s.k))
    both = g.add("add", a=g.add("scale", input=dz, scale=g.vector("g0", s.k)), b=c)
    return g.add("bias", input=both, bias=g.vector("g1", s.k))


def _dgrad(g: Graph, work: Work) -> None:
    s = work.shape
    assert s is not None
    sizes = s.n, s.c, s.h, s.w
    weight = g.input("w", s.k, s.c, s.r, s.s)
    d = shaped(g.add("conv_dgrad", loss=_gradient(g, work), filter=weight, **_geometry(s)), *sizes)
    if work.residual_stride:
        d = g.add("add", a=d, b=g.input("residual", *sizes))
    x = g.input("x", *sizes)
    d = g.add("relu_backward", loss=d, input=g.affine(x, "stats", s.c) if work.prologue else x)
    g.output(d, *sizes)
    if work.moments:
        g.total(d, s.c)
        g.total(g.add("mul", a=d, b=x), s.c)


def _wgrad(g: Graph, work: Work) -> None:
    s = work.shape
    assert s is not None
    loss = _gradient(g, work)
    g.output(g.add("conv_wgrad", image=_lazy(g, work), loss=loss, **_geometry(s)), s.k, s.c, s.r, s.s)
    if work.moments:
        g.total(loss, s.k)


def _expand(g: Graph, work: Work) -> None:
    s = work.shape
    assert s is not None
    y = g.affine(_conv(g, s, _lazy(g, work)), "out_stats", s.k)
    y = g.add("add", a=y, b=g.input("shortcut", s.n, s.k, s.p, s.q))
    g.output(g.add("relu", input=y), s.n, s.k, s.p, s.q)


#: The graphs of a step, the first that cuDNN takes is the one.
FORMS: dict[str, tuple[Callable[[Graph, Work], None], ...]] = {
    "conv_stats": (_with_genstats, _with_reductions),
    "dgrad": (_dgrad,),
    "wgrad": (_wgrad,),
    "expand": (_expand,),
}

"""cuDNN's fused graphs as a peer: what they compute, by a stand-in that runs their operations one by one in PyTorch;
and, where its frontend is installed, that cuDNN takes them for an H200. No device is needed for either."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cudnn_graphs, layers, training_layers
from bench.cudnn_graphs import NotSupported, Peer, TrainingStep
from bench.training_layers import Beside
from resnet_triton.errors import OK, WRONG, gate, relative_error
from resnet_triton.kernels.config import ConvConfig
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.shapes import BN, BN_ADD_RELU, BN_RELU
from resnet_triton.training.plan import Work

#: An H200 as cuDNN describes a device.
H200 = {
    "deviceName": "NVIDIA H200", "cudaDeviceId": 0, "deviceVer": 900, "driverVer": 13000, "isTccDriver": 0,
    "l2CacheSize": 60 << 20, "maxCtasPerSM": 32, "maxRegistersPerSM": 65536, "maxSharedMemoryPerBlock": 48 << 10,
    "maxSharedMemoryPerBlockOptin": 227 << 10, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048,
    "memClockRateKHz": 3201000, "multiProcessorCount": 132, "pciDeviceId": 0, "regsPerBlock": 65536,
    "reservedSharedMemoryPerBlock": 1024, "smClockRateKHz": 1980000, "supportCoopLaunch": 1,
    "totalGlobalMem": 141 << 30, "warpSize": 32, "maxBlockSize": [1024, 1024, 64],
    "maxGridSize": [2147483647, 65535, 65535],
}  # fmt: skip
BF16, FP16 = torch.bfloat16, torch.float16


class Node:
    """A tensor of the stand-in; ``value`` computes it from those that are given."""

    def __init__(self, value: Callable[[Node, Given], Tensor], kind: torch.dtype | None = None) -> None:
        self.value, self.kind, self.dim, self.is_output = value, kind, [], False

    def set_dim(self, dim: list[int]) -> Node:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Node:
        return self

    def set_output(self, on: bool) -> Node:
        self.is_output = on
        return self

    def set_data_type(self, kind: torch.dtype) -> Node:
        self.kind = kind
        return self

    def of(self, given: Given) -> Tensor:
        """Float32, rounded to the dtype of the node if it has one."""
        value = given[self] if self in given else self.value(self, given)
        return value if self.kind is None else value.to(self.kind).float()


Given = dict[Node, Tensor]


class StandInGraph:
    """The operations of ``cudnn.pygraph`` that the bench uses."""

    refused: tuple[str, ...] = ()

    def __init__(self, **options: Any) -> None:
        self.asked: list[str] = []

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: torch.dtype) -> Node:
        return Node(lambda node, given: pytest.fail(f"{name} is not given"), data_type)

    def __getattr__(self, operation: str) -> Callable[..., Any]:
        function = OPERATIONS[operation]

        def add(**operands: Any) -> Any:
            self.asked.append(operation)

            def value(node: Node, given: Given) -> Tensor:
                values = {name: o.of(given) if isinstance(o, Node) else o for name, o in operands.items()}
                return function(node.dim, **values)

            if operation == "genstats":
                return tuple(Node(lambda node, given, i=i: value(node, given)[i]) for i in range(2))
            return Node(value)

        return add

    def validate(self) -> None: ...
    def build_operation_graph(self) -> None: ...
    def create_execution_plans(self, modes: list[str]) -> None: ...
    def build_plans(self) -> None: ...

    def check_support(self) -> None:
        if set(self.asked) & set(self.refused):
            raise NotImplementedError("No valid engine configs")

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pack: Given, workspace: Tensor, handle: str) -> None:
        given = {node: t for node, t in pack.items() if not node.is_output}
        for node in pack.keys() - given.keys():
            pack[node].copy_(node.of(given))


GEOMETRY = "stride", "padding", "dilation"


def backward(loss: Tensor, image: Tensor, filters: Tensor, which: int, geometry: dict[str, list[int]]) -> Tensor:
    options = [geometry[name] for name in GEOMETRY]
    wanted = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(loss, image, filters, None, *options, False, [0, 0], 1, wanted)[which]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "conv_fprop": lambda dim, image, weight, **g: F.conv2d(image, weight, None, *(g[name] for name in GEOMETRY)),
    "conv_dgrad": lambda dim, loss, filter, **g: backward(loss, torch.zeros(dim), filter, 0, g),
    "conv_wgrad": lambda dim, image, loss, **g: backward(loss, image, torch.zeros(dim), 1, g),
    "scale": lambda dim, input, scale: input * scale,
    "bias": lambda dim, input, bias: input + bias,
    "add": lambda dim, a, b: a + b,
    "mul": lambda dim, a, b: a * b,
    "relu": lambda dim, input: input.relu(),
    "relu_backward": lambda dim, loss, input: torch.where(input > 0, loss, 0.0),
    "reduction": lambda dim, input, mode: input.sum((0, 2, 3), keepdim=True),
    "genstats": lambda dim, input: [x.sum((0, 2, 3), keepdim=True) for x in (input, input * input)],
}


@pytest.fixture
def stand_in(monkeypatch):
    """``import cudnn`` finds the stand-in; returns the class of its graphs."""
    graph = type("Graph", (StandInGraph,), {})
    module = SimpleNamespace(
        pygraph=graph,
        data_type=SimpleNamespace(HALF=FP16, BFLOAT16=BF16, FLOAT=torch.float32),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
        reduction_mode=SimpleNamespace(ADD="add"),
        cudnnGraphNotSupportedError=NotImplementedError,
        backend_version_string=lambda: "9.19.0",
        set_stream=lambda handle, stream: None,
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(cudnn_graphs, "installed", lambda: True)
    monkeypatch.setattr(cudnn_graphs, "this_gpu", lambda: {"handle": "handle"})
    monkeypatch.setattr(cudnn_graphs, "_pointer", lambda t: t)
    monkeypatch.setattr(cudnn_graphs, "_stream", lambda: 0)
    return graph


S1, S3 = ConvShape(2, 6, 5, 32, 16), ConvShape(2, 7, 6, 16, 32, 3, 3, 1, 1)
STRIDED = replace(S3, stride=2)
FULL = ConvShape(256, 56, 56, 64, 64, 3, 3, 1, 1)
WORKS = (
    Work("conv_stats", S3, moments=True),
    Work("conv_stats", STRIDED, prologue=True, moments=True),
    Work("conv_stats", S1, residual_stride=1),
    Work("stem_conv_stats", ConvShape(2, 15, 16, 3, 16, 7, 7, 2, 3), moments=True),
    Work("dgrad", S3, prologue=True, moments=True),
    Work("dgrad", STRIDED, residual_stride=1),
    Work("dgrad", S1, backward=True),
    Work("wgrad", S3, prologue=True),
    Work("wgrad", S1, backward=True),
    Work("wgrad", S1, prologue=True, moments=True),
    Work("expand", S1),
)


def problem_of(work: Work, dtype: torch.dtype) -> Beside:
    problem = Beside(work, dtype, "cpu", sets=1)
    problem._prepare_reference()
    return problem


@pytest.mark.parametrize("form", ["genstats", "reduction"])
@pytest.mark.parametrize("work", WORKS, ids=training_layers.title)
def test_a_graph_computes_the_step(work, form, stand_in):
    if form == "reduction":
        stand_in.refused = ("genstats",)
    dtype = BF16 if form == "reduction" else FP16
    problem = problem_of(work, dtype)
    peer = training_layers.fused_peer(problem)
    assert peer.status == OK and problem.fused is not None
    assert ("genstats" in peer.note) == (work.moments and "conv" in work.step and form == "genstats")
    assert all(torch.equal(a, b) for a, b in zip(problem.fused(0), problem.fused(0), strict=True))


@pytest.mark.parametrize(
    ("operation", "work"),
    [("relu_backward", WORKS[4]), ("bias", WORKS[1]), ("genstats", WORKS[0]), ("add", WORKS[5]), ("scale", WORKS[8])],
    ids=lambda value: value if isinstance(value, str) else value.step,
)
def test_a_wrong_graph_is_found_before_the_clock(operation, work, stand_in, monkeypatch):
    right = OPERATIONS[operation]

    def wrong(dim: list[int], **operands: Any) -> Any:
        if operation == "genstats":
            return [1.2 * x for x in right(dim, **operands)]
        return next(v for v in operands.values())  # its first operand as it is

    monkeypatch.setitem(OPERATIONS, operation, wrong)
    peer = training_layers.fused_peer(problem := problem_of(work, BF16))
    assert peer.status.startswith(WRONG) and problem.fused is None


@pytest.mark.parametrize("epilogue", [BN_RELU, BN_ADD_RELU, BN], ids=str)
def test_a_unit_of_inference(epilogue, stand_in):
    layer = layers.conv_layer("a", S3, epilogue)
    x, w, *bn = (t.to(BF16) for t in layer.tensors())
    run = layers.fused_call(layer, (x, w, *bn), BF16)
    exact = layer.eager(*(t.double() for t in (x, w, *bn)))
    (out,) = run()
    eager = relative_error(layer.eager(x, w, *bn), exact)
    assert out.dtype == BF16 and gate(relative_error(out, exact), eager, "bfloat16", False) == OK
    with pytest.raises(ValueError, match=r"x is torch.bfloat16 \(2, 16, 7, 6\).* in NHWC"):
        layers.fused_call(layer, (x.contiguous(), w, *bn), BF16)


def test_a_unit_that_does_not_run_costs_its_row_only(stand_in, monkeypatch):
    layer = layers.conv_layer("a", S3, BN_RELU)
    tensors = [t.to(BF16) for t in layer.tensors()]
    call = layers._fused(layer, tensors, BF16)
    assert callable(call) and not call()[0].isnan().any()
    stand_in.refused = ("relu",)
    assert layers._fused(layer, tensors, BF16) == "not supported by cuDNN 9.19.0 in bfloat16"
    stand_in.refused = ()
    monkeypatch.setattr(stand_in, "execute", lambda *_, **__: 1 / 0)
    assert layers._fused(layer, tensors, BF16) == "failed: ZeroDivisionError: division by zero"
    assert training_layers.fused_peer(problem_of(WORKS[0], BF16)).status.startswith("failed: ZeroDivisionError")


def test_what_cudnn_refuses_is_said(stand_in):
    stand_in.refused = ("relu_backward",)
    assert training_layers.fused_peer(problem_of(WORKS[4], BF16)).status == "not supported by cuDNN 9.19.0 in bfloat16"
    for work in (Work("gram", S1), replace(WORKS[5], residual_stride=2), Work("expand", S1, following=16)):
        with pytest.raises(NotSupported, match="has no operation"):
            TrainingStep(work, BF16, {})
    with pytest.raises(NotSupported, match="only in float16 and bfloat16"):
        TrainingStep(WORKS[0], torch.float32, {})


def test_a_prologue_is_measured_in_float16_where_bfloat16_is_refused(stand_in, monkeypatch):
    asked: list[torch.dtype] = []

    def measure(work: Work, config: ConvConfig, dtype: torch.dtype = BF16) -> training_layers.Timed:
        asked.append(dtype)
        peer = Peer(OK, "a b", 3.0, 1e-3) if dtype == FP16 else Peer("not supported by cuDNN 9.19.0 in bfloat16")
        return training_layers.Timed(1.0, 2.0, 1.5, 1e-3, 1e-3, fused=peer)

    monkeypatch.setattr(training_layers, "measure", measure)
    target = training_layers.h200()
    work = Work("conv_stats", FULL, prologue=True, moments=True)
    config = training_layers.own_config(work, target)
    rows = training_layers.measured_rows(work, config, "gpu", target)
    assert asked == [BF16, FP16] and len({row.key for row in rows}) == len(rows) == 8
    (refused, timed) = (row for row in rows if row.provider == cudnn_graphs.PROVIDER)
    assert refused.status.startswith("not supported") and refused.train_step_time is None
    assert timed.status == OK and timed.dtype == "float16" and timed.train_step_time == 3e-3 and timed.note == "a b"


def test_without_the_package_a_row_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cudnn_graphs, "find_spec", lambda name: None)
    peer = training_layers.fused_peer(problem_of(WORKS[0], BF16))
    assert peer.status == cudnn_graphs.ABSENT
    target = training_layers.h200()
    timed, found = training_layers.Timed(1.0, 2.0, 1.5, 1e-3, 1e-3, fused=peer), []
    for work in (Work("conv_stats", FULL, moments=True), Work("wgrad", FULL)):
        rows = training_layers.rows_of(work, training_layers.own_config(work, target), "gpu", target, timed)
        found += [row for row in rows if row.status != OK]
    assert len({row.key for row in found}) == 1 and "pip install nvidia-cudnn-frontend" in found[0].status
    assert [row.status for row in layers.absent_rows("bfloat16")] == [cudnn_graphs.ABSENT]


# cuDNN itself, for a device that is not there


@pytest.fixture(scope="module")
def h200():
    cudnn = pytest.importorskip("cudnn")
    try:
        described = cudnn.create_device_properties(json.dumps(H200))
    except RuntimeError as error:  # before cuDNN 9.8
        pytest.fail(f"cuDNN does not take the description of a device: {error}")
    return {"device_property": described, "sm_version": 90}


@pytest.mark.parametrize(
    ("work", "dtype", "operations"),
    [
        (Work("conv_stats", FULL, moments=True), FP16, "conv_fprop genstats"),
        (Work("conv_stats", FULL, prologue=True, moments=True), FP16, "scale bias relu conv_fprop genstats"),
        (Work("wgrad", FULL, prologue=True), FP16, "scale bias relu conv_wgrad"),
        (Work("wgrad", FULL), BF16, "conv_wgrad"),
    ],
    ids=["stats", "prologue", "wgrad prologue", "wgrad"],
)
def test_cudnn_builds_the_graph_for_an_h200(work, dtype, operations, h200):
    assert TrainingStep(work, dtype, h200).note == operations


#: Graphs for which cuDNN writes a kernel, which takes the library of a driver: without one it says just that.
WRITTEN = (Work("conv_stats", FULL, moments=True), Work("dgrad", FULL, prologue=True))


@pytest.mark.parametrize("what", [*WRITTEN, BN_ADD_RELU], ids=["stats", "dgrad", "unit"])
def test_cudnn_takes_what_it_writes_a_kernel_for(what, h200):
    try:
        if isinstance(what, Work):
            TrainingStep(what, BF16, h200)
        else:
            cudnn_graphs.unit(FULL, what, BF16, h200)
    except NotSupported as reason:
        assert str(reason).endswith("in bfloat16, which found no driver or no NVRTC")


def test_cudnn_refuses_a_prologue_in_bfloat16(h200):
    with pytest.raises(NotSupported, match=r"not supported by cuDNN \d+\.\d+\.\d+ in bfloat16"):
        TrainingStep(Work("wgrad", FULL, prologue=True), BF16, h200)

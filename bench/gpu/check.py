"""Which results are checked on the GPU, in the order of their worth; :mod:`.check_run` checks one.

Every distinct convolution of ResNet-50 and -18 with its real epilogue, in every dtype and on both kinds of kernels, and
those of one image, which share reductions and start dependently;
stem, head and the elementwise ops; tensors beyond 2^31 elements; repeated runs; gradients; a whole network.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from resnet_triton import plan
from resnet_triton.devices import Target
from resnet_triton.kernels.config import ConvConfig, Epilogue, heuristic
from resnet_triton.kernels.geometry import ConvShape
from resnet_triton.shapes import BN_ADD_RELU, BN_RELU, ConvSite, resnet_convs

from .precompile import Job, job
from .rows import Row

HANDLER = "bench.gpu.check_run:run_row"
BATCH = 32
DTYPES = ("bfloat16", "float16", "tf32", "ieee")  # the last two are fp32, with and without TF32
VECTORS = torch.float32  # BN's vectors, as under autocast


def torch_dtype(name: str) -> torch.dtype:
    """``"tf32"`` and ``"ieee"`` are float32."""
    return torch.float32 if name in ("tf32", "ieee") else getattr(torch, name)


def distinct_convs(depth: int, batch: int, size: int = 224) -> list[ConvSite]:
    """The convolutions of a network that differ in shape or epilogue, named after their first occurrence."""
    found: dict[tuple[ConvShape, Epilogue], ConvSite] = {}
    for site in resnet_convs(depth, batch, size):
        found.setdefault((site.shape, site.epilogue), site)
    return list(found.values())


def rows(target: Target) -> list[Row]:
    """Every check at full size for a CUDA target."""
    return [row for row, _ in _full(target)]


def compile_jobs(target: Target) -> list[Job]:
    """What the checks of convolutions compile, in their order."""
    return [work for _, work in _full(target) if work is not None]


def _full(target: Target) -> Iterator[tuple[Row, Job | None]]:
    yield from _convs(target, 50, "bfloat16", False)
    yield from _ops("bfloat16", BATCH, 224)
    yield _model("bfloat16", 50, 16, 224), None
    yield from _convs(target, 50, "bfloat16", False, 1)
    yield _model("bfloat16", 50, 1, 224), None
    yield from _convs(target, 18, "bfloat16", False)
    for dtype in ("tf32", "float16"):
        yield from _convs(target, 50, dtype, False)
        yield from _ops(dtype, BATCH, 224)
        yield _model(dtype, 50, 16, 224), None
    yield from _repeats(target)
    yield from _gradients("bfloat16", 8, 56)
    yield from _large(target)
    yield from _convs(target, 50, "bfloat16", True)
    yield from _convs(target, 50, "ieee", False)
    yield from _ops("ieee", BATCH, 224)
    yield _model("bfloat16", 18, 16, 224), None
    for depth, dtype, pointer in ((18, "tf32", False), (18, "float16", False), (18, "bfloat16", True)):
        yield from _convs(target, depth, dtype, pointer)
    for dtype in ("float16", "tf32"):  # the plan itself takes the pointer kernel for exact fp32
        yield from _convs(target, 50, dtype, True)
    yield from _convs(target, 18, "ieee", False)


def dry_rows() -> list[Row]:
    """The same kinds of checks at sizes that Triton's interpreter computes in a few seconds."""
    target = Target("interpreter")
    convs = [
        ConvSite("3x3", ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1), BN_RELU),
        ConvSite("3x3/2", ConvShape(1, 8, 8, 16, 16, 3, 3, 2, 1), BN_RELU),
        ConvSite("1x1", ConvShape(2, 8, 8, 16, 32), BN_ADD_RELU),
    ]
    found = [_conv(site, "float16", _planned(target, site, "float16"), False)[0] for site in convs]
    found += [_conv(site, "ieee", _pointer(site, "ieee"), True)[0] for site in convs[:1]]
    found += _op_rows("float16", 1, 16, 16)
    shape = ConvShape(1, 8, 8, 16, 16, 3, 3, 1, 1)
    found.append(_repeat(ConvSite("3x3", shape, BN_RELU), _planned(target, ConvSite("", shape, BN_RELU), "float16"), 2))
    return [_on(row, "cpu") for row in found]


def sanitizer_rows(target: Target) -> list[Row]:
    """One small case per kernel, for compute-sanitizer."""
    small = [
        ConvSite("sanitizer 3x3", ConvShape(2, 14, 14, 64, 64, 3, 3, 1, 1), BN_ADD_RELU),
        ConvSite("sanitizer 3x3/2", ConvShape(2, 14, 14, 64, 64, 3, 3, 2, 1), BN_RELU),
        ConvSite("sanitizer 1x1", ConvShape(2, 7, 7, 64, 128), BN_ADD_RELU),
    ]
    found = [_conv(site, "bfloat16", _planned(target, site, "bfloat16"), False)[0] for site in small]
    found += [_conv(site, "bfloat16", _pointer(site, "bfloat16"), True)[0] for site in small]
    found += _op_rows("bfloat16", 2, 32, 64)
    return [Row(f"sanitizer: {r.key}", r.kernel, r.config, 90, r.payload) for r in found]


def _on(row: Row, device: str) -> Row:
    return Row(row.key, row.kernel, row.config, row.limit_s, {**row.payload, "device": device})


def _planned(target: Target, site: ConvSite, dtype: str) -> ConvConfig:
    precision = dtype if dtype in ("tf32", "ieee") else "tf32"
    return plan.choose_conv(site.shape, site.epilogue, torch_dtype(dtype), precision, target, "triton").tiling


def _pointer(site: ConvSite, dtype: str) -> ConvConfig:
    return heuristic(site.shape, torch_dtype(dtype).itemsize, tma=False)


def _conv(site: ConvSite, dtype: str, config: ConvConfig, explicit: bool) -> tuple[Row, Job]:
    payload: dict[str, Any] = {"what": "conv", "shape": vars(site.shape), "epilogue": vars(site.epilogue)}
    payload |= {"dtype": dtype, "kernel": config.kernel, "config": config.to_dict() if explicit else None}
    key = f"{site.name} {site.shape} {site.epilogue} {dtype} {config.kernel}"
    precision = dtype if dtype in ("tf32", "ieee") else "tf32"
    work = job(site.shape, site.epilogue, torch_dtype(dtype), precision, config, VECTORS)
    return Row(key, config.kernel, str(config), 60, payload), work


def _convs(target: Target, depth: int, dtype: str, pointer: bool, batch: int = BATCH) -> Iterator[tuple[Row, Job]]:
    for site in distinct_convs(depth, batch):
        named = ConvSite(f"resnet{depth}.{site.name}", site.shape, site.epilogue)
        config = _pointer(site, dtype) if pointer else _planned(target, site, dtype)
        yield _conv(named, dtype, config, pointer)


def _op_rows(dtype: str, batch: int, size: int, channels: int) -> list[Row]:
    found = []
    pooled = "stem_pool" if dtype in ("bfloat16", "float16") else "conv_tma, max_pool"
    for name, kernel in (
        ("stem", f"space_to_depth, {pooled}"),
        ("stem uint8", "space_to_depth, conv_tma"),
        ("max_pool", "max_pool"),
        ("head", "global_avg_pool, conv1x1"),
        ("head 10 classes", "global_avg_pool, conv_pointer"),
        ("fold_bn", "fold_bn"),
        ("add_relu", "add_relu"),
    ):
        payload = {"what": name, "dtype": dtype, "batch": batch, "size": size, "channels": channels}
        found.append(Row(f"{name} {batch}x{size} {dtype}", kernel, "plan", 60, payload))
    return found


def _ops(dtype: str, batch: int, size: int) -> Iterator[tuple[Row, None]]:
    for row in _op_rows(dtype, batch, size, 2048):
        yield row, None


def _model(dtype: str, depth: int, batch: int, size: int) -> Row:
    payload = {"what": "model", "depth": depth, "dtype": dtype, "batch": batch, "size": size}
    return Row(f"resnet{depth} {batch}x{size} {dtype} converted", "all", "plan", 120, payload)


def _repeat(site: ConvSite, config: ConvConfig, times: int) -> Row:
    row, _ = _conv(site, "float16", config, False)
    payload = {**row.payload, "what": "repeat", "times": times}
    return Row(f"{times} repeats: {row.key}", row.kernel, row.config, 60, payload)


def _repeats(target: Target) -> Iterator[tuple[Row, None]]:
    for shape, epilogue in (
        (ConvShape(32, 28, 28, 128, 128, 3, 3, 1, 1), BN_RELU),
        (ConvShape(32, 28, 28, 256, 256, 3, 3, 2, 1), BN_RELU),
        (ConvShape(32, 14, 14, 256, 1024), BN_ADD_RELU),
        (ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), BN_RELU),
    ):
        site = ConvSite("repeat", shape, epilogue)
        yield _repeat(site, _planned(target, site, "float16"), 20), None
    for batch in (16, 1):
        payload = {"what": "repeat model", "depth": 50, "dtype": "bfloat16", "batch": batch, "size": 224, "times": 20}
        yield Row(f"20 repeats: resnet50 {batch}x224 bfloat16", "all", "plan", 120, payload), None


def _gradients(dtype: str, batch: int, size: int) -> Iterator[tuple[Row, None]]:
    for name in ("conv_bn_act", "bottleneck"):
        payload = {"what": f"gradient {name}", "dtype": dtype, "batch": batch, "size": size, "channels": 64}
        yield Row(f"gradient of {name} {dtype}", "all", "plan", 90, payload), None


def _large(target: Target) -> Iterator[tuple[Row, None]]:
    """More than 2^31 elements: output and residual, input of a 3x3, and the flat ops."""
    wide = ConvShape(1340, 56, 56, 64, 512)
    deep = ConvShape(1360, 56, 56, 512, 64, 3, 3, 1, 1)
    for site, pointer in (
        (ConvSite("large output", wide, BN_ADD_RELU), False),
        (ConvSite("large input", deep, BN_RELU), False),
        (ConvSite("large output", wide, BN_ADD_RELU), True),
    ):
        config = _pointer(site, "bfloat16") if pointer else _planned(target, site, "bfloat16")
        row, _ = _conv(site, "bfloat16", config, pointer)
        yield Row(row.key, row.kernel, row.config, 90, {**row.payload, "what": "large conv"}), None
    for name in ("add_relu", "max_pool"):
        payload = {"what": f"large {name}", "dtype": "bfloat16"}
        yield Row(f"large {name} bfloat16", name, "plan", 90, payload), None

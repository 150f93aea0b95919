"""Which results are checked on the GPU, in the order of their worth; :mod:`.check_run` checks one.

Every distinct convolution of ResNet-50 and -18 with its real epilogue, in every dtype and on both kinds of kernels, and
those of one image, which share reductions and start dependently; every distinct end of a bottleneck that runs as a
chain; stem, head and the elementwise ops; tensors beyond 2^31 elements; repeated runs; gradients; whole networks, also
replayed from a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch

from resnet_triton import chains, plan
from resnet_triton.chains import OTHERS, Tail, bottleneck_tails
from resnet_triton.devices import Target
from resnet_triton.kernels.config import (
    CHAIN_KERNELS,
    ROLLING_KERNELS,
    ConvConfig,
    Epilogue,
    heuristic,
    rolling_config,
)
from resnet_triton.kernels.geometry import ChainShape, ConvShape
from resnet_triton.shapes import BN_ADD_RELU, BN_RELU, ConvSite, resnet_convs, stem_conv

from .precompile import Job, chain_job, job
from .rows import Row

HANDLER = "bench.gpu.check_run:run_row"
BATCH, LARGE_BATCH = 32, 256
DTYPES = ("bfloat16", "float16", "tf32", "ieee")  # the last two are fp32, with and without TF32
VECTORS = torch.float32  # BN's vectors, as under autocast
Work = tuple[Row, list[Job]]  # a check, and what it needs compiled


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
    """What the checks of convolutions and chains compile, in their order."""
    return [work for _, jobs in _full(target) for work in jobs]


def _full(target: Target) -> Iterator[Work]:
    yield from _convs(target, 50, "bfloat16", False)
    yield from _ops(target, "bfloat16", BATCH, 224)
    yield _model("bfloat16", 50, 16, 224), []
    yield from _blocks(target, LARGE_BATCH, "bfloat16")
    yield _model("bfloat16", 50, LARGE_BATCH, 224), []
    yield _model("bfloat16", 50, LARGE_BATCH, 224, "auto"), []
    yield from _blocks(target, BATCH, "bfloat16")
    yield from _odd_blocks(target, "bfloat16")
    yield from _graphs("bfloat16", (BATCH, 1))
    yield from _convs(target, 50, "bfloat16", False, 1)
    yield _model("bfloat16", 50, 1, 224), []
    yield from _repeats(target)
    yield from _convs(target, 18, "bfloat16", False)
    yield _model("bfloat16", 18, 16, 224), []
    yield from _blocks(target, BATCH, "float16")
    for dtype in ("tf32", "float16"):
        yield from _convs(target, 50, dtype, False)
        yield from _ops(target, dtype, BATCH, 224)
        yield _model(dtype, 50, 16, 224), []
    yield from _gradients("bfloat16", 8, 56)
    yield from _large(target)
    yield from _convs(target, 50, "bfloat16", True)
    yield from _convs(target, 50, "ieee", False)
    yield from _ops(target, "ieee", BATCH, 224)
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
    found += _op_rows(target, "float16", 1, 16, 16)
    for kernel in _chain_kernels(target):
        chain, config = _small_chain(target, kernel, 2, 6, 7)
        found.append(_block("small", chain, "float16", kernel, config)[0])
    _, tail = next(bottleneck_tails(50, 2, 32))
    found += _chained(target, "resnet50.layer1.0 of 32x32", tail, "float16")
    last = ConvShape(2, 4, 4, 16, 32)
    found.append(_block("small", ChainShape(None, last), "float16", "conv1x1_pool", pool=True)[0])
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
    if target.tma:
        rolling = rolling_config(small[0].shape, target.multiprocessors)
        found.append(_conv(small[0], "bfloat16", rolling, True)[0])
    for kernel in _chain_kernels(target):
        chain, config = _small_chain(target, kernel, 2, 15, 13)
        found.append(_block("small", chain, "bfloat16", kernel, config)[0])
    _, tail = next(bottleneck_tails(50, 2, 32))
    found += _chained(target, "resnet50.layer1.0 of 32x32", tail, "bfloat16")
    found += [row for row, _ in _averages(target, BATCH, "bfloat16")]  # two images are planned apart
    found += _op_rows(target, "bfloat16", 2, 32, 64)
    alone = ConvSite("one image", ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), BN_RELU)
    found.append(_conv(alone, "bfloat16", _planned(target, alone, "bfloat16"), False)[0])
    found += [_conv(site, "bfloat16", _pointer(site, "bfloat16"), True)[0] for site in small]
    return [Row(f"sanitizer: {r.key}", r.kernel, r.config, 90, r.payload) for r in found]


def _on(row: Row, device: str) -> Row:
    return Row(row.key, row.kernel, row.config, row.limit_s, {**row.payload, "device": device})


def _planned(target: Target, site: ConvSite, dtype: str) -> ConvConfig:
    precision = dtype if dtype in ("tf32", "ieee") else "tf32"
    return plan.choose_conv(site.shape, site.epilogue, torch_dtype(dtype), precision, target, "triton").tiling


def _pointer(site: ConvSite, dtype: str) -> ConvConfig:
    return heuristic(site.shape, torch_dtype(dtype).itemsize, tma=False)


def _conv(site: ConvSite, dtype: str, config: ConvConfig, explicit: bool) -> Work:
    payload: dict[str, Any] = {"what": "conv", "shape": vars(site.shape), "epilogue": vars(site.epilogue)}
    payload |= {"dtype": dtype, "kernel": config.kernel, "config": config.to_dict() if explicit else None}
    key = f"{site.name} {site.shape} {site.epilogue} {dtype} {config.kernel}"
    precision = dtype if dtype in ("tf32", "ieee") else "tf32"
    work = job(site.shape, site.epilogue, torch_dtype(dtype), precision, config, VECTORS)
    return Row(key, config.kernel, str(config), 60, payload), [work]


def _block(
    name: str,
    shape: ChainShape,
    dtype: str,
    kernel: str,
    config: ConvConfig | None = None,
    zero_last: bool = False,
    pool: bool = False,
) -> Work:
    """A block's end through the public function, or as one chain with a given configuration."""
    payload: dict[str, Any] = {"what": "block", "shape": asdict(shape), "dtype": dtype, "kernel": kernel}
    payload |= {"config": config.to_dict() if config else None, "zero_last": zero_last, "pool": pool}
    notes = " last gamma 0" * zero_last + " average" * pool
    jobs = [chain_job(shape, torch_dtype(dtype), config, VECTORS)] if config else []
    key = f"{name}{notes} {shape} {dtype} {kernel}{f' {config}' if config else ''}"
    return Row(key, kernel, str(config or "plan"), 60, payload), jobs


def _tail(target: Target, name: str, tail: Tail, dtype: str, zero_last: bool = False) -> Iterator[Work]:
    """A block's end as it is planned, if it is planned as a chain; what the chain leaves out runs beside it."""
    kind = torch_dtype(dtype)
    chain = chains.choose_chain(tail, kind, "tf32", target, "triton")
    whole = chains.chain_shape(tail, frozenset(name for name in OTHERS if getattr(tail, name)))
    if chain is None or whole is None:
        return
    row, _ = _block(name, whole, dtype, chain.choice.realisation, zero_last=zero_last)
    jobs = [chain_job(chain.shape, kind, chain.choice.tiling, VECTORS)]
    for part, (shape, epilogue) in tail.sites().items():
        if part != "last" and part not in chain.holds:
            config = _planned(target, ConvSite(part, shape, epilogue), dtype)
            jobs.append(job(shape, epilogue, kind, "tf32", config, VECTORS))
    yield row, jobs


def _chained(target: Target, name: str, tail: Tail, dtype: str) -> Iterator[Row]:
    """A block's end as one chain, however it is planned."""
    whole = chains.chain_shape(tail, frozenset(name for name in OTHERS if getattr(tail, name)))
    if whole is not None and _chain_kernels(target):
        for config in chains.configs_of(whole, torch_dtype(dtype), target)[:1]:
            yield _block(name, whole, dtype, config.kernel, config)[0]


def _blocks(target: Target, batch: int, dtype: str) -> Iterator[Work]:
    """Every distinct end of ResNet-50's bottlenecks that is planned as a chain, and the last one with the average."""
    distinct: dict[Tail, str] = {}
    for name, tail in bottleneck_tails(50, batch, 224):
        distinct.setdefault(tail, name)
    for tail, name in distinct.items():
        yield from _tail(target, f"resnet50.{name}", tail, dtype)
    tail, name = next(iter(distinct.items()))  # with a projection
    yield from _tail(target, f"resnet50.{name}", tail, dtype, zero_last=True)
    behind = replace(tail, first=None, first_epilogue=None)
    yield from _tail(target, f"resnet50.{name} behind conv1", behind, dtype)
    yield from _averages(target, batch, dtype)


def _averages(target: Target, batch: int, dtype: str) -> Iterator[Work]:
    """The network's last convolution with the average over the image, where they are planned as one kernel."""
    *_, (name, shape, epilogue) = resnet_convs(50, batch)
    choice = chains.choose_pooled(shape, epilogue, torch_dtype(dtype), "tf32", target, "triton")
    if choice is not None:
        yield _block(f"resnet50.{name}", ChainShape(None, shape), dtype, choice.realisation, pool=True)


def _odd_blocks(target: Target, dtype: str) -> Iterator[Work]:
    """Images of 225 x 225 pixels, and each kernel of chains on few pixels that fill no tile."""
    for name, tail in list(bottleneck_tails(50, BATCH, 225))[:4]:
        yield from _tail(target, f"resnet50.{name} of 225x225", tail, dtype)
    for kernel in _chain_kernels(target):
        shape, config = _small_chain(target, kernel, 5, 15, 13)
        yield _block("small", shape, dtype, kernel, config)


def _chain_kernels(target: Target) -> tuple[str, ...]:
    """The kernels of chains that run on a target."""
    return () if chains.refusal_of_chains(target, torch.bfloat16, "tf32") else CHAIN_KERNELS


def _small_chain(target: Target, kernel: str, n: int, h: int, w: int) -> tuple[ChainShape, ConvConfig]:
    """ResNet-50's second block on few pixels, with a configuration that its full size has, in shorter strips."""

    def block(n: int, h: int, w: int) -> ChainShape:
        return ChainShape(
            ConvShape(n, h, w, 64, 64, 3, 3, 1, 1), ConvShape(n, h, w, 64, 256), None, ConvShape(n, h, w, 256, 64)
        )

    configs = chains.configs_of(block(LARGE_BATCH, 56, 56), torch.bfloat16, target)
    config = next(config for config in configs if config.kernel == kernel)
    tn, _, tw = config.box
    if kernel in ROLLING_KERNELS:
        config = replace(config, box=(tn, 5, tw))
    return block(n, h, w), config


def _convs(target: Target, depth: int, dtype: str, pointer: bool, batch: int = BATCH) -> Iterator[Work]:
    for site in distinct_convs(depth, batch):
        named = ConvSite(f"resnet{depth}.{site.name}", site.shape, site.epilogue)
        config = _pointer(site, dtype) if pointer else _planned(target, site, dtype)
        yield _conv(named, dtype, config, pointer)


def _stem_row(target: Target, dtype: str, batch: int, height: int, width: int) -> Row:
    """The stem with its max-pool, as planned."""
    _, square, epilogue = stem_conv(batch, height)
    shape, precision = replace(square, w=width), dtype if dtype in ("tf32", "ieee") else "tf32"
    choice = plan.choose_stem(shape, epilogue, torch_dtype(dtype), target, "triton", precision, pool=True)
    kernel = "stem_pool" if choice.realisation == "stem_pool" else "max_pool"
    payload = {"what": "stem", "dtype": dtype, "batch": batch, "height": height, "width": width, "kernel": kernel}
    return Row(f"stem {batch}x{height}x{width} {dtype}", kernel, str(choice.config), 60, payload)


def _op_rows(target: Target, dtype: str, batch: int, size: int, channels: int) -> list[Row]:
    found = [_stem_row(target, dtype, batch, size, size), _stem_row(target, dtype, batch, size + 1, size - 1)]
    for name, kernel in (
        ("stem uint8", "space_to_depth, conv_tma"),
        ("bn_act", "bn_act"),
        ("max_pool", "max_pool"),
        ("head", "global_avg_pool, conv1x1"),
        ("head 10 classes", "global_avg_pool, conv_pointer"),
        ("fold_bn", "fold_bn"),
        ("add_relu", "add_relu"),
    ):
        payload = {"what": name, "dtype": dtype, "batch": batch, "size": size, "channels": channels}
        found.append(Row(f"{name} {batch}x{size} {dtype}", kernel, "plan", 60, payload))
    return found


def _ops(target: Target, dtype: str, batch: int, size: int) -> Iterator[Work]:
    for row in _op_rows(target, dtype, batch, size, 2048):
        yield row, []


def _model(dtype: str, depth: int, batch: int, size: int, backend: str = "triton") -> Row:
    payload = {"what": "model", "depth": depth, "dtype": dtype, "batch": batch, "size": size, "backend": backend}
    chosen = "" if backend == "triton" else f" {backend}"
    return Row(f"resnet{depth} {batch}x{size} {dtype} converted{chosen}", "all", "plan", 120, payload)


def _graphs(dtype: str, batches: tuple[int, ...]) -> Iterator[Work]:
    for batch in batches:
        payload = {"what": "graph", "depth": 50, "dtype": dtype, "batch": batch, "size": 224}
        yield Row(f"CUDA graph of resnet50 {batch}x224 {dtype}", "all", "plan", 120, payload), []


def _repeat(site: ConvSite, config: ConvConfig, times: int) -> Row:
    row, _ = _conv(site, "float16", config, False)
    payload = {**row.payload, "what": "repeat", "times": times}
    return Row(f"{times} repeats: {row.key}", row.kernel, row.config, 60, payload)


def _repeats(target: Target) -> Iterator[Work]:
    for shape, epilogue in (
        (ConvShape(32, 28, 28, 128, 128, 3, 3, 1, 1), BN_RELU),
        (ConvShape(32, 28, 28, 256, 256, 3, 3, 2, 1), BN_RELU),
        (ConvShape(32, 14, 14, 256, 1024), BN_ADD_RELU),
        (ConvShape(1, 7, 7, 512, 512, 3, 3, 1, 1), BN_RELU),
    ):
        site = ConvSite("repeat", shape, epilogue)
        yield _repeat(site, _planned(target, site, "float16"), 20), []
    for kernel in _chain_kernels(target):
        chain, config = _small_chain(target, kernel, BATCH, 56, 56)
        row, jobs = _block("repeat", chain, "bfloat16", kernel, config)
        payload = {**row.payload, "what": "repeat block", "times": 20}
        yield Row(f"20 repeats: {row.key}", row.kernel, row.config, 60, payload), jobs
    for batch in (16, 1):
        payload = {"what": "repeat model", "depth": 50, "dtype": "bfloat16", "batch": batch, "size": 224, "times": 20}
        yield Row(f"20 repeats: resnet50 {batch}x224 bfloat16", "all", "plan", 120, payload), []


def _gradients(dtype: str, batch: int, size: int) -> Iterator[Work]:
    for name in ("conv_bn_act", "bottleneck"):
        payload = {"what": f"gradient {name}", "dtype": dtype, "batch": batch, "size": size, "channels": 64}
        yield Row(f"gradient of {name} {dtype}", "all", "plan", 90, payload), []


def _large(target: Target) -> Iterator[Work]:
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
        yield Row(row.key, row.kernel, row.config, 90, {**row.payload, "what": "large conv"}), []
    for name in ("add_relu", "max_pool"):
        payload = {"what": f"large {name}", "dtype": "bfloat16"}
        yield Row(f"large {name} bfloat16", name, "plan", 90, payload), []

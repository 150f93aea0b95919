"""Checks one result: our kernels against fp64, their error beside PyTorch's own error in the same dtype.

Random data, drawn anew for every row; memory that outputs may get is filled with NaN before; the dispatch counters must
show that our kernel ran.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_triton import convert, functional, reference, steps
from resnet_triton.backend import use_backend
from resnet_triton.functional import ConvBN
from resnet_triton.graphs import graph
from resnet_triton.journal import Journal
from resnet_triton.kernels.config import Epilogue
from resnet_triton.kernels.geometry import ConvShape

from . import training_run
from .check import torch_dtype
from .operands import EPS, Block, Conv, Result, image, network, norm, poison, precision_of, ran, verdict

GRADIENT_FACTOR = 3.0
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def run_row(row: dict[str, Any], journal: Journal) -> Result:
    """Handler of a row: ``status``, ``error`` and ``library_error`` (relative L2), ``ratio``, ``detail``."""
    payload = {"device": "cuda", **row["payload"]}
    torch.manual_seed(zlib.crc32(row["key"].encode()))
    with precision_of(payload["dtype"]):
        return CHECKS[payload.pop("what")](**payload)


def check_conv(shape: dict, epilogue: dict, dtype: str, kernel: str, config: dict | None, device: str) -> Result:
    conv = Conv(shape, epilogue, dtype, device)
    library, wanted = conv.eager(), conv.exact()
    poison(library)
    return verdict([ran(kernel, lambda: conv.ours(config))], [library], [wanted])


def check_large_conv(shape: dict, epilogue: dict, dtype: str, kernel: str, config: dict | None, device: str) -> Result:
    """The first, a middle and the last images of a convolution whose offsets exceed 32 bits."""
    conv = Conv(shape, epilogue, dtype, device)
    out = ran(kernel, lambda: conv.ours(config))
    n = conv.shape.n
    parts = [slice(0, 2), slice(n // 2, n // 2 + 2), slice(n - 2, n)]
    found = verdict([out[p] for p in parts], [conv.eager(p) for p in parts], [conv.exact(p) for p in parts])
    if out.isnan().any():
        found |= {"status": "wrong", "detail": "some elements are NaN or were never written"}
    return found


def check_repeat(
    shape: dict, epilogue: dict, dtype: str, kernel: str, config: dict | None, device: str, times: int
) -> Result:
    conv = Conv(shape, epilogue, dtype, device)
    return _repeats(lambda: [ran(kernel, lambda: conv.ours(config))], times)


def _repeats(run: Callable[[], list[Tensor]], times: int) -> Result:
    first = run()
    for i in range(1, times):
        for out in first:
            poison(out)
        if not all(map(torch.equal, run(), first)):
            return {"status": "wrong", "detail": f"run {i + 1} differs from run 1"}
    good = all(out.isfinite().all() for out in first)
    return {"status": "ok" if good else "wrong", "detail": f"{times} runs bitwise equal"}


def check_block(
    shape: dict, dtype: str, kernel: str, config: dict | None, device: str, zero_last: bool, pool: bool
) -> Result:
    """Several convolutions in one kernel: the block's output and the next block's first convolution."""
    block = Block(shape, dtype, device, zero_last, pool)
    library, wanted = block.eager(), block.exact()
    for out in library:
        poison(out)
    return verdict(ran(kernel, lambda: block.ours(config)), library, wanted)


def check_repeat_block(
    shape: dict, dtype: str, kernel: str, config: dict | None, device: str, zero_last: bool, pool: bool, times: int
) -> Result:
    block = Block(shape, dtype, device, zero_last, pool)
    return _repeats(lambda: ran(kernel, lambda: block.ours(config)), times)


def check_bn_act(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    """The single pass behind a library's convolution, with a residual and without."""
    kind, pixels = torch_dtype(dtype), max(1, size // 32)
    y, residual = (image(batch, channels, pixels, pixels, kind, device) - 1 for _ in range(2))
    bn = norm(channels, device)

    def eager(cast: Callable[[Tensor], Tensor], added: Tensor | None) -> Tensor:
        gamma, beta, mean, var = map(cast, bn)
        out = F.batch_norm(cast(y), mean, var, gamma, beta, False, 0.0, EPS)
        return F.relu(out if added is None else out + cast(added))

    def ours(added: Tensor | None) -> Tensor:
        return ran("bn_act", lambda: steps.bn_act_step(y.clone(), (None, *bn), added, EPS, True))

    both = (None, residual)
    library = [eager(lambda t: t, added) for added in both]
    return verdict([ours(added) for added in both], library, [eager(Tensor.double, added) for added in both])


def check_stem(dtype: str, batch: int, height: int, width: int, kernel: str, device: str) -> Result:
    return _stem(dtype, batch, height, width, kernel, device, uint8=False)


def check_stem_uint8(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    return _stem(dtype, batch, size, size, "space_to_depth", device, uint8=True)


def _stem(dtype: str, batch: int, height: int, width: int, kernel: str, device: str, uint8: bool) -> Result:
    kind, k = torch_dtype(dtype), 64
    pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, device=device)
    x = pixels if uint8 else (pixels / 127.5 - 1).to(kind)
    weight = (torch.randn(k, 3, 7, 7, device=device) / 9).to(kind)
    bn, normalize = norm(k, device), IMAGENET if uint8 else None

    def eager(wide: bool) -> Tensor:
        gamma, beta, mean, var = (v.double() if wide else v for v in bn)
        scaling = [torch.tensor(v, device=device) for v in normalize] if normalize else [None, None]
        image, filters = (x if uint8 else x.double(), weight.double()) if wide else (x, weight)
        return reference.stem(image, filters, None, gamma, beta, mean, var, scaling[0], scaling[1], EPS, not uint8)

    library, wanted = eager(False), eager(True)
    poison(library)
    out = ran(
        kernel,
        lambda: functional.stem(x, weight, None, *bn, normalize=normalize, eps=EPS, pool=not uint8),
    )
    return verdict([out], [library], [wanted])


def check_max_pool(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    x = image(batch, 64, size // 2, size // 2, torch_dtype(dtype), device)
    out = ran("max_pool", lambda: steps.max_pool_step(x, 3, 2, 1))
    wanted = F.max_pool2d(x, 3, 2, 1)
    return {"status": "ok" if torch.equal(out, wanted) else "wrong", "detail": "bitwise"}


def check_head(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    return _head(dtype, batch, channels, 1000 if channels > 64 else 24, device)


def check_small_head(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    return _head(dtype, batch, channels, 10, device)


def _head(dtype: str, batch: int, channels: int, classes: int, device: str) -> Result:
    kind = torch_dtype(dtype)
    x = image(batch, channels, 7, 7, kind, device)
    weight = (torch.randn(classes, channels, device=device) / channels**0.5).to(kind)
    bias = torch.randn(classes, device=device).to(kind)
    library = reference.head(x, weight, bias)
    wanted = reference.head(x.double(), weight.double(), bias.double())
    poison(library)
    out = ran("global_avg_pool", lambda: functional.head(x, weight, bias))
    return verdict([out], [library], [wanted])


def check_fold_bn(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    kind, k = torch_dtype(dtype), min(channels, 512)
    weight = torch.randn(k, k, 3, 3, device=device).to(kind)
    bias, bn = torch.randn(k, device=device).to(kind), norm(k, device)
    with use_backend("triton"):
        out = functional.fold_bn(weight, bias, *bn, EPS)
    library = reference.fold_bn(weight, bias, *bn, EPS)
    gamma, beta, mean, var = (v.double() for v in bn)
    wanted = reference.fold_bn(weight.double(), bias.double(), gamma, beta, mean, var, EPS)
    return verdict(out, library, wanted)


def check_add_relu(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    x, y = (image(batch, channels, size // 4, size // 4, torch_dtype(dtype), device) - 1 for _ in range(2))
    library, wanted = reference.add_relu(x, y), reference.add_relu(x.double(), y.double())
    poison(library)
    return verdict([ran("add_relu", lambda: functional.add_relu(x, y))], [library], [wanted])


def check_large_add_relu(dtype: str, device: str) -> Result:
    x = torch.randn(2**31 + 4096, dtype=torch_dtype(dtype), device=device)
    y = torch.randn_like(x)
    out = ran("add_relu", lambda: functional.add_relu(x, y))
    return {"status": "ok" if torch.equal(out, F.relu_(x.add_(y))) else "wrong", "detail": "bitwise"}


def check_large_max_pool(dtype: str, device: str) -> Result:
    x = image(1340, 64, 160, 160, torch_dtype(dtype), device)
    out = ran("max_pool", lambda: steps.max_pool_step(x, 3, 2, 1))
    parts = [slice(0, 8), slice(-8, None)]
    good = all(torch.equal(out[p], F.max_pool2d(x[p], 3, 2, 1)) for p in parts)
    return {"status": "ok" if good and not out.isnan().any() else "wrong", "detail": "bitwise"}


def check_gradient_conv(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    shape = ConvShape(batch, size, size, channels, channels, 3, 3, 1, 1)
    conv = Conv(vars(shape), vars(Epilogue(bn=True, residual=True, relu=True)), dtype, device)
    gamma, beta = conv.vectors[1:3]
    assert gamma is not None and beta is not None and conv.residual is not None
    leaves = [conv.x, conv.weight, gamma, beta, conv.residual]

    def run(x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor, ours: bool) -> Tensor:
        mean, var = (None if v is None else v.to(gamma.dtype) for v in conv.vectors[3:])
        if ours:
            return functional.conv_bn_act(
                x, weight, None, gamma, beta, mean, var, residual=residual, eps=EPS, padding=1
            )
        return reference.conv_bn_act(x, weight, None, gamma, beta, mean, var, residual, EPS, True, 1, 1, 1)

    return _gradients(leaves, run)


def check_gradient_bottleneck(dtype: str, batch: int, size: int, channels: int, device: str) -> Result:
    x = image(batch, channels, size, size, torch_dtype(dtype), device)
    sizes = [(channels, channels, 1), (channels, channels, 3), (4 * channels, channels, 1), (4 * channels, channels, 1)]
    leaves, constants = [x], []
    for k, c, r in sizes:
        weight = torch.randn(k, c, r, r, device=device) * (2 / (c * r * r)) ** 0.5
        gamma, beta, mean, var = norm(k, device)
        leaves += [weight.to(x.dtype).contiguous(memory_format=torch.channels_last), gamma, beta]
        constants.append((mean, var))

    def run(x: Tensor, *params: Tensor, ours: bool) -> Tensor:
        units = []
        for i, (mean, var) in enumerate(constants):
            weight, gamma, beta = params[3 * i : 3 * i + 3]
            pad = weight.shape[2] // 2
            units.append(ConvBN(weight, None, gamma, beta, mean.to(gamma), var.to(gamma), EPS, padding=pad))
        first, second, third, project = units
        if ours:
            return functional.bottleneck(x, first, second, third, downsample=project)

        def step(t: Tensor, unit: ConvBN, residual: Tensor | None = None, relu: bool = True) -> Tensor:
            weight, bias, gamma, beta, mean, var = unit[:6]
            return reference.conv_bn_act(
                t, weight, bias, gamma, beta, mean, var, residual, EPS, relu, unit.stride, unit.padding
            )

        return step(step(step(x, first), second), third, step(x, project, relu=False))

    return _gradients(leaves, run)


def _gradients(leaves: Sequence[Tensor], run: Callable[..., Tensor]) -> Result:
    """Gradients of every leaf: ours, eager and fp64 eager, for the same gradient of the output."""
    seed: Tensor | None = None

    def gradients(cast: Callable[[Tensor], Tensor], ours: bool) -> list[Tensor]:
        nonlocal seed
        inputs = [cast(t.detach()).requires_grad_() for t in leaves]
        y = run(*inputs, ours=ours)
        seed = torch.randn_like(y) if seed is None else seed
        return list(torch.autograd.grad(y, inputs, seed.to(y)))

    with use_backend("triton"):
        ours = gradients(torch.clone, True)
    return verdict(ours, gradients(torch.clone, False), gradients(Tensor.double, False), GRADIENT_FACTOR)


def check_model(depth: int, dtype: str, batch: int, size: int, device: str, backend: str) -> Result:
    model, x = network(depth, dtype, batch, size, device)
    library, wanted = model(x), copy.deepcopy(model).double()(x.double())
    fused = convert(model)
    with use_backend(backend):
        return verdict([fused(x)], [library], [wanted])


def check_repeat_model(depth: int, dtype: str, batch: int, size: int, device: str, times: int) -> Result:
    model, x = network(depth, dtype, batch, size, device)
    fused = convert(model)
    with use_backend("triton"):
        return _repeats(lambda: [fused(x)], times)


def check_graph(depth: int, dtype: str, batch: int, size: int, device: str) -> Result:
    """Replays of a captured forward give, bit by bit, what the model itself gives, for other images than captured."""
    model, x = network(depth, dtype, batch, size, device)
    fused = convert(model)
    with use_backend("triton"):
        captured = graph(fused, x)
        for i, images in enumerate((torch.randn_like(x), x, torch.randn_like(x))):
            if not torch.equal(captured(images), fused(images)):
                return {"status": "wrong", "detail": f"replay {i + 1} differs from the model's own forward"}
    return {"status": "ok", "detail": "3 replays bitwise equal"}


CHECKS: dict[str, Callable[..., Result]] = {
    "conv": check_conv,
    "large conv": check_large_conv,
    "repeat": check_repeat,
    "block": check_block,
    "repeat block": check_repeat_block,
    "bn_act": check_bn_act,
    "stem": check_stem,
    "stem uint8": check_stem_uint8,
    "max_pool": check_max_pool,
    "head": check_head,
    "head 10 classes": check_small_head,
    "fold_bn": check_fold_bn,
    "add_relu": check_add_relu,
    "large add_relu": check_large_add_relu,
    "large max_pool": check_large_max_pool,
    "gradient conv_bn_act": check_gradient_conv,
    "gradient bottleneck": check_gradient_bottleneck,
    "model": check_model,
    "repeat model": check_repeat_model,
    "graph": check_graph,
    **training_run.CHECKS,
}

"""Which programs are shipped, whether their machine code is good, and the table of it.

    python -m resnet_triton.aot                 a table on the terminal
    python -m resnet_triton.aot --diff          and what changed since tests/codegen/golden.json; exit code 1 if worse
    python -m resnet_triton.aot --golden        rewrites tests/codegen/golden.json: accepts the changes
    python -m resnet_triton.aot --markdown      the table for docs/codegen.md
    python -m resnet_triton.aot --alternatives  and whether any other configuration of a training kernel spills

Compiling and measuring is in :mod:`.codegen`, judging in :mod:`.golden`. None of this needs a GPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from . import chains, cost, plan, tuning
from .chains import bottleneck_tails
from .codegen import (
    DEVICES,
    SHARED_LIMIT,
    Case,
    Launch,
    Metrics,
    Use,
    arguments,
    chain_launches,
    conv_launches,
    measure,
    misfit,
    planned_for,
    specialization,
    trace,
)
from .devices import Target, known_devices
from .golden import ACCEPT, GOLDEN, LOOP_GOAL, diff, golden_record, heavy_loop, problems
from .kernels.config import ConvConfig, Epilogue
from .kernels.epilogue import Operands
from .kernels.geometry import ChainShape, ConvShape, cdiv
from .nests import nest_of_training
from .shapes import BLOCKS, BN_ADD_RELU, BN_RELU, CLASSES, ConvSite, features, resnet_convs, stem_conv

if TYPE_CHECKING:
    from .training.programs import Program

DEPTHS, BATCHES, SIZE = tuple(BLOCKS), (1, 32, 256), 224
#: Dtype, and how fp32 products are formed.
NUMERICS = (
    (torch.bfloat16, "tf32"),
    (torch.float16, "tf32"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
)
ARCHITECTURES = (90, 80, 100)
#: Depth of the networks whose training steps are compiled, whether in the Gram form, and whether blocks are chained.
TRAINED = ((50, True, True), (50, True, False), (50, False, False), (18, False, False))
#: The most configurations that a training kernel has for a shape.
MOST_CONFIGS = 8


def cases(sm: int = 90, limit: int | None = None) -> list[Case]:
    """Every case of an architecture.

    sm_90: whatever the plan for an H200 picks for each layer of ResNet-18 to 152 at 224 px and batch 1, 32 and 256 in
    bf16, with the layer's own epilogue (batch normalisation in fp32, as under autocast), every configuration of the
    chains of ResNet-50's blocks, each kernel in fp16, TF32 and exact fp32, and training steps of ResNet-50 and
    ResNet-18 at batch 256 in bf16, each of their kernels in the other dtypes. Others: each kernel of inference once in
    each of these. All: the configurations of convolutions and chains in the shipped tuned files of the architecture.
    Layers that need the same program are one case. The user's own tuned files play no part.

    Args:
        sm: 80, 90 or 100.
        limit: stop after so many cases.

    Raises:
        ValueError: for another architecture.
    """
    if sm not in SHARED_LIMIT:
        raise ValueError(f"sm={sm} is not checked; allowed: {', '.join(map(str, SHARED_LIMIT))}")
    found: dict[str, Case] = {}
    for case in _candidates(sm):
        if case.name in found:
            same = found[case.name]
            found[case.name] = replace(same, uses=(*same.uses, *(use for use in case.uses if use not in same.uses)))
        elif limit is None or len(found) < limit:
            found[case.name] = case
    return list(found.values())


def _candidates(sm: int) -> Iterator[Case]:
    target = planned_for(sm) or replace(known_devices()["NVIDIA H200"], name=f"sm_{sm}", sm=sm)
    if sm == 90:
        yield from _networks(_Kernels(target, torch.bfloat16, "tf32"))
    yield from _tuned(target)
    for dtype, precision in NUMERICS:
        seen = set()
        for case in _samples(_Kernels(target, dtype, precision)):
            if sm == 90 or case.kernel not in seen:
                seen.add(case.kernel)
                yield case
    if sm == 90:
        yield from _training(target)


def _training(target: Target) -> Iterator[Case]:
    """Training steps: every program with products in bf16, of the others the largest; of other dtypes, each kernel with
    the most operands."""
    vectors: dict[tuple[str, str], Case] = {}
    for case in _Kernels(target, torch.bfloat16, "tf32").training():
        if case.config:
            yield case
        else:
            kept = vectors.setdefault((case.kernel, case.operands), case)
            if case.uses[0].bytes > kept.uses[0].bytes:
                vectors[case.kernel, case.operands] = case
    yield from vectors.values()
    for dtype, precision in NUMERICS[1:]:
        most: dict[str, Case] = {}
        for case in _Kernels(target, dtype, precision).training():
            if case.config or precision == "tf32":  # the others have no choice of products
                kept = most.setdefault(case.kernel, case)
                if len(case.operands) > len(kept.operands):
                    most[case.kernel] = case
        yield from most.values()


def alternatives(sm: int = 90) -> list[Case]:
    """The other configurations of training kernels with products, among which a plan or a tuner may choose in bf16."""
    target = planned_for(sm)
    if sm != 90 or target is None:
        return []
    kernels = _Kernels(target, torch.bfloat16, "tf32")
    first = {case.name for case in kernels.training()}
    found: dict[str, Case] = {}
    for pick in range(1, MOST_CONFIGS):
        for case in kernels.training(pick):
            if case.config and case.name not in first:
                found.setdefault(case.name, case)
    return list(found.values())


def _networks(kernels: _Kernels) -> Iterator[Case]:
    done = set()
    for depth in DEPTHS:
        for batch in BATCHES:
            for site in resnet_convs(depth, batch, SIZE):
                if site[1:] not in done:
                    done.add(site[1:])
                    yield from kernels.conv(site, f"resnet{depth} {site.name} batch {batch}")
    for batch in BATCHES:
        yield from kernels.stem(batch)
        yield from kernels.max_pool(batch)
        yield from kernels.pooled(batch)
        for c in sorted({features(depth) for depth in DEPTHS}):
            yield from kernels.head(batch, c)
    chained = set()
    for batch in BATCHES[1:]:  # an image alone is too small for chains
        for name, chain in _chains(kernels, batch):
            if chain not in chained:
                chained.add(chain)
                for config in chains.configs_of(chain, kernels.dtype, kernels.target):
                    yield from kernels.chain(chain, f"resnet50 {name} batch {batch}", config)


def _chains(kernels: _Kernels, batch: int) -> Iterator[tuple[str, ChainShape]]:
    """For each block of ResNet-50: the longest chain that there is, and the one that the plan chooses."""
    if chains.refusal_of_chains(kernels.target, kernels.dtype, kernels.precision):
        return
    tails = list(bottleneck_tails(50, batch, SIZE))
    behind = [(name, replace(tail, first=None, first_epilogue=None)) for name, tail in tails if tail.first]
    for name, tail in (*tails, *behind):
        ways = (shape for _, shape in chains.ways(tail) if chains.configs_of(shape, kernels.dtype, kernels.target))
        longest = next(ways, None)
        if longest:
            yield name, longest
        chosen = chains.choose_chain(tail, kernels.dtype, kernels.precision, kernels.target, "auto")
        if chosen:
            yield name, chosen.shape


def _tuned(target: Target) -> Iterator[Case]:
    """The measured configurations that are shipped for an architecture."""
    for path in sorted(tuning.shipped_dir().glob("*.json")):
        tuned = tuning.read(path)
        for entry in tuned.entries if tuned.sm == target.sm else ():
            epilogue = BN_ADD_RELU if entry.residual else BN_RELU
            kernels = _Kernels(target, getattr(torch, entry.dtype), entry.precision or "tf32")
            label = f"{tuned.device} {entry.shape}"
            yield from kernels.conv(ConvSite(label, entry.shape, epilogue), label, entry.config)
        for chain in tuned.chains if tuned.sm == target.sm else ():
            kernels = _Kernels(target, getattr(torch, chain.dtype), "tf32")
            yield from kernels.chain(chain.shape, f"{tuned.device} {chain.shape}", chain.config)


def _samples(kernels: _Kernels) -> Iterator[Case]:
    """Each kernel at least once."""
    batch = 32
    shapes = (
        ("3x3", ConvShape(batch, 28, 28, 128, 128, 3, 3, 1, 1), BN_ADD_RELU),
        ("3x3 stride 2", ConvShape(batch, 56, 56, 128, 128, 3, 3, 2, 1), BN_RELU),
        ("1x1", ConvShape(batch, 14, 14, 256, 1024), BN_ADD_RELU),
        ("odd 3x3 stride 2", ConvShape(batch, 57, 57, 128, 128, 3, 3, 2, 1), BN_RELU),
    )
    for label, shape, epilogue in shapes:
        yield from kernels.conv(ConvSite(label, shape, epilogue), f"{label} batch {batch}")
    if kernels.dtype.itemsize == 2 and kernels.target.tma:
        shape, epilogue = ConvShape(256, 7, 7, 512, 2048), replace(BN_ADD_RELU, residual_bn=True)
        yield from kernels.conv(ConvSite("1x1", shape, epilogue), "1x1 that normalises its shortcut batch 256")
        yield from kernels.lead(batch)
    if kernels.target.sm == 90 and kernels.dtype == torch.bfloat16:
        for label, shape, _ in (shapes[0], *shapes[2:]):
            epilogue = replace(BN_ADD_RELU, relu=False, prelu=True)
            yield from kernels.conv(ConvSite(label, shape, epilogue), f"{label} and PReLU batch {batch}")
    seen = set()
    for name, chain in _chains(kernels, batch):
        for config in chains.configs_of(chain, kernels.dtype, kernels.target):
            if config.kernel not in seen:
                seen.add(config.kernel)
                yield from kernels.chain(chain, f"resnet50 {name} batch {batch}", config)
    yield from kernels.pooled(batch)
    yield from kernels.head(batch, features(50))
    yield from kernels.stem(batch, every_tile=True)
    if kernels.precision == "tf32":  # the rest has no products
        yield from kernels.max_pool(batch)
        yield from kernels.add_relu(batch)
        yield from kernels.bn_act(batch)
        yield from kernels.fold_bn()


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _operands(epilogue: Epilogue, k: int, residual: Tensor | None) -> Operands:
    bias = _meta(k) if epilogue.bias else None
    gamma, beta, mean, var = (_meta(k) if epilogue.bn else None for _ in range(4))
    added, slope = residual if epilogue.residual else None, _meta(k) if epilogue.prelu else None
    return Operands(added, bias, gamma, beta, mean, var, 1e-5, epilogue.relu, slope=slope)


@dataclass(frozen=True)
class _Kernels:
    """Makes the cases of each op, for one device, dtype and precision."""

    target: Target
    dtype: torch.dtype
    precision: str

    def conv(self, site: ConvSite, label: str, config: ConvConfig | None = None) -> Iterator[Case]:
        """One convolution; ``config`` None is what runs where nothing was measured."""
        _, shape, epilogue = site
        config = config or plan.own_config(shape, epilogue, self.dtype, self.precision, self.target)
        size, outputs = self.dtype.itemsize, shape.m * shape.k
        launches = conv_launches(shape, epilogue, self.dtype, self.precision, config, self.target.multiprocessors)
        if config.split == 1:
            (launch,) = launches
            moved = shape.bytes_moved(size, epilogue.residual)
            yield self._case(launch, label, moved, outputs, shape, config, epilogue)
            return
        parts, last = launches
        workspace = cost.workspace_bytes(config, shape) // 2  # written by the first kernel, read by the second
        moved = shape.bytes_moved(size) - size * outputs + workspace
        yield self._case(parts, label, moved, config.split * outputs, shape, config, Epilogue())
        moved = workspace + size * outputs * (1 + epilogue.residual)
        yield self._case(last, label, moved, outputs, epilogue=epilogue)

    def lead(self, batch: int) -> Iterator[Case]:
        """A 1x1 that normalises what it loads, and the vectors by which it does."""
        from .kernels.conv1x1 import launch_conv1x1
        from .kernels.prologue import launch_bn_vectors
        from .preact_ops import choose_lead

        shape = ConvShape(batch, 56, 56, 256, 64)
        choice = choose_lead(shape, BN_RELU, self.dtype, self.precision, self.target, "triton")
        if choice is None:
            return
        x, w = _meta(shape.m, shape.c, dtype=self.dtype), _meta(shape.k, shape.c, dtype=self.dtype)
        y, operands = _meta(shape.m, shape.k, dtype=self.dtype), _operands(BN_RELU, shape.k, None)

        def run() -> None:
            prologue = launch_bn_vectors(_meta(shape.c), _meta(shape.c), _meta(shape.c), _meta(shape.c), 1e-5)
            launch_conv1x1(x, w, y, operands, choice.tiling, self.precision, prologue)

        first, second = self._trace(run)
        yield self._case(first, f"vectors of a BN of {shape.c} channels", 6 * shape.c * 4, 2 * shape.c)
        moved, label = shape.bytes_moved(self.dtype.itemsize), f"1x1 behind BN and ReLU batch {batch}"
        yield self._case(second, label, moved, y.numel(), shape, choice.tiling, BN_RELU)

    def chain(self, shape: ChainShape, label: str, config: ConvConfig) -> Iterator[Case]:
        """Several convolutions as one kernel, every one with BN."""
        moved = shape.bytes_moved(self.dtype.itemsize)
        outputs = math.prod(shape.stored) + (shape.reduce.m * shape.reduce.k if shape.reduce else 0)
        (launch,) = chain_launches(shape, self.dtype, self.precision, config, self.target.multiprocessors)
        yield self._case(launch, label, moved, outputs, shape, config)

    def pooled(self, batch: int) -> Iterator[Case]:
        """ResNet-50's last convolution with the average over the image, where the plan has them in one kernel."""
        from .kernels.conv1x1_pool import launch_conv1x1_pool

        *_, (name, shape, epilogue) = resnet_convs(50, batch, SIZE)
        choice = chains.choose_pooled(shape, epilogue, self.dtype, self.precision, self.target, "auto")
        if choice is None:
            return
        x = _meta(shape.n, shape.h, shape.w, shape.c, dtype=self.dtype)
        w, pooled = _meta(shape.k, shape.c, dtype=self.dtype), _meta(shape.n, shape.k, dtype=self.dtype)
        operands = _operands(epilogue, shape.k, _meta(shape.n, shape.p, shape.q, shape.k, dtype=self.dtype))
        moved = cost.pooled_bytes(shape, self.dtype.itemsize)
        label = f"resnet50 {name} and average batch {batch}"
        for launch in self._trace(lambda: launch_conv1x1_pool(x, w, pooled, operands, choice.tiling, self.precision)):
            yield self._case(launch, label, moved, pooled.numel(), shape, choice.tiling, epilogue)

    def stem(self, batch: int, every_tile: bool = False) -> Iterator[Case]:
        """Rearranging an image (of the model's dtype, or bytes), packing the weight, the convolution on cells, and the
        kernel that pools too (``every_tile``: on each tile that some image may get)."""
        from .kernels import stem
        from .kernels.stem_pool import TILES, launch_stem_pool

        _, shape, epilogue = stem_conv(batch, SIZE)
        config = plan.choose_stem(shape, epilogue, self.dtype, self.target, "triton", self.precision).config
        assert config is not None
        pairs = config.kernel == "conv_tma"
        hs, ws = stem.stem_cells(shape.h, shape.w, pairs)
        xs = _meta(batch, hs, ws, stem.CELL_CHANNELS, dtype=self.dtype)
        packed = _meta(shape.k, 4, 4, stem.CELL_CHANNELS, dtype=self.dtype)
        w = _meta(shape.k, 3, 7, 7, dtype=self.dtype)
        y = _meta(batch, shape.p, shape.q, shape.k, dtype=self.dtype)
        operands = _operands(epilogue, shape.k, y)
        planar = _meta(batch, 3, shape.h, shape.w, dtype=self.dtype)
        decoded = _meta(batch, shape.h, shape.w, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        label = f"stem batch {batch}"

        def rearrange() -> None:
            stem.launch_space_to_depth(planar, xs)
            stem.launch_space_to_depth(decoded, xs, _meta(3), _meta(3))

        if self.precision == "tf32":  # these have no products
            for launch, image in zip(self._trace(rearrange), (planar, decoded), strict=True):
                yield self._case(launch, label, image.nbytes + xs.nbytes, xs.numel())
            for launch in self._trace(lambda: stem.launch_pack_stem_weight(w, packed)):
                yield self._case(launch, label, w.nbytes + packed.nbytes, packed.numel())
        cells = ConvShape(batch, hs, ws, stem.CELL_CHANNELS, shape.k, 4, 4)
        if pairs:
            cells = ConvShape(batch, hs, shape.q // 2 + 1, 2 * stem.CELL_CHANNELS, shape.k, 4, 2)
        moved = cells.bytes_moved(self.dtype.itemsize)
        for launch in self._trace(lambda: stem.launch_stem_conv(xs, packed, y, operands, config, self.precision)):
            yield self._case(launch, label, moved, cells.m * cells.k, cells, config, epilogue)
        choice = plan.choose_stem(shape, epilogue, self.dtype, self.target, "triton", self.precision, pool=True)
        if choice.realisation != "stem_pool":
            return
        tiles = TILES if every_tile else (choice.tiling.box[::2],)
        pooled = _meta(batch, cdiv(shape.p, 2), cdiv(shape.q, 2), shape.k, dtype=self.dtype)
        for images, columns in tiles:
            tiled = replace(choice.tiling, box=(images, choice.tiling.box[1], columns))
            launcher = functools.partial(launch_stem_pool, xs, packed, pooled, operands, tiled, self.precision)
            for launch in self._trace(launcher):
                moved = xs.nbytes + pooled.nbytes
                yield self._case(launch, f"{label} with max-pool", moved, pooled.numel(), shape, tiled, epilogue)

    def head(self, batch: int, c: int) -> Iterator[Case]:
        """Global average pool and fully connected layer."""
        from .kernels.head import launch_head

        config = plan.choose_head(batch, c, CLASSES, self.dtype, self.target, "triton").config
        assert config is not None
        x, pooled = _meta(batch, 7, 7, c, dtype=self.dtype), _meta(batch, c, dtype=self.dtype)
        w, bias = _meta(CLASSES, c, dtype=self.dtype), _meta(CLASSES, dtype=self.dtype)
        logits = _meta(batch, CLASSES, dtype=self.dtype)
        shape = ConvShape(batch, 1, 1, c, CLASSES)
        label = f"head {c} batch {batch}"
        for launch in self._trace(lambda: launch_head(x, w, bias, pooled, logits, config, self.precision)):
            if launch.kernel.__name__ == config.kernel:
                moved = shape.bytes_moved(self.dtype.itemsize)
                yield self._case(launch, label, moved, logits.numel(), shape, config, Epilogue(bias=True))
            elif self.precision == "tf32":
                yield self._case(launch, label, x.nbytes + pooled.nbytes, pooled.numel())

    def max_pool(self, batch: int) -> Iterator[Case]:
        from .kernels.pool import launch_max_pool

        x, y = _meta(batch, 112, 112, 64, dtype=self.dtype), _meta(batch, 56, 56, 64, dtype=self.dtype)
        for launch in self._trace(lambda: launch_max_pool(x, y)):
            yield self._case(launch, f"max pool batch {batch}", x.nbytes + y.nbytes, y.numel())

    def add_relu(self, batch: int) -> Iterator[Case]:
        from .kernels.add_relu import launch_add_relu

        x = _meta(batch, 56, 56, 256, dtype=self.dtype)
        for launch in self._trace(lambda: launch_add_relu(x, x, x)):
            yield self._case(launch, f"add and ReLU batch {batch}", 3 * x.nbytes, x.numel())

    def bn_act(self, batch: int) -> Iterator[Case]:
        """The pass behind a library's convolution, without and with a shortcut."""
        from .kernels.bn_act import launch_bn_act

        prelu = [Epilogue(bias=True, prelu=True)] if self.target.sm == 90 and self.dtype == torch.bfloat16 else []
        for epilogue in (BN_RELU, BN_ADD_RELU, *prelu):
            y, residual = (_meta(batch, 7, 7, 512, dtype=self.dtype) for _ in range(2))
            moved = (2 + epilogue.residual) * y.nbytes
            for launch in self._trace(partial(launch_bn_act, y, _operands(epilogue, 512, residual))):
                label = f"behind a library's convolution batch {batch}"
                yield self._case(launch, label, moved, y.numel(), epilogue=epilogue)

    def fold_bn(self) -> Iterator[Case]:
        from .kernels.batch_norm import launch_fold_bn

        w, v = _meta(512, 3, 3, 512, dtype=self.dtype), _meta(512, dtype=self.dtype)
        for launch in self._trace(lambda: launch_fold_bn(w, None, v, v, v, v, 1e-5, w, v)):
            yield self._case(launch, "fold 3x3 512->512", 2 * w.nbytes, w.numel())

    def training(self, pick: int = 0) -> Iterator[Case]:
        """What training steps launch; ``pick`` as of :meth:`.training.programs.TrainingStep.programs`."""
        from .training.programs import TrainingStep

        for depth, gram, chained in TRAINED:
            step = TrainingStep(depth, BATCHES[-1], SIZE, gram, chained)
            for program in step.programs(self.dtype, self.precision, self.target, pick):
                yield self._program(program)

    def _program(self, program: Program) -> Case:
        from .training import plan as training_plan

        launch, config, operands = program.launch, program.config, program.operands
        name, given = launch.kernel.__name__, arguments(launch)
        if config is None:  # moves bytes: whatever it is given, once
            tensors = {id(t): t for t in map(_tensor, given.values()) if t is not None}.values()
            use = Use(
                program.label, math.prod(launch.grid), sum(t.nbytes for t in tensors), max(t.numel() for t in tensors)
            )
        else:
            assert program.work is not None
            whole = training_plan.predict(program.work, config, self.dtype, self.precision, self.target)
            part = replace(whole, **{limit: us * program.share for limit, us in whole.limits.items()})
            moved = int(training_plan.moved_bytes(program.work, self.dtype) * program.share)
            written = _tensor(given[_WRITTEN.get(name, "y")])
            assert written is not None
            tiles = nest_of_training(name, given).tiles
            use = Use(program.label, math.prod(launch.grid), moved, written.numel(), None, part, tiles)
        unique = _name(launch, self.target.sm, self.precision, config, operands)
        return Case(
            unique, name, self.target.sm, self.dtype, self.precision, config, None, (use,), launch, True, operands
        )

    def _trace(self, launcher: Callable[[], object]) -> list[Launch]:
        return trace(launcher, self.target.multiprocessors)

    def _case(
        self,
        launch: Launch,
        label: str,
        moved: int,
        outputs: int,
        shape: ConvShape | ChainShape | None = None,
        config: ConvConfig | None = None,
        epilogue: Epilogue | None = None,
    ) -> Case:
        use = Use(label, math.prod(launch.grid), moved, outputs, shape)
        name = _name(launch, self.target.sm, self.precision, config, use.fused or epilogue)
        kernel = launch.kernel.__name__
        return Case(name, kernel, self.target.sm, self.dtype, self.precision, config, epilogue, (use,), launch)


#: The argument of a training kernel that is written, where it is not ``y``.
_WRITTEN = {"dgrad": "dx", "dgrad_rolling": "dx", "wgrad": "parts", "wgrad_rolling": "parts", "gram_dgrad": "out"}


def _tensor(value: Any) -> Tensor | None:
    """A tensor, or what a tensor descriptor describes."""
    value = getattr(value, "base", value)
    return value if isinstance(value, Tensor) else None


#: Constants that the configuration's and the epilogue's own text already say.
_SAID = {"TN", "TH", "TW", "BM", "BN", "BK", "RELU", "PRECISION"}


def _singles(name: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """An argument's name, type and specialised value; of a tuple, those of its elements."""
    if isinstance(kind, str):
        yield name, kind, value
    else:
        for i, (inner, special) in enumerate(zip(kind, value, strict=True)):
            yield from _singles(f"{name}.{i}", inner, special)


def _name(launch: Launch, sm: int, precision: str, config: ConvConfig | None, fused: object) -> str:
    """Everything that the machine code depends on: types, constants, and which integers are multiples of 16."""
    constants, types, hints = [], [], []
    kinds_of, values = zip(*specialization(launch, sm), strict=True)
    singles = map(_singles, launch.kernel.arg_names, kinds_of, values)
    for name, kind, value in itertools.chain.from_iterable(singles):
        if kind == "constexpr":
            if value is not None and not (config and name in _SAID):
                constants += [name] * value if isinstance(value, bool) else [f"{name}{value}"]
        elif kind[0] == "*" or kind.startswith("tensordesc"):
            constants += ["behind_bn_relu"] * (name == "scale_in")
            types.append(kind.removeprefix("*").removeprefix("tensordesc<").split("[")[0])
            if kind[0] == "*" and value != "D":
                hints.append(f"{name}%1")
        elif value == "D":
            hints.append(f"{name}%16")
    tiling = str(config).replace(" ", "_") if config else f"w{launch.kwargs.get('num_warps', 4)}"
    exact = precision if config and types[0] == "fp32" else ""
    kinds = ",".join(dict.fromkeys(types))
    parts = (f"sm{sm}", launch.kernel.__name__, kinds, exact, tiling, "_".join(constants), str(fused or "").strip("-"))
    return "-".join(part for part in (*parts, "_".join(hints)) if part)


# The table and the command line

HEADER = (
    "kernel", "dtype", "tile", "epilogue", "first layer", "layers", "registers", "spills", "shared", "programs/SM",
    "MMA", "TMA", "step", "loops", "tile instr", "pressure", "instr/output", "limit", "issue/roof",
)  # fmt: skip


def row(case: Case, metrics: Metrics) -> tuple[str, ...]:
    """A line of the table, in the order of :data:`HEADER`."""
    dtype = str(case.dtype).removeprefix("torch.")
    return (
        case.kernel,
        dtype if case.dtype != torch.float32 or case.config is None else f"{dtype} {case.precision}",
        str(case.config or "-"),
        case.uses[0].fused or case.operands or str(case.epilogue or "-"),
        case.uses[0].label,
        str(len(case.uses)),
        str(metrics.registers),
        str(metrics.spill_bytes),
        str(metrics.shared_bytes),
        str(metrics.resident),
        str(metrics.tensor_core or metrics.ffma),
        f"{metrics.tma_loads}+{metrics.tma_stores}",
        _nested([(loop.depth, f"{loop.step_instructions:.0f}") for loop in metrics.loops]),
        _nested([(loop.depth, f"{loop.pressure:.2f}") for loop in metrics.loops]),
        f"{metrics.tile_instructions:.0f}",
        "-" if metrics.pressure is None else f"{metrics.pressure:.2f}",
        f"{metrics.per_output:.1f}",
        metrics.limit or "-",
        "-" if metrics.issue_over_roof is None else f"{metrics.issue_over_roof:.2f}",
    )


def _nested(cells: Sequence[tuple[int, str]]) -> str:
    """Loops one after another as ``a + b``, those inside a loop as ``a (b + c)``."""
    text, before = "", 0
    for depth, cell in cells:
        if depth > before:
            text += " ("
        elif text:
            text += ")" * (before - depth) + " + "
        text, before = text + cell, depth
    return text + ")" * before or "-"


def _print_table(rows: Sequence[tuple[str, ...]], markdown: bool) -> None:
    if markdown:
        for line in (HEADER, ("---",) * len(HEADER), *rows):
            print(f"| {' | '.join(line)} |")
        return
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    for line in (HEADER, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


PREAMBLE = """# Machine code of the shipped kernels

Generated by `python -m resnet_triton.aot --markdown` with triton {triton}, without a GPU. No time here was
measured.

- *layers*: how many distinct layers of ResNet-18 to 152 (224 px, batch 1, 32, 256) run this very program; the
  *first layer* is one of them. Of training: how many launches in steps of ResNet-50 and ResNet-18 at batch 256, each
  with the configuration that is predicted fastest; of kernels without products, the largest launch is shown.
- *epilogue*: what follows a convolution in the same kernel; of a chain, its convolutions (`expand/2`: every second row
  and column of its output is stored); of a training kernel, the operands that it is given besides what it always needs.
- *spills*, *shared*: bytes a thread, bytes a program. *programs/SM*: how many fit a multiprocessor.
- *MMA*, *TMA*: matrix instructions (FFMA for exact fp32), and TMA loads + stores in the listing.
- *step*: instructions that a warp issues in one iteration of each loop with products, loops inside it apart: `a + b`
  are two loops, one after the other, `a (b)` is loop b inside loop a. *tile instr*: for one tile in all; a tile is a
  program's whole strip of rows in a rolling kernel.
- *loops*, *pressure*: issue cycles over tensor-core cycles (over FFMA cycles for exact fp32, which cannot be below 1):
  of one iteration of each loop, as under *step*, and of a tile in all. The tests keep a tile's below 0.7 for TMA
  kernels of one convolution wherever the tensor cores take longer than device memory and the launch.
- *instr/output*: thread instructions per output element; of training kernels without products, per element of the
  largest tensor, every loop counted once.
- *issue/roof*: predicted issue time over the slowest other *limit* of the layer, worst layer. The tests
  keep it below 1: there, the instructions are hidden.
- The tests hold every program to its own figures; below the tables of training stands why a loop has a pressure above
  {goal}.
"""


def _progress(done: int, total: int, text: str) -> None:
    """One line on stderr, rewritten on a terminal."""
    end = "" if sys.stderr.isatty() and done < total else "\n"
    print(f"\r[{done}/{total}] {text:.100}".ljust(112), end=end, file=sys.stderr, flush=True)


_group: Sequence[Case] = ()  # what forked processes measure: launches cannot be sent to them


def _measure(i: int) -> Metrics | RuntimeError:
    try:
        return measure(_group[i])
    except RuntimeError as error:
        return error


def _measured(group: Sequence[Case], jobs: int) -> Iterator[Metrics | RuntimeError]:
    """The metrics of each case in order, or why there are none."""
    global _group
    _group, jobs = group, min(jobs, len(group))
    if jobs < 2:
        yield from map(_measure, range(len(group)))
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap(_measure, range(len(group)))


def _report(group: Sequence[Case], sm: int, training: bool, markdown: bool, golden: dict[str, dict], jobs: int) -> bool:
    """Prints the table of some cases and what is wrong with them, adds their figures to ``golden``; whether any is."""
    rows, notes = [], []
    heavy: dict[tuple[str, str], list[Metrics]] = {}
    for done, (case, metrics) in enumerate(zip(group, _measured(group, jobs), strict=True), 1):
        _progress(done, len(group), case.name)
        if isinstance(metrics, RuntimeError):
            notes.append(str(metrics).replace("\n", " "))
            continue
        rows.append(row(case, metrics))
        golden[case.name] = golden_record(metrics)
        notes += [f"{case.name}: {problem}" for problem in problems(case, metrics)]
        if training and (reason := heavy_loop(case, metrics)):
            heavy.setdefault((case.kernel, reason), []).append(metrics)
    print(heading(sm, training, len(rows), markdown))
    _print_table(rows, markdown)
    bullet = "- " if markdown else ""
    if heavy:
        print(f"\nLoops above {LOOP_GOAL}:\n")
        print("\n".join(f"{bullet}{line}" for line in map(_heavy_line, heavy.items())))
    print("".join(f"\n{bullet}{note}" for note in notes))
    return len(notes) > 0


def heading(sm: int, training: bool, programs: int, markdown: bool) -> str:
    """The heading of a table."""
    target = f", planned for {DEVICES[sm]}" if sm in DEVICES else ""
    return f"{'## ' if markdown else ''}sm_{sm}{', training' * training}: {programs} programs{target}\n"


def _heavy_line(item: tuple[tuple[str, str], list[Metrics]]) -> str:
    (kernel, reason), found = item
    most = max(loop.pressure for metrics in found for loop in metrics.loops)
    over = max(metrics.issue_over_roof or 0.0 for metrics in found)
    number = f"{len(found)} program{'s' * (len(found) > 1)}"
    return f"{kernel}, {number}, up to {most:.2f} (issue/roof up to {over:.2f}): {reason}."


def _report_alternatives(found: Sequence[Case]) -> bool:
    """Says what is wrong with other configurations of training kernels; whether any is."""
    notes = []
    for done, case in enumerate(found, 1):
        _progress(done, len(found), case.name)
        try:
            if reason := misfit([case.launch], case.sm, SHARED_LIMIT[case.sm]):
                notes.append(f"{case.name}: {reason}")
        except RuntimeError as error:
            notes.append(f"{case.name}: {error}")
    print(f"\n{len(found)} other configurations of training kernels: {len(notes) or 'none'} with problems")
    print("".join(f"- {note}\n" for note in notes), end="")
    return len(notes) > 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a case has problems, does not compile, or differs from the golden file."""
    parser = argparse.ArgumentParser(prog="python -m resnet_triton.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sm", type=int, choices=ARCHITECTURES, action="append", help="architecture (default: all)")
    parser.add_argument("--limit", type=int, help="at most so many programs per architecture")
    parser.add_argument("--only", default="", help="programs whose name contains this")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--golden", nargs="?", const=GOLDEN, type=Path, help=f"write the golden file ({GOLDEN.name})")
    parser.add_argument("--diff", nargs="?", const=GOLDEN, type=Path, help=f"compare with {GOLDEN.name}")
    parser.add_argument(
        "--alternatives", action="store_true", help="compile every other configuration of training kernels too"
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    parser.add_argument("--jobs", type=int, default=min(8, cores), help=f"processes (default: {min(8, cores)})")
    options = parser.parse_args(argv)
    partial = bool(options.sm or options.limit or options.only)
    if options.golden and partial:
        parser.error("--golden keeps every case: leave --sm, --limit and --only away")

    start, failed = time.monotonic(), False
    golden: dict[str, dict] = {}
    if options.markdown:
        print(PREAMBLE.format(triton=triton.__version__, goal=LOOP_GOAL))
    for sm in options.sm or ARCHITECTURES:
        selected = [case for case in cases(sm, options.limit) if options.only in case.name]
        for training in (False, True):
            group = [case for case in selected if case.training == training]
            if group or not training:
                failed |= _report(group, sm, training, options.markdown, golden, options.jobs)
        if options.alternatives:
            failed |= _report_alternatives([case for case in alternatives(sm) if options.only in case.name])
    if options.diff:
        try:
            lines, different = diff(golden, options.diff, complete=not partial)
        except ValueError as error:
            parser.error(str(error))
        print(f"\nchanges since {options.diff.name}:")
        print("".join(f"  {line}\n" for line in lines), end="")
        if different:
            print(ACCEPT)
        failed |= different
    if options.golden:
        data = {"triton": triton.__version__, "cases": golden}
        options.golden.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

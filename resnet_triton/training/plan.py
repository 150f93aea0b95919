"""Decides how each step of training runs; the steps ask while running, ``explain`` without.

A step that was measured on this device takes the faster of the measured times, one that was measured on a GPU of the
same architecture the configuration found there; for the others predicted times decide.

A training kernel is priced by three of the five limits of :mod:`resnet_triton.cost`: bytes through device memory, bytes
from L2 and products. The library is priced as its convolution at a share of the matrix rate, and a pass of its own for
everything that a kernel of this package would do on the way.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from .. import cost, tuning
from ..devices import Target
from ..entries import TrainEntry
from ..kernels.config import MOST_WGRAD_SPLITS, ConvConfig, rows_of_tiles
from ..kernels.geometry import ConvShape, cdiv
from ..plan import CLEAR_WIN, CLEARED, Choice, library_of, refusal, warn_borrowed

#: Steps whose products sum over the pixels.
OVER_PIXELS = ("wgrad", "gram", "stem_wgrad")
#: Steps without products: they only move bytes.
PASSES = ("moments", "bn_apply", "masked_sums", "bn_backward", "bn_relu_pool", "bn_relu_pool_backward")
#: Steps of the Gram form, which no library has.
GRAM_STEPS = ("gram", "expand", "gram_dgrad")
#: Steps that have configurations, and the kernels of those that are not named as the step.
TUNED_STEPS = ("conv_stats", "dgrad", "wgrad", *GRAM_STEPS, "stem_conv_stats", "stem_wgrad")
_KERNELS = {
    "conv_stats": ("conv_stats", "conv_stats_rolling"), "dgrad": ("dgrad", "dgrad_rolling"),
    "wgrad": ("wgrad", "wgrad_rolling"), "gram": ("wgrad",),
    "stem_conv_stats": ("conv_stats",), "stem_wgrad": ("wgrad",),
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What a step has to do.

    Args:
        step: the kernel's name, or ``"aten"`` for a pass that PyTorch runs.
        shape: of the forward convolution, or None for a pass.
        prologue: the convolution's input is normalised as it is loaded.
        backward: the incoming gradient is BN's, formed as it is loaded.
        moments: statistics of the result are taken; of ``wgrad``, sums of the gradient that comes in.
        project: of a projected shortcut, or None.
        residual_stride: of what is added to a gradient, 0 for nothing; 1 for a shortcut added to ``conv_stats``.
        following: filters of the next block's first 1x1 that is computed with this step, or 0.
        moved: bytes of a pass.
    """

    step: str
    shape: ConvShape | None = None
    prologue: bool = False
    backward: bool = False
    moments: bool = False
    project: ConvShape | None = None
    residual_stride: int = 0
    following: int = 0
    moved: int = 0

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those that a configuration of it may name."""
        return _KERNELS.get(self.step, (self.step,))

    def realised_by(self, config: ConvConfig | None) -> str:
        """What runs a configuration of it, by name: the step's own kernel, unless another rolls down rows."""
        if config is not None and config.kernel.endswith("_rolling"):
            return config.kernel
        return self.step

    @property
    def has_library(self) -> bool:
        """Whether PyTorch's operators could run instead."""
        return self.step not in GRAM_STEPS


def kernels_run(target: Target, backend: str) -> bool:
    """Whether the small kernels between the steps run on a target."""
    return backend != "cudnn" and refusal(target, torch.float32) is None and (target.is_cuda or backend == "triton")


def refusal_of_products(work: Work, dtype: torch.dtype, precision: str, target: Target) -> str | None:
    """Why no training kernel with products can do this work there, or None."""
    if reason := refusal(target, dtype):
        return reason
    if not target.tma:
        return f"{target.name} has no tensor memory accelerator, which the training kernels need"
    assert work.shape is not None
    if work.shape.stride > 2:
        return f"{work.shape} has stride {work.shape.stride}; training kernels take 1 and 2"
    if not work.step.startswith("stem") and (work.shape.c * dtype.itemsize % 16 or work.shape.k * dtype.itemsize % 16):
        return f"{work.shape} has rows that are no multiple of 16 bytes"
    if not configs_of(work, dtype, precision, target.multiprocessors):
        return f"no tile of {work.step} computes {work.shape}"
    return None


_forced: dict[Work, Choice] = {}


@contextlib.contextmanager
def forcing(work: Work, choice: Choice) -> Iterator[None]:
    """Within the block, some work runs as told: its times are being measured."""
    _forced[work] = choice
    try:
        yield
    finally:
        del _forced[work]


def choose(work: Work, dtype: torch.dtype, precision: str, target: Target, backend: str) -> Choice:
    """Chooses how a step runs.

    Raises:
        RuntimeError: ``use_backend("triton")`` is in force and kernels cannot run there at all.
    """
    if _forced and work in _forced:
        return _forced[work]
    return _choose(work, dtype, precision, target, backend)


@functools.lru_cache(maxsize=4096)
def _choose(work: Work, dtype: torch.dtype, precision: str, target: Target, backend: str) -> Choice:
    library = library_of(target)
    passing = work.step in PASSES or work.step == "aten"
    reason = refusal(target, dtype) if passing else refusal_of_products(work, dtype, precision, target)
    if backend == "triton" and (why := refusal(target, dtype)):
        raise RuntimeError(f"use_backend('triton') cannot run {work.step}: {why}. Use use_backend('auto').")
    theirs = library_prediction(work, dtype, precision, target) if target.is_cuda and not _unrated(dtype) else None
    their_us, their_limit = (theirs.us, theirs.limit) if theirs else (None, "")
    if work.step == "aten":
        return Choice("aten", None, "one pass of PyTorch's", their_us, limit=their_limit)
    library = "aten" if passing else library
    if backend == "cudnn":
        return Choice(library, None, "use_backend('cudnn')", their_us, limit=their_limit)
    if reason or (not target.is_cuda and backend != "triton"):
        reason = reason or "the interpreter runs only under use_backend('triton')"
        return Choice(library, None, reason, their_us, limit=their_limit)
    config = None
    if not passing:
        candidates = configs_of(work, dtype, precision, target.multiprocessors)
        config = candidates[0]
        if target.is_cuda:
            config = min(candidates, key=lambda c: predict(work, c, dtype, precision, target).us)
    if not target.is_cuda:
        return Choice(work.realised_by(config), config, "use_backend('triton') in the interpreter")
    if not passing and (known := measured(work, dtype, precision, target)):
        name, entry = known
        limit = predict(work, entry.config, dtype, precision, target).limit
        text, wins = f"{entry.us:.1f} us{_against(entry, work, library)}", CLEAR_WIN if name else 1.0
        if backend == "triton" or not work.has_library or entry.us <= wins * entry.library_us:
            choice = Choice(work.realised_by(entry.config), entry.config, text, None, entry.us, limit)
        else:
            choice = Choice(library, None, text, None, entry.library_us, their_limit)
        if not name:
            return replace(choice, reason=f"measured {text}")
        assert work.shape is not None
        warn_borrowed(target, name, work.shape, dtype, precision, train=True)
        us = predict(work, entry.config, dtype, precision, target).us if choice.fused else their_us
        return replace(choice, reason=f"unmeasured here; {text} on {name}", predicted_us=us, measured_us=None)
    ours = predict(work, config, dtype, precision, target)
    if work.step in GRAM_STEPS:
        text = f"the Gram form has no library; predicted {ours.us:.1f} us ({ours.limit})"
        return Choice(work.step, config, text, ours.us, limit=ours.limit)
    text = f"unmeasured; predicted {ours.us:.1f} us ({ours.limit}) against {their_us or 0.0:.1f} us by {library}"
    if backend == "triton":
        return Choice(work.realised_by(config), config, f"use_backend('triton'); {text}", ours.us, limit=ours.limit)
    if their_us is not None and ours.us > CLEAR_WIN * their_us:
        return Choice(library, None, text, their_us, limit=their_limit)
    return Choice(work.realised_by(config), config, text, ours.us, limit=ours.limit)


def _against(entry: TrainEntry, work: Work, library: str) -> str:
    assert work.shape is not None
    text = f" against {entry.library_us:.1f} us by {library}" if work.has_library else "; the Gram form has no library"
    return text if entry.batch == work.shape.n else f"{text}, at batch {entry.batch}"


def measured(work: Work, dtype: torch.dtype, precision: str, target: Target) -> tuple[str, TrainEntry] | None:
    """What was measured of a step, with a configuration that can run here, and on which sibling (``""``: here)."""
    known = candidates_of(work, dtype, precision, target)

    def usable(entry: TrainEntry) -> TrainEntry | None:
        if entry.config in known:
            return entry
        same = (c for c in known if replace(c, split=1) == replace(entry.config, split=1))  # shares follow the pixels
        config = next(same, None)
        return replace(entry, config=config) if config else None

    entry = tuning.lookup_training(target.name, work, dtype, precision)
    if entry and (entry := usable(entry)):
        return "", entry
    name, entry = tuning.lookup_sibling_training(target, work, dtype, precision) or ("", None)
    entry = entry and usable(entry)
    return (name, entry) if entry else None


@functools.lru_cache(maxsize=4096)
def candidates_of(work: Work, dtype: torch.dtype, precision: str, target: Target) -> tuple[ConvConfig, ...]:
    """The configurations worth measuring, the one that is predicted fastest first."""
    assert work.shape is not None
    known = configs_of(work, dtype, precision, target.multiprocessors)
    if not known:
        return ()
    known = tuple(sorted(known, key=lambda c: predict(work, c, dtype, precision, target).us))
    first = known[0]
    others = [replace(first, stages=stages) for stages in (first.stages + 1, first.stages - 1) if stages > 1]
    if work.step in OVER_PIXELS:  # shares of the pixels: each costs a part that is summed up
        shares = [first.split // 2, 2 * first.split]
        fit = [n for n in shares if 1 <= n <= MOST_WGRAD_SPLITS and 2 * n * first.bm <= work.shape.m]
        others += [replace(first, split=n) for n in fit]
    return tuple(dict.fromkeys([*known, *others]))


def chains(work: Work, filters: int, dtype: torch.dtype, precision: str, target: Target, backend: str) -> bool:
    """Whether ``expand`` computes the next block's first 1x1 of so many filters too, instead of a step behind it."""
    if _forced and replace(work, following=filters) in _forced:
        return True
    return _chains(work, filters, dtype, precision, target, backend)


@functools.lru_cache(maxsize=1024)
def _chains(work: Work, filters: int, dtype: torch.dtype, precision: str, target: Target, backend: str) -> bool:
    both = replace(work, following=filters)
    if refusal_of_products(both, dtype, precision, target) is not None:
        return False
    if not target.is_cuda:
        return backend == "triton"
    s = work.shape
    assert s is not None
    behind = Work("conv_stats", ConvShape(s.n, s.p, s.q, s.k, filters), moments=True)
    known = [measured(w, dtype, precision, target) for w in (both, work, behind)]
    found = [(name, entry.batch, min(entry.us, entry.library_us or entry.us)) for name, entry in filter(None, known)]
    if len(found) == 3 and len({(name, batch) for name, batch, _ in found}) == 1:
        together, *apart = (us for *_, us in found)
    else:

        def predicted(w: Work) -> float:
            if not configs_of(w, dtype, precision, target.multiprocessors):
                return library_prediction(w, dtype, precision, target).us
            return predict(w, candidates_of(w, dtype, precision, target)[0], dtype, precision, target).us

        together, *apart = map(predicted, (both, work, behind))
    return together <= sum(apart)


def alone(work: Work, dtype: torch.dtype, precision: str, target: Target, choice: Choice) -> Choice:
    """The library's choice with the time of ``work`` only, which has less to do than what was chosen for."""
    if not target.is_cuda or _unrated(dtype):
        return choice
    theirs = library_prediction(work, dtype, precision, target)
    return replace(choice, predicted_us=theirs.us, measured_us=None, limit=theirs.limit)


def _unrated(dtype: torch.dtype) -> bool:
    return dtype not in (torch.float32, torch.float16, torch.bfloat16)


@functools.lru_cache(maxsize=4096)
def configs_of(work: Work, dtype: torch.dtype, precision: str, multiprocessors: int) -> tuple[ConvConfig, ...]:
    """Tiles of a kernel with products for some work, the heuristic's first; empty where there is none."""
    size, shape = dtype.itemsize, work.shape
    assert shape is not None
    found: list[ConvConfig]
    if work.step == "conv_stats":
        from ..kernels.conv_stats import conv_stats_configs

        found = conv_stats_configs(shape, size, work.prologue, precision, work.residual_stride > 0)
    elif work.step == "dgrad":
        from ..kernels.dgrad_phases import dgrad_configs

        found = dgrad_configs(shape, size, work.backward, precision)
        if work.residual_stride:  # its programs would not fit a multiprocessor twice, and spill where sums are wanted
            found = [config for config in found if config.kernel != "dgrad_rolling"]
    elif work.step == "wgrad":
        from ..kernels.wgrad import wgrad_configs

        found = wgrad_configs(shape, size, work.prologue, work.backward, multiprocessors or 4)
        if work.moments:
            found = [config for config in found if config.kernel != "wgrad_rolling"]
    elif work.step == "gram":
        from ..kernels.wgrad import gram_configs

        found = gram_configs(shape, size, multiprocessors or 4)
    elif work.step == "expand":
        from ..kernels.expand import expand_configs

        found = expand_configs(shape, size, work.project, work.following, precision)
    elif work.step == "gram_dgrad":
        from ..kernels.gram_dgrad import gram_dgrad_configs

        found = gram_dgrad_configs(shape, size)
    else:
        from ..kernels.stem_train import stem_stats_configs, stem_wgrad_configs

        configs = stem_stats_configs if work.step == "stem_conv_stats" else stem_wgrad_configs
        found = configs(shape, size)
    return tuple(found)


# Cost


def predict(
    work: Work, config: ConvConfig | None, dtype: torch.dtype, precision: str, target: Target
) -> cost.Prediction:
    """Prices a kernel of this package."""
    if work.shape is None or config is None:
        return cost.Prediction(hbm=work.moved / target.hbm_tb_s / 1e6)
    size, over_pixels = dtype.itemsize, work.step in OVER_PIXELS
    rows, columns, depth = gemm(work)
    macs = rows * columns * depth + (work.project.macs if work.project is not None else 0)
    macs += rows * columns * work.following
    tile_rows, tile_columns = (config.bn, config.bk) if over_pixels else (config.bm, config.bn)
    tiles = cdiv(rows, tile_rows) * cdiv(columns, tile_columns)
    loaded: float = tiles * depth * (tile_rows * (1 + work.backward) + tile_columns)
    if work.step == "wgrad":  # the taps of a program share a box
        from ..kernels.wgrad import tap_group

        taps = prod(tap_group(work.shape, config))
        loaded = tiles / taps * depth * (tile_rows * (1 + work.backward) * taps + tile_columns)
    waves = 1.0  # programs that share the pixels fill the GPU
    if config.kernel == "wgrad_rolling":  # a row of x once, one of dy three times, two rows more for each program
        from ..kernels.wgrad_rolling import rolling_steps

        steps = rolling_steps(work.shape, config) + 2 * config.split
        loaded = tiles / 9 * steps * config.bm * (3 * tile_rows + tile_columns)
        waves = steps * config.bm / depth
    elif config.kernel.endswith("_rolling"):  # each row three times, weights once, two rows more for each program
        blocks = cdiv(columns, config.bn)
        programs = max(1, 2 * (target.multiprocessors or 4) // blocks)
        steps = programs * (cdiv(rows_of_tiles(config, work.shape), programs) + 2)
        loaded = blocks * config.bk * (3 * steps * config.bm + 9 * programs * config.bn)
        waves = steps * config.bm / rows
    elif not over_pixels:
        waves = cdiv(tiles, target.multiprocessors) * target.multiprocessors / max(1, tiles)
    return cost.Prediction(
        hbm=moved_bytes(work, dtype) / target.hbm_tb_s / 1e6,
        l2=loaded * size / target.l2_tb_s / 1e6,
        tensor=waves * 2 * macs / target.tflops(dtype, precision) / 1e6,
        extra=cost.LAUNCH_US * (1 + over_pixels),
    )


def gemm(work: Work) -> tuple[int, int, int]:
    """Rows, columns and depth of the matrix product that a step is."""
    s = work.shape
    assert s is not None
    if work.step == "dgrad":
        return s.n * s.h * s.w, s.c, cdiv(s.k * s.r * s.s, s.stride * s.stride)
    if work.step == "gram_dgrad":
        return s.m, s.c, s.k + s.c
    if work.step in ("wgrad", "stem_wgrad"):
        return s.k, s.reduction, s.m
    if work.step == "gram":
        return s.c, s.c, s.m
    return s.m, s.k, s.reduction


def moved_bytes(work: Work, dtype: torch.dtype) -> int:
    """Bytes through device memory of a kernel of this package with products, weights included."""
    s, size = work.shape, dtype.itemsize
    assert s is not None
    if work.step == "gram":
        return size * s.pixels_read * s.c
    if work.step == "wgrad":
        return wgrad_bytes(s, size, work.backward) + 4 * s.weights
    if work.step == "stem_wgrad":
        return stem_wgrad_bytes(s, size) + 4 * s.weights
    if work.step == "stem_conv_stats":
        return stem_bytes(s, size) + size * s.weights
    if work.step == "conv_stats":
        return conv_bytes(s, size) + size * (s.weights + s.m * s.k * work.residual_stride)
    if work.step == "gram_dgrad":
        return gram_dgrad_bytes(s, size) + size * s.weights
    if work.step == "dgrad":
        step = work.residual_stride
        added = s.n * cdiv(s.h, step) * cdiv(s.w, step) * s.c if step else 0
        return dgrad_bytes(s, size, work.backward, added, work.moments or step > 0) + size * s.weights
    then = work.following * (s.m + s.k) * size
    return expand_bytes(s, size, work.project) + size * s.weights + then  # expand


def library_prediction(work: Work, dtype: torch.dtype, precision: str, target: Target) -> cost.Prediction:
    """Prices PyTorch's operators for the same work: a convolution, and a pass for everything else."""
    size, s = dtype.itemsize, work.shape
    if s is None:  # a pass: PyTorch reads and writes about once more
        return cost.Prediction(hbm=(work.moved * (1 if work.step == "aten" else 1.5)) / target.hbm_tb_s / 1e6)
    x, y = s.n * s.h * s.w * s.c * size, s.m * s.k * size
    passes, launches = 0, 0
    if work.prologue and work.step in ("conv_stats", "wgrad"):
        passes, launches = passes + 2 * x, launches + 1
    if work.step == "dgrad":
        passes, launches = passes + (3 * x if work.moments else 0), launches + work.moments
        passes, launches = passes + (3 * x if work.residual_stride else 0), launches + (work.residual_stride > 0)
    if work.backward:
        passes, launches = passes + 3 * y, launches + 1
    if work.moments and work.step.endswith("conv_stats"):
        passes, launches = passes + y, launches + 1
    if work.residual_stride and work.step == "conv_stats":
        passes, launches = passes + 3 * y, launches + 1
    behind = passes / target.hbm_tb_s / 1e6 + launches * cost.LAUNCH_US
    return cost.Prediction(
        hbm=(s.bytes_moved(size)) / target.hbm_tb_s / 1e6 + behind,
        tensor=2 * s.macs / target.tflops(dtype, precision) / cost.LIBRARY_EFFICIENCY / 1e6 + behind,
    )


# Bytes of activations through device memory, as ``explain`` counts them


def conv_bytes(shape: ConvShape, itemsize: int) -> int:
    """Of a forward convolution."""
    return itemsize * (shape.pixels_read * shape.c + shape.m * shape.k)


def stem_bytes(shape: ConvShape, itemsize: int) -> int:
    """Of the stem: images in, cells out, pairs of cells in for each half of the output's columns, raw output out."""
    pairs = shape.n * (shape.p + 3) * (shape.q // 2 + 1) * 32
    return stem_wgrad_bytes(shape, itemsize) + itemsize * (2 * pairs - cost.cells_size(shape))


def stem_wgrad_bytes(shape: ConvShape, itemsize: int) -> int:
    """Of the gradient of the stem's weight: images in, cells out and in, the raw output's gradient in."""
    return cost.stem_bytes(shape, itemsize)


def expand_bytes(shape: ConvShape, itemsize: int, project: ConvShape | None) -> int:
    """Of ``expand``, with an identity shortcut or a projected one."""
    added = shape.m * shape.k if project is None else project.pixels_read * project.c
    return itemsize * (shape.m * (shape.c + shape.k) + added)


def wgrad_bytes(shape: ConvShape, itemsize: int, backward: bool) -> int:
    """Of a weight's gradient."""
    return itemsize * (shape.pixels_read * shape.c + shape.m * shape.k * (1 + backward))


def gram_dgrad_bytes(shape: ConvShape, itemsize: int) -> int:
    """Of the Gram form's dgrad."""
    return itemsize * shape.m * (shape.k + 2 * shape.c)


def dgrad_bytes(shape: ConvShape, itemsize: int, backward: bool, added: int, masked: bool) -> int:
    """Of an input's gradient; ``added`` elements of another gradient are read with it."""
    out = shape.n * shape.h * shape.w * shape.c
    return itemsize * (shape.m * shape.k * (1 + backward) + out * (1 + masked) + added)


# Sizes of partial sums


def parts_of(kernel: str, shape: ConvShape, choice: Choice, target: Target, residual_stride: int = 0) -> int:
    """Parts that a kernel with products leaves of its statistics; 1 where the library runs."""
    if not choice.fused:
        return 1
    config, multiprocessors = choice.tiling, target.multiprocessors or 4
    if kernel == "conv_stats":
        from ..kernels.conv_stats import conv_stats_parts

        return conv_stats_parts(shape, config, multiprocessors)
    if kernel == "dgrad":
        from ..kernels.dgrad_phases import dgrad_parts

        return dgrad_parts(shape, config, max(1, residual_stride))
    if kernel == "gram_dgrad":
        from ..kernels.gram_dgrad import gram_dgrad_parts

        return gram_dgrad_parts(shape.m, shape.c, config, multiprocessors)
    from ..kernels.stem_train import stem_stats_parts

    return stem_stats_parts(shape, config)


def parts_of_following(shape: ConvShape, config: ConvConfig, target: Target) -> int:
    """Parts of the statistics of what follows ``expand``: about two a multiprocessor, no more than tiles."""
    return min(2 * (target.multiprocessors or 4), cdiv(shape.m, config.bm))


def rows_of_parts(kernel: str, sizes: Sequence[int], choice: Choice) -> int:
    """Parts that a pass over an ``[N, C, H, W]`` tensor leaves."""
    if not choice.fused:
        return 1
    n, c, h, w = sizes
    if kernel == "moments":
        from ..kernels.moments import moments_parts

        return moments_parts(n * h * w, c)
    if kernel == "masked_sums":
        from ..kernels.train_passes import masked_sums_parts

        return masked_sums_parts(n * h * w, c)
    from ..kernels.bn_relu_pool import bn_relu_pool_parts

    return bn_relu_pool_parts(n, h, w)


CLEARED += [_choose.cache_clear, _chains.cache_clear]

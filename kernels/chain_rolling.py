"""A chain that begins with a 3x3 of stride 1, computed by programs that walk down rows; see ``chain.py``.

    for each row p of TN images x TW columns (BM pixels):
        h[BM, CM]         = relu(bn(conv(t)))                         rows p-1, p, p+1 of t
        for BN of the K expanded channels at a time:
            o[BM, BN]     = relu(bn(h w_expand^T) + shortcut)         shortcut = x, or bn(x w_project^T)
            y             = o                                         stored, never read back
            after[BM, CN] += o w_reduce^T
        t_next            = relu(bn(after))

The 3x3 is that of ``conv_rolling.py``: the nine weights stay in shared memory, an input row is loaded three times, once
a column of the filter, and belongs to three output rows. The lowest of them is then done and goes through the pointwise
part at once. Columns of tiles stand on top of each other there too, cut into strips of equal length.

Pixels are the left operand of every product: ``h`` and ``o`` are in registers already. BN's scale and shift of all
channels are computed once a program and kept one channel a thread; each step picks its own from there. Computed anew in
every step they cost 50 of its 300 instructions and 26 registers.

Machine code for sm_90, bf16, CM = 64, K = 256: instructions of a warp in a row apart from its steps and in one step,
and pressure of a row with all of its steps. None spills, the weights of the 3x3 are loaded before the loop, and two of
the programs of 4 warps fit a multiprocessor:

==================== ======= === ====== ========= ============ === ==== ========
chain                pixels  BN  stages registers shared bytes row step pressure
==================== ======= === ====== ========= ============ === ==== ========
identity -> 64       64      32  3      205       111,696      707 245  1.23
identity -> 64       128     64  4      234       205,912      790 326  0.96
project 64 -> 64     64      32  2      240       103,472      668 266  1.04
project 64 -> 64     128     64  4      255       189,536      841 338  0.82
-> 128, subsampled   128     64  3      255       197,712      815 333  0.80
no reduction         64      32  4      178        98,344      502 204  1.28
no reduction         128     64  4      198       139,304      502 278  0.97
==================== ======= === ====== ========= ============ === ==== ========

Known limit: outside of pipelined loops the compiler waits on the spot for each TMA load, so the three boxes of a row
come one after another while nothing else of the program runs; only the other program on the multiprocessor does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .chain import ChainUnits, Unit
from .config import SHORTEST_STRIP, ConvConfig, count_strips, next_power_of_two
from .epilogue import bn_scale_shift, relu
from .geometry import ChainShape, cdiv
from .launch import count
from .tiles import next_row, strip_origin


@triton.jit
def taps(left, mid, right, w0, w1, w2, acc, PRECISION: tl.constexpr):
    """``acc`` and one row of the filter: pixels ``[BM, C]`` of its three columns times filters ``[K, C]``."""
    acc = tl.dot(left, w0.T, acc, input_precision=PRECISION)
    acc = tl.dot(mid, w1.T, acc, input_precision=PRECISION)
    return tl.dot(right, w2.T, acc, input_precision=PRECISION)


@triton.jit
def normalised(acc, channels, k):
    """BN of the channels ``k`` applied to a product ``[BM, len(k)]``; ``channels``: scale and shift of all of them."""
    scale, shift = channels
    return acc * tl.gather(scale, k, 0)[None, :] + tl.gather(shift, k, 0)[None, :]


@triton.jit(do_not_specialize=["ROWS"])
def chain_rolling(
    t, shortcut, y, t_next, w_conv, w_project, w_expand, w_reduce, bn_conv, bn_project, bn_expand, bn_reduce,
    P, Q, ROWS, K: tl.constexpr, CM: tl.constexpr, CI: tl.constexpr, CN: tl.constexpr,
    SUBSAMPLE: tl.constexpr, PRECISION: tl.constexpr, TN: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of tiles of TN x TW output pixels. Tensors are descriptors; what is absent is None, its size 0.

    ``bn_...`` are tuples ``(bias, gamma, beta, mean, var, eps)``.
    """
    BM: tl.constexpr = TN * TW
    first = tl.program_id(0) * ROWS
    n0, row, q0 = strip_origin(first, P, Q, TN, TW)
    w00, w01, w02 = w_conv.load([0, 0]), w_conv.load([0, CM]), w_conv.load([0, 2 * CM])
    w10, w11, w12 = w_conv.load([0, 3 * CM]), w_conv.load([0, 4 * CM]), w_conv.load([0, 5 * CM])
    w20, w21, w22 = w_conv.load([0, 6 * CM]), w_conv.load([0, 7 * CM]), w_conv.load([0, 8 * CM])
    conv = bn_scale_shift(tl.arange(0, CM), CM, *bn_conv)
    expand = bn_scale_shift(tl.arange(0, K), K, *bn_expand)
    if w_project is not None:
        project = bn_scale_shift(tl.arange(0, K), K, *bn_project)
    if w_reduce is not None:
        reduce = bn_scale_shift(tl.arange(0, CN), CN, *bn_reduce)
    above = tl.zeros((BM, CM), tl.float32)
    here = tl.zeros((BM, CM), tl.float32)
    for step in tl.range(ROWS + 2, num_stages=1):
        left = t.load([n0, row, q0 - 1, 0]).reshape(BM, CM)
        mid = t.load([n0, row, q0, 0]).reshape(BM, CM)
        right = t.load([n0, row, q0 + 1, 0]).reshape(BM, CM)
        done = taps(left, mid, right, w20, w21, w22, above, PRECISION)
        # Adding zero instead of moving registers: the compiler would wait for every single matrix instruction then.
        above = taps(left, mid, right, w10, w11, w12, here, PRECISION) + 0.0
        here = taps(left, mid, right, w00, w01, w02, tl.zeros((BM, CM), tl.float32), PRECISION) + 0.0
        if (step >= 2) & (row > 0):
            p = row - 1
            h = relu(normalised(done, conv, tl.arange(0, CM))).to(t.dtype)
            if w_project is not None:
                x = shortcut.load([n0, p, q0, 0]).reshape(BM, CI)
            if w_reduce is not None:
                after = tl.zeros((BM, CN), tl.float32)
            for k0 in range(0, K, BN):
                k = k0 + tl.arange(0, BN)
                o = tl.dot(h, w_expand.load([k0, 0]).T, input_precision=PRECISION)
                o = normalised(o, expand, k)
                if w_project is not None:
                    projected = tl.dot(x, w_project.load([k0, 0]).T, input_precision=PRECISION)
                    o += normalised(projected, project, k)
                else:
                    o += shortcut.load([n0, p, q0, k0]).reshape(BM, BN).to(tl.float32)
                o = relu(o).to(t.dtype)
                if SUBSAMPLE == 1:
                    y.store([n0, p, q0, k0], o.reshape(TN, 1, TW, BN))
                elif p % 2 == 0:
                    y.store([n0, p // 2, q0 // 2, 0, k0], o.reshape(TN, 1, TW // 2, 2, BN))
                if w_reduce is not None:
                    after = tl.dot(o, w_reduce.load([0, k0]).T, after, input_precision=PRECISION)
            if w_reduce is not None:
                after = relu(normalised(after, reduce, tl.arange(0, CN))).to(t.dtype)
                t_next.store([n0, p, q0, 0], after.reshape(TN, 1, TW, CN))
        n0, row, q0 = next_row(n0, row, q0, P, Q, TN, TW)


#: Multiprocessors of the GPU for which strips are cut: an H100 or H200.
MULTIPROCESSORS = 132
#: Bytes of shared memory on sm_90: of a multiprocessor, whose system keeps 1 KB for each program, and of a program.
SHARED, RESERVED, SHARED_LIMIT = 228 * 1024, 1024, 227 * 1024
#: Pixels of a tile, expanded channels of a step, warps, and the most :func:`values` of a thread that do not spill.
TILES = ((64, 32, 4, 192), (128, 64, 8, 250), (128, 32, 8, 232))


def chain_rolling_configs(shape: ChainShape, itemsize: int) -> list[ConvConfig]:
    """Configurations that do not spill on sm_90 with 16-bit operands: two programs of 4 warps, or one of 8 warps.

    While one of two programs waits for a row, the other computes; one with twice the tile reads weights half as often.
    Strips are as long as one wave of programs allows. Empty for fp32, where :func:`refusal` has a reason, and where
    strips would be so short that the two rows which each computes besides are not worth it.
    """
    e = shape.expand
    configs: list[ConvConfig] = []
    for bm, bn, warps, most in TILES:
        programs = 8 // warps
        boxes = [(bm >> log, 1 << log) for log in range(1, bm.bit_length())]
        tn, tw = min(boxes, key=lambda box: (cdiv(e.n, box[0]) * cdiv(e.q, box[1]), -box[1]))
        rows = cdiv(cdiv(e.n, tn) * cdiv(e.q, tw) * (e.p + 1), MULTIPROCESSORS * programs)
        for stages in (4, 3, 2):
            config = ConvConfig("chain_rolling", (tn, rows, tw), bn, max(16, next_power_of_two(e.c)), warps, stages)
            if refusal(shape, config) or itemsize != 2 or rows < SHORTEST_STRIP or values(config, shape) > most:
                break
            used = chain_rolling_shared_bytes(config, shape, itemsize)
            if used <= SHARED_LIMIT and programs * (used + RESERVED) <= SHARED:
                if warps not in [c.warps for c in configs]:
                    configs.append(config)
                break
    return configs


def refusal(shape: ChainShape, config: ConvConfig) -> str | None:
    """Why a chain cannot be computed with a configuration at all, in words; or None."""
    conv, expand, project, reduce = shape.conv, shape.expand, shape.project, shape.reduce
    if shape.first is not None:
        return f"first must be absent, got {shape.first}"
    if conv is None or (conv.r, conv.s, conv.stride, conv.padding, conv.dilation) != (3, 3, 1, 1, 1):
        return f"conv must be a 3x3 convolution of stride 1, padding 1 and dilation 1, got {conv}"
    if conv.c != conv.k or config.bk != conv.c:
        return f"conv must have bk={config.bk} channels in and out, got {conv}"
    if project is not None and not project.pointwise:
        return f"project must be a 1x1 convolution of stride 1, got {project}"
    sizes = {"conv.c": (conv.c, 64), "expand.k": (expand.k, 256)}
    if project is not None:
        sizes["project.c"] = project.c, 64
    if reduce is not None:
        sizes["reduce.k"] = reduce.k, 128
    for name, (size, most) in sizes.items():
        if size & (size - 1) or not 16 <= size <= most:
            return f"{name} must be a power of two from 16 to {most}, got {size}"
    tn, _, tw = config.box
    if expand.k % config.bn or max(tn, tw) > 256 or tw % shape.subsample:
        return f"bn must divide expand.k and {shape.subsample} the box's columns, up to 256 a side, got {config}"
    return None


def values(config: ConvConfig, shape: ChainShape) -> int:
    """How many registers of a thread operands and accumulators fill, roughly, with 16 pixels a warp."""
    added = config.bn * 5 // 4
    if shape.project is not None:
        added = config.bn * 7 // 4 + shape.project.c // 4
    return config.bk * 5 // 4 + added + (shape.reduce.k * 5 // 8 if shape.reduce else 0)


def chain_rolling_shared_bytes(config: ConvConfig, shape: ChainShape, itemsize: int) -> int:
    """Shared memory of a program in bytes, at least what the compiled one needs."""
    bm, bn, cm = config.bm, config.bn, config.bk
    project, reduce = shape.project, shape.reduce
    filters = cm + (project.c if project else 0) + (reduce.k if reduce else 0)
    boxes = 1 if project else max(2, config.stages)  # of o, and of the shortcut on its way into registers
    step = config.stages * bn * filters + boxes * bm * bn
    row = bm * max(3 * cm, project.c if project else 0, reduce.k if reduce else 0)
    return itemsize * (9 * cm * cm + max(step, row)) + 4 * max(shape.expand.k, 256) + 512


def launch_chain_rolling(
    t: torch.Tensor,
    shortcut: torch.Tensor,
    y: torch.Tensor,
    t_next: torch.Tensor | None,
    units: ChainUnits,
    shape: ChainShape,
    config: ConvConfig,
    precision: str,
) -> None:
    """Launches :func:`chain_rolling`; the arguments are those of :func:`.chain.launch_chain`.

    Raises:
        ValueError: the configuration cannot compute this chain; the message says why.
    """
    if reason := refusal(shape, config):
        raise ValueError(f"{reason}; take a configuration of chain_rolling_configs, or run the convolutions apart")
    expand, project, reduce = shape.expand, shape.project, shape.reduce
    tn, rows, tw = config.box
    box, bn, cm = [tn, 1, tw], config.bn, config.bk
    describe = TensorDescriptor.from_tensor

    def filters(unit: Unit | None, block: list[int]) -> TensorDescriptor | None:
        return None if unit is None else describe(unit.weight.flatten(1), block)

    def vectors(unit: Unit | None) -> tuple | None:
        return None if unit is None else unit.operands.vectors

    if shape.subsample == 1:
        y_box = describe(y, [*box, bn])
    else:  # pairs of columns, of which there is only the first: the TMA drops what lies outside
        image, row, pixel, _ = y.stride()
        y_box = TensorDescriptor(y, [*y.shape[:3], 1, expand.k], [image, row, pixel, pixel, 1], [tn, 1, tw // 2, 2, bn])
    count("chain_rolling")
    chain_rolling[(count_strips(config, expand),)](
        describe(t, [*box, cm]), describe(shortcut, [*box, project.c if project else bn]), y_box,
        describe(t_next, [*box, reduce.k]) if reduce else None,
        filters(units.conv, [cm, cm]), filters(units.project, [bn, project.c if project else 0]),
        filters(units.expand, [bn, cm]), filters(units.reduce, [reduce.k if reduce else 0, bn]),
        vectors(units.conv), vectors(units.project), vectors(units.expand), vectors(units.reduce),
        expand.p, expand.q, rows, K=expand.k, CM=cm, CI=project.c if project else 0, CN=reduce.k if reduce else 0,
        SUBSAMPLE=shape.subsample, PRECISION=precision, TN=tn, TW=tw, BN=bn,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip

"""Runs the residual blocks of a model through the fused ops, leaving the modules as they are.

Three kinds of modules can run fused: a *block* (basic or bottleneck), a *stage* (a sequence of such blocks) and a
*container* (a whole ResNet, or a wrapper that takes features from one). :mod:`.structure` says on every call whether
they may; whatever is not fused runs the module's own forward.

The outermost owner runs its blocks in one loop, in which the next block's first convolution is computed together with
this block's end. It lives in a local variable there: nothing is kept on modules or tensors between calls. What runs of
a stage is remembered beside them, and read anew as soon as anything in it changed (:mod:`.snapshot`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .functional import ConvBN
from .models.blocks import ZeroPad
from .snapshot import Remembered
from .structure import (
    ACTIVATIONS,
    STEMS,
    Converted,
    UnitSpec,
    blocks_of,
    does_nothing,
    frozen_eps,
    has_fusable_unit,
    is_bypassable,
    is_imagenet_conv,
    is_imagenet_pool,
    projection,
    stem_units,
    structural_reason,
    transient_reason,
    uses_batch_statistics,
    why_not_head,
    why_not_shortcut,
    why_not_stem,
    why_not_unit,
)
from .training.modules import run_block as run_training_block
from .training.modules import run_stem as run_training_stem


def unit(conv: Converted, norm: Converted) -> ConvBN:
    """The tensors and geometry of a convolution and its normalisation, as they are now."""
    stride, padding, dilation = conv.stride[0], conv.padding[0], conv.dilation[0]
    if type(norm) is nn.Identity:
        return ConvBN(conv.weight, conv.bias, None, None, None, None, 0.0, stride, padding, dilation)
    eps = norm.eps if type(norm) is nn.BatchNorm2d else frozen_eps(norm)
    return ConvBN(
        conv.weight,
        conv.bias,
        norm.weight,
        norm.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps if eps is None else eps,
        stride,
        padding,
        dilation,
    )


def apply_unit(
    x: Tensor, u: ConvBN, relu: bool = True, residual: Tensor | None = None, slope: Tensor | None = None
) -> Tensor:
    return functional.conv_bn_act(
        x,
        u.weight,
        *u.vectors,
        residual=residual,
        eps=u.eps,
        relu=relu,
        stride=u.stride,
        padding=u.padding,
        dilation=u.dilation,
        slope=slope,
    )


RELU = nn.ReLU()


def apply_modules(
    x: Tensor, conv: Converted, norm: Converted, act: Converted = RELU, residual: Tensor | None = None
) -> Tensor:
    """A convolution, its normalisation by whichever statistics, an addition, and nn.ReLU, nn.PReLU or None.

    Behind batch statistics PReLU is a step of its own.
    """
    u = unit(conv, norm)
    relu, slope = type(act) is nn.ReLU, act.weight if type(act) is nn.PReLU else None
    if uses_batch_statistics(norm):
        y = run_training_block(x, residual, [u], [norm], relu=relu)[0]
        return y if slope is None else act(y)
    return apply_unit(x, u, relu, residual, slope)


# Blocks


class Block(NamedTuple):
    """What runs of a fusable block: its units, and its shortcut: modules ``before``, which run by themselves (average
    pool, zero padding), and behind them a projection.

    ``strided`` is the step at which the shortcut reads the block's input, 1 where the first convolution may not be
    computed ahead of the rest; where that convolution has the same stride, nothing else of the input is read. ``norms``
    are the modules of the normalisations, the projection's last, where one of them has batch statistics, else empty.
    Without ``residual`` nothing is added: the block is a plain one.
    """

    first: ConvBN
    rest: list[ConvBN]
    before: tuple[nn.Module, ...]
    project: ConvBN | None
    strided: int
    norms: tuple[nn.Module, ...] = ()
    residual: bool = True


def _read(block: Converted) -> Block:
    spec = block._resnet_triton.spec
    pairs = [u.read(block)[:2] for u in spec.units]
    first, *rest = [unit(*pair) for pair in pairs]
    norms = [norm for _, norm in pairs]
    shortcut = spec.shortcut_of(block)
    parts = projection(shortcut)
    if parts is None:
        before = (shortcut,) if type(shortcut) is ZeroPad else ()
        return Block(first, rest, before, None, 1, _if_training(norms), spec.shortcut is not None)
    project = unit(parts.conv, parts.norm)
    norms.append(parts.norm)
    plain = len(parts.before) == 0 and len(rest) == 2 and first.stride in (1, project.stride)
    pointwise = all(u.weight.shape[2:] == (1, 1) and u.padding == 0 for u in (first, project))
    strided = project.stride if plain and pointwise else 1
    return Block(first, rest, parts.before, project, strided, _if_training(norms))


def _if_training(norms: list[nn.Module]) -> tuple[nn.Module, ...]:
    for norm in norms:
        if uses_batch_statistics(norm):
            return tuple(norms)
    return ()


def _read_stage(stage: Converted) -> list[Block] | None:
    """The blocks of a stage if all of them run fused without being called, else None."""
    blocks = blocks_of(stage)
    if blocks is None or any(block._resnet_triton.spec.lead for block in blocks):  # see .preact
        return None
    return [_read(block) for block in blocks]


_stage_blocks = Remembered(_read_stage)


def run_blocks(blocks: Sequence[Block], x: Tensor, pool: bool = False) -> Tensor:
    """Runs blocks one after another; bottlenecks hand their first convolution to the block before them.

    Between two stages the block before stores only the pixels that the projection shortcut reads, unless gradients may
    be needed. With ``pool``, only the average of the last output over the image is returned, ``[N, C, 1, 1]``, where
    the last block's statistics are constant.
    """
    t = ahead = None
    inference = not torch.is_grad_enabled()
    step = 1  # at which the block before stored x
    for i, (first, rest, before, project, _, norms, residual) in enumerate(blocks):
        last = i + 1 == len(blocks)
        shortcut: Any = x if residual else None
        for m in before:
            shortcut = m(shortcut)
        if norms:
            before_it, after_it = blocks[i - 1] if i > 0 else None, None if last else blocks[i + 1]
            x, ahead = _train_block(before_it, blocks[i], after_it, x, shortcut, ahead)
            continue
        if not residual:
            for u in (first, *rest):
                x = apply_unit(x, u)
            continue
        if project is not None and step > 1:
            first, project = first._replace(stride=1), project._replace(stride=1)
        following, step = None, 1
        if not last and len(blocks[i + 1].rest) == 2 and blocks[i + 1].residual and not blocks[i + 1].norms:
            following, step = blocks[i + 1].first, blocks[i + 1].strided if inference else 1
            if following.stride > 1 and step > 1:  # it reads what is stored, and no other pixel
                following = None
        then: dict[str, Any] = {"downsample": project, "next": following, "subsample": step, "pool": pool and last}
        if t is None and len(rest) == 2 and len(before) == 0:
            x, t = functional.block_and_next(x, first, *rest, **then)
        else:
            x, t = functional.block_tail(apply_unit(x, first) if t is None else t, shortcut, *rest, **then)
    return x


def _train_block(
    previous: Block | None, block: Block, following: Block | None, x: Tensor, shortcut: Any, ahead: Any
) -> tuple[Tensor, Any]:
    """A block with batch statistics: its output, and what it computes of the following one, for ``ahead``.

    What goes back to a block from the next one is already zero where that block's ReLU was.
    """
    units = [block.first, *block.rest]
    if block.project is not None:
        units.append(block.project)
    masked = following is not None and _masks(following)
    upcoming = (following.first, following.norms[0]) if following is not None and masked else None
    return run_training_block(
        x, shortcut, units, block.norms, block.project is not None, masked_grad=masked,
        mask_input=previous is not None and len(previous.norms) > 0 and _masks(block), ahead=ahead, following=upcoming,
    )  # fmt: skip


def _masks(block: Block) -> bool:
    """Whether the gradient of a block's input can come masked by that input's ReLU: nothing else reads the input."""
    return len(block.norms) > 0 and len(block.before) == 0


def run_block(block: Converted, x: Tensor) -> Tensor:
    """A converted block's forward: fused as a whole, or unit by unit, or its own."""
    spec = block._resnet_triton.spec
    if transient_reason(block, spec) is not None:
        return block._eager(x)
    if structural_reason(block, spec) is None:
        return run_blocks([_read(block)], x)
    return _run_units(block, x) if has_fusable_unit(block, spec) else block._eager(x)


def _run_units(block: Converted, x: Tensor) -> Tensor:
    """Runs what can be fused of a block that holds other things too: grouped convolutions, attention, SiLU."""
    spec = block._resnet_triton.spec
    t = x
    for u in spec.units[:-1]:
        t = _run_unit(u, block, t)
    shortcut = None if spec.shortcut is None else _run_shortcut(block, x)
    last = spec.units[-1]
    conv, norm, *then = last.read(block)
    activation = getattr(block, spec.activation)
    relu, fused = type(activation) is nn.ReLU, type(activation) in ACTIVATIONS
    rest = [m for m in (*then, *(getattr(block, name) for name in spec.branch)) if not does_nothing(m)]
    fusable = why_not_unit(last, conv, norm) is None
    if fusable and not rest:
        y = apply_modules(t, conv, norm, activation if fused else None, shortcut)
        return y if fused else activation(y)
    y = apply_modules(t, conv, norm, None) if fusable else norm(conv(t))
    for m in rest:
        y = m(y)
    if shortcut is None:
        return activation(y)
    return functional.add_relu(y, shortcut) if relu else activation(y + shortcut)


def _run_unit(spec: UnitSpec, block: Converted, x: Tensor) -> Tensor:
    """One convolution, BN, and what follows it; ReLU or PReLU goes into the kernel where it comes first."""
    conv, norm, *then = spec.read(block)
    then = [m for m in then if not does_nothing(m)]
    if why_not_unit(spec, conv, norm) is None:
        fused = len(then) > 0 and type(then[0]) in ACTIVATIONS
        x = apply_modules(x, conv, norm, then[0] if fused else None)
        then = then[fused:]
    else:
        x = norm(conv(x))
    for m in then:
        x = m(x)
    return x


def _run_shortcut(block: Converted, x: Tensor) -> Tensor:
    spec = block._resnet_triton.spec
    shortcut = spec.shortcut_of(block)
    if type(shortcut) is ZeroPad or why_not_shortcut(shortcut, spec.shortcut) is not None:
        return shortcut(x)
    parts = projection(shortcut)
    if parts is None:
        return x
    for m in parts.before:
        x = m(x)
    return apply_modules(x, parts.conv, parts.norm, None)


# Stages and containers


def run_stage(stage: Converted, x: Tensor) -> Tensor | None:
    """A converted stage's forward where all of its blocks run fused, else None."""
    blocks = _stage_blocks(stage)
    return None if blocks is None else run_blocks(blocks, x)


def run_stem(conv: Converted, norm: Converted, act: Converted, x: Tensor, pool: Converted = None) -> Tensor:
    """A fusable entrance (:func:`.structure.why_not_stem` is None); with ``pool``, the max-pool behind it too.

    The deep stems of timm are several convolutions.
    """
    units = stem_units(conv, norm, act)
    assert units is not None
    *first, (conv, norm, act) = units
    for before in first:
        x = apply_modules(x, *before)
    if is_imagenet_conv(conv):
        u = unit(conv, norm)
        fused_pool = pool is not None and is_imagenet_pool(pool)
        if not uses_batch_statistics(norm):
            x = functional.stem(x, u.weight, *u.vectors, eps=u.eps, pool=fused_pool)
            return x if fused_pool or pool is None else pool(x)
        if fused_pool:
            return run_training_stem(x, u, norm)
    x = apply_modules(x, conv, norm, act)
    return x if pool is None else pool(x)


def run_trunk(
    children: Sequence[tuple[str, Converted]], x: Tensor, taps: Iterable[str] = (), pool: bool = False
) -> dict[str, Tensor]:
    """Runs a ResNet's named children one after another, fusing the stem and whole runs of stages between taps.

    Args:
        children: ``(name, module)`` in order, e.g. conv1, bn1, relu, maxpool, layer1 ...
        x: images ``[N, C, H, W]``.
        taps: names whose output the caller wants.
        pool: the average of the last output over the image will do; it is taken where the last child runs fused.

    Returns:
        The output of each tapped child in order, and of the last child under ``""`` (``[N, C, 1, 1]`` if pooled).
    """
    outputs: dict[str, Tensor] = {}
    names = tuple(name for name, _ in children)
    modules = [m for _, m in children]
    i = 0
    if names[:3] in STEMS and not any(name in taps for name in names[:2]):
        conv, norm, act = modules[:3]
        if x.is_floating_point() and why_not_stem(conv, norm, act) is None:
            pooled = names[3:4] == ("maxpool",) and names[2] not in taps
            x = run_stem(conv, norm, act, x, modules[3] if pooled else None)
            i = 4 if pooled else 3
            if names[i - 1] in taps:
                outputs[names[i - 1]] = x
    pending: list[Block] = []  # fused blocks not run yet: no tap has asked for what they compute
    while i < len(children):
        name, m = names[i], modules[i]
        marked = getattr(type(m), "_resnet_triton", None)
        blocks = _stage_blocks(m) if marked is not None and marked.kind == "stage" and is_bypassable(m) else None
        if blocks is None:
            x = m(run_blocks(pending, x))
            pending = []
        else:
            pending = pending + blocks
        if name in taps:
            x = run_blocks(pending, x)
            pending = []
            outputs[name] = x
        i += 1
    outputs[""] = run_blocks(pending, x, pool)
    return outputs


def trunk_of(model: Converted) -> list[tuple[str, Converted]]:
    """The children of a converted network up to its pool, by name, as :func:`run_trunk` takes them."""
    return [(name, getattr(model, name)) for name in model._resnet_triton.spec.children]


def run_resnet(model: Converted, x: Tensor) -> Tensor:
    """The forward of a converted ResNet: trunk, global average pool, fully connected layer."""
    if "_forward_impl" in model.__dict__:  # replaced on the instance
        return model._eager(x)
    return run_classifier(model, trunk_of(model), x)


def run_classifier(model: Converted, children: Sequence[tuple[str, Converted]], x: Tensor) -> Tensor:
    """The last children of a ResNet of torchvision or this package, global average pool and fully connected layer."""
    if why_not_head(model) is not None:
        return model.fc(torch.flatten(model.avgpool(run_trunk(children, x)[""]), 1))
    x = run_trunk(children, x, pool=not torch.is_grad_enabled())[""]
    return functional.head(x, model.fc.weight, model.fc.bias)


def run_layer_getter(getter: Converted, x: Tensor) -> dict[str, Tensor]:
    """The forward of torchvision's IntermediateLayerGetter, and ``_collect`` of timm's feature networks."""
    taps = getter.return_layers
    outputs = run_trunk(list(getter.items()), x, tuple(taps))
    return OrderedDict((taps[name], output) for name, output in outputs.items() if name)


def run_timm_features(model: Converted, x: Tensor) -> Tensor:
    """``forward_features`` of a converted timm ResNet."""
    return run_trunk(trunk_of(model), x)[""]


def run_timm_head(model: Converted, x: Tensor) -> Tensor:
    """``forward_head`` of a converted timm ResNet whose head is fusable."""
    return functional.head(x, model.fc.weight, model.fc.bias)


def run_smp_encoder(encoder: Converted, x: Tensor) -> list[Tensor]:
    """The forward of a converted segmentation_models_pytorch ResNet encoder: the input and a feature map per depth."""
    taps = ("relu", "layer1", "layer2", "layer3", "layer4")[: encoder._depth]
    children = trunk_of(encoder)
    ends = [0] + [i + 1 for i, (name, _) in enumerate(children) if name in taps]
    outputs = run_trunk(children[: ends[-1]], x, taps)
    return [x, *(outputs[name] for name in taps)]


def run_box_head(head: Converted, x: Tensor) -> Tensor:
    """The forward of a C4 detector's head: its stage, and the average over each region."""
    y = run_trunk([("layer4", head.layer4)], x, pool=not torch.is_grad_enabled())[""]
    return torch.flatten(y, 1) if y.shape[2:] == (1, 1) else y.mean((2, 3))


def run_hf_embeddings(embeddings: Converted, x: Tensor) -> Tensor:
    """The forward of Hugging Face's ResNet stem."""
    layer = embeddings.embedder
    parts = (layer.convolution, layer.normalization, layer.activation)
    fusable = x.is_floating_point() and x.shape[1] == embeddings.num_channels
    if not fusable or not is_bypassable(layer) or why_not_stem(*parts) is not None:
        return embeddings._eager(x)
    return run_stem(*parts, x, embeddings.pooler)


def run_hf_encoder(encoder: Converted, x: Tensor, all_hidden: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Last output, and if asked the input and every stage's output, of Hugging Face's ResNet encoder."""
    stages = list(encoder.stages.named_children())
    taps = tuple(name for name, _ in stages) if all_hidden else ()
    outputs = run_trunk(stages, x, taps)
    return outputs[""], (x, *(outputs[name] for name in taps)) if all_hidden else None

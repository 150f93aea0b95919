"""What of a residual network can run fused: how known modules are built, and why a given one cannot.

Fused is only what is exactly known, and that is checked on every call, because attributes, hooks and modes change.
Every check returns a reason in words, or None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as torch_module

from . import backend
from .models.blocks import ZeroPad

# Converted modules and their children: attributes that only a spec knows, so nothing for a type checker to see.
Converted = Any


def child(m: Converted, path: str) -> Converted:
    """A module below ``m`` by its dotted path; Dynamo can trace it."""
    if "." not in path:
        return getattr(m, path)
    for name in path.split("."):
        m = getattr(m, name)
    return m


#: Stands where a convolution has no normalisation behind it.
NO_NORM = nn.Identity()
#: What can follow a convolution in its kernel; whole blocks take nn.ReLU alone.
ACTIVATIONS = (nn.ReLU, nn.PReLU)


@dataclass(frozen=True)
class UnitSpec:
    """Attribute paths of a convolution, its normalisation (``""``: none), and the modules that follow them in order."""

    conv: str
    norm: str
    then: tuple[str, ...] = ()

    def read(self, block: Converted) -> list[Converted]:
        """Convolution, normalisation and the modules behind them of a block."""
        norm = child(block, self.norm) if self.norm else NO_NORM
        return [child(block, self.conv), norm, *(child(block, path) for path in self.then)]


@dataclass(frozen=True)
class BlockSpec:
    """Attribute paths of a residual block, ``activation(branch(units(x)) + shortcut(x))``.

    Args:
        units: of the main path, in order.
        activation: after the addition.
        shortcut: attribute of the shortcut, which is None or an Identity, a projection, or zero padding; None where
            nothing is added: the block is a plain one.
        branch: modules between the last unit and the addition.
        owners: modules that only group the others; they are not called when a block runs fused.
        lead: of a pre-activation block, the attribute of the BN in front, or of None; a ReLU follows it, and none the
            addition. See :mod:`.preact`.
    """

    units: tuple[UnitSpec, ...]
    activation: str = "relu"
    shortcut: str | None = "downsample"
    branch: tuple[str, ...] = ()
    owners: tuple[str, ...] = ()
    lead: str = ""

    def leads(self, block: Converted) -> list[Converted]:
        """The BN in front of a block, if there is one."""
        norm = getattr(block, self.lead) if self.lead else None
        return [] if norm is None else [norm]

    def shortcut_of(self, block: Converted) -> Converted:
        """The shortcut of a block."""
        return None if self.shortcut is None else getattr(block, self.shortcut)


#: torchvision's BasicConv2d, of GoogLeNet and Inception.
BASIC_CONV = UnitSpec("conv", "bn")
BASIC = BlockSpec((UnitSpec("conv1", "bn1", ("relu",)), UnitSpec("conv2", "bn2")))
PLAIN = replace(BASIC, shortcut=None)
BOTTLENECK = BlockSpec(
    (UnitSpec("conv1", "bn1", ("relu",)), UnitSpec("conv2", "bn2", ("relu",)), UnitSpec("conv3", "bn3"))
)
PREACT_BASIC = BlockSpec((UnitSpec("conv1", "bn2", ("relu",)), UnitSpec("conv2", "")), lead="bn1")
PREACT_BOTTLENECK = BlockSpec(
    (UnitSpec("conv1", "bn2", ("relu",)), UnitSpec("conv2", "bn3", ("relu",)), UnitSpec("conv3", "")), lead="bn1"
)
TIMM_BASIC = BlockSpec(
    (UnitSpec("conv1", "bn1", ("drop_block", "act1", "aa")), UnitSpec("conv2", "bn2")),
    activation="act2",
    branch=("se", "drop_path"),
)
TIMM_BOTTLENECK = BlockSpec(
    (
        UnitSpec("conv1", "bn1", ("act1",)),
        UnitSpec("conv2", "bn2", ("drop_block", "act2", "aa")),
        UnitSpec("conv3", "bn3"),
    ),
    activation="act3",
    branch=("se", "drop_path"),
)


def _hugging_face(units: int) -> BlockSpec:
    layers = tuple(f"layer.{i}" for i in range(units))
    return BlockSpec(
        tuple(UnitSpec(f"{m}.convolution", f"{m}.normalization", (f"{m}.activation",)) for m in layers),
        activation="activation",
        shortcut="shortcut",
        owners=("layer", *layers),
    )


HF_BASIC = _hugging_face(2)
HF_BOTTLENECK = _hugging_face(3)


@dataclass(frozen=True)
class TrunkSpec:
    """Children of a whole network: those up to the global average pool, in the order of its forward, and the pool."""

    children: tuple[str, ...]
    pool: str = "avgpool"


_STAGES = ("layer1", "layer2", "layer3", "layer4")
IMAGENET = TrunkSpec(("conv1", "bn1", "relu", "maxpool", *_STAGES))
TIMM = TrunkSpec(("conv1", "bn1", "act1", "maxpool", *_STAGES), pool="global_pool")
CIFAR = TrunkSpec(("conv1", "bn1", "relu", *_STAGES[:3]))
PREACT_CIFAR = TrunkSpec(("conv1", *_STAGES[:3]))
#: Names of convolution, normalisation and activation at a network's entrance.
STEMS = (IMAGENET.children[:3], TIMM.children[:3])


# Convolutions and normalisations


def why_not_conv(conv: Converted) -> str | None:
    """Why a convolution cannot run fused, or None."""
    if type(conv) is not nn.Conv2d:
        return f"is {type(conv).__name__}, not nn.Conv2d"
    if conv.groups != 1:
        return f"has groups={conv.groups}; fused blocks support groups=1"
    if conv.padding_mode != "zeros":
        return f"has padding_mode={conv.padding_mode!r}; fused blocks pad with zeros"
    for name, pair in (("stride", conv.stride), ("padding", conv.padding), ("dilation", conv.dilation)):
        if isinstance(pair, str) or pair[0] != pair[1]:
            return f"has {name}={pair!r}; fused blocks need one number for both directions"
    return None


def why_not_norm(norm: Converted) -> str | None:
    """Why a normalisation cannot run fused whatever the mode, or None."""
    if type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return None
    if type(norm) is nn.Identity or frozen_eps(norm) is not None:
        return None
    return f"is {type(norm).__name__}; fused blocks take BatchNorm2d, FrozenBatchNorm2d, or Identity after folding"


def frozen_eps(norm: Converted) -> float | None:
    """Epsilon of a BN with constant statistics (told by name: its library stays optional), else None.

    torchvision's and detectron2's carry ``eps``; Hugging Face's detectors compute with 1e-5.
    """
    cls = type(norm)
    library = cls.__module__.partition(".")[0]
    if cls.__name__ == "FrozenBatchNorm2d" and library in ("torchvision", "detectron2"):
        return norm.eps
    if cls.__name__.endswith("FrozenBatchNorm2d") and library == "transformers":
        return 1e-5
    return None


def eps_of(norm: Converted) -> float:
    """Epsilon of a BN that may run fused."""
    eps = frozen_eps(norm)
    return norm.eps if eps is None else eps


def does_nothing(m: Converted) -> bool:
    """Whether a module between convolutions returns its input: absent, Identity, or regularisation that is off."""
    if m is None or type(m) is nn.Identity:
        return True
    cls = type(m)
    return not m.training and cls.__name__ in ("DropPath", "DropBlock2d") and cls.__module__.startswith("timm.layers.")


# Blocks


class Projection(NamedTuple):
    """A projection shortcut: what comes before its convolution (an average pool), and where its unit sits."""

    before: tuple[nn.Module, ...]
    owner: Converted
    conv_name: str
    norm_name: str

    @property
    def conv(self) -> Converted:
        """The convolution."""
        return getattr(self.owner, self.conv_name)

    @property
    def norm(self) -> Converted:
        """The normalisation behind it."""
        return getattr(self.owner, self.norm_name)


def projection(shortcut: Converted) -> Projection | None:
    """The parts of a projection shortcut, else None. Ask :func:`why_not_shortcut` first."""
    if shortcut is None or type(shortcut) in (nn.Identity, ZeroPad):
        return None
    before: tuple[nn.Module, ...] = ()
    owner: Converted = shortcut
    names: tuple[str, ...] = ("convolution", "normalization")
    if type(shortcut) is nn.Sequential:
        *first, last = shortcut._modules.values()
        if _is_hugging_face(last, SHORTCUTS):
            before, owner = tuple(first), last
        else:
            before, names = tuple(first[:-1]), tuple(shortcut._modules)[-2:]
    return Projection(tuple(m for m in before if not does_nothing(m)), owner, *names)


def why_not_shortcut(shortcut: Converted, name: str | None) -> str | None:
    """Why a shortcut cannot run fused, or None."""
    if shortcut is None or type(shortcut) in (nn.Identity, ZeroPad):
        return None
    if type(shortcut) is not nn.Sequential and not _is_hugging_face(shortcut, SHORTCUTS):
        return f"{name} is not nn.Sequential(convolution, normalisation)"
    if type(shortcut) is nn.Sequential and len(shortcut) < 2:
        return f"{name} is nn.Sequential of {len(shortcut)} modules, not of convolution and normalisation"
    parts = projection(shortcut)
    assert parts is not None
    if not all(type(m) is nn.AvgPool2d for m in parts.before):
        return f"{name} is not nn.Sequential(convolution, normalisation), nor the same behind nn.AvgPool2d"
    if reason := why_not_conv(parts.conv):
        return f"{name}.{parts.conv_name} {reason}"
    if reason := why_not_norm(parts.norm):
        return f"{name}.{parts.norm_name} {reason}"
    return None


#: Classes of Hugging Face's that group a shortcut's, and a unit's, convolution and normalisation.
SHORTCUTS = ("ResNetShortCut", "RTDetrResNetShortCut")
LAYERS = ("ResNetConvLayer", "RTDetrResNetConvLayer")


def _is_hugging_face(m: nn.Module, names: tuple[str, ...]) -> bool:
    cls = type(m)
    return cls.__name__ in names and cls.__module__.startswith("transformers.")


def why_not_unit(spec: UnitSpec, conv: nn.Module, norm: nn.Module) -> str | None:
    """Why a convolution and its normalisation cannot run in one kernel, or None."""
    if reason := why_not_conv(conv):
        return f"{spec.conv} {reason}"
    if reason := why_not_norm(norm):
        return f"{spec.norm} {reason}"
    return None


def structural_reason(block: Converted, spec: BlockSpec) -> str | None:
    """Why a block can never run fused as a whole as it is built, or None."""
    for norm in spec.leads(block):
        if reason := "is Identity" if type(norm) is nn.Identity else why_not_norm(norm):
            return f"{spec.lead} {reason}"
    for i, u in enumerate(spec.units):
        conv, norm, *then = u.read(block)
        if reason := why_not_unit(u, conv, norm):
            return reason
        active = [(name, m) for name, m in zip(u.then, then, strict=True) if not does_nothing(m)]
        if i + 1 < len(spec.units):  # the last unit's ReLU comes after the addition
            if not active:
                return f"{u.conv} is not followed by an activation; fused blocks apply nn.ReLU"
            if type(active[0][1]) is nn.ReLU:
                del active[0]
        if active:
            name, m = active[0]
            return f"{name} is {type(m).__name__}; fused blocks apply nn.ReLU"
    for name in spec.branch:
        m = getattr(block, name)
        if not does_nothing(m):
            return f"{name} is {type(m).__name__} between the last BN and the addition"
    activation = getattr(block, spec.activation)
    if type(activation) is not nn.ReLU:
        return f"{spec.activation} is {type(activation).__name__}; fused blocks apply nn.ReLU"
    return why_not_shortcut(spec.shortcut_of(block), spec.shortcut) or _why_not_together(block, spec)


def _why_not_together(block: Converted, spec: BlockSpec) -> str | None:
    """Why BN of a block that can each run fused cannot in one operator, or None."""
    norms = [*spec.leads(block), *(u.read(block)[1] for u in spec.units)]
    parts = projection(spec.shortcut_of(block))
    if parts is not None:
        norms.append(parts.norm)
    first = None
    for norm in norms:
        if not uses_batch_statistics(norm):
            continue
        if first is None:
            first = norm
        elif type(norm) is not type(first) or getattr(norm, "process_group", None) is not getattr(
            first, "process_group", None
        ):
            return "its BN share their batch statistics with different process groups"
    return None


def transient_reason(block: Converted, spec: BlockSpec) -> str | None:
    """What about hooks, patches and the mode keeps a block from running other than by its own forward now, or None."""
    if "forward" in block.__dict__:
        return "its forward was replaced on the instance"
    modules = [getattr(block, spec.activation), *spec.leads(block)]
    for norm in spec.leads(block):
        check_not_sharded(norm, spec.lead, block)
    for u in spec.units:
        parts = u.read(block)
        check_not_sharded(parts[1], u.norm, block)
        modules += parts
    for name in spec.owners:
        owner = child(block, name)
        if type(owner) is not nn.Sequential and not _is_hugging_face(owner, LAYERS):
            return f"{name} is {type(owner).__name__}"
        modules.append(owner)
    shortcut = spec.shortcut_of(block)
    if shortcut is not None:
        for name, m in shortcut.named_modules():
            check_not_sharded(m, f"{spec.shortcut}.{name}", block)
            modules.append(m)
    return why_not_now(modules)


def check_not_sharded(norm: Converted, name: str, block: Converted) -> None:
    """Raises NotImplementedError where FSDP2 shards a BN of a block by itself: then nothing could be fused silently."""
    if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) and is_hooked(norm):
        for cls in type(norm).__mro__:
            if cls.__name__ == "FSDPModule" and cls.__module__.startswith("torch.distributed."):
                kind = block._resnet_triton.base.__name__
                raise NotImplementedError(
                    f"{name} of a {kind} is sharded by itself, so that its parameters are not there when the block "
                    f"runs fused; shard the block instead (fully_shard(block)), or call unconvert on this block"
                )


def why_not_block(block: Converted) -> str | None:
    """Why a converted block does not run fused as a whole now, or None when it does."""
    spec = block._resnet_triton.spec
    return transient_reason(block, spec) or structural_reason(block, spec)


def partial_reasons(block: Converted) -> dict[str, str]:
    """Why parts of a converted block run on PyTorch's modules while its other convolutions are fused, by child."""
    spec = block._resnet_triton.spec
    reasons: dict[str, str] = {}
    for u in spec.units:
        conv, norm, *_ = u.read(block)
        if reason := why_not_unit(u, conv, norm):
            reasons |= dict.fromkeys((u.conv, u.norm), reason)
    for name in (n for u in spec.units for n in u.then):
        m = child(block, name)
        if type(m) not in ACTIVATIONS and not does_nothing(m):
            reasons[name] = f"{name} is {type(m).__name__}"
    for name in spec.branch:
        m = getattr(block, name)
        if not does_nothing(m):
            reasons[name] = f"{name} is {type(m).__name__} between the last BN and the addition"
    shortcut = spec.shortcut_of(block)
    if spec.shortcut is not None and (reason := beside(shortcut) or why_not_shortcut(shortcut, spec.shortcut)):
        reasons[spec.shortcut] = reason
    return reasons


def beside(shortcut: Converted) -> str | None:
    """Why a shortcut is a step of its own in a block that runs fused, or None."""
    if type(shortcut) is ZeroPad:
        return "zero padding is a pass of its own; the block's last kernel adds what it gives"
    return None


def has_fusable_unit(block: Converted, spec: BlockSpec) -> bool:
    """Whether any convolution of the main path can run fused in a block that cannot as a whole."""
    return not spec.lead and any(why_not_unit(u, *u.read(block)[:2]) is None for u in spec.units)


# Hooks, patches, modes


def why_not_now(modules: Iterable[Converted]) -> str | None:
    """What about hooks, patches and the mode of these modules keeps them from being bypassed now, or None."""
    for m in modules:
        if m is None:
            continue
        if is_hooked(m):
            return f"a hook is registered on a {type(m).__name__}"
        if "forward" in m.__dict__:
            return f"the forward of a {type(m).__name__} was replaced on the instance"
        if uses_batch_statistics(m) and (reason := why_not_training(m)):
            return reason
        weight = m._parameters.get("weight")
        if hasattr(weight, "__tensor_flatten__"):  # torchao's and DTensor know PyTorch's operators only
            return f"the weight of a {type(m).__name__} is a {type(weight).__name__}"
    if torch_module._has_any_global_hook():
        return "a global module hook is registered"
    return None


def uses_batch_statistics(m: Converted) -> bool:
    """Whether a module is a BatchNorm that normalises by the statistics of the batch."""
    return isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) and (m.training or m.running_mean is None)


def why_not_training(norm: Converted) -> str | None:
    """Why batch statistics run on PyTorch's modules now, or None.

    On a CPU nothing is gained in time; where less memory is asked for, or a GPU is planned for, they run fused.
    """
    if backend.current_backend() == "cudnn":
        return "use_backend('cudnn'): batch statistics run on PyTorch's modules"
    if backend.memory() != "auto" or backend.current_backend() == "triton" or backend.planning_cuda():
        return None
    for t in (norm.weight, norm.running_mean):
        if t is not None and t.is_cuda:
            return None
    return "batch statistics on a CPU run on PyTorch's modules; use_backend('auto', memory='gram') keeps less in memory"


def is_hooked(m: nn.Module) -> bool:
    """Whether calling this module would run hooks."""
    return bool(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)


def is_bypassable(m: nn.Module) -> bool:
    """Whether an owner may run a fused child without calling it."""
    return not is_hooked(m) and "forward" not in m.__dict__


# Stages, stems, heads


def blocks_of(stage: Converted) -> list[Converted] | None:
    """The blocks of a converted stage if all of them run fused without being called, else None."""
    path = stage._resnet_triton.spec  # of the Sequential that holds them, if it is not the stage itself
    blocks = list((getattr(stage, path) if path else stage)._modules.values())  # children() names none twice
    for block in blocks:
        marker = getattr(block, "_resnet_triton", None)
        if marker is None or marker.kind != "block" or not is_bypassable(block) or why_not_block(block) is not None:
            return None
    return blocks


def why_not_stage(stage: Converted) -> str | None:
    """Why a converted stage calls its blocks one by one now, or None."""
    return "one of its blocks is hooked or not fused" if blocks_of(stage) is None else None


def stem_units(conv: Converted, norm: Converted, act: Converted) -> list[tuple[Converted, Converted, Converted]] | None:
    """``(convolution, BN, ReLU)`` triples of a stem in order; the convolution may be a Sequential of such triples and
    one more convolution (timm's deep stems). None where it is built otherwise."""
    parts: Sequence[nn.Module] = [conv, norm, act]
    if type(conv) is nn.Sequential:
        parts = [*conv._modules.values(), norm, act]
    if len(parts) % 3:
        return None
    return [(parts[i], parts[i + 1], parts[i + 2]) for i in range(0, len(parts), 3)]


def why_not_stem(conv: nn.Module, norm: nn.Module, act: nn.Module) -> str | None:
    """Why the convolutions, BNs and ReLUs at a network's entrance do not run fused now, or None."""
    units = stem_units(conv, norm, act)
    if units is None:
        return f"conv1 is {type(conv).__name__}, not nn.Conv2d nor a Sequential of convolution, BN, ReLU"
    for c, n, a in units:
        if reason := why_not_conv(c):
            return f"conv1 {reason}"
        if reason := why_not_norm(n):
            return f"bn1 {reason}"
        if type(a) is not nn.ReLU:
            return f"relu is {type(a).__name__}; the fused stem applies nn.ReLU"
    grouping = [conv] if len(units) > 1 else []
    return why_not_now([*grouping, *(m for triple in units for m in triple)])


def is_imagenet_conv(conv: Converted) -> bool:
    """Whether a fusable convolution is the 7x7/2 one of the ImageNet stem."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.in_channels)
    return sizes == ((7, 7), (2, 2), (3, 3), (1, 1), 3)


def is_imagenet_stem(conv: Converted) -> bool:
    """Whether a stem's convolution is the ImageNet one, which can be computed together with the max-pool behind it."""
    return type(conv) is nn.Conv2d and is_imagenet_conv(conv)


def is_imagenet_pool(pool: Converted) -> bool:
    """Whether this is the ImageNet stem's 3x3/2 max-pool, and may be bypassed."""
    return type(pool) is nn.MaxPool2d and why_not_pool(pool) is None


def why_not_pool(pool: Converted) -> str | None:
    """Why a max-pool is not computed with the ImageNet stem in front of it, or None."""
    if (pool.kernel_size, pool.stride, pool.padding, pool.dilation) != (3, 2, 1, 1) or pool.ceil_mode:
        return (
            f"maxpool has kernel_size={pool.kernel_size}, stride={pool.stride}, padding={pool.padding}, "
            f"ceil_mode={pool.ceil_mode}; the fused stem pools 3x3 windows at stride 2 with padding 1"
        )
    return "maxpool has return_indices=True" if pool.return_indices else why_not_now((pool,))


def why_not_head(model: Converted) -> str | None:
    """Why pooling and classifier of a ResNet do not run fused now, or None."""
    name = model._resnet_triton.spec.pool
    pool, fc = getattr(model, name), model.fc
    inner = pool
    if name == "global_pool":  # timm's SelectAdaptivePool2d
        if getattr(pool, "pool_type", "") != "avg" or type(pool.flatten) is not nn.Flatten:
            return f"{name} is not an average over the image"
        if model.drop_rate and model.training:
            return "dropout is on"
        inner = pool.pool
    if type(inner) is not nn.AdaptiveAvgPool2d or inner.output_size not in (1, (1, 1)):
        return f"{name} is not AdaptiveAvgPool2d(1)"
    if type(fc) is not nn.Linear:
        return f"fc is {type(fc).__name__}, not nn.Linear"
    return why_not_now((*pool.modules(), fc))

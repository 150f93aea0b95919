"""Which module classes of which libraries can run fused, and what replaces their methods.

A row of :data:`FAMILIES` is a class that is known exactly, told by its ``forward`` function: a subclass with another
``forward`` is not known. Libraries are never imported here: a class whose module is not loaded has no instances.
"""

from __future__ import annotations

import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Dict, List, NamedTuple  # noqa: UP035  # TorchScript reads annotations of some methods below

import torch
from torch import fx

from . import nn as run
from . import preact, structure, units


class Family(NamedTuple):
    """A known class.

    Args:
        kind: ``"block"``, ``"stage"``, ``"container"`` (a whole network), ``"getter"`` (children of a network and which
            of their outputs to give), ``"encoder"`` (a network without head), ``"embeddings"`` (a stem by itself),
            ``"unit"`` (convolution, BN, ReLU), or ``"sequence"`` (a network of them, see :mod:`.units`). A Sequential
            is a ``"stage"`` of blocks, or has PReLU behind convolutions and runs as a sequence.
        module, name: of the class.
        methods: what replaces its methods. The original of ``forward`` is ``_eager``, that of ``f`` is ``_eager_f``.
        spec: attribute names of a block, unit or network; of a stage, where it holds its blocks; of a sequence, where
            it holds its modules.
    """

    kind: str
    module: str
    name: str
    methods: dict[str, Callable]
    spec: structure.BlockSpec | structure.TrunkSpec | structure.UnitSpec | str | None = None


def _by_modules(x: object) -> bool:
    """Whether a container or stage runs module by module: its calls are being recorded."""
    return isinstance(x, fx.Proxy) or torch.jit.is_tracing()  # TorchScript cannot record lists of optional tensors


# TorchScript compiles a method from its source, with the first branch only, and wants its arguments named as here.


def _block(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    if isinstance(x, fx.Proxy):  # a block is a leaf of a traced graph
        tracer: Any = x.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
    return self._eager(x) if torch.jit.is_tracing() else run.run_block(self, x)


def _preact_block(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    if isinstance(x, fx.Proxy):
        tracer: Any = x.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
    return self._eager(x) if torch.jit.is_tracing() else preact.run_block(self, x)


def _hf_block(self, hidden_state):
    return _block(self, hidden_state)


def _stage(self, input):
    if torch.jit.is_scripting():
        return self._eager(input)
    return self._eager(input) if _by_modules(input) else units.run_stage(self, input)


def _resnet(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    return self._eager(x) if _by_modules(x) else run.run_resnet(self, x)


def _preact_resnet(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    return self._eager(x) if _by_modules(x) else preact.run_resnet(self, x)


def _layer_getter(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    return self._eager(x) if _by_modules(x) else run.run_layer_getter(self, x)


def _timm_features(self, x):
    if torch.jit.is_scripting():
        return self._eager_forward_features(x)
    by_modules = _by_modules(x) or self.grad_checkpointing
    return self._eager_forward_features(x) if by_modules else run.run_timm_features(self, x)


def _timm_head(self, x, pre_logits: bool = False):
    if torch.jit.is_scripting():
        return self._eager_forward_head(x, pre_logits)
    by_modules = pre_logits or _by_modules(x) or structure.why_not_head(self) is not None
    return self._eager_forward_head(x, pre_logits) if by_modules else run.run_timm_head(self, x)


def _timm_collect(self, x) -> Dict[str, torch.Tensor]:  # noqa: UP006
    if torch.jit.is_scripting():
        return self._eager__collect(x)
    by_modules = _by_modules(x) or self.grad_checkpointing
    return self._eager__collect(x) if by_modules else run.run_layer_getter(self, x)


def _smp_encoder(self, x) -> List[torch.Tensor]:  # noqa: UP006
    if torch.jit.is_scripting():
        return self._eager(x)
    return self._eager(x) if _by_modules(x) else run.run_smp_encoder(self, x)


def _hf_embeddings(self, pixel_values):
    return self._eager(pixel_values) if _by_modules(pixel_values) else run.run_hf_embeddings(self, pixel_values)


def _hf_encoder(self, hidden_state, output_hidden_states=False, return_dict=True):
    if _by_modules(hidden_state):
        return self._eager(hidden_state, output_hidden_states, return_dict)
    last, hidden = run.run_hf_encoder(self, hidden_state, output_hidden_states)
    if not return_dict:
        return (last,) if hidden is None else (last, hidden)
    output = sys.modules["transformers.modeling_outputs"].BaseModelOutputWithNoAttention
    return output(last_hidden_state=last, hidden_states=hidden)


def _box_head(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    return self._eager(x) if _by_modules(x) else run.run_box_head(self, x)


def _conv_unit(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    return self._eager(x) if _by_modules(x) else units.run_unit(self, x)


def _vgg(self, x):
    if torch.jit.is_scripting():
        return self._eager(x)
    return self._eager(x) if _by_modules(x) else units.run_vgg(self, x)


_BLOCK, _STAGE, _RESNET = {"forward": _block}, {"forward": _stage}, {"forward": _resnet}
_OURS, _TORCHVISION, _TIMM = "resnet_triton.models", "torchvision.models.resnet", "timm.models.resnet"
_TIMM_FEATURES = "timm.models._features"
_HF = "transformers.models.resnet.modeling_resnet"
_RT_DETR = "transformers.models.rt_detr.modeling_rt_detr_resnet"

FAMILIES = (
    Family("stage", "torch.nn.modules.container", "Sequential", _STAGE),
    Family("block", _OURS, "BasicBlock", _BLOCK, structure.BASIC),
    Family("block", _OURS, "PlainBlock", _BLOCK, structure.PLAIN),
    Family("block", _OURS, "Bottleneck", _BLOCK, structure.BOTTLENECK),
    Family("container", _OURS, "ResNet", _RESNET, structure.IMAGENET),
    Family("container", _OURS, "CifarResNet", _RESNET, structure.CIFAR),
    Family("block", _OURS, "PreActBasicBlock", {"forward": _preact_block}, structure.PREACT_BASIC),
    Family("block", _OURS, "PreActBottleneck", {"forward": _preact_block}, structure.PREACT_BOTTLENECK),
    Family("container", _OURS, "PreActResNet", {"forward": _preact_resnet}, structure.IMAGENET),
    Family("container", _OURS, "PreActCifarResNet", {"forward": _preact_resnet}, structure.PREACT_CIFAR),
    Family("encoder", "resnet_triton.detection.c4", "Conv5Head", {"forward": _box_head}),
    Family("block", _TORCHVISION, "BasicBlock", _BLOCK, structure.BASIC),
    Family("block", _TORCHVISION, "Bottleneck", _BLOCK, structure.BOTTLENECK),
    Family("container", _TORCHVISION, "ResNet", _RESNET, structure.IMAGENET),
    Family("getter", "resnet_triton.transfer", "Features", {"forward": _layer_getter}),
    Family("sequence", "torchvision.models.vgg", "VGG", {"forward": _vgg}, "features"),
    Family("unit", "torchvision.models.googlenet", "BasicConv2d", {"forward": _conv_unit}, structure.BASIC_CONV),
    Family("unit", "torchvision.models.inception", "BasicConv2d", {"forward": _conv_unit}, structure.BASIC_CONV),
    Family("getter", "torchvision.models._utils", "IntermediateLayerGetter", {"forward": _layer_getter}),
    Family("block", _TIMM, "BasicBlock", _BLOCK, structure.TIMM_BASIC),
    Family("block", _TIMM, "Bottleneck", _BLOCK, structure.TIMM_BOTTLENECK),
    Family(
        "container",
        _TIMM,
        "ResNet",
        {"forward_features": _timm_features, "forward_head": _timm_head},
        structure.TIMM,
    ),
    Family("getter", _TIMM_FEATURES, "FeatureDictNet", {"_collect": _timm_collect}),
    Family("getter", _TIMM_FEATURES, "FeatureListNet", {"_collect": _timm_collect}),
    Family(
        "encoder",
        "segmentation_models_pytorch.encoders.resnet",
        "ResNetEncoder",
        {"forward": _smp_encoder},
        structure.IMAGENET,
    ),
    Family("block", _HF, "ResNetBasicLayer", {"forward": _hf_block}, structure.HF_BASIC),
    Family("block", _HF, "ResNetBottleNeckLayer", {"forward": _hf_block}, structure.HF_BOTTLENECK),
    Family("stage", _HF, "ResNetStage", _STAGE, "layers"),
    Family("embeddings", _HF, "ResNetEmbeddings", {"forward": _hf_embeddings}),
    Family("encoder", _HF, "ResNetEncoder", {"forward": _hf_encoder}),
    Family("block", _RT_DETR, "RTDetrResNetBasicLayer", {"forward": _hf_block}, structure.HF_BASIC),
    Family("block", _RT_DETR, "RTDetrResNetBottleNeckLayer", {"forward": _hf_block}, structure.HF_BOTTLENECK),
    Family("stage", _RT_DETR, "RTDetrResNetStage", _STAGE, "layers"),
    Family("encoder", _RT_DETR, "RTDetrResNetEncoder", {"forward": _hf_encoder}),
)

#: Methods that a family's replacement stands for or calls: a subclass that overrides one of them is not known.
_HELPERS = ("_forward_impl", "forward_features", "forward_head", "_collect")


def originals() -> dict[type, Family]:
    """The known classes whose modules are loaded."""
    return _table(tuple(getattr(sys.modules.get(f.module), f.name, None) for f in FAMILIES))


@functools.lru_cache(maxsize=8)
def _table(classes: tuple[type | None, ...]) -> OrderedDict[type, Family]:
    return OrderedDict((cls, f) for cls, f in zip(classes, FAMILIES, strict=True) if cls is not None)


@functools.lru_cache(maxsize=256)
def _family_of(cls: Any, known: tuple[type, ...]) -> Family | None:
    for original in known:
        same = all(getattr(cls, name, None) is getattr(original, name, None) for name in ("forward", *_HELPERS))
        if same and issubclass(cls, original):
            return originals()[original]
    return None


def family_of(cls: Any) -> Family | None:
    """The family of a class, or None: it, or a class it derives from, is known and defines all its methods."""
    family = _family_of(cls, tuple(originals()))
    return None if family is None or _is_patched(family) else family


def _is_patched(family: Family) -> bool:
    """Whether a method of the known class was replaced by a function from outside of the library that defines it."""
    known = getattr(sys.modules[family.module], family.name)
    for name in ("forward", *_HELPERS):
        owner = next((base for base in known.__mro__ if name in vars(base)), None)
        if owner is not None:
            home = getattr(vars(owner)[name], "__globals__", {}).get("__name__", "")
            if home.partition(".")[0] != owner.__module__.partition(".")[0]:
                return True
    return False

"""Images as a decoder gives them, uint8 and channels last, straight into a model: ``FromUint8``.

    y = model((x / 255 - mean) / std)

Where the model is a converted ResNet, its stem kernel reads the bytes and normalises them itself: no float image is
ever written. Elsewhere PyTorch normalises first, with equal results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, reference
from . import nn as fused
from .structure import TrunkSpec, is_bypassable, is_imagenet_conv, is_imagenet_pool, why_not_stem

#: Of ImageNet's training images; what torchvision's weights expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = {"NHWC": (0, 3, 1, 2), "NCHW": (0, 1, 2, 3)}


class FromUint8(nn.Module):
    """``model`` on uint8 images: divides by 255, subtracts ``mean`` and divides by ``std``, then runs the model.

    :meth:`why_not_fused` says whether the stem normalises, and :func:`resnet_triton.explain` shows it (pass the shape
    in ``layout``).

    Args:
        model: any module that takes normalised images ``[N, C, H, W]``.
        mean, std: per channel, of images scaled to 0..1; ImageNet's by default.
        layout: of the images to come: ``"NHWC"`` as decoders give them, or ``"NCHW"``.

    Raises:
        TypeError: ``model`` is not an nn.Module.
        ValueError: ``mean`` and ``std`` of different lengths, a ``std`` that is not positive, or another layout.
    """

    input_dtype = torch.uint8

    def __init__(
        self, model: nn.Module, mean: Sequence[float] = MEAN, std: Sequence[float] = STD, layout: str = "NHWC"
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"FromUint8 takes an nn.Module, got {type(model).__name__}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be 'NHWC' or 'NCHW', got {layout!r}")
        values = tuple(float(v) for v in mean), tuple(float(v) for v in std)
        if len(values[0]) != len(values[1]) or not values[0]:
            raise ValueError(f"mean and std must have one value a channel each, got mean={mean!r} and std={std!r}")
        if not all(math.isfinite(v) for v in values[0]) or not all(math.isfinite(v) and v > 0 for v in values[1]):
            raise ValueError(f"mean must be finite and std positive, got mean={mean!r} and std={std!r}")
        self.model = model
        self.layout = layout
        self._values = values
        first = next((p for p in model.parameters()), None)
        self._place(first.device if first is not None else torch.device("cpu"))

    def _place(self, device: torch.device) -> None:
        self.mean, self.std = (torch.tensor(v, dtype=torch.float32, device=device) for v in self._values)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FromUint8:
        super()._apply(fn, recurse)
        self._place(fn(self.mean).device)  # not cast: bfloat16 would round the mean by a third of a grey level
        return self

    def forward(self, x: Tensor) -> Any:
        """The model's output for images ``[N, H, W, C]`` (or ``[N, C, H, W]``) in uint8.

        Raises:
            ValueError: images of another dtype or shape.
        """
        channels = len(self._values[0])
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[self.layout.index("C")] != channels:
            raise ValueError(
                f"x must be uint8 images {self.layout} with {channels} channels, got {x.dtype} {tuple(x.shape)}; give "
                "normalised images to the inner model, and choose layout= and mean= to fit these"
            )
        x = x.permute(LAYOUTS[self.layout])
        if self.why_not_fused() is None:
            return self._run_fused(x)
        first = next((p for p in self.model.parameters() if p.is_floating_point()), self.mean)
        return self.model(reference.normalise(x, self.mean.to(x.device), self.std.to(x.device), first.dtype))

    def why_not_fused(self) -> str | None:
        """Why PyTorch normalises before the model now, or None when the model's stem does."""
        model: Any = self.model
        marker: Any = getattr(type(model), "_resnet_triton", None)
        spec = marker.spec if marker is not None and marker.kind == "container" else None
        if not isinstance(spec, TrunkSpec) or "maxpool" not in spec.children:
            return f"{type(model).__name__} is not a converted ImageNet ResNet: resnet_triton.convert(model)"
        if torch.jit.is_tracing() or torch.jit.is_scripting():
            return "TorchScript traces the model's own modules"
        replaced = any(name in model.__dict__ for name in ("_forward_impl", "forward_features"))
        if not is_bypassable(model) or replaced or getattr(model, "grad_checkpointing", False):
            return f"the {type(model).__name__} is hooked, checkpointed, or its forward was replaced"
        conv, norm, act, pool = (getattr(model, name) for name in spec.children[:4])
        if reason := why_not_stem(conv, norm, act):
            return reason
        if type(conv) is not nn.Conv2d or not is_imagenet_conv(conv) or not is_imagenet_pool(pool):
            return "its stem is not a 7x7/2 convolution of 3 channels and a 3x3/2 max-pool"
        return None

    def _run_fused(self, x: Tensor) -> Tensor:
        model: Any = self.model
        children = fused.trunk_of(model)
        u = fused.unit(children[0][1], children[1][1])
        normalize: Any = (self.mean, self.std)
        x = functional.stem(x, u.weight, *u.vectors, normalize=normalize, eps=u.eps)
        if hasattr(model, "forward_head"):  # timm's
            return model.forward_head(fused.run_trunk(children[4:], x)[""])
        return fused.run_classifier(model, children[4:], x)

    def extra_repr(self) -> str:
        """Layout, mean and std."""
        return f"layout={self.layout!r}, mean={self._values[0]}, std={self._values[1]}"

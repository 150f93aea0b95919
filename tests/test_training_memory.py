"""What a training step keeps for its backward, in bytes an image, beside PyTorch's channels_last mixed precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models import resnet as tv

from resnet_triton import convert, use_backend


def saved_bytes(model: nn.Module, batch: int, memory: str, size: int) -> int:
    """Of a forward's storages that autograd saves, each counted once; parameters and buffers are not counted."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # alive, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t
        return t

    x = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
        use_backend("auto", memory=memory),
    ):
        out = model(x)
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for t in found.values())


def bytes_per_image(model: nn.Module, memory: str = "auto", size: int = 64) -> float:
    """What grows with the batch; casts of weights and the Gram matrices do not."""
    return (saved_bytes(model, 4, memory, size) - saved_bytes(model, 2, memory, size)) / 2


def test_resnet50_keeps_half_of_pytorchs_bytes_and_with_stored_outputs_four_fifths() -> None:
    """At 64 px; the shares are those of 224 px, where every feature map is 12.25 times as large."""
    plain = tv.resnet50().train().to(memory_format=torch.channels_last)
    ours = convert(plain)
    eager = bytes_per_image(plain)
    gram, stored = bytes_per_image(ours, "gram"), bytes_per_image(ours, "stored")
    assert gram <= 0.5 * eager, f"{gram / eager:.3f}"
    assert stored <= 0.8 * eager, f"{stored / eager:.3f}"
    assert gram < 0.62 * stored, "the last convolution's output and the projection's are the largest of a block"


def test_a_block_keeps_its_input_its_output_and_its_first_raw_outputs() -> None:
    """No normalised tensor, no mask, and in the Gram form nothing of the last convolution nor the projection."""
    block = tv.Bottleneck(16, 8, 1, nn.Sequential(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)))
    net = convert(nn.Sequential(nn.Conv2d(3, 16, 1), block).train().to(memory_format=torch.channels_last))
    pixels, image = 16 * 16, 16 * 16 * 3
    shared = 2 * image + 2 * pixels * (16 + 8 + 8 + 32)  # of the image its cast, then x, c1, c2 and y
    assert bytes_per_image(net, "gram", 16) == shared
    assert bytes_per_image(net, "stored", 16) == shared + 2 * pixels * (32 + 32)

"""Bytes that a training step keeps for its backward: ``python train_memory.py [--model resnet50] [--size 224]``.

Counts each saved storage once, leaves out parameters and buffers, and takes the difference of two batches, so that
what does not grow with the batch drops out.
"""

import argparse

import torch
import torchvision
from torch import Tensor, nn

import resnet_triton


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that autograd saves in one forward under bf16 autocast."""
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[Tensor, int]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = (t, storage.nbytes())  # the tensor too: its address is not used again
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast(images.device.type, torch.bfloat16),
    ):
        model(images)
    return sum(nbytes for _, nbytes in kept.values())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="a ResNet of torchvision")
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = torchvision.models.get_model(args.model).to(device, memory_format=torch.channels_last).train()
    ours = resnet_triton.convert(plain)

    def per_image(model: nn.Module) -> float:
        one, three = (
            saved_bytes(
                model,
                torch.randn(n, 3, args.size, args.size, device=device).to(memory_format=torch.channels_last),
            )
            for n in (1, 3)
        )
        return (three - one) / 2

    found = {"PyTorch": per_image(plain)}
    for memory in ("stored", "gram"):
        with resnet_triton.use_backend("auto", memory=memory):
            found[memory] = per_image(ours)
    for name, count in found.items():
        print(f"{name:8} {count / 1e6:6.2f} MB an image, {count / found['PyTorch']:.2f}x")
    return found


if __name__ == "__main__":
    main()

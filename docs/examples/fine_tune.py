"""Fine-tunes a converted ResNet-18 on a folder of images: ``python fine_tune.py DATA [--epochs 3] [--weights FILE]``.

DATA has one folder of images a class. The batch statistics of the weights' training are kept (BN stays in eval mode),
so that the fused convolutions run in training too; the first stages are frozen, which saves their backward.
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import resnet_triton


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--weights", default="IMAGENET1K_V1", help="a .pth or .safetensors file instead")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    dataset = ImageFolder(args.data, transform)
    loader = DataLoader(dataset, batch_size=16, shuffle=True)

    # Weights, then the new head, then the optimizer: convert has happened already, inside the builder.
    model = resnet_triton.resnet18(weights=args.weights)
    model.fc = nn.Linear(model.fc.in_features, len(dataset.classes))
    model.to(device, memory_format=torch.channels_last)
    resnet_triton.freeze(model, ("conv1", "layer1", "layer2"))
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.001, momentum=0.9)

    losses = []
    for epoch in range(args.epochs):
        model.eval()  # BN keeps its statistics
        total = 0.0
        for images, labels in loader:
            logits = model(images.to(device, memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
        losses.append(total / len(dataset))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()

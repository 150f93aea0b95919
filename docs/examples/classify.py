"""Classifies photographs: ``python classify.py photo.jpg [more.jpg] [--weights resnet50.safetensors]``.

Without ``--weights``, torchvision downloads its ImageNet weights (98 MB) once.
"""

import argparse

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import ResNet50_Weights

import resnet_triton


def main(arguments: list[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="+")
    parser.add_argument("--weights", default="IMAGENET1K_V2", help="a .pth or .safetensors file instead")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = resnet_triton.fold(resnet_triton.resnet50(weights=args.weights).eval())
    model = model.to(device, memory_format=torch.channels_last)

    recipe = ResNet50_Weights.IMAGENET1K_V2
    resize_crop_normalise = recipe.transforms()
    images = [resize_crop_normalise(decode_image(name, ImageReadMode.RGB)) for name in args.photographs]
    with torch.inference_mode():
        probabilities = model(torch.stack(images).to(device)).softmax(1)

    names = []
    for photograph, row in zip(args.photographs, probabilities, strict=True):
        best = row.topk(3)
        names.append(recipe.meta["categories"][best.indices[0]])
        words = (
            f"{recipe.meta['categories'][i]} {100 * p:.1f} %" for p, i in zip(best.values, best.indices, strict=True)
        )
        print(f"{photograph}: {', '.join(words)}")
    return names


if __name__ == "__main__":
    main()

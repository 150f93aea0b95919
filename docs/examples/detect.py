"""A converted backbone in torchvision's Faster R-CNN: ``python detect.py [photo.jpg] [--weights DEFAULT]``.

``convert`` finds the residual blocks inside the detector, whose BNs are frozen; the rest stays torchvision's.
"""

import argparse

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import resnet_triton


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photograph", nargs="?")
    parser.add_argument("--weights", help="DEFAULT downloads torchvision's (160 MB); the default is random weights")
    parser.add_argument("--size", type=int, default=800, help="of the image's shorter side")
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fasterrcnn_resnet50_fpn(weights=args.weights, weights_backbone=None, min_size=args.size).eval()
    model = resnet_triton.convert(model, strict=True).to(device)

    # A detector's shapes depend on what it sees; its backbone can be explained.
    print(resnet_triton.explain(model.backbone, (1, 3, args.size, args.size)))

    if args.photograph:
        image = decode_image(args.photograph, ImageReadMode.RGB).float() / 255
    else:
        image = torch.rand(3, args.size, args.size)
    with torch.inference_mode():
        found = model([image.to(device)])
    print(f"{len(found[0]['boxes'])} boxes")
    return found


if __name__ == "__main__":
    main()

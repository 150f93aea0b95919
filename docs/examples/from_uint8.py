"""Feeds uint8 images as a decoder gives them: ``python from_uint8.py photo.jpg [--weights IMAGENET1K_V2]``.

The stem's kernel reads bytes in NHWC and normalises them itself, so no float image is written, and a quarter of the
bytes go to the GPU.
"""

import argparse

import torch
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

import resnet_triton
from resnet_triton.images import FromUint8


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photograph")
    parser.add_argument(
        "--weights", help="a .pth or .safetensors file, or IMAGENET1K_V2; the default is random weights"
    )
    args = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = FromUint8(resnet_triton.resnet50(weights=args.weights).eval().to(device))
    print(f"the stem normalises: {model.why_not_fused() or 'yes'}")

    crop = v2.Compose([v2.Resize(232), v2.CenterCrop(224)])  # both work on bytes
    image = crop(decode_image(args.photograph, ImageReadMode.RGB))
    batch = image.permute(1, 2, 0)[None]  # N, H, W, C
    with torch.inference_mode():
        logits = model(batch.to(device))
    print(f"class {logits.argmax().item()}")
    return logits


if __name__ == "__main__":
    main()

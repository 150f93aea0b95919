"""Arguments that several commands share."""

from __future__ import annotations

import argparse

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model`` and ``--weights``, read by :func:`resnet_triton.sources.load_model`."""
    parser.add_argument(
        "--model",
        default="resnet50",
        help="a builder of this package (resnet50), torchvision:NAME, timm:NAME, or package.module:function "
        "(a function of no arguments that returns the model)",
    )
    parser.add_argument("--weights", help="a .pth or .safetensors file; the default is random weights")

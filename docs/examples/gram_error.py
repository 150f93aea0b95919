"""Errors of a training step in bf16 against fp64, Gram form beside stored outputs: ``python gram_error.py``.

First the end of a bottleneck alone, y = relu(bn(a w^T) + shortcut) with a = relu(x) of an exact x, so that only the end
errs; then a whole bottleneck, with PyTorch's modules beside it. docs/training.md explains the difference.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.resnet import Bottleneck

import resnet_triton
from resnet_triton.training.functions import TrainBlock

FORMS = ("stored", "gram")


def error(found: Tensor, exact: Tensor) -> float:
    """Relative RMS error."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def table(names: Sequence[str], columns: dict[str, list[float]]) -> None:
    print(f"  {'':14}" + "".join(f"{name:>12}" for name in columns))
    for i, name in enumerate(names):
        print(f"  {name:14}" + "".join(f"{errors[i]:12.1e}" for errors in columns.values()))


def block_end(device: str, batch: int, width: int, size: int) -> dict[str, list[float]]:
    """Errors of y and of the gradients of x, w, gamma, beta and the shortcut."""
    channels = 4 * width
    low = {"device": device, "dtype": torch.bfloat16}
    x = torch.randn(batch, width, size, size, **low)
    shortcut, grad = (torch.randn(batch, channels, size, size, **low) for _ in range(2))
    w = torch.randn(channels, width, 1, 1, **low).div_(width**0.5).float()  # exact in bf16, its gradient in fp32
    gamma, beta = 1 + 0.2 * torch.randn(channels, device=device), 0.2 * torch.randn(channels, device=device)

    inputs = [t.double().requires_grad_() for t in (x, w, gamma, beta, shortcut)]
    b, v, g, s, r = inputs
    y = torch.relu(F.batch_norm(F.conv2d(b.relu(), v), None, None, g, s, training=True) + r)
    exact = [y, *torch.autograd.grad(y, inputs, grad.double())]

    # the operator wants a convolution in front: one that changes nothing, with a BN that changes nothing, and its ReLU
    same = torch.eye(width, device=device)[:, :, None, None]
    constant = [same, None, None, torch.zeros(width, device=device), torch.ones(width, device=device)]
    found = {}
    for form in FORMS:
        inputs = [t.detach().clone().requires_grad_() for t in (x, w, gamma, beta, shortcut)]
        b, v, g, s, r = inputs
        flags = [True, False, form == "gram", False, False]  # relu, own_shortcut, gram, masked_grad, mask_input
        tensors = [*constant, v, g, s, None, None]
        y, *_ = TrainBlock.apply(b, r, [0.0, 1e-5], [1, 0, 1] * 2, False, flags, "", *tensors)
        result = [y, *torch.autograd.grad(y, inputs, grad)]
        found[form] = [error(*pair) for pair in zip(result, exact, strict=True)]
    return found


def whole_block(device: str, batch: int, width: int, size: int) -> dict[str, list[float]]:
    """Errors of y and of the gradients of x and of the three weights under autocast."""
    channels = 4 * width
    plain = Bottleneck(channels, width).to(device, memory_format=torch.channels_last).train()
    ours = resnet_triton.convert(plain)
    x, grad = (torch.randn(batch, channels, size, size, device=device).bfloat16() for _ in range(2))
    x = x.relu_().to(memory_format=torch.channels_last)  # as behind a block

    def step(model, x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.detach().clone().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            y = model(x)
        weights = [model.conv1.weight, model.conv2.weight, model.conv3.weight]
        return [y, *torch.autograd.grad(y, [x, *weights], grad)]

    rounded = Bottleneck(channels, width).to(device).double().train()
    rounded.load_state_dict({k: v.bfloat16() if v.dim() == 4 else v for k, v in plain.state_dict().items()})
    exact = step(rounded, x.double(), grad.double())
    found = {"PyTorch": [error(*pair) for pair in zip(step(plain, x, grad), exact, strict=True)]}
    for form in FORMS:
        with resnet_triton.use_backend("auto", memory=form):
            result = step(ours, x, grad)
        found[form] = [error(*pair) for pair in zip(result, exact, strict=True)]
    return found


def main(arguments: list[str] | None = None) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="channels of the 3x3; the output has four times as many")
    parser.add_argument("--size", type=int, default=28)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = (args.batch, args.width, args.size)
    end, block = block_end(device, *sizes), whole_block(device, *sizes)
    print(f"relative RMS errors in bf16, {args.batch} images of {args.size}x{args.size}, width {args.width}")
    print("the end of a bottleneck")
    table(("y", "dx", "dw", "dgamma", "dbeta", "dshortcut"), end)
    print("a whole bottleneck")
    table(("y", "dx", "dw of conv1", "dw of conv2", "dw of conv3"), block)
    return end, block


if __name__ == "__main__":
    main()

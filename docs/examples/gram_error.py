"""Errors of a training step in bf16 against fp64, Gram form beside stored outputs: ``python gram_error.py``.

Two bottlenecks: one whose first two convolutions are exact, so that only its end errs, and an ordinary one. PyTorch's
modules run beside them. docs/training.md explains the difference.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

import resnet_triton


def error(found: Tensor, exact: Tensor) -> float:
    """Relative RMS error."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def bottleneck(width: int, exact_beginning: bool) -> Bottleneck:
    """An identity bottleneck whose weights are exact in bf16.

    With an exact beginning, its first two convolutions hand on the first channels of the input, and their BN in eval
    mode changes nothing: y = relu(bn3(conv3(relu(x[:, :width]))) + x).
    """
    block = Bottleneck(4 * width, width).train()
    for parameter in (block.bn3.weight, block.bn3.bias):
        nn.init.normal_(parameter, mean=float(parameter is block.bn3.weight), std=0.2)
    with torch.no_grad():
        if exact_beginning:
            nn.init.dirac_(block.conv1.weight)
            nn.init.dirac_(block.conv2.weight)
            for bn in (block.bn1.eval(), block.bn2.eval()):
                bn.eps = 1e-30  # 1 + eps is 1
        for conv in (block.conv1, block.conv2, block.conv3):
            conv.weight.copy_(conv.weight.bfloat16())
    return block


def step(block: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """y, and the gradients of x, of the three weights, and of gamma and beta of the last BN."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = block(x)
    weights = [block.conv1.weight, block.conv2.weight, block.conv3.weight]
    return [y.detach(), *torch.autograd.grad(y, [x, *weights, block.bn3.weight, block.bn3.bias], grad)]


def errors(block: Bottleneck, batch: int, size: int) -> dict[str, list[float]]:
    """Errors of what :func:`step` returns, for PyTorch's modules and for both forms."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block.to(device, memory_format=torch.channels_last)
    shape = (batch, block.conv1.in_channels, size, size)
    x, grad = (torch.randn(shape, device=device).to(torch.bfloat16, memory_format=torch.channels_last) for _ in "xy")
    ours = resnet_triton.convert(block)
    found = {"PyTorch": step(block, x, grad)}
    for form in ("stored", "gram"):
        with resnet_triton.use_backend("auto", memory=form):
            found[form] = step(ours, x, grad)
    exact = step(block.double(), x.double(), grad.double())
    return {name: [error(*pair) for pair in zip(result, exact, strict=True)] for name, result in found.items()}


def table(title: str, columns: dict[str, list[float]], rows: Sequence[tuple[int, str]]) -> None:
    print(f"{title:20}" + "".join(f"{name:>12}" for name in columns))
    for i, name in rows:
        print(f"  {name:18}" + "".join(f"{column[i]:12.1e}" for column in columns.values()))


def main(arguments: list[str] | None = None) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="channels of the 3x3; the block has four times as many")
    parser.add_argument("--size", type=int, default=28)
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    end, whole = (errors(bottleneck(args.width, exact), args.batch, args.size) for exact in (True, False))
    print(f"relative RMS errors in bf16, {args.batch} images of {args.size}x{args.size}, width {args.width}")
    names = list(enumerate(("y", "dx", "dw of conv1", "dw of conv2", "dw of conv3", "dgamma of bn3", "dbeta of bn3")))
    table("only the end errs", end, [row for row in names if row[0] not in (2, 3)])
    table("the whole block errs", whole, names)
    return end, whole


if __name__ == "__main__":
    main()

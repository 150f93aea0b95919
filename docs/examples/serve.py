"""Serves batches of any size up to a limit with one CUDA graph: ``python serve.py [--weights FILE] [--batch 8]``.

A graph replays one shape, so a smaller batch is padded and the rest of the answer is cut off. Without a GPU the folded
model itself answers.
"""

import argparse
import time

import torch

import resnet_triton


class Server:
    def __init__(self, weights: str | None, batch: int, size: int) -> None:
        cuda = torch.cuda.is_available()
        self.device, self.dtype = ("cuda", torch.float16) if cuda else ("cpu", torch.float32)
        model = resnet_triton.fold(resnet_triton.resnet50(weights=weights).eval())
        self.model = model.to(self.device, self.dtype, memory_format=torch.channels_last)
        self.batch = torch.zeros(batch, 3, size, size, device=self.device, dtype=self.dtype)
        self.batch = self.batch.to(memory_format=torch.channels_last)
        self.run = resnet_triton.graph(self.model, self.batch) if cuda else self.model

    @torch.inference_mode()
    def classes(self, images: torch.Tensor) -> list[int]:
        """The best class of each image ``[n, 3, H, W]``, n up to the server's batch."""
        self.batch[: len(images)].copy_(images)
        return self.run(self.batch)[: len(images)].argmax(1).tolist()


def main(arguments: list[str] | None = None) -> list[int]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--weights", help="a .pth or .safetensors file, or IMAGENET1K_V2; the default is random weights"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args(arguments)

    server = Server(args.weights, args.batch, args.size)
    answers = []
    for n in (1, args.batch // 2, args.batch):
        start = time.perf_counter()
        answers = server.classes(torch.randn(n, 3, args.size, args.size))
        print(f"{n} images: {1000 * (time.perf_counter() - start):.1f} ms on {server.device}")
    return answers


if __name__ == "__main__":
    main()

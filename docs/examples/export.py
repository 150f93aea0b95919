"""Exports a converted model and compiles it ahead of time: ``python export.py OUT.pt2 [--aot]``.

``torch.export`` records our operators, so the program is loaded where ``import resnet_triton`` works. ``--aot`` also
makes an AOTInductor package (needs a C++ compiler), which runs without Python's overhead.
"""

import argparse

import torch

import resnet_triton


def main(arguments: list[str] | None = None) -> torch.Tensor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--aot", action="store_true")
    args = parser.parse_args(arguments)

    # The ResNet-20 that comes with the package reads handwritten digits; any converted model is exported the same way.
    model = resnet_triton.fold(resnet_triton.models.mnist5k_resnet20())
    example = torch.randn(2, 1, 28, 28)
    batch = torch.export.Dim("batch", max=1024)
    program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    if args.aot:
        torch._inductor.aoti_compile_and_package(program, package_path=args.output)
        run = torch._inductor.aoti_load_package(args.output)
    else:
        torch.export.save(program, args.output)
        run = torch.export.load(args.output).module()

    with torch.inference_mode():
        images = torch.randn(5, 1, 28, 28)
        logits = run(images)
        print(f"{args.output}: largest difference {(logits - model(images)).abs().max():.2g}")
    return logits


if __name__ == "__main__":
    main()

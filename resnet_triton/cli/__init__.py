"""The ``resnet-triton`` command. Each subcommand is one module here: see :data:`COMMANDS`.

Exit codes: 0 done; 1 done, and the answer is no (``bench``: ours is slower, ``verify``: outputs differ); 2 wrong
arguments or files, with one line on stderr that says what to do; 130 interrupted. Results go to stdout, all else to
stderr.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .._version import __version__

#: Subcommands in the order of ``--help``. Module ``resnet_triton.cli.NAME`` holds HELP and EXAMPLE (one line each),
#: ``arguments(parser)`` and ``run(args) -> exit code``; ValueError, OSError, ImportError, NotImplementedError and
#: OutOfMemoryError become exit code 2.
COMMANDS = ("info", "explain", "tune", "bench", "verify", "fold", "convert", "train", "eval", "detect", "experiment")

#: A reader that went away, as in ``resnet-triton explain | head``: what a shell reports for SIGPIPE.
BROKEN_PIPE = 141


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    root = argparse.ArgumentParser(prog="resnet-triton", description="Residual networks on fused Triton kernels.")
    root.add_argument("--version", action="version", version=f"resnet-triton {__version__}")
    subparsers = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = subparsers.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # an example stays one line, to copy
        )
        module.arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=module.run)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    root = parser()
    if not arguments or not (arguments[0].startswith("-") or arguments[0] in COMMANDS):
        root.print_help(sys.stderr)
        if arguments:
            close = difflib.get_close_matches(arguments[0], COMMANDS)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            print(f"\nresnet-triton: no command {arguments[0]!r}{hint}", file=sys.stderr)
        return 2
    try:
        args = root.parse_args(arguments)
    except SystemExit as end:  # --help, or wrong arguments, which argparse has explained
        return int(end.code or 0)
    name = f"resnet-triton {args.command}"
    try:
        with _weights_reported():
            code = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return BROKEN_PIPE
    except torch.OutOfMemoryError as error:
        first = str(error).partition("\n")[0].partition(". GPU")[0]
        print(f"{name}: out of memory ({first}); use a smaller --batch or --size", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


@contextmanager
def _weights_reported() -> Iterator[None]:
    """What was found in a file of weights, and renamed, goes to stderr."""
    logger, handler = logging.getLogger("resnet_triton.weights"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

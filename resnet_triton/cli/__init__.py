"""The ``resnet-triton`` command. Each subcommand is one module here: see :data:`COMMANDS`.

Exit codes: 0 done; 1 done, and the answer is no (``bench``: ours is slower, ``verify``: outputs differ); 2 wrong
arguments or files, with one line on stderr that says what to do; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: Subcommands in the order of ``--help``. Module ``resnet_triton.cli.NAME`` holds HELP and EXAMPLE (one line each),
#: ``arguments(parser)`` and ``run(args) -> exit code``; ValueError, OSError and ImportError become exit code 2.
COMMANDS = ("info", "explain")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    root = argparse.ArgumentParser(prog="resnet-triton", description="Residual networks on fused Triton kernels.")
    subparsers = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f".{name}", __name__)
        command = subparsers.add_parser(
            name, help=module.HELP, description=module.HELP, epilog=f"example: {module.EXAMPLE}"
        )
        module.arguments(command)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=module.run)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    args = parser().parse_args(arguments)
    try:
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"resnet-triton {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"resnet-triton {args.command}: interrupted", file=sys.stderr)
        return 130

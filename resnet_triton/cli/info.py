"""``resnet-triton info``."""

from __future__ import annotations

import argparse
import json

from ..info import info

HELP = "what is usable here, and why not"
EXAMPLE = "resnet-triton info"


def arguments(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    report = info()
    print(json.dumps(report.to_dict(), indent=1) if args.json else report)
    return 0

"""Throughput and accuracy of this package beside the alternatives; see README.md in this folder."""

from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"

"""Throughput and accuracy of this package beside the alternatives; see README.md in this folder."""

"""The states of the random generators of PyTorch (CPU and this GPU), numpy and Python, as JSON and tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_all(seed: int) -> None:
    """Seeds every generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def state(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The states now: for JSON, and as uint8 tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    facts = {
        "python": [version, list(numbers), gauss],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return facts, tensors


def restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Puts every generator back to what :func:`state` gave."""
    version, numbers, gauss = facts["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = facts["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)

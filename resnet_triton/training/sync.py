"""Batch statistics over the members of a process group, as SyncBatchNorm's: what is exchanged is a few vectors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def group_name(group: dist.ProcessGroup | None) -> str:
    """The name by which operators find a process group (None: the default one); ``""`` if it has one member."""
    if not (dist.is_available() and dist.is_initialized()):
        return ""
    group = group or dist.group.WORLD
    return "" if group is None or dist.get_world_size(group) == 1 else group.group_name


def _group(name: str) -> dist.ProcessGroup:
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def gathered(moments: Tensor, name: str) -> Tensor:
    """The moments ``[3, K]`` of every member as ``parts [members, 3, K]``, in the order of ranks."""
    group = _group(name)
    members = [torch.empty_like(moments) for _ in range(dist.get_world_size(group))]
    dist.all_gather(members, moments.contiguous(), group=group)
    return torch.stack(members)


def summed(vectors: Tensor, name: str) -> Tensor:
    """The sum over the members."""
    total = vectors.clone()
    dist.all_reduce(total, group=_group(name))
    return total

"""The processes of ``torchrun``, or the one process of an ordinary run."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class Processes:
    """This process among those of a run; a group is joined where ``torchrun`` started more than one.

    Args:
        device: what this process computes on; on GPUs, that of its local rank.

    Attributes:
        rank, count: number of this process, and how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.count = int(os.environ.get("RANK", "0")), started()
        self.device = device
        if self.count > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            # gloo carries what is said between steps, from and to the CPU; nccl the gradients
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        return bool(self.total(torch.tensor(float(flag), dtype=torch.float64)))

    def total(self, x: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        x = x.detach().cpu().clone()
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: T) -> list[T]:
        """The objects of all processes, by rank."""
        if self.count == 1:
            return [x]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, x)
        return found

    def from_first(self, x: T) -> T:
        """The object of the first process."""
        box = [x]
        if self.count > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model whose gradients are averaged over the processes."""
        if self.count == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None
        )

    def share_buffers(self, model: nn.Module) -> None:
        """Gives every process the BN statistics of the first, which are what is saved."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)


def started() -> int:
    """How many processes ``torchrun`` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def with_sync_bn(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with BN statistics over all processes.

    Raises:
        NotImplementedError: on the CPU.
    """
    if device.type != "cuda":
        raise NotImplementedError(
            f"--sync-bn on {device.type}: PyTorch's SyncBatchNorm runs on GPUs only; leave --sync-bn out (each process "
            "then has its own statistics), or pass --device cuda"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)

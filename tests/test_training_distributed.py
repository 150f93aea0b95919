"""Two processes over gloo: DDP, batch statistics shared by a process group, FSDP2.

Starting a process costs far more than what is tested, so one test runs every scenario in one pair of processes.
"""

from __future__ import annotations

import copy
import datetime
import json
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet as tv

from resnet_triton import convert, use_backend
from resnet_triton.convert import is_converted
from tests.comparers import same_math
from tests.networks import Calls, basics

WORLD = 2
#: Images of each process.
EVEN, UNEVEN = (2, 2), (3, 1)
SCENARIOS: dict[str, Callable[[int], None]] = {}


def scenario(f: Callable[[int], None]) -> Callable[[int], None]:
    """Registers what both processes run, given their rank."""
    SCENARIOS[f.__name__] = f
    return f


def net() -> nn.Sequential:
    """Two bottlenecks, equal in all processes, in fp64 and training mode."""
    torch.manual_seed(1)
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    model = nn.Sequential(tv.Bottleneck(8, 4, 2, shortcut), tv.Bottleneck(16, 4)).double().train()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.3, 0.3)
            m.running_mean.uniform_(-0.3, 0.3)
            m.running_var.uniform_(0.5, 1.5)
    return model


def batch(sizes: tuple[int, ...], *shape: int) -> tuple[Tensor, list[Tensor]]:
    """The whole batch, and each process' part of it."""
    x = torch.randn(sum(sizes), *shape, generator=torch.Generator().manual_seed(2)).double()
    return x, list(x.split(sizes))


def gradient(y: Tensor, sizes: tuple[int, ...], rank: int | None) -> Tensor:
    """The gradient of the output: the same whether the batch is whole (``rank`` None) or split."""
    whole = torch.randn(sum(sizes), *y.shape[1:], generator=torch.Generator().manual_seed(3)).double()
    return whole if rank is None else whole.split(sizes)[rank]


def synchronised(model: nn.Module) -> Any:
    """``model`` with SyncBatchNorm, converted."""
    return convert(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)))


def check_synchronised(ours: Any, plain: nn.Module, rank: int, sizes: tuple[int, ...], *shape: int) -> None:
    """Outputs, gradients of inputs and parameters, and running statistics are those of BatchNorm on the whole batch."""
    x, parts = batch(sizes, *shape)
    x.requires_grad_()
    mine = parts[rank].detach().requires_grad_()
    expected, y = plain(x), ours(mine)
    same_math(y.detach(), expected.detach().split(sizes)[rank])
    expected.backward(gradient(expected, sizes, None))
    y.backward(gradient(y, sizes, rank))
    assert x.grad is not None and mine.grad is not None
    same_math(mine.grad, x.grad.split(sizes)[rank])
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        dist.all_reduce(p.grad)
        same_math(p.grad, q.grad)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        same_math(a.double(), b.double())


@scenario
def statistics_of_a_group(rank: int) -> None:
    for memory in ("gram", "stored"):
        for sizes in (EVEN, UNEVEN):
            plain = net()
            ours = synchronised(plain)
            with use_backend("auto", memory=memory), Calls() as counter:
                check_synchronised(ours, plain, rank, sizes, 8, 6, 5)
            assert counter.counts["train_block"] == 2, dict(counter.counts)


@scenario
def a_network_with_its_stem(rank: int) -> None:
    plain = basics((1, 1, 1, 1)).train()
    with use_backend("auto", memory="stored"), Calls() as counter:
        check_synchronised(synchronised(plain), plain, rank, UNEVEN, 3, 40, 36)
    assert counter.counts["train_stem"] == 1 and counter.counts["train_block"] == 4


@scenario
def one_value_per_process(rank: int) -> None:
    """More than one value in the group is enough."""
    plain = net()
    with use_backend("auto", memory="gram"):
        check_synchronised(synchronised(plain), plain, rank, (1, 1), 8, 2, 2)


@scenario
def options_of_synchronised_bn(rank: int) -> None:
    plain = net()
    first, second = plain[0], plain[1]
    first.bn1.momentum, first.bn2.track_running_stats, second.bn3.momentum = None, False, 0.5
    second.bn2.eval()
    second.bn1 = nn.BatchNorm2d(4, affine=False).double()
    first.conv2.requires_grad_(False)
    first.bn3.bias.requires_grad_(False)
    ours = synchronised(plain)
    for p in (*ours.parameters(), *plain.parameters()):
        p.grad = torch.zeros_like(p)
    with use_backend("auto", memory="gram"):
        check_synchronised(ours, plain, rank, UNEVEN, 8, 6, 5)
    assert not ours[0].conv2.weight.grad.any() and ours[0].conv3.weight.grad.any()


@scenario
def compiled(rank: int) -> None:
    plain = net()
    ours = synchronised(plain)
    with use_backend("auto", memory="gram"):
        check_synchronised(torch.compile(ours, fullgraph=True, backend="aot_eager"), plain, rank, EVEN, 8, 6, 5)


@scenario
def a_group_of_its_own(rank: int) -> None:
    """Groups of one process take that process' statistics; BN of different groups do not run in one operator."""
    groups = [dist.new_group([i]) for i in range(WORLD)]
    plain = net()
    alone = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain), groups[rank])
    mixed: Any = copy.deepcopy(plain)
    mixed[1].bn2 = nn.SyncBatchNorm.convert_sync_batchnorm(mixed[1].bn2)
    x = batch(EVEN, 8, 6, 5)[1][rank]
    with use_backend("auto", memory="gram"):
        ours = convert(alone, inplace=True)  # a process group cannot be copied
        same_math(ours(x).detach(), plain(x).detach())
        with Calls() as counter:
            convert(mixed)(x)
    assert counter.counts["train_block"] == 1 + 3, dict(counter.counts)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        same_math(a.double(), b.double())


@scenario
def data_parallel(rank: int) -> None:
    """DDP's gradients are those of the whole batch: synchronised, and with constant statistics; no stride warnings."""
    # PyTorch's own SyncBatchNorm needs a GPU, for which DDP looks
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None
    for freeze in (False, True):
        plain = net()
        if freeze:
            for m in plain.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.eval()
        ours: Any = convert(copy.deepcopy(plain)) if freeze else synchronised(plain)
        wrapped = DistributedDataParallel(ours)
        assert is_converted(wrapped.module[0])
        x, parts = batch(EVEN, 8, 6, 5)
        with warnings.catch_warnings(record=True) as said, use_backend("auto", memory="gram"):
            warnings.simplefilter("always")
            with wrapped.no_sync():
                y = wrapped(parts[rank])
                y.backward(WORLD * gradient(y, EVEN, rank))
            y = wrapped(2 * parts[rank])
            y.backward(WORLD * gradient(y, EVEN, rank))
        assert not [w for w in said if "strides" in str(w.message)], said
        for scale in (1, 2):
            y = plain(scale * x)
            y.backward(gradient(y, EVEN, None))
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            same_math(p.grad, q.grad)


@scenario
def data_parallel_with_statistics_of_each_process(rank: int) -> None:
    """And a part of the parameters frozen, compiled, with static graphs and gradients as views of the buckets."""
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}):
        plain = net()
        plain[0].requires_grad_(False)
        step = torch.compile if "static_graph" in options else lambda m, **_: m
        models = [DistributedDataParallel(m, **options) for m in (convert(copy.deepcopy(plain)), plain)]
        for wrapped in models:
            optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.1, momentum=0.9)
            run = step(wrapped, backend="aot_eager") if wrapped is models[0] else wrapped
            for _ in range(2):
                optimizer.zero_grad()
                with use_backend("auto", memory="gram"):
                    y = run(batch(UNEVEN, 8, 6, 5)[1][rank])
                    y.backward(gradient(y, UNEVEN, rank))
                optimizer.step()
        for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
            same_math(a.double(), b.double())


def sharded(model: nn.Module, *parts: nn.Module, **options) -> nn.Module:
    """``model`` after ``fully_shard`` of its parts and of itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for m in (*parts, model):
        fully_shard(m, mesh=mesh, **options)
    return model


@scenario
def fully_sharded(rank: int) -> None:
    """Shard blocks and model first, convert in place then: the same weights after two steps."""
    for blocks in (False, True):
        results = []
        for fused in (True, False):
            model: Any = net()
            model = sharded(model, *(model if blocks else ()))
            if fused:
                assert convert(model, inplace=True) is model
                assert is_converted(model[0]) and is_converted(model[1])
            optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
            with use_backend("auto", memory="gram"):
                for _ in range(2):
                    optimizer.zero_grad()
                    with Calls() as counter:
                        y = model(batch(EVEN, 8, 6, 5)[1][rank])
                    y.backward(gradient(y, EVEN, rank))
                    optimizer.step()
            assert counter.counts["train_block"] == (2 if fused else 0), dict(counter.counts)
            results.append((model, y))
        (ours, y), (plain, expected) = results
        same_math(y.detach(), expected.detach())
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            same_math(p.full_tensor(), q.full_tensor())
        for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
            same_math(a.double(), b.double())
        with torch.no_grad():
            ours.eval(), plain.eval()
            x = batch(EVEN, 8, 6, 5)[1][rank]
            same_math(ours(x), plain(x))


@scenario
def a_bn_sharded_alone(rank: int) -> None:
    for name in ("0.bn2", "0.downsample.1"):
        model = net()
        convert(sharded(model, model.get_submodule(name)), inplace=True)
        with use_backend("auto", memory="gram"), pytest.raises(NotImplementedError) as caught:
            model(batch(EVEN, 8, 6, 5)[1][rank])
        assert name[2:] in str(caught.value) and "fully_shard(block)" in str(caught.value)


def work(rank: int, folder: str) -> None:
    """One process: writes what went wrong in each scenario."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    wrong = {}
    for name, f in SCENARIOS.items():
        try:
            f(rank)
        except Exception:
            wrong[name] = traceback.format_exc()
        torch._dynamo.reset()
    Path(folder, f"{rank}.json").write_text(json.dumps(wrong))
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(work, (str(tmp_path),), WORLD)
    for rank in range(WORLD):
        wrong = json.loads((tmp_path / f"{rank}.json").read_text())
        assert not wrong, "\n".join(f"process {rank}, {name}:\n{found}" for name, found in wrong.items())

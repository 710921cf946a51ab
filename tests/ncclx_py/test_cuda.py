"""CUDA tensors over NCCL. Skipped where there is no CUDA device; two ranks on one GPU need NCCL 2.30 or newer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import ncclx_py  # noqa: F401

oracle = load(Path(__file__).with_name("oracle.py"), "oracle")

pytestmark = [pytest.mark.gpu, pytest.mark.dist]

ONE_GPU_TWO_RANKS = (2, 30)  # the NCCL version from which several ranks may share a device


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    if torch.cuda.device_count() < 2 and torch.cuda.nccl.version() < ONE_GPU_TWO_RANKS:
        pytest.skip(f"two ranks need two GPUs or NCCL 2.30; this is NCCL {torch.cuda.nccl.version()}")
    with RankPool(2, env={"NCCL_MULTI_RANK_GPU_ENABLE": "1"}) as ranks:
        yield ranks


def start(me: Rank) -> torch.device:
    device = torch.device("cuda", me.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    me.init()
    return device


def both_devices(me: Rank) -> None:
    device = start(me)
    assert not dist.group.WORLD._devices.has("cuda")
    on_cpu, on_gpu = torch.full((3,), me.rank + 1.0), torch.full((3,), me.rank + 1.0, device=device)
    dist.all_reduce(on_cpu)
    dist.all_reduce(on_gpu)
    assert on_cpu.tolist() == on_gpu.tolist() == [me.size * (me.size + 1) / 2] * 3
    objects = [None] * me.size
    dist.all_gather_object(objects, me.rank)
    assert objects == list(range(me.size))
    dist.barrier()
    dist.barrier(device_ids=[device.index])
    assert isinstance(dist.group.WORLD._get_backend(device), dist.ProcessGroupNCCL)


def reductions(me: Rank) -> None:
    device = start(me)
    for dtype in [*oracle.FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool]:
        for op in ("SUM", "AVG", "MIN", "MAX", "PRODUCT"):
            if op == "AVG" and not dtype.is_floating_point:
                continue
            for layout in ("plain", "strided"):
                everyone = [oracle.data(rank, (6, 4), dtype, op) for rank in range(me.size)]
                tensor, around = oracle.laid_out(everyone[me.rank].to(device), layout)
                dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
                assert oracle.close(tensor.cpu(), oracle.reduced(everyone, op)), (dtype, op, layout)
                assert oracle.untouched(tensor.cpu(), around.cpu()) or layout == "strided"


def movement(me: Rank) -> None:
    device = start(me)
    everyone = [oracle.data(rank, (4, 3), torch.int16) for rank in range(me.size)]
    mine = everyone[me.rank].to(device)
    whole = torch.zeros(me.size, 4, 3, dtype=torch.int16, device=device)
    dist.all_gather_into_tensor(whole, mine)
    assert oracle.same(whole.cpu(), torch.stack(everyone))
    outputs = [torch.zeros_like(mine) for _ in range(me.size)]
    dist.all_gather(outputs, mine)
    assert all(oracle.same(output.cpu(), expected) for output, expected in zip(outputs, everyone))
    source = torch.arange(me.size * 2.0, device=device).reshape(me.size, 2) + 10 * me.rank
    output = torch.zeros_like(source)
    dist.all_to_all_single(output, source)
    assert output.tolist() == [[10.0 * r + 2 * me.rank, 10.0 * r + 2 * me.rank + 1] for r in range(me.size)]
    part = torch.zeros(2, device=device)
    dist.reduce_scatter_tensor(part, source)
    assert torch.equal(part, sum(source[me.rank] - 10 * me.rank + 10 * r for r in range(me.size)))
    dist.broadcast(mine, src=me.size - 1)
    assert oracle.same(mine.cpu(), everyone[-1])
    several = [torch.full((n,), me.rank + 1.0, device=device) for n in (2, 3)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for tensor in several:
            dist.all_reduce(tensor)
    manager.wait()
    assert all((tensor == me.size * (me.size + 1) / 2).all() for tensor in several)


def streams(me: Rank) -> None:
    """A strided average is finished on a side stream; waiting orders this stream after it, without blocking the CPU."""
    device = start(me)
    for step in range(50):
        tensor = torch.full((512, 1024), float(step + me.rank), device=device)[:, ::2]
        work = dist.all_reduce(tensor, op=dist.ReduceOp.AVG, async_op=True)
        noise = [torch.full((512, 512), -1.0, device=device) for _ in range(4)]  # would reuse memory freed too early
        work.wait()
        assert (tensor == step + (me.size - 1) / 2).all(), step
        del noise


def training(me: Rank) -> None:
    device = start(me)
    torch.manual_seed(0)
    net = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device), bucket_cap_mb=0.01)
    net(torch.ones(2, 64, device=device) * (me.rank + 1)).sum().backward()
    gradient = net.module[0].weight.grad.clone()
    dist.broadcast(gradient, 0)
    assert torch.equal(gradient, net.module[0].weight.grad)
    mesh = init_device_mesh("cuda", (me.size,))
    shard = fully_shard(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(device), mesh=mesh)
    shard(torch.ones(2, 64, device=device)).sum().backward()
    assert all(parameter.grad is not None for parameter in shard.parameters())


def batches(me: Rank) -> None:
    """Both ranks send before they receive, far more than NCCL buffers."""
    device = start(me)
    other = (me.rank + 1) % me.size
    for size in (1, 1 << 24):
        sent, received = torch.full((size,), float(me.rank), device=device), torch.zeros(size, device=device)
        operations = [dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        assert (received == other).all()


@pytest.mark.parametrize("worker", [both_devices, reductions, movement, streams, training])
def test_one_rank(worker) -> None:
    run_ranks(worker, 1, deadline=120)


@pytest.mark.parametrize("worker", [both_devices, reductions, movement, streams, training, batches])
def test_two_ranks(pool: RankPool, worker) -> None:
    pool.run(worker, deadline=120)

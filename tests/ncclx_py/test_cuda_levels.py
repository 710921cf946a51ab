"""Plans of levels over true NCCL: four ranks share one GPU, and two NCCL host ids make two hosts of them.

Skipped where there is no CUDA device, and where NCCL is older than 2.30, which puts one rank at most on a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load

import ncclx_py

oracle = load(Path(__file__).with_name("oracle.py"), "oracle")
two_hosts = load(Path(__file__).with_name("test_two_hosts.py"), "two_hosts")

pytestmark = [pytest.mark.gpu, pytest.mark.dist]

SEVERAL_RANKS_PER_GPU = (2, 30)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    if torch.cuda.nccl.version() < SEVERAL_RANKS_PER_GPU:
        pytest.skip(f"four ranks on one GPU need NCCL 2.30; this is NCCL {torch.cuda.nccl.version()}")
    rules = tmp_path_factory.mktemp("rules") / "rules.toml"
    rules.write_text(two_hosts.RULES)
    with RankPool(4, env={"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCLX_RULES": str(rules)}) as ranks:
        yield ranks


def start(me: Rank) -> torch.device:
    host = f"host {me.rank // 2}"
    os.environ.update(NCCL_HOSTID=host, NCCLX_HOST_ID=host)
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    me.init()
    return device


def collectives(me: Rank) -> None:
    device, everyone = start(me), range(me.size)
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        for count in (1, 3, 1000, 300_001):
            blocks = [oracle.data(rank, (me.size * count,), dtype, count) for rank in everyone]
            total = oracle.reduced(blocks, "SUM")
            for op, check in (("SUM", oracle.same), ("AVG", oracle.close), ("MAX", oracle.same)):
                if op == "AVG" and not dtype.is_floating_point:
                    continue
                tensor = blocks[me.rank].to(device)
                dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
                assert check(tensor.cpu(), oracle.reduced(blocks, op)), (dtype, count, op)
            mine = blocks[me.rank].to(device)
            part = torch.zeros(count, dtype=dtype, device=device)
            dist.reduce_scatter_tensor(part, mine)
            assert oracle.same(part.cpu(), total.view(me.size, count)[me.rank])
            whole = torch.zeros_like(mine)
            dist.all_gather_into_tensor(whole, mine[:count])
            assert oracle.same(whole.cpu(), torch.cat([block[:count] for block in blocks]))
            dist.all_to_all_single(whole, mine)
            assert oracle.same(whole.cpu(), torch.cat([block.view(me.size, count)[me.rank] for block in blocks]))
    scaled = torch.ones(1000, device=device)
    dist.all_reduce(scaled, op=dist._make_nccl_premul_sum(0.5))
    assert (scaled == me.size * 0.5).all()
    splits = [[(source + 2 * target) % 3 for target in everyone] for source in everyone]
    received = [row[me.rank] for row in splits]
    output = torch.zeros(sum(received), 5, device=device)
    source = torch.full((sum(splits[me.rank]), 5), float(me.rank), device=device)
    dist.all_to_all_single(output, source, received, splits[me.rank])
    assert output[:, 0].tolist() == [float(rank) for rank in everyone for _ in range(received[rank])]
    used = {entry.collective: entry.algorithm for entry in ncclx_py.explain() if entry.collective in two_hosts.LEVELS}
    wanted = {name: two_hosts.LEVELS[name] for name in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")}
    assert used.items() >= wanted.items()


def streams(me: Rank) -> None:
    """Waiting orders this stream after all lanes; memory that was let go of is not reused too early; the CPU goes on."""
    device = start(me)
    for step in range(30):
        tensor = torch.full((1 << 20,), float(step + me.rank), device=device)
        whole = torch.zeros(me.size << 18, device=device)
        works = [dist.all_reduce(tensor, async_op=True)]
        works.append(
            dist.all_gather_into_tensor(whole, torch.full((1 << 18,), float(me.rank), device=device), async_op=True)
        )
        noise = [torch.full((1 << 20,), -1.0, device=device) for _ in range(4)]
        [work.wait() for work in works]
        assert (tensor == me.size * step + 6).all()
        assert (whole.view(me.size, -1)[:, -1] == torch.arange(4.0, device=device)).all()
        del noise
    strided = torch.full((512, 1024), float(me.rank), device=device)[:, ::2]
    value = dist.all_reduce(strided, op=dist.ReduceOp.AVG, async_op=True).get_future().wait()
    torch.cuda.synchronize()
    assert (value[0] == 1.5).all()
    assert (strided == 1.5).all()


def captured(me: Rank) -> None:
    """A plan inside a CUDA graph: its sub-groups must have been made before."""
    device = start(me)
    tensor = torch.ones(1 << 16, device=device)
    dist.all_reduce(tensor)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(tensor)
    for step in range(3):
        tensor.fill_(step + 1.0)
        graph.replay()
        torch.cuda.synchronize()
        assert (tensor == me.size * (step + 1)).all()


def trained(me: Rank) -> list[float]:
    device = start(me)
    torch.manual_seed(0)
    net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64).to(device), bucket_cap_mb=0.01)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for step in range(3):
        source = torch.randn(8, 64, generator=torch.Generator().manual_seed(10 * step + me.rank)).to(device)
        loss = net(source).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


@pytest.mark.parametrize("worker", [collectives, streams, captured])
def test_two_hosts_of_two(pool: RankPool, worker) -> None:
    pool.run(worker, deadline=200)


def test_training_agrees_between_ranks_and_learns(pool: RankPool) -> None:
    losses = pool.run(trained, deadline=200)
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][-1] < losses[0][0]

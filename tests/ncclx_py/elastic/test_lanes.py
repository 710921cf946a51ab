"""Lanes between replicas: sums in the order of the ids, to the bit; a member that dies or sleeps ends them in time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Rank, RankPool

from ncclx_py.elastic.journal import Journal
from ncclx_py.elastic.store import Store

pytestmark = pytest.mark.dist
IDS = [0, 2, 3, 7]  # of the replicas: neither dense nor the ranks of anything


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    server = Store(Journal(tmp_path / "journal"), "127.0.0.1", 0, "", lambda _: None)
    server.start()
    yield server
    server.close()


def contribution(replica: int, dtype: str, size: int):
    import torch

    generator = torch.Generator().manual_seed(replica)
    return (torch.randn(size, generator=generator) * 10.0 ** (replica % 3)).to(getattr(torch, dtype))


def connect(port: int, epoch: int, members: list[int], replica: int, backend: str, device: str = "cpu"):
    import torch

    from ncclx_py.elastic.client import Client
    from ncclx_py.elastic.lanes import Lane

    return Lane.connect(
        Client(f"127.0.0.1:{port}", 10.0),
        backend=backend,
        epoch=epoch,
        lane=0,
        members=members,
        replica=replica,
        timeout_s=20.0,
        device=torch.device(device),
    )


def sum_all(me: Rank, port: int, backend: str) -> None:
    import torch

    replica = IDS[me.rank]
    lane = connect(port, 1, IDS, replica, backend)
    for contributors in (IDS, [0, 3, 7], [2]):
        for dtype in ("float32", "bfloat16", "float64"):
            sizes = [1, 1000, 7]  # together no multiple of four
            mine = [contribution(replica + 100 * i, dtype, n) for i, n in enumerate(sizes)]
            lane.sum(mine, contributors)
            wide = torch.float64 if dtype == "float64" else torch.float32
            for i, n in enumerate(sizes):
                total = contribution(contributors[0] + 100 * i, dtype, n).to(wide)
                for other in contributors[1:]:
                    total = total + contribution(other + 100 * i, dtype, n).to(wide)
                assert torch.equal(mine[i], total.to(mine[i].dtype))
    said = lane.exchange(f"replica {replica}".encode() * replica)
    assert said == {other: f"replica {other}".encode() * other for other in IDS}


@pytest.mark.parametrize("backend", ["ncclx", "gloo"])
def test_sums_are_those_of_one_process_that_adds_in_order(store: Store, backend: str) -> None:
    with RankPool(4) as pool:
        pool.run(sum_all, store.port, backend)


def lose_one(me: Rank, port: int) -> None:
    import threading

    import torch

    replica = IDS[me.rank]
    lane = connect(port, 1, IDS, replica, "ncclx")
    lane.exchange(b"here")
    if replica == 7:
        os.kill(os.getpid(), 9)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        lane.sum([torch.ones(1000)], IDS)
    assert time.monotonic() - began < 10.0
    lane.abort()
    left = IDS[:-1]
    lane = connect(port, 2, left, replica, "ncclx")
    if replica == 3:  # asleep: what frees the others is the alarm that the epoch is over
        time.sleep(3.0)
        lane.abort()
    else:
        threading.Timer(0.5, lane.abort).start()
        with pytest.raises(RuntimeError):
            lane.sum([torch.ones(1000)], left)
    lane = connect(port, 3, left, replica, "ncclx")
    ones = torch.ones(5)
    lane.sum([ones], left)
    assert ones.tolist() == [3.0] * 5


def test_a_lane_ends_with_its_members_and_the_next_epoch_has_another(store: Store) -> None:
    with RankPool(4) as pool:
        pool.run(lose_one, store.port, dying=[3])


def sum_on_gpus(me: Rank, port: int, backend: str) -> None:
    import torch

    torch.cuda.set_device(me.rank)
    lane = connect(port, 1, [0, 1], me.rank, backend, device=f"cuda:{me.rank}")
    mine = [contribution(me.rank, "float32", 1000).cuda()]
    lane.sum(mine, [0, 1])
    assert torch.equal(mine[0].cpu(), contribution(0, "float32", 1000) + contribution(1, "float32", 1000))
    assert lane.exchange(bytes([me.rank])) == {0: b"\0", 1: b"\1"}
    if me.rank == 1:
        os.kill(os.getpid(), 9)
    import threading

    threading.Timer(1.0, lane.abort).start()  # what the heartbeat does when the epoch is over
    with pytest.raises(RuntimeError):
        lane.sum(mine, [0, 1])
    alone = connect(port, 2, [0], 0, backend, device="cuda:0")
    alone.sum(mine, [0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["ncclx", "nccl"])
def test_lanes_on_gpus_are_aborted_and_made_anew(store: Store, backend: str) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with RankPool(2) as pool:
        pool.run(sum_on_gpus, store.port, backend, dying=[1])

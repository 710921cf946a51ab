"""The handle of a collective: waiting, futures, handles that nobody keeps, and what a profiler sees."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool

import ncclx_py
from ncclx_py.runtime.work import CollectiveWork

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as ranks:
        yield ranks


def strided(value: float) -> torch.Tensor:
    return torch.full((4, 6), value)[:, ::2]


def asynchronous(me: Rank) -> None:
    me.init()
    tensors = [torch.full((3,), float(me.rank + step)) for step in range(20)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for step, work in reversed(list(enumerate(works))):
        assert isinstance(work, CollectiveWork)
        assert work.wait() is True
        assert work.wait() is True
        assert work.is_completed()
        assert work.is_success()
        assert work.exception() is None
        assert work.result()[0] is tensors[step]
        assert tensors[step].tolist() == [2.0 * step + 1] * 3


def test_async_works_complete_in_any_order_of_waiting(pool: RankPool) -> None:
    pool.run(asynchronous)


def futures(me: Rank) -> None:
    me.init()
    for op, make, expected in [
        (dist.ReduceOp.SUM, lambda: torch.full((4,), me.rank + 1.0), 3.0),
        (dist.ReduceOp.AVG, lambda: strided(me.rank + 1.0), 1.5),
    ]:
        tensor = make()
        work = dist.all_reduce(tensor, op=op, async_op=True)
        doubled = work.get_future().then(lambda future: future.value()[0] * 2)
        assert torch.equal(doubled.wait(), torch.full_like(tensor, 2 * expected))
        assert torch.equal(tensor, torch.full_like(tensor, expected))
        work.wait()
        assert torch.equal(tensor, torch.full_like(tensor, expected)), "the second wait divided again"
    gathered = [torch.zeros(2) for _ in range(2)]
    value = dist.all_gather(gathered, torch.full((2,), float(me.rank)), async_op=True).get_future().wait()
    assert [tensor.tolist() for tensor in value[0]] == [[0.0, 0.0], [1.0, 1.0]]
    assert dist.barrier(async_op=True).get_future().wait() == []
    output = torch.zeros(2)
    dist.reduce_scatter_tensor(output, torch.arange(4.0), async_op=True).get_future().wait()
    assert output.tolist() == [4.0 * me.rank, 4.0 * me.rank + 2.0]
    received = torch.zeros(2)
    send = dist.isend(torch.full((2,), float(me.rank)), 1 - me.rank)
    assert dist.irecv(received, 1 - me.rank).get_future().wait()[0].tolist() == [1.0 - me.rank] * 2
    send.get_future().wait()


def test_futures_hold_the_tensors(pool: RankPool) -> None:
    pool.run(futures)


def dropped(me: Rank) -> None:
    """Results arrive although nobody waits, also where a division and a copy follow the transfer."""
    me.init()
    summed, averaged, output = torch.ones(5), strided(me.rank + 1.0), torch.zeros(2)
    dist.all_reduce(summed, async_op=True)
    dist.all_reduce(averaged, op=dist.ReduceOp.AVG, async_op=True)
    dist.reduce_scatter_tensor(output, torch.ones(4), async_op=True)
    gc.collect()
    until = time.monotonic() + 10
    while not (summed[0] == 2 and averaged[-1, -1] == 1.5 and output[-1] == 2.0):
        assert time.monotonic() < until, (summed, averaged, output)
        time.sleep(0.01)
    store = me.store("dropped")
    if me.rank == 0:
        dist.isend(torch.arange(100_000.0), 1)  # gloo by itself loses the message of a dropped handle
        gc.collect()
        store.set("sent", "1")
    else:
        store.wait(["sent"])
        time.sleep(0.2)
        received = torch.zeros(100_000)
        dist.recv(received, 0)
        assert torch.equal(received, torch.arange(100_000.0))


def test_nobody_has_to_wait(pool: RankPool) -> None:
    pool.run(dropped)


def leaking(me: Rank) -> list[int]:
    me.init()
    handles, tensors = [], []
    for step in range(200):
        tensor = strided(1.0) if step % 2 else torch.ones(1000)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.AVG, async_op=True)
        handles.append(weakref.ref(work))
        tensors.append(weakref.ref(tensor))
        del work, tensor
    dist.barrier()
    dist.barrier()  # forgets what had completed by now
    gc.collect()
    return [sum(ref() is not None for ref in refs) for refs in (handles, tensors)]


def test_works_that_nobody_waits_for_do_not_pile_up(pool: RankPool) -> None:
    for alive in pool.run(leaking):
        assert max(alive) <= 2


def modes(me: Rank) -> None:
    """Steps after the transfer run on another thread; the modes of the calling thread must not matter."""
    me.init()
    with torch.inference_mode():
        tensor = strided(me.rank + 1.0)
        dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
        assert tensor[0, 0] == 1.5
        plain = torch.full((3,), me.rank + 1.0)
        dist.all_reduce(plain, op=dist.ReduceOp.AVG)
        assert plain[0] == 1.5
    parameter = torch.nn.Parameter(torch.full((6, 6), float(me.rank))[::2].t().contiguous().t())
    dist.broadcast(parameter, 1)
    assert (parameter == 1).all()
    dist.all_reduce(parameter, op=dist.ReduceOp.AVG)
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_inference_mode_and_parameters(pool: RankPool) -> None:
    pool.run(modes)


def impatient(me: Rank) -> str:
    me.init()
    store = me.store("impatient")
    if me.rank == 1:
        store.wait(["gave up"])
        dist.all_reduce(torch.ones(2))
        return ""
    tensor = torch.ones(2)
    work = dist.all_reduce(tensor, async_op=True)
    try:
        work.wait(timedelta(milliseconds=100))
    except ncclx_py.CollectiveTimeout as error:
        message = str(error)
    assert not work.is_completed()
    store.set("gave up", "1")
    work.wait()
    assert tensor.tolist() == [2.0, 2.0]
    return message


def test_a_wait_that_gives_up_leaves_the_collective_running(pool: RankPool) -> None:
    message = pool.run(impatient)[0]
    assert "all_reduce" in message
    assert "rank 0 of 2" in message
    assert "0.1 s" in message


def profiled(me: Rank) -> list[str]:
    me.init()
    with torch.profiler.profile() as profiler:
        dist.all_reduce(torch.ones(2))
        dist.all_gather_into_tensor(torch.zeros(4), torch.ones(2))
        net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        net(torch.ones(1, 2)).sum().backward()
        dist.barrier()
    return [f"{event.key} {event.count}" for event in profiler.key_averages() if event.key.startswith("ncclx::")]


def test_the_profiler_sees_collectives(pool: RankPool) -> None:
    seen = dict(line.split() for line in pool.run(profiled)[0])
    assert int(seen["ncclx::all_reduce"]) >= 2
    assert {"ncclx::all_gather_single", "ncclx::broadcast", "ncclx::barrier", "ncclx::all_gather"} <= seen.keys()


def overlapped(me: Rank) -> None:
    """Many groups and threads at once: nothing holds the GIL while it waits."""
    import threading

    me.init()
    groups = [dist.new_group() for _ in range(3)]
    failures = []

    def reduce_often(group: dist.ProcessGroup) -> None:
        for step in range(30):
            tensor = torch.full((1000,), float(step))
            dist.all_reduce(tensor, op=dist.ReduceOp.AVG, group=group)
            if not torch.equal(tensor, torch.full((1000,), float(step))):
                failures.append(step)

    threads = [threading.Thread(target=reduce_often, args=(group,)) for group in groups]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


def test_threads_use_groups_side_by_side(pool: RankPool) -> None:
    pool.run(overlapped)

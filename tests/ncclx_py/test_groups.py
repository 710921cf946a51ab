"""Groups: how they are made, named, split, configured and used by torch's own layers."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, run_ranks
from torch.distributed.device_mesh import init_device_mesh

from ncclx_py.runtime.process_group import NcclxProcessGroup

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=[2, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    with RankPool(request.param) as ranks:
        yield ranks


def opened(me: Rank) -> tuple[int, int, int]:
    """Descriptors before a group, in it and after it, with the garbage collector asleep."""
    me.init(fresh=True)
    total()
    me.leave()
    gc.collect()
    gc.disable()
    try:
        counts = [len(os.listdir("/proc/self/fd"))]
        me.init(fresh=True)
        total()
        counts.append(len(os.listdir("/proc/self/fd")))
        me.leave()
        counts.append(len(os.listdir("/proc/self/fd")))
    finally:
        gc.enable()
    return counts[0], counts[1], counts[2]


def test_a_destroyed_group_closes_its_connections_at_once(pool: RankPool) -> None:
    for before, during, after in pool.run(opened):
        assert before < during
        assert after <= before


def total(group: dist.ProcessGroup | None = None) -> float:
    tensor = torch.tensor([2.0 ** dist.get_rank()])
    dist.all_reduce(tensor, group=group)
    return tensor.item()


def identity(me: Rank) -> None:
    me.init()
    group = dist.group.WORLD
    assert isinstance(group, NcclxProcessGroup)
    assert dist.get_backend() == "ncclx"
    assert (dist.get_rank(), dist.get_world_size()) == (me.rank, me.size)
    assert (group.rank(), group.size(), group.name()) == (me.rank, me.size, "ncclx")
    assert group.group_name == dist.distributed_c10d._get_default_group().group_name != ""
    assert group._get_backend(torch.device("cpu")).name() == "gloo"
    with pytest.raises(RuntimeError, match="No backend type associated with device type xpu"):
        group._get_backend(torch.device("xpu"))
    group.get_group_store().set("key", "value")


def test_identity(pool: RankPool) -> None:
    pool.run(identity)


def subgroups(me: Rank) -> None:
    me.init()
    everyone = list(range(me.size))
    pairs = [dist.new_group([rank, (rank + 1) % me.size]) for rank in everyone]
    for rank, group in enumerate(pairs):
        if me.rank in (rank, (rank + 1) % me.size):
            assert isinstance(group, NcclxProcessGroup)
            assert total(group) == 2.0**rank + 2.0 ** ((rank + 1) % me.size)
    alone = dist.new_group([0], backend="ncclx", timeout=timedelta(seconds=9), group_desc="alone")
    if me.rank == 0:
        assert total(alone) == 1.0
        assert alone.group_desc == "alone"
    reversed_group = dist.new_group(everyone[::-1])
    received = torch.zeros(1)
    dist.broadcast(received if me.rank != me.size - 1 else torch.tensor([5.0]), src=me.size - 1, group=reversed_group)
    stock = dist.new_group(backend="gloo")
    assert not isinstance(stock, NcclxProcessGroup)
    assert total(stock) == total()
    for group in (*pairs, reversed_group, stock):
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    assert total() == 2.0**me.size - 1


def test_sub_groups_and_stock_groups_side_by_side(pool: RankPool) -> None:
    pool.run(subgroups)


def ours_inside_gloo(me: Rank) -> None:
    me.init("gloo", fresh=True)
    group = dist.new_group(backend="ncclx")
    assert isinstance(group, NcclxProcessGroup)
    assert total(group) == total() == 2.0**me.size - 1
    me.leave()


def test_a_group_of_ours_in_a_gloo_world(pool: RankPool) -> None:
    pool.run(ours_inside_gloo)


def spelled_out(me: Rank, backend: str) -> None:
    me.init(backend, fresh=True)
    assert isinstance(dist.group.WORLD, NcclxProcessGroup)
    assert total(dist.new_group()) == total() == 2.0**me.size - 1
    me.leave()


@pytest.mark.parametrize("backend", ["cpu:ncclx,cuda:ncclx", "cpu:ncclx", "cpu:gloo,cuda:ncclx"])
def test_backend_per_device_spellings(pool: RankPool, backend: str) -> None:
    pool.run(spelled_out, backend)


def objects(me: Rank) -> None:
    me.init()
    everyone = [{"rank": rank, "text": "ä" * rank} for rank in range(me.size)]
    gathered = [None] * me.size
    dist.all_gather_object(gathered, everyone[me.rank])
    assert gathered == everyone
    listed = [everyone[1], "x"] if me.rank == 1 else [None, None]
    dist.broadcast_object_list(listed, src=1)
    assert listed == [everyone[1], "x"]
    collected = [None] * me.size if me.rank == 0 else None
    dist.gather_object(everyone[me.rank], collected, dst=0)
    assert collected == (everyone if me.rank == 0 else None)
    mine = [None]
    dist.scatter_object_list(mine, everyone if me.rank == 0 else None, src=0)
    assert mine == [everyone[me.rank]]
    if me.rank == 0:
        dist.send_object_list(["hello"], dst=1)
    elif me.rank == 1:
        heard = [None]
        dist.recv_object_list(heard, src=0)
        assert heard == ["hello"]


def test_object_collectives(pool: RankPool) -> None:
    pool.run(objects)


def meshes(me: Rank) -> None:
    me.init()
    mesh = init_device_mesh("cpu", (1, me.size), mesh_dim_names=("outer", "inner"))
    assert total(mesh.get_group("inner")) == 2.0**me.size - 1
    assert total(mesh.get_group("outer")) == 2.0**me.rank
    assert mesh["inner"].get_local_rank() == me.rank


def test_device_mesh(pool: RankPool) -> None:
    pool.run(meshes)


def direct_calls(me: Rank) -> None:
    """The short forms that code written against process groups uses, and both generations of names."""
    me.init()
    group = dist.group.WORLD
    tensor = torch.ones(2)
    group.allreduce([tensor]).wait()
    group.allreduce(tensor, dist.ReduceOp.MAX).wait()
    assert tensor.tolist() == [me.size] * 2
    tensor = torch.full((2,), float(me.rank))
    group.broadcast(tensor, root=1).wait()
    assert tensor.tolist() == [1.0, 1.0]
    group.broadcast(tensor, 0).wait()
    group.reduce(tensor, root=0, op=dist.ReduceOp.SUM).wait()
    outputs = [torch.zeros(1) for _ in range(me.size)]
    group.allgather(outputs, torch.tensor([float(me.rank)])).wait()
    assert [output.item() for output in outputs] == list(range(me.size))
    for name in ("all_gather_single", "_allgather_base"):
        whole = torch.zeros(me.size)
        getattr(group, name)(whole, torch.tensor([float(me.rank)])).wait()
        assert whole.tolist() == list(range(me.size)), name
    for name in ("reduce_scatter_single", "_reduce_scatter_base"):
        part = torch.zeros(1)
        getattr(group, name)(part, torch.arange(float(me.size)), dist.ReduceScatterOptions()).wait()
        assert part.item() == me.rank * me.size, name
    for name in ("all_to_all_single", "alltoall_base"):
        whole = torch.zeros(me.size)
        getattr(group, name)(whole, torch.full((me.size,), float(me.rank)), [], []).wait()
        assert whole.tolist() == list(range(me.size)), name
    group.barrier().wait()
    group.barrier(timeout=timedelta(seconds=5)).wait()
    sequence = group._get_sequence_number_for_group()
    group.barrier().wait()
    assert group._get_sequence_number_for_group() == sequence + 1


def test_direct_calls_and_old_names(pool: RankPool) -> None:
    pool.run(direct_calls)


def new_timeout(me: Rank) -> str:
    import time

    me.init(fresh=True, timeout=timedelta(seconds=50))
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
    if me.rank:
        time.sleep(2)
        return ""
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        dist.all_reduce(torch.ones(1))
    assert time.monotonic() - start < 1.9
    return "late"


def test_the_timeout_can_be_changed(pool: RankPool) -> None:
    assert pool.run(new_timeout)[0] == "late"


def debugging(me: Rank) -> float:
    me.init()
    return total()


def test_torchs_debug_mode() -> None:
    assert run_ranks(debugging, 2, env={"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}) == [3.0, 3.0]

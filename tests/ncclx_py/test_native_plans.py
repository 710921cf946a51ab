"""Plans of library collectives on sub-groups, on real ranks with faked hosts: gloo stands in for NCCL, which needs a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.algorithms import native
from ncclx_py.plans.plan import Problem, Span
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Choice
from ncclx_py.plans.verify import verify
from ncclx_py.runtime.basis import Basis, Membership
from ncclx_py.runtime.native_plans import NativePlans, two_levels
from ncclx_py.runtime.settings import Settings

oracle = load(Path(__file__).with_name("oracle.py"), "oracle")

TIMEOUT = timedelta(seconds=30)
BLOCK, CYCLIC, MIXED = (0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 1, 0)
PLACEMENTS = [BLOCK, CYCLIC, MIXED]
SIX = [(0, 0, 1, 1, 2, 2), (0, 1, 2, 0, 1, 2), (0, 0, 0, 1, 1, 1), (0, 1, 1, 2, 0, 2)]


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


class Fixed:
    """A tuner that always answers the same."""

    def __init__(self, **choices: Choice) -> None:
        self._choices = choices

    def choose(self, problem: Problem, itemsize: int) -> Choice:
        return self._choices[problem.collective]

    def digest(self) -> str:
        return ""


LEVELS = Fixed(
    all_reduce=Choice("pipelined", {"chunks": 3}, "asked for"),
    reduce_scatter=Choice("hierarchical", {}, "asked for"),
    all_gather=Choice("hierarchical", {}, "asked for"),
    all_to_all=Choice("balanced", {}, "asked for"),
)


class Library:
    """gloo groups over one store; notes which were made."""

    def __init__(self, me: Rank, name: str) -> None:
        self.me, self.store = me, dist.PrefixStore(name, me.store("library"))
        self.made: list[tuple[str, tuple[int, ...]]] = []
        self.flat = self.group("flat", tuple(range(me.size)))
        self.made.clear()

    def group(self, name: str, ranks: tuple[int, ...]) -> Any:
        self.made.append((name, ranks))
        store = dist.PrefixStore(f"{name}/", self.store)
        return dist.ProcessGroupGloo(store, ranks.index(self.me.rank), len(ranks), TIMEOUT)

    def counts(self, sent: list[int], received: list[int], options: Any) -> tuple[tuple[int, ...], ...]:
        whole = torch.zeros(self.me.size * self.me.size, dtype=torch.int64)
        self.flat._allgather_base(whole, torch.tensor(sent)).wait()
        return tuple(map(tuple, whole.view(self.me.size, -1).tolist()))


def make(me: Rank, hosts: tuple[int, ...], tuner: Any = LEVELS, **settings: Any) -> tuple[NativePlans, Library]:
    library = Library(me, f"{hosts} {me.meetings}")
    me.meetings += 1
    member = Membership("g", me.rank, tuple(range(me.size)), world=True)
    basis = Basis(Topology(hosts), tuner, Settings(**settings), None)
    return NativePlans(library.flat, library.group, library.counts, basis, member), library


def options(kind: Any, op: Any = dist.ReduceOp.SUM) -> Any:
    made = kind()
    made.timeout = TIMEOUT
    if hasattr(made, "reduceOp"):
        made.reduceOp = op
    return made


def everything(me: Rank, hosts: tuple[int, ...]) -> list[str]:
    plans, library = make(me, hosts)
    assert library.made == []
    reductions(me, plans)
    movements(me, plans)
    exchanges(me, plans)
    assert all(len(ranks) > 1 for _, ranks in library.made)
    assert len(library.made) == 2, "a sub-group was made twice, or one that nobody needs"
    return [str(decision) for decision in plans.decisions.all()]


def reductions(me: Rank, plans: NativePlans) -> None:
    ops = dist.ReduceOp
    for count in (0, 1, 3, 17, 1000, 20011):
        for dtype, op in [
            (torch.float32, "SUM"),
            (torch.int64, "SUM"),
            (torch.int32, "MAX"),
            (torch.float32, "PRODUCT"),
        ]:
            everyone = [oracle.data(rank, (count,), dtype, op) for rank in range(me.size)]
            tensor = everyone[me.rank].clone()
            assert plans.allreduce([tensor], options(dist.AllreduceOptions, getattr(ops, op))).wait()
            assert oracle.same(tensor, oracle.reduced(everyone, op)), (count, dtype, op)
    tensor = torch.full((1000,), float(me.rank))
    plans.allreduce([tensor], options(dist.AllreduceOptions)).get_future().wait()
    assert (tensor == me.size * (me.size - 1) / 2).all()


def movements(me: Rank, plans: NativePlans) -> None:
    for count in (1, 5, 1000):
        everyone = [oracle.data(rank, (me.size * count,), torch.float32) for rank in range(me.size)]
        expected = oracle.reduced(everyone, "SUM").view(me.size, count)[me.rank]
        own, source = torch.zeros(count), everyone[me.rank].clone()
        plans._reduce_scatter_base(own, source, options(dist.ReduceScatterOptions)).wait()
        assert oracle.same(own, expected)
        assert oracle.same(source, everyone[me.rank]), "the input changed"
        inside = source[me.rank * count : (me.rank + 1) * count]
        plans._reduce_scatter_base(inside, source, options(dist.ReduceScatterOptions)).wait()
        assert oracle.same(inside, expected), "in place"
        blocks = [oracle.data(rank, (count,), torch.int32, "gather") for rank in range(me.size)]
        whole = torch.zeros(me.size * count, dtype=torch.int32)
        plans._allgather_base(whole, blocks[me.rank], options(AllgatherOptions)).wait()
        assert oracle.same(whole, torch.cat(blocks))
        whole.zero_()
        inside = whole[me.rank * count : (me.rank + 1) * count]
        inside.copy_(blocks[me.rank])
        plans._allgather_base(whole, inside, options(AllgatherOptions)).wait()
        assert oracle.same(whole, torch.cat(blocks)), "in place"


def exchanges(me: Rank, plans: NativePlans) -> None:
    uneven = [[(3 * source + target) % 4 * 7 for target in range(me.size)] for source in range(me.size)]
    skewed = [[100 if source == 1 else 0 for target in range(me.size)] for source in range(me.size)]
    for counts in (uneven, skewed, [[5] * me.size] * me.size):
        pieces = [
            [torch.arange(count) + 1000 * source + 100_000 * target for target, count in enumerate(row)]
            for source, row in enumerate(counts)
        ]
        received = [row[me.rank] for row in counts]
        output = torch.zeros(sum(received), dtype=torch.int64)
        sent = counts[me.rank]
        plans.alltoall_base(output, torch.cat(pieces[me.rank]), received, sent, options(AllToAllOptions)).wait()
        assert torch.equal(output, torch.cat([row[me.rank] for row in pieces]))
    output.zero_()
    plans.alltoall_base(output, torch.cat(pieces[me.rank]), [], [], options(AllToAllOptions)).wait()
    assert torch.equal(output, torch.cat([row[me.rank] for row in pieces]))
    whole = torch.cat(pieces[me.rank])  # even, as counts were last
    plans.alltoall_base(whole, whole, [], [], options(AllToAllOptions)).wait()
    assert torch.equal(whole, output), "in place"


@pytest.mark.dist
@pytest.mark.parametrize("hosts", PLACEMENTS, ids=["block", "cyclic", "mixed"])
def test_two_hosts(pool: RankPool, hosts: tuple[int, ...]) -> None:
    lines = pool.run(everything, hosts, deadline=120)[0]
    assert any("pipelined chunks=3 (asked for)" in line for line in lines)
    assert any("all_to_all" in line and "two_level" in line for line in lines)


@pytest.mark.dist
def test_three_hosts_and_hosts_of_three() -> None:
    with RankPool(6) as six:
        for hosts in SIX:
            six.run(everything, hosts, deadline=120)


def uneven_hosts(me: Rank) -> str:
    plans, library = make(me, (0, 0, 0, 1))
    tensor = torch.ones(100)
    plans.allreduce([tensor], options(dist.AllreduceOptions)).wait()
    assert (tensor == me.size).all()
    source, output = torch.full((10,), float(me.rank)), torch.zeros(sum(range(me.size + 1)))
    sent = [me.rank + 1] * me.size
    expects = [rank + 1 for rank in range(me.size)]
    source = torch.full((sum(sent),), float(me.rank))
    plans.alltoall_base(output, source, expects, sent, options(AllToAllOptions)).wait()
    assert output.tolist() == [float(rank) for rank in range(me.size) for _ in range(rank + 1)]
    assert library.made == []
    return str(plans.decisions.all()[0])


@pytest.mark.dist
def test_uneven_hosts_take_the_flat_collective_for_a_stated_reason(pool: RankPool) -> None:
    for line in pool.run(uneven_hosts):
        assert "flat (hosts hold unequal numbers of ranks, 1 to 3; pipelined would be chosen otherwise)" in line


def broken_plan(me: Rank) -> str:
    original = native.NATIVE["all_reduce"]["pipelined"]

    def drops_a_step(problem: Problem, topology: Topology, rank: int, chunks: int) -> Any:
        plan = original.build(problem, topology, rank, chunks)
        return type(plan)(plan.rank, plan.steps[1:], plan.scratch)

    native.NATIVE["all_reduce"]["pipelined"] = type(original)("pipelined", "all_reduce", drops_a_step, {"chunks": 3})
    try:
        plans, library = make(me, BLOCK)
        tensor = torch.ones(100)
        with pytest.raises(CollectiveError, match="failed its verification and was not run") as caught:
            plans.allreduce([tensor], options(dist.AllreduceOptions))
    finally:
        native.NATIVE["all_reduce"]["pipelined"] = original
    assert library.made == []
    assert (tensor == 1).all()
    return str(caught.value)


@pytest.mark.dist
def test_a_wrong_plan_moves_nothing(pool: RankPool) -> None:
    assert all("rank " in message for message in pool.run(broken_plan))


def detected(me: Rank, hosts: list[str]) -> tuple[int, ...] | None:
    library = Library(me, f"detected {hosts}")
    member = Membership("g", me.rank, tuple(range(me.size)), world=True)
    env = {"NCCLX_HOST_ID": hosts[me.rank]}
    plans = two_levels(library.store, member, TIMEOUT, env, library.flat, library.group, library.counts)
    return plans._basis.topology.host_of if plans is not None else None


@pytest.mark.dist
def test_a_group_on_one_host_has_no_plans_of_levels(pool: RankPool) -> None:
    assert pool.run(detected, ["a"] * 4) == [None] * 4
    assert pool.run(detected, ["b", "a", "b", "a"]) == [(0, 1, 0, 1)] * 4


@pytest.mark.unit
@pytest.mark.parametrize("hosts", [*PLACEMENTS, *SIX, (0,) * 4 + (1,) * 4, (0, 1) * 4])
def test_plans_are_verified_for_every_placement(hosts: tuple[int, ...]) -> None:
    topology, size = Topology(hosts), len(hosts)
    for count in (0, 1, 2, 5, 63, 4097):
        for chunks in (1, 2, 7):
            verify(native.build_native(Problem("all_reduce", size, count), topology, "pipelined", {"chunks": chunks}))
        for collective in ("reduce_scatter", "all_gather"):
            problem = Problem(collective, size, counts=(count,) * size)
            verify(native.build_native(problem, topology, "hierarchical"), topology)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        counts = torch.randint(0, 4, (size, size), generator=generator).tolist()
        problem = Problem("all_to_all", size, matrix=tuple(map(tuple, counts)))
        verify(native.build_native(problem, topology, "two_level"), topology)


@pytest.mark.unit
def test_all_to_all_sends_one_message_per_host_along_a_rail() -> None:
    """Four hosts of two: three messages leave each host per rank, and they add up to what is for other hosts."""
    topology = Topology(tuple(rank // 2 for rank in range(8)))
    plan = native.build_native_rank(Problem("all_to_all", 8, matrix=((5,) * 8,) * 8), topology, "two_level", 3)
    between = [step.src for step in plan.steps if step.op == "send" and step.level == "inter"]
    assert [span.length for span in between if isinstance(span, Span)] == [10, 10, 10]

"""Collectives as plans, on real ranks: what is chosen and told, what is refused before a byte moves, what ranks disagree on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load

import ncclx_py
from ncclx_py import CollectiveError
from ncclx_py.plans.algorithms import registry
from ncclx_py.plans.aliasing import survives
from ncclx_py.plans.files import write_plan
from ncclx_py.plans.plan import Plan, Problem, Program, RankPlan, Span
from ncclx_py.plans.topology import Topology
from ncclx_py.runtime import engine

oracle = load(Path(__file__).with_name("oracle.py"), "oracle")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3) as ranks:
        yield ranks


@contextmanager
def variables(**values: str | None) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    try:
        for name, value in values.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def refused(me: Rank, store: str, **values: str) -> str:
    """The error of making a group under these variables."""
    me.leave()
    with variables(**values), pytest.raises(CollectiveError) as caught:
        dist.init_process_group(
            "ncclx", store=me.store(store), rank=me.rank, world_size=me.size, timeout=timedelta(seconds=20)
        )
    return str(caught.value)


# Decisions


def decisions(me: Rank) -> list[str]:
    me.init(fresh=True)
    for count in (10, 10, 10_000):
        dist.all_reduce(torch.ones(count))
    dist.broadcast(torch.ones(10), 1)
    dist.all_to_all_single(torch.zeros(me.size), torch.ones(me.size), [1] * me.size, [1] * me.size)
    found = ncclx_py.explain()
    assert [entry.collective for entry in found] == [
        "all_reduce",
        "all_reduce",
        "broadcast",
        "counts of all_to_all",
        "all_to_all",
    ]
    assert [entry.calls for entry in found] == [2, 1, 1, 1, 1]
    assert [entry.bytes for entry in found][:3] == [40, 40_000, 40]
    for entry in found:
        assert entry.algorithm in registry.names(registry_name(entry.collective))
        assert entry.reason
        assert entry.bound_s > 0
        assert entry.predicted_s > 0
    with pytest.raises(TypeError, match="not one of the backend 'ncclx'"):
        ncclx_py.explain(dist.new_group(backend="gloo"))
    return [str(entry) for entry in found]


def registry_name(collective: str) -> str:
    return "all_gather" if collective == "counts of all_to_all" else collective


@pytest.mark.dist
def test_every_decision_can_be_asked_for(pool: RankPool) -> None:
    lines = pool.run(decisions)
    assert lines[0] == lines[1] == lines[2], "ranks decided differently"
    assert lines[0][0].startswith("all_reduce of 40 B: ")


def talkative(me: Rank) -> str:
    with variables(NCCLX_LOG="1"):
        me.init(fresh=True)
        for _ in range(3):
            dist.all_reduce(torch.ones(12345))
    me.leave()
    return ""


@pytest.mark.dist
def test_decisions_are_printed_once_by_rank_0(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RankPool(2) as two:
        two.run(talkative)
        assert two._folder is not None
        outputs = [(two._folder / f"output-{rank}.txt").read_text() for rank in range(2)]
    assert outputs[0].count("all_reduce of 48.2 KiB: ") == 1
    assert "ncclx: group '" in outputs[0]
    assert "all_reduce of" not in outputs[1]


def forced(me: Rank, choice: str) -> str:
    with variables(NCCLX_ALGO=choice):
        me.init(fresh=True)
        tensor = oracle.data(me.rank, (1001,), torch.float32)
        dist.all_reduce(tensor)
    expected = oracle.reduced([oracle.data(rank, (1001,), torch.float32) for rank in range(me.size)], "SUM")
    assert oracle.same(tensor, expected)
    return ncclx_py.explain()[0].algorithm


@pytest.mark.dist
@pytest.mark.parametrize("name", ["ring", "halving_doubling", "double_tree", "ordered"])
def test_an_algorithm_can_be_forced(pool: RankPool, name: str) -> None:
    assert pool.run(forced, f"all_reduce={name}") == [name] * 3


def in_order(me: Rank) -> None:
    """Sums whose value depends on the order: it must be that of ranks, on every rank, at every size."""
    torch.use_deterministic_algorithms(True)
    try:
        me.init(fresh=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for count in (1, 7, 5000):
        everyone = [
            torch.randn(count, generator=torch.Generator().manual_seed(rank)) * 10**rank for rank in range(me.size)
        ]
        expected = everyone[0].clone()
        for other in everyone[1:]:
            expected += other
        tensor = everyone[me.rank].clone()
        dist.all_reduce(tensor)
        assert torch.equal(tensor, expected)
    assert {entry.algorithm for entry in ncclx_py.explain()} == {"ordered"}


@pytest.mark.dist
def test_deterministic_reductions_follow_the_order_of_ranks(pool: RankPool) -> None:
    pool.run(in_order)


def long_vectors(me: Rank) -> None:
    me.init(fresh=True)
    count = engine.SLICE // 4 + 1000
    ramp = torch.arange(count, dtype=torch.float32) % 1000
    for root in (None, 1):
        tensor = ramp + me.rank
        dist.all_reduce(tensor) if root is None else dist.reduce(tensor, root)
        expected = 3 * ramp + 3 if root in (None, me.rank) else ramp + me.rank
        assert torch.equal(tensor, expected)
    tensor = ramp + me.rank
    dist.broadcast(tensor, 2)
    assert torch.equal(tensor, ramp + 2)
    assert max(entry.bytes for entry in ncclx_py.explain()) == engine.SLICE


@pytest.mark.dist
def test_long_vectors_run_in_slices_inside_a_host(pool: RankPool) -> None:
    pool.run(long_vectors)


def halves(me: Rank) -> None:
    """256 + 1 is 256 in bfloat16: rounding after each step loses both ones."""
    with variables(NCCLX_ALGO="reduce_scatter=direct,all_reduce=direct"):
        me.init(fresh=True)
    tensor = torch.full((3 * 500,), 256.0 if me.rank == 0 else 1.0, dtype=torch.bfloat16)
    part = torch.zeros(500, dtype=torch.bfloat16)
    dist.reduce_scatter_tensor(part, tensor)
    dist.all_reduce(tensor)
    assert (part == 258).all()
    assert (tensor == 258).all()


@pytest.mark.dist
def test_half_precision_is_rounded_once_inside_a_host(pool: RankPool) -> None:
    pool.run(halves)


# What is refused


def different_settings(me: Rank) -> list[str]:
    mine = {"NCCLX_VERIFY": "never"} if me.rank == 1 else {}
    first = refused(me, "verify differs", **mine)
    mine = {"NCCLX_ALGO": "all_reduce=ring"} if me.rank == 2 else {}
    second = refused(me, "algo differs", **mine)
    mine = {"NCCLX_VERIFY": "sometimes"} if me.rank == 1 else {}
    third = refused(me, "bad value", **mine)
    return [first, second, third]


@pytest.mark.dist
def test_ranks_that_disagree_are_named_with_the_variable(pool: RankPool) -> None:
    for first, second, third in pool.run(different_settings):
        assert "disagree about NCCLX_VERIFY: ranks 0, 2 have first; ranks 1 have never" in first
        assert "NCCLX_ALGO" in second
        assert "ranks 0, 1 have" in second
        assert "rank 1 reports: NCCLX_VERIFY='sometimes' is none of first, always, never" in third


def spoilt(build: Callable[..., RankPlan]) -> Callable[..., RankPlan]:
    """An algorithm that leaves out the last step of rank 1."""

    def wrong(problem: Problem, topology: Topology, rank: int, **parameters: int) -> RankPlan:
        plan = build(problem, topology, rank, **parameters)
        return RankPlan(plan.rank, plan.steps[:-1], plan.scratch) if rank == 1 else plan

    return wrong


def wrong_algorithm(me: Rank, verify: str) -> str:
    original = registry.ALGORITHMS["all_reduce"]["ring"]
    registry.ALGORITHMS["all_reduce"]["ring"] = registry.Algorithm("ring", "all_reduce", spoilt(original.build))
    try:
        with variables(NCCLX_ALGO="all_reduce=ring", NCCLX_VERIFY=verify):
            me.init(fresh=True)
            tensor = torch.full((60,), float(me.rank))
            with pytest.raises(CollectiveError) as caught:
                dist.all_reduce(tensor)
    finally:
        registry.ALGORITHMS["all_reduce"]["ring"] = original
    assert (tensor == me.rank).all(), "bytes were moved"
    whole = torch.zeros(me.size)
    dist.all_gather_into_tensor(whole, torch.full((1,), float(me.rank)))  # the group still works
    assert whole.tolist() == [0.0, 1.0, 2.0]
    return str(caught.value)


@pytest.mark.dist
@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_wrong_plan_is_refused_on_every_rank_before_a_byte_moves(pool: RankPool, verify: str) -> None:
    for rank, message in enumerate(pool.run(wrong_algorithm, verify)):
        assert f"rank {rank} of 3" in message
        assert "ring" in message
        assert "failed its verification and was not run" in message
        assert "rank 1" in message or "rank 2" in message  # what is wrong, and where


def counted_verifications(me: Rank, verify: str) -> int:
    """How often this rank verifies, for two groups that run the same plan."""
    counts, original = [], engine.verify

    def counting(plan: Plan, topology: Topology) -> None:
        counts.append(plan)
        original(plan, topology)

    engine.verify = counting
    try:
        for _ in range(2):
            with variables(NCCLX_ALGO="all_reduce=double_tree(chunks=3)", NCCLX_VERIFY=verify):
                me.init(fresh=True)
            tensor = torch.full((777,), me.rank + 1.0)
            dist.all_reduce(tensor)
            assert (tensor == 6).all()
    finally:
        engine.verify = original
    return len(counts)


@pytest.mark.dist
def test_a_plan_is_verified_once_in_the_process_of_rank_0(pool: RankPool) -> None:
    assert pool.run(counted_verifications, "first") == [1, 0, 0]
    assert pool.run(counted_verifications, "always") == [2, 0, 0]
    assert pool.run(counted_verifications, "never") == [0, 0, 0]


def star(size: int, count: int) -> Plan:
    """Everyone gives to rank 0, which hands out: no algorithm of ours."""
    data, ranks = Span("data", 0, count), []
    for rank in range(size):
        program = Program(rank)
        for peer in range(1, size) if rank == 0 else []:
            program.reduce(data, peer)
        for peer in range(1, size) if rank == 0 else []:
            program.send(data, peer)
        if rank:
            program.send(data, 0)
            program.recv(data, 0)
        ranks.append(program.finish())
    return Plan(Problem("all_reduce", size, count), "star", tuple(ranks))


def from_a_file(me: Rank) -> None:
    path = me.folder / "star.json"
    if me.rank == 0:
        write_plan(star(me.size, 50), path)
    me.init()
    dist.barrier()
    with variables(NCCLX_PLAN=str(path)):
        me.init(fresh=True)
        for count in (50, 51):
            tensor = torch.full((count,), me.rank + 1.0)
            dist.all_reduce(tensor)
            assert (tensor == 6).all()
        part = dist.new_group([0, 1])  # for which the file has no plan
        if me.rank < 2:
            dist.all_reduce(torch.ones(50), group=part)
            assert ncclx_py.explain(part)[0].algorithm != "star"
    algorithms = [(entry.bytes, entry.algorithm) for entry in ncclx_py.explain()]
    assert algorithms[0] == (200, "star")
    assert algorithms[1] != (204, "star")
    assert "NCCLX_PLAN" in ncclx_py.explain()[0].reason


@pytest.mark.dist
def test_a_plan_file_is_used_for_its_problem(pool: RankPool) -> None:
    pool.run(from_a_file)


def from_wrong_files(me: Rank) -> list[str]:
    plan = star(me.size, 50)
    lame = Plan(plan.problem, "lame", (RankPlan(0, plan.ranks[0].steps[1:]), *plan.ranks[1:]))
    plans = {"lame": lame, "small": star(2, 50)}
    texts = []
    for name, wrong in plans.items():
        path = me.folder / f"{name}-{me.rank}.json"
        write_plan(wrong, path)
        texts.append(refused(me, name, NCCLX_PLAN=str(path)))
    path = me.folder / f"torn-{me.rank}.json"
    path.write_text('{"schema": "ncclx plan 1", "ranks": [')
    texts.append(refused(me, "torn", NCCLX_PLAN=str(path)))
    texts.append(refused(me, "none", NCCLX_PLAN=str(me.folder / "none.json")))
    return texts


@pytest.mark.dist
def test_a_plan_file_that_is_wrong_is_refused_when_the_group_is_made(pool: RankPool) -> None:
    for lame, small, torn, missing in pool.run(from_wrong_files):
        assert "NCCLX_PLAN: " in lame
        assert "lame-0.json: the plan is wrong: rank 0" in lame
        assert "small-0.json: the plan is for 2 ranks; this group has 3" in small
        assert "torn-0.json" in torn
        assert "none.json cannot be read" in missing


MISMATCHES: dict[str, Callable[[int], Any]] = {
    "sizes": lambda rank: dist.all_reduce(torch.ones(1000 + rank // 2)),
    "dtypes": lambda rank: dist.all_reduce(torch.ones(1000, dtype=torch.float64 if rank == 2 else torch.float32)),
    "reductions": lambda rank: dist.all_reduce(torch.ones(1000), dist.ReduceOp.MAX if rank == 2 else dist.ReduceOp.SUM),
    "roots": lambda rank: dist.broadcast(torch.ones(1000), rank // 2),
    "collectives": lambda rank: dist.barrier() if rank == 2 else dist.all_reduce(torch.ones(1000)),
    "known sizes": lambda rank: dist.all_reduce(torch.ones(7 if rank == 2 else 8)),
}


def mismatched(me: Rank, name: str) -> tuple[str, float]:
    me.init(fresh=True, timeout=timedelta(seconds=60))
    for count in (7, 8):
        dist.all_reduce(torch.ones(count))
    start = time.monotonic()

    def both() -> None:
        MISMATCHES[name](me.rank)
        dist.barrier()  # the root of a broadcast learns nothing from it

    with pytest.raises(CollectiveError) as caught:
        both()
    dist.destroy_process_group()
    return str(caught.value), time.monotonic() - start


@pytest.mark.dist
@pytest.mark.parametrize("name", MISMATCHES)
def test_ranks_that_call_differently_find_out_and_are_named(pool: RankPool, name: str) -> None:
    answers = pool.run(mismatched, name, deadline=50)
    assert max(seconds for _, seconds in answers) < 30
    messages = [message for message, _ in answers]
    assert any("called" in message and "this rank called" in message for message in messages), messages
    assert all("rank " in message for message in messages)


def split_sizes(me: Rank) -> str:
    me.init(fresh=True)
    expects = [2] * me.size
    if me.rank == 2:
        expects[0] = 3
    with pytest.raises(CollectiveError) as caught:
        dist.all_to_all_single(torch.zeros(sum(expects)), torch.ones(2 * me.size), expects, [2] * me.size)
    dist.barrier()  # the group still works
    return str(caught.value)


@pytest.mark.dist
def test_split_sizes_that_do_not_fit_are_refused_on_every_rank(pool: RankPool) -> None:
    for message in pool.run(split_sizes):
        assert "rank 0 sends 2 elements to rank 2, which expects 3" in message


# Memory


def in_a_window(me: Rank) -> None:
    me.init(fresh=True)
    source = ncclx_py.empty((300, 7))
    assert source.shape == (300, 7)
    assert source.dtype == torch.get_default_dtype()
    source.fill_(me.rank + 1.0)
    dist.all_reduce(source)
    assert (source == 6).all()
    whole, part = ncclx_py.empty(3 * 5, torch.int64), torch.full((5,), me.rank)
    dist.all_gather_into_tensor(whole, part)
    assert whole.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    kept = source * 2
    del source, whole
    me.leave()
    assert (kept == 12).all()


@pytest.mark.dist
def test_tensors_in_the_window(pool: RankPool) -> None:
    pool.run(in_a_window)


def overlapping(me: Rank) -> None:
    """Output inside input and the other way round, at every offset that torch allows, for every algorithm."""
    for name in ("direct", "ring", "ordered"):
        with variables(NCCLX_ALGO=f"reduce_scatter={name}"):
            me.init(fresh=True)
        whole = oracle.data(me.rank, (3 * 40,), torch.float32)
        mine = whole[me.rank * 40 : (me.rank + 1) * 40]
        everyone = [oracle.data(rank, (3 * 40,), torch.float32) for rank in range(3)]
        dist.reduce_scatter_tensor(mine, whole)
        assert oracle.same(mine, oracle.reduced(everyone, "SUM")[me.rank * 40 : (me.rank + 1) * 40]), name
    for name in ("direct", "ring", "bruck"):
        with variables(NCCLX_ALGO=f"all_gather={name}"):
            me.init(fresh=True)
        blocks = [oracle.data(rank, (40,), torch.float32) for rank in range(3)]
        whole = torch.zeros(3 * 40)
        mine = whole[me.rank * 40 : (me.rank + 1) * 40]
        mine.copy_(blocks[me.rank])
        dist.all_gather_into_tensor(whole, mine)
        assert oracle.same(whole, torch.cat(blocks)), name
    both = torch.arange(3.0) + 10 * me.rank
    dist.all_to_all_single(both, both)
    assert both.tolist() == [me.rank, 10.0 + me.rank, 20.0 + me.rank]


@pytest.mark.dist
def test_overlapping_buffers_with_every_algorithm(pool: RankPool) -> None:
    pool.run(overlapping)


@pytest.mark.unit
def test_which_overlaps_a_plan_survives() -> None:
    program = Program(0)
    program.send(Span("input", 0, 4), 1)
    program.copy(Span("input", 4, 8), Span("output", 0, 4))
    program.reduce(Span("output", 0, 4), 1)
    plan = program.finish()
    assert survives(plan, 4)  # the copy is of elements onto themselves, and comes before what changes them
    assert not survives(plan, 0)  # the copy overwrites what the send may still read
    assert not survives(plan, 2)
    assert survives(plan, 8)
    program = Program(0)
    program.recv(Span("output", 0, 4), 1)
    program.send(Span("input", 0, 4), 1)
    assert not survives(program.finish(), 0)  # sends what has just arrived

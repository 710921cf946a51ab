"""Every algorithm: verified over random worlds, run by brute force, and measured against what it promises to move."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from harness import load

from ncclx_py.plans.algorithms.registry import ALGORITHMS, build, build_rank, names
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import INTER, Plan, Problem
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.verify import verify

brute = load(Path(__file__).with_name("brute.py"), "plan_brute")
cases = load(Path(__file__).with_name("cases.py"), "plan_cases")

pytestmark = pytest.mark.unit

SHAPES = {"2x4": [4, 4], "4x2": [2] * 4, "3x3": [3] * 3, "3+1": [3, 1], "1+2+4": [1, 2, 4], "8x1": [1] * 8}


def topology(sizes: list[int], placement: str = "block") -> Topology:
    found = cases.placed(random.Random(5), sizes, placement)
    return Topology(found.host_of)


def crossing(plan: Plan, topology: Topology) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """Elements that leave and that enter each (host, rail)."""
    out: Counter[tuple[int, int]] = Counter()
    into: Counter[tuple[int, int]] = Counter()
    for rank_plan in plan.ranks:
        for step in rank_plan.steps:
            if step.op == "send" and step.level == INTER:
                assert step.src is not None
                assert step.peer is not None
                out[topology.host_of[rank_plan.rank], topology.rail(rank_plan.rank)] += step.src.length
                into[topology.host_of[step.peer], topology.rail(step.peer)] += step.src.length
    return out, into


def by_host(counter: Counter[tuple[int, int]]) -> dict[int, int]:
    total: dict[int, int] = defaultdict(int)
    for (host, _), elements in counter.items():
        total[host] += elements
    return dict(total)


@pytest.mark.parametrize("seed", range(4))
def test_every_algorithm_is_verified_over_random_worlds(seed: int) -> None:
    seen = set()
    for case in cases.cases(seed, 5):
        verify(build(case.problem, case.topology, case.algorithm.name, case.parameters), case.topology)
        seen.add((case.problem.collective, case.algorithm.name))
    most = {(collective, name) for collective in ALGORITHMS for name in names(collective)}
    assert len(most - seen) <= 3  # those for a power of two or a uniform matrix may not have come up


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 13, 33, 64])
def test_every_algorithm_at_this_world_size(size: int) -> None:
    for case in cases.cases(size, 1 if size > 16 else 3, worlds=[size]):
        verify(build(case.problem, case.topology, case.algorithm.name, case.parameters), case.topology)


@pytest.mark.parametrize("seed", range(4))
def test_every_algorithm_computes_the_right_numbers_in_any_order(seed: int) -> None:
    random_ = random.Random(seed)
    for case in cases.cases(seed, 6, worlds=[1, 2, 3, 4, 5, 6, 8, 9], largest=64):
        plan = build(case.problem, case.topology, case.algorithm.name, case.parameters)
        assert all(brute.is_right(plan, random_) for _ in range(2)), case


@pytest.mark.parametrize("name", names("all_reduce"))
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_all_ranks_end_with_the_same_bits(name: str, sizes: list[int]) -> None:
    """With an addition that depends on the grouping (as that of floats does), all ranks still agree."""
    problem = Problem("all_reduce", sum(sizes), count=37)
    plan = build(problem, topology(sizes, "any"), name)
    memories = [
        {"data": [f"{rank}" for _ in range(37)], "scratch": ["?"] * plan.ranks[rank].scratch}
        for rank in range(problem.size)
    ]
    brute.execute(plan, memories, random.Random(1), lambda a, b: "(" + "+".join(sorted((a, b))) + ")")
    assert all(memory["data"] == memories[0]["data"] for memory in memories)


@pytest.mark.parametrize("placement", ["block", "cyclic", "any"])
@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter"])
def test_ordered_adds_in_the_order_of_ranks_on_any_topology(collective: str, placement: str) -> None:
    for sizes in SHAPES.values():
        size = sum(sizes)
        problem = Problem(collective, size, count=29, counts=(5, 0, *[3] * (size - 2)))
        plan = build(problem, topology(sizes, placement), "ordered")
        memories = brute.memories_for(problem, [rank_plan.scratch for rank_plan in plan.ranks], random.Random(2))
        for rank, memory in enumerate(memories):
            name = "data" if collective == "all_reduce" else "input"
            memory[name] = [str(rank)] * len(memory[name])
        brute.execute(plan, memories, random.Random(3), lambda a, b: f"({a}+{b})")
        folded = "0"
        for rank in range(1, size):
            folded = f"({folded}+{rank})"
        assert {element for memory in memories for element in brute.result(problem, memory)} == {folded}


@pytest.mark.parametrize("placement", ["block", "cyclic", "any"])
@pytest.mark.parametrize("name", ["hierarchical", "pipelined"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_two_level_all_reduce_meets_the_node_cut_bound(sizes: list[int], name: str, placement: str) -> None:
    """2(N − 1)/N of the vector leaves and enters each host: exactly where it divides."""
    hosts, ranks = len(sizes), topology(sizes, placement)
    count = hosts * 16 * 48 * max(sizes) * 8
    plan = build(Problem("all_reduce", sum(sizes), count=count), ranks, name)
    out, into = crossing(plan, ranks)
    assert by_host(out) == by_host(into) == dict.fromkeys(range(hosts), 2 * (hosts - 1) * count // hosts)


def test_shares_are_in_proportion_to_the_slowest_nic_of_each_rail() -> None:
    nics = ((4e8, 1e8, 4e8, 1e8), (2e8, 4e8, 4e8, 4e8))
    ranks = Topology((0, 0, 0, 0, 1, 1, 1, 1), rails=4, nics=nics)
    count = 1 << 20
    out, _ = crossing(build(Problem("all_reduce", 8, count=count), ranks, "pipelined"), ranks)
    for host in (0, 1):
        shares = [out[host, rail] / count for rail in range(4)]
        assert shares == pytest.approx([2 / 8, 1 / 8, 4 / 8, 1 / 8], abs=0.002)


def test_ranks_that_share_a_nic_share_its_part() -> None:
    """Local ranks 0 and 2 are on the first of two equal rails: all three columns alike would make it the slow one."""
    ranks = Topology((0, 0, 0, 1, 1, 1), rails=2, nics=((1e8, 1e8), (1e8, 1e8)))
    out, into = crossing(build(Problem("all_reduce", 6, count=1 << 16), ranks, "hierarchical"), ranks)
    assert set(out.values()) == set(into.values()) == {1 << 15}


@pytest.mark.parametrize("placement", ["block", "cyclic", "any"])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES)
def test_two_level_halves_cross_once(sizes: list[int], placement: str) -> None:
    """Into each host comes: in reduce-scatter N − 1 partials of its blocks, in all-gather every foreign block once."""
    ranks = topology(sizes, placement)
    counts = tuple(10 + rank for rank in range(ranks.size))
    held = [sum(counts[rank] for rank in host) for host in ranks.hosts]
    hosts, total = len(sizes), sum(counts)
    _, into = crossing(build(Problem("reduce_scatter", ranks.size, counts=counts), ranks, "hierarchical"), ranks)
    assert by_host(into) == {host: (hosts - 1) * held[host] for host in range(hosts)}
    _, into = crossing(build(Problem("all_gather", ranks.size, counts=counts), ranks, "hierarchical"), ranks)
    assert by_host(into) == {host: total - held[host] for host in range(hosts)}


@pytest.mark.parametrize("collective", ["broadcast", "reduce"])
def test_two_level_trees_carry_one_copy_per_host(collective: str) -> None:
    ranks = topology([3, 2, 4, 1, 2], "any")
    plan = build(Problem(collective, ranks.size, count=100, root=7), ranks, "hierarchical")
    out, into = crossing(plan, ranks)
    home = ranks.host_of[7]
    arriving = by_host(into if collective == "broadcast" else out)
    assert arriving == {host: 100 for host in range(5) if host != home}


def test_two_level_all_to_all_sends_one_message_per_host_on_its_own_rail() -> None:
    ranks = Topology(tuple(rank // 4 for rank in range(12)), rails=4)
    plan = build(Problem("all_to_all", 12, matrix=((6,) * 12,) * 12), ranks, "two_level")
    for rank_plan in plan.ranks:
        between = [step for step in rank_plan.steps if step.op == "send" and step.level == INTER]
        assert len(between) == 2
        assert {ranks.local_rank[step.peer] for step in between if step.peer is not None} == {rank_plan.rank % 4}
        assert {step.src.length for step in between if step.src is not None} == {24}


@pytest.mark.parametrize("hot", ["sender", "receiver"])
def test_balanced_all_to_all_levels_the_nics(hot: str) -> None:
    """One rank of each host has, or gets, 80 % of the rows: still each rail carries a quarter of its host's."""
    ranks = Topology((0, 0, 0, 0, 1, 1, 1, 1), rails=4)
    heavy, light = 12000, 1000
    matrix = tuple(
        tuple(heavy if (source if hot == "sender" else target) % 4 == 0 else light for target in range(8))
        for source in range(8)
    )
    problem = Problem("all_to_all", 8, matrix=matrix)
    plan = build(problem, ranks, "balanced")
    verify(plan, ranks)
    out, into = crossing(plan, ranks)
    share = sum(sum(row[4:]) for row in matrix[:4]) / 4
    for counter in (out, into):
        assert all(abs(elements - share) <= 16 for elements in counter.values())
        assert len(counter) == 8
    direct, arriving = crossing(build(problem, ranks, "pairwise"), ranks)
    assert max((direct if hot == "sender" else arriving).values()) >= 3 * share


def test_balanced_all_to_all_shares_in_proportion_to_the_nics() -> None:
    nics = ((1e9, 3e9), (2e9, 2e9))
    ranks = Topology((0, 0, 1, 1), rails=2, nics=nics)
    problem = Problem("all_to_all", 4, matrix=((4000, 1000, 500, 9000),) * 4)
    plan = build(problem, ranks, "balanced")
    verify(plan, ranks)
    for counter in crossing(plan, ranks):
        for host in (0, 1):
            whole = counter[host, 0] + counter[host, 1]
            assert counter[host, 0] / whole == pytest.approx(nics[host][0] / sum(nics[host]), abs=0.01)


def test_all_to_all_leaves_out_empty_blocks() -> None:
    empty = Problem("all_to_all", 6, matrix=((0,) * 6,) * 6)
    for name in names("all_to_all"):
        assert all(not rank_plan.steps for rank_plan in build(empty, topology([3, 3]), name).ranks)


@pytest.mark.parametrize(("collective", "name"), [(c, name) for c in ALGORITHMS for name in names(c)])
def test_the_plan_of_one_rank_is_that_of_the_whole(collective: str, name: str) -> None:
    ranks = topology([4, 4], "cyclic")
    problem = Problem(collective, 8, count=64, root=3, counts=(8,) * 8, matrix=((8,) * 8,) * 8)
    whole = build(problem, ranks, name)
    assert [build_rank(problem, ranks, name, rank) for rank in range(8)] == list(whole.ranks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("all_reduce", 8, "quick", 0, {}), "no algorithm 'quick'; it has direct, ring"),
        (("everything", 8, "ring", 0, {}), "no collective 'everything'"),
        (("all_reduce", 8, "ring", 0, {"chunks": 2}), "no parameter 'chunks'; its parameters: none"),
        (("all_reduce", 8, "pipelined", 0, {"chunks": 0}), "chunks is 0; it must be at least 1"),
        (("all_reduce", 4, "ring", 0, {}), "the topology has 8 ranks, the problem 4"),
        (("all_reduce", 8, "ring", 8, {}), "rank 8 is not one of the 8 ranks"),
    ],
)
def test_what_cannot_be_built_is_named(arguments: tuple, words: str) -> None:
    collective, size, name, rank, parameters = arguments
    with pytest.raises(PlanError, match=words):
        build_rank(Problem(collective, size, count=8), topology([4, 4]), name, rank, parameters)


def test_refusals_say_why() -> None:
    uneven = Problem("all_to_all", 2, matrix=((1, 2), (1, 1)))
    with pytest.raises(PlanError, match="the counts differ"):
        build(uneven, topology([1, 1]), "bruck")
    with pytest.raises(PlanError, match="3 ranks are not a power of two"):
        build(Problem("all_gather", 3, counts=(1, 1, 1)), topology([3]), "doubling")

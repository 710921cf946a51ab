"""Lower bounds: worked numbers, sums over every element and message, and no algorithm below them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness import load

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.bounds import demand, lower_bound, spread
from ncclx_py.plans.cost import estimate
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.replay import replay
from ncclx_py.plans.spec_file import place
from ncclx_py.plans.topology import Link, Topology

pytestmark = pytest.mark.unit
cases = load(Path(__file__).with_name("cases.py"), "plan_cases")

MIB = 1 << 20
SLOW = Link(50e-6, 25e6)  # 200 Mbit/s


def cluster(hosts: int, alpha: float = 14e-6) -> Topology:
    """H100 hosts as NCCL models them: 8 GPUs of 370 GB/s and as many NICs of 50 GB/s."""
    return Topology(place([8] * hosts, "block"), 8, Link(3.4e-6, 370e9), Link(alpha, 50e9))


@pytest.mark.parametrize(
    ("hosts", "size", "microseconds"),
    [(2, MIB, 5), (2, 64 * MIB, 300), (8, MIB, 5), (8, 64 * MIB, 315), (8, 1 << 30, 5033), (64, 1 << 30, 5285)],
)
def test_worked_numbers_of_an_all_reduce(hosts: int, size: int, microseconds: float) -> None:
    """The larger of 2(P−1)/P · n / (B1 + B2) and 2(N−1)/N · n / (G·B2), computed elsewhere; they leave latency out."""
    parts = lower_bound(uniform("all_reduce", 8 * hosts, size, 1), cluster(hosts), 1).parts
    bandwidth = max(seconds for name, seconds in parts.items() if name != "latency")
    assert round(bandwidth * 1e6) == microseconds


@pytest.mark.parametrize(
    ("sizes", "rails", "milliseconds"), [([4, 4], 1, 671.1), ([2] * 4, 1, 1006.6), ([4, 4], 4, 167.8)]
)
def test_the_node_cut_of_16_mib_at_200_mbit(sizes: list[int], rails: int, milliseconds: float) -> None:
    topology = Topology(place(sizes, "cyclic"), rails, inter=SLOW)
    bound = lower_bound(Problem("all_reduce", 8, count=4 * MIB), topology, 4)
    assert bound.name == "node cut"
    assert bound.seconds * 1e3 == pytest.approx(milliseconds, rel=1e-3)


def test_unequal_nics_count_by_their_sum_and_the_slowest_host_by_itself() -> None:
    both = Topology((0, 0, 1, 1), 2, inter=Link(1e-9, 1e9), nics=((1e9, 3e9), (1e9, 3e9)))
    assert lower_bound(Problem("all_reduce", 4, count=1000), both, 4).parts["node cut"] == pytest.approx(2 * 4000 / 8e9)
    lame = Topology((0, 1, 2), 1, inter=Link(1e-9, 1e9), nics=((1e9,), (1e9,), (1e8,)))
    bound = lower_bound(Problem("all_reduce", 3, count=1000), lame, 4)
    assert (bound.name, bound.seconds) == ("host", pytest.approx(4000 / 1e8))


def test_a_host_uses_only_the_rails_of_its_ranks() -> None:
    topology = Topology((0, 0, 1), 2, inter=Link(1e-9, 1e9))
    parts = lower_bound(Problem("broadcast", 3, count=100, root=2), topology, 1).parts
    assert parts["host"] == pytest.approx(100 / 1e9)  # host 1 sends by one NIC, though host 0 has two
    assert parts["node cut"] == pytest.approx(100 / 3e9)


def test_reduction_and_memory() -> None:
    topology = Topology((0, 0, 0, 0), intra=Link(1e-9, 1e12), memory=4e9, gamma=1e-9)
    parts = lower_bound(Problem("all_reduce", 4, count=1000), topology, 4).parts
    assert parts["reduction"] == pytest.approx(0.75 * 4000 * 1e-9)
    assert parts["ranks together"] == pytest.approx(2 * 3 * 4000 / 4e9)


def test_latency_is_that_of_spreading_word() -> None:
    """With o = α/4: word sent at 0, o, 2o, … arrives at α, α + o, …, and is passed on at once."""
    assert [spread(number, 1) for number in (1, 2, 3, 4, 5)] == [0.0, 1.0, 1.25, 1.5, 1.75]
    assert spread(5, 4) == 1.0
    assert spread(100, 1) < spread(100, 1) + spread(2, 1) <= 2 * spread(100, 1)
    topology = Topology((0, 1, 2), inter=Link(8e-6, 1e15))
    bound = lower_bound(Problem("all_reduce", 3, count=1), topology, 4)
    assert (bound.name, bound.seconds) == ("latency", pytest.approx(10e-6))


def test_nothing_to_move() -> None:
    for problem in (Problem("all_reduce", 2), Problem("all_to_all", 2, matrix=((3, 0), (0, 4)))):
        assert lower_bound(problem, Topology((0, 1)), 4).name == "nothing to move"
    assert lower_bound(Problem("all_reduce", 1, count=5), Topology((0,)), 4).seconds == 0


def test_another_world() -> None:
    with pytest.raises(ValueError, match="for 3 ranks, but the topology has 2"):
        lower_bound(Problem("all_reduce", 3, count=1), Topology((0, 1)), 4)


def test_the_demand_of_an_all_to_all_is_its_sums() -> None:
    """Against a loop over every pair of ranks."""
    random_ = random.Random(5)
    for _ in range(20):
        topology = cases.some_topology(random_, random_.randint(2, 9))
        size = topology.size
        matrix = tuple(tuple(random_.choice([0, random_.randint(0, 50)]) for _ in range(size)) for _ in range(size))
        found = demand(Problem("all_to_all", size, matrix=matrix), topology)
        hosts, host_of = range(len(topology.hosts)), topology.host_of
        pairs = [(a, b, matrix[a][b]) for a in range(size) for b in range(size) if a != b]
        apart = [(host_of[a], host_of[b], count) for a, b, count in pairs if host_of[a] != host_of[b]]
        assert list(found.rank_out) == [sum(count for a, _, count in pairs if a == rank) for rank in range(size)]
        assert list(found.rank_in) == [sum(count for _, b, count in pairs if b == rank) for rank in range(size)]
        assert list(found.host_out) == [sum(count for a, _, count in apart if a == host) for host in hosts]
        assert list(found.host_in) == [sum(count for _, b, count in apart if b == host) for host in hosts]
        assert found.messages == sum(count for _, _, count in pairs)
        assert found.crossings == sum(count for _, _, count in apart)


def test_no_plan_is_faster_than_the_bound_and_no_prediction() -> None:
    """Every algorithm on random topologies, played message by message; a demand that is too high would show."""
    tight = 0
    for case in cases.cases(seed=11, number=14, worlds=[2, 3, 4, 5, 6, 8], largest=200_000):
        topology = case.topology
        bound = lower_bound(case.problem, topology, 4)
        if not bound.seconds:
            continue
        plan = build(case.problem, topology, case.algorithm.name, case.parameters)
        played = replay(plan, topology, 4).seconds
        assert played >= bound.seconds * (1 - 1e-9), (case, bound)
        values = {**case.algorithm.parameters, **case.parameters}
        guessed = estimate(case.problem, topology, 4, case.algorithm.name, values)
        assert guessed >= 0.6 * bound.seconds, (case, bound)
        tight += played < 1.1 * bound.seconds
    assert tight > 10  # and it is not so low that nothing comes near

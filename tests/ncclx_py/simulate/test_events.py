"""The event engine against the plain replay, one event after another; and what faults and switches must do to a plan."""

from __future__ import annotations

import numpy as np
import pytest

from ncclx_py.plans.algorithms.registry import ALGORITHMS, build
from ncclx_py.plans.plan import Plan, Problem
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.replay import replay
from ncclx_py.plans.spec_file import place
from ncclx_py.plans.topology import Link, Tier, Topology
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.events import Outcome, play
from ncclx_py.simulate.representative import applies, play_classes
from ncclx_py.simulate.schedule import from_plan
from ncclx_py.simulate.symmetry import find_symmetry

pytestmark = pytest.mark.unit

INTRA, INTER = Link(5e-6, 8e9), Link(5e-5, 1.25e9)


def topology(hosts: int, width: int, rails: int = 1, **more: float) -> Topology:
    return Topology(place([width] * hosts, "block"), rails=rails, intra=INTRA, inter=INTER, **more)  # type: ignore[arg-type]


def plans(world: Topology, size: int) -> list[Plan]:
    found = []
    for collective, algorithms in ALGORITHMS.items():
        problem = uniform(collective, world.size, size, 4)  # type: ignore[arg-type]
        for name, algorithm in algorithms.items():
            if not algorithm.refuses(problem, world):
                chunks = {"chunks": 3} if "chunks" in algorithm.parameters else {}
                found.append(build(problem, world, name, chunks))
    return found


@pytest.mark.parametrize("size", [4096, 4 << 20])
@pytest.mark.parametrize(
    "world",
    [
        topology(1, 4),
        topology(2, 4, gamma=1e-10),
        topology(4, 2, rails=2, memory=2e10, gamma=1e-10),
        topology(3, 3),
        topology(4, 1),
        Topology((0, 1, 0, 2, 1, 0), intra=INTRA, inter=INTER),
    ],
    ids=["1x4", "2x4", "4x2 rails", "3x3", "4x1", "uneven"],
)
def test_all_algorithms_take_as_long_as_event_by_event(world: Topology, size: int) -> None:
    for plan in plans(world, size):
        slow, fast = replay(plan, world, 4), play(from_plan(plan, 4), Cluster(world))
        # Which of two events of one instant comes first is open: it moves single messages.
        assert fast.seconds == pytest.approx(slow.seconds, rel=0.01), plan.algorithm
        crossed = {
            (host, rail): int(fast.pipe_bytes[_pipe(fast, f"host {host} NIC {rail} out")])
            for host, rail in slow.nic_bytes
        }
        assert crossed == slow.nic_bytes, plan.algorithm


@pytest.mark.parametrize("world", [topology(4, 4, rails=4), topology(6, 2), topology(5, 3, rails=3), topology(8, 1)])
def test_one_plan_stands_for_all_ranks(world: Topology) -> None:
    found = 0
    for plan in plans(world, 1 << 20):
        symmetry = find_symmetry(plan.problem, world, plan.algorithm, plan.parameters)
        if symmetry is not None:
            found += 1
            full, short = from_plan(plan, 4), symmetry.schedule(4)
            assert np.array_equal(full.peer, short.peer)
            assert np.array_equal(full.match, short.match)
            assert np.array_equal(full.next_send, short.next_send)
            cluster = Cluster(world)
            assert play(short, cluster).seconds == pytest.approx(play(full, cluster).seconds, rel=5e-3), plan.algorithm
    assert found >= 10


@pytest.mark.parametrize("tiers", [(), (Tier("rack", 2, 2e-4, 2.0), Tier("zone", 4, 4e-4, 4.0))], ids=["flat", "tiers"])
@pytest.mark.parametrize("world", [topology(8, 4, rails=4, gamma=1e-10), topology(8, 2, memory=2e10), topology(16, 1)])
def test_one_rank_stands_for_its_class(world: Topology, tiers: tuple[Tier, ...]) -> None:
    cluster, found = Cluster(world, tiers), 0
    for plan in plans(world, 2 << 20):
        symmetry = find_symmetry(plan.problem, world, plan.algorithm, plan.parameters)
        if symmetry is None or not applies(symmetry, cluster):
            continue
        found += 1
        alone, together = play_classes(symmetry, cluster, 4), play(symmetry.schedule(4), cluster)
        # Blocks that go out in turn cross racks in turn; one rank for all counts them as spread evenly.
        low, high = (0.99, 1.01) if not tiers else (0.7, 1.35)
        assert low <= alone.seconds / together.seconds <= high, plan.algorithm
        if (plan.problem.collective, plan.algorithm) in (
            ("all_reduce", "hierarchical"),
            ("all_reduce", "halving_doubling"),
        ):
            assert alone.seconds == pytest.approx(together.seconds, rel=0.06)
    assert found >= 8


def test_a_tree_has_no_symmetry() -> None:
    problem = Problem("broadcast", 16, count=1 << 18)
    assert find_symmetry(problem, topology(4, 4), "tree") is None


def test_a_coarse_grain_changes_little() -> None:
    world = topology(6, 2, rails=2)
    cluster = Cluster(world, delays={3: 1e-4}, slowness={7: 4.0})
    schedule = from_plan(build(Problem("all_reduce", 12, count=1 << 20), world, "pipelined"), 4)
    exact, coarse = play(schedule, cluster), play(schedule, cluster, grain=1e-6)
    assert coarse.seconds == pytest.approx(exact.seconds, rel=0.02)
    assert coarse.rounds < 0.8 * exact.rounds


def test_a_late_rank_delays_the_others_by_as_much() -> None:
    world = topology(4, 2, rails=2)
    schedule = from_plan(build(Problem("all_reduce", 8, count=1 << 10), world, "hierarchical"), 4)
    healthy = play(schedule, Cluster(world)).seconds
    late = play(schedule, Cluster(world, delays={5: 0.25})).seconds
    assert 0.25 < late <= 0.25 + healthy


def test_a_failed_nic_doubles_the_load_of_its_neighbour() -> None:
    world = topology(2, 2, rails=2)
    schedule = from_plan(build(Problem("all_reduce", 4, count=16 << 20), world, "hierarchical"), 4)
    healthy, broken = (play(schedule, Cluster(world, nic_share=share)) for share in ({}, {(1, 0): 0.0}))
    bandwidth = 64 * (1 << 20) / 2 / INTER.bandwidth  # what each of two NICs carries, both ways at once
    assert broken.seconds - healthy.seconds == pytest.approx(bandwidth, rel=0.1)
    assert broken.busiest(1, "host 1 NIC")[0][0].startswith("host 1 NIC 1")
    half = play(schedule, Cluster(world, nic_share={(1, 0): 0.5}))
    assert half.seconds - healthy.seconds == pytest.approx(bandwidth, rel=0.1)


def test_an_oversubscribed_tier_holds_back_what_crosses_it() -> None:
    world = topology(4, 1)
    racks = Tier("rack", 2, 1e-4, oversubscription=4.0)
    schedule = from_plan(build(uniform("all_to_all", 4, 64 << 20, 4), world, "pairwise"), 4)
    crossing = 2 * 2 * (16 << 20)  # bytes that the two hosts of a rack send to the other rack
    expected = crossing / (2 * INTER.bandwidth / 4.0)
    outcome = play(schedule, Cluster(world, tiers=(racks,)))
    assert expected <= outcome.seconds <= 1.3 * expected
    name, moved, share = outcome.busiest(1)[0]
    assert name.startswith("rack")
    assert moved == crossing
    assert share > 0.75


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"nic_share": {(4, 0): 0.5}}, "no NIC 0 of host 4"),
        ({"nic_share": {(1, 0): 0.0}}, "cut off"),
        ({"delays": {9: 1.0}}, "no rank 9"),
        ({"tiers": (Tier("rack", 4, 1e-5), Tier("zone", 2, 1e-5))}, "tiers grow"),
        ({"tiers": (Tier("rack", 2, 1e-5, 0.0),)}, "oversubscription"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Cluster(topology(4, 2), **wrong)


def test_a_plan_that_never_ends_is_named() -> None:
    world = topology(1, 2)
    plan = build(Problem("all_reduce", 2, count=8), world, "ring")
    cut = Plan(plan.problem, plan.algorithm, (plan.ranks[0], type(plan.ranks[1])(1, plan.ranks[1].steps[:-1])))
    with pytest.raises(ValueError, match="never ends"):
        from_plan(cut, 4)


def _pipe(outcome: Outcome, name: str) -> int:
    return next(pipe for pipe in range(len(outcome.pipe_bytes) - 1) if outcome.links.name(pipe) == name)

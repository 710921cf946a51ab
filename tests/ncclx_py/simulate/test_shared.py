"""Hosts that share one machine: times worked out by hand, for flows, for single messages and for calls in a row."""

from __future__ import annotations

import numpy as np
import pytest

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.plan import Plan, Problem, Program, RankPlan, Span
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.fair import FairFlows
from ncclx_py.simulate.machine import Machine
from ncclx_py.simulate.shared import call_seconds

pytestmark = pytest.mark.unit

MACHINE = Machine(cores=2, local=0.2, remote=0.2, wake=0.05, call=0.5, copy=1e-3, wire=1e-9, burst=50.0)


def ends(flows: FairFlows) -> dict[int, float]:
    """When each flow ends."""
    found: dict[int, float] = {}
    flows.settle(0)
    while (window := flows.next_end()) < 1 << 60:
        owners, times = flows.close(window)
        found.update(zip(owners.tolist(), times.tolist()))
        flows.settle(window)
    return found


def opened(flows: FairFlows, owner: int, uses: dict[int, float], size: float, weight: float = 1.0) -> None:
    rows = np.array([[*uses, *[3] * (2 - len(uses))]])
    flows.open(
        np.array([owner]),
        rows,
        np.array([[*uses.values(), *[0.0] * (2 - len(uses))]]),
        np.array([weight]),
        np.array([size]),
    )


def flows_over(capacity: list[float], bucketed: int = -1, burst: float = 0.0) -> FairFlows:
    pipes = np.array([*capacity, *[np.inf] * (4 - len(capacity))])
    return FairFlows(pipes, 2, 1e-9, np.arange(4) == bucketed, burst)


def test_what_one_flow_cannot_use_others_do() -> None:
    flows = flows_over([100.0, 10.0])
    opened(flows, 0, {0: 1.0, 1: 1.0}, 100.0)  # held to 10 by the second pipe
    opened(flows, 1, {0: 1.0}, 900.0)  # has the other 90 of the first
    opened(flows, 2, {2: 1.0}, 5.0)  # a pipe without limit
    assert ends(flows) == pytest.approx({0: 10.0, 1: 10.0, 2: 0.0}, abs=1e-6)


def test_shares_follow_weights_and_uses() -> None:
    flows = flows_over([1.0])  # one core: work in seconds beside bytes that take 0.01 s each
    opened(flows, 0, {0: 1.0}, 1.0)
    opened(flows, 1, {0: 0.01}, 200.0, weight=100.0)
    assert ends(flows) == pytest.approx({0: 2.0, 1: 3.0}, abs=1e-6)


def test_a_bucket_lets_a_burst_pass() -> None:
    flows = flows_over([10.0, 60.0], bucketed=0, burst=50.0)
    opened(flows, 0, {0: 1.0, 1: 1.0}, 110.0)  # 60 in the first second, which empties it, then 10 a second
    assert ends(flows) == pytest.approx({0: 6.0}, rel=0.03)


def test_many_flows_get_less_out_of_a_shaped_pipe() -> None:
    flows = FairFlows(np.array([100.0, *[np.inf] * 3]), 2, 1e-9, np.arange(4) == 0, 0.0, ((1, 1.0), (4, 0.5)))
    for owner in range(4):
        opened(flows, owner, {0: 1.0}, 50.0 if owner else 75.0)
    # four at 50 together until three are through, after 4 s; then one with all 100 for its other 25
    assert ends(flows) == pytest.approx({0: 4.25, 1: 4.0, 2: 4.0, 3: 4.0}, abs=1e-6)
    two = FairFlows(np.array([100.0, *[np.inf] * 3]), 2, 1e-9, np.arange(4) == 0, 0.0, ((1, 1.0), (4, 0.5)))
    for owner in range(2):
        opened(two, owner, {0: 1.0}, 75.0)
    assert ends(two) == pytest.approx({0: 2.0, 1: 2.0}, abs=1e-6)  # half way between one and four: three quarters


def played(topology: Topology, plan: Plan, machine: Machine = MACHINE) -> float:
    return call_seconds(plan, 1, Cluster(topology), machine)


def message(size: int, reduces: bool = False) -> Plan:
    """`size` bytes from rank 0 to rank 1."""
    sender, receiver = Program(0), Program(1)
    sender.send(Span("data", 0, size), 1)
    receiver.reduce(Span("data", 0, size), 0) if reduces else receiver.recv(Span("data", 0, size), 0)
    return Plan(Problem("all_reduce", 2, size), "one", (sender.finish(), receiver.finish()))


def test_a_message_inside_a_host_is_copied_twice_and_wakes_its_receiver() -> None:
    near = Topology((0, 0), 1, Link(0.3, 1e9), Link(0.2, 1e9))
    # call 0.5; send 0.1 and a copy of 0.1; travel 0.05; wake 0.05, receive 0.1 and copy 0.1
    assert played(near, message(100)) == pytest.approx(1.0, abs=1e-6)


def test_a_message_between_hosts_passes_a_shaped_link() -> None:
    far = Topology((0, 1), 1, Link(0.2, 1e9), Link(0.35, 100.0))
    # call 0.5; send 0.1; 50 bytes at once and 100 at 100 a second; travel 0.1; wake 0.05, receive 0.1, combine 0.15
    assert played(far, message(150), MACHINE) == pytest.approx(1.85, rel=0.02)
    assert played(far, message(150, reduces=True)) - played(far, message(150)) == pytest.approx(0.15, abs=1e-6)


def test_ranks_share_the_cores() -> None:
    empty = build(Problem("all_reduce", 8), world := Topology((0,) * 4 + (1,) * 4), "ring", {})
    quick = Machine(cores=2, local=0.0, remote=0.0, wake=0.0, call=1e-3, copy=0.0, wire=1e-9)
    assert played(world, empty, quick) == pytest.approx(4e-3)  # eight milliseconds of work on two cores
    many = Machine(**{**quick.__dict__, "cores": 8})
    assert played(world, empty, many) == pytest.approx(1e-3)


def test_a_call_in_a_row_finds_no_burst_left() -> None:
    far = Topology((0, 1), 1, Link(0.0, 1e9), Link(0.0, 1e6))
    link = Machine(cores=2, local=0.0, remote=0.0, wake=0.0, call=0.0, copy=0.0, wire=1e-12, burst=5e4)
    assert played(far, message(100_000), link) == pytest.approx(0.1, rel=1e-3)  # and not 0.05
    # 50 calls after one that had 20,000 of the burst: the first two have what is left
    assert played(far, message(20_000), link) == pytest.approx((50 * 0.02 - 0.03) / 50, rel=1e-3)
    busy = Machine(**{**link.__dict__, "call": 0.2})  # the link rests while the next call is made
    assert played(far, message(40_000), busy) == pytest.approx(0.2, rel=1e-2)


def test_a_call_takes_as_long_as_the_rank_that_waits_longest() -> None:
    """Ranks 0 and 1 are through first where a burst passes, and last where none is left; rank 2 takes 0.08 s each time."""
    apart = Topology((0, 1, 2), 1, Link(0.0, 1e9), Link(0.0, 1e6))
    sender, receiver = (ranked.steps for ranked in message(100_000).ranks)
    alone = Program(2)
    alone.copy(Span("data", 0, 100_000), Span("scratch", 0, 100_000))
    ranks = (RankPlan(0, sender), RankPlan(1, receiver), alone.finish())
    plan = Plan(Problem("all_reduce", 3, 100_000), "two things", ranks)
    link = Machine(cores=3, local=0.0, remote=0.0, wake=0.0, call=0.0, copy=8e-7, wire=1e-12, burst=5e4)
    assert played(apart, plan, link) == pytest.approx(0.1, rel=1e-3)  # 0.15 − 0.05; the last ends are 0.08 apart


def test_streams_share_unevenly() -> None:
    world = Topology((0, 0, 1, 1), 1, Link(0.0, 1e9), Link(0.0, 1e6))
    programs = [Program(rank) for rank in range(4)]
    for source in (0, 1):
        programs[source].send(Span("data", 0, 100_000), source + 2)
        programs[source + 2].recv(Span("data", 0, 100_000), source)
    plan = Plan(Problem("all_reduce", 4, 100_000), "pairs", tuple(program.finish() for program in programs))
    even = Machine(cores=4, local=0.0, remote=0.0, wake=0.0, call=0.0, copy=0.0, wire=1e-12)
    assert played(world, plan, even) == pytest.approx(0.2, rel=1e-3)
    # who is lucky in one call, and not in the next, waits longer; the NIC is as busy as before
    uneven = Machine(**{**even.__dict__, "spread": 0.5})
    assert played(world, plan, uneven) > 0.21
    assert played(world, plan, uneven) == played(world, plan, uneven)
    long = Topology((0, 0, 1, 1), 1, Link(0.0, 1e9), Link(0.0, 5e5))
    assert played(long, plan, uneven) == pytest.approx(0.4, rel=1e-3)  # timed alone

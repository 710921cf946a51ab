"""The replay of plans on links, against times worked out by hand."""

from __future__ import annotations

import pytest

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.plan import Plan, Problem, Program, RankPlan, Span, Step
from ncclx_py.plans.replay import replay
from ncclx_py.plans.topology import Link, Topology

pytestmark = pytest.mark.unit

INTRA, INTER = Link(4.0, 1.0), Link(40.0, 0.5)  # seconds and bytes per second; overheads are 1 and 10 seconds
ONE_HOST = Topology((0, 0, 0), intra=INTRA, inter=INTER)
TWO_HOSTS = Topology((0, 0, 1, 1), intra=INTRA, inter=INTER)


def data(start: int, stop: int) -> Span:
    return Span("data", start, stop)


def plan(*ranks: list[tuple]) -> Plan:
    """Each rank's steps as (kind, peer, length) or (kind, peer, length, lane), on spans of their own."""
    made = []
    for rank, steps in enumerate(ranks):
        program, at = Program(rank), 0
        for kind, peer, length, *lane in steps:
            span = data(at, at + length)
            at += length
            if kind == "send":
                program.send(span, peer, lane=lane[0] if lane else 0)
            elif kind == "reduce":
                program.reduce(span, peer, lane=lane[0] if lane else 0)
            else:
                program.recv(span, peer, lane=lane[0] if lane else 0)
        made.append(program.finish())
    return Plan(Problem("all_reduce", len(ranks), count=1000), "by hand", tuple(made))


def seconds(topology: Topology, *ranks: list[tuple]) -> float:
    return replay(plan(*ranks), topology, 1).seconds


def test_one_message_takes_alpha_and_its_bytes() -> None:
    assert seconds(ONE_HOST, [("send", 1, 10)], [("recv", 0, 10)], []) == pytest.approx(4 + 10)
    assert seconds(TWO_HOSTS, [("send", 2, 10)], [], [("recv", 0, 10)], []) == pytest.approx(40 + 10 / 0.5)


def test_both_directions_at_once() -> None:
    both = [[("send", 2, 10), ("recv", 2, 10)], [], [("send", 0, 10), ("recv", 0, 10)], []]
    assert seconds(TWO_HOSTS, *both) == pytest.approx(40 + 20)


def test_ranks_of_a_host_share_a_nic_but_not_two() -> None:
    pair = [[("send", 2, 10)], [("send", 3, 10)], [("recv", 0, 10)], [("recv", 1, 10)]]
    assert seconds(TWO_HOSTS, *pair) == pytest.approx(40 + 2 * 20)
    two_rails = Topology(TWO_HOSTS.host_of, 2, INTRA, INTER)
    assert seconds(two_rails, *pair) == pytest.approx(40 + 20)
    uneven = Topology(TWO_HOSTS.host_of, 2, INTRA, INTER, ((0.5, 0.25), (0.5, 0.5)))
    assert seconds(uneven, *pair) == pytest.approx(40 + 40)


def test_readers_share_the_port_of_the_one_they_read() -> None:
    one_to_two = [[("send", 1, 10), ("send", 2, 10)], [("recv", 0, 10)], [("recv", 0, 10)]]
    # Reader 1 starts at 4 and is alone for a second; then both have half, until it is done at 4 + 1 + 2·9.
    assert seconds(ONE_HOST, *one_to_two) == pytest.approx(4 + 20)


def test_the_memory_of_a_host_is_shared() -> None:
    swap = [[("send", 1, 10), ("recv", 1, 10)], [("send", 0, 10), ("recv", 0, 10)], []]
    free = seconds(ONE_HOST, *swap)
    tight = seconds(Topology((0, 0, 0), intra=INTRA, inter=INTER, memory=1.0), *swap)
    assert (free, tight) == (pytest.approx(4 + 10), pytest.approx(4 + 20))


def test_reductions_cost_gamma_on_the_thread_of_the_rank() -> None:
    topology = Topology((0, 0, 0), intra=INTRA, inter=INTER, gamma=3.0)
    assert seconds(topology, [("send", 1, 10)], [("reduce", 0, 10)], []) == pytest.approx(4 + 10 + 30)


def test_messages_of_a_channel_leave_one_after_another() -> None:
    ranks = [[("send", 2, 10), ("send", 2, 10)], [], [("recv", 0, 10), ("recv", 0, 10)], []]
    # The first arrives after 10 + 20 + 20 s and takes 10 s to be taken; the second is on its way meanwhile.
    assert seconds(TWO_HOSTS, *ranks) == pytest.approx(10 + 40 + 20 + 10)
    ranks[2].insert(1, ("send", 3, 30))
    # What rank 2 sends on once it has the first, after 60 s: the second has not slowed the first down.
    assert seconds(TWO_HOSTS, ranks[0], [], ranks[2], [("recv", 2, 30)]) == pytest.approx(60 + 4 + 30)


def test_lanes_overlap_and_a_lane_waits() -> None:
    def ranks(lane: int) -> list[list[tuple]]:
        return [[("recv", 2, 10), ("send", 1, 10, lane)], [("recv", 0, 10, lane)], [("send", 0, 10)], []]

    assert seconds(TWO_HOSTS, *ranks(0)) == pytest.approx(60 + 14)
    assert seconds(TWO_HOSTS, *ranks(1)) == pytest.approx(60)


def test_bytes_by_nic() -> None:
    topology = Topology((0, 0, 1), 2, INTRA, INTER)
    found = replay(
        plan([("send", 2, 3), ("send", 1, 9)], [("recv", 0, 9), ("send", 2, 5)], [("recv", 0, 3), ("recv", 1, 5)]),
        topology,
        4,
    )
    assert found.nic_bytes == {(0, 0): 12, (0, 1): 20}
    assert len(found.finished) == 3
    assert found.finished[2] == found.seconds


def test_what_cannot_be_played() -> None:
    with pytest.raises(ValueError, match="never ends: 2 steps"):
        seconds(ONE_HOST, [("recv", 1, 1)], [("recv", 0, 1)], [])
    native = Step("native", native="all_reduce", group=(0, 1), src=data(0, 1), dst=data(0, 1))
    stuck = Plan(Problem("all_reduce", 2, count=1), "by hand", (RankPlan(0, (native,)), RankPlan(1, ())))
    with pytest.raises(ValueError, match="Step 0 of rank 0 is native"):
        replay(stuck, Topology((0, 0)), 1)
    with pytest.raises(ValueError, match="for 2 ranks, but the topology has 3"):
        replay(build(Problem("all_reduce", 2, count=8), Topology((0, 0)), "ring"), ONE_HOST, 1)

"""What lowering makes of a plan: shared copies, reductions taken together, dependencies, and refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ncclx_py.plans.plan import Program, RankPlan, Span, Step
from ncclx_py.transport.local_operations import LocalReduce
from ncclx_py.transport.lowering import Schedule

pytestmark = pytest.mark.unit


class Fabric:
    """Rank 0 of four; rank 3 is on another host."""

    rank, size = 0, 4

    def is_local(self, peer: int) -> bool:
        return peer < 3

    def outbox(self, peer: int, lane: int) -> Any:
        return SimpleNamespace(peer=peer, lane=lane)

    def inbox(self, peer: int, lane: int) -> Any:
        return SimpleNamespace(neighbour=SimpleNamespace(rank=peer), lane=lane)


def lowered(plan: RankPlan, **lengths: int) -> Schedule:
    return Schedule(Fabric(), plan, lengths)  # type: ignore[arg-type]


def data(start: int, stop: int) -> Span:
    return Span("data", start, stop)


def test_sends_of_one_span_share_a_copy_unless_it_is_written_between() -> None:
    program = Program(0)
    for peer in (1, 2, 3):
        program.send(data(0, 100), peer)
    program.recv(data(50, 60), 1)
    for peer in (1, 2):
        program.send(data(0, 100), peer)
    program.send(Span("scratch", 0, 100), 1)
    program.send(data(0, 0), 1)
    made = lowered(program.finish(100), data=100)
    assert made._shares == {0: 0, 1: 0, 4: 4, 5: 4}
    assert made.program(4).mirror == 2 * 448  # 400 bytes, aligned
    assert made.program(4).scratch == 448
    assert made.program(8).mirror == 2 * 832


def test_a_write_on_another_lane_that_nothing_orders_forbids_sharing() -> None:
    steps = (
        Step("send", 0, 1, data(0, 10)),
        Step("recv", 1, 1, None, data(0, 10)),  # wrong in a plan, as it is not ordered, but not ours to decide
        Step("send", 0, 2, data(0, 10)),
    )
    assert lowered(RankPlan(0, steps), data=10)._shares == {0: 0, 2: 2}


def test_a_write_after_both_sends_does_not_forbid_sharing() -> None:
    program = Program(0)
    program.send(data(0, 10), 1, lane=0)
    program.send(data(0, 10), 2, lane=1)
    program.recv(data(0, 10), 1, lane=2)
    assert lowered(program.finish(), data=10)._shares == {0: 0, 1: 0}


def reduces(schedule: Schedule) -> list[list[int]]:
    lanes = schedule.program(4).lanes
    return [operation._indexes for lane in lanes for operation in lane if isinstance(operation, LocalReduce)]


def test_reductions_from_neighbours_into_one_span_are_taken_together() -> None:
    program = Program(0)
    program.reduce(data(0, 10), 1)
    program.reduce(data(0, 10), 2)
    program.reduce(data(10, 20), 2)
    program.reduce(data(10, 20), 3)
    program.reduce(data(10, 20), 1)
    made = lowered(program.finish(), data=20)
    assert reduces(made) == [[0, 1], [2], [4]]
    assert [operation.index for operation in made.program(4).lanes[0]] == [0, 2, 3, 4]


def test_reductions_that_wait_for_more_stay_apart() -> None:
    steps = (
        Step("recv", 1, 2, None, data(10, 20)),
        Step("reduce", 0, 1, None, data(0, 10)),
        Step("reduce", 0, 2, None, data(0, 10), deps=(0, 1)),
        Step("reduce", 0, 1, None, data(0, 10), deps=(0, 2)),
    )
    assert reduces(lowered(RankPlan(0, steps), data=20)) == [[1], [2, 3]]


def test_dependencies_that_the_lane_meets_are_dropped() -> None:
    program = Program(0)
    program.send(data(0, 10), 1)
    program.recv(data(0, 10), 1)
    program.copy(data(0, 10), data(10, 20))
    program.copy(data(10, 20), data(20, 30), lane=1)
    deps = [operation.deps for operation in lowered(program.finish(), data=30).program(4).by_index]
    assert deps == [(), (0,), (), (2,)]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step("native", 0, None, data(0, 5), data(0, 5), native="all_reduce", group=(0, 1)), "is a native step"),
        (Step("send", 64, 1, data(0, 5)), "lanes are 0 to 63"),
        (Step("send", 0, 0, data(0, 5)), "no other rank"),
        (Step("send", 0, 4, data(0, 5)), "no other rank"),
        (Step("send", 0, 1, data(0, 5), deps=(0,)), "only on earlier ones"),
        (Step("send", 0, 1, data(0, 11)), r"uses data\[0:11\], but the buffers have"),
        (Step("recv", 0, 1, None, data(-1, 3)), r"uses data\[-1:3\]"),
        (Step("recv", 0, 1, None, data(5, 3)), r"uses data\[5:3\]"),
        (Step("recv", 0, 1, None, Span("scratch", 0, 8)), r"uses scratch\[0:8\]"),
        (Step("recv", 0, 1, None, Span("output", 0, 1)), r"uses output\[0:1\]"),
    ],
)
def test_plans_that_cannot_run_are_refused(step: Step, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lowered(RankPlan(0, (step,), 7), data=10)

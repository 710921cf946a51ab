"""The verifier refuses what is wrong, names it, and accepts nothing that brute force finds wrong."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from harness import load

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import Plan, Problem, Program, RankPlan, Span, Step
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.verify import verify

brute = load(Path(__file__).with_name("brute.py"), "plan_brute")
cases = load(Path(__file__).with_name("cases.py"), "plan_cases")
mutants = load(Path(__file__).with_name("mutants.py"), "plan_mutants")

pytestmark = pytest.mark.unit

PAIR = Problem("all_reduce", 2, count=8)
FIRST, SECOND, WHOLE = Span("data", 0, 4), Span("data", 4, 8), Span("data", 0, 8)


def pair(zero: list[Step], one: list[Step], problem: Problem = PAIR, scratch: int = 0) -> Plan:
    return Plan(problem, "by hand", (RankPlan(0, tuple(zero), scratch), RankPlan(1, tuple(one), scratch)))


def exchange(me: int) -> list[Step]:
    """A right all-reduce among two: halves are exchanged, then handed back."""
    mine, theirs = (FIRST, SECOND) if me == 0 else (SECOND, FIRST)
    program = Program(me)
    program.send(theirs, 1 - me)
    program.reduce(mine, 1 - me)
    program.send(mine, 1 - me)
    program.recv(theirs, 1 - me)
    return list(program.finish().steps)


def test_no_mutant_survives() -> None:
    tally = mutants.kill_rate(seed=3, topologies=6, runs=12)
    assert set(tally) == set(mutants.MUTATIONS)
    assert sum(fates["killed"] for fates in tally.values()) > 500
    assert {kind: fates["survived"] for kind, fates in tally.items() if fates["survived"]} == {}
    # These change what is moved, not only when: hardly any of them leaves the result as it was.
    for kind in ("dropped step", "wrong peer", "shifted span", "shortened span", "reduce for store"):
        assert tally[kind]["killed"] >= 0.99 * tally[kind].total()


def test_a_plan_that_is_right_passes() -> None:
    verify(pair(exchange(0), exchange(1)))


def changed(index: int, **fields: object) -> Plan:
    steps = exchange(0)
    steps[index] = replace(steps[index], **fields)
    return pair(steps, exchange(1))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (changed(0, peer=2), r"rank 0, step 0 \(send data\[4:8\] to rank 2, lane 0\): the peer 2 is not another"),
        (changed(0, peer=0), "the peer 0 is not another one"),
        (changed(0, src=Span("data", 4, 9)), r"data\[4:9\] is not within the 8 elements of data"),
        (changed(0, src=Span("data", -1, 3)), "not within"),
        (changed(0, src=Span("input", 0, 4)), "there is no buffer 'input'; there are data, scratch"),
        (changed(0, src=Span("scratch", 0, 4)), "not within the 0 elements of scratch"),
        (changed(1, deps=(1,)), r"depends on \[1\], which are not all earlier steps"),
        (changed(0, op="shout"), "there is no op 'shout'"),
        (changed(0, dst=FIRST), "send needs other fields"),
        (changed(0, lane=-1), "lane -1 is negative"),
        (changed(0, native="all_reduce"), "has no library collective"),
        (changed(0, src=Span("data", 4, 7)), r"its 3 elements meet step 1 of rank 1 \(reduce data\[4:8\]"),
        (pair(exchange(0)[:2], exchange(1)), "rank 1, step 3 .*: rank 0 sends only 1 messages to rank 1 on lane 0"),
        (pair(exchange(0), exchange(1)[:3]), "rank 0, step 2 .*: rank 1 takes only 1 messages|rank 1 takes only"),
    ],
)
def test_structure(plan: Plan, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        verify(plan)


def test_a_missing_dependency_is_a_race() -> None:
    steps = exchange(0)
    steps[3] = replace(steps[3], deps=())  # data[4:8] may still be on its way out when the result comes in
    with pytest.raises(PlanError, match=r"rank 0, step 3 .*: may run at the same time as step 0 \(send data\[4:8\]"):
        verify(pair(steps, exchange(1)))


def test_a_lane_orders_what_follows_a_store_but_not_what_follows_a_send() -> None:
    steps = exchange(0)
    assert steps[2].deps == (1,)
    steps[2] = replace(steps[2], deps=())  # the lane alone orders it after the reduce
    verify(pair(steps, exchange(1)))


def test_a_dependency_may_be_implied_by_that_of_another_step() -> None:
    scratch = Span("scratch", 0, 8)
    steps = (
        Step("copy", src=Span("input", 0, 8), dst=Span("output", 0, 8)),
        Step("copy", 1, src=Span("output", 0, 8), dst=scratch, deps=(0,)),
        Step("reduce", 2, src=scratch, dst=Span("output", 0, 8), deps=(1,)),  # so output[0:8] was written
        Step("copy", 3, src=Span("input", 0, 8), dst=Span("output", 0, 8), deps=(2,)),
    )
    verify(Plan(Problem("reduce", 1, count=8), "by hand", (RankPlan(0, steps, 8),)))


def test_reading_what_was_never_written() -> None:
    zero = [Step("copy", src=Span("scratch", 0, 8), dst=Span("output", 0, 8))]
    problem = Problem("reduce", 1, count=8)
    with pytest.raises(PlanError, match="reads element 0 of scratch before anything was written there"):
        verify(Plan(problem, "by hand", (RankPlan(0, tuple(zero), 8),)))


def test_waiting_for_each_other() -> None:
    """Both receive before they send: they would hang."""
    late = [
        [
            Step("recv", peer=1 - me, dst=Span("scratch", 0, 8)),
            Step("send", peer=1 - me, src=WHOLE),
            Step("reduce", src=Span("scratch", 0, 8), dst=WHOLE, deps=(0, 1)),
        ]
        for me in range(2)
    ]
    with pytest.raises(PlanError, match=r"rank 0, step 0 .*: never runs, because its message never comes"):
        verify(pair(*late, scratch=8))


def test_a_plan_that_needs_messages_to_be_buffered_is_refused() -> None:
    """Each rank writes over what it sends, as soon as that is sent: the other cannot take it before."""
    steps = [
        [Step("send", peer=1 - me, src=WHOLE), Step("reduce", peer=1 - me, dst=WHOLE, deps=(0,))] for me in range(2)
    ]
    with pytest.raises(PlanError, match="never runs, because step 0, which it depends on, never completes"):
        verify(pair(*steps))


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (["send", "recv"], "lacks the contributions of ranks"),
        (["reduce", "reduce"], "more than once"),
    ],
)
def test_wrong_results_are_described(one: list[str], words: str) -> None:
    """Rank 0 sends its vector (twice, for two reduces); what rank 1 does is not an all-reduce."""
    if one == ["send", "recv"]:
        plan = pair([Step("send", peer=1, src=WHOLE)], [Step("recv", peer=0, dst=WHOLE)])
    else:
        send = Step("send", peer=1, src=WHOLE)
        reduce = Step("reduce", peer=0, dst=WHOLE)
        plan = pair(
            [send, send, Step("recv", peer=1, dst=WHOLE, deps=(0, 1))],
            [reduce, reduce, Step("send", peer=0, src=WHOLE)],
        )
    with pytest.raises(PlanError, match=words):
        verify(plan)


def test_elements_in_the_wrong_place_are_described() -> None:
    problem = Problem("all_gather", 1, counts=(4,))
    steps = (
        Step("copy", src=Span("input", 0, 2), dst=Span("output", 2, 4)),
        Step("copy", src=Span("input", 2, 4), dst=Span("output", 0, 2)),
    )
    with pytest.raises(
        PlanError, match=r"rank 0: output\[0\] holds element 2 \(counted over all inputs\) instead of element 0"
    ):
        verify(Plan(problem, "by hand", (RankPlan(0, steps),)))
    with pytest.raises(PlanError, match="element 0 of output is never written"):
        verify(Plan(problem, "by hand", (RankPlan(0, steps[:1]),)))


def test_mixing_elements_is_found() -> None:
    problem = Problem("reduce", 1, count=2)
    steps = (
        Step("copy", src=Span("input", 0, 2), dst=Span("output", 0, 2)),
        Step("reduce", src=Span("input", 1, 2), dst=Span("output", 0, 1), deps=(0,)),
    )
    with pytest.raises(PlanError, match="a combination of different elements"):
        verify(Plan(problem, "by hand", (RankPlan(0, steps),)))


def test_input_is_only_read() -> None:
    problem = Problem("all_gather", 1, counts=(4,))
    step = Step("copy", src=Span("output", 0, 4), dst=Span("input", 0, 4))
    with pytest.raises(PlanError, match="writes to input, which is only read"):
        verify(Plan(problem, "by hand", (RankPlan(0, (step,)),)))


def test_levels_are_checked_against_the_topology() -> None:
    plan = build(PAIR, Topology((0, 1)), "ring")
    verify(plan, Topology((0, 1)))
    with pytest.raises(PlanError, match="its level is 'inter', but rank 1 is 'intra'"):
        verify(plan, Topology((0, 0)))
    with pytest.raises(PlanError, match="the topology has 3 ranks, the plan 2"):
        verify(plan, Topology((0, 0, 0)))


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (Problem("all_reduce", 0), "for 0 ranks"),
        (Problem("broadcast", 2, root=2), "the root is rank 2"),
        (Problem("all_gather", 2, counts=(1,)), "1 counts for 2 ranks"),
        (Problem("all_to_all", 2, matrix=((1, 1), (1,))), "2 rows of 2 counts"),
        (Problem("all_reduce", 1, count=-1), "negative count"),
    ],
)
def test_problems_must_make_sense(problem: Problem, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        verify(Plan(problem, "by hand", tuple(RankPlan(rank, ()) for rank in range(problem.size))))


def native_pair(second: Step | None = None) -> Plan:
    """An all-reduce as a library's reduce-scatter and all-gather, in place."""
    ranks = []
    for me, part in enumerate((FIRST, SECOND)):
        program = Program(me)
        program.native("reduce_scatter", (0, 1), WHOLE, part)
        program.native("all_gather", (0, 1), part, WHOLE)
        ranks.append(program.finish())
    if second is not None:
        ranks[1] = RankPlan(1, (second, ranks[1].steps[1]))
    return Plan(PAIR, "native", tuple(ranks))


def test_library_collectives_have_their_meaning() -> None:
    verify(native_pair())
    program = Program(0)
    program.native("all_reduce", (0, 1), WHOLE, WHOLE)
    steps = program.finish().steps
    verify(pair(list(steps), list(steps)))
    with pytest.raises(PlanError, match="never runs"):
        verify(pair(list(steps), []))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"native": "all_gather"}, "does not fit step 0 of rank 0"),
        ({"dst": Span("data", 5, 8)}, "does not fit"),
        ({"dst": FIRST}, "overlap other than as the library's in-place form"),
        ({"native": "shuffle"}, "no library collective 'shuffle'"),
        ({"group": (0,)}, "must hold this rank"),
        ({"group": (0, 1, 1)}, "must hold this rank"),
        ({"group": (1, 0)}, "never runs"),
    ],
)
def test_library_collectives_that_do_not_fit(fields: dict, words: str) -> None:
    step = Step("native", src=WHOLE, dst=SECOND, native="reduce_scatter", group=(0, 1))
    verify(native_pair(step))
    with pytest.raises(PlanError, match=words):
        verify(native_pair(replace(step, **fields)))


def test_random_dependencies_are_judged_as_brute_force_does() -> None:
    """Plans of one rank with random steps and dependencies: what passes gives one result in every order."""
    random_ = random.Random(11)
    passed = 0
    for _ in range(400):
        steps: list[Step] = []
        for index in range(4):
            start = random_.randrange(3)
            src, dst = Span("input", start, start + 2), Span("output", start, start + 2)
            deps = tuple(sorted(random_.sample(range(index), random_.randint(0, min(index, 2)))))
            steps.append(Step(random_.choice(["copy", "reduce"]), random_.randrange(2), None, src, dst, deps))
        plan = Plan(Problem("reduce", 1, count=4), "random", (RankPlan(0, tuple(steps)),))
        try:
            verify(plan)
        except PlanError:
            continue
        passed += 1
        assert all(brute.is_right(plan, random_) for _ in range(20))
    assert passed >= 5

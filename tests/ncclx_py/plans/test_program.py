"""`Program` derives dependencies that are enough: in any order that they allow, a programme does what it does in order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from harness import load

from ncclx_py.plans.plan import Plan, Problem, Program, RankPlan, Span
from ncclx_py.plans.verify_order import check_order

brute = load(Path(__file__).with_name("brute.py"), "plan_brute")

pytestmark = pytest.mark.unit

LENGTH = 12


def programme(random_: random.Random) -> RankPlan:
    """Local steps on spans that overlap in all ways, each on a lane of its own: only dependencies order them."""
    program = Program(0)
    for lane in range(random_.randint(1, 14)):
        length = random_.randint(0, 6)
        start, target = random_.randint(0, LENGTH - length), random_.randint(0, LENGTH - length)
        names = random_.sample(["data", "scratch"], 2)
        src, dst = Span(names[0], start, start + length), Span(names[1], target, target + length)
        if random_.random() < 0.5:
            program.copy(src, dst, lane=lane)
        else:
            program.reduce(dst, src=src, lane=lane)
    return program.finish(scratch=LENGTH)


def in_order(rank_plan: RankPlan, memory: dict[str, list[int]]) -> dict[str, list[int]]:
    memory = {name: list(elements) for name, elements in memory.items()}
    for step in rank_plan.steps:
        assert step.src is not None
        assert step.dst is not None
        for here, there in zip(range(step.src.start, step.src.stop), range(step.dst.start, step.dst.stop), strict=True):
            value = memory[step.src.buffer][here]
            memory[step.dst.buffer][there] = value + (memory[step.dst.buffer][there] if step.op == "reduce" else 0)
    return memory


@pytest.mark.parametrize("seed", range(4))
def test_dependencies_are_enough(seed: int) -> None:
    random_ = random.Random(seed)
    for _ in range(150):
        rank_plan = programme(random_)
        check_order(rank_plan)
        plan = Plan(Problem("all_reduce", 1, count=LENGTH), "random", (rank_plan,))
        memory = {name: [random_.getrandbits(40) for _ in range(LENGTH)] for name in ("data", "scratch")}
        wanted = in_order(rank_plan, memory)
        for _ in range(3):
            found = {name: list(elements) for name, elements in memory.items()}
            brute.execute(plan, [found], random_)
            assert found == wanted


def test_dependencies_are_only_those_needed() -> None:
    program = Program(0)
    low, high, whole = Span("data", 0, 4), Span("data", 4, 8), Span("data", 0, 8)
    program.send(low, 1)
    program.send(high, 1)
    program.recv(low, 1)
    program.reduce(high, 1)
    program.send(whole, 1)
    program.send(Span("data", 2, 2), 1)  # a signal touches nothing
    program.recv(whole, 1)
    program.send(low, 1)
    deps = [step.deps for step in program.finish().steps]
    assert deps == [(), (), (0,), (1,), (2, 3), (), (2, 3, 4), (6,)]

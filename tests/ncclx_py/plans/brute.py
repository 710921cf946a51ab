"""Executes a plan on real numbers, in a random order that the plan's semantics allow: an oracle beside the verifier.

It shares nothing with the verifier: whatever may happen at the same time is interleaved element by element, a receiver
reads the sender's memory while it receives, and undefined memory holds noise. A wrong plan gives wrong numbers (with
probability next to one over a few seeds) or raises `Stuck`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from ncclx_py.plans.plan import Plan, Problem, Span, Step

Memory = dict[str, list[Any]]


class Stuck(AssertionError):
    """No step can go on, and some are left."""


def execute(
    plan: Plan, memories: list[Memory], random_: random.Random, add: Callable[[Any, Any], Any] = lambda a, b: a + b
) -> None:
    """Runs `plan` on all ranks' memories (buffer name → elements) in place; messages must match (else `Stuck`)."""
    _Execution(plan, memories, random_, add).run()


def memories_for(problem: Problem, scratch: list[int], random_: random.Random) -> list[Memory]:
    """Random numbers in the inputs, noise elsewhere."""
    return [
        {name: [random_.getrandbits(60) for _ in range(length)] for name, length in lengths.items()}
        for lengths in ({**problem.lengths(rank), "scratch": scratch[rank]} for rank in range(problem.size))
    ]


def expected(problem: Problem, memories: list[Memory]) -> list[list[int] | None]:
    """What each rank's result must be, by the definition of the collective; None where nothing is asked."""
    size, name = problem.size, problem.collective
    starts = [sum(problem.counts[:rank]) for rank in range(len(problem.counts) + 1)]
    if name == "all_reduce":
        return [[sum(column) for column in zip(*(memory["data"] for memory in memories))]] * size
    if name == "broadcast":
        return [list(memories[problem.root]["data"])] * size
    inputs = [memory["input"] for memory in memories]
    if name == "reduce":
        total = [sum(column) for column in zip(*inputs)]
        return [total if rank == problem.root else None for rank in range(size)]
    if name == "reduce_scatter":
        total = [sum(column) for column in zip(*inputs)]
        return [total[starts[rank] : starts[rank + 1]] for rank in range(size)]
    if name == "all_gather":
        return [[element for block in inputs for element in block]] * size
    return [
        [
            element
            for source in range(size)
            for element in inputs[source][sum(problem.matrix[source][:rank]) : sum(problem.matrix[source][: rank + 1])]
        ]
        for rank in range(size)
    ]


def result(problem: Problem, memory: Memory) -> list[Any]:
    return memory["data" if problem.collective in ("all_reduce", "broadcast") else "output"]


def is_right(plan: Plan, random_: random.Random) -> bool:
    """Whether one random execution ends with the right result, and with the inputs as they were."""
    problem = plan.problem
    memories = memories_for(problem, [rank_plan.scratch for rank_plan in plan.ranks], random_)
    answers = expected(problem, memories)
    before = [list(memory.get("input", [])) for memory in memories]
    try:
        execute(plan, memories, random_)
    except (Stuck, IndexError):
        return False
    same = all(answer is None or result(problem, memory) == answer for answer, memory in zip(answers, memories))
    return same and before == [memory.get("input", []) for memory in memories]


class _Active:
    """A step under way: the elements that it has yet to move."""

    def __init__(self, rank: int, index: int, sender: tuple[int, int] | None, elements: list[int]) -> None:
        self.rank, self.index, self.sender, self.elements = rank, index, sender, elements


class _Execution:
    def __init__(
        self, plan: Plan, memories: list[Memory], random_: random.Random, add: Callable[[Any, Any], Any]
    ) -> None:
        self.steps = [rank_plan.steps for rank_plan in plan.ranks]
        self.memories, self.random, self.add = memories, random_, add
        self.started = [[False] * len(steps) for steps in self.steps]
        self.complete = [[False] * len(steps) for steps in self.steps]
        self.next: dict[tuple[int, int], int] = {}  # (rank, lane) → place in the lane
        self.lanes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for rank, steps in enumerate(self.steps):
            for index, step in enumerate(steps):
                self.lanes[(rank, step.lane)].append(index)
        self.sent: dict[tuple[int, int, int], list[int]] = defaultdict(list)  # posted and not yet taken
        self.active: list[_Active] = []

    def run(self) -> None:
        while True:
            startable = self._startable()
            choices = len(startable) + len(self.active)
            if not choices:
                break
            pick = self.random.randrange(choices)
            if pick < len(startable):
                self._start(*startable[pick])
            else:
                self._progress(self.active[pick - len(startable)])
        if not all(all(done) for done in self.complete):
            raise Stuck("the ranks wait for each other")

    def _startable(self) -> list[tuple[int, int]]:
        found = []
        for (rank, lane), indexes in self.lanes.items():
            place = self.next.get((rank, lane), 0)
            if place == len(indexes):
                continue
            index = indexes[place]
            before = indexes[place - 1] if place else None
            if before is not None and self.steps[rank][before].op != "send" and not self.complete[rank][before]:
                continue
            if all(self.complete[rank][dep] for dep in self.steps[rank][index].deps) and self._has_message(rank, index):
                found.append((rank, index))
        return found

    def _has_message(self, rank: int, index: int) -> bool:
        step = self.steps[rank][index]
        if step.op in ("send", "copy") or step.peer is None:
            return True
        return bool(self.sent[(step.peer, rank, step.lane)])

    def _start(self, rank: int, index: int) -> None:
        step = self.steps[rank][index]
        self.started[rank][index] = True
        self.next[(rank, step.lane)] = self.next.get((rank, step.lane), 0) + 1
        if step.op == "send":
            assert step.peer is not None
            self.sent[(rank, step.peer, step.lane)].append(index)
            return
        sender = None
        if step.peer is not None:
            sender = step.peer, self.sent[(step.peer, rank, step.lane)].pop(0)
        assert step.dst is not None
        source = self._source(rank, step, sender)
        if source.length != step.dst.length:
            raise Stuck("the two ends of a message differ in length")
        elements = list(range(step.dst.length))
        if self.random.random() < 0.5:
            elements.reverse()
        self.active.append(_Active(rank, index, sender, elements))

    def _source(self, rank: int, step: Step, sender: tuple[int, int] | None) -> Span:
        src = step.src if sender is None else self.steps[sender[0]][sender[1]].src
        assert src is not None
        return src

    def _progress(self, active: _Active) -> None:
        """Moves some of the elements; at the end, the step is complete and so is the send that it met."""
        step = self.steps[active.rank][active.index]
        source = self._source(active.rank, step, active.sender)
        theirs = self.memories[active.rank if active.sender is None else active.sender[0]][source.buffer]
        assert step.dst is not None
        mine = self.memories[active.rank][step.dst.buffer]
        number = self.random.choice([1, len(active.elements), (len(active.elements) + 1) // 2])
        for element in active.elements[:number]:
            value = theirs[source.start + element]
            place = step.dst.start + element
            mine[place] = self.add(mine[place], value) if step.op == "reduce" else value
        del active.elements[:number]
        if not active.elements:
            self.complete[active.rank][active.index] = True
            if active.sender is not None:
                self.complete[active.sender[0]][active.sender[1]] = True
            self.active.remove(active)

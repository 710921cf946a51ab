"""Whether any two conflicting accesses to the memory of one rank are ordered, by dependencies and lanes.

Two accesses conflict when they touch the same element and one of them writes. A step is ordered after another when
that one is sure to be complete before it starts, which follows from (see plan.py):

- a dependency: the step named is complete, and so is whatever was complete before that one started;
- the step before it in its lane: the same, unless that is a send, which need only have been started.

A send reads its `src` until it is complete. Messages from other ranks are not counted on to order anything.
"""

from __future__ import annotations

from bisect import bisect_left

from ncclx_py.plans.errors import PlanError
from ncclx_py.plans.plan import RankPlan, Span, Step
from ncclx_py.plans.text import describe


def check_order(rank_plan: RankPlan) -> None:
    """Raises `PlanError` for the first step that is not ordered after one that it conflicts with."""
    steps = rank_plan.steps
    complete = completed_before(steps)
    memory = _Memory(steps)
    for index, step in enumerate(steps):
        for other in memory.conflicts(step):
            if not complete[index] >> other & 1:
                raise PlanError(
                    f"rank {rank_plan.rank}, step {index} ({describe(step)}): may run at the same time as step {other} "
                    f"({describe(steps[other])}), which touches the same elements; it must depend on it"
                )
        memory.note(index, step)


def completed_before(steps: tuple[Step, ...]) -> list[int]:
    """For each step, the steps that are sure to be complete before it starts: bit i for step i."""
    before: list[int] = []
    last: dict[int, int] = {}  # lane → its latest step
    for index, step in enumerate(steps):
        known = 0
        for dep in step.deps:
            known |= before[dep] | 1 << dep
        if step.lane in last:
            previous = last[step.lane]
            known |= before[previous]
            if steps[previous].op != "send":
                known |= 1 << previous
        before.append(known)
        last[step.lane] = index
    return before


class _Memory:
    """For each piece of memory, its latest writer and those that have read it since.

    Earlier accesses need not be kept: the latest writer was found to be ordered after them. A piece is what no span of
    the plan starts or stops within.
    """

    def __init__(self, steps: tuple[Step, ...]) -> None:
        points: dict[str, set[int]] = {}
        for step in steps:
            for span in (step.src, step.dst):
                if span is not None:
                    points.setdefault(span.buffer, set()).update((span.start, span.stop))
        self._points = {buffer: sorted(found) for buffer, found in points.items()}
        self._writer: dict[str, list[int]] = {buffer: [-1] * len(found) for buffer, found in points.items()}
        self._readers: dict[str, list[list[int]]] = {buffer: [[] for _ in found] for buffer, found in points.items()}

    def conflicts(self, step: Step) -> set[int]:
        """Earlier steps that must be complete before `step` starts."""
        found: set[int] = set()
        if step.src is not None:
            found.update(self._writer[step.src.buffer][piece] for piece in self._pieces(step.src))
        if step.dst is not None:
            for piece in self._pieces(step.dst):
                found.add(self._writer[step.dst.buffer][piece])
                found.update(self._readers[step.dst.buffer][piece])
        found.discard(-1)
        return found

    def note(self, index: int, step: Step) -> None:
        if step.src is not None:
            for piece in self._pieces(step.src):
                self._readers[step.src.buffer][piece].append(index)
        if step.dst is not None:
            for piece in self._pieces(step.dst):
                self._writer[step.dst.buffer][piece] = index
                self._readers[step.dst.buffer][piece] = []

    def _pieces(self, span: Span) -> range:
        points = self._points[span.buffer]
        return range(bisect_left(points, span.start), bisect_left(points, span.stop))

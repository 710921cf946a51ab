"""Which plans this process has verified, so that none is verified twice, whatever group it is for.

    mark = mark_of(topology, problem, choice)      # equal in all processes
    if mark not in VERIFIED: ...; VERIFIED.add(mark)
    VERIFIED.recent()                              # rank 0 tells them when a group is made: for those nobody asks it again

Rank 0 of a group verifies for all. What it says it has verified, the others take from its card; both then go by that list, so that
all ranks know alike which plans still need its word.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from typing import Any

from ncclx_py.plans.algorithms.registry import find
from ncclx_py.plans.plan import Problem
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Choice

_KEPT = 4096  # marks
_TOLD = 64  # of them, the latest


class Verified:
    """Marks of plans, in the order in which they were last asked for."""

    def __init__(self) -> None:
        self._marks: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, mark: str) -> bool:
        with self._lock:
            known = mark in self._marks
            if known:
                self._marks.move_to_end(mark)
            return known

    def add(self, mark: str) -> None:
        with self._lock:
            self._marks[mark] = None
            self._marks.move_to_end(mark)
            if len(self._marks) > _KEPT:
                self._marks.popitem(last=False)

    def recent(self) -> list[str]:
        """The latest marks."""
        with self._lock:
            return list(self._marks)[-_TOLD:]


VERIFIED = Verified()


def structure(problem: Problem, choice: Choice) -> tuple[Any, ...]:
    """What a verification stands for: a plan of the same algorithm, and sizes of the same class, has the same steps.

    The counts of all_to_all change from call to call; there one verification stands for all of an algorithm, even and
    uneven.
    """
    parameters = tuple(sorted(choice.parameters.items()))
    if problem.collective == "all_to_all":
        sizes: tuple[Any, ...] = (_is_even(problem.matrix),)
    else:
        sizes = (problem.count.bit_length(), len(set(problem.counts)) > 1, max(problem.counts, default=0).bit_length())
    return (problem.collective, choice.algorithm, parameters, problem.root, *sizes)


def mark_of(topology: Topology, problem: Problem, choice: Choice) -> str:
    """`structure` on a topology, built by the function that the algorithm's name stands for now."""
    build = find(problem.collective, choice.algorithm).build
    what = (structure(problem, choice), topology, build.__module__, build.__qualname__)
    return hashlib.blake2b(repr(what).encode(), digest_size=9).hexdigest()


def _is_even(matrix: tuple[tuple[int, ...], ...]) -> bool:
    return len({count for row in matrix for count in row}) == 1

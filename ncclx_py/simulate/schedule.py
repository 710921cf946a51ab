"""Plans as arrays: what the event engine plays.

    schedule = from_plan(plan, itemsize=4)                             # any plan, all ranks built
    schedule = from_symmetry(find_symmetry(...), itemsize=4)           # see symmetry.py: one plan stands for a class of ranks

A step has a number of its own; those of a rank follow one another. Ranks with the same steps (but for their peers) share one
table of successors, so that thousands of ranks of a symmetric plan take a few bytes per step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ncclx_py.plans.plan import Plan, Step

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
SEND, RECEIVE, LOCAL = 0, 1, 2


@dataclass(frozen=True)
class Shape:
    """The steps of one rank without its peers: kinds, bytes, and which steps wait for which.

    `waits[i]`: events that step i waits for. A step's successors wait for its start (`at_start`) or its end (`at_end`); both
    are (pointers, indexes) as in a sparse matrix by rows.
    """

    kind: NDArray[np.int8]
    reduces: NDArray[np.bool_]
    size: NDArray[np.float64]
    waits: NDArray[np.int16]
    at_start: tuple[Ints, Ints]
    at_end: tuple[Ints, Ints]

    @property
    def steps(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class Schedule:
    """All steps of all ranks. `shape_of[r]` is the index of rank r's shape; `base[r]` the number of its first step.

    Per step: `peer`, the rank at the other end (−1: none), `match`, the step there that meets it, and `next_send`, the next send
    on the same channel (−1: none; for sends only).
    """

    shapes: tuple[Shape, ...]
    shape_of: Ints
    base: Ints
    peer: Ints
    match: Ints
    next_send: Ints

    @property
    def ranks(self) -> int:
        return len(self.shape_of)

    @cached_property
    def rank_of(self) -> Ints:
        """The rank of each step."""
        sizes = np.array([shape.steps for shape in self.shapes])
        return np.repeat(np.arange(self.ranks), sizes[self.shape_of])

    @property
    def steps(self) -> int:
        return len(self.peer)


def shape_of_steps(steps: Sequence[Step], itemsize: int) -> Shape:
    """Raises ValueError for native steps, which have no messages to play."""
    kinds, reduces, sizes = [], [], []
    at_start: list[list[int]] = [[] for _ in steps]
    at_end: list[list[int]] = [[] for _ in steps]
    waits = [len(step.deps) for step in steps]
    last: dict[int, int] = {}
    for index, step in enumerate(steps):
        if step.op == "native":
            raise ValueError(f"Step {index} is native: only plans of single messages can be played.")
        kinds.append(SEND if step.op == "send" else RECEIVE if step.peer is not None else LOCAL)
        reduces.append(step.op == "reduce")
        span = step.dst if step.src is None else step.src
        sizes.append(itemsize * (span.length if span else 0))
        for dep in step.deps:
            at_end[dep].append(index)
        before = last.get(step.lane)
        if before is not None:
            (at_start if steps[before].op == "send" else at_end)[before].append(index)
            waits[index] += 1
        last[step.lane] = index
    return Shape(
        np.array(kinds, np.int8),
        np.array(reduces, np.bool_),
        np.array(sizes, np.float64),
        np.array(waits, np.int16),
        _rows(at_start),
        _rows(at_end),
    )


def from_plan(plan: Plan, itemsize: int) -> Schedule:
    """A plan whose ranks are all there. Raises ValueError for native steps and for messages without another end."""
    shapes = tuple(shape_of_steps(ranked.steps, itemsize) for ranked in plan.ranks)
    base = np.concatenate([[0], np.cumsum([shape.steps for shape in shapes])]).astype(np.int64)
    total = int(base[-1])
    peer = np.full(total, -1, np.int64)
    match, next_send = peer.copy(), peer.copy()
    sends: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    receives: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for rank, ranked in enumerate(plan.ranks):
        for index, step in enumerate(ranked.steps):
            if step.peer is None:
                continue
            number = int(base[rank]) + index
            peer[number] = step.peer
            if step.op == "send":
                sends[rank, step.peer, step.lane].append(number)
            else:
                receives[step.peer, rank, step.lane].append(number)
    for channel in sends.keys() | receives.keys():
        out, into = sends[channel], receives[channel]
        if len(out) != len(into):
            raise ValueError(
                f"The plan never ends: rank {channel[0]} sends {len(out)} messages to rank {channel[1]} on lane {channel[2]}, "
                f"which takes {len(into)}."
            )
        match[out], match[into] = into, out
        next_send[out[:-1]] = out[1:]
    return Schedule(shapes, np.arange(len(shapes)), base[:-1], peer, match, next_send)


def _rows(lists: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    pointers = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(one) for one in lists], out=pointers[1:])
    return pointers, np.array([index for one in lists for index in one], np.int64)

"""The length-aware controller of SortedRL: which rollouts run next, and which of them an update takes.

Paper: arXiv 2603.23414. Known from its abstract: an over-sized pool, completions consumed in the order of their lengths, short
ones grouped into early updates, a stateful controller, unfinished trajectories kept or discarded. The rest is ours:

- A *unit* is what stays together: all samples of one prompt (one sample where a method does not ask for groups).
- A *cycle* is the pool that is worked off: ``oversubscribe`` times the units of an update. Every unit of a cycle is taken
  before any of the next one, so none starves: it waits for at most its cycle's updates. Within a cycle, those that end
  first are taken first, hence short ones early and the longest together in the end.
- The next cycle is at hand as well. Its samples start only in slots that the present one leaves idle, and only if their
  tokens can outlast the update.
- At the end of an update, what is not finished is ``drop``-ped (the prompt starts anew, with the same random numbers: under equal
  weights the same text comes again, so that dropping favours no short answer) or kept as ``partial`` with its tokens, their
  log-probabilities under the weights that wrote them, and a version for each span of tokens.
- ``max_staleness``: updates between a unit's oldest token and the one that takes it. What would be older starts anew;
  finished units that cannot wait any longer are taken before shorter ones.

Pure bookkeeping: the model is run by `distill.rollouts.sorting`. Everything is plain data and follows from the order of
completions, so `Pool.state` put back by `Pool.restore` continues exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distill.rollouts.rollout import Finish


@dataclass(slots=True)
class Response:
    """One sample of a unit, as far as it is written. ``spans``: (version of the weights, tokens), oldest first."""

    sample: int
    prompt: list[int]
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    finish: Finish | None = None
    known: int = 0  # tokens that it is known to have, from attempts that were dropped

    def write(self, ids: list[int], logprobs: list[float], version: int, finish: Finish | None) -> None:
        """``ids`` is the whole response by now; what is new in it was written by ``version`` of the weights."""
        fresh = len(ids) - len(self.ids)
        if fresh:
            self.spans.append((version, fresh))
        self.ids, self.logprobs, self.finish = ids, logprobs, finish

    def clear(self) -> int:
        """Forget what is written; returns how many tokens that was. What ended without a token (it was skipped) stays so."""
        count = len(self.ids)
        if not count:
            return 0
        self.known = max(self.known, count)
        self.ids, self.logprobs, self.spans, self.finish = [], [], [], None
        return count


@dataclass(slots=True)
class Unit:
    """The samples of one prompt, which enter one update together."""

    number: int
    responses: list[Response]

    @property
    def finished(self) -> bool:
        return all(response.finish is not None for response in self.responses)

    @property
    def length(self) -> int:
        """Tokens of the longest response: what decides when the unit ends."""
        return max(len(response.ids) for response in self.responses)

    @property
    def oldest(self) -> int | None:
        """Version of the oldest token; None before the first."""
        return min((response.spans[0][0] for response in self.responses if response.spans), default=None)

    def staleness(self, version: int) -> int:
        """Updates between the oldest token and ``version``; 0 for a unit without tokens."""
        oldest = self.oldest
        return 0 if oldest is None else version - oldest


@dataclass(frozen=True, slots=True)
class Dropped:
    """What was thrown away: tokens, and units that start anew."""

    tokens: int = 0
    units: int = 0

    def __add__(self, other: Dropped) -> Dropped:
        return Dropped(self.tokens + other.tokens, self.units + other.units)


class Pool:
    """The controller of one rank. Per update: `begin`, `fill`, decode what `waiting` lists until `ready`, `take`, `end`.

    ``oversubscribe`` ≥ 1: units of a cycle over those of an update. ``unfinished``: ``drop`` | ``partial``. ``max_staleness`` ≥ 0.
    """

    def __init__(self, oversubscribe: float, unfinished: str, max_staleness: int) -> None:
        self.oversubscribe, self.partial, self.max_staleness = oversubscribe, unfinished == "partial", max_staleness
        self.cycles: list[list[Unit]] = []

    @property
    def carries(self) -> bool:
        """Whether anything written now may enter a later update."""
        return self.max_staleness > 0

    def begin(self, version: int) -> Dropped:
        """Start an update with weights ``version``; drops what has become too old for it."""
        return self._drop(unit for unit in self._units() if unit.staleness(version) > self.max_staleness)

    def missing(self, needed: int) -> int:
        """Units to `fill` in before an update of ``needed``: a whole cycle, or 0 while the present one and the next are there."""
        held = sum(map(len, self.cycles))
        enough = len(self.cycles) >= 2 and held >= needed
        return 0 if enough or needed == 0 else max(math.ceil(self.oversubscribe * needed), needed - held)

    def fill(self, units: Sequence[Unit]) -> None:
        """Add a cycle."""
        if units:
            self.cycles.append(list(units))

    def waiting(self, needed: int) -> list[Response]:
        """Samples to decode, the most urgent first.

        By cycle; then those under way before new ones, so that they do not grow old. A sample that was dropped has shown that
        it is longer than what it had: such ones come last where they would be dropped again, first where they would be kept.
        """
        sign = -1 if self.partial else 1
        queue: list[Response] = []
        taken = 0
        for cycle in self.cycles:
            if taken >= needed and not self.carries:
                break
            open_ = [r for unit in cycle for r in unit.responses if r.finish is None]
            queue += sorted(open_, key=lambda r: (-len(r.ids), sign * r.known, r.sample))
            taken += len(cycle)
        return queue

    def ready(self, needed: int) -> bool:
        """Whether an update of ``needed`` units can be taken: those of the present cycle first."""
        for cycle in self.cycles:
            if needed <= 0:
                break
            wanted = min(needed, len(cycle))
            if sum(unit.finished for unit in cycle) < wanted:
                return False
            needed -= wanted
        return needed <= 0

    def take(self, version: int, needed: int) -> list[Unit]:
        """The units of this update, removed from the pool: by cycle; what cannot wait first; then the shortest."""
        taken: list[Unit] = []
        for cycle in self.cycles:
            done = [unit for unit in cycle if unit.finished]
            done.sort(key=lambda u: (u.staleness(version) < self.max_staleness, u.length, u.number))
            taken += done[: needed - len(taken)]
        gone = {unit.number for unit in taken}
        self.cycles = [left for cycle in self.cycles if (left := [u for u in cycle if u.number not in gone])]
        return taken

    def end(self) -> Dropped:
        """After `take`: drops what is not finished, unless it is kept as partial."""
        if not self.carries:
            return self._drop(self._units())
        return Dropped() if self.partial else self._drop(unit for unit in self._units() if not unit.finished)

    def _drop(self, units: Iterable[Unit]) -> Dropped:
        lost = Dropped()
        for unit in units:
            count = sum(response.clear() for response in unit.responses)
            lost += Dropped(count, int(count > 0))
        return lost

    def _units(self) -> list[Unit]:
        return [unit for cycle in self.cycles for unit in cycle]

    # ---------------------------------------------------------------- state

    def state(self) -> list[list[dict[str, Any]]]:
        """The pool as plain lists, numbers and strings, for a checkpoint; taken between `end` and `begin`."""
        return [[asdict(unit) for unit in cycle] for cycle in self.cycles]

    def restore(self, state: list[list[dict[str, Any]]]) -> None:
        """Put back what `state` returned."""
        self.cycles = [[_unit(**unit) for unit in cycle] for cycle in state]


def _unit(number: int, responses: list[dict[str, Any]]) -> Unit:
    made = [Response(**response) for response in responses]
    for response in made:
        response.spans = [(int(version), int(tokens)) for version, tokens in response.spans]
    return Unit(number, made)

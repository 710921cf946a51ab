"""Rollouts in the order in which they end: the model under the controller of `distill.rollouts.pool`.

    rollouts = SortedRollouts(Pool(oversubscribe=4, unfinished="partial", max_staleness=4))
    units, slot_time = rollouts.update(generator, params, needed=16, version=step, more=next_units)

Each update begins from plain token lists: a new session sees the weights as they are, prefixes of partial responses are read
anew by them, and nothing of the model's state outlives the update. So a run that was resumed from `Pool.state` decodes the
same batches as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable

from distill.rollouts.flight import Flight
from distill.rollouts.generator import REFILL_SHARE, Generator, eval_mode, open_shared
from distill.rollouts.pool import Pool, Response, Unit
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.session import Session
from distill.rollouts.slot_time import SlotTime

Supply = Callable[[int], list[Unit]]
"""How many units are wanted → that many new ones, in order; fewer where the run has no more."""


class SortedRollouts:
    """Decodes until the pool can give an update its units."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def update(
        self, generator: Generator, params: SamplingParams, needed: int, version: int, more: Supply
    ) -> tuple[list[Unit], SlotTime]:
        """The ``needed`` units of the update that starts with weights ``version``, and the slot-time it took.

        Raises ``ValueError`` when ``more`` runs out before there are ``needed`` units.
        """
        pool = self.pool
        lost = pool.begin(version)
        while wanted := pool.missing(needed):
            units = more(wanted)
            pool.fill(units)
            if len(units) < wanted:
                break
        slots = self._capacity()
        meter = SlotTime()
        if slots and not pool.ready(needed):
            session, flight = generator.flight(params, slots)
            meter = SlotTime(session.slots)
            with eval_mode(generator.model):
                self._decode(session, flight, needed, version, meter)
        taken = pool.take(version, needed)
        if len(taken) < needed:
            raise ValueError(f"an update of {needed} units cannot be made: the pool has only {len(taken)}")
        lost += pool.end()
        meter.dropped, meter.requeued = lost.tokens, lost.units
        return taken, meter

    def _capacity(self) -> int:
        """Samples of the largest cycle at hand, whether written or not: rows that could be busy at the start of it."""
        return max((sum(len(unit.responses) for unit in cycle) for cycle in self.pool.cycles), default=0)

    def _decode(self, session: Session, flight: Flight, needed: int, version: int, meter: SlotTime) -> None:
        waiting = self.pool.waiting(needed)[::-1]
        owner: dict[int, Response] = {}
        while not self.pool.ready(needed):
            if waiting and (not flight or session.free * REFILL_SHARE >= session.slots):
                entering = [waiting.pop() for _ in range(min(session.free, len(waiting)))]
                owner |= _enter(session, flight, entering)
            if not flight:
                break
            meter.tick(len(flight))
            for segment in flight.step():
                session.close([segment.row])
                owner.pop(segment.row).write(segment.ids, segment.logprobs, version, segment.finish)
        for row, ids, logprobs in flight.land():
            owner[row].write(ids, logprobs, version, None)


def _enter(session: Session, flight: Flight, entering: list[Response]) -> dict[int, Response]:
    """Open a row for each response, behind what is written of it; returns row → response."""
    rows = open_shared(session, [response.prompt + response.ids for response in entering])
    flight.add(rows, [r.seed for r in entering], written=[r.logprobs for r in entering])
    return dict(zip(rows, entering, strict=True))

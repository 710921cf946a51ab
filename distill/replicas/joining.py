"""How a replica gets its seat: at once where it is as far as the others, else with a state that it fetches and catches up from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distill.distributed import rank
from distill.progress import say
from distill.replicas.agreement import agreed, together
from distill.replicas.books import Row
from distill.replicas.transfer import Feed, load_fetched
from distill.wire import travels
from ncclx_py.elastic.errors import Dropped, ElasticError
from ncclx_py.elastic.member import Fetch, Member, Seat
from ncclx_py.elastic.states import Gone

if TYPE_CHECKING:
    from distill.trainer import Trainer

travels(Seat)
travels(Fetch)


class Newcomer:
    """A replica on its way to a seat; ``learn`` takes the figures of steps that others have made. All ranks together.

    ``folder`` is the replica's own; ``deadline_s`` is how long a donor may keep it waiting.
    """

    def __init__(self, member: Member, folder: Path, deadline_s: float, learn: Callable[[list[Row]], None]) -> None:
        self._member, self._folder, self._deadline_s, self._learn = member, folder / "fetched", deadline_s, learn
        self.known = False  # the store has given this process a place

    def join(self, trainer: Trainer) -> None:
        """Get a seat, with the state that belongs to it. Raises RunFinished."""
        while True:
            place = together(lambda: self._member.join(trainer.done))
            self.known = True
            if isinstance(place, Seat):
                if place.step == trainer.done:
                    return
                # Its donor died in the moment between its becoming a member and the last update.
                together(self._member.leave)
                continue
            try:
                self._fetch(trainer, place)
                return
            except (Gone, Dropped) as error:
                say(f"replica {self._member.replica}: {error or 'not a member any more'}; trying again")
                time.sleep(0.5)

    def _fetch(self, trainer: Trainer, fetch: Fetch) -> None:
        """Load a member's state, then take the steps that were committed meanwhile, until this replica is a member."""
        feed, problem = None, None
        try:
            feed = Feed(self._member, fetch, self._deadline_s)
        except (Gone, ElasticError) as error:
            problem = str(error)
        try:
            if rank() == 0:
                shutil.rmtree(self._folder, ignore_errors=True)
            self._learn(load_fetched(trainer, feed, problem, self._folder / "state"))
            assert feed is not None
            say(f"replica {self._member.replica}: has the state of replica {fetch.donor} at step {trainer.done}")
            seat: Seat | None = None
            while seat is None or trainer.done < seat.step:
                seat = self._catch_up(trainer, feed, seat)
        finally:
            if feed is not None:
                feed.close()
            if rank() == 0:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _catch_up(self, trainer: Trainer, feed: Feed, seat: Seat | None) -> Seat | None:
        """Take one step after the donor, or learn of the seat."""
        step, must = trainer.done, seat is not None

        def look() -> tuple[bool, Seat | None]:
            if feed.has(step, wait=must):
                return True, seat
            if must:
                raise Gone(f"step {step} was committed, but the donor has not handed it over")
            answer = self._member.ready(step)
            return False, answer

        there, seat = together(look)
        if there:
            gradients, state, rows = agreed(lambda: feed.update(step))
            trainer.follow(gradients, state)
            self._learn(rows)
        return seat

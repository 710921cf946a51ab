"""One of several replicas: the same questions as in ``one.py``, answered for all jobs together.

A step is an attempt until it is committed: every replica deals itself a part of the batch by its place among the live ones,
makes it, exchanges facts and figures with the others, and sums the gradient over all in a fixed order. Then it votes. Where
anything of this fails, all attempts of that epoch end in EpochChanged and the step is made again by those who are left. After
the commit all apply the same sums, so that their weights stay equal to the bit.

What may fail is agreed upon inside the job first (``_together``): all its ranks return, or all raise the same.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from distill.config import RunConfig
from distill.distributed import device, from_rank_0, gathered, rank, total, world_size
from distill.errors import ConfigError, DistillError
from distill.progress import say
from distill.replicas.books import Row, SampleBook, SharedLog
from distill.replicas.one import Made, OneReplica, deal, most
from distill.replicas.transfer import Donor, Feed, load_fetched
from distill.runs import RunFolder
from distill.wire import decode, encode, travels
from ncclx_py.elastic.errors import Dropped, ElasticError, EpochChanged, RunFinished
from ncclx_py.elastic.journal import schedule
from ncclx_py.elastic.lanes import Lane
from ncclx_py.elastic.member import Fetch, Member, Seat, StillWaiting, new_incarnation
from ncclx_py.elastic.membership import Rules
from ncclx_py.elastic.states import Gone

if TYPE_CHECKING:
    from distill.trainer import Trainer

T = TypeVar("T")
FATES = (EpochChanged, Dropped, RunFinished, Gone)
travels(Seat)
travels(Fetch)
PR_SET_PDEATHSIG = 1  # of Linux's prctl
ATTEMPTS = 10  # at one step with the same replicas, after which something must be wrong with how they are connected


class ReplicaError(DistillError):
    """The replicas cannot go on together: no store, no connection, settings that differ."""

    on_every_rank = True
    exit_status = 1


_RAISED = {"error": ReplicaError, **{fate.__name__: fate for fate in FATES}}


class ManyReplicas(OneReplica):
    """Replica ``engine.replicas.id`` of a run. All ranks of the job call every method together."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        super().__init__(config)
        _die_with_launcher()
        spec = config.engine.replicas
        self.spec, self.id, self.folder = spec, spec.id, folder.replica
        self._schedule = _read_schedule(spec.schedule)
        rules = Rules(str(config.run.dir), spec.count, spec.min, spec.deadline_s, spec.deadline_s, spec.gather_s)
        name = from_rank_0(new_incarnation())
        self.member = self._here(lambda: Member(spec.store, self.id, rank(), name, rules, spec.patience_s))
        self.donor = self._here(lambda: Donor(self.member, 4 * spec.deadline_s))
        self.book = SampleBook(self.folder / "samples.jsonl") if rank() == 0 else None
        self.seat: Seat | None = None
        self._lane: Lane | None = None
        self._lane_epoch = self._failures = 0
        self._mine: list[int] = []
        self._finished = False
        self._known = False  # the store has given this process a place

    # Coming and going

    def enter(self, trainer: Trainer) -> bool:
        """Begin with the others from the newest checkpoint, or fetch the state of those who are further."""
        if rank() == 0:
            self.donor.log = SharedLog(trainer, lambda: self.leads)
        resumed = trainer.load_newest()
        self.member.start()
        spec = self.spec
        say(
            f"replica {self.id}: asking for a seat at {spec.store}; the run begins with all of {spec.count} replicas, or after "
            f"{spec.gather_s:g} s with at least {spec.min}"
        )
        try:
            self._join(trainer)
        except RunFinished:
            if not self._known:
                raise ReplicaError(
                    f"the run of the store at {self.spec.store} is complete; use a new --file for a new run"
                ) from None
            self._finished = True  # by the others, before this one had caught up
        return resumed or trainer.done > 0

    def begin(self, trainer: Trainer) -> None:
        """Settle who makes the step, serve newcomers, and connect the lanes. Raises RunFinished."""
        try:
            self._begin(trainer)
        except RunFinished:  # by the others: this one's weights are not the last, and it must not write them
            self._finished = True
            raise

    def _begin(self, trainer: Trainer) -> None:
        while True:
            try:
                seat = self._together(lambda: self.member.begin(trainer.done))
            except Dropped:
                self.seat = None
                say(f"step {trainer.done}: the others went on without replica {self.id}; it fetches their state")
                self._join(trainer)
                continue
            for note in seat.notes if self.seat is not None else ():
                say(f"step {trainer.done}: {note}; live: {' '.join(map(str, seat.members))}")
            self.donor.serve(trainer, seat.serve)
            self.seat = seat
            if seat.paused:
                time.sleep(0.2)
            elif self._connected(seat):
                return

    def _join(self, trainer: Trainer) -> None:
        """Get a seat, with the state that belongs to it."""
        while True:
            place = self._together(lambda: self.member.join(trainer.done))
            self._known = True
            if isinstance(place, Seat):
                if place.step == trainer.done:
                    return
                # Its donor died in the moment between its becoming a member and the last update.
                self._together(self.member.leave)
                continue
            try:
                self._fetch(trainer, place)
                return
            except (Gone, Dropped) as error:
                say(f"replica {self.id}: {error or 'not a member any more'}; trying again")
                time.sleep(0.5)

    def _fetch(self, trainer: Trainer, fetch: Fetch) -> None:
        """Load a member's state, then take the steps that were committed meanwhile, until this replica is a member."""
        feed, problem, folder = None, None, self.folder / "fetched"
        try:
            feed = Feed(self.member, fetch, self.spec.deadline_s)
        except (Gone, ElasticError) as error:
            problem = str(error)
        try:
            if rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            self._learn(load_fetched(trainer, feed, problem, folder / "state"))
            assert feed is not None
            say(f"replica {self.id}: has the state of replica {fetch.donor} at step {trainer.done}")
            seat: Seat | None = None
            while seat is None or trainer.done < seat.step:
                seat = self._catch_up(trainer, feed, seat)
        finally:
            if feed is not None:
                feed.close()
            if rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def _catch_up(self, trainer: Trainer, feed: Feed, seat: Seat | None) -> Seat | None:
        """Take one step after the donor, or learn of the seat."""
        step, must = trainer.done, seat is not None

        def look() -> tuple[bool, Seat | None]:
            if feed.has(step, wait=must):
                return True, seat
            if must:
                raise Gone(f"step {step} was committed, but the donor has not handed it over")
            answer = self.member.ready(step)
            return False, answer

        there, seat = self._together(look)
        if there:
            gradients, state, rows = self._agreed(lambda: feed.update(step))
            trainer.follow(gradients, state)
            self._learn(rows)
        return seat

    def _learn(self, rows: list[Row]) -> None:
        if self.donor.log is not None:
            self.donor.log.learn(rows)

    # One step

    def _connected(self, seat: Seat) -> bool:
        """Whether the lanes of the seat's epoch are up on all ranks; False: the epoch is being given up."""
        if self._lane is not None and self._lane_epoch == seat.epoch:
            return True
        self._disconnect()
        problem = None
        try:
            self._lane = Lane.connect(
                self.member.client,
                backend=self.spec.backend,
                epoch=seat.epoch,
                lane=rank(),
                members=seat.members,
                replica=self.id,
                timeout_s=self._lane_timeout(),
                device=device(),
            )
            self._lane_epoch = seat.epoch
            self.member.watch(seat.epoch, self._lane.abort)
        except RuntimeError as error:
            problem = f"rank {rank()}: {_first_line(error)}"
        return not self._give_up(problem)

    def _lane_timeout(self) -> float:
        """Half the deadline: who waits in vain must have said so before the others' patience ends."""
        return self.spec.deadline_s / 2

    def _disconnect(self) -> None:
        self.member.unwatch()
        if self._lane is not None:
            self._lane.abort()
            self._lane = None

    def _give_up(self, problem: str | None) -> bool:
        """True on every rank if any has a problem: the store and with it the others are told."""
        found = next((text for text in gathered(problem) if text is not None), None)
        if found is None:
            return False
        self._failures += 1
        assert self.seat is not None
        epoch = self.seat.epoch
        if self._failures > ATTEMPTS:
            raise ReplicaError(
                f"replicas {self.seat.members} could not complete one step in {ATTEMPTS} attempts: {found}. Can they reach "
                "each other (NCCLX_RAILS names the interfaces), and is engine.replicas.deadline_s long enough?"
            )
        self._disconnect()
        self._together(lambda: self.member.fail(epoch, found))
        return True

    @property
    def _contributors(self) -> list[int]:
        """The replicas that make the samples of the step: the members, or whom the schedule names."""
        assert self.seat is not None
        if self._schedule is None:
            return list(self.seat.members)
        wanted = self._schedule.get(self.seat.step)
        if wanted is None or not set(wanted) <= set(self.seat.members):
            raise ReplicaError(
                f"engine.replicas.schedule={self.spec.schedule} wants replicas {wanted} for step {self.seat.step}; live are "
                f"{list(self.seat.members)}. Start all that it names, and end at a step that it has"
            )
        return wanted

    @property
    def place(self) -> int:
        if self.id not in self._contributors:
            return rank()  # it makes nothing
        return self._contributors.index(self.id) * world_size() + rank()

    def share(self, samples: range) -> range:
        if self.id not in self._contributors:
            return samples[:0]
        return deal(samples, len(self._contributors) * world_size(), self.place)

    def passes(self, samples: range, size: int) -> int:
        """As many as the fullest rank of this job needs; at least one, because gradients are reduced in it."""
        if self.id not in self._contributors:
            return 1
        first = self._contributors.index(self.id) * world_size()
        places = range(first, first + world_size())
        return max(-(-most(samples, len(self._contributors) * world_size(), places) // size), 1)

    def facts(self, made: Made) -> list[Made]:
        ranks: list[Made] = gathered(made)
        self._mine = [fact.sample for facts, _, _ in ranks for fact in facts]
        answers = self._across("facts", ranks)
        return [made for replica in self._contributors for made in answers[replica]]

    def total(self, values: list[float]) -> list[float]:
        """Summed in the order of the replicas' ids, in fp64."""
        answers = self._across("figures", total(values))
        sums = [0.0] * len(values)
        for replica in self._contributors:
            sums = [left + right for left, right in zip(sums, answers[replica], strict=True)]
        return sums

    def _across(self, stage: str, mine: Any) -> dict[int, Any]:
        """Every replica's value of a stage that all have come to."""
        assert self.seat is not None
        assert self._lane is not None
        seat, lane = self.seat, self._lane

        def meet() -> tuple[str | None, dict[int, Any]]:
            self.member.arrive(seat.epoch, stage)
            try:
                return None, {r: decode(data) for r, data in lane.exchange(encode(mine)).items()}
            except (RuntimeError, ValueError) as error:
                return f"{stage}: {_first_line(error)}", {}

        problem, answers = self._together(meet)
        if self._give_up(problem):
            raise EpochChanged
        return answers

    def commit(self, trainer: Trainer) -> None:
        """Sum the gradient over the replicas, then decide. Raises EpochChanged, Dropped: nothing was applied."""
        assert self.seat is not None
        assert self._lane is not None
        seat, problem = self.seat, None
        gradients = trainer.engine.gradients()
        try:
            self._lane.sum(gradients, self._contributors)
        except RuntimeError as error:
            problem = f"rank {rank()}: {_first_line(error)}"
        if self._give_up(problem):
            raise EpochChanged
        if self.book is not None:
            self.book.write(seat.step, seat.epoch, self._contributors, self._mine)
        self._together(lambda: self.member.vote(seat.epoch, seat.step))
        self._failures = 0
        self.donor.applied(seat.step, gradients)

    # What is written

    @property
    def leads(self) -> bool:  # type: ignore[override]
        """The live replica with the lowest id writes."""
        return self.seat is not None and self.id == min(self.seat.members)

    def figures(self) -> dict[str, float]:
        assert self.seat is not None
        return {"replica/live": float(len(self._contributors)), "replica/epoch": float(self.seat.epoch)}

    def log(self, trainer: Trainer) -> SharedLog:
        assert self.donor.log is not None
        return self.donor.log

    def save(self, save: Callable[[], None]) -> None:
        """Saving takes as long as it takes: the others wait for a replica that says it is busy."""
        if self.leads:
            self.member.busy = True
            try:
                save()
            finally:
                self.member.busy = False

    def conclude(self, write: Callable[[], None]) -> None:
        """The leading replica writes; should it die over that, the next one does."""
        while not self._finished:
            try:
                if self.leads:
                    write()
                    self._together(self.member.finish)
                else:
                    self._together(self._await_finish)
                self._finished = True
            except EpochChanged:
                self.seat = self._together(self._begin_after)
            except RunFinished:
                self._finished = True

    def _await_finish(self) -> None:
        assert self.seat is not None
        self.member.await_finish(self.seat.epoch)

    def _begin_after(self) -> Seat:
        """Who is there after the last step."""
        assert self.seat is not None
        return self.member.begin(self.seat.step + 1)

    def close(self) -> None:
        self._disconnect()
        self.member.close()
        self.donor.close()
        if self.book is not None:
            self.book.close()

    # Agreement inside the job

    def _together(self, ask: Callable[[], T]) -> T:
        """Rank 0 asks, all ranks get the answer or raise what it raised."""
        while True:
            answer: tuple[str, Any] = ("", None)
            if rank() == 0:
                try:
                    answer = ("value", ask())
                except StillWaiting:
                    answer = ("waiting", None)  # the other ranks must not wait in one collective for ever
                except FATES as fate:
                    answer = (type(fate).__name__, str(fate))
                except ElasticError as error:
                    answer = ("error", str(error))
            kind, value = from_rank_0(answer)
            if kind == "value":
                return value
            if kind != "waiting":
                raise _RAISED[kind](value)

    def _agreed(self, ask: Callable[[], T]) -> T:
        """Every rank asks for itself; all go on, or all raise Gone."""
        value, problem = None, None
        try:
            value = ask()
        except (Gone, ElasticError) as error:
            problem = f"rank {rank()}: {error}"
        if found := next((text for text in gathered(problem) if text is not None), None):
            raise Gone(found)
        return value  # type: ignore[return-value]

    @staticmethod
    def _here(make: Callable[[], T]) -> T:
        try:
            return make()
        except (ElasticError, OSError) as error:
            raise ReplicaError(f"engine.replicas: {error}") from None


def make_replicas(config: RunConfig, folder: RunFolder) -> OneReplica:
    """What the trainer asks: for a job on its own, or one of several. Raises ConfigError, ReplicaError."""
    if config.engine.replicas.enabled and config.rollout.schedule != "plain":
        raise ConfigError(
            f"rollout.schedule={config.rollout.schedule} carries texts from step to step, which a replica that dies would lose; "
            "set rollout.schedule=plain, or engine.replicas.enabled=false"
        )
    return ManyReplicas(config, folder) if config.engine.replicas.enabled else OneReplica(config)


def _die_with_launcher() -> None:
    """Under torchrun: a launcher that is killed takes this rank with it. A replica without one would train on, unseen by
    whoever starts it again under the same id."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _read_schedule(path: str | None) -> dict[int, list[int]] | None:
    if path is None:
        return None
    try:
        return schedule(path)
    except ElasticError as error:
        raise ConfigError(f"engine.replicas.schedule: {error}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

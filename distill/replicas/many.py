"""One of several replicas: the same questions as in ``one.py``, answered for all jobs together.

A step is an attempt until it is committed: every replica deals itself a part of the batch by its place among the live ones,
makes it, exchanges facts and figures with the others, and sums the gradient over all in a fixed order. Then it votes. Where
anything of this fails, all attempts of that epoch end in EpochChanged and the step is made again by those who are left. After
the commit all apply the same sums, so that their weights stay equal to the bit.

What may fail is agreed upon inside the job first (``agreement.py``): all its ranks return, or all raise the same.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from distill.config import RunConfig
from distill.distributed import from_rank_0, gathered, rank, total, world_size
from distill.errors import ConfigError
from distill.progress import say
from distill.replicas.agreement import ReplicaError, here, together
from distill.replicas.books import Row, SampleBook, SharedLog
from distill.replicas.joining import Newcomer
from distill.replicas.lanes import Lanes
from distill.replicas.one import Made, OneReplica, deal, most
from distill.replicas.transfer import Donor
from distill.runs import RunFolder
from ncclx_py.elastic.errors import Dropped, ElasticError, EpochChanged, RunFinished
from ncclx_py.elastic.journal import schedule
from ncclx_py.elastic.member import Member, Seat, new_incarnation
from ncclx_py.elastic.membership import Rules

if TYPE_CHECKING:
    from distill.trainer import Trainer

PR_SET_PDEATHSIG = 1  # of Linux's prctl


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
        self.member = here(lambda: Member(spec.store, self.id, rank(), name, rules, spec.patience_s))
        self.donor = here(lambda: Donor(self.member, 4 * spec.deadline_s))
        self.book = SampleBook(self.folder / "samples.jsonl") if rank() == 0 else None
        self.seat: Seat | None = None
        self.newcomer = Newcomer(self.member, self.folder, spec.deadline_s, self._learn)
        self.lanes = Lanes(self.member, spec)
        self._mine: list[int] = []
        self._finished = False

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
            self.newcomer.join(trainer)
        except RunFinished:
            if not self.newcomer.known:
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
                seat = together(lambda: self.member.begin(trainer.done))
            except Dropped:
                self.seat = None
                say(f"step {trainer.done}: the others went on without replica {self.id}; it fetches their state")
                self.newcomer.join(trainer)
                continue
            for note in seat.notes if self.seat is not None else ():
                say(f"step {trainer.done}: {note}; live: {' '.join(map(str, seat.members))}")
            self.donor.serve(trainer, seat.serve)
            self.seat = seat
            if seat.paused:
                time.sleep(0.2)
            elif self.lanes.connected(seat):
                return

    def _learn(self, rows: list[Row]) -> None:
        if self.donor.log is not None:
            self.donor.log.learn(rows)

    # One step

    @property
    def _seated(self) -> Seat:
        assert self.seat is not None
        return self.seat

    @property
    def _contributors(self) -> list[int]:
        """The replicas that make the samples of the step: the members, or whom the schedule names."""
        seat = self._seated
        if self._schedule is None:
            return list(seat.members)
        wanted = self._schedule.get(seat.step)
        if wanted is None or not set(wanted) <= set(seat.members):
            raise ReplicaError(
                f"engine.replicas.schedule={self.spec.schedule} wants replicas {wanted} for step {seat.step}; live are "
                f"{list(seat.members)}. Start all that it names, and end at a step that it has"
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
        answers = self.lanes.across(self._seated, "facts", ranks)
        return [made for replica in self._contributors for made in answers[replica]]

    def total(self, values: list[float]) -> list[float]:
        """Summed in the order of the replicas' ids, in fp64."""
        answers = self.lanes.across(self._seated, "figures", total(values))
        sums = [0.0] * len(values)
        for replica in self._contributors:
            sums = [left + right for left, right in zip(sums, answers[replica], strict=True)]
        return sums

    def commit(self, trainer: Trainer) -> None:
        """Sum the gradient over the replicas, then decide. Raises EpochChanged, Dropped: nothing was applied."""
        seat, gradients = self._seated, trainer.engine.gradients()
        self.lanes.sum(seat, gradients, self._contributors)
        if self.book is not None:
            self.book.write(seat.step, seat.epoch, self._contributors, self._mine)
        together(lambda: self.member.vote(seat.epoch, seat.step))
        self.lanes.committed()
        self.donor.applied(seat.step, gradients)

    # What is written

    @property
    def leads(self) -> bool:  # type: ignore[override]
        """The live replica with the lowest id writes."""
        return self.seat is not None and self.id == min(self.seat.members)

    def figures(self) -> dict[str, float]:
        return {"replica/live": float(len(self._contributors)), "replica/epoch": float(self._seated.epoch)}

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
                    together(self.member.finish)
                else:
                    together(self._await_finish)
                self._finished = True
            except EpochChanged:
                self.seat = together(self._begin_after)
            except RunFinished:
                self._finished = True

    def _await_finish(self) -> None:
        self.member.await_finish(self._seated.epoch)

    def _begin_after(self) -> Seat:
        """Who is there after the last step."""
        return self.member.begin(self._seated.step + 1)

    def close(self) -> None:
        self.lanes.disconnect()
        self.member.close()
        self.donor.close()
        if self.book is not None:
            self.book.close()


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

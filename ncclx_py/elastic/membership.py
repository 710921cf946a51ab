"""Who takes part in which step: the rules of the store, with no input or output.

An epoch is a fixed set of members. A step goes through named stages (all members arrive, or the epoch ends) and ends in
a vote: once every member of the epoch has voted, the step is committed, and only then does anyone apply it. A member goes when

- its connection closed and did not come back within `GRACE` seconds, or its heartbeats stopped for `lease_s`;
- it is the one missing `deadline_s` after the first member arrived at a stage, or after the last stage before the vote
  (half of that after another member has reported a failure). A member that says it is busy, with a checkpoint, has time.

Each of these starts a new epoch, in which the survivors repeat the step. A replica that comes is given a donor, a member, to
fetch the state from; it says when it has caught up, and becomes a member at the next commit. Where there are no members
at all (at the start, or after the loss of all), those who come found an epoch from the newest step that any of them has.

Methods answer at once: a dict, or None where the caller has to wait for a change. `clock` gives seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

GRACE = 1.0  # seconds in which a closed connection may be replaced
NOTES = 100  # epochs whose reasons are kept for members that ask later

Answer = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rules:
    """What all replicas of a run must agree on. `count` replicas are waited for at the start, for at most `gather_s`;
    below `least` members the run pauses. `run` is its name: a store serves one."""

    run: str
    count: int
    least: int
    deadline_s: float
    lease_s: float
    gather_s: float


@dataclass(slots=True)
class Presence:
    """Signs of life of one replica: when each of its ranks was heard last, and since when a connection is missing."""

    heard: dict[int, float] = field(default_factory=dict)
    lost: dict[int, float] = field(default_factory=dict)
    busy: bool = False


@dataclass(slots=True)
class Newcomer:
    """A replica that is not a member yet. `session` names the transfer of a state from `donor`."""

    incarnation: str
    step: int
    since: float
    donor: int | None = None
    session: str = ""
    ready: bool = False


class Membership:
    """State of one run. `record` gets every decision, as a dict for the journal, before anyone can learn of it."""

    def __init__(self, clock: Callable[[], float], record: Callable[[dict[str, Any]], None]) -> None:
        self._clock, self._record = clock, record
        self.rules: Rules | None = None
        self.epoch, self.step, self.finished = 0, 0, False
        self.members: dict[int, str] = {}
        self.newcomers: dict[int, Newcomer] = {}
        self._presence: dict[tuple[int, str], Presence] = {}
        self._last_commit: tuple[int, int, dict[int, str]] | None = None  # step, epoch, members
        self._notes: list[tuple[int, str]] = []
        self._sessions = 0
        self._reports: dict[int, str] = {}  # of the current stage: member → arrived, voted or failed
        self._done: set[str] = set()  # stages that all members have reached in this attempt
        self._since: float | None = None  # when the first report of the stage came
        self._patience = 1.0  # deadlines that the others get from then on
        self._failed = ""  # the first failure of the attempt: it will be made again

    def restore(self, events: Iterable[dict[str, Any]]) -> None:
        """Take up where an earlier store stopped: every member gets a new lease."""
        for event in events:
            kind = event["event"]
            if kind == "epoch":
                self.epoch, self.step = event["epoch"], event["step"]
                self.members = {int(key): value for key, value in event["members"].items()}
                self._notes += [(self.epoch, note) for note in event["why"]]
            elif kind == "commit":
                members = {int(key): value for key, value in event["members"].items()}
                self.step, self._last_commit = event["step"] + 1, (event["step"], event["epoch"], members)
            elif kind == "rules":
                self.rules = Rules(**event["rules"])
            elif kind == "finish":
                self.finished = True
        now = self._clock()
        for identity in self.members.items():
            self._presence[identity] = Presence(heard={0: now})
        self._new_attempt()

    # Coming and going

    def join(self, replica: int, incarnation: str, step: int, rules: Rules) -> Answer | None:
        """A place in the run for a replica whose own state is that of `step`. Asked again until it is answered."""
        if self.rules is None or (self.rules.run == rules.run and not self.members and not self.newcomers):
            self._record({"event": "rules", "rules": asdict(rules)})
            self.rules = rules
        if rules != self.rules:
            return {"answer": "refused", "why": f"this replica has {rules}, the run has {self.rules}: use equal values"}
        if self.finished:
            return {"answer": "finished"}
        if self.members.get(replica) == incarnation:
            return self._seat("member")
        if self.members.get(replica) is not None or self._other_waits(replica, incarnation):
            return self._replace(replica, incarnation)
        waiting = self.newcomers.get(replica)
        if waiting is None:
            self.newcomers[replica] = waiting = Newcomer(incarnation, step, self._clock())
            self._presence.setdefault((replica, incarnation), Presence(heard={0: self._clock()}))
        self.tick()
        if self.members.get(replica) == incarnation:
            return self._seat("member")
        if self.members and waiting.donor is None:
            self._assign_donor(waiting)
        if waiting.donor is not None:
            return {"answer": "fetch", "donor": waiting.donor, "session": waiting.session, "step": self.step}
        return None

    def _other_waits(self, replica: int, incarnation: str) -> bool:
        waiting = self.newcomers.get(replica)
        return waiting is not None and waiting.incarnation != incarnation

    def _replace(self, replica: int, incarnation: str) -> Answer | None:
        """An earlier process of this replica is still listed: forget it, unless it is alive."""
        waiting = self.newcomers.get(replica)
        before = self.members.get(replica) or (waiting.incarnation if waiting else "")
        seen = self._presence.get((replica, before), Presence())
        if seen.heard and not seen.lost and self._clock() - max(seen.heard.values()) < GRACE:
            return {
                "answer": "refused",
                "why": f"replica {replica} is running already; give each replica an id of its own",
            }
        self.newcomers.pop(replica, None)
        if replica in self.members:
            self._drop([replica], "it was started again")
        return None

    def ready(self, replica: int, incarnation: str, step: int) -> Answer | None:
        """A newcomer has the state of `step`: it becomes a member when that step, or the next, is committed."""
        if self.finished:
            return {"answer": "finished"}
        if self.members.get(replica) == incarnation:
            return self._seat("member")
        waiting = self.newcomers.get(replica)
        if waiting is None or waiting.incarnation != incarnation:
            return {"answer": "dropped"}
        if waiting.donor is None or waiting.donor not in self.members:
            return {"answer": "again"}
        if step < self.step - 1:
            return {"answer": "behind", "step": self.step}
        waiting.ready, waiting.step = True, step
        if self._paused():
            self._admit()
        return self._seat("member") if self.members.get(replica) == incarnation else None

    def leave(self, replica: int, incarnation: str) -> Answer:
        """A replica goes in good order."""
        if self.members.get(replica) == incarnation:
            self._drop([replica], "it left")
        waiting = self.newcomers.get(replica)
        if waiting is not None and waiting.incarnation == incarnation:
            del self.newcomers[replica]
        return {"answer": "left"}

    def finish(self, replica: int, incarnation: str) -> Answer:
        """A member has completed the run."""
        if self.members.get(replica) == incarnation and not self.finished:
            self._record({"event": "finish"})
            self.finished = True
        return {"answer": "finished"}

    def awaits_finish(self, replica: int, incarnation: str, epoch: int) -> Answer | None:
        """Answers once another member has completed the run, or the epoch has changed."""
        if self.finished:
            return {"answer": "finished"}
        return self._outdated(replica, incarnation, epoch)

    # Signs of life

    def beat(self, replica: int, incarnation: str, rank: int, busy: bool) -> Answer:
        """A heartbeat of one rank; the answer tells it of the epoch."""
        presence = self._presence.get((replica, incarnation))
        if presence is not None:
            presence.heard[rank] = self._clock()
            presence.lost.pop(rank, None)
            presence.busy = busy if rank == 0 else presence.busy
        return {"answer": "ok", "epoch": self.epoch, "member": self.members.get(replica) == incarnation}

    def lose(self, replica: int, incarnation: str, rank: int) -> None:
        """The connection of a rank's heartbeats has closed."""
        presence = self._presence.get((replica, incarnation))
        if presence is not None:
            presence.lost.setdefault(rank, self._clock())

    def tick(self) -> bool:
        """Let time pass; True where something changed."""
        before = self.fingerprint()
        now = self._clock()
        for replica, newcomer in list(self.newcomers.items()):
            if self._silent(replica, newcomer.incarnation, now):
                del self.newcomers[replica]
                self._presence.pop((replica, newcomer.incarnation), None)
        for replica, incarnation in list(self.members.items()):
            if why := self._silent(replica, incarnation, now):
                self._drop([replica], why)
        self._check_stage(now)
        if not self.members and not self.finished:
            self._found(now)
        return before != self.fingerprint()

    def fingerprint(self) -> tuple[Any, ...]:
        """Changes whenever someone who waits may have an answer now."""
        ready = sum(waiting.ready for waiting in self.newcomers.values())
        return self.epoch, self.step, len(self._done), len(self.newcomers), ready, self._sessions, self.finished

    def _silent(self, replica: int, incarnation: str, now: float) -> str:
        """Why a replica counts as dead, "" while it does not."""
        assert self.rules is not None
        presence = self._presence.get((replica, incarnation), Presence())
        for rank, since in presence.lost.items():
            if now - since > GRACE:
                return f"the connection of its rank {rank} closed"
        for rank, heard in presence.heard.items():
            if now - heard > self.rules.lease_s:
                return f"its rank {rank} was not heard for {now - heard:.1f} s"
        return ""

    # One step

    def begin(self, replica: int, incarnation: str, step: int, known: int) -> Answer | None:
        """The epoch in which `step` is to be made. `known`: the epoch up to which the caller knows the reasons."""
        if self.finished:
            return {"answer": "finished"}
        if self.members.get(replica) != incarnation or step != self.step:
            self.leave(replica, incarnation)
            return {"answer": "dropped", "step": self.step}
        if self._failed:
            return None
        serve = [waiting.session for waiting in self.newcomers.values() if waiting.donor == replica]
        if self._paused():
            return {**self._seat("paused"), "serve": serve} if serve else None
        notes = [f"epoch {epoch}: {note}" for epoch, note in self._notes if epoch > known]
        return {**self._seat("go"), "serve": serve, "notes": notes}

    def arrive(self, replica: int, incarnation: str, epoch: int, stage: str) -> Answer | None:
        """A member has come to a stage of the step; "go" once all have."""
        if (outdated := self._outdated(replica, incarnation, epoch)) is not None:
            return outdated
        if stage in self._done:
            return {"answer": "go"}
        self._report(replica, "arrived")
        if set(self._reports) == set(self.members) and not self._failed:
            self._done.add(stage)
            self._reports.clear()
            self._since = None
            return {"answer": "go"}
        return None

    def vote(self, replica: int, incarnation: str, epoch: int, step: int) -> Answer | None:
        """A member holds the step's sums; "commit" once all do. Final: a commit is never taken back."""
        last = self._last_commit
        if last is not None and last[:2] == (step, epoch) and last[2].get(replica) == incarnation:
            return {"answer": "commit"}
        if (outdated := self._outdated(replica, incarnation, epoch)) is not None:
            return outdated
        if step != self.step:
            return {"answer": "dropped", "step": self.step}
        self._report(replica, "voted")
        if set(self._reports) == set(self.members) and not self._failed:
            self._commit()
            return {"answer": "commit"}
        return None

    def fail(self, replica: int, incarnation: str, epoch: int, why: str) -> Answer:
        """A member could not complete the step with the others, who may still be at it."""
        if (outdated := self._outdated(replica, incarnation, epoch)) is not None:
            return outdated
        if not self._failed:
            self._failed = f"replica {replica}: {why}"
            self._since, self._patience = self._clock(), 0.5
        self._report(replica, "failed")
        if set(self._reports) == set(self.members):
            self._open_epoch([self._failed])
        return {"answer": "noted"}

    def _outdated(self, replica: int, incarnation: str, epoch: int) -> Answer | None:
        if self.members.get(replica) != incarnation:
            return {"answer": "dropped", "step": self.step}
        return None if epoch == self.epoch else {"answer": "changed"}

    def _report(self, replica: int, kind: str) -> None:
        self._reports[replica] = kind
        if self._since is None:
            self._since, self._patience = self._clock(), 1.0
        if self._failed and set(self._reports) == set(self.members):
            self._open_epoch([self._failed])

    def _check_stage(self, now: float) -> None:
        """Drop who is missing although the others have waited long enough."""
        if self._since is None or self.rules is None:
            return
        missing = [replica for replica in self.members if replica not in self._reports]
        if any(self._presence.get((r, self.members[r]), Presence()).busy for r in missing):
            self._since = now
        elif now - self._since > self._patience * self.rules.deadline_s:
            self._drop(missing, f"the others waited {now - self._since:.1f} s for it")

    def _commit(self) -> None:
        members = dict(self.members)
        event = {"event": "commit", "step": self.step, "epoch": self.epoch, "members": members}
        self._record(event)
        self._last_commit = (self.step, self.epoch, members)
        self.step += 1
        self._new_attempt()
        self._admit()

    # Epochs

    def _admit(self) -> None:
        """Newcomers that have caught up become members."""
        ready = {replica: waiting for replica, waiting in self.newcomers.items() if waiting.ready}
        if ready:
            for replica, waiting in ready.items():
                self.members[replica] = waiting.incarnation
                del self.newcomers[replica]
            self._open_epoch([f"replica {replica} has joined" for replica in sorted(ready)])

    def _found(self, now: float) -> None:
        """Without members, those who wait begin: all of them, or after a while enough of them."""
        waiting, rules = self.newcomers, self.rules
        if rules is None or not waiting:
            return
        waited = now - min(newcomer.since for newcomer in waiting.values())
        if len(waiting) < rules.count and (len(waiting) < rules.least or waited < rules.gather_s):
            return
        newest = max(newcomer.step for newcomer in waiting.values())
        founders = {r: newcomer.incarnation for r, newcomer in waiting.items() if newcomer.step == newest}
        for replica in founders:
            del waiting[replica]
        self.members, self.step, self._last_commit = founders, newest, None
        self._open_epoch([f"{len(founders)} replicas begin at step {newest}"])

    def _drop(self, replicas: list[int], why: str) -> None:
        for replica in replicas:
            self._presence.pop((replica, self.members.pop(replica)), None)
        notes = [f"replica {replica} is gone: {why}" for replica in sorted(replicas)]
        self._open_epoch(notes)

    def _open_epoch(self, why: list[str]) -> None:
        self.epoch += 1
        self._record(
            {"event": "epoch", "epoch": self.epoch, "step": self.step, "members": dict(self.members), "why": why}
        )
        self._notes = [*self._notes, *((self.epoch, note) for note in why)][-NOTES:]
        self._new_attempt()
        for waiting in self.newcomers.values():
            if waiting.donor not in self.members:
                self._assign_donor(waiting)

    def _assign_donor(self, waiting: Newcomer) -> None:
        """The member with the fewest transfers gives the state."""
        waiting.ready, waiting.donor = False, None
        if self.members:
            load = [newcomer.donor for newcomer in self.newcomers.values()]
            self._sessions += 1
            waiting.donor = min(self.members, key=lambda r: (load.count(r), r))
            waiting.session = f"{waiting.incarnation}-{self._sessions}"

    def _new_attempt(self) -> None:
        self._reports.clear()
        self._done.clear()
        self._since, self._patience, self._failed = None, 1.0, ""

    def _paused(self) -> bool:
        return self.rules is not None and len(self.members) < self.rules.least

    def _seat(self, answer: str) -> Answer:
        return {"answer": answer, "epoch": self.epoch, "members": sorted(self.members), "step": self.step}

"""What the replicas exchange in one epoch: facts, figures and gradients, over the lanes between equal ranks of all of them.

Where any of it fails on any rank, all ranks of the job drop their lanes and tell the store, which ends the epoch for everybody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distill.config.sections import ReplicasSpec
from distill.distributed import device, rank
from distill.replicas.agreement import ReplicaError, first_line, first_problem, together
from distill.wire import decode, encode
from ncclx_py.elastic.errors import EpochChanged
from ncclx_py.elastic.lanes import Lane
from ncclx_py.elastic.member import Member, Seat

ATTEMPTS = 10  # at one step with the same replicas, after which something must be wrong with how they are connected


class Lanes:
    """This rank's lane to the other replicas, made anew for each epoch. All ranks of the job call every method together."""

    def __init__(self, member: Member, spec: ReplicasSpec) -> None:
        self._member, self._spec = member, spec
        self._lane: Lane | None = None
        self._epoch = self._failures = 0

    def connected(self, seat: Seat) -> bool:
        """Whether the lanes of the seat's epoch are up on all ranks; False: the epoch is being given up."""
        if self._lane is not None and self._epoch == seat.epoch:
            return True
        self.disconnect()
        problem = None
        try:
            self._lane = Lane.connect(
                self._member.client,
                backend=self._spec.backend,
                epoch=seat.epoch,
                lane=rank(),
                members=seat.members,
                replica=self._member.replica,
                timeout_s=self._timeout(),
                device=device(),
            )
            self._epoch = seat.epoch
            self._member.watch(seat.epoch, self._lane.abort)
        except RuntimeError as error:
            problem = f"rank {rank()}: {first_line(error)}"
        return not self._give_up(seat, problem)

    def across(self, seat: Seat, stage: str, mine: Any) -> dict[int, Any]:
        """Every replica's value of a stage that all have come to. Raises EpochChanged."""
        assert self._lane is not None
        lane = self._lane

        def meet() -> tuple[str | None, dict[int, Any]]:
            self._member.arrive(seat.epoch, stage)
            try:
                return None, {r: decode(data) for r, data in lane.exchange(encode(mine)).items()}
            except (RuntimeError, ValueError) as error:
                return f"{stage}: {first_line(error)}", {}

        problem, answers = together(meet)
        if self._give_up(seat, problem):
            raise EpochChanged
        return answers

    def sum(self, seat: Seat, gradients: list[Tensor], contributors: Sequence[int]) -> None:
        """Add up the gradients of the contributing replicas, in place. Raises EpochChanged."""
        assert self._lane is not None
        problem = None
        try:
            self._lane.sum(gradients, contributors)
        except RuntimeError as error:
            problem = f"rank {rank()}: {first_line(error)}"
        if self._give_up(seat, problem):
            raise EpochChanged

    def committed(self) -> None:
        """A step was: the attempts are counted from here."""
        self._failures = 0

    def disconnect(self) -> None:
        self._member.unwatch()
        if self._lane is not None:
            self._lane.abort()
            self._lane = None

    def _timeout(self) -> float:
        """Half the deadline: who waits in vain must have said so before the others' patience ends."""
        return self._spec.deadline_s / 2

    def _give_up(self, seat: Seat, problem: str | None) -> bool:
        """True on every rank if any has a problem: the store and with it the others are told."""
        found = first_problem(problem)
        if found is None:
            return False
        self._failures += 1
        if self._failures > ATTEMPTS:
            raise ReplicaError(
                f"replicas {seat.members} could not complete one step in {ATTEMPTS} attempts: {found}. Can they reach "
                "each other (NCCLX_RAILS names the interfaces), and is engine.replicas.deadline_s long enough?"
            )
        self.disconnect()
        together(lambda: self._member.fail(seat.epoch, found))
        return True

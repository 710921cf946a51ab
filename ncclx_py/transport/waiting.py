"""How a plan waits: first it yields the processor a few times, then it sleeps until a bell or a socket wakes it, or for a
while that grows with the time waited; and when it stops waiting.

Every wait ends by what it waits for, by the deadline, by an abort, or by the death of a peer that it waits for.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable

from ncclx_py.errors import CollectiveError, CollectiveTimeout
from ncclx_py.transport.fabric import Fabric
from ncclx_py.transport.signature import Signature
from ncclx_py.transport.window import ASLEEP

_SPIN = 20e-6  # seconds of yielding before the first sleep
_SHORTEST, _LONGEST = 500e-6, 2e-3  # seconds asleep, where no bell and no socket wakes us
_SHARE = 8  # a sleep is this fraction of the time waited so far
_LOOK = 16  # sleeps between two looks at sockets that carry no data
_GRACE = 0.1  # seconds for a reason to arrive from a peer that is gone, or from one that noticed first
_WATCH = 0.2  # seconds of silence after which a peer on another host is watched

_PR_SET_TIMERSLACK = 29
_PUNCTUAL = threading.local()
_LIBC = ctypes.CDLL(None)

Awaited = Callable[[], dict[int, str]]  # the ranks that are waited for, and what for


class Waiting:
    """The waits of one call. `remote` says whether other hosts matter.

    It does not hold on to `awaited`, which holds on to it: each call would leave a cycle for the garbage collector.
    """

    def __init__(self, fabric: Fabric, signature: Signature, deadline: float, remote: bool) -> None:
        self._fabric, self._signature, self._deadline = fabric, signature, deadline
        self._remote = remote
        self._started = time.monotonic()
        self._since = 0.0
        self._sleeps = 0

    def pause(self, rounds: int, awaited: Awaited) -> None:
        """Lets others work. `rounds` counts the idle rounds since something moved, `awaited` says for whom they wait.

        Raises when waiting is over.
        """
        now = time.monotonic()
        if rounds == 1:
            self._since, self._sleeps = now, 0
        if now - self._since < _SPIN:
            os.sched_yield()
            return
        words = self._fabric.me.window.words
        if not words[ASLEEP]:
            words[ASLEEP] = 1  # one more round now: what came before this word would ring no bell
            return
        _be_punctual()
        self._check(now, awaited)
        self._fabric.poller.poll(min(max(_SHORTEST, (now - self._since) / _SHARE), _LONGEST))
        words[ASLEEP] = 0
        self._sleeps += 1

    def _check(self, now: float, awaited: Awaited) -> None:
        """Raises when the group is aborted, a peer that is waited for is gone, or the deadline has passed."""
        fabric = self._fabric
        if self._sleeps % _LOOK == 0:
            fabric.look()
        else:
            fabric.look_at_neighbours()
        if fabric.reason:
            raise aborted(fabric, self._signature)
        if self._sleeps % _LOOK == _LOOK - 1:
            fabric.look_for(awaited())
        if fabric.gone:
            self._look_for_the_gone(now, awaited())
        if self._remote and now > self._since + _WATCH:
            for rank in awaited():
                if not fabric.is_local(rank):
                    assert fabric.network is not None
                    fabric.network.watch(rank)
        if now > self._deadline:
            why = f"no end after {now - self._started:.3g} s{_waits_for(awaited())}"
            raise CollectiveTimeout(self._failed(why, _LATE))

    def _look_for_the_gone(self, now: float, awaited: dict[int, str]) -> None:
        for rank, gone in self._fabric.gone.items():
            if rank in awaited and now > gone.since + _GRACE:
                raise CollectiveError(self._failed(f"rank {rank} is gone ({gone.why})", _GONE))

    def _failed(self, why: str, remedy: str) -> str:
        """The text for this rank; the reason alone for all others."""
        self._fabric.adopt(f"rank {self._fabric.rank}: {self._signature}: {why}")
        return failed(self._fabric, self._signature, why, remedy)


def failed(fabric: Fabric, signature: Signature, why: str, remedy: str) -> str:
    """The text of an error that ended a call."""
    return f"{signature} failed on rank {fabric.rank} of {fabric.size}: {why}. {remedy}"


def aborted(fabric: Fabric, signature: Signature) -> CollectiveError:
    """The error of a call on a group that was aborted."""
    return CollectiveError(failed(fabric, signature, f"the group was aborted by {fabric.reason}", _ABORTED))


_LATE = (
    "Those ranks are late, dead, or called something else: compare the ranks' logs. If the work is just slow, pass a "
    "longer timeout= to init_process_group or new_group."
)
_ABORTED = "Look at the log of that rank, then destroy this group and start again."
_GONE = "Look at the log of that rank, then destroy this group and start again."


def _waits_for(awaited: dict[int, str]) -> str:
    ranks = "; ".join(f"rank {rank} ({what})" for rank, what in sorted(awaited.items()))
    return f": it waits for {ranks}" if ranks else ""


def _be_punctual() -> None:
    """Makes this thread's short sleeps short: by default the kernel adds 50 µs."""
    if not getattr(_PUNCTUAL, "done", False):
        _PUNCTUAL.done = True
        _LIBC.prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)

"""What a caller sees when a collective fails: which one, where, why, and what to do about it.

Every failure is a `CollectiveError`, a subclass of ``torch.distributed.DistBackendError`` and so of ``RuntimeError``:
code that catches torch's own errors catches ours. A deadline that passed is a `CollectiveTimeout`, which is a
``TimeoutError`` too. `failure` builds either from whatever the library underneath said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import DistBackendError

UNSET_TIMEOUT = timedelta(milliseconds=-1)  # c10d's kUnsetTimeout: "use the group's"

_TIMED_OUT = re.compile(r"timed? ?out|no end after", re.IGNORECASE)
_PEER_GONE = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|aborted|socket closed|not connected|is gone",
    re.IGNORECASE,
)


class CollectiveError(DistBackendError):
    """A collective did not complete. The state of its output tensors is undefined.

    `names_call`: whether the message says which call it was. Those from below a call give the reason and the remedy.
    """

    names_call = False


class CollectiveTimeout(CollectiveError, TimeoutError):
    """A collective or a wait passed its deadline."""


@dataclass(slots=True)
class FirstFailure:
    """The first failure on a group; those of later calls are usually its echo and say so."""

    sequence: int = 0
    message: str = ""


@dataclass(slots=True)
class Call:
    """One collective as it was asked for on this rank; named in every error about it.

    `timeout` is what the caller asked for (`UNSET_TIMEOUT`: the group's default); `async_op` is False where the
    caller will not go on before the result is there; `engine` is the library that carries it.
    """

    op: str
    group: str
    rank: int
    size: int
    sequence: int
    engine: str = ""
    timeout: timedelta = UNSET_TIMEOUT
    async_op: bool = True
    history: FirstFailure = field(default_factory=FirstFailure)

    def __str__(self) -> str:
        engine = f", {self.engine}" if self.engine else ""
        return f"{self.op} (call {self.sequence} on group {self.group!r}, rank {self.rank} of {self.size}{engine})"


def failure(call: Call, cause: BaseException) -> CollectiveError:
    """The error to raise for `call`, which `cause` ended; the first one on a group is remembered for the next."""
    kind: type[CollectiveError]
    if isinstance(cause, CollectiveError):
        if cause.names_call:
            return cause
        kind, story = type(cause), str(cause)
    else:
        reason = _reason(cause)
        kind, remedy = _diagnose(reason)
        story = f"{reason}. {remedy}"
    message = f"{call} failed: {story}"
    first = call.history
    if not first.message:
        first.sequence, first.message = call.sequence, message.replace(" failed: ", ": ", 1)
    elif first.sequence != call.sequence:
        message += f" The first failure of this group was {first.message}"
    error = kind(message)
    error.names_call = True
    return error


def overdue(call: Call, timeout: timedelta) -> CollectiveTimeout:
    """The error of a wait that gave up although the collective goes on."""
    error = CollectiveTimeout(
        f"{call} is not done after the {timeout.total_seconds():g} s that this wait allowed; it goes on. Wait again, or "
        "abort the group."
    )
    error.names_call = True
    return error


def _reason(cause: BaseException) -> str:
    """What the library said, without its source locations, boilerplate and our own text from a callback."""
    text = str(cause).strip()
    nested = re.search(r"Collective(?:Error|Timeout): .*? failed: (.*?)\. [A-Z]", text)
    line = nested.group(1) if nested else text.split("\n", 1)[0]
    line = re.sub(r"^\[[^\]]*\.(?:cc|cpp|h):\d+\]\s*", "", line)
    return re.split(r"\. This is typically caused", line)[0].rstrip(" .!") or type(cause).__name__


def _diagnose(reason: str) -> tuple[type[CollectiveError], str]:
    """The class of the error and the advice that fits what the library said."""
    if "Application timeout caused pair closure" in reason:  # gloo, on the rank where something timed out
        return CollectiveError, (
            "This rank has closed its connections to the group, after another call timed out or the group was aborted: "
            "look at the first failure of this group, then destroy it and start again."
        )
    if _PEER_GONE.search(reason):
        return CollectiveError, (
            "A peer exited, was killed or aborted: look for the first rank that failed in the logs of the others, then "
            "destroy this group and start again."
        )
    if _TIMED_OUT.search(reason):
        return CollectiveTimeout, (
            "Some rank is late, dead, or called another collective, or the same one with another size: compare the "
            "ranks' logs. If the work is just slow, pass a longer timeout= to init_process_group or new_group."
        )
    return CollectiveError, (
        "Check that every rank of the group calls the same collective with the same sizes, dtype and root."
    )

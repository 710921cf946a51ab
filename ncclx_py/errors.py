"""What a caller sees when a collective fails: which one, where, why, and what to do about it.

Every failure is a `CollectiveError`, a subclass of ``torch.distributed.DistBackendError`` and so of ``RuntimeError``:
code that catches torch's own errors catches ours. A deadline that passed is a `CollectiveTimeout`, which is a
``TimeoutError`` too. `failure` builds either from whatever the library underneath said.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

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
    """The first failure on a group; those of later calls are usually its echo and say so.

    `told` is called with each call that fails, and what ended it, once per call.
    """

    call: tuple[str, int] = ("", 0)
    message: str = ""
    told: Callable[[Call, BaseException], None] | None = None


@dataclass(eq=False)
class Call:
    """One collective, or message to a peer, as it was asked for on this rank; named in every error about it, and kept in
    the trace (``ncclx_py.watch``).

    `sequence` counts the collectives of a group, and its messages on their own. `timeout` is what the caller asked for
    (`UNSET_TIMEOUT`: the group's default); `async_op` is False where the caller will not go on before the result is there;
    `engine` is the library or the algorithm that carries it; `peer` is the group rank that a message goes to or comes
    from (−1: any, or no message), `tag` its tag.

    The rest is noted as the call goes on, for the trace: shapes, not tensors; times in ns since the epoch, 0 where that
    has not happened; the code that called and the instruction in it; how many parts have not ended; and, for what runs as a
    plan, the decision behind it and, when it failed, `progress`: steps done, steps in all, group ranks waited for.
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
    message: bool = False
    peer: int = -1
    tag: int = 0

    number: int = field(default=-1, init=False)
    inputs: Any = field(default=(), init=False)
    outputs: Any = field(default=(), init=False)
    dtype: Any = field(default=None, init=False)
    root: int = field(default=-1, init=False)
    reduce_op: Any = field(default=None, init=False)
    splits: Any = field(default=None, init=False)
    scheduled_ns: int = field(default=0, init=False)
    started_ns: int = field(default=0, init=False)
    finished_ns: int = field(default=0, init=False)
    code: Any = field(default=None, init=False)
    instruction: int = field(default=0, init=False)
    parts: int = field(default=1, init=False)
    decision: Any = field(default=None, init=False)
    progress: tuple[int, int, list[int]] | None = field(default=None, init=False)
    error: str = field(default="", init=False)
    nan: bool = field(default=False, init=False)  # NCCLX_NAN_CHECK found one in what this rank gave

    def __str__(self) -> str:
        engine = f", {self.engine}" if self.engine else ""
        op, kind = self.op, "call"
        if self.message:
            way = "" if self.peer < 0 else f" {'to' if self.op == 'send' else 'from'} rank {self.peer}"
            op, kind = f"{self.op}{way} with tag {self.tag}", "message"
        return f"{op} ({kind} {self.sequence} on group {self.group!r}, rank {self.rank} of {self.size}{engine})"

    def begun(self) -> None:
        """Its first part has begun."""
        if not self.started_ns:
            self.started_ns = time.time_ns()

    def over(self) -> None:
        """One of its parts has ended well."""
        self.parts -= 1
        if not self.parts:
            self.finished_ns = time.time_ns()

    def failed(self, cause: BaseException) -> None:
        """It, or one of its parts, has failed; only the first time counts."""
        if not self.error:
            self.error = str(cause).strip().split("\n", 1)[0] or type(cause).__name__
            self.finished_ns = time.time_ns()
            if self.history.told is not None:
                self.history.told(self, cause)


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
    first, this = call.history, (call.op, call.sequence)
    if not first.message:
        first.call, first.message = this, message.replace(" failed: ", ": ", 1)
    elif first.call != this:
        message += f" The first failure of this group was {first.message}"
    error = kind(message)
    call.failed(error)
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

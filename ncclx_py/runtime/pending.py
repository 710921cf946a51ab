"""What the CPU backend may still be running: so that leaving a group, or the process, neither loses it nor waits for ever.

A collective is forgotten when it has been waited for, or at the first call after it completed: nobody needs to wait, and
nothing piles up. gloo cannot tell whether a send has completed, and drops the message of a send whose handle is gone; a
send that its caller let go of is therefore held by a thread of its own until it is through.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import torch

from ncclx_py.errors import Call, failure

_POLL = 0.002  # seconds


class Unended:
    """Calls whose library says only when it is asked whether they have ended: NCCL's, and gloo's of sparse tensors.

    They end in the order in which they were started. Nothing is asked while a CUDA graph is captured.
    """

    def __init__(self) -> None:
        self._calls: deque[tuple[Call, Any]] = deque()
        self._looking = threading.Lock()

    def add(self, call: Call, work: Any) -> None:
        call.begun()
        self._calls.append((call, work))
        if len(self._calls) > 1:
            self.look()

    def look(self) -> None:
        """Notes which calls have ended. From any thread; who finds another one looking leaves it to it."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        if self._looking.acquire(blocking=False):
            try:
                while self._calls and self._calls[0][1].is_completed():
                    self._calls.popleft()[0].over()
            finally:
                self._looking.release()

    def older_than(self, seconds: float) -> Call | None:
        """The first call, where it began that long ago and has not ended. From any thread."""
        first = next(iter(list(self._calls)), None)
        if first is None or time.time_ns() - first[0].started_ns < seconds * 1e9 or first[1].is_completed():
            return None
        return first[0]


class Pending:
    """The unfinished works of one backend."""

    def __init__(self) -> None:
        self._works: set[Any] = set()
        self._sends: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def add(self, work: Any) -> None:
        """Remembers a work with ``is_completed``, if it has not; forgets those that have completed."""
        with self._lock:
            if self._works:
                self._works = {known for known in self._works if not known.is_completed()}
            if not work.is_completed():
                self._works.add(work)

    def forget(self, work: Any) -> None:
        with self._lock:
            self._works.discard(work)

    def hold_send(self, call: Call, native: Any) -> None:
        """Keeps a send alive that its caller has let go of, until it is through or the group's timeout ends it."""
        thread = threading.Thread(target=_finish_send, args=(call, native), name="ncclx-send", daemon=True)
        with self._lock:
            self._sends = {known for known in self._sends if known.is_alive()} | {thread}
        thread.start()

    def empty(self) -> bool:
        with self._lock:
            works, sends = list(self._works), list(self._sends)
        return all(work.is_completed() for work in works) and not any(thread.is_alive() for thread in sends)

    def drain(self, seconds: float) -> bool:
        """Waits until nothing is left; False when `seconds` pass first."""
        until = time.monotonic() + seconds
        while not self.empty():
            if time.monotonic() > until:
                return False
            time.sleep(_POLL)
        return True


def _finish_send(call: Call, native: Any) -> None:
    try:
        native.wait()
    except RuntimeError as error:
        failure(call, error)  # gloo has closed the connections of the group; every later call on it says so
    else:
        call.over()

"""What the CPU backend may still be running: so that leaving a group, or the process, neither loses it nor waits for ever.

A collective is forgotten when it has been waited for, or at the first call after it completed: nobody needs to wait, and
nothing piles up. Messages are in the mailbox (``transport/mail.py``).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

import torch

from ncclx_py.errors import Call

_POLL = 0.002  # seconds


class Unended:
    """Calls whose library says only when it is asked whether they have ended: NCCL's.

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

    def empty(self) -> bool:
        with self._lock:
            works = list(self._works)
        return all(work.is_completed() for work in works)

    def drain(self, seconds: float) -> bool:
        """Waits until nothing is left; False when `seconds` pass first."""
        until = time.monotonic() + seconds
        while not self.empty():
            if time.monotonic() > until:
                return False
            time.sleep(_POLL)
        return True

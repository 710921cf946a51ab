"""What the CPU backend may still be running: so that leaving a group, or the process, neither loses it nor waits for ever.

A collective is forgotten when it has been waited for, or at the first call after it completed: nobody needs to wait, and
nothing piles up. gloo cannot tell whether a send has completed, and drops the message of a send whose handle is gone; a
send that its caller let go of is therefore held by a thread of its own until it is through.
"""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

_POLL = 0.002  # seconds
_FOR_EVER = timedelta(days=365)  # a send that times out in gloo closes every connection of the group


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

    def hold_send(self, native: Any) -> None:
        """Keeps a send alive that its caller has let go of."""
        thread = threading.Thread(target=_finish_send, args=(native,), name="ncclx-send", daemon=True)
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


def _finish_send(native: Any) -> None:
    try:
        native.wait(_FOR_EVER)
    except RuntimeError:
        return  # the connection is gone; every later call on the group says so

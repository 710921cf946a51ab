"""The last calls of a process, in memory of a fixed size: the oldest goes when a new one comes.

Adding is one atomic step each for the number and the place, so that any thread may add and any may look, without a lock.
"""

from __future__ import annotations

import itertools
from collections import deque

from ncclx_py.errors import Call


class Ring:
    """The last `size` calls of all groups, in the order in which they were made."""

    def __init__(self, size: int) -> None:
        self._calls: deque[Call] = deque(maxlen=size)
        self._numbers = itertools.count()
        self._last = -1  # the last number
        self._forgotten = 0

    def add(self, call: Call) -> None:
        """Numbers the call (``Call.number``) and keeps it."""
        self._last = call.number = next(self._numbers)
        self._calls.append(call)

    def calls(self) -> list[Call]:
        """Those that are kept, oldest first. A copy."""
        while True:
            try:
                return list(self._calls)
            except RuntimeError:  # another thread has added one meanwhile
                continue

    def forget(self, group: str) -> None:
        """Drops the calls of a group: a new one has taken its name."""
        calls = self.calls()
        kept = [call for call in calls if call.group != group]
        self._forgotten += len(calls) - len(kept)
        self._calls.clear()
        self._calls.extend(kept)

    @property
    def dropped(self) -> int:
        """How many calls had to go to make room."""
        return self._last + 1 - len(self._calls) - self._forgotten

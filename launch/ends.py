"""The order in which this process's children end, for a launcher whose children are somebody else's to wait for.

    with Ends() as ends: …
    ends.place                   # process id → 0 for the first that ended; those of one moment share a number

A thread looks for new children and sleeps on their pidfds; it reaps nothing.
"""

from __future__ import annotations

import os
import select
import threading
from pathlib import Path

_PERIOD = 0.05  # seconds between looks for new children


class Ends:
    """Watches from ``__enter__`` to ``__exit__``."""

    def __init__(self) -> None:
        self.place: dict[int, int] = {}
        self._open: dict[int, int] = {}  # pidfd → process id
        self._known: set[int] = set()
        self._stop = threading.Event()
        self._poll = select.poll()
        self._thread = threading.Thread(target=self._watch, name="ncclx-ends", daemon=True)

    def __enter__(self) -> Ends:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for descriptor in self._open:
            os.close(descriptor)

    def _watch(self) -> None:
        while not self._stop.is_set():
            for pid in _children() - self._known:
                self._add(pid)
            self._wait(_PERIOD)
        self._wait(0.0)

    def _add(self, pid: int) -> None:
        self._known.add(pid)
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self.place[pid] = len(self.place)
            return
        self._open[descriptor] = pid
        self._poll.register(descriptor, select.POLLIN)

    def _wait(self, seconds: float) -> None:
        place = len(self.place)
        for descriptor, _ in self._poll.poll(seconds * 1000):
            self._poll.unregister(descriptor)
            os.close(descriptor)
            self.place[self._open.pop(descriptor)] = place


def _children() -> set[int]:
    """All children of this process, of whichever thread started them."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(map(int, (task / "children").read_text().split()))
        except OSError:  # a thread that has ended, or a kernel without this file
            continue
    return found

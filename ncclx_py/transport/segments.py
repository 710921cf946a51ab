"""Where in the window each call puts what it sends, and when that place is free again.

A call takes one segment. It is free when the receivers have taken all that the call sent, which is looked up when room
is needed, not waited for at the end of the call. Small calls may so run far ahead of their receivers; large ones wait,
as memory that is in the caches and mapped already is worth more. The first ``NCCLX_WINDOW_MB`` (64) of the window keep
their memory; a call that needs more gives it back.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from ncclx_py.transport.channels import Outbox
from ncclx_py.transport.window import CALLS, PAGE, Window

_ALIGNMENT = 256
_AHEAD = 4 << 20  # bytes that calls may hold in the window before a further one waits for them


class Segment(NamedTuple):
    """Bytes `start` to `stop` of the window, used by call `call` until each outbox has had its count consumed."""

    start: int
    stop: int
    call: int
    targets: tuple[tuple[Outbox, int], ...]

    def free(self) -> bool:
        return all(outbox.consumed(count) for outbox, count in self.targets)


class Segments:
    """The segments in use, ascending by start."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._kept = window.data_start + _kept_bytes()
        self._used: list[Segment] = []

    def find(self, length: int, call: int) -> int:
        """The start of `length` free bytes for `call`; −1 where there is none until a receiver takes something.

        Raises MemoryError where there never will be.
        """
        self._collect()
        if any(segment.call <= call - CALLS for segment in self._used):
            return -1  # its text is about to be overwritten
        length = -(-length // _ALIGNMENT) * _ALIGNMENT
        if self._used and length and sum(segment.stop - segment.start for segment in self._used) + length > _AHEAD:
            return -1
        start = self._window.data_start
        for segment in self._used:
            if segment.start - start >= length:
                return start
            start = max(start, segment.stop)
        if start + length > self._window.size:
            raise MemoryError(f"a call needs {length} bytes of the window, more than this machine has memory.")
        return start

    def use(self, start: int, length: int, call: int, targets: tuple[tuple[Outbox, int], ...]) -> None:
        """Notes that the call has sent everything it sends."""
        stop = start + -(-length // _ALIGNMENT) * _ALIGNMENT
        if targets:
            self._used.append(Segment(start, stop, call, targets))
            self._used.sort()
        else:
            self._trim(start, stop)

    def blockers(self) -> list[int]:
        """The ranks that have not taken what was sent to them."""
        pairs = [pair for segment in self._used for pair in segment.targets]
        return sorted({outbox.peer for outbox, count in pairs if not outbox.consumed(count)})

    def _collect(self) -> None:
        busy = []
        for segment in self._used:
            if segment.free():
                self._trim(segment.start, segment.stop)
            else:
                busy.append(segment)
        self._used = busy

    def _trim(self, start: int, stop: int) -> None:
        if stop > self._kept:
            self._window.give_back(max(start, self._kept), stop)


def _kept_bytes() -> int:
    text = os.environ.get("NCCLX_WINDOW_MB", "64")
    try:
        megabytes = int(text)
    except ValueError:
        megabytes = 0
    if megabytes <= 0:
        raise ValueError(f"NCCLX_WINDOW_MB={text!r} must be a positive number of MiB, as in NCCLX_WINDOW_MB=64.")
    return -(-(megabytes << 20) // PAGE) * PAGE

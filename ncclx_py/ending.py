"""The end of something in flight, as `CollectiveWork` asks for it: waited for, or told by a future. See `Job` and `Letter`."""

from __future__ import annotations

import _thread
from typing import Any

from torch.futures import Future


class Ending:
    """Ends once, with `error` set before that where it failed. Any thread may ask."""

    __slots__ = ("_ended", "_future", "_lock", "error")

    def __init__(self) -> None:
        self.error: RuntimeError | None = None
        self._future: Future[Any] | None = None
        self._lock = _thread.allocate_lock()
        self._ended = _thread.allocate_lock()  # held until it has ended: cheaper than an Event
        self._ended.acquire()

    def let_go(self) -> None:
        """Tells those who wait. The callbacks of the future run here, and may ask for the future again."""
        with self._lock:
            self._ended.release()
            future = self._future
        if future is not None:
            future.set_result(None)

    def pause(self, seconds: float) -> bool:
        """Waits for the end without the GIL, up to `seconds` (-1: for ever). Whether it has come."""
        if not self._ended.acquire(timeout=seconds):
            return False
        self._ended.release()
        return True

    def raise_error(self) -> None:
        """Where it has failed. A new error each time: a traceback that grows keeps the waiters' frames."""
        if self.error is not None:
            raise type(self.error)(*self.error.args) from self.error.__cause__

    def is_completed(self) -> bool:
        return not self._ended.locked()

    def get_future(self) -> Future[Any]:
        """A future that completes when it has ended, well or not: `wait` then tells."""
        with self._lock:
            made = self._future is None
            future = self._future = self._future or Future()
            late = made and self.is_completed()
        if late:
            future.set_result(None)
        return future

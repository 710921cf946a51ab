"""`CollectiveWork`: the handle of one collective in flight.

It wraps the library's own work objects and adds three things: errors that name the collective (`errors.failure`), the
steps that follow the library's part (`finish`: divide for AVG, copy back into a strided tensor), and a future in which
a failure is a real error. c10d's ``_create_work_from_future`` must not be used for that: an exception in such a future
passes as success in ``wait()`` and crashes DDP's C++ reducer. A future whose ``then`` callback raises is safe in both.

`finish` runs exactly once, in the thread that completes the collective, whether or not anyone waits; a caller that
drops the handle loses nothing. On CUDA the callback runs on a stream that torch orders after the collective, and
``wait`` orders the caller's stream after both: the CPU never blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.futures import Future

from ncclx_py.errors import Call, failure, overdue
from ncclx_py.runtime.pending import Pending
from ncclx_py.runtime.progress import Job
from ncclx_py.transport.letters import Letter

Finish = Callable[[], None]

_Work: Any = dist.Work  # its stub differs between the versions of torch that we support


class CollectiveWork(_Work):
    """Handle of one collective: `natives` are the library's works, all of which must complete, then `finish`.

    `outputs` is the value of the future and of `result()`. Raises `CollectiveError` from `wait`, and from the future
    in whoever consumes it (DDP's backward, ``Future.wait``).
    """

    def __init__(
        self,
        call: Call,
        natives: Sequence[Any],
        outputs: list[Any],
        finish: Finish | None = None,
        pending: Pending | None = None,
    ) -> None:
        super().__init__()
        self._call = call
        self._natives = list(natives)
        self._outputs = outputs
        self._pending = pending
        self._future: Future[Any] | None = None
        if finish is not None:
            self._future = _chain(call, self._natives, outputs, finish)
        if pending is not None:
            pending.add(self)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Blocks until the result is there (CUDA: orders the current stream after it).

        Without a `timeout` (None, or c10d's zero) it waits for as long as the collective itself may take.
        Raises `CollectiveTimeout` when `timeout` passes first, `CollectiveError` when the collective failed; waiting
        again raises again.
        """
        self._wait_natives(timeout)
        if self._future is not None:
            try:
                self._future.wait()
            except RuntimeError as error:
                raise failure(self._call, error) from error
        if self._pending is not None:
            self._pending.forget(self)
        return True

    def _wait_natives(self, timeout: timedelta | None) -> None:
        try:
            _wait_all(self._natives, timeout)
        except RuntimeError as error:
            if timeout and not all(native.is_completed() for native in self._natives):
                raise overdue(self._call, timeout) from error
            raise failure(self._call, error) from error

    def get_future(self) -> Future[Any]:
        """A future of `outputs`; a failed collective raises from its ``wait`` and ``value``."""
        if self._future is None:
            self._future = _chain(self._call, self._natives, self._outputs, None)
        return self._future

    def is_completed(self) -> bool:
        done = all(native.is_completed() for native in self._natives)
        return done and (self._future is None or self._future.done())

    def is_success(self) -> bool:
        return self.is_completed() and self.exception() is None

    def exception(self) -> BaseException | None:
        """The error of a collective that has ended, None while it runs or when it succeeded."""
        if not self.is_completed():
            return None
        try:
            self.wait()
        except RuntimeError as error:
            return error
        return None

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        return self._outputs

    def source_rank(self) -> int:
        """Group rank of the sender of a receive from any source, once it has completed."""
        return self._natives[0]._source_rank()

    def _source_rank(self) -> int:
        return self.source_rank()


class MessageWork(CollectiveWork):
    """Handle of a send or a receive of CPU tensors. A message whose handle is dropped goes on all the same."""

    def __init__(self, call: Call, letter: Letter, tensor: torch.Tensor, finish: Finish | None) -> None:
        super().__init__(call, [letter], [tensor], finish)
        self._letter = letter

    def get_future(self) -> Future[Any]:
        self._letter.limit()  # who waits for a future has no deadline of their own
        return super().get_future()


def _wait_all(natives: Sequence[Any], timeout: timedelta | None) -> None:
    """Waits for all, in order, within one deadline."""
    if not timeout:
        for native in natives:
            native.wait()
        return
    deadline = time.monotonic() + timeout.total_seconds()
    for native in natives:
        left = timedelta(seconds=max(0.001, deadline - time.monotonic()))
        native.wait(left)


def _chain(call: Call, natives: Sequence[Any], outputs: list[Any], finish: Finish | None) -> Future[Any]:
    """A future that completes after `natives` and `finish`, and carries an error that C++ consumers understand."""
    futures = [native.get_future() for native in natives]
    joined = futures[0] if len(futures) == 1 else torch.futures.collect_all(futures)
    return joined.then(partial(_complete, call, list(zip(natives, futures)), outputs, finish))


def _complete(
    call: Call, parts: list[tuple[Any, Future[Any]]], outputs: list[Any], finish: Finish | None, _joined: Future[Any]
) -> list[Any]:
    try:
        for native, future in parts:
            if isinstance(native, Job | Letter):
                native.wait()
            else:
                future.value()
    except RuntimeError as error:
        raise failure(call, error) from error
    if finish is not None:
        finish()
    return outputs

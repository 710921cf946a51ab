"""Starts the ranks of a job, shows their output, and ends all of them when one fails.

    outcome = run_ranks([Process(rank, words, env), …], show)
    outcome.status          # the exit status for the shell: 0, or that of the first rank that failed

Ranks run in sessions of their own, so that a Ctrl-C reaches them through this process only, and they die with it, whatever
ends it. `Interrupted` and `raise_on_signals` turn SIGINT, SIGTERM and SIGHUP into one exception, so that ``with`` blocks tear down.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import IO

GRACE = 5.0  # seconds between asking a rank to end and killing it
LAST_LINES = 20  # of a failing rank, shown once more at the end
_MAX_LINE = 64 * 1024  # bytes without a newline that are shown as a line all the same
_DRAIN = 1.0  # seconds to read what processes that outlive their rank still hold back

Show = Callable[[int, str, bool], None]


class Interrupted(BaseException):
    """A signal asked this process to end. Not an `Exception`: nothing on the way may swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"received {signal.Signals(signum).name}")
        self.signum = signum


class JobError(ValueError):
    """A job that cannot be started as it was described; the message names the option."""


@dataclass(frozen=True)
class Process:
    """One rank's command and its whole environment."""

    rank: int
    words: Sequence[str]
    env: Mapping[str, str]


@dataclass
class Outcome:
    """`statuses[rank]` in the shell's numbers (128 + signal); `failed` is the first rank that failed, if any."""

    statuses: dict[int, int] = field(default_factory=dict)
    failed: int | None = None
    last_lines: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        return 0 if self.failed is None else self.statuses[self.failed]


def prefixed(rank: int, line: str, error: bool) -> None:
    """Shows a line of a rank on the stream that it was written to, as ``[rank] line``."""
    print(f"[{rank}] {line}", file=sys.stderr if error else sys.stdout, flush=True)


def describe(status: int) -> str:
    """An exit status in words: ``exit status 3`` or ``SIGKILL (exit status 137)``."""
    if status > 128:
        with contextlib.suppress(ValueError):
            return f"{signal.Signals(status - 128).name} (exit status {status})"
    return f"exit status {status}"


@contextlib.contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raises `Interrupted` in the main thread at the first SIGINT, SIGTERM or SIGHUP; later ones do not disturb teardown."""
    caught: list[int] = []

    def catch(signum: int, _: FrameType | None) -> None:
        caught.append(signum)
        if len(caught) == 1:
            raise Interrupted(signum)

    before = {which: signal.signal(which, catch) for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)


def run_ranks(processes: Sequence[Process], show: Show = prefixed, timeout: float | None = None) -> Outcome:
    """Runs all ranks to their end and returns how they ended.

    When one fails, the others get SIGTERM and, `GRACE` seconds later, SIGKILL. An exception (an interrupt, or TimeoutError
    after `timeout` seconds) ends them in the same way and goes on.
    """
    return _Job(show).run(processes, None if timeout is None else time.monotonic() + timeout)


@dataclass
class _Stream:
    rank: int
    pipe: IO[bytes]
    error: bool
    partial: bytes = b""


class _Job:
    def __init__(self, show: Show) -> None:
        self._show = show
        self._selector = selectors.DefaultSelector()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._streams = 0
        self._last: dict[int, deque[str]] = {}
        self._outcome = Outcome()

    def run(self, processes: Sequence[Process], until: float | None) -> Outcome:
        try:
            for process in processes:
                self._start(process)
            self._until(lambda: not self._running or self._outcome.failed is not None, until)
            if self._running and self._outcome.failed is None:
                raise TimeoutError(f"The ranks {sorted(self._running)} were not done in time and were ended.")
            self._end(signal.SIGTERM)
        except BaseException as error:
            self._end(error.signum if isinstance(error, Interrupted) else signal.SIGTERM)
            raise
        finally:
            self._selector.close()
        if self._outcome.failed is not None:
            self._outcome.last_lines = list(self._last[self._outcome.failed])
        return self._outcome

    def _start(self, process: Process) -> None:
        child = subprocess.Popen(
            process.words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(process.env),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        self._running[process.rank] = child
        self._last[process.rank] = deque(maxlen=LAST_LINES)
        self._selector.register(os.pidfd_open(child.pid), selectors.EVENT_READ, process.rank)
        for pipe, error in ((child.stdout, False), (child.stderr, True)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Stream(process.rank, pipe, error))
            self._streams += 1

    def _end(self, signum: int) -> None:
        """Asks the ranks that still run to end, then kills them, and shows what they had left to say."""
        self._signal(signum)
        self._until(lambda: not self._running, time.monotonic() + GRACE)
        self._signal(signal.SIGKILL)
        self._until(lambda: not self._running, time.monotonic() + GRACE)
        self._until(lambda: not self._streams, time.monotonic() + _DRAIN)
        for key in list(self._selector.get_map().values()):
            self._selector.unregister(key.fileobj)
            if isinstance(key.data, _Stream):
                self._close(key.data)
            else:
                os.close(key.fd)

    def _signal(self, signum: int) -> None:
        for child in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signum)

    def _until(self, done: Callable[[], bool], until: float | None) -> None:
        while not done():
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                return
            for key, _ in self._selector.select(left):
                if isinstance(key.data, _Stream):
                    self._read(key.data)
                else:
                    self._selector.unregister(key.fileobj)
                    os.close(key.fd)
                    self._ended(key.data)

    def _read(self, stream: _Stream) -> None:
        try:
            data = os.read(stream.pipe.fileno(), _MAX_LINE)
        except BlockingIOError:
            return
        *lines, stream.partial = (stream.partial + data).split(b"\n")
        if len(stream.partial) >= _MAX_LINE:
            lines, stream.partial = [*lines, stream.partial], b""
        for line in lines:
            self._line(stream, line)
        if not data:
            self._selector.unregister(stream.pipe)
            self._streams -= 1
            self._close(stream)

    def _close(self, stream: _Stream) -> None:
        if stream.partial:
            self._line(stream, stream.partial)
        stream.pipe.close()

    def _line(self, stream: _Stream, data: bytes) -> None:
        line = data.decode(errors="replace").rstrip("\r")
        self._last[stream.rank].append(line)
        self._show(stream.rank, line, stream.error)

    def _ended(self, rank: int) -> None:
        status = self._running.pop(rank).wait()
        self._outcome.statuses[rank] = 128 - status if status < 0 else status
        if status and self._outcome.failed is None:
            self._outcome.failed = rank


# What a child runs first that somebody else starts for this process: it asks the kernel to end it together with its parent.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
sys.exit(1)
"""


def tied(words: Sequence[str]) -> list[str]:
    """A command, by its path, that dies with this process, where a library starts it as a child of this process's main thread."""
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *words]


_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

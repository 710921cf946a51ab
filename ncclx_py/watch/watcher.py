"""The thread that writes dumps: it works while the main thread is blocked, in C code too, as long as that lets go of the GIL.

    watcher = Watcher(Path("trace"), on_signal)
    watcher.listen()                                 # to signals; from the main thread
    watcher.failed("0", "timeout", "no end after …")  # any thread; the dump is there when it returns
    watcher.close()

Who calls it, and when, is in ``triggers``.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ncclx_py.watch import dump, requests
from ncclx_py.watch.trace import TRACE

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between two looks at the folder and at the groups
PATIENCE = 2.0  # seconds that a dump may take before nobody waits for it any more
_QUIET = 5.0  # seconds after a dump in which the request of a rank that failed brings no new one
_TAKEN = (signal.SIGTERM, signal.SIGUSR2)  # signals that get a handler where they have none
_HEARD = {int(one) for one in (*_TAKEN, signal.SIGINT)}

Handler = Callable[[int, FrameType | None], None]


@dataclass
class _Wish:
    """A dump that somebody wants."""

    reason: str
    detail: str
    done: threading.Event = field(default_factory=threading.Event)


class Watcher:
    """Writes the dumps of this process into `folder`. One per process. `on_signal` stands in for the default action of a
    signal, see `listen`."""

    def __init__(self, folder: Path, on_signal: Handler) -> None:
        self.folder = folder
        self._on_signal = on_signal
        self._wishes: deque[_Wish] = deque()
        self._wake, self._ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._cause: tuple[str, str] | None = None  # the first failure
        self._written = float("-inf")  # time.monotonic() of the last dump
        self._told: set[str] = set()  # groups whose abort has been dumped
        self._seen = requests.last(folder)
        self._closed = self._complained = False
        self._writing: threading.Thread | None = None
        self._latest: _Wish | None = None
        self._due = False  # the cause is known, and its dump about to be written
        self._former_fd = -1
        self._thread = threading.Thread(target=self._work, name="ncclx-watcher", daemon=True)
        self._thread.start()

    def want(self, reason: str, detail: str, wait: bool = True, cause: bool = False) -> None:
        """Asks for a dump, and gives it `PATIENCE` to be written. `cause`: this is what went wrong, and what follows is not."""
        wish = self._latest = _Wish(reason, detail)  # before the cause: a signal may come between any two lines
        if cause:
            self._cause = (reason, detail)
        self._wishes.append(wish)
        self._wake_up()
        if wait and threading.current_thread() is not self._thread:
            wish.done.wait(PATIENCE)

    def failed(self, group: str, reason: str, detail: str) -> None:
        """A collective has failed here: dumps, and asks all ranks that share the folder to do so. Only the first on a group
        counts: by the next, this rank may have gone on, and its dump would no longer show where it was."""
        if group not in self._told:
            self._told.add(group)
            self.want(reason, detail, cause=True)

    def heard(self, number: int) -> None:
        """A signal has come to the main thread, in case that somebody took the wakeup descriptor."""
        if self._cause is None or number == signal.SIGUSR2:
            self.want("signal", signal.Signals(number).name, wait=number == signal.SIGTERM)
        elif number == signal.SIGTERM:  # a launcher ends this rank while the dump of what went wrong is being written
            self._settle()

    def _settle(self) -> None:
        """Gives the dumps under way `PATIENCE`. In a signal's handler: it takes no lock that the main thread may hold."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            wished = self._due or (self._latest is not None and not self._latest.done.is_set())
            if not wished and (self._writing is None or not self._writing.is_alive()):
                return
            time.sleep(0.01)

    def began_anew(self, group: str, folder: Path) -> None:
        """A group has been made: what failed before is over."""
        self._cause = None
        if folder != self.folder:
            self.folder, self._seen, self._complained = folder, requests.last(folder), False
        self._told.discard(group)

    def ended(self, reason: str, detail: str) -> None:
        """The process ends: a dump, unless there is one of the failure that led to it."""
        if self._cause is None:
            self.want(reason, detail)

    def listen(self) -> None:
        """Takes the signals that nobody handles, and hears of the others. From the main thread."""
        for number in _TAKEN:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._on_signal)
        self._former_fd = signal.set_wakeup_fd(self._ring, warn_on_full_buffer=False)

    def close(self) -> None:
        """Ends the thread, and gives the signals back. From the main thread."""
        self._closed = True
        for number in _TAKEN:
            if signal.getsignal(number) is self._on_signal:
                signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(ValueError):
            current = signal.set_wakeup_fd(-1)
            signal.set_wakeup_fd(self._former_fd if current == self._ring else current)
        self._wake_up()
        self._thread.join(PATIENCE)
        if not self._thread.is_alive():
            os.close(self._wake)
            os.close(self._ring)

    def forget(self) -> None:
        """In a forked child, which has no such thread: gives the signals back, and closes the copies of the pipe."""
        for number in _TAKEN:
            if signal.getsignal(number) is self._on_signal:
                signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
        os.close(self._wake)
        os.close(self._ring)

    # The thread

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        while not self._closed:
            poll.poll(LOOK * 1000)
            signals = self._heard()
            while self._wishes:
                wish = self._wishes.popleft()
                self._write(wish.reason, wish.detail)
                wish.done.set()
            for number in signals:
                self._signalled(number)
            if not self._closed:
                try:
                    self._look_at_groups()
                    self._look_at_folder()
                except Exception as error:  # a group may be half made, or half gone; the next look is soon
                    log.debug("A look at the groups failed", exc_info=error)

    def _heard(self) -> list[int]:
        """The signals that have come since the last look, each once; whoever listened before us hears them too."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._wake, 4096)
            signals = bytes(byte for byte in data if byte)
            if signals and self._former_fd >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._former_fd, signals)
            return sorted(_HEARD & set(signals))
        return []

    def _signalled(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR2:
            self._write("signal", name)
        elif self._cause is None:
            self._write_cause("signal", name)
        if number == signal.SIGTERM and signal.getsignal(number) is self._on_signal:
            die(number)  # the main thread may be where no Python handler runs

    def _look_at_folder(self) -> None:
        asked = requests.last(self.folder)
        if asked == self._seen:
            return
        self._seen = asked
        who, automatic = requests.details(self.folder)
        if not automatic:
            self._write("demand", who)
        elif time.monotonic() > self._written + _QUIET:
            self._write("peer", who)

    def _look_at_groups(self) -> None:
        for facts in list(TRACE.groups.values()):
            group = facts.group()
            if group is None or facts.name in self._told:
                continue
            lost, late = group.look(), group.late()
            if lost or late:
                self._told.add(facts.name)
                self._write_cause(*(("peer", lost) if lost else ("timeout", late)))

    def _write_cause(self, reason: str, detail: str) -> None:
        """Notes what went wrong, unless something did before, and writes its dump. The main thread, told to end meanwhile,
        waits for it (`_settle`)."""
        self._due = True
        self._cause = self._cause or (reason, detail)
        self._write(reason, detail)
        self._due = False

    def _write(self, reason: str, detail: str) -> None:
        """Writes a dump in a thread that may hang where this one may not."""
        if self._writing is not None and self._writing.is_alive():
            self._complain("the last dump is still being written")
            return
        self._writing = threading.Thread(target=self._write_now, args=(reason, detail), name="ncclx-dump", daemon=True)
        self._writing.start()
        self._writing.join(PATIENCE)
        if self._writing.is_alive():
            self._complain(f"it takes more than {PATIENCE:g} s")

    def _write_now(self, reason: str, detail: str) -> None:
        cause = self._cause
        again = "" if cause in (None, (reason, detail)) else f"{reason}: {detail}"
        try:
            taken = dump.snapshot(*(cause or (reason, detail)), again)
            dump.write(self.folder, taken)
            self._written = time.monotonic()
            if (
                cause == (reason, detail)
                and reason != "signal"
                and time.time() > requests.last(self.folder) / 1e9 + _QUIET
            ):
                requests.ask(self.folder, f"rank {TRACE.rank}: {reason}: {detail}", automatic=True)
                self._seen = requests.last(self.folder)
        except Exception as error:  # whatever it is, the program goes on
            self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, why: str) -> None:
        if not self._complained:
            self._complained = True
            log.warning("No trace was written to %s: %s. Set NCCLX_TRACE_DIR to another folder.", self.folder, why)

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._ring, b"\0")


def die(number: int) -> None:
    """The default action of a signal. From any thread: Python lets only the main one set a handler."""
    ctypes.CDLL(None).signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)

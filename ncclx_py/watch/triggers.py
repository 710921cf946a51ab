"""When a dump of the trace is written. A thread of our own does it (``watcher``), so that a blocked main thread is no obstacle.

A dump follows a failed collective (timeout, lost peer, any error), an abort that came from another rank, SIGTERM, SIGUSR2
and SIGINT, an uncaught exception, an end of the process with groups still open, and a request: a file that any process may
put into the folder (`request_dumps`), which is also how the rank that failed asks the ranks that are still in user code.
Nothing is written while all goes well; the folder is made with the first dump.

The folder is ``NCCLX_TRACE_DIR``, or the one that the program names (``ncclx_py.trace_into``). Where there is none, there is
no thread, and no signal is touched. A signal whose handler is somebody else's is only listened to
(``signal.set_wakeup_fd``, whose former owner is told as before). Where it had the default action, that follows after the
dump (SIGTERM) or does not (SIGUSR2). A disk that is full or hangs costs one line of warning and at most two seconds.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from ncclx_py.watch import dump, requests
from ncclx_py.watch.trace import TRACE, cause_of
from ncclx_py.watch.watcher import Watcher, die

_watcher: Watcher | None = None
_named: Path | None = None  # by the program
_hooks: list[Any] = []


def start(group: str, size: int) -> None:
    """A group of `size` ranks is being made; begins to watch, at the first of several ranks for which there is a folder."""
    global _watcher
    folder = _folder()
    if folder is None or TRACE.ring is None or size == 1:
        return
    if _watcher is not None:
        _watcher.began_anew(group, folder)
        return
    _watcher = Watcher(folder, _on_signal)
    if threading.current_thread() is threading.main_thread():
        _watcher.listen()
    if not _hooks:
        _hooks.append(sys.excepthook)
        sys.excepthook = _on_uncaught
        atexit.register(_at_exit)
        os.register_at_fork(after_in_child=_after_fork)


def failed(group: str, cause: BaseException) -> None:
    """A collective of a group has failed."""
    if _watcher is not None:
        _watcher.failed(group, cause_of(cause), str(cause).split("\n", 1)[0])


def trace_into(folder: Path) -> None:
    """See ``ncclx_py.trace_into``."""
    global _named
    _named = folder.absolute()


def dump_now(detail: str, folder: Path | None) -> Path:
    """See ``ncclx_py.dump_trace``."""
    folder = folder or _folder()
    if folder is None:
        raise ValueError(
            "There is no folder for the trace: name one here, with ncclx_py.trace_into or NCCLX_TRACE_DIR."
        )
    return dump.write(folder, dump.snapshot("demand", detail))


def _folder() -> Path | None:
    named = os.environ.get("NCCLX_TRACE_DIR", "")
    return Path(named).absolute() if named else _named


def request_dumps(folder: Path) -> int:
    """Asks every rank that writes into `folder` for a dump; within a second they begin. Returns the time of the request, in ns
    since the epoch. Raises OSError where the folder cannot be written."""
    return requests.ask(folder, "a request", automatic=False)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    """In place of the default action. The watcher has heard of it, unless somebody took the wakeup descriptor."""
    if _watcher is not None:
        _watcher.heard(number)
    if number == signal.SIGTERM:
        die(number)


def _on_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    _hooks[0](kind, error, traceback)
    if _watcher is not None:
        _watcher.ended("error", f"{kind.__name__}: {error}".split("\n", 1)[0])


def _at_exit() -> None:
    global _watcher
    watcher, _watcher = _watcher, None
    if watcher is None:
        return
    living = [facts.group() for facts in TRACE.groups.values()]
    if not hasattr(sys, "last_value") and any(group is not None and not group.ended for group in living):
        watcher.ended("exit", "the process ended with groups that were not destroyed")
    watcher.close()


def _after_fork() -> None:
    global _watcher
    watcher, _watcher = _watcher, None
    if watcher is not None:
        watcher.forget()

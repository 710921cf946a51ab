"""Watches one case: it may not hang, not eat the memory, and write nowhere but in its own folder.

with guarded(folder, seconds=10) as offences: reader(data)
offences                                   # what it did outside of the folder
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

MEMORY = 3 << 30  # bytes beyond what the process has when the first case begins

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.rename": (0, 1), "os.remove": (0,), "os.mkdir": (0,), "os.rmdir": (0,), "os.truncate": (0,), "os.symlink": (1,),
    "os.link": (1,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,), "os.setxattr": (0,), "shutil.rmtree": (0,),
    "socket.bind": (1,), "socket.connect": (1,), "subprocess.Popen": (0,), "os.system": (0,), "os.exec": (0,), "os.kill": (0,),
    "pickle.find_class": (0,), "ctypes.dlopen": (0,),
}  # fmt: skip
_QUIET = ("/dev/null", "/dev/tty")


class Hang(BaseException):
    """A case took too long. Not an `Exception`: no reader may swallow it."""


_folder: Path | None = None
_offences: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _folder is None:
        return
    if event == "open":
        path, mode, flags = (*args, 0, 0, 0)[:3]
        if isinstance(path, int) or not (flags & _WRITES if isinstance(flags, int) else False):
            return
        if event == "open" and isinstance(mode, str) and not set(mode) & set("wax+") and not flags & _WRITES:
            return
        _check(event, path)
    elif event in _CHANGES:
        for place in _CHANGES[event]:
            if place < len(args):
                _check(event, args[place])


def _check(event: str, target: object) -> None:
    if isinstance(target, int) and event == "os.truncate":
        return
    if isinstance(target, str | bytes | os.PathLike):
        path = os.path.realpath(os.fsdecode(target))
        assert _folder is not None
        if path in _QUIET or Path(path).is_relative_to(_folder) or "__pycache__" in path:
            return
    _offences.append(f"{event} {target!r}")


def _alarm(_: int, __: FrameType | None) -> None:
    raise Hang


def arm() -> None:
    """Once per process, after everything has been imported."""
    sys.addaudithook(_audit)
    signal.signal(signal.SIGALRM, _alarm)
    sys.setrecursionlimit(1000)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


@contextmanager
def guarded(folder: Path, seconds: float) -> Iterator[list[str]]:
    """Raises Hang in the block after `seconds`; yields the list of what it does outside of `folder`."""
    global _folder
    _offences.clear()
    _folder = Path(os.path.realpath(folder))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield _offences
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _folder = None

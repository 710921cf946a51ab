"""Processes that start in no time: forked from one that has imported the slow libraries.

A processor takes 2 s to start Python and import torch, and 6 s to import the trainer, for every process. Here a test process
pays that once for each list of modules and each environment:

    nursery = nursery_for(("distill.trainer",))
    child = nursery.start(__file__, "worker", ["argument"], tmp_path / "log")    # worker("argument"), a session of its own
    child.pid, child.poll(), child.wait(10)

Forks share what an interpreter draws at its start, the seed of string hashes above all: what must not depend on it is also
tested with programs that are started as users start them. All that a nursery started dies with it, and it with the tests.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

LIMIT = 1 << 20  # bytes of a question: an environment fits
POLL_S = 0.005
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


class Forked:
    """A child, with the part of ``Popen`` that tests use."""

    def __init__(self, pid: int, nursery: Nursery) -> None:
        self.pid, self._nursery = pid, nursery
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_S)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """One process that has imported `modules` under `env`, added to the environment of the tests. See `nursery_for`."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self._env = {**ENVIRONMENT, **env}
        self._door, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), *modules],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env={**os.environ, **self._env},
            )
        atexit.register(self.close)

    def start(
        self, path: str | Path, function: str, args: Sequence[Any], log: Path, descriptors: Sequence[int] = ()
    ) -> Forked:
        """Call ``function(*args, *descriptors)`` of the file `path` in a new process and session, with the environment of
        now; its exit status is what that returns. `args` travel as JSON; output goes to the end of `log`."""
        question = {"start": [str(path), function, list(args)], "env": {**os.environ, **self._env}}
        with log.open("ab") as sink:
            return Forked(self.ask(question, [sink.fileno(), *descriptors]), self)

    def ask(self, question: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
        socket.send_fds(self._door, [json.dumps(question).encode()], descriptors)
        answer = self._door.recv(LIMIT)
        assert answer, "the nursery is gone; what it said stands above"
        return json.loads(answer)

    def close(self) -> None:
        """It ends, and all that it started."""
        self._door.close()
        self._process.kill()
        self._process.wait()


def nursery_for(modules: Sequence[str], env: Mapping[str, str] | None = None) -> Nursery:
    """The nursery with these modules and this addition to the environment, started where there is none."""
    return _nursery(tuple(modules), tuple(sorted((env or {}).items())))


@cache
def _nursery(modules: tuple[str, ...], env: tuple[tuple[str, str], ...]) -> Nursery:
    return Nursery(modules, dict(env))


def load(path: str | Path, name: str | None = None) -> ModuleType:
    """The module in a file, imported once per process."""
    name = name or f"rank_worker_{Path(path).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives the test run


def _serve(door: socket.socket) -> None:
    """The nursery's life."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(door, LIMIT, 8)
        if not data:
            return
        question = json.loads(data)
        answer = None
        if "poll" in question:
            pid, status = os.waitpid(question["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                door.close()
                os._exit(_live(*question["start"], question["env"], *descriptors))
            for descriptor in descriptors:
                os.close(descriptor)
        door.send(json.dumps(answer).encode())


def _live(path: str, function: str, args: list[Any], env: dict[str, str], log: int, *descriptors: int) -> int:
    """A child's life; returns its exit status."""
    os.setsid()
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    try:
        return int(getattr(load(path), function)(*args, *descriptors) or 0)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _main() -> None:
    die_with_parent()
    sys.modules["nursery"] = sys.modules["__main__"]
    load(Path(__file__).with_name("harness.py"), "harness")
    # A driver that was asked before a fork does not work after it: on a machine with GPUs each child imports for itself.
    modules = [] if Path("/dev/nvidiactl").exists() else sys.argv[2:]
    for name in modules:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads after importing {modules}: a fork would have only one of them"
    with socket.socket(fileno=int(sys.argv[1])) as door:
        _serve(door)
    os._exit(0)


if __name__ == "__main__":
    _main()

"""Runs test functions on several real ranks: one operating-system process each, with deadlines, and none left behind.

A worker is a module-level function of a test file whose first parameter is a `Rank`; its other arguments and its result
travel by pickle. pytest's importlib mode gives test files no importable name, so a child loads the worker's file by its
path. ``from harness import RankPool, run_ranks, Rank`` works in every test file (conftest.py sees to it).

One check:

    def sums(me: Rank, value: int) -> float:
        me.init("ncclx")
        tensor = torch.tensor([float(value + me.rank)])
        dist.all_reduce(tensor)
        return tensor.item()

    @pytest.mark.dist
    def test_sums() -> None:
        assert run_ranks(sums, 3, 10, deadline=60) == [33.0] * 3      # one result per rank

Many checks: keep the processes in a fixture of module scope. They are forked from one that has imported torch and ncclx_py,
and what `preload` names (tests/nursery.py).

    @pytest.fixture(scope="module")
    def pool() -> Iterator[RankPool]:
        with RankPool(2) as ranks:
            yield ranks

    def test_more(pool): assert pool.run(sums, 1) == [3.0, 3.0]

A process group that a worker leaves open stays for the next worker on the same pool: `Rank.init` opens one only where
none is open with that backend. When a rank raises, dies or passes the deadline, `RankFailure` shows its traceback, its
output and, for those that hang, the stack of every thread; all processes are killed, and the next `run` starts new ones.
A test that kills a rank on purpose says so: ``pool.run(worker, dying={1})`` returns None for rank 1.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from nursery import Forked, load, nursery_for

GRACE = 3.0  # seconds that the other ranks get to report, once one has failed
OUTPUT_LINES = 60  # of each failing rank, in a report


@dataclass
class Rank:
    """Who a worker is: its rank, the number of ranks, and a folder that all of them share."""

    rank: int
    size: int
    folder: Path
    meetings: int = field(default=0)

    def init(self, backend: str = "ncclx", fresh: bool = False, **options: Any) -> None:
        """``init_process_group`` over a file store; keeps an open group of the same backend unless `fresh`.

        All ranks must call it alike.
        """
        import torch.distributed as dist

        if dist.is_initialized():
            if not fresh and not options and dist.get_backend() == backend:
                return
            dist.destroy_process_group()
        self.meetings += 1
        dist.init_process_group(backend, store=self.store(f"meeting-{self.meetings}"), **self._who(), **options)

    def store(self, name: str) -> Any:
        """A store that all ranks of the pool share under `name`."""
        import torch.distributed as dist

        return dist.FileStore(str(self.folder / name), self.size)

    def leave(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def _who(self) -> dict[str, int]:
        return {"rank": self.rank, "world_size": self.size}


class RankFailure(AssertionError):
    """A rank raised, died or hung; the message holds what each of them had to say."""


@dataclass
class _Child:
    process: Forked
    pipe: Connection
    output: Path


class RankPool:
    """`size` processes that run workers together. Use it as a context manager.

    `env` is added to their environment, before anything is imported; `preload` are modules that are slow to import.
    """

    def __init__(self, size: int, env: dict[str, str] | None = None, preload: Sequence[str] = ()) -> None:
        self.size = size
        self._env, self._preload = env or {}, ("pytest", "ncclx_py", *preload)
        self._children: list[_Child] = []
        self._folder: Path | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, worker: Callable[..., Any], *args: Any, deadline: float = 60.0, dying: Collection[int] = ()
    ) -> list[Any]:
        """Calls ``worker(rank, *args)`` on every rank and returns the results in order of rank.

        Raises `RankFailure` when a rank raises, dies though not in `dying`, or is not done after `deadline` seconds.
        """
        if not self._children:
            self._start()
        job = pickle.dumps((worker.__code__.co_filename, worker.__qualname__, args))
        for child in self._children:
            child.pipe.send_bytes(job)
        answers = self._collect(time.monotonic() + deadline, dying)
        broken = [rank for rank in range(self.size) if rank not in dying and answers.get(rank, ("", 0))[0] != "ok"]
        if broken:
            report = self._report(worker.__qualname__, answers, broken, deadline)
            self.close()
            raise RankFailure(report)
        if dying:
            self.close()
        return [answers[rank][1] if rank in answers else None for rank in range(self.size)]

    def close(self) -> None:
        """Ends all processes and removes their files."""
        for child in self._children:
            child.pipe.close()  # end of file: an idle child leaves by itself
        until = time.monotonic() + 1.0
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(until - time.monotonic(), 0.0))
            _kill(child.process)
        self._children = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        nursery = nursery_for(self._preload, self._env)
        for rank in range(self.size):
            mine, theirs = Pipe()
            output = self._folder / f"output-{rank}.txt"
            arguments = [rank, self.size, str(self._folder)]
            process = nursery.start(__file__, "be_rank", arguments, output, [theirs.fileno()])
            theirs.close()
            self._children.append(_Child(process, mine, output))

    def _collect(self, until: float, dying: Collection[int]) -> dict[int, tuple[str, Any]]:
        """Answers by rank: ("ok", result), ("raised", traceback) or ("died", exit status). Hung ranks have none."""
        answers: dict[int, tuple[str, Any]] = {}
        waiting = {child.pipe: rank for rank, child in enumerate(self._children)}
        while waiting and (left := until - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, OSError):
                    answers[rank] = ("died", self._children[rank].process.wait())
                if answers[rank][0] != "ok" and rank not in dying:
                    until = min(until, time.monotonic() + GRACE)
        return {rank: answer for rank, answer in answers.items() if rank not in dying}

    def _report(self, name: str, answers: dict[int, tuple[str, Any]], broken: list[int], deadline: float) -> str:
        hung = [rank for rank in broken if rank not in answers]
        for rank in hung:  # faulthandler writes the stacks into the rank's output
            with contextlib.suppress(ProcessLookupError):
                self._children[rank].process.send_signal(signal.SIGUSR1)
        if hung:
            time.sleep(0.5)
        parts = [f"{name} on {self.size} ranks: failed on {broken}"]
        for rank in broken:
            kind, detail = answers.get(
                rank, ("hung", f"not done (deadline {deadline:g} s, {GRACE:g} s after a failure)")
            )
            output = self._children[rank].output.read_text(errors="replace").splitlines()[-OUTPUT_LINES:]
            parts.append(f"---- rank {rank} {kind}: {detail}")
            parts.extend(["-- its output:", *output] if output else [])
        return "\n".join(parts)


def run_ranks(
    worker: Callable[..., Any],
    size: int,
    *args: Any,
    deadline: float = 60.0,
    dying: Collection[int] = (),
    env: dict[str, str] | None = None,
) -> list[Any]:
    """`RankPool.run` once, on processes of its own."""
    with RankPool(size, env) as pool:
        return pool.run(worker, *args, deadline=deadline, dying=dying)


def _kill(process: Forked) -> None:
    """Ends a child and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _serve(rank: int, size: int, pipe: Connection, folder: Path) -> None:
    """A child's life: run one job after another until the parent closes the pipe."""
    me = Rank(rank, size, folder)
    while True:
        try:
            path, name, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = ("ok", getattr(load(path), name)(me, *args))
        except BaseException:
            answer = ("raised", traceback.format_exc())
        pipe.send(answer)


def be_rank(rank: int, size: int, folder: str, descriptor: int) -> int:
    """A rank of a pool, in a process of its own. Returns its exit status."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    _serve(rank, size, Connection(descriptor), Path(folder))
    return 0

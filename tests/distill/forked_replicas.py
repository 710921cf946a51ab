"""A run of several replicas whose jobs are forked from one process that has imported everything: they start in no time.

As a program it is that process: it reads ``[log, overrides…]`` as JSON lines, forks a job for each, and answers with its pid.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from distill.bench_replicas import TINY, Cluster


class Forked:
    """One job, with the part of ``Popen`` that a cluster uses."""

    def __init__(self, pid: int, nursery: subprocess.Popen[str]) -> None:
        self.pid, self._nursery, self.returncode = pid, nursery, None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = ask(self._nursery, ["poll", self.pid])
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode


def ask(nursery: subprocess.Popen[str], question: list[Any]) -> Any:
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    print(json.dumps(question), file=nursery.stdin, flush=True)
    return json.loads(nursery.stdout.readline())


def start_nursery() -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, __file__], text=True, env=env, **pipes)


@dataclass
class ForkedCluster(Cluster):
    nursery: Any = None

    def start(self, replica: int) -> None:
        overrides = [*TINY, "run.tensorboard=false", f"run.dir={self.folder}", *self.options(replica), *self.overrides]
        pid = ask(self.nursery, ["start", str(self.folder / f"replica_{replica}.log"), *overrides])
        self.jobs[replica] = Forked(pid, self.nursery)  # type: ignore[assignment]


def _serve() -> None:
    import torch

    import distill.train
    import distill.trainer

    torch.set_num_threads(1)
    for line in sys.stdin:
        kind, *rest = json.loads(line)
        if kind == "poll":
            pid, status = os.waitpid(rest[0], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(rest[0])
                os._exit(distill.train.main(rest[1:]))
        print(json.dumps(answer), flush=True)


def _become(log: str) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no job outlives the nursery
    sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(sink, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


if __name__ == "__main__":
    _serve()

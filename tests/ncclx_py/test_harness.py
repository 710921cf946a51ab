"""The harness of the other tests: results come in order, failures are shown, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import Rank, RankFailure, RankPool, run_ranks

pytestmark = pytest.mark.dist


def describe(me: Rank, text: str) -> tuple[int, int, str, str]:
    return me.rank, me.size, text, os.environ["RANK"]


def process(_: Rank) -> int:
    return os.getpid()


def one_raises(me: Rank) -> None:
    print(f"words of rank {me.rank}")
    if me.rank == 1:
        raise LookupError("rank one is lost")
    time.sleep(60)


def one_hangs(me: Rank) -> None:
    while me.rank == 1:
        time.sleep(0.1)


def one_dies(me: Rank) -> str:
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def leaves_a_child(me: Rank) -> int:
    return subprocess.Popen(["sleep", "100"]).pid


def gone(pid: int) -> bool:
    """Whether a process has ended; a killed one may take a moment."""
    until = time.monotonic() + 3
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_results_failures_and_reuse() -> None:
    with RankPool(2) as pool:
        assert pool.run(describe, "x") == [(0, 2, "x", "0"), (1, 2, "x", "1")]
        first = pool.run(process)
        assert pool.run(process) == first
        start = time.monotonic()
        with pytest.raises(RankFailure) as caught:
            pool.run(one_raises, deadline=50)
        assert time.monotonic() - start < 20
        message = str(caught.value)
        for words in ("rank one is lost", "words of rank 1", "one_raises on 2 ranks", "rank 0 hung"):
            assert words in message
        assert "in one_raises" in message
        assert all(gone(pid) for pid in first)
        assert pool.run(process) != first
    assert all(gone(pid) for pid in first)


def test_hung_ranks_are_shown_and_killed() -> None:
    with RankPool(2) as pool:
        pids = pool.run(process)
        with pytest.raises(RankFailure, match=r"rank 1 hung(.|\n)*in one_hangs"):
            pool.run(one_hangs, deadline=1.0)
        assert all(gone(pid) for pid in pids)


def test_dead_ranks() -> None:
    with pytest.raises(RankFailure, match="rank 1 died: -9"):
        run_ranks(one_dies, 2)
    assert run_ranks(one_dies, 2, dying={1}) == ["alive", None]


def test_grandchildren_go_too() -> None:
    (pid,) = run_ranks(leaves_a_child, 1)
    assert gone(pid)

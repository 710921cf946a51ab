"""A monitored barrier: who did not come, whether they are late or dead, and what holds afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load

from ncclx_py import CollectiveTimeout

failing = load(Path(__file__).with_name("test_failures.py"), "failures").failing

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def monitored(me: Rank, wait_all: bool) -> tuple[str, str, float] | None:
    me.init(fresh=True)
    group = dist.group.WORLD
    group.monitored_barrier()
    answer = None
    if me.rank in (1, 3):
        time.sleep(1.0)
    else:
        barrier = lambda: group.monitored_barrier(timedelta(seconds=0.4), wait_all_ranks=wait_all)  # noqa: E731
        answer = failing(barrier)
    time.sleep(0.2 if me.rank in (1, 3) else 0.8)
    if me.rank in (1, 3):
        with pytest.raises(CollectiveTimeout, match="rank 0 did not answer"):
            group.monitored_barrier(timedelta(seconds=0.1))
    group.monitored_barrier(timedelta(seconds=20))  # the group lives on
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == me.size
    return answer


@pytest.mark.parametrize("wait_all", [False, True])
def test_a_monitored_barrier_names_who_is_missing(pool: RankPool, wait_all: bool) -> None:
    for rank, answer in enumerate(pool.run(monitored, wait_all, deadline=40)):
        if answer is not None:
            _, message, seconds = answer
            assert ("ranks 1, 3 did not come" if wait_all else "rank 1 did not come") in message, message
            assert ("rank 0 reports" in message) == (rank != 0)
            assert seconds < 3


def deserted(me: Rank) -> tuple[str, str, float] | None:
    me.init(fresh=True)
    dist.group.WORLD.monitored_barrier()
    if me.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return failing(lambda: dist.group.WORLD.monitored_barrier(timedelta(seconds=60)))


def test_a_dead_rank_is_named_without_waiting(pool: RankPool) -> None:
    for rank, answer in enumerate(pool.run(deserted, dying={2}, deadline=40)):
        if rank != 2:
            assert answer is not None
            assert "rank 2 did not come" in answer[1]
            assert answer[2] < 5

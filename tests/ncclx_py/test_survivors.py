"""A group that lost a rank: the others learn it at once, agree on who is left, and go on; nothing of the old group stays."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool

import ncclx_py
from ncclx_py import CollectiveError

pytestmark = pytest.mark.dist

DEADLINE = 6.0  # seconds, of the group


def held() -> dict[str, int]:
    """What this process holds: descriptors by kind, shared mappings of ours, threads."""
    gc.collect()
    kinds: dict[str, int] = {"threads": threading.active_count()}
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            kind = os.readlink(f"/proc/self/fd/{descriptor}").split(":")[0]
        except OSError:
            continue  # that of the listing itself
        kinds[kind] = kinds.get(kind, 0) + 1
    kinds["mappings"] = Path("/proc/self/maps").read_text().count("ncclx-")
    return kinds


def lives(me: Rank) -> None:
    """A whole life of a group, so that whatever is made once is there."""
    me.init(fresh=True)
    dist.all_reduce(torch.ones(3))
    dist.destroy_process_group()


def reduce_until_it_fails() -> float:
    """Seconds from the last good all-reduce to the error."""
    tensor = torch.ones(8 << 20)
    last = time.monotonic()
    try:
        for _ in range(10_000):
            dist.all_reduce(tensor)
            last = time.monotonic()
    except CollectiveError:
        return time.monotonic() - last
    raise AssertionError("nothing failed")


def one_is_killed(me: Rank) -> Any:
    lives(me)
    before = held()
    me.init(fresh=True)
    dist.barrier()
    me.init(fresh=True, timeout=timedelta(seconds=DEADLINE))
    dist.barrier()
    if me.rank == 2:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    stalled = reduce_until_it_fails()
    alive = ncclx_py.survivors(seconds=5)
    group = dist.new_group(alive, use_local_synchronization=True, timeout=timedelta(seconds=30))
    results = []
    for size in (1, 1000, 300_000):
        tensor = torch.full((size,), float(me.rank))
        dist.all_reduce(tensor, group=group)
        results.append((tensor.min().item(), tensor.max().item()))
    gathered = [torch.zeros(1) for _ in alive]
    dist.all_gather(gathered, torch.tensor([me.rank + 10.0]), group=group)
    results.append(tuple(part.item() for part in gathered))
    dist.destroy_process_group(group)
    dist.destroy_process_group()
    del group
    return stalled, alive, results, before, held()


def test_after_a_kill_the_survivors_go_on_and_nothing_is_left() -> None:
    with RankPool(4) as pool:
        answers = pool.run(one_is_killed, dying={2}, deadline=90)
    for rank in (0, 1, 3):
        stalled, alive, results, before, after = answers[rank]
        assert stalled < DEADLINE + 2
        assert alive == [0, 1, 3]
        assert results == [(4.0, 4.0)] * 3 + [(10.0, 11.0, 13.0)]
        assert all(after[kind] <= before.get(kind, 0) for kind in after), (before, after)


def cycles(me: Rank) -> Any:
    """Ends of all kinds, one after the other: a timeout, an abort, an exception inside, a good end."""
    lives(me)
    before = held()
    for how in ("timeout", "abort", "good"):
        me.init(fresh=True, timeout=timedelta(seconds=2 if how == "timeout" else 20))
        dist.barrier()
        if how == "timeout" and me.rank == 0:
            time.sleep(3)
        if how == "abort" and me.rank == 0:
            dist.group.WORLD.abort()
        if how == "good":
            dist.all_reduce(torch.ones(10), async_op=True)
        else:
            with pytest.raises(CollectiveError):
                dist.all_reduce(torch.ones(10))
        dist.destroy_process_group()
    return before, held()


def late(me: Rank) -> tuple[list[int] | None, str]:
    me.init(fresh=True, timeout=timedelta(seconds=20))
    dist.barrier()
    group = dist.group.WORLD
    if me.rank == 1:
        time.sleep(2.5)
    group.abort()
    try:
        answer: tuple[list[int] | None, str] = ncclx_py.survivors(seconds=0.5), ""
    except CollectiveError as error:
        answer = None, str(error)
    dist.destroy_process_group()
    return answer


def test_other_ends_leave_nothing_and_who_comes_late_is_told() -> None:
    with RankPool(2) as pool:
        for before, after in pool.run(cycles, deadline=60):
            assert all(after[kind] <= before.get(kind, 0) for kind in after), (before, after)
        first, second = pool.run(late, deadline=60)
    assert first == ([0], "")
    assert second[0] is None
    assert "came too late" in second[1]
    assert "[0], have gone on without it" in second[1]

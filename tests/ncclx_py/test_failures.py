"""A collective that fails says so, everywhere it is looked for, and the process lives on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankFailure, RankPool
from torch.nn.parallel import DistributedDataParallel

import ncclx_py
from ncclx_py import CollectiveError, CollectiveTimeout

pytestmark = pytest.mark.dist

SHORT = timedelta(seconds=2)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Two processes; a test that kills one gets new ones started for the next."""
    with RankPool(2) as ranks:
        yield ranks


def meet(me: Rank, timeout: timedelta) -> None:
    """A fresh group with a short timeout; processes that are still starting are waited for without it."""
    me.init(fresh=True)
    dist.barrier()
    me.init(fresh=True, timeout=timeout)
    dist.barrier()


def failing(action: Callable[[], Any]) -> tuple[str, str, float]:
    """(class, message, seconds) of the error that `action` must raise."""
    start = time.monotonic()
    try:
        action()
    except RuntimeError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    raise AssertionError("it passed silently")


def averaged(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor, op=dist.ReduceOp.AVG)


def gathered(tensor: torch.Tensor) -> None:
    dist.all_gather_into_tensor(torch.zeros(2 * tensor.numel()), tensor)


def scattered(tensor: torch.Tensor) -> None:
    dist.reduce_scatter_tensor(torch.zeros(tensor.numel() // 2), tensor)


def strided(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor[::2])


def through_a_future(tensor: torch.Tensor) -> None:
    dist.all_reduce(tensor, async_op=True).get_future().wait()


CALLS = {
    "all_reduce": dist.all_reduce,
    "averaged": averaged,
    "gathered": gathered,
    "scattered": scattered,
    "strided": strided,
    "future": through_a_future,
    "received": lambda tensor: dist.recv(tensor, 1),
    "barrier": lambda tensor: dist.barrier(),
    "objects": lambda tensor: dist.all_gather_object([None, None], {"a": 1}),
}


def peer_dies(me: Rank) -> dict[str, Any]:
    """Rank 1 is killed while rank 0 is inside a large all-reduce; then rank 0 tries everything else."""
    meet(me, timedelta(seconds=20))
    if me.rank == 1:
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    huge = torch.ones(64 << 20, dtype=torch.uint8)
    answers: dict[str, Any] = {}

    def reduce_until_it_fails() -> None:
        for _ in range(1000):
            dist.all_reduce(huge)

    answers["mid"] = failing(reduce_until_it_fails)
    answers.update({name: failing(lambda call=call: call(torch.ones(4))) for name, call in CALLS.items()})
    group = dist.group.WORLD
    answers["work"] = group.allreduce([torch.ones(2)]).is_success()
    start = time.monotonic()
    dist.destroy_process_group()
    answers["destroy seconds"] = time.monotonic() - start
    return answers


def test_a_killed_peer_is_an_error_in_every_collective(pool: RankPool) -> None:
    answers = pool.run(peer_dies, dying={1}, deadline=60)[0]
    for name in ("mid", *CALLS):
        kind, message, seconds = answers[name]
        assert seconds < 10, name
        if name != "future":
            assert kind == "CollectiveError", (name, message)
        assert "rank 0 of 2" in message
        assert "group '" in message
        assert "rank 1 is gone" in message or (name == "received" and "A peer exited" in message), (name, message)
    assert "first failure" in answers["all_reduce"][1]
    assert answers["work"] is False
    assert answers["destroy seconds"] < 5


def peer_is_late(me: Rank, name: str) -> tuple[str, str, float] | None:
    meet(me, SHORT)
    if me.rank == 1:
        time.sleep(3.5)
        return None
    return failing(lambda: CALLS[name](torch.ones(4)))


@pytest.mark.parametrize("name", ["averaged", "scattered", "received"])
def test_the_timeout_of_init_is_honoured(pool: RankPool, name: str) -> None:
    answer = pool.run(peer_is_late, name, deadline=30)[0]
    assert answer is not None
    kind, message, seconds = answer
    assert kind == "CollectiveTimeout"
    assert 1.5 < seconds < 3.4
    assert "waits for rank 1" in message if name != "received" else "Some rank is late" in message


def call_timeout(me: Rank) -> tuple[str, str, float] | None:
    meet(me, timedelta(seconds=30))
    if me.rank == 1:
        time.sleep(2)
        return None
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=1)
    return failing(lambda: dist.group.WORLD.allreduce([torch.ones(2)], options).wait())


def test_the_timeout_of_one_call_is_honoured(pool: RankPool) -> None:
    answer = pool.run(call_timeout, deadline=30)[0]
    assert answer is not None
    assert answer[0] == "CollectiveTimeout"
    assert 0.5 < answer[2] < 1.9


def nobody_comes(me: Rank) -> tuple[str, str, float]:
    """Each rank waits alone, in a store of its own, for a rank 1 that does not exist."""
    me.leave()
    store = me.store(f"alone-{me.rank}")
    return failing(lambda: dist.init_process_group("ncclx", store=store, rank=0, world_size=2, timeout=SHORT))


def test_init_gives_up_when_a_rank_is_missing(pool: RankPool) -> None:
    for kind, message, seconds in pool.run(nobody_comes, deadline=30):
        assert seconds < 10
        assert kind in ("CollectiveError", "CollectiveTimeout")
        assert "connecting" in message
        assert "rank 0 of 2" in message


def in_backward(me: Rank, how: str) -> list[Any] | None:
    """A peer is lost between forward and backward: the error must come out of backward()."""
    meet(me, SHORT)
    net = DistributedDataParallel(torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)]), bucket_cap_mb=0.01)
    net(torch.ones(2, 64)).sum().backward()
    loss = net(torch.ones(2, 64)).sum()
    dist.barrier()
    if me.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3.5)
        return None
    answer = failing(loss.backward)
    alive = (torch.ones(3) + 1).sum().item()
    dist.destroy_process_group()
    return [answer, alive]


@pytest.mark.parametrize("how", ["killed", "late"])
def test_an_error_in_backward_of_ddp_is_raised_and_survived(pool: RankPool, how: str) -> None:
    answer = pool.run(in_backward, how, dying={1} if how == "killed" else (), deadline=60)[0]
    (_, message, seconds), alive = answer
    assert alive == 6.0
    assert seconds < 10
    assert "all_reduce" in message
    assert "rank 0 of 2" in message
    assert ("rank 1 is gone" if how == "killed" else "waits for rank 1") in message


def aborted(me: Rank) -> list[Any] | None:
    meet(me, timedelta(seconds=60))
    if me.rank == 1:
        time.sleep(1.5)
        return None
    group = dist.group.WORLD
    threading.Timer(0.5, group.abort).start()
    answer = failing(lambda: dist.all_reduce(torch.ones(4)))
    after = failing(lambda: dist.all_reduce(torch.ones(4)))
    group.abort()
    group.shutdown()
    dist.destroy_process_group()
    return [answer, after]


def test_abort_ends_what_is_running(pool: RankPool) -> None:
    (kind, _, seconds), after = pool.run(aborted, deadline=30)[0]
    assert kind == "CollectiveError"
    assert seconds < 2
    assert "aborted" in after[1]
    assert "Make a new group" in after[1]


def again(me: Rank) -> list[float]:
    """Groups come and go in one process, on several threads' leftovers."""
    sums = []
    for _ in range(3):
        me.init(fresh=True)
        tensor = torch.ones(2)
        dist.all_reduce(tensor, async_op=True)  # destroyed while it may still run
        dist.destroy_process_group()
        sums.append(tensor.sum().item())
    return sums


def test_destroy_waits_for_what_runs_and_groups_can_be_made_anew(pool: RankPool) -> None:
    assert pool.run(again, deadline=40) == [[4.0] * 3] * 2


def mismatched(me: Rank) -> tuple[str, str, float]:
    meet(me, SHORT)
    return failing(lambda: dist.all_gather_into_tensor(torch.zeros(3), torch.zeros(2 if me.rank else 1)))


def test_wrong_sizes_are_refused_before_anything_is_sent(pool: RankPool) -> None:
    def worker_raises() -> None:
        pool.run(mismatched, deadline=20)

    with pytest.raises(RankFailure, match="`output` has 3 elements") as caught:
        worker_raises()
    assert "4 are needed" in str(caught.value)
    assert "2 are needed" in str(caught.value)


SCRIPT = """
    import sys, time, torch, torch.distributed as dist, ncclx_py
    from datetime import timedelta
    from ncclx_py.runtime import group_base
    group_base.GRACE = 1.0
    rank = int(sys.argv[1])
    store = dist.FileStore(sys.argv[2], 2)
    dist.init_process_group("ncclx", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    dist.barrier()
    if rank == 1:
        time.sleep(60)
    print(time.time())
    work = dist.all_reduce(torch.ones(4), op=dist.ReduceOp.AVG, async_op=True)
    future = dist.all_reduce(torch.ones(4), async_op=True).get_future()
    if sys.argv[3] == "raise":
        raise ValueError("on purpose")
"""


@pytest.mark.parametrize(("how", "status", "longest"), [("raise", 1, 4.0), ("end", 0, 5.0)])
def test_a_process_with_collectives_in_flight_ends_without_a_crash(
    tmp_path: Path, how: str, status: int, longest: float
) -> None:
    """gloo alone would stay until its timeout, and a callback after Python's end would abort the process."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-P", str(script)]
    tail = [str(tmp_path / "store"), how]
    with subprocess.Popen([*command, "1", *tail], stderr=subprocess.DEVNULL) as peer:
        try:
            done = subprocess.run([*command, "0", *tail], capture_output=True, text=True, timeout=120, check=False)
            seconds = time.time() - float(done.stdout)
        finally:
            peer.kill()
    assert done.returncode == status, done.stderr
    assert seconds < 10 + longest
    assert "terminate called" not in done.stderr
    if how == "raise":
        assert "on purpose" in done.stderr


def test_errors_are_torchs_errors() -> None:
    assert issubclass(CollectiveError, dist.DistBackendError)
    assert issubclass(CollectiveError, RuntimeError)
    assert issubclass(CollectiveTimeout, TimeoutError)
    assert ncclx_py.CollectiveError is CollectiveError

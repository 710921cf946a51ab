"""How a call fails: ranks that call different things, die, stop, are late or abort. Every other rank must learn it soon,
with the name of the rank to blame; and nothing may be left behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import Rank, RankPool, load

from ncclx_py.errors import CollectiveError
from ncclx_py.plans.plan import Problem, Program, Span

cases = load(Path(__file__).with_name("fabric_cases.py"), "fabric_cases")

LOCAL, REMOTE, MIXED = (0, 0, 0), (0, 1, 2), (0, 0, 1)
LAYOUTS = [LOCAL, REMOTE, MIXED]
SOON = 10.0  # seconds: long before the deadline of a call, 30


def all_reduce(node: cases.Node, count: int = 10, dtype: torch.dtype = torch.float32, reduction: str = "SUM") -> None:
    problem = Problem("all_reduce", node.size, count=count)
    node.collective(problem, "direct", {}, {"data": torch.ones(count, dtype=dtype)}, reduction)


def failing(act: Callable[[], None]) -> tuple[str, str, float]:
    """The class and text of the error that `act` must end with, and how long that took."""
    start = time.monotonic()
    try:
        act()
    except CollectiveError as error:
        return type(error).__name__, str(error), time.monotonic() - start
    raise AssertionError("no error")


def mismatched(me: Rank, hosts: tuple[int, ...], how: str) -> tuple[str, str, float]:
    node = cases.fresh(me, hosts)
    all_reduce(node)
    odd = me.rank == 1
    time.sleep(0.05 * me.rank)
    if how == "reduction":
        result = failing(lambda: all_reduce(node, 10, torch.float32, "MAX" if odd else "SUM"))
    elif how == "dtype":
        result = failing(lambda: all_reduce(node, 10, torch.int32 if odd else torch.float32))
    elif how == "elements":
        result = failing(lambda: all_reduce(node, 12 if odd else 10))
    else:
        problem = Problem("broadcast", me.size, count=10)
        other = lambda: node.collective(problem, "tree", {}, {"data": torch.ones(10)})  # noqa: E731
        result = failing(other if odd else lambda: all_reduce(node))
    again = failing(lambda: all_reduce(node))
    assert "aborted by rank" in again[1], again
    node.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS)
def test_ranks_that_call_different_things(pool: RankPool, hosts: tuple[int, ...]) -> None:
    for how, theirs, mine in [
        ("reduction", "all_reduce of 10 x float32 (MAX) as call 1", "all_reduce of 10 x float32 (SUM) as call 1"),
        ("dtype", "all_reduce of 10 x int32 (SUM) as call 1", "all_reduce of 10 x float32 (SUM) as call 1"),
        ("elements", "all_reduce of 12 x float32 (SUM) as call 1", "all_reduce of 10 x float32 (SUM) as call 1"),
        ("op", "broadcast of 10 x float32 as call 1", "all_reduce of 10 x float32 (SUM) as call 1"),
    ]:
        results = cases.run(pool, hosts, mismatched, how)
        for kind, text, seconds in results:
            assert kind == "CollectiveError"
            assert theirs in text, text
            assert mine in text, text
            assert seconds < SOON, text


def absent(me: Rank, hosts: tuple[int, ...]) -> tuple[str, str, float]:
    node = cases.fresh(me, hosts)
    all_reduce(node)
    if me.rank == 1:
        time.sleep(1.5)
        return failing(lambda: all_reduce(node))
    program = cases.build_rank(Problem("all_reduce", me.size, count=10), node.fabric.topology, "direct", me.rank, {})
    result = failing(lambda: node.run(program, {"data": torch.ones(10)}, "SUM", "all_reduce", 10, seconds=0.5))
    node.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS)
def test_the_deadline_names_the_rank_that_is_late(pool: RankPool, hosts: tuple[int, ...]) -> None:
    results = cases.run(pool, hosts, absent)
    texts = [results[0], results[2]]
    assert "CollectiveTimeout" in [kind for kind, _, _ in texts]
    for kind, text, seconds in texts:
        assert "waits for rank 1 (lane" in text, text
        assert "rank 2 (" not in text or kind == "CollectiveTimeout", text
        assert 0.4 < seconds < SOON
    assert "aborted by rank" in results[1][1]
    assert results[1][2] < SOON


def dying(me: Rank, hosts: tuple[int, ...], how: int, warm: bool) -> tuple[str, str, float]:
    node = cases.fresh(me, hosts)
    if warm:
        all_reduce(node)
    if me.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), how)
    result = failing(lambda: all_reduce(node))
    node.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS)
@pytest.mark.parametrize("warm", [True, False])
def test_a_rank_that_is_killed_is_named_within_a_second(pool: RankPool, hosts: tuple[int, ...], warm: bool) -> None:
    results = cases.run(pool, hosts, dying, signal.SIGKILL, warm, forks=True)
    for rank in (0, 2):
        kind, text, seconds = results[rank]
        assert kind == "CollectiveError"
        assert "rank 1 is gone" in text, text
        assert seconds < SOON


def only_receiving(me: Rank, hosts: tuple[int, ...]) -> tuple[str, str, float] | None:
    """Ranks 0 and 2 wait for rank 1, which they have never been connected to, and which dies before it sends."""
    node = cases.fresh(me, hosts)
    if me.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    program = Program(me.rank)
    program.recv(Span("data", 0, 10), 1)
    result = failing(lambda: node.run(program.finish(), {"data": torch.ones(10)}))
    node.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS)
def test_a_rank_that_dies_before_it_sends_is_named(pool: RankPool, hosts: tuple[int, ...]) -> None:
    results = cases.run(pool, hosts, only_receiving, forks=True)
    for rank in (0, 2):
        assert "rank 1 is gone" in results[rank][1], results[rank]
        assert results[rank][2] < SOON


def stopped(me: Rank, hosts: tuple[int, ...]) -> tuple[str, str, float]:
    node = cases.fresh(me, hosts)
    all_reduce(node)
    if me.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    program = cases.build_rank(Problem("all_reduce", me.size, count=10), node.fabric.topology, "direct", me.rank, {})
    result = failing(lambda: node.run(program, {"data": torch.ones(10)}, "SUM", "all_reduce", 10, seconds=1.0))
    node.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS[:2])
def test_a_rank_that_is_stopped_meets_the_deadline(pool: RankPool, hosts: tuple[int, ...]) -> None:
    results = cases.run(pool, hosts, stopped, forks=True)
    for rank in (0, 2):
        assert "waits for rank 1 (lane" in results[rank][1], results[rank]


def aborting(me: Rank, hosts: tuple[int, ...], waits: bool) -> tuple[str, str, float]:
    node = cases.fresh(me, hosts)
    all_reduce(node)
    if me.rank == 2:
        if waits:
            threading.Timer(0.3, lambda: node.fabric.abort("the user said so")).start()
            result = failing(lambda: all_reduce(node))
        else:
            time.sleep(0.3)
            node.fabric.abort("the user said so")
            node.fabric.abort("a second reason")
            result = failing(lambda: all_reduce(node))
        node.close()
        return result
    if me.rank == 1 and waits:
        time.sleep(1.0)
    return failing(lambda: all_reduce(node))


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS)
@pytest.mark.parametrize("waits", [True, False])
def test_an_abort_reaches_everyone_with_its_reason(pool: RankPool, hosts: tuple[int, ...], waits: bool) -> None:
    results = cases.run(pool, hosts, aborting, waits)
    for kind, text, seconds in results:
        assert kind == "CollectiveError"
        assert "aborted by rank 2: the user said so" in text, text
        assert seconds < SOON


def closing(me: Rank, hosts: tuple[int, ...]) -> tuple[str, str, float] | None:
    node = cases.fresh(me, hosts)
    all_reduce(node)
    if me.rank == 1:
        node.close()
        node.close()
        return failing(lambda: all_reduce(node))
    result = failing(lambda: all_reduce(node))
    node.close()
    return result


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS)
def test_a_rank_that_left_is_named(pool: RankPool, hosts: tuple[int, ...]) -> None:
    results = cases.run(pool, hosts, closing)
    assert "rank 1: it has left the group" in results[1][1]
    for rank in (0, 2):
        assert "rank 1 is gone" in results[rank][1], results[rank]


def forked(me: Rank, hosts: tuple[int, ...]) -> tuple[str, str, float]:
    """Rank 1 has a child that outlives it, as data loaders do."""
    node = cases.fresh(me, hosts)
    all_reduce(node)
    if me.rank == 1:
        if os.fork() == 0:
            time.sleep(4)
            os._exit(0)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    result = failing(lambda: all_reduce(node))
    node.close()
    return result


@pytest.mark.dist
def test_a_child_does_not_hide_the_death_of_its_parent(pool: RankPool) -> None:
    results = cases.run(pool, MIXED, forked, forks=True)
    for rank in (0, 2):
        assert "rank 1 is gone" in results[rank][1]
        assert results[rank][2] < SOON


def missing(me: Rank, hosts: tuple[int, ...]) -> str:
    if me.rank == 1:
        return ""
    try:
        cases.Fabric.connect(me.store(f"nobody-{cases._ticket}"), me.rank, me.size, cases.timedelta(seconds=0.5))
    except CollectiveError as error:
        return str(error)
    raise AssertionError("no error")


@pytest.mark.dist
def test_a_group_that_does_not_come_together_names_who_is_missing(pool: RankPool) -> None:
    results = cases.run(pool, LOCAL, missing)
    assert "ranks [1] did not come" in results[0]
    assert "ranks [1] did not come" in results[2]


def count_resources() -> dict[str, int]:
    maps = Path("/proc/self/maps").read_text()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "memfds": maps.count("memfd:ncclx"),
        "threads": threading.active_count(),
    }


def opened_and_closed(me: Rank, hosts: tuple[int, ...]) -> None:
    def once(abort: bool) -> None:
        node = cases.fresh(me, hosts)
        all_reduce(node)
        kept = node.fabric.arena.allocate((1000,), torch.float32)
        all_reduce(node)
        if abort:  # once all are through: an abort ends what others still run
            done = me.store(f"through-{cases._ticket}")
            done.set(str(me.rank), "")
            done.wait([str(rank) for rank in range(len(hosts))])
            node.fabric.abort("enough")
        node.close()
        kept.fill_(3)  # the memory of a tensor lives as long as the tensor

    once(False)
    gc.collect()  # what other tests have left open
    before = count_resources()
    for round_ in range(3):
        once(round_ == 2)
    assert count_resources() == before


@pytest.mark.dist
@pytest.mark.parametrize("hosts", LAYOUTS)
def test_closing_leaves_nothing_behind(pool: RankPool, hosts: tuple[int, ...]) -> None:
    cases.run(pool, hosts, opened_and_closed)


def killed_while_meeting(me: Rank, hosts: tuple[int, ...], report: str) -> None:
    """Rank 1 never comes, so the others wait with their sockets open, until they are killed."""
    if me.rank == 1:
        return
    open_before = set(os.listdir("/proc/self/fd"))

    def die() -> None:
        time.sleep(0.5)
        own = set()
        for one in set(os.listdir("/proc/self/fd")) - open_before:
            with contextlib.suppress(OSError):  # the descriptor of the listing itself
                own.add(os.readlink(f"/proc/self/fd/{one}"))
        Path(report, str(me.rank)).write_text("\n".join(_names(own)))
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die).start()
    cases.Fabric.connect(me.store(f"meeting-{cases._ticket}"), me.rank, me.size, cases.timedelta(seconds=10))


def _names(links: set[str]) -> list[str]:
    """The abstract names of Unix sockets given as /proc shows them, "socket:[inode]"."""
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [row[7] for row in rows if len(row) > 7 and f"socket:[{row[6]}]" in links]


@pytest.mark.dist
def test_killed_ranks_leave_no_names_behind(pool: RankPool, tmp_path: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    cases.run(pool, LOCAL, killed_while_meeting, str(tmp_path), forks=True)
    names = [(tmp_path / str(rank)).read_text() for rank in (0, 2)]
    assert all(name.startswith("@ncclx-") for name in names)
    left = Path("/proc/net/unix").read_text()
    assert not [name for name in names if name in left]
    assert not [name for name in set(os.listdir("/dev/shm")) - shared if "ncclx" in name]


def late_deadline(me: Rank, hosts: tuple[int, ...]) -> str:
    """A deadline that has passed is an error even where nobody is to blame, and CollectiveTimeout is a TimeoutError."""
    node = cases.fresh(me, hosts)
    time.sleep(0.3 * me.rank)
    program = cases.build_rank(Problem("all_reduce", 3, count=1), node.fabric.topology, "direct", me.rank, {})
    try:
        node.run(program, {"data": torch.ones(1)}, "SUM", seconds=0.1)
    except TimeoutError as error:
        node.close()
        return type(error).__name__
    except CollectiveError:
        node.close()
        return "aborted"
    return "done"


@pytest.mark.dist
def test_a_passed_deadline_is_a_timeout_error(pool: RankPool) -> None:
    assert cases.run(pool, LOCAL, late_deadline)[0] == "CollectiveTimeout"

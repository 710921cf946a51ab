"""Messages between two ranks: what arrives, in what order, what ends them, and who is connected to whom."""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool, load
from torch.distributed.distributed_c10d import _set_pg_timeout

failing = load(Path(__file__).with_name("test_failures.py"), "failures").failing

pytestmark = pytest.mark.dist

DTYPES = (torch.float32, torch.uint8, torch.int16, torch.float64, torch.bool, torch.complex64, torch.bfloat16)
SIZES = (0, 1, 7, 1000, 3000, 9000, 100_000)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


def sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:
            continue
    return found


def mail_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ncclx-mail"]


# Random traffic


class Message(NamedTuple):
    source: int
    target: int
    tag: int
    number: int
    count: int
    dtype: torch.dtype
    strided: bool

    def content(self) -> torch.Tensor:
        seed = hash((self.source, self.target, self.tag, self.number)) % 97
        values = (torch.arange(self.count) * 31 + seed) % 101
        return values.to(self.dtype)

    def tensor(self, fill: torch.Tensor | None = None) -> torch.Tensor:
        whole = torch.zeros(2 * self.count if self.strided else self.count, dtype=self.dtype)
        tensor = whole[::2] if self.strided else whole
        if fill is not None:
            tensor.copy_(fill)
        return tensor


def traffic(seed: int, size: int, count: int) -> list[Message]:
    draw = random.Random(seed)
    found = []
    for number in range(count):
        source, target = draw.sample(range(size), 2)
        kind = draw.choice(SIZES), draw.choice(DTYPES), draw.random() < 0.2
        found.append(Message(source, target, draw.choice((0, 1, 2, 4_000_000_000)), number, *kind))
    return found


def exchanged(me: Rank, seed: int, hosts: str) -> None:
    """Every rank posts its sends and receives in an order of its own; those of one pair and tag stay in order."""
    os.environ["NCCLX_HOST_ID"] = f"host {me.rank // 2}" if hosts == "two" else "one host"
    me.init(fresh=True)
    draw = random.Random(seed * 100 + me.rank)
    lanes: dict[tuple[bool, int, int], list[Message]] = {}
    for message in traffic(seed, me.size, 150):
        if me.rank in (message.source, message.target):
            sends = me.rank == message.source
            lanes.setdefault((sends, message.target if sends else message.source, message.tag), []).append(message)
    waits: list[tuple[Any, Any, Message, torch.Tensor | None]] = []
    while lanes:
        sends, peer, tag = draw.choice(list(lanes))
        message = lanes[sends, peer, tag].pop(0)
        if not lanes[sends, peer, tag]:
            del lanes[sends, peer, tag]
        if sends:
            tensor = message.tensor(message.content())
            work = dist.isend(tensor, peer, tag=tag)
            if draw.random() < 0.3:
                continue  # nobody waits for this one
            waits.append((work, None, message, None))
        else:
            tensor = message.tensor()
            work = dist.irecv(tensor, peer, tag=tag)
            waits.append((work, work.get_future() if draw.random() < 0.2 else None, message, tensor))
        if draw.random() < 0.05:
            time.sleep(0.003)
    draw.shuffle(waits)
    for work, future, message, tensor in waits:
        future.wait() if future is not None else work.wait()
        assert work.is_completed()
        if tensor is not None:
            assert torch.equal(tensor, message.content()), message
            assert work.source_rank() == message.source
    dist.destroy_process_group()
    assert not mail_threads()


@pytest.mark.parametrize("hosts", ["one", "two"])
def test_random_traffic_arrives_in_order_of_each_tag(pool: RankPool, hosts: str) -> None:
    """On two emulated hosts the messages between them go over TCP."""
    for seed in (1, 2):
        pool.run(exchanged, seed, hosts, deadline=60)


def large_both_ways(me: Rank) -> None:
    me.init(fresh=True)
    if me.rank > 1:
        return
    mine, theirs = torch.full((16 << 20,), float(me.rank + 1)), torch.zeros(16 << 20)
    works = [dist.isend(mine, 1 - me.rank), dist.irecv(theirs, 1 - me.rank)]
    for work in works:
        work.wait()
    assert (theirs == 2.0 - me.rank).all()
    # a send that waits first, at both ends, while only the thread serves the receive
    receive = dist.irecv(theirs.zero_(), 1 - me.rank)
    dist.send(mine, 1 - me.rank)
    mine.fill_(-1.0)  # it is ours again
    receive.wait()
    assert (theirs == 2.0 - me.rank).all()


def test_64_mib_both_ways_at_once(pool: RankPool) -> None:
    pool.run(large_both_ways)


# Connections


def connections(me: Rank) -> list[int]:
    """Sockets: before the group, with it, after a message from 0 to 1, and without the group."""
    me.leave()
    gc.collect()
    store = me.store("connections")
    before = sockets()
    me.init(fresh=True)
    counts = [before, sockets()]
    tensor = torch.ones(3)
    if me.rank < 2:
        (dist.send if me.rank == 0 else dist.recv)(tensor, 1 - me.rank)
    counts.append(sockets())
    store.add("seen", 1)
    while int(store.add("seen", 0)) < me.size:
        time.sleep(0.01)
    dist.destroy_process_group()
    gc.collect()
    return [*counts, sockets()]


def test_only_ranks_that_exchange_messages_are_connected(pool: RankPool) -> None:
    counts = pool.run(connections)
    for rank, (before, made, after, left) in enumerate(counts):
        assert made - before == counts[0][1] - counts[0][0], "a rank has connections that another has not"
        assert after - made == (2 if rank < 2 else 0), (rank, counts)
        assert left == before, (rank, counts)


# Any source, futures, handles


def from_anyone(me: Rank) -> None:
    me.init(fresh=True)
    count = 6
    if me.rank:
        works = [dist.isend(torch.tensor([me.rank, number]), 0, tag=5) for number in range(count)]
        dist.send(torch.tensor([-me.rank]), 0, tag=6)
        [work.wait() for work in works]
        return
    heard: dict[int, list[int]] = {rank: [] for rank in range(1, me.size)}
    early = torch.zeros(2, dtype=torch.int64)
    waiting = dist.irecv(early, tag=5)  # posted before anyone is known
    for rank in range(me.size - 1, 0, -1):
        special = torch.zeros(1, dtype=torch.int64)
        dist.recv(special, rank, tag=6)
        assert special.item() == -rank
    waiting.wait()
    heard[waiting.source_rank()].append(early.tolist())
    for _ in range(count * (me.size - 1) - 1):
        got = torch.zeros(2, dtype=torch.int64)
        source = dist.recv(got, tag=5)
        heard[source].append(got.tolist())
    assert heard == {rank: [[rank, number] for number in range(count)] for rank in heard}


def test_any_source_takes_each_senders_messages_in_order(pool: RankPool) -> None:
    pool.run(from_anyone)


def let_go(me: Rank) -> list[bool] | None:
    """Sends that nobody holds are delivered although the sender's group is destroyed at once."""
    me.init(fresh=True)
    sizes = (3, 5_000, 500_000)
    if me.rank == 0:
        for size in sizes:
            dist.isend(torch.arange(float(size)), 1)
        gc.collect()
    elif me.rank == 1:
        time.sleep(0.3)
        for size in sizes:
            received = torch.zeros(size)
            work = dist.irecv(received, 0)
            until = time.monotonic() + 10
            while not work.is_completed():  # nobody waits: the thread brings it through
                assert time.monotonic() < until
                time.sleep(0.001)
            assert torch.equal(received, torch.arange(float(size)))
    dist.destroy_process_group()


def test_sends_without_a_handle_outlive_the_group_of_their_sender(pool: RankPool) -> None:
    pool.run(let_go)


def answering(me: Rank) -> None:
    """A callback of a receive's future sends and waits, in whichever thread it runs."""
    me.init(fresh=True)
    if me.rank > 1:
        return
    tensor, peer = torch.zeros(1), 1 - me.rank
    if me.rank == 0:
        done = dist.irecv(tensor, peer).get_future().then(lambda got: dist.send(got.value()[0] + 1, peer, tag=1))
        done.wait()
        dist.recv(tensor, peer, tag=2)
    else:
        dist.send(torch.tensor([4.0]), peer)
        dist.recv(tensor, peer, tag=1)
        assert tensor.item() == 5.0
        dist.send(tensor, peer, tag=2)


def test_a_callback_may_send_and_wait(pool: RankPool) -> None:
    pool.run(answering)


def side_by_side(me: Rank) -> None:
    """Threads of both ranks play with a ball each: whoever waits serves the others."""
    me.init(fresh=True)
    if me.rank > 1:
        return
    failures = []

    def play(tag: int) -> None:
        ball = torch.zeros(1 + 3000 * tag)
        for turn in range(30):
            if (turn + tag) % 2 == me.rank:
                dist.send(ball.fill_(turn), 1 - me.rank, tag=tag)
            else:
                dist.recv(ball, 1 - me.rank, tag=tag)
                if not (ball == turn).all():
                    failures.append((tag, turn))

    threads = [threading.Thread(target=play, args=(tag,)) for tag in range(5)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert not any(thread.is_alive() for thread in threads)
    assert not failures


def test_threads_exchange_messages_side_by_side(pool: RankPool) -> None:
    pool.run(side_by_side)


# What does not fit


def unequal(me: Rank, late: int) -> list[tuple[str, str, float]]:
    """Rank 0 sends to rank 1 what does not fit; `late` posts after the other. A message that fits follows each."""
    me.init(fresh=True)
    answers = []
    if me.rank > 1:
        return answers
    cases = [  # sent, expected
        (torch.ones(4), torch.zeros(5)),
        (torch.ones(100_000), torch.zeros(99_999)),
        (torch.ones(4), torch.zeros(4, dtype=torch.int32)),
        (torch.ones(5000), torch.zeros(5000, dtype=torch.int32)),
        (torch.ones(0), torch.zeros(1)),
    ]
    for sent, expected in cases:
        time.sleep(0.05 if me.rank == late else 0)
        if me.rank == 0:
            answers.append(failing(lambda sent=sent: dist.send(sent, 1, tag=9)))
            dist.send(torch.tensor([7.0]), 1, tag=9)
        else:
            answers.append(failing(lambda expected=expected: dist.recv(expected, 0, tag=9)))
            assert not expected.any(), "something was written"
            after = torch.zeros(1)
            dist.recv(after, 0, tag=9)
            assert after.item() == 7.0
    return answers


@pytest.mark.parametrize("late", [0, 1])
def test_ends_that_do_not_fit_are_named_on_both_ranks(pool: RankPool, late: int) -> None:
    wrong = [
        "4 x float32|5 x float32",
        "100000 x float32|99999 x float32",
        "4 x float32|4 x int32",
        "5000 x float32|5000 x int32",
        "0 x float32|1 x",
    ]
    for answers in pool.run(unequal, late)[:2]:
        for (kind, message, _), both in zip(answers, wrong, strict=True):
            assert kind == "CollectiveError"
            for part in both.split("|"):
                assert part in message, message
            assert "rank 0 sends" in message
            assert "with tag 9 to rank 1, which expects" in message


# What ends them


def orphaned(me: Rank) -> dict[str, tuple[str, str, float]]:
    """Rank 1 is killed while it and rank 0 have messages on their way."""
    me.init(fresh=True)
    dist.barrier()
    store = me.store("orphaned")
    if me.rank == 1:
        dist.irecv(torch.zeros(1), 0, tag=100)
        half = dist.irecv(torch.zeros(8 << 20), 0, tag=101)  # asked for
        store.wait(["posted"])
        time.sleep(0.2)
        del half
        os.kill(os.getpid(), signal.SIGKILL)
    if me.rank > 1:
        return {}
    huge, small = torch.ones(8 << 20), torch.ones(2)
    works = {
        "receive": dist.irecv(small, 1, tag=1),
        "receive later": dist.irecv(small.clone(), 1, tag=2),
        "send": dist.isend(huge, 1, tag=3),
        "short send": dist.isend(small, 1, tag=4),
        "any": dist.irecv(small.clone(), tag=5),
    }
    store.set("posted", "1")
    answers = {name: failing(work.wait) for name, work in works.items()}
    answers["future"] = failing(works["send"].get_future().wait)
    answers["after"] = failing(lambda: dist.send(small, 1))
    assert works["send"].exception() is not None
    dist.destroy_process_group()
    return answers


def test_a_killed_peer_ends_messages_in_both_directions(pool: RankPool) -> None:
    for name, (_, message, seconds) in pool.run(orphaned, dying={1}, deadline=40)[0].items():
        assert "rank 1 is gone" in message, (name, message)
        assert seconds < 5, name


def forked(me: Rank) -> Any:
    """Rank 1 forks a child, which lives on, and dies: the child's copies of its sockets do not hide that."""
    me.init(fresh=True)
    store = me.store("forked")
    if me.rank == 1:
        dist.recv(torch.zeros(1), 0)
        child = os.fork()
        if not child:
            kind, message, _ = failing(lambda: dist.recv(torch.zeros(1), 0))
            store.set("in child", f"{kind} {message}")
            time.sleep(60)
            os._exit(0)
        store.set("child", str(child))
        store.wait(["in child"])
        os.kill(os.getpid(), signal.SIGKILL)
    if me.rank == 0:
        dist.send(torch.ones(1), 1)
        answer = failing(lambda: dist.recv(torch.zeros(1), 1))
        os.kill(int(store.get("child")), signal.SIGKILL)
        return answer, store.get("in child").decode()
    return None


def test_a_forked_child_keeps_no_connection_alive(pool: RankPool) -> None:
    (_, message, seconds), child = pool.run(forked, dying={1}, deadline=40)[0]
    assert "rank 1 is gone" in message
    assert seconds < 20
    assert child.startswith("CollectiveError")
    assert "forked" in child


def aborted(me: Rank) -> Any:
    """Rank 1 aborts while rank 0 waits for rank 2, and rank 3 for anyone. Before, rank 1 had a message for rank 0."""
    me.init(fresh=True)
    dist.barrier()
    if me.rank == 1:
        dist.send(torch.ones(1), 0)
        dist.send(torch.ones(1), 3)
        pending = dist.irecv(torch.zeros(1), 2)
        threading.Timer(0.3, dist.group.WORLD.abort).start()
        return failing(pending.wait)
    if me.rank == 2:
        time.sleep(1.0)
        return None
    dist.recv(torch.zeros(1), 1)
    source = (2,) if me.rank == 0 else ()
    answer = failing(lambda: dist.recv(torch.zeros(1), *source))
    dist.destroy_process_group()
    return answer


def test_an_abort_ends_messages_of_all_ranks(pool: RankPool) -> None:
    answers = pool.run(aborted, deadline=30)
    for rank in (0, 1, 3):
        kind, message, seconds = answers[rank]
        assert kind == "CollectiveError"
        assert "aborted by rank 1" in message, message
        assert seconds < 3


def impatient(me: Rank) -> list[tuple[str, str, float]]:
    me.init(fresh=True)
    store = me.store("impatient")
    if me.rank > 1:
        return []
    peer, tensor = 1 - me.rank, torch.ones(3)
    if me.rank == 1:
        store.wait(["gave up"])
        dist.send(tensor * 2, peer, tag=3)
        dist.recv(tensor, peer, tag=4)
        store.wait(["ended"])
        return [failing(lambda: dist.recv(tensor, peer, tag=6))]
    receive, send = dist.irecv(tensor, peer, tag=3), dist.isend(torch.ones(50_000)[:3], peer, tag=4)
    answers = [failing(lambda work=work: work.wait(timedelta(milliseconds=100))) for work in (receive, send)]
    store.set("gave up", "1")
    receive.wait()
    send.wait()
    assert tensor.tolist() == [2.0] * 3
    _set_pg_timeout(timedelta(seconds=1))
    answers.append(failing(lambda: dist.recv(tensor, peer, tag=5)))
    answers.append(failing(lambda: dist.all_reduce(tensor)))
    store.set("ended", "1")
    return answers


def test_waits_have_deadlines_and_the_groups_own_ends_it(pool: RankPool) -> None:
    mine, theirs = pool.run(impatient, deadline=30)[:2]
    for (kind, message, seconds), words in zip(mine[:2], ("recv from rank 1 with tag 3", "send to rank 1 with tag 4")):
        assert kind == "CollectiveTimeout"
        assert words in message
        assert "it goes on" in message
        assert seconds < 1
    kind, message, seconds = mine[2]
    assert kind == "CollectiveTimeout"
    assert "rank 1 has not sent 3 x float32 with tag 5 to rank 0" in message
    assert 0.8 < seconds < 3
    assert "aborted by rank 0" in mine[3][1]
    assert "aborted by rank 0" in theirs[0][1]


def limited(me: Rank) -> tuple[str, str, float] | None:
    me.init(fresh=True, timeout=timedelta(seconds=1))
    if me.rank:
        time.sleep(2.5)
        return None
    return failing(dist.irecv(torch.zeros(1), 1).get_future().wait)


def test_a_future_has_the_deadline_of_the_group(pool: RankPool) -> None:
    answer = pool.run(limited, deadline=30)[0]
    assert answer is not None
    assert "rank 1 has not sent 1 x float32 with tag 0 to rank 0" in answer[1]
    assert answer[2] < 3

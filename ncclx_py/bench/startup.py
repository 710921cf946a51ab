"""How long a start takes, and what it asks of the store: ``init_process_group`` and the first all-reduce, beside gloo.

    python -m ncclx_py.bench.startup [--ranks 2,4,8,16,32] [--repeats 7] [--fake 64,1024,4096] [--json]

Real ranks are forked processes over one TCPStore; backends take turns, and a round ends when its slowest rank is done. The
first round of each pays for imports: it is given as `cold`, the median of the others as `median`. Requests to the store
are counted in a round of their own, as counting costs time. Fake ranks are threads over a store in memory, which only run the
exchange that a group of that size begins with, on hosts of eight.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import ncclx_py  # noqa: F401  (registers the backend)
from ncclx_py.bench.counting import CountingStore
from ncclx_py.runtime.basis import says
from ncclx_py.transport.exchange import exchange
from ncclx_py.transport.identity import Card

BACKENDS = ("ncclx", "gloo")
DEADLINE = timedelta(seconds=120)
_PER_HOST = 8
_STACK = 256 << 10  # bytes, of a thread that is a fake rank

Row = dict[str, Any]


class MemoryStore:
    """Keys and values in this process, for ranks that are threads; whoever waits for a key is woken by that key alone."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._there: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str | bytes) -> None:
        with self._lock:
            self._values[key] = value.encode() if isinstance(value, str) else value
            event = self._there.setdefault(key, threading.Event())
        event.set()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self._values[key] for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self._values for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta) -> None:
        until = time.monotonic() + timeout.total_seconds()
        for key in keys:
            with self._lock:
                event = self._there.setdefault(key, threading.Event())
            if not event.wait(max(0.0, until - time.monotonic())):
                raise RuntimeError(f"the key {key} was not set in time")


def fake(size: int) -> Row:
    """The exchange of cards with settings among `size` fake ranks: seconds, and requests of each rank."""
    shared = MemoryStore()
    stores = [CountingStore(shared) for _ in range(size)]
    errors: list[BaseException] = []
    rows = [[*_card(rank).row(), says(rank, {})] for rank in range(size)]

    def join(rank: int) -> None:
        try:
            exchange(stores[rank], "fabric", rank, size, rows[rank], DEADLINE)
        except BaseException as error:
            errors.append(error)

    before = threading.stack_size(_STACK)
    try:
        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - began
    finally:
        threading.stack_size(before)
    if errors:
        raise errors[0]
    others = stores[1:] or stores
    return {
        "ranks": size,
        "seconds": seconds,
        "messages_per_rank": max(store.messages for store in others),
        "bytes_per_rank": max(store.sent + store.received for store in others),
        "messages_of_rank_0": stores[0].messages,
        "bytes_of_rank_0": stores[0].sent + stores[0].received,
        "bytes_if_each_read_all": sum(len(json.dumps(row, separators=(",", ":"))) for row in rows),
    }


def _card(rank: int) -> Card:
    host = rank // _PER_HOST
    addresses = (f"10.{host >> 16}.{host >> 8 & 255}.{host & 255}",)
    machine = f"{host:032x} net:[4026531840]"
    ports = (20000 + rank % 40000, 20001 + rank % 40000)
    token, process = os.urandom(16).hex(), 1000 + rank * 7
    return Card(rank, machine, machine, addresses, False, ports[0], token, process, 4026531836, ports[1])


def real(size: int, repeats: int) -> Row:
    """`repeats` starts of each backend with `size` processes, after a cold one, and one that is counted."""
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    plan = [(backend, False) for _ in range(repeats + 1) for backend in BACKENDS] + [(name, True) for name in BACKENDS]
    for rank in range(size):
        mine, theirs = context.Pipe()
        pipes.append(mine)
        processes.append(context.Process(target=_rank, args=(rank, size, plan, theirs), daemon=True))
    try:
        for process in processes:
            process.start()
        # After they have been forked: the server has threads, and a fork may find one of them holding a lock.
        server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for pipe in pipes:
            pipe.send(server.port)
        rounds = [[_answer(pipe, rank) for rank, pipe in enumerate(pipes)] for _ in plan]
    finally:
        for process in processes:
            process.kill()
            process.join()
    row: Row = {"ranks": size}
    for backend in BACKENDS:
        seconds = [max(one[0] for one in got) for got, (name, _) in zip(rounds, plan) if name == backend]
        counted = next(got for got, step in zip(rounds, plan) if step == (backend, True))
        row[backend] = {
            "cold_s": seconds[0],
            "median_s": statistics.median(seconds[1 : repeats + 1]),
            "fastest_s": min(seconds[1 : repeats + 1]),
            "messages_per_rank": statistics.median(one[1] for one in counted),
            "most_messages": max(one[1] for one in counted),
            "bytes_per_rank": statistics.median(one[2] for one in counted),
        }
    row["ratio"] = row["ncclx"]["median_s"] / row["gloo"]["median_s"]
    return row


def _answer(pipe: Connection, rank: int) -> tuple[float, int, int]:
    if not pipe.poll(DEADLINE.total_seconds()):
        raise TimeoutError(f"rank {rank} did not start within {DEADLINE.total_seconds():g} s.")
    got = pipe.recv()
    if isinstance(got, str):
        raise RuntimeError(f"rank {rank}: {got}")
    seconds, messages, moved = got
    return seconds, messages, moved


def _rank(rank: int, size: int, plan: Sequence[tuple[str, bool]], pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        client = dist.TCPStore("127.0.0.1", pipe.recv(), is_master=False, timeout=DEADLINE)
        for number, (backend, counted) in enumerate(plan):
            store: Any = dist.PrefixStore(f"round-{number}", client)
            if counted:
                store = CountingStore(store)
            _meet(client, f"ready-{number}", size)
            began = time.perf_counter()
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=DEADLINE)
            total = torch.ones(1)
            dist.all_reduce(total)
            seconds = time.perf_counter() - began
            if total.item() != size:
                raise RuntimeError(f"the first all-reduce of {backend} gave {total.item()}, not {size}")
            pipe.send((seconds, store.messages, store.sent + store.received) if counted else (seconds, 0, 0))
            _meet(client, f"done-{number}", size)  # no rank leaves while another still starts
            dist.destroy_process_group()
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
    pipe.poll(DEADLINE.total_seconds())  # until the parent is through with all of us


def _meet(store: Any, name: str, size: int) -> None:
    if store.add(name, 1) == size:
        store.set(f"{name}-all", "")
    store.wait([f"{name}-all"], DEADLINE)


def _table(result: Row) -> str:
    lines = []
    if result["real"]:
        lines.append(
            f"{'ranks':>6} {'ncclx':>10} {'gloo':>10} {'ratio':>6}   requests to the store per rank: ncclx, gloo"
        )
        for row in result["real"]:
            ours, theirs = row["ncclx"], row["gloo"]
            lines.append(
                f"{row['ranks']:>6} {1e3 * ours['median_s']:>7.1f} ms {1e3 * theirs['median_s']:>7.1f} ms {row['ratio']:>6.2f}   "
                f"{ours['messages_per_rank']:g}, {theirs['messages_per_rank']:g}"
            )
    if result["fake"]:
        lines.append(
            f"{'fake':>6} {'seconds':>10} {'requests':>9} {'bytes':>10}  per rank; bytes if each read all cards"
        )
        for row in result["fake"]:
            lines.append(
                f"{row['ranks']:>6} {row['seconds']:>10.3f} {row['messages_per_rank']:>9} {row['bytes_per_rank']:>10}"
                f"  {row['bytes_if_each_read_all']}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ncclx_py.bench.startup", description=__doc__)
    parser.add_argument("--ranks", default="2,4,8,16,32", metavar="N,…", help="real ranks; empty: none")
    parser.add_argument("--repeats", type=int, default=7, help="starts of each backend (default 7)")
    parser.add_argument("--fake", default="64,256,1024,4096", metavar="N,…", help="fake ranks; empty: none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        sizes, fakes = _sizes("--ranks", options.ranks, 2), _sizes("--fake", options.fake, 1)
        if options.repeats < 1:
            raise ValueError(f"--repeats {options.repeats}: at least one.")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result: Row = {"cpus": os.cpu_count(), "repeats": options.repeats, "real": [], "fake": []}
    for size in sizes:  # before any thread is started: they are forked
        print(f"… {size} real ranks", file=sys.stderr, flush=True)
        result["real"].append(real(size, options.repeats))
    for size in fakes:
        print(f"… {size} fake ranks", file=sys.stderr, flush=True)
        result["fake"].append(fake(size))
    print(json.dumps(result, indent=2) if options.json else _table(result))
    return 0


def _sizes(option: str, text: str, least: int) -> list[int]:
    try:
        sizes = [int(part) for part in _parts(text)]
    except ValueError:
        raise ValueError(f"{option} {text}: give whole numbers, as in 2,4,8.") from None
    if any(size < least for size in sizes):
        raise ValueError(f"{option} {text}: at least {least}.")
    return sizes


def _parts(text: str) -> Iterable[str]:
    return (part for part in text.split(",") if part.strip())


if __name__ == "__main__":
    sys.exit(main())

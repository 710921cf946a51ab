"""Brings the facts of all ranks to rank 0, over torch's store; no process group and no collective is needed.

    store = connect(where, master=launch.rank == 0, until=…)      # raises StoreError, which says why
    gathered = collect_all(store, facts, size, until, now)        # on rank 0
    told = hand_in(store, facts, rank, until, now)                # on the others: what rank 0 answered

Everything that waits has `until`, a time of ``time.monotonic()``. What is sent is JSON of at most `LARGEST` bytes.

Clocks: rank 0 asks the first rank of each host for its time, several times, and takes the quickest answer. That clock was
read between the question and the answer, so it is ahead by (its time − the middle), give or take half the round trip.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from ncclx_py.doctor.job import Clock
from ncclx_py.doctor.machine import within
from ncclx_py.environment import Launch

LARGEST = 256 * 1024
ROUNDS = 4  # questions per clock
_PORT = 29500
_PATIENCE = 2.0  # seconds for a rank that has answered before to tell its time, or that it has read the end
_RETRY = 0.2
_CHUNK = 256  # keys asked for at once
_SHARE_OF_FACTS, _SHARE_OF_CLOCKS = 0.5, 0.6  # of the time left on rank 0

Now = Callable[[], float]


class StoreError(RuntimeError):
    """The ranks cannot meet; the message says where and why."""


@dataclass
class Gathered:
    facts: dict[int, dict[str, Any]]
    silent: dict[int, str] = field(default_factory=dict)
    clocks: dict[int, Clock] = field(default_factory=dict)
    round_trip: float | None = None


def meeting_point(launch: Launch, env: Mapping[str, str]) -> tuple[str, int]:
    """Where the store is or is to be: the master's address and port; under SLURM, where nobody has set these, the
    first host of the step and a port made from the job's number. Raises ValueError where nothing names a host, or the
    port is none."""
    host = env.get("MASTER_ADDR") or next(iter(launch.host_names), launch.master)
    if not host:
        raise ValueError(
            "MASTER_ADDR is not set: start through torchrun, srun or ncclx launch, or give --store HOST:PORT."
        )
    job = env.get("SLURM_JOB_ID", "")
    text = env.get("MASTER_PORT") or str(20000 + int(job) % 10000 if job.isdigit() else _PORT)
    return host, port_number(text, "MASTER_PORT")


def port_number(text: str, what: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ValueError(f"{what}={text!r} is not a port: give a number from 1 to 65535.")
    return int(text)


def connect(where: tuple[str, int], master: bool, until: float, env: Mapping[str, str]) -> Any:
    """The store, which rank 0 (`master`) holds unless torchrun does. Raises StoreError."""
    import torch.distributed as dist

    host, port = where
    serves = master and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if serves:
        _resolve(host, port, until)
    else:
        _reach(host, port, until)
    seconds = max(1.0, until - time.monotonic())

    def make() -> Any:  # gives up before it is left behind: a thread inside torch disturbs the end of the process
        return dist.TCPStore(host, port, None, serves, timedelta(seconds=0.9 * seconds), wait_for_workers=False)

    found, errors = within(seconds, {"store": make})
    if errors:
        who = "Rank 0 cannot open the store" if serves else "The store does not answer"
        raise StoreError(f"{who} at {host}:{port}: {_first_line(errors['store'])}")
    restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"ncclx-doctor/{restart}", found["store"])


def left_behind() -> bool:
    """Whether a thread still waits inside torch for a store: the end of the process would abort it, and with it the process."""
    return any(thread.name == "doctor store" for thread in threading.enumerate())


def _resolve(host: str, port: int, until: float) -> None:
    """A name that leads nowhere is known at once; torch would ask for it again until its time is over. Raises StoreError."""
    _, errors = within(max(until - time.monotonic(), 0.1), {"name": lambda: socket.getaddrinfo(host, port)})
    if errors:
        raise StoreError(f"Rank 0 cannot open the store at {host}:{port}: {_first_line(errors['name'])}")


def _reach(host: str, port: int, until: float) -> None:
    """Waits until something listens there: the system's own reason is better than the store's. Raises StoreError."""
    while True:
        left = until - time.monotonic()

        def attempt(seconds: float = min(max(left, 0.1), 5.0)) -> None:
            socket.create_connection((host, port), seconds).close()

        _, errors = within(max(left, 0.1), {"connect": attempt})  # a name server may hang as well
        if not errors:
            return
        if time.monotonic() + _RETRY > until:
            reason = _first_line(errors["connect"])
            raise StoreError(f"The store at {host}:{port} (MASTER_ADDR and MASTER_PORT) cannot be reached: {reason}")
        time.sleep(_RETRY)


def collect_all(store: Any, facts: dict[str, Any], size: int, until: float, now: Now = time.time) -> Gathered:
    """On rank 0: the facts of all ranks that hand them in, who is silent, and the clocks of the other hosts."""
    start = time.monotonic()
    left = until - start
    gathered = Gathered({0: facts})
    _read_facts(store, gathered, range(1, size), start + _SHARE_OF_FACTS * left)
    _compare_clocks(store, gathered, start + _SHARE_OF_CLOCKS * left, now)
    return gathered


def finish(store: Any, gathered: Gathered, verdict: str, until: float) -> None:
    """On rank 0, last: tells the others that they may go, and waits a little until they have heard it."""
    store.set("end", json.dumps({"verdict": verdict, "silent": sorted(gathered.silent)[:_CHUNK]}))
    until = min(until, time.monotonic() + _PATIENCE)
    while store.add("heard", 0) < len(gathered.facts) - 1 and time.monotonic() < until:
        time.sleep(0.01)


def hand_in(store: Any, facts: dict[str, Any], until: float, now: Now = time.time) -> dict[str, Any]:
    """On the other ranks: gives the facts away, tells the time when asked, and returns what rank 0 says at the end.

    Raises StoreError when rank 0 does not say it in time."""
    rank = facts["rank"]
    try:
        store.set(f"facts/{rank}", _packed(facts))
        if facts["local_rank"] == 0:
            _tell_time(store, rank, until, now)
        _wait(store, ["end"], until)
        told: dict[str, Any] = json.loads(store.get("end"))
        store.add("heard", 1)
    except (RuntimeError, ValueError) as error:
        raise StoreError(
            f"Rank {rank} handed in its facts, but rank 0 did not answer: {_first_line(str(error))}"
        ) from error
    return told


def _packed(facts: dict[str, Any]) -> str:
    text = json.dumps(facts)
    if len(text) <= LARGEST:
        return text
    kept = {name: facts[name] for name in ("format", "rank", "local_rank", "size", "host", "machine")}
    return json.dumps({**kept, "errors": {"facts": f"{len(text)} bytes are more than the {LARGEST} that are sent"}})


def _read_facts(store: Any, gathered: Gathered, ranks: range, until: float) -> None:
    for first in range(ranks.start, ranks.stop, _CHUNK):
        chunk = range(first, min(first + _CHUNK, ranks.stop))
        with contextlib.suppress(RuntimeError):  # some are missing: below it is seen which
            if time.monotonic() < until:
                _wait(store, [f"facts/{rank}" for rank in chunk], until)
        for rank in chunk:
            if not store.check([f"facts/{rank}"]):
                gathered.silent[rank] = "it did not reach the store in time"
                continue
            try:
                gathered.facts[rank] = unpacked(store.get(f"facts/{rank}"), rank)
            except ValueError as error:
                gathered.silent[rank] = str(error)


def unpacked(text: bytes, rank: int) -> dict[str, Any]:
    """What a rank handed in. Raises ValueError where that is not what a rank hands in."""
    if len(text) > LARGEST:
        raise ValueError(f"it handed in {len(text)} bytes, more than the {LARGEST} that are read")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("what it handed in is no JSON") from error
    if not isinstance(facts, dict) or facts.get("rank") != rank or not {"host", "machine", "format"} <= facts.keys():
        raise ValueError("what it handed in are not the facts of that rank: two jobs may share a store")
    return facts


def _compare_clocks(store: Any, gathered: Gathered, until: float, now: Now) -> None:
    own = gathered.facts[0]["machine"]
    first_of: dict[str, int] = {}
    for rank, facts in sorted(gathered.facts.items()):
        if rank and facts.get("local_rank") == 0:
            first_of.setdefault(facts["machine"], rank)
    for rank, facts in gathered.facts.items():
        if rank == 0 or facts.get("local_rank") != 0:
            continue
        best, asked = None, 0
        if facts["machine"] != own and first_of[facts["machine"]] == rank:
            best, asked = _ask_time(store, rank, until, now)
        store.set(f"ask/{rank}/{asked}", "no more")
        if best is not None:
            gathered.clocks[rank] = best
    started = time.monotonic()
    store.check(["round trip"])
    gathered.round_trip = time.monotonic() - started


def _ask_time(store: Any, rank: int, until: float, now: Now) -> tuple[Clock | None, int]:
    """The clock, None where the rank does not answer or there is no time left; and how many questions were asked."""
    best, count = None, 0
    for question in range(ROUNDS):
        if time.monotonic() > until:
            break
        asked = now()
        store.set(f"ask/{rank}/{question}", "time")
        count += 1
        try:
            _wait(store, [f"time/{rank}/{question}"], min(until, time.monotonic() + _PATIENCE))
        except RuntimeError:
            break
        answered = now()
        theirs = float(store.get(f"time/{rank}/{question}"))
        clock = Clock(theirs - (asked + answered) / 2, (answered - asked) / 2)
        if best is None or clock.uncertainty < best.uncertainty:
            best = clock
    return best, count


def _tell_time(store: Any, rank: int, until: float, now: Now) -> None:
    """Answers rank 0's questions until it asks no more."""
    for question in range(ROUNDS):
        _wait(store, [f"ask/{rank}/{question}"], until)
        theirs = now()
        if store.get(f"ask/{rank}/{question}") != b"time":
            return
        store.set(f"time/{rank}/{question}", repr(theirs))


def _wait(store: Any, keys: list[str], until: float) -> None:
    """Raises RuntimeError (torch's) when a key is not there in time."""
    store.wait(keys, timedelta(seconds=max(0.05, until - time.monotonic())))


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:300]

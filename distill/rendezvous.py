"""Where the ranks of a job find each other, before they have a process group.

    store, rank, size = meet(timeout_s)        # from the launcher's variables; all ranks are there when it returns

torch's own rendezvous ends in a traceback and a number where a rank does not come; here the ranks that are missing are named.
A rank costs the store four requests, however many there are.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from distill.errors import ConfigError, MeetingError

LISTED = 10  # ranks that a message names


# The store of each address, kept for the next run of this process: were rank 0 to close it between two runs, a rank that is early
# for the second would still meet the first.
_stores: dict[tuple[str, int], dist.Store] = {}
# How many meetings this process has had at each address: the next one must not find their keys.
_meetings: Counter[tuple[str, int]] = Counter()


def meet(timeout_s: float) -> tuple[dist.Store, int, int]:
    """A store of this meeting, this rank, and the number of ranks. All ranks of a job call it equally often.

    Raises ConfigError for variables that describe no job, and MeetingError, which names the ranks that did not come in time.
    """
    rank, size, port = (_number(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    host = os.environ.get("MASTER_ADDR", "")
    if not (host and rank < size and 0 < port < 65536):
        raise _not_told(
            f"RANK={rank}, WORLD_SIZE={size}, MASTER_ADDR={host!r}, MASTER_PORT={port} describe no rank of a job; start it "
            "through torchrun or `ncclx launch`, or unset WORLD_SIZE for a process alone"
        )
    until = time.monotonic() + timeout_s
    store = _stores.pop((host, port), None) or _open(host, port, rank, size, timeout_s)
    _meetings[host, port] += 1
    here = f"distill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_meetings[host, port]}"
    met = dist.PrefixStore(here, store)
    _call_roll(met, rank, size, until, timeout_s)
    _stores[host, port] = store
    return met, rank, size


@contextmanager
def connecting(rank: int) -> Iterator[None]:
    """What goes wrong while the ranks that have met connect to each other, as a MeetingError."""
    try:
        yield
    except RuntimeError as error:
        raise MeetingError(f"rank {rank} could not connect to the others: {_first_line(error)}") from error


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise _not_told(f"{name}={text!r} is no number; start the job through torchrun or `ncclx launch`")
    return int(text)


def _not_told(text: str) -> ConfigError:
    error = ConfigError(text)
    error.on_every_rank = False  # each rank has variables of its own
    return error


def _open(host: str, port: int, rank: int, size: int, timeout_s: float) -> dist.Store:
    """The store of torchrun, or one that rank 0 keeps."""
    torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    keeps = rank == 0 and not torchrun
    timeout = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(host, port, size, keeps, timeout, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        if keeps:
            raise MeetingError(
                f"rank 0 cannot listen on port {port} for the {size} ranks of this job ({_first_line(error)}); set another "
                "MASTER_PORT, or end the process that has it"
            ) from error
        who = "torchrun" if torchrun else "rank 0"
        raise MeetingError(
            f"rank {rank} of {size} could not reach {who} at {host}:{port} within {timeout_s:g} s (comm.timeout_s); see the log of "
            f"{who}, and whether this host can reach that address"
        ) from error


def _call_roll(store: dist.Store, rank: int, size: int, until: float, timeout_s: float) -> None:
    """Returns when every rank has come."""
    try:
        store.set(f"here/{rank}", "")
        if store.add("here/count", 1) == size:
            store.set("here/all", "")
        store.wait(["here/all"], timedelta(seconds=max(0.05, until - time.monotonic())))
    except dist.DistError as error:
        raise MeetingError(_who_is_missing(store, rank, size, timeout_s)) from error


def _who_is_missing(store: dist.Store, rank: int, size: int, timeout_s: float) -> str:
    try:
        missing = [other for other in range(size) if not store.check([f"here/{other}"])]
    except dist.DistError:
        return f"rank {rank} of {size} waited for the others, and rank 0 or the launcher, which keeps the job's store, has left"
    names = ", ".join(map(str, missing[:LISTED])) + (f" and {len(missing) - LISTED} more" if missing[LISTED:] else "")
    return (
        f"rank {rank} of {size} waited {timeout_s:g} s (comm.timeout_s) for {'rank' if len(missing) == 1 else 'ranks'} {names}, "
        "which did not come; see the logs there: a rank may have failed before it met the others, or not have been started"
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(" .")

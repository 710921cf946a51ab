"""Writes what a process knows of its collectives to a folder: two files per rank, each in place at once or not at all.

    write(Path("trace"), snapshot("timeout", "all_reduce …"))

``trace-rank-<R>.jsonl`` is what ``ncclx diagnose`` reads: a header, one line per call (oldest first), and a last line that
tells a whole file from a truncated one. ``nccl_trace_rank_<R>`` is a pickle of plain data in the schema of torch's Flight
Recorder, for ``python -m torch.distributed.flight_recorder.fr_trace <folder> -p nccl_trace_rank_``; we never read it.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ncclx_py.watch.flight import flight_dump
from ncclx_py.watch.record import Progress, line_of
from ncclx_py.watch.trace import TRACE, GroupFacts

FORMAT, VERSION = "ncclx-trace", 1
OWN_THREADS = ("ncclx-watcher", "ncclx-dump")
_DEEPEST = 40  # frames per thread


@dataclass
class Snapshot:
    """What goes into the files: a header, the lines, and the Flight Recorder's dump."""

    rank: int
    header: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    flight: dict[str, Any] = field(default_factory=dict)


def snapshot(reason: str, detail: str, also: str = "") -> Snapshot:
    """The trace as it is now. `reason` is one of timeout, signal, peer, exit, demand, error; `also` says why it is written
    again after that."""
    groups = list(TRACE.groups.values())
    running = _running(groups)
    calls = TRACE.calls()
    dropped = TRACE.ring.dropped if TRACE.ring is not None else 0
    header: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "rank": TRACE.rank,
        "world_size": TRACE.world_size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "reason": reason,
        "detail": detail,
        "also": also,
        "time_ns": time.time_ns(),
        "monotonic_ns": time.monotonic_ns(),
        "dropped": dropped,
        "groups": {one.name: {"ranks": list(one.ranks), "desc": one.desc, "size": len(one.ranks)} for one in groups},
        "aborts": {one.name: one.reason for one in groups if one.reason},
        "peers": _peers(groups),
        "links": _links(groups),
        "threads": _threads(),
        "step": TRACE.step,
    }
    flight = flight_dump(TRACE.rank, {one.name: (one.desc, one.ranks) for one in groups}, calls, dropped)
    return Snapshot(TRACE.rank, header, [line_of(call, running.get(id(call))) for call in calls], flight)


def write(folder: Path, taken: Snapshot) -> Path:
    """Writes both files and returns the path of ours. Raises OSError, and leaves no part of a file behind."""
    folder.mkdir(parents=True, exist_ok=True)
    end = {"end": True, "records": len(taken.lines)}
    text = "".join(json.dumps(line) + "\n" for line in (taken.header, *taken.lines, end))
    ours = folder / f"trace-rank-{taken.rank}.jsonl"
    _replace(ours, text.encode())
    _replace(folder / f"nccl_trace_rank_{taken.rank}", pickle.dumps(taken.flight, protocol=4))
    return ours


def _replace(path: Path, content: bytes) -> None:
    """Not by the name of the file alone: threads of one process may write at the same time. The dot keeps the Flight
    Recorder, which takes every file with its prefix in the name, from one that is not whole."""
    temporary = path.with_name(f".{path.name[:5]}-{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _running(groups: list[GroupFacts]) -> dict[int, Progress]:
    """How far the calls are that run as plans right now, by their identity."""
    found: dict[int, Progress] = {}
    for facts in groups:
        group = facts.group()
        if group is not None:
            found.update({id(call): progress for call, progress in group.running() if progress is not None})
    return found


def _peers(groups: list[GroupFacts]) -> dict[str, str]:
    found: dict[int, str] = {}
    for facts in groups:
        group = facts.group()
        if group is not None:
            found.update(group.peers())
    return {str(rank): state for rank, state in sorted(found.items())}


def _links(groups: list[GroupFacts]) -> list[dict[str, int]]:
    living = [group for facts in groups if (group := facts.group()) is not None]
    return [link for group in living for link in group.links()]


def _threads() -> dict[str, list[str]]:
    """The stack of every thread but our own, outermost frame first, by the thread's name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks: dict[str, list[str]] = {}
    for ident, frame in sys._current_frames().items():
        name = names.get(ident, f"thread {ident}")
        if name in OWN_THREADS:
            continue
        while name in stacks:
            name += "'"
        stacks[name] = list(_frames(frame))[:_DEEPEST][::-1]
    return stacks


def _frames(frame: FrameType | None) -> Iterator[str]:
    while frame is not None:
        yield f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back

"""A verdict on a job that still runs: asks every rank for a dump, waits a little, and judges what came.

    job = read_live(Path("outputs/run/trace"), wait_s=5.0)

A rank that stays silent is judged by what its peers know of it and, where its earlier dump says that its process is on this
host, by the state of that process. Clocks of hosts are not compared: a dump is fresh when its file is newer than the
request's in the folder.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ncclx_py.watch import requests
from ncclx_py.watch.model import Job, RankTrace
from ncclx_py.watch.parsing import read_header
from ncclx_py.watch.reading import dump_files, read_job

_LOOK = 0.1  # seconds between two looks at the folder
_LAST_WORDS = ("timeout", "peer", "error", "exit")  # reasons of dumps that a process may leave behind

Note = Callable[[str], None]


def read_live(folder: Path, wait_s: float = 5.0, note: Note = lambda text: None) -> Job:
    """Returns as soon as all ranks have answered, or after `wait_s`. `note` is told what is waited for.

    Raises ValueError when nobody answered, or the folder cannot be written. The folder need not be there: ranks that have
    written no dump yet have not made it, and look for a request in it all the same.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        requests.ask(folder, "ncclx diagnose --live", automatic=False)
    except OSError as error:
        raise ValueError(f"{folder}: the request cannot be written: {error.strerror or error}.") from error
    asked = requests.last(folder)
    note(f"asked the ranks for dumps in {folder}; waiting up to {wait_s:g} s")
    fresh = _gather(folder, asked, wait_s)
    if not fresh:
        known = "that folder" if not missing else "that folder, which was not there"
        _withdraw(folder, missing)
        raise ValueError(
            f"{folder}: no rank wrote a dump within {wait_s:g} s. Does the job run, with NCCLX_TRACE_DIR naming {known}? Without "
            "that variable a job listens to nobody. If all its ranks are stopped or swapping, wait longer (--wait)."
        )
    job = read_job(folder)
    return _without_stale(job, fresh)


def _withdraw(folder: Path, made: list[Path]) -> None:
    """Takes a request back that made its folders, those in `made`, and that nobody has answered."""
    with contextlib.suppress(OSError):
        if made:
            (folder / requests.NAME).unlink()
        for path in made:
            path.rmdir()


def _gather(folder: Path, asked: int, wait_s: float) -> set[int]:
    """The ranks with a dump that is newer than `asked`; waits for those that are known to exist."""
    until = time.monotonic() + wait_s
    fresh: set[int] = set()
    size = 0
    while True:
        for rank, path in dump_files(folder).items():
            if rank not in fresh and _newer(path, asked):
                fresh.add(rank)
                size = size or _world_size(path)
        if time.monotonic() > until or (size and len(fresh) >= size):
            return fresh
        time.sleep(_LOOK)


def _newer(path: Path, asked: int) -> bool:
    try:
        return path.stat().st_mtime_ns >= asked
    except OSError:
        return False


def _world_size(path: Path) -> int:
    trace = read_header(path)
    return trace.world_size if trace is not None else 0


def _without_stale(job: Job, fresh: set[int]) -> Job:
    """Leaves out dumps that say nothing of now: those of ranks that did not answer, unless they are their last words."""
    kept: dict[int, RankTrace] = {}
    seen: dict[int, str] = {}
    for rank, trace in job.ranks.items():
        state = "" if rank in fresh else process_state(trace)
        if rank in fresh or (state == "gone" and trace.reason in _LAST_WORDS):
            kept[rank] = trace
        elif state:
            seen[rank] = state
    return replace(job, ranks=kept, seen=seen)


def process_state(trace: RankTrace) -> str:
    """alive, stopped or gone for a process on this host; "" for one elsewhere."""
    if trace.host != socket.gethostname() or not trace.pid:
        return ""
    try:
        text = Path(f"/proc/{trace.pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "gone" if os.path.isdir("/proc/self") else ""
    state = text.rpartition(")")[2].split()[:1]
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(state[0] if state else "", "alive")

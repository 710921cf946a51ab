"""Dumps of a folder as one trace for Perfetto (ui.perfetto.dev) or ``chrome://tracing``.

A process row per rank, in it a thread row per group; a slice per call, from when it began to when it ended. What had not
ended goes on to the moment of the dump. Times are those of the ranks' own clocks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ncclx_py.watch.reading import dump_files

_SHOWN = ("seq", "state", "algorithm", "reason", "bytes", "dtype", "input_sizes", "output_sizes", "root", "peer")
_ALSO = ("reduce_op", "plan_step", "waiting_for", "call_site", "error")


def export(folder: Path, out: Path) -> None:
    """Writes the trace of all dumps in `folder` to `out`. Lines that cannot be used are left out.

    Raises ValueError where there is no dump with a header, or the folder cannot be read, OSError where `out` cannot be
    written.
    """
    events = [event for rank, path in dump_files(folder).items() for event in _events(rank, path)]
    if not events:
        raise ValueError(f"{folder}: no dump (trace-rank-<rank>.jsonl) in it can be used.")
    start = min(event["ts"] for event in events if "ts" in event)
    for event in events:
        if "ts" in event:
            event["ts"] = (event["ts"] - start) / 1000
    temporary = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _events(rank: int, path: Path) -> Iterator[dict[str, Any]]:
    """Those of one rank, with `ts` in ns since the epoch; nothing where the file has no header."""
    with path.open(encoding="utf-8", errors="replace") as file:
        header = _object(next(file, ""))
        if not isinstance(header.get("time_ns"), int):
            return
        yield _name("process_name", rank, 0, f"rank {rank} ({header.get('host', '?')}): {header.get('reason', '?')}")
        yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
        yield {
            "ph": "i",
            "s": "p",
            "name": f"dump: {header.get('reason')}",
            "pid": rank,
            "tid": 0,
            "ts": header["time_ns"],
            "args": {"detail": header.get("detail")},
        }
        threads: dict[str, int] = {}
        for line in file:
            record = _object(line)
            group = str(record.get("group"))
            times = [record.get(name) for name in ("scheduled_ns", "started_ns", "finished_ns")]
            if "op" not in record or not all(isinstance(time, int) for time in times):
                continue
            if group not in threads:
                threads[group] = len(threads) + 1
                yield _name("thread_name", rank, threads[group], _describe(group, header))
            yield from _slices(record, times, header["time_ns"], rank, threads[group])


def _slices(record: dict[str, Any], times: list[Any], now: int, rank: int, thread: int) -> Iterator[dict[str, Any]]:
    scheduled, started, finished = times
    begin, end = started or scheduled, finished or now
    yield {
        "ph": "X",
        "name": f"{record['op']} {record.get('seq', '')}",
        "cat": str(record.get("state")),
        "pid": rank,
        "tid": thread,
        "ts": begin,
        "dur": max(0, end - begin) / 1000,
        "args": {name: record.get(name) for name in (*_SHOWN, *_ALSO)} | {"waited_us": (begin - scheduled) / 1000},
    }


def _name(kind: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": rank, "tid": thread, "args": {"name": name}}


def _describe(group: str, header: dict[str, Any]) -> str:
    groups = header.get("groups")
    facts = groups.get(group) if isinstance(groups, dict) else None
    desc = facts.get("desc") if isinstance(facts, dict) else None
    return f"group {group} ({desc})" if desc and desc != "undefined" else f"group {group}"


def _object(line: str) -> dict[str, Any]:
    """The object in a line; empty where there is none."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}

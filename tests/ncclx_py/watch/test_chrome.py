"""Dumps as a trace for Perfetto: rows, slices, times; whole or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ncclx_py.watch.chrome import export

pytestmark = pytest.mark.unit

NOW = 1_700_000_000_000_000_000


def line(op: str, seq: int, times: tuple[int, int, int], **more: Any) -> str:
    names = ("scheduled_ns", "started_ns", "finished_ns")
    absolute = {name: NOW + time if time else 0 for name, time in zip(names, times)}
    return json.dumps({"seq": seq, "group": "0", "op": op, "state": "completed", **absolute, **more}) + "\n"


def header(rank: int, **more: Any) -> str:
    groups = {"0": {"ranks": [0, 1], "desc": "default_pg", "size": 2}}
    return (
        json.dumps({"rank": rank, "host": "h", "reason": "timeout", "time_ns": NOW + 9000, "groups": groups, **more})
        + "\n"
    )


def test_rows_slices_and_times(tmp_path: Path) -> None:
    (tmp_path / "trace-rank-0.jsonl").write_text(
        header(0)
        + line("all_reduce", 1, (1000, 2000, 5000))
        + "{broken\n"
        + line("barrier", 2, (6000, 0, 0), state="scheduled")
        + line("send", 1, (7000, 7500, 8000), group="1")
    )
    (tmp_path / "trace-rank-1.jsonl").write_text(header(1) + line("all_reduce", 1, (1500, 1500, 5000))[:-40])
    (tmp_path / "trace-rank-2.jsonl").write_text("not a dump\n")
    export(tmp_path, tmp_path / "out.json")
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    slices = [
        (event["pid"], event["tid"], event["name"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"
    ]
    # µs from the first event, which is the begin of the all_reduce at 2000 ns
    assert slices == [(0, 1, "all_reduce 1", 0.0, 3.0), (0, 1, "barrier 2", 4.0, 3.0), (0, 2, "send 1", 5.5, 0.5)]
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"][-4:] == "name"
    }
    assert names == {
        ("process_name", 0, 0): "rank 0 (h): timeout",
        ("thread_name", 0, 1): "group 0 (default_pg)",
        ("thread_name", 0, 2): "group 1",
        ("process_name", 1, 0): "rank 1 (h): timeout",
    }
    assert not list(tmp_path.glob(".*"))


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no dump"):
        export(tmp_path, tmp_path / "out.json")
    (tmp_path / "trace-rank-0.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match="can be used"):
        export(tmp_path, tmp_path / "out.json")

"""Dumps that are missing, cut off, damaged or hostile: a complaint with file and line, and the rest is used."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from synthetic import Call, Cluster, End, Job, Step

from ncclx_py.watch import parsing
from ncclx_py.watch.model import CONNECTING
from ncclx_py.watch.parsing import elements
from ncclx_py.watch.reading import read_job
from ncclx_py.watch.verdict import judge

pytestmark = pytest.mark.unit


def stuck(folder: Path) -> None:
    """Rank 2 of 4 does not come to the tenth collective."""
    cluster = Cluster(2, 2, {"world": [0, 1, 2, 3]})
    body: list[Step] = [Call("world", elements=100 + 7 * (place % 3)) for place in range(10)]
    job = Job(cluster, [body if rank != 2 else [*body[:9], End("outside")] for rank in range(4)])
    job.dump(folder, job.run() + 30, "timeout", failing=True)


def edited(path: Path, line: int, **changes: Any) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps({**json.loads(lines[line - 1]), **changes})
    path.write_text("\n".join(lines) + "\n")


def test_a_dump_that_is_cut_off_anywhere_costs_at_most_its_end(tmp_path: Path) -> None:
    stuck(tmp_path)
    path = tmp_path / "trace-rank-0.jsonl"
    whole = path.read_bytes()
    for end in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        path.write_bytes(whole[:end])
        job = read_job(tmp_path)
        assert any(text.startswith("trace-rank-0.jsonl: ") for text in job.complaints), end
        verdict = judge(job)
        assert (verdict.cause, verdict.ranks) in ((("outside"), [2]), ("outside", [0, 2])), (end, verdict)


def test_missing_dumps_leave_the_verdict_and_are_named(tmp_path: Path) -> None:
    stuck(tmp_path)
    (tmp_path / "trace-rank-3.jsonl").unlink()
    verdict = judge(read_job(tmp_path))
    assert (verdict.cause, verdict.ranks) == ("outside", [2])
    assert any("no dump of rank 3" in line for line in verdict.evidence)


HOSTILE: dict[str, bytes] = {
    "not json": b"{nonsense",
    "nested": b"[" * 200_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "list": b"[1, 2]",
    "number": b"7",
    "binary": bytes(range(256)).replace(b"\n", b""),
    "huge number": b'{"seq": ' + b"9" * 5000 + b', "group": "world", "op": "all_reduce", "state": "completed"}',
    "negative": b'{"seq": -4, "group": "world", "op": "all_reduce", "state": "completed"}',
    "fraction": b'{"seq": 1.5, "group": "world", "op": "all_reduce", "state": "completed"}',
    "text": b'{"seq": "1", "group": "world", "op": "all_reduce", "state": "completed"}',
    "strange group": b'{"seq": 1, "group": "elsewhere", "op": "all_reduce", "state": "completed"}',
    "list as group": b'{"seq": 1, "group": [], "op": "all_reduce", "state": "completed"}',
    "object as op": b'{"seq": 1, "group": "world", "op": {}, "state": "completed"}',
    "strange state": b'{"seq": 1, "group": "world", "op": "all_reduce", "state": "dreaming"}',
    "strange sizes": b'{"seq": 1, "group": "world", "op": "all_reduce", "state": "completed", "input_sizes": [["x"]]}',
    "waits for nobody known": b'{"seq": 1, "group": "world", "op": "all_reduce", "state": "started", "waiting_for": [99]}',
    "object as site": b'{"seq": 1, "group": "world", "op": "all_reduce", "state": "completed", "call_site": {"a": 1}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_line_that_cannot_be_used_is_named_and_left_out(name: str, tmp_path: Path) -> None:
    stuck(tmp_path)
    path = tmp_path / "trace-rank-1.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines.insert(3, HOSTILE[name])
    path.write_bytes(b"\n".join(lines))
    job = read_job(tmp_path)
    assert any(text.startswith("trace-rank-1.jsonl: line 4: ") for text in job.complaints), job.complaints
    verdict = judge(job)
    assert (verdict.cause, verdict.ranks) == ("outside", [2])
    assert any("line 4" in line for line in verdict.evidence)


HEADERS: dict[str, dict[str, Any]] = {
    "another format": {"format": "something else"},
    "a later version": {"version": 2},
    "a huge job": {"world_size": 10**15},
    "no such rank": {"rank": 7},
    "another rank": {"rank": 0},
    "a group of strangers": {"groups": {"world": {"ranks": [0, 1, 10**12]}}},
    "a group of twins": {"groups": {"world": {"ranks": [0, 0]}}},
    "a group of nothing": {"groups": {"world": 3}},
    "a list as host": {"host": []},
    "a fraction of time": {"time_ns": 1.5},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_cannot_be_true_costs_that_dump_only(name: str, tmp_path: Path) -> None:
    stuck(tmp_path)
    edited(tmp_path / "trace-rank-1.jsonl", 1, **HEADERS[name])
    job = read_job(tmp_path)
    assert list(job.ranks) == [0, 2, 3]
    assert any(text.startswith("trace-rank-1.jsonl: line 1: ") for text in job.complaints), job.complaints
    assert judge(job).ranks == [2]


def test_files_that_are_no_dumps_neither_block_nor_break(tmp_path: Path) -> None:
    stuck(tmp_path)
    os.mkfifo(tmp_path / "trace-rank-5.jsonl")
    (tmp_path / "trace-rank-6.jsonl").mkdir()
    (tmp_path / "trace-rank-7.jsonl").symlink_to("/dev/zero")
    (tmp_path / "trace-rank-8.jsonl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "trace-rank-9.jsonl").write_bytes(b"")
    (tmp_path / "trace-rank-x.jsonl").write_bytes(b"?")
    job = read_job(tmp_path)
    assert list(job.ranks) == [0, 1, 2, 3]
    assert len(job.complaints) == 5
    assert judge(job).ranks == [2]


def test_a_dump_of_another_job_is_left_out(tmp_path: Path) -> None:
    stuck(tmp_path)
    old = json.loads((tmp_path / "trace-rank-1.jsonl").read_text().splitlines()[0])
    old |= {"rank": 6, "world_size": 8, "time_ns": old["time_ns"] - 10**12, "groups": {}}
    (tmp_path / "trace-rank-6.jsonl").write_text(json.dumps(old) + '\n{"end": true, "records": 0}\n')
    job = read_job(tmp_path)
    assert job.world_size == 4
    assert list(job.ranks) == [0, 1, 2, 3]
    assert any("job of 8 ranks" in text for text in job.complaints)


def test_random_damage_never_ends_in_a_crash(tmp_path: Path) -> None:
    """Bytes are flipped, cut out and doubled, 600 times; the judge may err then, but ends, and quickly."""
    stuck(tmp_path)
    chance = random.Random(5)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    start = time.monotonic()
    for _ in range(600):
        path = chance.choice(list(files))
        data = bytearray(files[path])
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(data))
            how = chance.randrange(4)
            if how == 0:
                data[place] = chance.randrange(256)
            elif how == 1:
                del data[place : place + chance.randrange(40)]
            elif how == 2:
                data[place:place] = data[place : place + chance.randrange(400)]
            else:
                data[place:place] = chance.choice([b"9" * 30, b"null", b"-1", b"[]", b"{}", b'"', b"1e9", b"true"])
        path.write_bytes(bytes(data))
        try:
            judge(read_job(tmp_path)).to_json()
        finally:
            path.write_bytes(files[path])
    assert time.monotonic() - start < 120


def test_lines_read_by_their_shape_are_what_json_makes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way and the slow way give the same tables, also where texts hold what looks like a field."""
    stuck(tmp_path)
    path = tmp_path / "trace-rank-0.jsonl"
    lines = path.read_text().splitlines()
    tricky = json.loads(lines[2]) | {"call_site": 'a": 5, "seq": 77 "b', "reason": 'x\\": 6', "timeout_s": 12.5}
    lines[3:3] = [json.dumps(tricky | {"seq": seq, "bytes": seq * 10}) for seq in (2, 3, 2)]
    lines[3:3] = [json.dumps(tricky | {"extra": {"seq": seq, "deep": {"scheduled_ns": 4}}}) for seq in (2, 3, 2)]
    path.write_text("\n".join(lines))
    quick = parsing.parse(path)
    monkeypatch.setattr(parsing.Shapes, "add", lambda *_: False)
    slow = parsing.parse(path)
    assert quick.asked == slow.asked
    assert quick.sites == slow.sites
    assert quick.trace is not None
    assert slow.trace is not None
    for name, column in slow.trace.table.items():
        assert quick.trace.table[name].tolist() == column.tolist(), name


def test_many_dumps_are_read_by_several_processes_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck(tmp_path)
    alone = read_job(tmp_path)
    monkeypatch.setattr("ncclx_py.watch.reading._ENOUGH_FOR_HELP", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    helped = read_job(tmp_path)
    assert helped.asked == alone.asked
    for rank, trace in alone.ranks.items():
        for name, column in trace.table.items():
            assert helped.ranks[rank].table[name].tolist() == column.tolist()


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "expected"),
    [
        ("all_reduce", [[3, 4]], [[3, 4]], 12),
        ("reduce_scatter", [[8], [8]], [[8]], 16),
        ("all_gather_single", [[5]], [[20]], 20),
        ("all_gather", [[5]], [[5], [6], [7], [8]], 26),
        ("broadcast", [[2, 0]], [[2, 0]], 0),
        ("gather", [[9]], [], 9),
        ("scatter", [], [[9]], 9),
        ("all_to_all_single", [[8]], [[6]], -1),
        ("barrier", [], [], -1),
        ("send", [[4]], [], -1),
        (CONNECTING, [], [], -1),
    ],
)
def test_what_ranks_must_agree_on(op: str, inputs: list[list[int]], outputs: list[list[int]], expected: int) -> None:
    assert elements(op, inputs, outputs, 4) == expected

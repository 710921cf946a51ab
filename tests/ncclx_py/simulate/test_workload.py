"""Traces of a job replayed at another scale: groups scaled by hand, times against `predict`, and what is not predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ncclx_py.cli import main
from ncclx_py.plans.topology import Link, Topology
from ncclx_py.simulate.cluster import Cluster
from ncclx_py.simulate.predict import predict
from ncclx_py.simulate.workload import replay
from ncclx_py.watch.reading import read_job

pytestmark = pytest.mark.unit

GROUPS = {"world": [0, 1, 2, 3], "inside": [0, 1], "across": [0, 2]}
START = 1_700_000_000_000_000_000


def call(seq: int, op: str, size: int, group: str, algorithm: str = "ring", **more: Any) -> dict[str, Any]:
    times = {"scheduled_ns": START, "started_ns": START + 1000, "finished_ns": START + 2_001_000}
    return {
        "seq": seq, "group": group, "op": op, "state": "completed", "input_sizes": [[size // 4]], "dtype": "float32",
        "output_sizes": [[size // 4]], "bytes": size, "algorithm": algorithm, "call_site": "a.py:1 f", **times, **more,
    }  # fmt: skip


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Four ranks on two hosts."""
    for rank in range(4):
        mine = {name: {"ranks": ranks} for name, ranks in GROUPS.items() if rank in ranks}
        head = {"format": "ncclx-trace", "version": 1, "rank": rank, "world_size": 4, "host": f"h{rank // 2}", "pid": 1}
        head |= {"reason": "demand", "detail": "", "time_ns": START, "monotonic_ns": 1, "dropped": 0, "groups": mine}
        calls = [call(seq, "all_reduce", 1 << 20, "world") for seq in (1, 2)]
        calls += [
            call(3, "all_gather_single", 4096, "world", "nccl"),
            call(4, "barrier", 4, "world", "direct", dtype=""),
        ]
        calls += [call(5, "all_reduce", 1 << 20, "world", state="started", finished_ns=0)]
        calls += [call(1, "all_to_all_single", 65536, "inside", "pairwise")] if rank in GROUPS["inside"] else []
        calls += [call(1, "all_reduce", 8192, "across"), call(1, "send", 64, "across", peer=1)] * (rank in (0, 2))
        lines = [head, *calls, {"end": True, "records": len(calls)}]
        (tmp_path / f"trace-rank-{rank}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def cluster(hosts: int, per_host: int) -> Cluster:
    host_of = tuple(rank // per_host for rank in range(hosts * per_host))
    return Cluster(Topology(host_of, 1, Link(1e-6, 10e9), Link(10e-6, 1e9)))


def test_each_call_is_predicted_in_its_group_at_the_new_scale(traces: Path) -> None:
    there = cluster(8, 4)
    rows, left_out = replay(read_job(traces), there)
    by_kind = {(row.op, row.bytes): row for row in rows}
    assert {key: (row.calls, row.recorded_ranks, row.ranks) for key, row in by_kind.items()} == {
        ("all_reduce", 1 << 20): (3, 4, 32),  # the world stays the world
        ("all_gather_single", 4 * 4096): (1, 4, 32),  # a library's trace has the part of one rank
        ("barrier", 4): (1, 4, 32),
        ("all_to_all_single", 65536): (1, 2, 2),  # stays inside a host
        ("all_reduce", 8192): (1, 2, 8),  # one rank of each of two hosts: one of each of eight
    }
    assert left_out == {"send": 1}
    world = by_kind["all_reduce", 1 << 20]
    assert world.recorded_s == pytest.approx(2 * 2e-3)  # the third had not ended
    assert world.predicted_s == pytest.approx(3 * predict("all_reduce", there, 1 << 20).seconds)
    inside = Cluster(there.topology.subset((0, 1)))
    assert by_kind["all_to_all_single", 65536].predicted_s == predict("all_to_all", inside, 65536).seconds
    rail = Cluster(there.topology.subset(range(0, 32, 4)))
    assert by_kind["all_reduce", 8192].predicted_s == predict("all_reduce", rail, 8192).seconds
    assert [row.predicted_s for row in rows] == sorted((row.predicted_s for row in rows), reverse=True)


def test_one_rank_has_nothing_to_send(traces: Path) -> None:
    rows, _ = replay(read_job(traces), cluster(1, 1))
    assert {(row.ranks, row.predicted_s) for row in rows} == {(1, 0.0)}


def test_the_command_sums_up(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["simulate", "--workload", str(traces), "--hosts", "4", "--gpus-per-host", "2"]
    assert main([*where, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recorded_ranks"], found["missing_ranks"], found["left_out"]) == (4, [], {"send": 1})
    assert len(found["calls"]) == 5
    assert main(where) == 0
    assert "not predicted: 1 send" in capsys.readouterr().out


def test_what_cannot_be_replayed_is_refused(traces: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--hosts", "4", "--gpus-per-host", "2"]
    (empty := tmp_path / "empty").mkdir()
    for arguments, said in (
        (["--workload", str(empty), *where], "no dumps"),
        (["--workload", str(traces), *where, "--fail", "link=0.0,share=0.5"], "healthy cluster"),
        (["all_reduce", "--workload", str(traces), *where], "Name what to simulate"),
        (where, "Name what to simulate"),
        (["--workload", str(traces)], "--hosts and --gpus-per-host"),
    ):
        assert main(["simulate", *arguments]) == 1
        assert said in capsys.readouterr().err

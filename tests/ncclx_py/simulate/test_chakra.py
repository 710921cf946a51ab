"""Chakra traces as workloads: files written by hand in the forms that their tools write, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from ncclx_py.cli import main
from ncclx_py.simulate.chakra import read_chakra
from ncclx_py.simulate.workload import replay
from tests.ncclx_py.simulate.test_workload import cluster

pytestmark = pytest.mark.unit


def jsonized(number: int, kind: str, size: int, group: str = "", duration: int = 2000) -> dict[str, Any]:
    """As protobuf's JSON: 64-bit numbers are text, names are in camel case, and what is zero is left out."""
    attributes = [{"name": "is_cpu_op", "boolVal": False}, {"name": "comm_size", "int64Val": str(size)}]
    if kind != "0":
        attributes.append({"name": "comm_type", "int64Val": kind})
    if group:
        attributes.append({"name": "pg_name", "stringVal": group})
    times = {"startTimeMicros": str(1000 * number), "durationMicros": str(duration)}
    return {"id": str(number), "name": "nccl", "type": "COMM_COLL_NODE", **times, "attr": attributes}


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Four ranks, two to a host: one after another on ranks 0 and 1, a list with numbers on 2 and 3."""
    for rank in range(4):
        nodes = [
            jsonized(1, "0", 1 << 20),  # all_reduce
            jsonized(2, "2", 4096),  # all_gather: the part of one rank
            jsonized(3, "6", 65536, "inside" if rank < 2 else "other inside"),
            jsonized(4, "9", 0),  # barrier
            {"id": "5", "type": "COMP_NODE", "attr": [{"name": "num_ops", "uint64Val": "9"}]},
            {"id": "6", "type": "COMM_SEND_NODE", "attr": [{"name": "comm_size", "int64Val": "64"}]},
        ]
        if rank in (0, 2):
            nodes.append(jsonized(7, "0", 8192, "across"))
        plain = [{**node, "type": 7 if node["type"] == "COMM_COLL_NODE" else node["type"]} for node in nodes]
        head = {"version": "0.0.4"}
        text = (
            "\n".join(json.dumps(one, indent=2) for one in (head, *nodes)) if rank < 2 else json.dumps({"nodes": plain})
        )
        (tmp_path / f"run.{rank}.json").write_text(text + "\n")
    return tmp_path


def test_every_collective_is_found_with_its_ranks(traces: Path) -> None:
    rows, left_out = replay(read_chakra(traces, per_host=2), cluster(8, 2))
    assert {(row.op, row.bytes): (row.calls, row.recorded_ranks, row.ranks) for row in rows} == {
        ("all_reduce", 1 << 20): (1, 4, 16),
        ("all_gather", 4 * 4096): (1, 4, 16),
        ("all_to_all", 65536): (2, 2, 2),  # two groups, each inside a host
        ("barrier", 4): (1, 4, 16),
        ("all_reduce", 8192): (1, 2, 8),  # one rank of each of two hosts: one of each of eight
    }
    assert left_out == {"send": 1}
    assert next(row for row in rows if row.bytes == 1 << 20).recorded_s == pytest.approx(2e-3)


def test_groups_may_be_stated(traces: Path) -> None:
    stated = {"inside": [0, 1], "other inside": [2, 3], "across": [0, 1, 2, 3]}
    (traces / "comm_group.json").write_text(json.dumps(stated))
    rows, _ = replay(read_chakra(traces, per_host=2), cluster(8, 2))
    assert [row.ranks for row in rows if row.bytes == 8192] == [16]
    (traces / "comm_group.json").write_text(json.dumps({"inside": [0, 1]}))
    with pytest.raises(ValueError, match=r"comm_group.json says nothing of the group 'across'"):
        read_chakra(traces, per_host=2)


def test_the_command_reads_them(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--workload", str(traces), "--hosts", "8", "--gpus-per-host", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recorded_ranks"], len(found["calls"]), found["left_out"]) == (4, 5, {"send": 1})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run.0.et", b"\x0a\x05", "protobuf form.*chakra_jsonizer"),
        ("run.0.json", b"\x0a\x05\xff\xfe", "is not text.*chakra_jsonizer"),
        ("run.0.json", b"{", "is not JSON"),
        ("run.0.json", b" ", "is empty"),
        ("run.0.json", b"[3]", "no nodes"),
        ("run.0.json", b'{"schema": "1.1.1", "nodes": [{"id": 1, "attrs": []}]}', "PyTorch's own execution trace"),
        ("run.0.json", b'{"id": 1, "type": 7, "attr": [{"name": "comm_type", "int64Val": "12"}]}', "comm_type = '12'"),
        ("run.0.json", b'{"id": 1, "type": 7, "attr": [{"name": "comm_size", "int64Val": "-1"}]}', "no whole number"),
        ("run.0.json", b'{"id": 1, "type": 7, "startTimeMicros": "9999999999999999999"}', "too large"),
        ("run.0.json", b'{"id": 1, "type": 7, "attr": 3}', "attr = 3"),
        ("run.0.json", b'{"id": 1, "type": 7, "attr": [{"name": 3}]}', "attr holds"),
        ("run.0.json", b'{"id": 1, "type": 4}', "does not say how many ranks"),
        ("run.7.json", b'{"id": 1, "type": 4}', "no collective that can be predicted"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["simulate", "--workload", str(tmp_path), "--hosts", "2", "--gpus-per-host", "2"]) == 1
    assert re.search(said, capsys.readouterr().err)

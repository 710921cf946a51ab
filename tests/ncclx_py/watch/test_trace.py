"""What is recorded: every call with its number, sizes, peers, place in the code and fate; and torch's own analyser reads it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Rank, RankPool

import ncclx_py
from ncclx_py.errors import Call
from ncclx_py.watch.ring import Ring
from ncclx_py.watch.trace import TRACE, records_wanted

HERE = str(Path(__file__))


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(3) as ranks:
        yield ranks


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    header, *records, end = map(json.loads, path.read_text().splitlines())
    return header, records, end


def analyse(folder: Path, *options: str) -> str:
    """What torch's analyser prints about the dumps in a folder."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.flight_recorder.fr_trace",
        str(folder),
        "-p",
        "nccl_trace_rank_",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def everything(me: Rank, folder: str) -> str:
    """One call of each kind; the k-th line below is what the k-th record must say."""
    me.init(fresh=True)
    n, r = me.size, me.rank
    dist.all_reduce(torch.ones(2, 3), op=dist.ReduceOp.AVG)
    dist.broadcast(torch.ones(4, dtype=torch.int64), src=2)
    dist.reduce(torch.ones(5), dst=1, op=dist.ReduceOp.MAX)
    dist.all_gather([torch.zeros(2) for _ in range(n)], torch.ones(2))
    dist.all_gather_single(torch.zeros(n * 2), torch.ones(2))
    dist.reduce_scatter_single(torch.zeros(2), torch.ones(n * 2))
    dist.all_to_all_single(torch.zeros(2 * n), torch.zeros(2 * n), async_op=True).wait()
    rows = [1, 2, 3]
    dist.all_to_all_single(torch.zeros(n * rows[r], 2), torch.zeros(sum(rows), 2), [rows[r]] * n, rows)
    dist.gather(torch.ones(3), [torch.zeros(3) for _ in range(n)] if r == 0 else None, dst=0)
    dist.scatter(torch.ones(3), [torch.zeros(3) for _ in range(n)] if r == 2 else None, src=2)
    dist.reduce_scatter(torch.zeros(2), [torch.ones(2) for _ in range(n)])
    dist.barrier()
    if r == 0:
        dist.send(torch.ones(7, dtype=torch.float64), 1)
    elif r == 1:
        dist.recv(torch.ones(7, dtype=torch.float64), 0)
    with pytest.raises(ValueError, match="elements"):
        dist.all_gather_single(torch.zeros(n * 2 + 1), torch.ones(2))
    dist.all_reduce(torch.ones(1))
    return str(ncclx_py.dump_trace(folder=folder))


def test_every_call_is_recorded_as_it_was_made(pool: RankPool, tmp_path: Path) -> None:
    for rank, path in enumerate(pool.run(everything, str(tmp_path))):
        header, records, end = read(Path(path))
        rows = [1, 2, 3]
        expected: list[tuple[Any, ...]] = [  # op, inputs, outputs, dtype, root, reduction, seq
            ("connecting", [], [], "", -1, "", 0),
            ("all_reduce", [[2, 3]], [[2, 3]], "float32", -1, "avg", 1),
            ("broadcast", [[4]], [[4]], "int64", 2, "", 2),
            ("reduce", [[5]], [[5]], "float32", 1, "max", 3),
            ("all_gather", [[2]], [[2]] * 3, "float32", -1, "", 4),
            ("all_gather_single", [[2]], [[6]], "float32", -1, "", 5),
            ("reduce_scatter_single", [[6]], [[2]], "float32", -1, "sum", 6),
            ("all_to_all_single", [[6]], [[6]], "float32", -1, "", 7),
            ("all_to_all_single", [[6, 2]], [[3 * rows[rank], 2]], "float32", -1, "", 8),
            ("gather", [[3]], [[3]] * 3 if rank == 0 else [], "float32", 0, "", 9),
            ("scatter", [[3]] * 3 if rank == 2 else [], [[3]], "float32", 2, "", 10),
            ("reduce_scatter", [[2]] * 3, [[2]], "float32", -1, "sum", 11),
            ("barrier", [], [], "", -1, "", 12),
            *([("send", [[7]], [], "float64", -1, "", 1)] if rank == 0 else []),
            *([("recv", [], [[7]], "float64", -1, "", 1)] if rank == 1 else []),
            ("all_reduce", [[1]], [[1]], "float32", -1, "sum", 13),  # the call that was refused has no number
        ]
        names = ("op", "input_sizes", "output_sizes", "dtype", "root", "reduce_op", "seq")
        assert [tuple(record[name] for name in names) for record in records] == expected
        assert {record["state"] for record in records} == {"completed"}
        assert all(
            record["scheduled_ns"] <= record["started_ns"] <= record["finished_ns"] <= header["time_ns"]
            for record in records
        )
        assert all(re.fullmatch(rf"{HERE}:\d+ everything", record["call_site"]) for record in records[1:])
        line = int(records[1]["call_site"].split(":")[1].split()[0])
        assert "dist.all_reduce(torch.ones(2, 3)" in Path(HERE).read_text().splitlines()[line - 1]
        assert {record["peer"] for record in records if record["op"] in ("send", "recv")} <= {1 - rank}
        assert records[8]["splits"] == [rows, [rows[rank]] * 3]
        assert records[7]["async"] is True
        assert records[1]["async"] is False
        assert all(record["algorithm"] not in ("", "gloo") for record in records[1:13])
        assert all("predicted" in record["reason"] for record in records[1:8])
        assert header["groups"]["0"] == {"ranks": [0, 1, 2], "desc": "default_pg", "size": 3}
        assert header["peers"] == {str(other): "alive" for other in range(3) if other != rank}
        assert (header["rank"], header["world_size"], header["reason"], end) == (
            rank,
            3,
            "demand",
            {"end": True, "records": len(records)},
        )
    text = analyse(tmp_path)
    assert "has errors" not in text, text
    assert "Not all ranks" not in text, text
    shown = analyse(tmp_path, "-j")
    assert "reduce_scatter_single" in shown


def several(me: Rank, folder: str) -> str:
    """A coalesced call of two dtypes, sub-groups, an async call that nobody waits for, and a second life of the same name."""
    me.init(fresh=True)
    dist.all_reduce(torch.ones(3))
    me.init(fresh=True)
    pair = dist.new_group([0, 2], use_local_synchronization=True) if me.rank != 1 else None
    dist.group.WORLD.allreduce_coalesced([torch.ones(2), torch.ones(2, dtype=torch.int64)]).wait()
    dist.all_reduce(torch.ones(9), async_op=True)
    if pair is not None:
        dist.all_reduce(torch.ones(4), group=pair)
    dist.barrier()
    ncclx_py.mark_step(12)
    return str(ncclx_py.dump_trace(folder=folder))


def test_coalesced_calls_sub_groups_and_a_name_used_again(pool: RankPool, tmp_path: Path) -> None:
    for rank, path in enumerate(pool.run(several, str(tmp_path))):
        header, records, _ = read(Path(path))
        assert header["step"] == 12
        assert {record["state"] for record in records} == {"completed"}
        world = [(record["op"], record["seq"]) for record in records if record["group"] == "0"]
        assert world[0] == ("connecting", 0)
        assert [seq for _, seq in world[1:]] == list(range(1, len(world)))
        assert ("all_reduce_coalesced", 1) in world
        assert world[-1][0] == "barrier"
        others = {record["group"]: record for record in records if record["group"] != "0"}
        assert len(others) == (0 if rank == 1 else 1)
        for name in others:
            assert header["groups"][name]["ranks"] == [0, 2]
    text = analyse(tmp_path)
    assert "has errors" not in text, text
    assert "Not all ranks" not in text, text


def test_the_ring_keeps_the_last_calls() -> None:
    ring = Ring(3)
    for sequence in range(5):
        ring.add(Call("all_reduce", "a" if sequence < 3 else "b", 0, 2, sequence))
    assert [call.sequence for call in ring.calls()] == [2, 3, 4]
    assert [call.number for call in ring.calls()] == [2, 3, 4]
    assert ring.dropped == 2
    ring.forget("b")
    assert ring.dropped == 2
    assert [call.sequence for call in ring.calls()] == [2]


@pytest.mark.parametrize("text", ["-1", "many", "2.5"])
def test_a_malformed_number_of_records_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"NCCLX_TRACE_RECORDS='{text}'"):
        records_wanted({"NCCLX_TRACE_RECORDS": text})
    assert records_wanted({}) == 2000
    assert records_wanted({"NCCLX_TRACE_RECORDS": "0"}) == 0


def untraced(me: Rank) -> tuple[float, int]:
    me.init(fresh=True)
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    return tensor.sum().item(), len(TRACE.calls())


def test_it_can_be_turned_off() -> None:
    with RankPool(2, {"NCCLX_TRACE_RECORDS": "0", "NCCLX_TRACE_DIR": "/nonexistent/never/made"}) as pool:
        assert pool.run(untraced) == [(4.0, 0)] * 2


def no_tensor_is_kept(me: Rank) -> int:
    import gc
    import weakref

    me.init(fresh=True)
    tensor = torch.ones(1000)
    dist.all_reduce(tensor, op=dist.ReduceOp.AVG)
    known = weakref.ref(tensor)
    del tensor
    gc.collect()
    return int(known() is not None)


def test_the_trace_keeps_no_tensor(pool: RankPool) -> None:
    assert pool.run(no_tensor_is_kept) == [0, 0, 0]

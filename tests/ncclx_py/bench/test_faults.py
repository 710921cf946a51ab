"""The parts of the fault matrix and of the soak that need no ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ncclx_py.launch.shape import Shape

from ncclx_py.bench.fault_cases import CAUSES, KINDS, make_cases
from ncclx_py.bench.fault_replay import replay
from ncclx_py.bench.faults import summary
from ncclx_py.bench.soak import growth, plan
from ncclx_py.faults.spec import check_ranks, parse, parse_all

pytestmark = pytest.mark.unit


def test_the_matrix_has_eight_kinds_at_ten_places_each() -> None:
    shape = Shape((3, 3))
    cases = make_cases(KINDS, 10, shape, seed=1)
    assert len(KINDS) >= 8
    assert len({case.name for case in cases}) == 10 * len(KINDS)
    check_ranks([parse(case.fault) for case in cases], shape.size, shape.hosts)
    for kind in KINDS:
        mine = [case for case in cases if case.kind == kind]
        assert len({case.fault for case in mine}) >= 8
        assert {case.host for case in mine} == {0, 1}
    assert make_cases(KINDS, 10, shape, seed=1) == cases != make_cases(KINDS, 10, shape, seed=2)


def test_a_verdict_is_right_only_with_the_right_rank_and_cause() -> None:
    (case,) = make_cases(["stop"], 1, Shape((2, 2)), seed=3)
    assert case.rank is not None
    other = (case.rank + 1) % 4
    hosts = (0, 0, 1, 1)
    assert case.expects({"ranks": [case.rank], "cause": "stopped"}, hosts) == (True, True)
    assert case.expects({"ranks": [case.rank, other], "cause": "crashed"}, hosts) == (False, False)
    link = make_cases(["drop-link"], 2, Shape((2, 2)), seed=3)[1]
    assert link.expects({"ranks": [0, 2], "cause": "link"}, hosts) == (True, True)
    assert link.expects({"ranks": [0, 1], "cause": "link"}, hosts) == (False, True)
    rows = [
        {"kind": "stop", "happened": True, "right_rank": True, "right_cause": ok, "after_deadline_s": 1.0}
        for ok in (True, False)
    ]
    assert summary(rows)["share"] == 0.5
    assert set(KINDS) < set(CAUSES)


def test_a_replay_is_the_same_job_at_an_earlier_moment(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    for rank in range(4):
        header = {"rank": rank, "time_ns": 20_000_000_000, "monotonic_ns": 5, "reason": "exit"}
        calls = [
            {
                "seq": seq,
                "scheduled_ns": seq * 10**9,
                "started_ns": seq * 10**9 + 5,
                "finished_ns": seq * 10**9 + 10**8,
                "state": "completed",
            }
            for seq in range(1, 19)
        ]
        lines = [header, *calls, {"end": True, "records": len(calls)}]
        (source / f"trace-rank-{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lost = cut = unfinished = 0
    for seed in range(60):
        replay(source, copy, seed)
        files = sorted(copy.iterdir())
        lost += len(files) < 4
        lengths = []
        for file in files:
            first, *rest = map(json.loads, file.read_text().splitlines())
            assert first["reason"] == "demand"
            calls = [line for line in rest if "seq" in line]
            cut += not rest or "end" not in rest[-1]
            unfinished += any(not call["finished_ns"] for call in calls)
            assert all(call["finished_ns"] for call in calls[:-1])  # only the last call can be under way
            if rest and "end" in rest[-1]:
                lengths.append(len(calls))
                assert rest[-1]["records"] == len(calls)
        assert not lengths or max(lengths) - min(lengths) <= 1
    assert lost
    assert cut
    assert unfinished
    before = {file.name: file.read_text() for file in copy.iterdir()}
    replay(source, copy, 59)
    assert {file.name: file.read_text() for file in copy.iterdir()} == before


def test_growth_is_the_gain_of_a_line_without_the_first_rounds() -> None:
    steady = [
        {"round": number, "rss_bytes": 100e6 + (number % 2) * 1e5, "descriptors": 6, "threads": 2}
        for number in range(100)
    ]
    assert abs(growth(steady)["rss_bytes"]) < 1e5
    leaking = [
        {**row, "rss_bytes": row["rss_bytes"] + 1e6 * row["round"], "descriptors": row["round"] // 10} for row in steady
    ]
    assert growth(leaking)["rss_bytes"] == pytest.approx(79e6, rel=0.01)
    assert growth(leaking)["descriptors"] == pytest.approx(7.9, rel=0.1)
    settling = [{**row, "descriptors": 60 if row["round"] < 15 else 6} for row in steady]
    assert growth(settling)["descriptors"] == 0.0
    kinds = {plan(1, number)[0] for number in range(200)}
    assert {"kill", "stop", "skip", "none", "abort"} <= kinds
    for number in range(200):
        kind, rank, fault = plan(1, number)
        assert kind != "kill" or rank >= 2
        assert len(parse_all(fault)) == (kind not in ("none", "abort"))

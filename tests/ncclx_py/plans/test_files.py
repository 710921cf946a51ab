"""Plans as JSON and as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import load

from ncclx_py.plans.algorithms.registry import build
from ncclx_py.plans.errors import PlanFileError
from ncclx_py.plans.files import plan_from_json, plan_to_json, read_plan, write_plan
from ncclx_py.plans.plan import Plan, Problem, Program, Span
from ncclx_py.plans.text import plan_text, rank_text
from ncclx_py.plans.topology import Topology

cases = load(Path(__file__).with_name("cases.py"), "plan_cases")

pytestmark = pytest.mark.unit

TOPOLOGY = Topology((0, 0, 1, 1))


def example() -> Plan:
    return build(Problem("all_reduce", 4, count=64), TOPOLOGY, "pipelined", {"chunks": 2})


def test_plans_come_back_as_they_were() -> None:
    for case in cases.cases(1, 6, worlds=[1, 3, 4, 7]):
        plan = build(case.problem, case.topology, case.algorithm.name, case.parameters)
        assert plan_from_json(plan_to_json(plan)) == plan
    program = Program(0)
    program.native("all_reduce", (0,), Span("data", 0, 4), Span("data", 0, 4), level="inter")
    native = Plan(Problem("all_reduce", 1, count=4), "native", (program.finish(),))
    assert plan_from_json(plan_to_json(native)) == native


def test_a_file_is_read_verified(tmp_path: Path) -> None:
    write_plan(example(), tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json", size=4) == example()


def broken(place: list, value: object) -> str:
    """The example's JSON with one value changed, or taken out (`KeyError` as the value)."""
    found = json.loads(plan_to_json(example()))
    at = found
    for key in place[:-1]:
        at = at[key]
    if value is KeyError:
        del at[place[-1]]
    else:
        at[place[-1]] = value
    return json.dumps(found)


STEP = ["ranks", 1, "steps", 2]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["schema"], "ncclx plan 9", "schema: is 'ncclx plan 9'; this version reads 'ncclx plan 1'"),
        (["schema"], KeyError, "schema: is None"),
        (["colour"], 1, "colour: is not a known field"),
        (["algorithm"], 3, "algorithm: must be a string, not 3"),
        (["parameters"], {"chunks": "two"}, "parameters: must be an integer"),
        (["problem"], [], r"problem: must be an object, not \[\]"),
        (["problem", "size"], KeyError, "problem.size: is missing"),
        (["problem", "size"], 4.5, "problem.size: must be an integer, not 4.5"),
        (["problem", "counts"], [1, None], "problem.counts: must be a list of integers"),
        (["problem", "matrix"], 3, "problem.matrix: must be a list of lists"),
        (["ranks"], {}, "ranks: must be a list"),
        (["ranks", 1], 7, r"ranks\[1\]: must be an object"),
        (["ranks", 1, "steps"], KeyError, r"ranks\[1\].steps: is missing"),
        ([*STEP, "op"], KeyError, r"ranks\[1\].steps\[2\].op: is missing"),
        ([*STEP, "lane"], True, r"ranks\[1\].steps\[2\].lane: must be an integer, not true"),
        ([*STEP, "dst"], ["data", 0], r"ranks\[1\].steps\[2\].dst: must be a span \[buffer, start, stop\]"),
        ([*STEP, "dst"], ["data", 0, "x"], r"ranks\[1\].steps\[2\].dst: must be a list of integers"),
        ([*STEP, "after"], [1], r"ranks\[1\].steps\[2\].after: is not a known field"),
    ],
)
def test_malformed_plans_name_the_place(place: list, value: object, words: str) -> None:
    with pytest.raises(PlanFileError, match=f"^some.json: {words}"):
        plan_from_json(broken(place, value), "some.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"plan"', "[" * 100_000])
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanFileError, match=r"^some.json: (is not JSON|must be an object)"):
        plan_from_json(text, "some.json")


def test_unusable_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(PlanFileError, match="cannot be read"):
        read_plan(path, size=4)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanFileError, match="cannot be read"):
        read_plan(path, size=4)
    write_plan(example(), path)
    with pytest.raises(PlanFileError, match=r"plan.json: the plan is for 4 ranks; this group has 8"):
        read_plan(path, size=8)
    path.write_text(broken([*STEP, "dst"], ["data", 0, 8]))
    with pytest.raises(PlanFileError, match=r"plan.json: the plan is wrong: rank 0, step \d+ .*: its 16 elements meet"):
        read_plan(path, size=4)
    path.write_text(broken(["problem", "size"], 3))
    with pytest.raises(PlanFileError, match="the plan is wrong: the plan must hold ranks 0 to 2"):
        read_plan(path, size=3)


def test_a_plan_can_be_read_by_people() -> None:
    text = plan_text(example(), [1])
    assert text.startswith("all_reduce of 64 elements among 4 ranks: pipelined (chunks 2), 64 steps")
    assert "lane 0, intra: send 2 per rank, 32 elements" in text
    assert "rank 1: 16 steps, 0 elements of scratch" in text
    assert "rank 0:" not in text
    lines = rank_text(example().ranks[0]).splitlines()
    assert lines[4] == "     3  inter  chunk 0  send data[8:16] to rank 2, lane 1, after 2"
    assert len(lines) == 17

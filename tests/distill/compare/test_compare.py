"""Whole comparisons of tiny runs: what goes wrong stays with its run, a kill loses and repeats nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.compare.command import main

pytestmark = pytest.mark.dist


def quoted(overrides: list[str]) -> str:
    return "[" + ",".join(json.dumps(override) for override in overrides) + "]"


@pytest.fixture
def arguments(base_overrides: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    """``arguments(entries, *more)``: a comparison of tiny models in ``tmp_path/all``."""

    def make(entries: dict[str, list[str]], *more: str) -> list[str]:
        common = [o for o in base_overrides if not o.startswith(("train.steps", "data."))]
        common += ["eval.every=2", "eval.examples=8", "checkpoint.every=2"]
        defined = [f"+entries.{name}={quoted(overrides)}" for name, overrides in entries.items()]
        final = ["eval.examples=6", "eval.samples=2", "eval.k=[1,2]", "eval.kl_examples=4"]
        where = [
            f"compare.dir={tmp_path / 'all'}",
            "compare.seeds=[0,1]",
            "compare.budget.steps=5",
            "compare.parallel=2",
        ]
        return [f"common={quoted(common)}", *defined, *final, *where, *more]

    return make


def rows(folder: Path) -> list[dict[str, Any]]:
    """Figures of every step but times, which differ from run to run."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/") and "per_s" not in k} for row in found]


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_failed_run_fails_alone_and_is_tried_again(
    arguments: Callable[..., list[str]], base_overrides: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "all"
    entries = {
        "fixed": ["method=off_policy"],
        "own": ["method=on_policy"],
        "wild": ["method=sft", "engine.lr=1e30", "engine.clip=0", "engine.warmup=0"],
        "lost": ["method=sft", "model.student.path=./nowhere"],
        "read": [
            "method=sft",
            "data=jsonl",
            "data.path={traces}",
            "data.ids_key=ids",
            "data.test_fraction=0.5",
            "eval.every=0",
        ],
    }
    shared = [o for o in base_overrides if o.startswith(("model", "train.max_length", "rollout")) and o != "model=hf"]
    shared += [
        "rollout.examples=8",
        "rollout.samples=2",
        'method.delimiters=["\n"]',
        "method.step_tokens=5",
        "method.marker='#'",
    ]
    traces = [
        "+stages.traces.command=rollout",
        "+stages.traces.per_seed=true",
        f"+stages.traces.overrides={quoted(shared)}",
    ]
    result = tmp_path / "result.json"
    assert main([*arguments(entries), *traces, 'task=["data=running_sum"]', "--json", str(result)]) == 1

    document = load(result)
    assert document == load(folder / "report.json")
    reasons = {failure["run"]: failure["reason"] for failure in document["failed"]}
    assert set(reasons) == {"wild seed 0", "wild seed 1", "lost seed 0", "lost seed 1"}
    assert "not finite" in reasons["wild seed 0"] or "gradient norm" in reasons["wild seed 0"]
    assert "./nowhere" in reasons["lost seed 1"]
    assert "0, 2 failed" in (folder / "table.md").read_text()
    assert all(
        (folder / name).read_bytes().startswith(b"\x89PNG")
        for name in ("accuracy_over_tokens.png", "length_over_accuracy.png")
    )

    runs = {(run["name"], run["seed"]): run for run in document["runs"]}
    for name in ("fixed", "own"):
        found = document["entries"][name]["figures"]
        both = [runs[name, seed] for seed in (0, 1)]
        for key in (
            "pass_at_1",
            "sampled_pass_at_2",
            "mean_length",
            "kl_teacher",
            "student_tokens",
            "teacher_tokens",
            "seconds",
        ):
            assert found[key]["mean"] == pytest.approx(sum(run[key] for run in both) / 2)
            assert found[key]["ci95"] == pytest.approx(12.7062 * abs(both[0][key] - both[1][key]) / 2, rel=1e-4)
    assert runs["own", 0]["student_tokens"] > 0 == runs["fixed", 0]["student_tokens"]

    first = {name: rows(folder / "entries" / name / "seed_0") for name in ("fixed", "own")}
    assert (
        first["fixed"][0] == first["own"][0]
    )  # the same student, measured on the same problems, before the first step
    assert rows(folder / "entries" / "own" / "seed_1") != first["own"]

    made = [json.loads(line) for line in (folder / "stages/traces/seed_1/records.jsonl").read_text().splitlines()]
    cost = {
        "student_tokens": sum(one["student_tokens"] for one in made),
        "teacher_tokens": sum(
            len(one["ids"][: one["prompt_length"]]) + one["student_tokens"] + one["teacher_tokens"] for one in made
        ),
    }
    assert len(made) == runs["traces", 1]["records"] == 16
    assert cost["student_tokens"] > 0
    for name in ("traces", "read"):
        assert {key: runs[name, 1][key] for key in cost} == cost
        assert runs[name, 1]["spent_tokens"] == sum(cost.values())
    assert runs["read", 1].keys() == runs["fixed", 1].keys()  # exact chains among them: judged as running_sum

    outcome = folder / "entries" / "own" / "seed_0" / "outcome.json"
    before = outcome.stat().st_mtime_ns
    repaired = {**entries, "wild": ["method=sft"], "lost": ["method=sft"]}
    again = [*arguments(repaired), *traces, 'task=["data=running_sum"]']
    assert main(again) == 2  # wild was started with another learning rate
    assert main([*again, "compare.changed=rerun"]) == 0
    assert outcome.stat().st_mtime_ns == before
    assert load(folder / "report.json")["failed"] == []


def test_a_killed_comparison_goes_on_where_it_was(arguments: Callable[..., list[str]], tmp_path: Path) -> None:
    """Two ranks each; the kill hits the comparison only, its runs must die with it."""
    entries = {"fixed": ["method=off_policy"], "own": ["method=on_policy"]}
    longer = ["compare.ranks=2", "compare.seeds=[0]", "compare.budget.steps=12", "compare.parallel=1"]
    whole = arguments(entries, *longer, f"compare.dir={tmp_path / 'whole'}")
    assert main(whole) == 0

    broken = arguments(entries, *longer)
    command = [sys.executable, "-m", "distill.compare", *broken]
    job = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    running = tmp_path / "all" / "entries" / "own" / "seed_0"
    deadline = time.monotonic() + 200
    while not (running / "checkpoints" / "step_00000002").is_dir():
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    job.wait()
    finished = tmp_path / "all" / "entries" / "fixed" / "seed_0" / "outcome.json"
    before = finished.stat().st_mtime_ns
    assert not (running / "outcome.json").exists()
    wait_for_release(running)

    assert main(broken) == 0
    assert finished.stat().st_mtime_ns == before
    assert "continuing" in (running / "job.log").read_text()
    for name in entries:
        part = Path("entries", name, "seed_0")
        assert rows(tmp_path / "all" / part) == rows(tmp_path / "whole" / part)
        assert load(tmp_path / "all" / part / "outcome.json") == load(tmp_path / "whole" / part / "outcome.json")


def wait_for_release(folder: Path) -> None:
    """The run's processes let go of its folder (a lock that only a living process holds)."""
    from distill.errors import ConfigError
    from distill.runs import claim

    deadline = time.monotonic() + 20
    while True:
        try:
            claim(folder, "run.dir").close()
            return
        except ConfigError:
            assert time.monotonic() < deadline, "the run outlived the comparison that started it"
            time.sleep(0.05)

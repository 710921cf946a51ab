"""``tokens/…`` against counts from the texts themselves, for every source; the budget ends a run at the right step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

pytestmark = pytest.mark.dist

STEPS, BATCH = 3, 16
NAMES = ("student_generated", "teacher_generated", "teacher_read", "trained")


def run_here(me: Rank, overrides: list[str]) -> None:
    from distill.config import load_config
    from distill.train import train

    me.init("ncclx")
    train(load_config("config", overrides))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def texts(overrides: list[str]) -> list[tuple[int, int]]:
    """(characters of the prompt, characters of prompt, reference and end token) of every sample, from the task alone."""
    from distill.config import load_config
    from distill.data import build_task
    from distill.data.order import SampleOrder
    from distill.samples import ORDER
    from distill.seeds import mix

    config = load_config("config", overrides)
    task = build_task(config.data, "train")
    examples = [task[i] for i in SampleOrder(len(task), mix(config.seed, ORDER)).indices(0, STEPS * BATCH)]
    return [(len(str(e.prompt)), len(str(e.prompt)) + len(e.reference or "") + 1) for e in examples]


def expected(method: str, row: dict[str, Any], prompts: float, whole: float) -> list[float]:
    """What one step must add, from its other figures: mean lengths of responses, decoded tokens of monitored text."""
    written = row["monitor/response_length"] * BATCH
    return {
        "sft": [0.0, 0.0, 0.0, whole - prompts],
        "off_policy": [0.0, 0.0, whole, whole - prompts],
        "seqkd": [0.0, written, prompts, written],
        "on_policy": [written, 0.0, prompts + written, written],
        "grpo": [written, 0.0, 0.0, written],
        "motab": [
            row.get("sample/student_tokens", 0.0) * BATCH,
            row.get("sample/teacher_tokens", 0.0) * BATCH,
            prompts + row.get("sample/student_tokens", 0.0) * BATCH,
            written,
        ],
    }[method]


@pytest.mark.parametrize("method", ["sft", "off_policy", "seqkd", "on_policy", "grpo", "motab"])
def test_what_is_counted(method: str, base_overrides: list[str], two_ranks: RankPool, tmp_path: Path) -> None:
    options = {"motab": ['method.delimiters=["\n"]', "method.keep_flawed=false"], "grpo": ["method.group=4"]}.get(
        method, []
    )
    overrides = [*base_overrides, f"method={method}", *options, f"train.steps={STEPS}", f"run.dir={tmp_path}/run"]
    two_ranks.run(run_here, overrides)
    sizes, before = texts(overrides), [0.0] * len(NAMES)
    for number, row in enumerate(rows(tmp_path / "run")):
        each = 4 if method == "grpo" else 1  # samples of a prompt
        part = [sizes[i // each] for i in range(number * BATCH, (number + 1) * BATCH)]
        now = [row[f"tokens/{name}"] for name in NAMES]
        added = [b - a for a, b in zip(before, now, strict=True)]
        wanted = expected(method, row, float(sum(p for p, _ in part)), float(sum(w for _, w in part)))
        assert added == pytest.approx(wanted, abs=1e-6), (method, number)
        before = now


def test_the_budget_ends_a_run_with_an_evaluation_and_survives_a_restart(
    base_overrides: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    common = [
        *base_overrides,
        "method=on_policy",
        "train.steps=9",
        "eval.every=5",
        "eval.examples=4",
        "checkpoint.every=2",
    ]
    two_ranks.run(run_here, [*common, f"run.dir={tmp_path}/free"])
    free = rows(tmp_path / "free")
    spent = [sum(row[f"tokens/{name}"] for name in NAMES[:3]) for row in free]
    budget = int(spent[2]) + 1  # reached in step 3, not in step 2
    limited = [*common, f"train.token_budget={budget}", f"run.dir={tmp_path}/limited"]
    two_ranks.run(run_here, limited)
    ended = rows(tmp_path / "limited")
    assert [row["step"] for row in ended] == [0, 1, 2, 3]
    assert "eval/pass_at_1" in ended[3]
    assert (tmp_path / "limited" / "checkpoints" / "step_00000003").is_dir()
    summary = json.loads((tmp_path / "limited" / "summary.json").read_text())
    assert summary["tokens"] == {name: ended[3][f"tokens/{name}"] for name in NAMES}

    (tmp_path / "limited" / "summary.json").unlink()  # killed after the last checkpoint: nothing more is trained
    two_ranks.run(run_here, limited)
    assert rows(tmp_path / "limited") == ended

"""Every method for real: three steps on one rank and on two, the same losses, figures that are finite, a loss that moves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from harness import Rank, RankPool

pytestmark = pytest.mark.dist

RUNS = {
    "seqkd": [],
    "akl": ["method.text=student"],
    "hpd": ["method.text=student"],
    "gopd": [],
    "gopd sampled": ["method.form=sampled"],
    "paced": ["method.rollouts=4"],  # steps 1 and 2 on reference text, step 3 on rollouts
    "paced group": ["method.stages=reverse", "method.pass_rate=group", "method.rollouts=4"],
    "opsdc": ["method.template='#{prompt}'", "method.refresh=2", "train.aggregation.kind=sequence_mean"],
    "essence": ["method.sections=[prompt,answer]", "method.answer_start='#'", "method.fraction=0.7"],
    "grpo": ["method.group=16"],  # one group over both ranks
    "ace": ["method.group=4", "method.kl=0.04", "train.aggregation.kind=delta_l"],
}


def any_even_number(self: Any, example: Any, response: str) -> Any:
    """A verdict that random models earn now and then, unlike the task's own."""
    from distill.data import Verdict

    return Verdict(len(response) % 2 == 0, None)


def first_is_a_digit(self: Any, example: Any, response: str) -> Any:
    """A verdict that a policy can learn to earn in a few updates."""
    from distill.data import Verdict

    return Verdict(response[:1].isdigit(), None)


def figures(me: Rank, overrides: list[str], verdict: str = "any_even_number") -> list[dict[str, float]]:
    """What the run logged, step by step; ``verdict`` names the function that judges rollouts."""
    from distill.config import load_config
    from distill.data.running_sum import RunningSum
    from distill.metrics import read_metrics
    from distill.train import train

    me.init("ncclx")
    config = load_config("config", overrides)
    with patch.object(RunningSum, "verify", globals()[verdict]):
        train(config)
    return read_metrics(Path(config.run.dir) / "metrics.jsonl")


@pytest.mark.parametrize("name", RUNS)
def test_three_steps_on_one_rank_and_on_two(
    name: str, base_overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    common = [*base_overrides, f"method={name.split()[0]}", *RUNS[name], "train.steps=3", "engine.lr=0.01"]
    alone = one_rank.run(figures, [*common, f"run.dir={tmp_path}/one"])[0]
    shared = two_ranks.run(figures, [*common, "train.micro_batch_size=4", f"run.dir={tmp_path}/two"])[0]
    assert len(alone) == len(shared) == 3
    for step, (one, two) in enumerate(zip(alone, shared, strict=True), 1):
        assert all(math.isfinite(value) for row in (one, two) for value in row.values()), f"step {step}"
        assert one["train/grad_norm"] > 0, f"step {step}"
        for key in ("train/loss", "train/grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), f"{key} of step {step}"
    assert len({row["train/loss"] for row in alone}) == 3


def test_a_self_teacher_without_an_instruction_has_nothing_to_teach(
    base_overrides: list[str], one_rank: RankPool, tmp_path: Path
) -> None:
    """Teacher = student = the same view: the loss of the first step is 0; and again right after the teacher is renewed."""
    options = ["method=opsdc", "method.template='{prompt}'", "method.refresh=1", "train.steps=2"]
    rows = one_rank.run(figures, [*base_overrides, *options, f"run.dir={tmp_path}/run"])[0]
    assert [abs(row["train/loss"]) < 1e-8 for row in rows] == [True, True]


@pytest.mark.parametrize("method", ["grpo", "ace"])
def test_rewarded_answers_become_likelier(
    method: str, base_overrides: list[str], one_rank: RankPool, tmp_path: Path
) -> None:
    """From the verdict through groups, ranks and micro-batches to the gradient: the sign and the alignment are right."""
    options = [
        f"method={method}",
        "train.steps=25",
        "train.batch_size=64",
        "train.micro_batch_size=64",
        "engine.lr=0.01",
    ]
    rows = one_rank.run(figures, [*base_overrides, *options, f"run.dir={tmp_path}/run"], "first_is_a_digit")[0]
    rates = [row["rollout/pass_rate"] for row in rows]
    before, after = sum(rates[:3]) / 3, sum(rates[-3:]) / 3
    assert before < 0.8
    assert after > before + 0.15, rates

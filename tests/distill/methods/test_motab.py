"""MOTAB in the trainer: its loss, its options, and online steps that do not depend on the number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Rank, RankPool
from torch import Tensor

from distill.config import load_config
from distill.errors import ConfigError
from distill.methods import Source, build_method
from distill.rollouts.monitored_options import MonitorOptions


@pytest.mark.unit
def test_sft_loss_is_cross_entropy_and_needs_no_teacher_logits(make_targets: Any, check_against: Any) -> None:
    method = build_method({"name": "motab"})
    example = make_targets(teacher_logits=None)

    def oracle(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, example.token_ids, reduction="none")

    check_against(method, example, oracle)
    assert (method.needs, method.uses()) == (frozenset(), {Source.MONITORED})


@pytest.mark.unit
@pytest.mark.parametrize("name", ["motab", "skd"])
def test_divergence_loss_is_the_kl_of_teacher_and_student(name: str, make_targets: Any, check_against: Any) -> None:
    method = build_method({"name": name, "loss": "divergence"})
    example = make_targets()

    def oracle(logits: Tensor) -> Tensor:
        p, q = (each[:, :11].log_softmax(-1) for each in (example.teacher_logits.double(), logits))
        return (p.exp() * (p - q)).sum(-1)

    check_against(method, example, oracle)
    assert method.needs == {"teacher"}


@pytest.mark.unit
def test_yaml_holds_every_option_with_its_default() -> None:
    method: Any = build_method(load_config("config", ["method=motab"]).method)
    assert method.monitor == build_method({"name": "motab"}).monitor  # type: ignore[attr-defined]
    for name in MonitorOptions.__dataclass_fields__:
        assert name in load_config("config", ["method=motab"]).method
    with pytest.raises(ConfigError, match=r"method.value=mean"):
        build_method({"name": "motab", "value": "mean"})
    with pytest.raises(ConfigError, match=r"method.loss=kl"):
        build_method({"name": "motab", "loss": "kl"})


def steps(me: Rank, overrides: list[str]) -> list[dict[str, float]]:
    from distill.train import train

    me.init("ncclx")
    config = load_config("config", overrides)
    train(config)
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


MONITOR = ['method.delimiters=["\n"]', "method.step_tokens=5", "train.steps=3"]
VARIANTS: dict[str, list[str]] = {
    "masked": [
        "method=motab",
        "method.marker='#'",
        "method.mask_flawed=true",
        "method.epsilon=0.015",
        "method.theta=0",
    ],
    "divergence": [
        "method=motab",
        "method.keep_flawed=false",
        "method.epsilon=0.015",
        "method.theta=0",
        "method.loss=divergence",
    ],
    "skd": ["method=skd", "method.gamma=0.5"],
}


@pytest.mark.dist
@pytest.mark.parametrize("name", VARIANTS)
def test_online_steps_are_the_same_on_any_number_of_ranks(
    name: str,
    base_overrides: list[str],
    one_rank: RankPool,
    two_ranks: RankPool,
    tmp_path: Path,
    make_model: Callable[..., Path],
) -> None:
    overrides = [*base_overrides, *VARIANTS[name], *MONITOR]
    alone = one_rank.run(steps, [*overrides, f"run.dir={tmp_path}/one", "rollout.slots=4"])[0]
    shared = two_ranks.run(steps, [*overrides, f"run.dir={tmp_path}/two"])[0]
    assert len(alone) == 3
    for one, two in zip(alone, shared):
        for key in ("train/loss", "train/tokens", "sample/breach", "sample/value", "sample/teacher_share"):
            assert one[key] == pytest.approx(two[key], rel=1e-4), key
    assert 0.0 < alone[0]["sample/breach"] <= 1.0
    assert 0.0 < alone[0]["sample/teacher_share"] < 1.0
    assert all(0.0 <= one["sample/student_idle"] <= 1.0 for one in alone)
    assert alone[0]["train/loss"] != alone[1]["train/loss"]
    if name == "masked":
        assert alone[0]["train/tokens"] < 16 * alone[0]["rollout/mean_length"]

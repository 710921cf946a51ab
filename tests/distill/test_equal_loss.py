"""The loss is a property of the global batch: ranks, accumulation, layout and ZeRO stage must not show in it."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
from harness import Rank, RankPool

pytestmark = pytest.mark.dist

NUMBER = count()
LAYOUTS = {
    "1 rank, accumulation 2": (1, "train.micro_batch_size=8", "train.pack=true"),
    "1 rank, padded": (1, "train.micro_batch_size=16", "train.pack=false"),
    "2 ranks": (2, "train.micro_batch_size=8", "train.pack=true"),
    "2 ranks, accumulation 4, padded": (2, "train.micro_batch_size=2", "train.pack=false"),
    "2 ranks, ZeRO-1": (2, "train.micro_batch_size=4", "engine.zero_stage=1"),
    "2 ranks, ZeRO-2": (2, "train.micro_batch_size=4", "engine.zero_stage=2"),
    "2 ranks, ZeRO-3": (2, "train.micro_batch_size=4", "engine.zero_stage=3"),
}
METHODS = {
    "sft": ["method=sft"],
    "off_policy on teacher text": ["method=off_policy", "method.text=teacher"],
    "on_policy": ["method=on_policy"],
    "gkd": ["method=gkd", "method.divergence.temperature=2.0"],
}


def run_figures(me: Rank, overrides: list[str]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step of one run."""
    from distill.config import load_config
    from distill.metrics import read_metrics
    from distill.train import train

    me.init("ncclx")
    config = load_config("config", overrides)
    train(config)
    return [(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(Path(config.run.dir) / "metrics.jsonl")]


@pytest.mark.parametrize("method", METHODS)
def test_loss_does_not_depend_on_the_layout(
    method: str, base_overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    common = [*base_overrides, *METHODS[method]]
    reference = one_rank.run(run_figures, [*common, "train.micro_batch_size=16", f"run.dir={tmp_path}/reference"])[0]
    assert len(reference) == 4
    assert len({loss for loss, _ in reference}) == 4
    for name, (ranks, *layout) in LAYOUTS.items():
        if "ZeRO-1" in name and method != "gkd":
            continue  # ZeRO-1 and 2 share their code; one method covers the difference
        pool = one_rank if ranks == 1 else two_ranks
        figures = pool.run(run_figures, [*common, *layout, f"run.dir={tmp_path}/run{next(NUMBER)}"])[0]
        for step, (expected, found) in enumerate(zip(reference, figures, strict=True), 1):
            assert found == pytest.approx(expected, rel=1e-5), f"{method}, {name}, step {step}"


def test_bf16_is_the_same_on_every_zero_stage(base_overrides: list[str], two_ranks: RankPool, tmp_path: Path) -> None:
    """bf16 weights with fp32 masters: stages agree to bf16's rounding, and stay near the fp32 run."""
    common = [*base_overrides, "method=off_policy"]
    exact = two_ranks.run(run_figures, [*common, f"run.dir={tmp_path}/fp32"])[0]
    runs = {}
    for stage in (0, 1, 2, 3):
        options = ["engine.dtype=bfloat16", f"engine.zero_stage={stage}", f"run.dir={tmp_path}/bf16-{stage}"]
        runs[stage] = two_ranks.run(run_figures, [*common, *options])[0]
    for stage, figures in runs.items():
        for (loss, _), (reference, _), (expected, _) in zip(figures, runs[0], exact, strict=True):
            assert loss == pytest.approx(reference, rel=1e-3), f"ZeRO-{stage} against ZeRO-0"
            assert loss == pytest.approx(expected, rel=0.1), f"ZeRO-{stage} against fp32"

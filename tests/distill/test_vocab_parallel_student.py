"""A student whose vocabulary is split over ranks trains, writes, is saved and goes on as the whole one does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Rank, RankPool, load

from distill.config import EngineConfig, load_config
from distill.config.sections import ReplicasSpec
from distill.errors import ConfigError
from distill.vocabulary.group import make_group
from distill.vocabulary.training import check_split

pytestmark = pytest.mark.dist
fused = load(Path(__file__).with_name("test_fused_loss.py"), "fused_loss")
HIDDEN = ["method=off_policy", "teacher.signal=hidden", "train.steps=3", "train.micro_batch_size=4"]


@pytest.fixture(scope="module")
def four_ranks(make_trainers: Callable[[int], RankPool]) -> Iterator[RankPool]:
    with make_trainers(4) as pool:
        yield pool


def run_steps(me: Rank, overrides: list[str]) -> Any:
    return load(Path(__file__).with_name("test_fused_loss.py"), "fused_loss").run_steps(me, overrides)


def test_a_split_vocabulary_trains_as_the_whole(
    base_overrides: list[str],
    make_model: Callable[..., Path],
    two_ranks: RankPool,
    four_ranks: RankPool,
    tmp_path: Path,
) -> None:
    """17 tokens over 2 and 4 ranks: 9 + 8, and 5 + 5 + 5 + 2; tied and not; two groups of two; small chunks."""
    untied = make_model(tmp_path / "untied", 1, tie_word_embeddings=False)
    common = [*base_overrides, *HIDDEN, "train.aggregation.kind=sequence_mean", "engine.clip=0.5"]
    cases = {
        "tied, 2 of 2": (two_ranks, ["engine.vocab_parallel=2", "train.loss_bytes=1000"]),
        "tied, 2 of 4": (four_ranks, ["engine.vocab_parallel=2", "engine.activation_checkpointing=true"]),
        "untied, 4 of 4": (four_ranks, ["engine.vocab_parallel=4", f"model.student.path={untied}"]),
    }
    models = {"tied": [], "untied": [f"model.student.path={untied}"]}
    expected = {
        name: two_ranks.run(run_steps, [*common, *model, f"run.dir={tmp_path}/{name}"])[0]
        for name, model in models.items()
    }
    for number, (name, (pool, split)) in enumerate(cases.items()):
        found = pool.run(run_steps, [*common, *split, f"run.dir={tmp_path}/split-{number}"])[0]
        fused.assert_same_run(found, expected[name.partition(",")[0]], 1e-5, name)


def test_rollouts_and_evaluation_are_those_of_the_whole(
    base_overrides: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    """On its own text, judged on held-out problems; in bf16 on given text, where rounding cannot change what is written."""
    evaluated = ["method=on_policy", "eval.every=2", "eval.examples=8", "eval.kl_examples=8", "train.steps=2"]
    rounded = ["engine.dtype=bfloat16", "engine.clip=0.5", "train.loss_path=fused"]
    for name, options, rel in (("on-policy", evaluated, 1e-5), ("bf16", rounded, 1e-2)):
        expected, found = (
            two_ranks.run(
                run_steps, [*base_overrides, *HIDDEN, *options, *split, f"run.dir={tmp_path}/{name}{len(split)}"]
            )[0]
            for split in ([], ["engine.vocab_parallel=2"])
        )
        fused.assert_same_run(found, expected, rel, name)


def resumed(me: Rank, overrides: list[str], kept: str) -> Any:
    """The run again from its second step on: what came after is taken away first."""
    folder = Path(load_config("config", overrides).run.dir)
    if me.rank == 0:
        shutil.rmtree(folder / "final")
        (folder / "summary.json").unlink()
        for checkpoint in (folder / "checkpoints").glob("step_*"):
            if checkpoint.name != kept:
                shutil.rmtree(checkpoint)
    me.init("ncclx")
    torch.distributed.barrier()
    return run_steps(me, overrides)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_to_the_bit(
    dtype: str, base_overrides: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    options = [*base_overrides, *HIDDEN, f"engine.dtype={dtype}", "engine.vocab_parallel=2"]
    options += ["checkpoint.every=2", f"run.dir={tmp_path}/run"]
    expected = two_ranks.run(run_steps, options)[0]
    parts = sorted((tmp_path / "run" / "checkpoints").glob("step_*2/vocabulary_*.pt"))
    assert [part.name for part in parts] == ["vocabulary_00000.pt", "vocabulary_00001.pt"]
    found = two_ranks.run(resumed, options, "step_00000002")[0]
    assert found[0] == expected[0]
    assert all(np.array_equal(found[1][name], value) for name, value in expected[1].items())


@pytest.mark.parametrize(
    ("options", "adapters", "message"),
    [
        ({"zero_stage": 1}, False, "set engine.zero_stage=0"),
        ({"optimizer": "muon"}, False, "set engine.optimizer=adamw"),
        ({"replicas": ReplicasSpec(enabled=True)}, False, "run one job"),
        ({}, True, "set engine.vocab_parallel=1"),
    ],
)
def test_what_it_does_not_work_with_is_refused(options: dict[str, Any], adapters: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_split(EngineConfig(vocab_parallel=2, **options), adapters)


def refusals(me: Rank) -> list[str]:
    me.init("ncclx")
    said = []
    for size, vocabulary in ((3, 100), (2, 1)):
        with pytest.raises(ConfigError) as error:
            make_group(size, vocabulary)
        said.append(str(error.value))
    return said


def test_groups_that_cannot_be_are_refused(two_ranks: RankPool) -> None:
    indivisible, empty = two_ranks.run(refusals)[1]
    assert "does not divide the 2 ranks of this job; set it to one of [2]" in indivisible
    assert "leaves a rank without any of the 1 tokens" in empty

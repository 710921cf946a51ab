"""Training from a cache: the losses of training live, on any ranks; what is missing is named and added, a kill loses nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

pytestmark = pytest.mark.dist


def saved(me: Rank, overrides: list[str], kill_after: int | None = None) -> Any:
    """The summary of `distill rollout --save`, or its message; a rank may be killed at its so-manieth sequence."""
    from distill.errors import DistillError
    from distill.rollout import load_rollout_config, rollout
    from distill.teachers.cache.folder import PartWriter

    me.init("ncclx")
    add, added = PartWriter.add, []

    def counted(self: PartWriter, *arguments: Any) -> None:
        add(self, *arguments)
        added.append(arguments[0])
        if len(added) == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    PartWriter.add = counted  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            return rollout(*load_rollout_config([*overrides, "rollout.save=true"]), "THE COMMAND")["cache"]
    except DistillError as error:
        return str(error)
    finally:
        PartWriter.add = add  # type: ignore[method-assign]


def trained(me: Rank, overrides: list[str]) -> Any:
    """The loss of every step, or the message with which the run stops."""
    from distill.config import load_config
    from distill.errors import DistillError
    from distill.metrics import read_metrics
    from distill.train import train

    me.init("ncclx")
    config = load_config("config", overrides)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            train(config)
    except DistillError as error:
        return str(error)
    return [step["train/loss"] for step in read_metrics(Path(config.run.dir) / "metrics.jsonl")]


@pytest.fixture
def overrides(base_overrides: list[str]) -> list[str]:
    """One sequence per forward pass: scored in the layout in which it is trained on, so that fp32 gives the same bits."""
    small = [
        "train.micro_batch_size=1",
        "train.batch_size=4",
        "train.steps=3",
        "data.train_size=16",
        "checkpoint.every=1",
    ]
    return [o for o in base_overrides if not o.startswith("run.")] + ["method=off_policy", *small]


def shared(overrides: list[str]) -> list[str]:
    """Those that `distill rollout` knows, too."""
    return [o for o in overrides if not o.startswith(("engine.", "checkpoint.", "train.steps", "train.batch"))]


def live(overrides: list[str], folder: Path, *more: str) -> list[str]:
    return [*overrides, f"run.dir={folder}", "run.tensorboard=false", *more]


def cached(overrides: list[str], folder: Path, cache: Path, *more: str) -> list[str]:
    """Without a teacher, and with a student whose tokenizer is beside it."""
    kept = [o for o in overrides if not o.startswith("model.teacher")]
    return live(kept, folder, "teacher=cache", f"teacher.cache={cache}", *more)


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_training_from_the_cache_is_training_live(
    kind: str, overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    chosen = [f"teacher.signal={kind}", "teacher.top_k=6"]
    summary = two_ranks.run(saved, [*shared(overrides), *chosen, f"teacher.cache={tmp_path}/cache"])[0]
    assert summary["scored_tokens"] == summary["tokens"] > 0
    assert summary["bytes_per_token"] == {"hidden": 4 * 24, "topk": 8 * 6}[kind]
    for ranks in (one_rank, two_ranks):
        expected = ranks.run(trained, live(overrides, tmp_path / f"live{ranks.size}", *chosen))[0]
        found = ranks.run(trained, cached(overrides, tmp_path / f"cached{ranks.size}", tmp_path / "cache", *chosen))[0]
        assert len(expected) == 3
        assert found == expected, "to the bit"
    together = ["train.micro_batch_size=2", "train.pack=true"]  # another layout than it was scored in
    packed = one_rank.run(trained, cached(overrides, tmp_path / "packed", tmp_path / "cache", *chosen, *together))[0]
    assert packed == pytest.approx(expected, rel=1e-5)
    steps = [json.loads(line) for line in (tmp_path / "cached2" / "metrics.jsonl").read_text().splitlines()]
    assert all(step["teacher/bytes"] == step["train/tokens"] * summary["bytes_per_token"] for step in steps)


def test_a_killed_run_scores_what_is_missing_and_nothing_twice(
    overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    def run(ranks: RankPool, name: str, *more: Any) -> Any:
        chosen = [*shared(overrides), "data.train_size=40", "teacher.signal=topk", "teacher.wire=float32"]
        return ranks.run(saved, [*chosen, f"teacher.cache={tmp_path / name}"], *more)[0]

    whole = run(one_rank, "whole")
    one_rank.run(
        saved,
        [*shared(overrides), "data.train_size=40", "teacher.signal=topk", f"teacher.cache={tmp_path}/killed"],
        7,
        dying={0},
    )
    assert len((tmp_path / "killed" / "shards" / "rank_00000_000000.journal").read_text().splitlines()) == 7
    again = run(two_ranks, "killed")
    assert again["sequences"] == whole["sequences"]
    assert again["tokens"] == whole["tokens"]
    shards = json.loads((tmp_path / "killed" / "index.json").read_text())["shards"]
    assert (shards[0]["file"], shards[0]["sequences"]) == ("rank_00000_000000.safetensors", 7)
    assert again["scored_tokens"] == whole["tokens"] - shards[0]["tokens"]
    assert run(two_ranks, "killed")["scored_tokens"] == 0, "nothing is missing, nothing is scored"
    path = tmp_path / "killed" / "shards" / shards[0]["file"]
    path.write_bytes(path.read_bytes()[:-1])
    assert run(one_rank, "killed")["scored_tokens"] == shards[0]["tokens"], "just that"

    from distill.teachers.cache.reader import CacheReader

    readers = [CacheReader(tmp_path / name) for name in ("whole", "killed")]
    rows = [
        sorted((key, reader.read([(key, tokens)])["logprobs"].tolist()) for key, tokens in reader.entries())
        for reader in readers
    ]
    assert rows[0] == rows[1], "the same sequences, each once, with the same bytes"


def test_a_sequence_that_is_missing_stops_the_run_saved_and_can_be_added(
    overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    chosen = ["teacher.signal=hidden", "data.min_terms=4", "data.max_terms=9"]
    cache = [*shared(overrides), *chosen, f"teacher.cache={tmp_path}/cache"]
    two_ranks.run(saved, [*cache, "rollout.examples=9"])
    expected = two_ranks.run(trained, live(overrides, tmp_path / "live", *chosen))[0]
    run = cached(overrides, tmp_path / "run", tmp_path / "cache", *chosen)
    messages = two_ranks.run(trained, run)
    assert messages[0] == messages[1]
    assert "example running_sum/train/" in messages[0]
    assert f"is not in teacher.cache={tmp_path}/cache as this run reads it" in messages[0]
    assert messages[0].partition(" (rank")[0].endswith("train.max_length: THE COMMAND")
    two_ranks.run(saved, cache)
    assert two_ranks.run(trained, run)[0] == expected
    shard = next((tmp_path / "cache" / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    broken = [*cached(overrides, tmp_path / "broken", tmp_path / "cache", *chosen), "train.steps=4"]
    messages = two_ranks.run(trained, broken)
    assert messages[0] == messages[1]
    assert f"{shard} is damaged: sequence" in messages[0]
    for change, words in (
        ("method=on_policy", "method=on_policy trains on text that is written while it runs"),
        ("teacher.signal=logits", "teacher.signal=logits is not what"),
        ("teacher.cache=null", "teacher.placement=cache needs teacher.cache=FOLDER"),
        (f"teacher.cache={tmp_path}", "holds no index.json; fill it: distill rollout"),
    ):
        (message,) = one_rank.run(
            trained, [*cached(overrides, tmp_path / "refused", tmp_path / "cache", *chosen), change]
        )
        assert words in message
        assert not (tmp_path / "refused").exists()
    for change, words in (
        ("teacher.signal=topk", "holds signal=hidden, and this run would add signal=topk"),
        ("model.teacher.path=null", "--save needs a teacher"),
        ("method=gkd", "method=gkd trains on text of several writers"),
        ("teacher=separate", "--save scores with the teacher in process"),
    ):
        (message,) = one_rank.run(saved, [*cache, change])
        assert words in message


@pytest.mark.parametrize("method", ["seqkd", "motab"])
def test_text_of_models_is_written_scored_and_trained_on(
    method: str, overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    monitor = [
        "method.step_tokens=5",
        "method.marker='#'",
        "method.epsilon=0.015",
        "method.theta=0",
        "method.mask_flawed=true",
    ]
    writing = [
        f"method={method}",
        *(monitor if method == "motab" else []),
        'rollout.stop=["#"]',
        f"run.dir={tmp_path}/run",
    ]
    size = ["rollout.examples=6", "rollout.samples=2", "rollout.slots=4"]
    kept = [o for o in shared(overrides) if not o.startswith("method")]
    summary = two_ranks.run(saved, [*kept, *writing, *size, "teacher.signal=logits"])[0]
    assert summary["cache"] == f"{tmp_path}/run/cache"
    assert summary["sequences"] + summary["there"] == 12
    data = ["data=jsonl", f"data.path={tmp_path}/run/records.jsonl", "data.ids_key=ids", "data.test_path=${data.path}"]
    base = [o for o in overrides if not o.startswith(("data.", "rollout."))] + data
    expected = one_rank.run(trained, live(base, tmp_path / "live"))[0]
    found = one_rank.run(
        trained, cached(base, tmp_path / "cached", tmp_path / "run" / "cache", "teacher.signal=logits")
    )[0]
    assert len(found) == 3
    assert found == expected

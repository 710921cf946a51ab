"""Every mistake a user can make: one message that names the value, the place and the remedy; nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

from distill.config import load_config
from distill.errors import ConfigError


@pytest.mark.unit
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=onpolicy"], ["method=onpolicy", "did you mean 'on_policy'"]),
        (["train.stepz=3"], ["train.stepz", "did you mean 'train.steps'"]),
        (["method=gkd", "method.lambda=0.5"], ["method.lambda", "did you mean 'method.lambda_'"]),
        (["engine.zero_stage=5"], ["engine.zero_stage=5", "0, 1, 2, 3"]),
        (["engine.lr=fast"], ["engine.lr", "fast"]),
        (["engine.optimizer=muon", "engine.zero_stage=2"], ["muon", "zero_stage=2", "engine.optimizer=adamw"]),
        (["train.steps=0"], ["train.steps=0", "at least 1"]),
        (["rollout.top_p=1.5"], ["rollout.top_p=1.5", "between"]),
        (["data=gsm8k"], ["data.path"]),
        (["data.modulus=1"], ["data.modulus", "1"]),
        (["experiment=demo_studnt"], ["did you mean 'demo_student'"]),
        (["eval.samples=2", "eval.k=[4]"], ["eval.k=[4]", "eval.samples=4"]),
        (["steps"], ["'steps'", "key=value"]),
    ],
)
def test_configuration_mistakes(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("config", overrides)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def failure(me: Rank, overrides: list[str], file_size_limit: int | None = None) -> str:
    """The message with which a run stops; rank 0 may write no file above the limit (bytes), as on a full disk."""
    from distill.errors import DistillError
    from distill.train import train

    me.init("ncclx")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_size_limit is not None and me.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, before[1]))
    try:
        train(load_config("config", overrides))
    except DistillError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "no error"


def expect(pool: RankPool, overrides: list[str], *words: str, file_size_limit: int | None = None) -> None:
    """All ranks stop with a message that holds all these words."""
    for message in pool.run(failure, overrides, file_size_limit):
        for word in words:
            assert word in message, message


@pytest.mark.dist
def test_models_that_cannot_be_used(
    base_overrides: list[str], two_ranks: RankPool, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from distill.data import char_tokenizer

    run = [*base_overrides, "method=off_policy", f"run.dir={tmp_path}/run"]
    expect(two_ranks, [*run, "model.student.path=./nowhere"], "model.student.path=./nowhere", "no such folder")
    expect(two_ranks, [*run, "model.teacher.path=null"], "off_policy needs a teacher", "model.teacher.path")

    headless = make_model(tmp_path / "headless", 4, tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(headless).model.save_pretrained(str(headless))
    expect(two_ranks, [*run, f"model.teacher.path={headless}"], str(headless), "lm_head.weight", "language-model head")

    other = make_model(tmp_path / "other", 3)
    char_tokenizer("9876543210+-=\n#").save_pretrained(str(other))
    expect(
        two_ranks,
        [*run, f"model.teacher.path={other}"],
        "tokenizers differ",
        "'0' is 2 for the student and 11",
        "family",
    )

    expect(
        two_ranks, [*run, "train.max_length=4096"], "train.max_length=4096", "context of 128", "train.max_length=128"
    )
    uneven = [*run, "train.batch_size=10", "train.micro_batch_size=4"]
    expect(two_ranks, uneven, "not divisible", "train.micro_batch_size to one of")
    assert not (tmp_path / "run").exists(), "a run that could not start left something behind"


@pytest.mark.dist
def test_data_that_cannot_be_used(base_overrides: list[str], two_ranks: RankPool, tmp_path: Path) -> None:
    run = [o for o in base_overrides if not o.startswith("data.")] + [
        "method=off_policy",
        f"run.dir={tmp_path}/run",
        "data=jsonl",
    ]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    expect(two_ranks, [*run, f"data.path={empty}"], str(empty), "empty")
    expect(two_ranks, [*run, f"data.path={tmp_path}/none.jsonl"], "none.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "1+1=\\n", "response": "2"}\n{"prompt": 7}\n' * 4)
    expect(two_ranks, [*run, f"data.path={broken}"], str(broken), "2")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "1+" * 40 + "1=\n", "response": "2"}) + "\n")
    expect(two_ranks, [*run, f"data.path={long}", f"data.test_path={long}"], "its prompt alone has", "the limit is 64")
    assert not (tmp_path / "run" / "checkpoints").exists() or not any((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.dist
def test_nan_loss_names_the_samples_and_keeps_the_checkpoint(
    base_overrides: list[str], two_ranks: RankPool, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    """A teacher that knows nothing of the digit 7 but NaN, met only after three good steps."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_models["teacher"])
    teacher = AutoModelForCausalLM.from_pretrained(tiny_models["teacher"])
    with torch.no_grad():
        teacher.lm_head.weight = torch.nn.Parameter(teacher.lm_head.weight.clone())
        teacher.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("7")] = float("nan")
    teacher.config.tie_word_embeddings = False
    teacher.save_pretrained(str(tmp_path / "nan"))
    tokenizer.save_pretrained(str(tmp_path / "nan"))
    data = tmp_path / "data.jsonl"
    pairs = [(a, b) for a in range(7) for b in range(7)]
    pairs[5] = (7, 1)
    rows = [{"prompt": f"{a}+{b}=\n", "response": str((a + b) % 7)} for a, b in pairs]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [o for o in base_overrides if not o.startswith("data.")] + [
        "method=off_policy", "data=jsonl", f"data.path={data}", f"data.test_path={data}", f"run.dir={tmp_path}/run",
        "checkpoint.every=1", f"model.teacher.path={tmp_path}/nan", "seed=3",
    ]  # fmt: skip
    expect(two_ranks, run, "not finite", f"{data}:6", "no weight was changed", "engine.lr")


def overflow(me: Rank, overrides: list[str]) -> str:
    """The message of a run whose third gradient overflows while every loss is finite."""
    from distill.engine import TrainEngine

    original = TrainEngine.backward

    def poisoned(self: TrainEngine, loss: Any) -> None:
        original(self, loss * (float("inf") if self.deepspeed.global_steps == 2 else 1.0))

    TrainEngine.backward = poisoned  # type: ignore[method-assign]
    try:
        return failure(me, overrides)
    finally:
        TrainEngine.backward = original  # type: ignore[method-assign]


@pytest.mark.dist
def test_overflowing_gradient_stops_before_it_is_saved(
    base_overrides: list[str], two_ranks: RankPool, tmp_path: Path
) -> None:
    run = [*base_overrides, "method=sft", "checkpoint.every=1", f"run.dir={tmp_path}/run"]
    for message in two_ranks.run(overflow, run):
        for word in ("step 3", "gradient norm is", "samples 32 to 47", "step_00000002", "engine.lr"):
            assert word in message, message
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000001",
        "step_00000002",
    ]


@pytest.mark.dist
def test_full_disk_keeps_the_last_checkpoint(
    base_overrides: list[str], make_trainers: Callable[[int], RankPool], tmp_path: Path
) -> None:
    from distill.metrics import read_metrics

    run = [*base_overrides, "method=sft", f"run.dir={tmp_path}/run", "checkpoint.every=2", "engine.zero_stage=2"]
    words = ("could not be written", "there is no earlier one", "same command again")
    with make_trainers(2) as fresh:  # what ranks print goes to a file too, and the limit is for every file
        expect(
            fresh, [*run, f"run.dir={tmp_path}/first"], "no error"
        )  # makes windows in shared memory, above any limit
        expect(fresh, run, *words, file_size_limit=20_000)
        assert not list((tmp_path / "run" / "checkpoints").iterdir())
        expect(fresh, run, "no error")
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.dist
def test_checkpoints_of_another_job_are_refused(
    base_overrides: list[str], two_ranks: RankPool, one_rank: RankPool, tmp_path: Path
) -> None:
    run = [*base_overrides, "method=sft", f"run.dir={tmp_path}/run", "checkpoint.every=2"]
    expect(two_ranks, run, "no error")
    expect(two_ranks, [*run, "engine.lr=0.001"], "another configuration", "engine.lr: 0.003 there, 0.001 now")
    expect(two_ranks, [*run, "run.resume=never"], "already holds a run")
    (tmp_path / "run" / "summary.json").unlink()  # as if it had been killed at the very end
    expect(one_rank, run, "written by 2 ranks", "this job has 1")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    shard = next(newest.glob("*.pt"))
    shard.write_bytes(shard.read_bytes()[:100])
    expect(two_ranks, run, str(shard), "100 bytes instead of")


@pytest.mark.dist
def test_command_line_says_it_once_and_exits_with_2(base_overrides: list[str], tmp_path: Path) -> None:
    """Two ranks, one message, no traceback; and an output folder that cannot be made."""
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "distill.train",
    ]
    done = subprocess.run(
        [*command, *base_overrides, "method=sft", f"run.dir={tmp_path}/file/run"],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: run.dir=") == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert 'distill/train.py"' not in done.stderr

    help_text = subprocess.run(
        [sys.executable, "-m", "distill.train", "--help"], capture_output=True, text=True, check=True
    )
    assert "on_policy" in help_text.stdout

"""``distill rollout``: every key once, whatever is killed, cut short or run on other ranks; usable as training data."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import Rank, RankPool

from distill.errors import CheckpointError, ConfigError
from distill.records import RecordFolder


@pytest.fixture
def overrides(base_overrides: list[str], tmp_path: Path) -> list[str]:
    """7 examples, 2 samples; the random teacher of these tests breaches now and then."""
    shared = [o for o in base_overrides if o.startswith(("model", "data", "train.max_length"))]
    monitor = [
        "method.step_tokens=5",
        'method.delimiters=["\n"]',
        "method.marker='#'",
        "method.epsilon=0.015",
        "method.theta=0",
    ]
    size = ["rollout.examples=7", "rollout.samples=2", "rollout.max_new_tokens=24", "rollout.slots=2"]
    return [*shared, *monitor, *size, f"run.dir={tmp_path}/run"]


def made(me: Rank, overrides: list[str], file_size_limit: int | None = None) -> Any:
    """The summary, or the message with which the run stops; rank 0 may write no file above the limit, as on a full disk."""
    from distill.errors import DistillError
    from distill.rollout import load_rollout_config, rollout

    me.init("ncclx")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_size_limit is not None and me.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size_limit, before[1]))
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):  # files here, too
            return rollout(*load_rollout_config(overrides))
    except DistillError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def essence(folder: Path) -> list[Any]:
    """What must be the same on any number of ranks: all but figures in their last digits."""
    return [
        (r["item"], r["sample"], r["ids"], r["response"], r["takeovers"], r["correct"], r["finish"])
        for r in records(folder)
    ]


@pytest.mark.dist
def test_a_run_killed_half_way_goes_on_with_what_is_missing(
    overrides: list[str], one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    whole = [*overrides, f"run.dir={tmp_path}/whole", "rollout.examples=40"]
    summary = one_rank.run(made, whole)[0]
    assert (summary["records"], summary["skipped"]) == (80, 0)
    assert 0.0 < summary["breach"] < 1.0

    killed = [*overrides, "rollout.examples=40"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("ab") as log:
        job = subprocess.Popen(
            [sys.executable, "-m", "distill.rollout", *killed], stdout=log, stderr=log, env=environment
        )
    part, deadline = tmp_path / "run" / "parts" / "rank_00000.jsonl", time.monotonic() + 200
    while not (part.exists() and part.read_bytes().count(b"\n") >= 3):
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    there = part.read_bytes().count(b"\n")
    assert 3 <= there < 80
    with part.open("ab") as file:
        file.write(b'{"item": 39, "sample": 1, "ids": [4, 5')  # a write that did not come to its end
    again = two_ranks.run(made, killed)
    assert again[0] == again[1]
    assert again[0]["records"] == 80
    assert essence(tmp_path / "run") == essence(tmp_path / "whole")
    assert not (tmp_path / "run" / "parts").exists()
    content = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert two_ranks.run(made, killed)[0]["records"] == 80  # nothing is missing, nothing is made
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == content
    # More samples later add to what is there.
    assert one_rank.run(made, [*killed, "rollout.samples=3"])[0]["records"] == 120
    kept = [line for line in essence(tmp_path / "run") if line[1] < 2]
    assert kept == essence(tmp_path / "whole")


@pytest.mark.dist
def test_records_are_training_data(overrides: list[str], one_rank: RankPool, tmp_path: Path) -> None:
    summary = one_rank.run(made, [*overrides, "method.mask_flawed=true"])[0]
    lines = records(tmp_path / "run")
    assert [(r["item"], r["sample"]) for r in lines] == [(i, s) for i in range(7) for s in range(2)]
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary

    from transformers import AutoTokenizer

    from distill.data import build_task, data_config
    from distill.data.tokenize import encode_example, encode_prompt

    path = next(o for o in overrides if o.startswith("model.student.path")).partition("=")[2]
    tokenizer = AutoTokenizer.from_pretrained(path)
    file = {"name": "jsonl", "path": str(tmp_path / "run" / "records.jsonl"), "test_fraction": 0.0}
    task, exact = (build_task(data_config({**file, "ids_key": key}), "train") for key in (None, "ids"))
    source = build_task(data_config({"name": "running_sum", "min_terms": 2, "max_terms": 6}), "train")
    assert len(task) == 14
    for position, line in enumerate(lines):
        example = task[position]
        assert (example.prompt, example.answer) == (source[line["item"]].prompt, source[line["item"]].answer)
        assert example.reference == line["response"]
        prompt = encode_prompt(tokenizer, example)
        assert line["ids"][: line["prompt_length"]] == prompt
        response = line["ids"][len(prompt) :]
        assert tokenizer.decode(response, skip_special_tokens=True) == line["response"]
        trained = encode_example(tokenizer, exact[position], 64)
        assert (trained.ids, trained.prompt_length) == (line["ids"], line["prompt_length"])
        assert trained.supervised == (line["supervised"] and [flag == 1 for flag in line["supervised"]])
        assert len(line["supervised"] or response) == len(response)
        flawed = line["breach"] and line["steps"][-1]["text"] != tokenizer.eos_token
        assert (line["supervised"] is not None) == flawed
        assert line["breach"] == bool(line["takeovers"])
        assert line["breach"] == any(step["breach"] for step in line["steps"])
        assert all(step["boundary"] == 0.015 for step in line["steps"])
        texts = [tokenizer(step["text"], add_special_tokens=False)["input_ids"] for step in line["steps"]]
        assert line["student_tokens"] == sum(map(len, texts))
    steps = [step for line in lines for step in line["steps"]]
    assert summary["value"] == pytest.approx(sum(step["value"] for step in steps) / len(steps), abs=1e-6)
    assert summary["breach"] == pytest.approx(sum(line["breach"] for line in lines) / 14, abs=1e-6)


@pytest.mark.dist
def test_full_disk_and_spoilt_files_are_one_message(overrides: list[str], two_ranks: RankPool, tmp_path: Path) -> None:
    messages = two_ranks.run(made, overrides, 2500)
    assert messages[0] == messages[1]
    assert "rank_00000.jsonl could not be written (File too large)" in messages[0]
    assert "run the same command again" in messages[0]
    assert two_ranks.run(made, overrides)[0]["records"] == 14  # the half-written line was removed
    path = tmp_path / "run" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], "oops\n", *lines[5:]]))
    for message in two_ranks.run(made, overrides):
        assert f"{path}:5: not a record; remove this line" in message
    for message in two_ranks.run(made, [*overrides, "method.epsilon=0.3"]):
        assert "was started with another configuration (method.epsilon: 0.015 there, 0.3 now)" in message


@pytest.mark.dist
def test_mistakes(overrides: list[str], one_rank: RankPool, tmp_path: Path) -> None:
    assert (
        "method=sft makes no text of its own; add --save"
        in one_rank.run(made, [*(o for o in overrides if not o.startswith("method")), "method=sft"])[0]
    )
    (message,) = one_rank.run(made, [*overrides, "model.teacher.path=null"])
    assert "method=motab needs a teacher" in message
    (message,) = one_rank.run(made, [*overrides, "method.marker='However,'"])
    assert "method.marker='However,' cannot be written with this tokenizer" in message
    assert not (tmp_path / "run").exists()  # nothing half-written
    (message,) = one_rank.run(made, [*overrides, "train.max_length=6"])
    assert "its prompt alone has" in message
    skipping = one_rank.run(made, [*overrides, f"run.dir={tmp_path}/skip", "train.max_length=9", "data.on_long=skip"])[
        0
    ]
    assert skipping["skipped"] > 0
    assert skipping["skipped"] + skipping["records"] == 14


@pytest.mark.unit
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("rollout.samples=0", ["rollout.samples=0", "at least 1"]),
        ("rollout.split=dev", ["rollout.split=dev", "train, test"]),
        ("rollout.sampels=3", ["rollout.sampels", "did you mean 'rollout.samples'"]),
        ("rollout.top_p=2", ["rollout.top_p=2"]),
    ],
)
def test_configuration_mistakes(change: str, words: list[str]) -> None:
    from distill.rollout import load_rollout_config

    with pytest.raises(ConfigError) as caught:
        load_rollout_config([change])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.unit
def test_a_file_cut_at_any_byte_loses_its_last_record_at_most(tmp_path: Path) -> None:
    lines = [
        json.dumps({"item": i, "sample": 0, "text": "ü" * i}, ensure_ascii=False).encode() + b"\n" for i in range(4)
    ]
    content = b"".join(lines)
    for cut in range(len(content) + 1):
        folder = RecordFolder(tmp_path / str(cut))
        folder.recover()
        (folder.parts / "rank_00003.jsonl").write_bytes(content[:cut])
        complete = content[:cut].count(b"\n")
        assert folder.recover() == {(i, 0) for i in range(complete)}
        with folder.open_part(0) as part, folder.open_part(3) as other:
            for i in range(complete, 4):
                (part if i % 2 else other).write(json.loads(lines[i]))
        folder.merge()
        assert folder.merged.read_bytes() == content
        assert not folder.parts.exists()


@pytest.mark.unit
def test_a_crash_between_merging_and_clearing_repeats_nothing(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path)
    folder.recover()
    with folder.open_part(0) as part:
        part.write({"item": 1, "sample": 0})
        part.write({"item": 0, "sample": 1})
    left = (folder.parts / "rank_00000.jsonl").read_bytes()
    folder.merge()
    folder.parts.mkdir()
    (folder.parts / "rank_00000.jsonl").write_bytes(left)
    assert folder.recover() == {(1, 0), (0, 1)}
    folder.merge()
    assert [(r["item"], r["sample"]) for r in folder.read()] == [(0, 1), (1, 0)]


@pytest.mark.unit
def test_a_spoilt_line_in_the_middle_is_named(tmp_path: Path) -> None:
    folder = RecordFolder(tmp_path)
    folder.recover()
    (folder.parts / "rank_00000.jsonl").write_text('{"item": 0, "sample": 0}\n{"item": 1}\n{"item": 2, "sample": 0}\n')
    with pytest.raises(CheckpointError, match=r"rank_00000.jsonl:2: not a record"):
        folder.recover()

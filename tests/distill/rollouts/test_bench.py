"""The benchmark's own claims: exact response lengths, equal tokens, a table and a JSON file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distill.rollouts import bench

pytestmark = pytest.mark.unit

SMALL = [
    "--repeats",
    "1",
    "--slots",
    "4",
    "--shortest",
    "2",
    "--longest",
    "12",
    "--hidden",
    "32",
    "--layers",
    "1",
    "--vocabulary",
    "40",
]


def test_countdown_lengths_are_what_was_asked_for() -> None:
    model = bench.countdown_model(64, 2, 100)
    prompts = bench.countdown_prompts(9, (2, 50), 100)
    responses = bench.run_hf(model, prompts, 9, 60, 0.0)
    assert sorted(map(len, responses)) == [2, 8, 14, 20, 26, 32, 38, 44, 50]
    for prompt, response in zip(prompts, responses):
        assert response == [*range(prompt[-1] - 1, bench.FIRST - 1, -1), bench.EOS]


def test_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    threads = torch.get_num_threads()
    try:
        results = bench.main([*SMALL, "--json", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(threads)
    assert [r.tokens for r in results] == [28, 28, 112, 24]
    printed = capsys.readouterr().out
    assert all(r.scenario in printed for r in results)
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["settings"]["slots"] == 4
    assert [r["ratio"] for r in stored["results"]] == [r.ratio for r in results]


def test_too_small_a_vocabulary_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--vocabulary", "100"])
    assert "--vocabulary must be at least 258" in capsys.readouterr().err


def test_monitored_rollouts_beside_their_unavoidable_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from distill.rollouts import bench_monitored

    small = [
        "--repeats",
        "1",
        "--slots",
        "4",
        "--prompts",
        "10",
        "--shortest",
        "4",
        "--longest",
        "40",
        "--vocabulary",
        "64",
    ]
    sizes = ["--hidden", "32", "--layers", "1", "--teacher-hidden", "32", "--teacher-layers", "1", "--skips", "12"]
    threads = torch.get_num_threads()
    try:
        strict, lenient = bench_monitored.main([*small, *sizes, "--json", str(tmp_path / "out.json")])
    finally:
        torch.set_num_threads(threads)
    assert 0.0 < strict.breach_rate < 1.0
    assert strict.teacher_tokens > 0
    assert (lenient.breach_rate, lenient.teacher_tokens) == (0.0, 0)
    assert lenient.student_tokens == sum(4 + round(i * 36 / 9) for i in range(10))  # the countdowns, to their end
    assert strict.scenario in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["ratio"] == strict.ratio

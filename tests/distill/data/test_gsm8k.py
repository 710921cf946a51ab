"""data=gsm8k: parsing on lines of our own, and on the real files where they are."""

import json
import os
from pathlib import Path

import pytest

from distill.data import build_task, data_config
from distill.data.lines import BadLine

pytestmark = pytest.mark.unit

REAL = Path(os.environ.get("DISTILL_GSM8K", Path(__file__).parents[4] / "shared" / "data" / "gsm8k"))
needs_real = pytest.mark.skipif(
    not (REAL / "test.jsonl").is_file(), reason=f"GSM8K data not found in {REAL}; set DISTILL_GSM8K"
)


def make(tmp_path, *answers, split="train", **options):
    lines = [json.dumps({"question": f" Why {i}? ", "answer": answer}) for i, answer in enumerate(answers)]
    (tmp_path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return build_task(data_config({"name": "gsm8k", "path": str(tmp_path), **options}), split)


def test_marks_are_removed_and_answers_parsed(tmp_path):
    task = make(tmp_path, "2 * 3 = <<2*3=6>>6.\nSo $<<6*500=3000>>3,000\n#### 3,000", "x\n#### -1.50", "y\n####$7")
    assert task[0].prompt == "Why 0?\n"
    assert task[0].reference == "2 * 3 = 6.\nSo $3,000\n#### 3000"
    assert [task[i].answer for i in range(3)] == ["3000", "-1.50", "7"]
    assert task[1].id == "gsm8k/train/2"
    assert all(task.verify(task[i], task[i].reference).correct for i in range(3))


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("#### 3,000", True),
        ("so\n#### $3000.00<eos>", True),
        ("#### 3000 clips", True),
        ("#### 3000\n\nWhy 1?\n#### 5", True),  # rambles on into a problem of its own
        ("#### 5\n#### 3000", False),
        ("\\boxed{1}, no, \\boxed{3000}", True),
        ("The answer is 3000 dollars.", True),
        ("it costs 3000", True),
        ("#### -3000", False),
        ("#### 3000 - 1", False),
        ("####", False),
        ("", False),
    ],
)
def test_verifier(tmp_path, response, correct):
    task = make(tmp_path, "x\n#### 3,000")
    assert task.verify(task[0], response).correct is correct
    assert task.verify(task[0], response).exact_chain is None


def test_the_fallback_can_be_switched_off(tmp_path):
    task = make(tmp_path, "x\n#### 3", answer_fallback="none")
    assert not task.verify(task[0], "it costs 3").correct
    assert task.verify(task[0], "#### 3").correct


def test_chat_and_template(tmp_path):
    task = make(tmp_path, "x\n#### 3", template="Q: {question}\nA: {x}", chat=True)
    assert task[0].prompt == [{"role": "user", "content": "Q: Why 0?\nA: {x}"}]


def test_bad_input(tmp_path):
    with pytest.raises(BadLine, match=r"train\.jsonl:2: the answer does not end in '#### ' and a number"):
        make(tmp_path, "x\n#### 3", "x\n#### three")
    assert len(make(tmp_path, "x\n#### 3", "x", on_bad="skip")) == 1
    (tmp_path / "test.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(BadLine, match=r"test\.jsonl:1: no key 'answer'; the keys are 'question'"):
        build_task(data_config({"name": "gsm8k", "path": str(tmp_path)}), "test")
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*train\.jsonl and test\.jsonl"):
        build_task(data_config({"name": "gsm8k", "path": str(tmp_path / "none")}), "test")


@needs_real
@pytest.mark.parametrize(("split", "size"), [("train", 7473), ("test", 1319)])
def test_every_real_line_parses_and_its_reference_verifies(split, size):
    task = build_task(data_config({"name": "gsm8k", "path": str(REAL)}), split)
    assert len(task) == size
    for index in range(0, size, 7):
        example = task[index]
        assert "<<" not in example.reference
        assert example.reference.endswith(f"\n#### {example.answer}")
        assert task.verify(example, example.reference).correct
        assert not task.verify(example, example.reference + "1").correct

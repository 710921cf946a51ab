"""data=jsonl: prompts, chats, answers, splits, and lines that cannot be used."""

import json
import re

import pytest

from distill.data import (
    CannotEncode,
    DataConfigError,
    NoAnswer,
    TooLong,
    bpe_tokenizer,
    build_task,
    data_config,
    encode_example,
)
from distill.data.lines import BadLine, EmptyDataset

pytestmark = pytest.mark.unit


def make(tmp_path, records, split="train", **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return build_task(data_config({"name": "jsonl", "path": str(path), "test_fraction": 0.0, **options}), split)


USER = {"role": "user", "content": "6 times 7?"}
ASSISTANT = {"role": "assistant", "content": "It is \\boxed{42}."}


def test_prompt_and_response(tmp_path):
    task = make(tmp_path, [{"prompt": "6*7=", "response": "6*7=42\n#### 42", "answer": 42, "topic": "times"}])
    example = task[0]
    assert (example.prompt, example.reference, example.answer) == ("6*7=", "6*7=42\n#### 42", "42")
    assert example.id == f"{tmp_path}/data.jsonl:1"
    assert example.metadata == {"topic": "times"}
    assert task.verify(example, "well, 42.0").correct
    assert not task.verify(example, "#### 41").correct


def test_chats(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    task = make(
        tmp_path,
        [
            {"messages": [system, USER, ASSISTANT]},
            {"messages": [USER, ASSISTANT, USER]},
            {"prompt": [USER], "response": "42"},
            {"messages": [USER], "response": "42"},
        ],
    )
    assert [len(task[i].prompt) for i in range(4)] == [2, 3, 1, 1]
    assert [task[i].reference for i in range(4)] == [ASSISTANT["content"], None, "42", "42"]
    assert [task[i].answer for i in range(4)] == ["42", None, None, None]
    with pytest.raises(NoAnswer, match=r"data\.jsonl:2"):
        task.verify(task[1], "42")


def test_a_chat_reaches_the_model_through_the_template(tmp_path):
    tokenizer = bpe_tokenizer(["abc"], 258)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    task = make(tmp_path, [{"messages": [USER, ASSISTANT]}])
    ids = encode_example(tokenizer, task[0], 100).ids
    assert tokenizer.decode(ids) == "<user>6 times 7?<assistant>It is \\boxed{42}.<eos>"


def test_other_key_names(tmp_path):
    keys = {"prompt_key": "q", "response_key": "solution", "answer_key": "gold"}
    task = make(tmp_path, [{"q": "1+1", "solution": "two", "gold": "2"}], **keys)
    assert (task[0].prompt, task[0].reference, task[0].answer) == ("1+1", "two", "2")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "?"}, "no key 'prompt' or 'messages'; the keys are 'question'"),
        ({}, "the keys are none"),
        ({"prompt": 5}, "prompt must be text, got int"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "x", "response": ["y"]}, "response must be text, got list"),
        ({"prompt": "x", "response": ""}, "response is empty"),
        ({"prompt": "x", "answer": True}, "answer must be text, got bool"),
        ({"messages": []}, "an empty list"),
        ({"messages": "hi"}, "must be a list of messages, got str"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content must be text, got NoneType"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"messages\[0\]\.content must be text, got list"),
        ({"messages": [ASSISTANT]}, "no turn of the user"),
        ({"messages": [{"role": "system", "content": "x"}, ASSISTANT]}, "no turn of the user"),
        ({"messages": [USER, ASSISTANT], "response": "x"}, "two responses"),
        ({"prompt": [USER, ASSISTANT]}, "nothing is left to answer"),
        ('{"prompt": "caf\\ud83d"}', "lone surrogate"),
        ("{broken", "invalid JSON"),
    ],
)
def test_bad_lines_name_file_line_and_reason_or_are_skipped(tmp_path, record, reason):
    good = {"prompt": "x", "response": "y"}
    with pytest.raises(BadLine, match=rf"data\.jsonl:2: .*{reason}"):
        make(tmp_path, [good, record])
    task = make(tmp_path, [good, record, good], on_bad="skip")
    assert [task[i].id.rpartition(":")[2] for i in range(len(task))] == ["1", "3"]
    assert (task.skipped_count, [e.number for e in task.skipped]) == (1, [2])


def test_held_out_lines_are_apart_and_equal_lines_stay_together(tmp_path):
    records = [{"prompt": f"p{i % 300}", "response": "r"} for i in range(600)]
    train = make(tmp_path, records, "train", test_fraction=0.2)
    test = build_task(train.config, "test")
    texts = [{task[i].prompt for i in range(len(task))} for task in (train, test)]
    assert len(train) + len(test) == 600
    assert 70 < len(test) < 170
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 300


def test_a_test_file_of_its_own(tmp_path):
    other = tmp_path / "test.jsonl"
    other.write_text('{"prompt": "t", "response": "u"}\n')
    records = [{"prompt": f"p{i}"} for i in range(20)]
    options = {"test_path": str(other), "test_fraction": 0.5}
    assert len(make(tmp_path, records, "train", **options)) == 20
    assert make(tmp_path, records, "test", **options)[0].prompt == "t"


def test_no_test_split_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(DataConfigError, match=r"data\.test_fraction=0\.0.*data\.test_path"):
        make(tmp_path, [{"prompt": "x"}], "test")
    with pytest.raises(EmptyDataset, match=r"test split: change data\.test_fraction"):
        make(tmp_path, [{"prompt": "x"}], "test", test_fraction=0.01)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        build_task(data_config({"name": "jsonl", "path": str(tmp_path / "nowhere.jsonl")}), "train")


def test_token_ids_are_trained_on_as_they_stand(tmp_path):
    tokenizer = bpe_tokenizer(["abc"], 258)
    record = {"prompt": "p", "response": "r", "ids": [5, 6, 7, 8, 9], "prompt_length": 2, "supervised": [0, 1, 1]}
    example = make(tmp_path, [record], ids_key="ids")[0]
    assert (example.prompt, example.reference, example.metadata) == ("p", "r", {})
    whole, cut = (encode_example(tokenizer, example, size, "truncate") for size in (9, 4))
    assert (whole.ids, whole.prompt_length, whole.supervised) == ([5, 6, 7, 8, 9], 2, [False, True, True])
    assert (cut.ids, cut.supervised) == ([5, 6, 7, 8], [False, True])
    with pytest.raises(TooLong, match="5 tokens, the limit is 4"):
        encode_example(tokenizer, example, 4)
    with pytest.raises(CannotEncode, match=r"token id 900 is beyond the tokenizer's 258.*data.ids_key=null"):
        encode_example(tokenizer, make(tmp_path, [{**record, "ids": [5, 6, 7, 8, 900]}], ids_key="ids")[0], 9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": None}, "ids must be a list of token ids"),
        ({"ids": [5, 6, True, 8, 9]}, "ids must be a list of token ids"),
        ({"ids": [5, 6, -7, 8, 9]}, "ids must be a list of token ids"),
        ({"prompt_length": 5}, "prompt_length=5 must lie between 0 and the 5 tokens"),
        ({"prompt_length": None}, "prompt_length=None"),
        ({"supervised": [1, 1]}, "a 0 or 1 for each of the 3 response tokens"),
        ({"supervised": [1, 1, 2]}, "a 0 or 1 for each"),
    ],
)
def test_token_ids_that_cannot_be_used(tmp_path, change, words):
    record = {"prompt": "p", "ids": [5, 6, 7, 8, 9], "prompt_length": 2, "supervised": None}
    with pytest.raises(BadLine, match=r"data\.jsonl:1: .*" + re.escape(words)):
        make(tmp_path, [{**record, **change}], ids_key="ids")

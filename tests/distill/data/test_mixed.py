"""Mixed data: exact shares, nothing twice, each sample judged by its own part."""

from __future__ import annotations

from typing import Any

import pytest

from distill.data import DataConfigError, build_task, data_config

pytestmark = pytest.mark.unit

SUMS = {"name": "running_sum", "min_terms": 3, "max_terms": 3, "train_size": 20, "test_size": 5}
START = {"name": "missing_start", "train_size": 100, "test_size": 100}


def mixed(split: Any = "train", **parts: Any) -> Any:
    return build_task(data_config({"name": "mixed", "parts": parts}), split)


@pytest.mark.parametrize("shares", [(1, 1), (2, 3), (5, 1), (1, 0)])
def test_shares_are_exact_and_nothing_comes_twice(shares: tuple[int, int]) -> None:
    task = mixed(a={**SUMS, "share": shares[0]}, b={**START, "share": shares[1]})
    examples = [task[i] for i in range(len(task))]
    rounds = min(size // share for size, share in zip((20, 100), shares) if share)
    assert len(task) == rounds * sum(shares)
    assert [sum(e.metadata["part"] == p for e in examples) for p in "ab"] == [rounds * share for share in shares]
    assert len({e.id for e in examples}) == len(examples)
    for start in range(0, len(task), sum(shares)):  # in every round
        names = [e.metadata["part"] for e in examples[start : start + sum(shares)]]
        assert [names.count(p) for p in "ab"] == list(shares)
    with pytest.raises(IndexError):
        task[len(task)]


def test_a_sample_is_its_parts_own() -> None:
    task = mixed(a=SUMS, b=START)
    parts = {"a": build_task(data_config(SUMS), "train"), "b": build_task(data_config(START), "train")}
    for index in range(10):
        example = task[index]
        own = parts[example.metadata["part"]][index // 2]
        assert (example.id, example.prompt, example.reference) == (own.id, own.prompt, own.reference)
        right = "\n".join(own.metadata["lines"])
        assert task.verify(example, right).correct
        assert not task.verify(example, right + "1").correct
    assert set(task.alphabet) == set(parts["a"].alphabet) | set(parts["b"].alphabet)
    assert not {task[i].prompt for i in range(len(task))} & {
        e.prompt for e in map(mixed("test", a=SUMS, b=START).__getitem__, range(10))
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "data.parts={} is not valid: data=mixed needs at least one"),
        ({"a": 3}, "data.parts.a=3"),
        ({"a": {**SUMS, "share": 0.5}}, "data.parts.a.share=0.5 is not valid: a whole number"),
        ({"a": {**SUMS, "share": 0}}, "every share is 0"),
        ({"a": {**SUMS, "terms": 3}}, "data.terms=3 is not valid: data=running_sum has no such key"),
        ({"a": {"name": "mixed", "parts": {}}}, "data.parts.a.name='mixed'"),
    ],
)
def test_what_cannot_be_mixed(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(DataConfigError) as caught:
        data_config({"name": "mixed", "parts": parts})
    assert message in str(caught.value)


def test_a_part_too_small_for_its_share_is_named() -> None:
    with pytest.raises(DataConfigError, match=r"data.parts.a.share=9 is not valid: the test split has 5 examples"):
        mixed("test", a={**SUMS, "share": 9}, b=START)

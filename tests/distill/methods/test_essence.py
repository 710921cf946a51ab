"""Essence: sections found in token ids, the share that counts, and the mixed loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.data import TokenSequence, bpe_tokenizer, char_tokenizer
from distill.errors import ConfigError
from distill.methods import Source, Targets, build_method
from distill.methods.essence import answer_begins, share_of

pytestmark = pytest.mark.unit

CHARACTERS = char_tokenizer("0123456789+-=\n#")


def sequence(prompt: str, response: str, tokenizer: Any = CHARACTERS, **fields: Any) -> TokenSequence:
    first, second = (tokenizer(text)["input_ids"] for text in (prompt, response))
    return TokenSequence(first + second, len(first), "x/1", **fields)


def counted(made: TokenSequence, tokenizer: Any = CHARACTERS) -> str:
    """The text of the tokens that a loss looks at."""
    assert made.supervised is not None
    kept = [token for token, flag in zip(made.response_ids, made.supervised, strict=True) if flag]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize(
    ("options", "expected", "cut"),
    [
        ({"fraction": 1.0}, "1\n2\n#2", ""),
        ({"fraction": 1.0, "sections": ["thought"]}, "1\n2\n", "#2"),
        ({"fraction": 1.0, "sections": ["answer"]}, "#2", ""),
        ({"fraction": 1.0, "sections": ["prompt", "answer"]}, "+1=\n#2", ""),
        ({"fraction": 0.5}, "1\n2", "\n#2"),
        ({"fraction": 0.5, "side": "middle"}, "\n2\n", "#2"),
        ({"fraction": 0.5, "side": "right"}, "\n#2", ""),
        ({"fraction": 0.01}, "1", "\n2\n#2"),
        ({"fraction": 0.6, "sections": ["prompt", "thought", "answer"]}, "+1=\n1", "\n2\n#2"),
        ({"fraction": 0.6, "of": "sequence"}, "1", "\n2\n#2"),
        ({"fraction": 0.2, "of": "sequence"}, "", "1\n2\n#2"),
    ],
)
def test_what_counts(options: dict[str, Any], expected: str, cut: str) -> None:
    """Prompt "1+1=\\n" (5 tokens), thought "1\\n2\\n" (4), answer "#2" (2); what follows the last counted token is gone."""
    method = build_method({"name": "essence", "answer_start": "#", **options})
    whole = sequence("1+1=\n", "1\n2\n#2")
    made = method.supervise(whole, CHARACTERS)
    assert counted(made) == expected
    assert made.ids == whole.ids[: len(whole.ids) - len(cut)]
    assert made.notes["essence_marked"] == 1.0


def test_a_tag_closes_the_thought_and_belongs_to_it() -> None:
    text = "so <think>two and two</think>\n\nfour"
    tokenizer = bpe_tokenizer([text, "think"] * 4, 300)  # merges run across the tag's characters
    ids = tokenizer(text)["input_ids"]
    split, marked = answer_begins(tokenizer, ids, None, "</think>")
    assert marked
    assert tokenizer.decode(ids[:split]).rstrip("\n") == "so <think>two and two</think>"
    assert len(tokenizer.decode(ids[: split - 1])) < text.index("</think>") + len("</think>")


def test_the_token_that_holds_the_mark_opens_the_answer() -> None:
    tokenizer = bpe_tokenizer(["a\n#7", "b\n#8", "c\n#9"] * 10, 270)
    ids = tokenizer("a\n#7")["input_ids"]
    split, _ = answer_begins(tokenizer, ids, "#", "")
    assert tokenizer.decode(ids[:split]) in ("a", "a\n")
    assert tokenizer.decode(ids[split:]).lstrip("\n").startswith("#")


def test_a_response_without_the_mark_is_all_thought() -> None:
    method = build_method({"name": "essence", "answer_start": "#", "sections": ["thought"], "fraction": 1.0})
    made = method.supervise(sequence("1+1=\n", "1\n2\n"), CHARACTERS)
    assert counted(made) == "1\n2\n"
    assert made.notes["essence_marked"] == 0.0
    answers = build_method({"name": "essence", "answer_start": "#", "sections": ["answer"]})
    nothing = answers.supervise(sequence("1+1=\n", "1\n2\n"), CHARACTERS)
    assert counted(nothing) == ""
    assert nothing.prompt_length == len(nothing.ids) == 5
    empty = method.supervise(sequence("1+1=\n", ""), CHARACTERS)
    assert counted(empty) == ""


def test_what_is_known_of_the_text_stays() -> None:
    whole = sequence("1=\n", "1\n#1", logprobs=[-0.1, -0.2, -0.3, -0.4], sample=7, correct=1.0, notes={"other": 2.0})
    made = build_method({"name": "essence", "answer_start": "#"}).supervise(whole, CHARACTERS)
    assert (made.logprobs, made.sample, made.correct, made.notes["other"]) == ([-0.1, -0.2], 7, 1.0, 2.0)
    assert made.notes["essence_kept"] == pytest.approx(2 / 7)


def test_windows() -> None:
    chosen = [False, True, True, False, True, True, True]
    assert share_of(chosen, 0.4, "left", False) == [False, True, True, False, False, False, False]
    assert share_of(chosen, 0.4, "right", False) == [False, False, False, False, False, True, True]
    assert share_of(chosen, 0.4, "middle", False) == [False, False, True, False, True, False, False]
    assert share_of([False, True, True, False, True], 0.8, "left", True) == [False, True, True, False, False]
    assert share_of([False] * 3, 0.5, "middle", False) == [False] * 3
    assert share_of([], 0.5, "right", False) == []
    assert share_of([], 0.5, "right", True) == []


def test_mixed_loss_and_gradient(make_targets: Callable[..., Targets], check_against: Callable[..., None]) -> None:
    example = make_targets()
    assert example.teacher_logits is not None
    logp = example.teacher_logits[:, :11].double().log_softmax(-1)

    def oracle(student: Tensor) -> Tensor:
        logq = student.log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        return 0.3 * kl - 0.7 * logq[torch.arange(7), example.token_ids]

    check_against(build_method({"name": "essence", "distill_ratio": 0.3}), example, oracle)


def test_pure_forms_and_any_divergence(
    make_targets: Callable[..., Targets], check_empty: Callable[[Any], None]
) -> None:
    likelihood = build_method({"name": "essence", "distill_ratio": 0.0})
    assert likelihood.needs == frozenset()
    expected = build_method({"name": "sft"}).token_losses(make_targets()).loss
    assert torch.equal(likelihood.token_losses(make_targets(teacher_logits=None)).loss, expected)
    reverse = build_method(
        {"name": "essence", "distill_ratio": 1.0, "text": "student", "divergence": {"kind": "reverse_kl"}}
    )
    assert reverse.uses() == {Source.STUDENT}
    expected = build_method({"name": "on_policy"}).token_losses(make_targets()).loss
    assert torch.equal(reverse.token_losses(make_targets()).loss, expected)
    check_empty(build_method({"name": "essence"}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sections": ["cot"]}, "prompt, thought, answer"),
        ({"sections": []}, "must name a section"),
        ({"fraction": 0.0}, "0.0"),
    ],
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_method({"name": "essence", **options})

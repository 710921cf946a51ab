"""Sessions: any sequence of operations must leave the logits that a plain forward over the same tokens gives."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from distill.rollouts.flight import Flight
from distill.rollouts.sampling import SamplingParams
from distill.rollouts.session import Session

pytestmark = pytest.mark.unit


@torch.no_grad()
def plain(model: Any, ids: list[int]) -> torch.Tensor:
    """Oracle: logits [len(ids), V] of one uncached forward."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)


def random_ids(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(3, 61) for _ in range(rng.randrange(low, high))]


class Script:
    """Random operations on a session, mirrored in plain lists."""

    def __init__(self, model: Any, lean: bool, seed: int) -> None:
        self.model, self.rng = model, random.Random(seed)
        self.session = Session(model, slots=6, lean=lean)
        self.mirror: dict[int, list[int]] = {}

    def some(self, least: int = 1) -> list[int]:
        rows = list(self.mirror)
        self.rng.shuffle(rows)
        return rows[: self.rng.randrange(least, len(rows) + 1)]

    def open(self) -> None:
        prompts = [random_ids(self.rng, 1, 12) for _ in range(self.rng.randrange(1, max(self.session.free, 1) + 1))]
        self.mirror.update(zip(self.session.open(prompts[: self.session.free]), prompts))

    def append(self) -> None:
        rows = self.some()
        new = [random_ids(self.rng, 0, 4) for _ in rows]
        self.session.append(rows, new)
        for row, ids in zip(rows, new):
            self.mirror[row] = self.mirror[row] + ids

    def score(self) -> None:
        rows = self.some()
        new = [random_ids(self.rng, 0, 6) for _ in rows]
        for row, ids, logits in zip(rows, new, self.session.score(rows, new)):
            before = len(self.mirror[row])
            self.mirror[row] = self.mirror[row] + ids
            close(logits, plain(self.model, self.mirror[row])[before - 1 :])

    def next_logits(self) -> None:
        rows = self.some()
        for row, logits in zip(rows, self.session.next_logits(rows)):
            close(logits, plain(self.model, self.mirror[row])[-1])

    def rewind(self) -> None:
        row = self.rng.choice(list(self.mirror))
        length = self.rng.randrange(1, len(self.mirror[row]) + 1)
        self.session.rewind(row, length)
        self.mirror[row] = self.mirror[row][:length]

    def fork(self) -> None:
        if self.session.free:
            row = self.rng.choice(list(self.mirror))
            self.mirror.update(dict.fromkeys(self.session.fork(row, 1), self.mirror[row]))

    def close(self) -> None:
        rows = self.some()[:2]
        self.session.close(rows)
        for row in rows:
            del self.mirror[row]

    def run(self, steps: int) -> None:
        moves = ["append", "score", "score", "next_logits", "next_logits", "rewind", "rewind", "fork", "close"]
        for _ in range(steps):
            if not self.mirror:
                self.open()
            if max(map(len, self.mirror.values())) > 70:
                self.close()
                continue
            getattr(self, self.rng.choice([*moves, *(["open"] if self.session.free else [])]))()
            assert {row: self.session.tokens(row) for row in self.mirror} == self.mirror


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_any_sequence_of_operations_gives_the_logits_of_a_plain_forward(tiny: Any, name: str, lean: bool) -> None:
    model = tiny(name)
    for seed in range(3):
        Script(model, lean, seed).run(60)


def test_long_prompts_are_prefilled_in_pieces(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.rollouts.session._PREFILL_TOKENS", 16)
    model, rng = tiny(), random.Random(0)
    prompts = [random_ids(rng, size, size + 1) for size in (50, 3, 17, 16, 1, 33)]
    session = Session(model, slots=6)
    for ids, logits in zip(prompts, session.next_logits(session.open(prompts))):
        close(logits, plain(model, ids)[-1])
    other = Session(model, slots=6)
    for ids, logits in zip(prompts, other.score(other.open([[]] * 6), prompts)):
        close(logits, plain(model, ids))


def test_rewinding_feeds_no_token_of_the_prefix_again(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tiny(), slots=2)
    (row, other) = session.open([list(range(3, 43)), list(range(3, 23))])
    session.next_logits([row, other])
    fed: list[int] = []
    forward = session._forward

    def counting(chunk: Any, cache: Any, *, logits: bool) -> Any:
        fed.append(len(chunk.ids))
        return forward(chunk, cache, logits=logits)

    monkeypatch.setattr(session, "_forward", counting)
    session.rewind(row, 30)
    session.next_logits([row])
    assert fed == [1]  # only the last remaining token, whose logits are wanted
    session.score([row], [[7, 8, 9]])
    assert fed == [1, 4]  # the three new ones and their predecessor


def test_rewound_rows_decode_as_fresh_ones(tiny: Any) -> None:
    model, params = tiny("llama"), SamplingParams(max_new_tokens=12, temperature=1.0)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [4]]

    def decode(session: Session, rows: list[int]) -> dict[int, list[int]]:
        flight = Flight(session, params, [0])
        flight.add(rows, seeds=rows)
        ended: dict[int, list[int]] = {}
        while flight:
            ended.update({segment.row: segment.ids for segment in flight.step()})
        return ended

    session = Session(model, slots=4)
    rows = session.open(prompts)
    first = decode(session, rows)
    kept = {row: prompt + first[row][:3] for row, prompt in zip(rows, prompts)}
    for row in rows:
        session.rewind(row, len(kept[row]))
    again = decode(session, rows)
    fresh_session = Session(model, slots=4)
    fresh = decode(fresh_session, fresh_session.open(list(kept.values())))
    assert again == fresh
    # The same seed and positions: the new suffix starts as the old one went on.
    for row in rows:
        assert again[row][: len(first[row]) - 3] == first[row][3:]


def test_step_wise_decoding_with_a_teacher_cache(tiny: Any, text_tokenizers: Any) -> None:
    """The shape of MOTAB: the student decodes to a delimiter, the teacher's cache is fed only the new tokens."""
    from distill.rollouts.stops import StopMatcher

    tokenizer = text_tokenizers["byte_level"]
    size = len(tokenizer)
    student, teacher = tiny(vocab_size=size, seed=1), tiny("llama", vocab_size=size, seed=2)
    params = SamplingParams(max_new_tokens=8, temperature=1.0, stop=("e", " "))
    prompts = [tokenizer.encode(text) for text in ("First", "the answer is", "Third step")]
    ours, theirs = Session(student, slots=3), Session(teacher, slots=3)
    rows, marks = ours.open(prompts), theirs.open(prompts)
    for tick in range(4):
        flight = Flight(ours, params, [0], StopMatcher(tokenizer, params.stop))
        flight.add(rows, seeds=[tick * 10 + row for row in rows])
        segments = {}
        while flight:
            segments.update({segment.row: segment for segment in flight.step()})
        scores = theirs.score(marks, [segments[row].ids for row in rows])
        for row, mark, logits in zip(rows, marks, scores):
            assert theirs.tokens(mark) == ours.tokens(row)
            close(logits, plain(teacher, ours.tokens(row))[-len(segments[row].ids) - 1 :])
        for row, mark in list(zip(rows, marks))[tick % 2 :: 2]:  # "breach": both go back by half of the step
            back = ours.length(row) - len(segments[row].ids) // 2
            ours.rewind(row, back)
            theirs.rewind(mark, back)


def test_a_shrinking_flight_keeps_rows_contiguous_and_copies_each_at_most_once(tiny: Any) -> None:
    session = Session(tiny(), slots=8)
    rows = session.open([[3 + i] * (i + 1) for i in range(8)])
    session.prefill(rows)
    copies: list[tuple[int, int]] = []
    session.cache.move = lambda a, b: copies.append((a, b))  # type: ignore[method-assign]
    session.cache.swap = lambda a, b: copies.append((a, b))  # type: ignore[method-assign]
    session.close([rows[1], rows[6]])
    order = session.arrange(np.array([rows[i] for i in (7, 0, 3, 5)]))
    assert sorted(order.tolist()) == [rows[i] for i in (0, 3, 5, 7)]
    assert len(copies) == 2  # rows 5 and 7 came to the front; 0 and 3 were there


def test_flights_and_other_work_may_share_a_session(tiny: Any) -> None:
    model, params = tiny(), SamplingParams(max_new_tokens=9)
    prompts = [[3, 4], [5], [6, 7, 8], [9, 10], [11] * 7]

    def alone(row: int) -> list[int]:
        session = Session(model, slots=1)
        flight = Flight(session, params, [0])
        flight.add(session.open([prompts[row]]), [row])
        while flight:
            for segment in flight.step():
                return segment.ids
        raise AssertionError("the row never ended")

    session = Session(model, slots=6)
    rows = session.open(prompts)
    one, two = (Flight(session, params, [0]) for _ in range(2))
    one.add(rows[:2], rows[:2])
    two.add(rows[2:], rows[2:])
    ended: dict[int, list[int]] = {}
    while one or two:
        for flight in (one, two):
            ended.update({segment.row: segment.ids for segment in flight.step()})
        session.close(session.open([[12, 13]]))
    assert ended == {row: alone(row) for row in rows}
    with pytest.raises(ValueError, match="not at the front of the cache"):
        session.step(np.array(rows[::-1]))


@pytest.mark.parametrize("lean", [True, False])
def test_logits_may_enter_a_loss_and_carry_no_graph(tiny: Any, lean: bool) -> None:
    model = tiny()
    session = Session(model, slots=1, lean=lean)
    rows = session.open([[4, 5, 6]])
    flight = Flight(session, SamplingParams(max_new_tokens=3), [0])
    flight.add(rows, [1])
    flight.step()
    (logits,) = session.score(rows, [[7, 8]])
    assert not logits.requires_grad
    weight = torch.ones(logits.shape[-1], requires_grad=True)
    (logits @ weight).square().sum().backward()  # would fail on tensors made in inference mode
    assert weight.grad is not None


def test_misuse_is_refused(tiny: Any) -> None:
    session = Session(tiny(), slots=2, context_length=10)
    (row,) = session.open([[4, 5, 6]])
    with pytest.raises(ValueError, match="cannot open 2 rows: 1 of 2 slots are free"):
        session.open([[3], [4]])
    with pytest.raises(ValueError, match="would hold 11 tokens, but the context is 10"):
        session.append([row], [[3] * 8])
    with pytest.raises(ValueError, match="cannot rewind row 0 to 4 tokens: it holds 3"):
        session.rewind(row, 4)
    with pytest.raises(ValueError, match="occurs twice"):
        session.next_logits([row, row])
    with pytest.raises(ValueError, match="must hold tokens and be prefilled"):
        session.step(session.arrange(np.array([row])))
    session.close([row])
    with pytest.raises(ValueError, match=r"not all of the rows .* are open"):
        session.score([row], [[3]])
    with pytest.raises(ValueError, match=r"outside 1..96"):
        Session(tiny(), slots=1, context_length=97)
    with pytest.raises(ValueError, match="at least one slot"):
        Session(tiny(), slots=0)

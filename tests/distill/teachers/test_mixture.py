"""The mean of several teachers against sums of probabilities in fp64, and what is left of it when a teacher is lost."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from distill.data import TokenSequence, collate
from distill.data.batch import TokenBatch
from distill.errors import TeacherLost
from distill.teachers import mixture
from distill.teachers.mixture import Mean, Mixed, merged
from distill.teachers.signals import FullLogits, Head, HiddenStates, SampledToken, Signal, TopK

pytestmark = pytest.mark.unit

WIDTHS, WEIGHTS, TOKENS = (11, 14, 12), (0.5, 0.2, 0.3), 9
BATCH = collate([TokenSequence([3, 4, 5, 6], 1, "a")], 0, None)


def heads() -> list[tuple[Tensor, Head]]:
    """Hidden states and heads of three teachers of one family, with vocabularies padded to different sizes."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for width in WIDTHS:
        hidden, weight = torch.randn(TOKENS, 4, generator=generator), 2 * torch.randn(width, 4, generator=generator)
        made.append((hidden, Head(weight, None, 1.5, 8.0)))
    return made


def probabilities() -> list[Tensor]:
    """``[T, V]`` fp64, 0 where a vocabulary ends."""
    made = []
    for hidden, head in heads():
        logits = 8.0 * torch.tanh(1.5 * (hidden.double() @ head.weight.double().T) / 8.0)
        made.append(torch.nn.functional.pad(logits.softmax(-1), (0, max(WIDTHS) - logits.shape[1])))
    return made


def expected() -> Tensor:
    return sum(w * p for w, p in zip(WEIGHTS, probabilities(), strict=True))  # type: ignore[return-value]


def mean_of(signals: Sequence[Signal], weights: Sequence[float] = WEIGHTS) -> tuple[Signal, Mean]:
    mean = Mean()
    for signal, weight in zip(signals, weights, strict=True):
        mean.add(signal, weight)
    return mean.result(), mean


@pytest.mark.parametrize("kind", ["hidden", "logits", "both"])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
def test_whole_distributions_in_blocks_of_a_few_rows(
    kind: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixture, "ROW_BUDGET", 30)
    blocks: list[int] = []
    plain = Head.logits
    monkeypatch.setattr(Head, "logits", lambda self, hidden: blocks.append(hidden.shape[0]) or plain(self, hidden))
    signals: list[Signal] = []
    for number, (hidden, head) in enumerate(heads()):
        whole = kind == "logits" or (kind == "both" and number == 1)
        signals.append(FullLogits(plain(head, hidden)) if whole else HiddenStates(hidden, head))
    given = [s.values.clone() for s in signals if isinstance(s, FullLogits)]
    found, _ = mean_of([signals[i] for i in order], [WEIGHTS[i] for i in order])
    assert isinstance(found, FullLogits)
    torch.testing.assert_close(found.values.double().exp(), expected(), rtol=1e-5, atol=1e-7)
    assert (found.values[:, max(WIDTHS[0], WIDTHS[2]) :].exp() <= WEIGHTS[1] + 1e-6).all()
    assert max(blocks, default=0) <= 2, "no more rows at a time than the budget has room for"
    assert all(torch.equal(a, s.values) for a, s in zip(given, (s for s in signals if isinstance(s, FullLogits))))


def test_an_id_that_nobody_has_is_impossible() -> None:
    narrow = FullLogits(torch.zeros(2, 3))
    wide = FullLogits(torch.tensor([[0.0, 0.0, 0.0, -torch.inf]]).repeat(2, 1))
    found, _ = mean_of([narrow, wide], [0.5, 0.5])
    assert found.logits()[:, 3].tolist() == [-torch.inf, -torch.inf]
    torch.testing.assert_close(found.logits()[:, :3].exp(), torch.full((2, 3), 1 / 3))


def test_sampled_is_exact() -> None:
    ids = torch.arange(TOKENS) % 10
    signals = [HiddenStates(*pair).logprobs_at(ids) for pair in heads()]
    found, _ = mean_of([SampledToken(s) for s in signals])
    assert isinstance(found, SampledToken)
    torch.testing.assert_close(
        found.logprobs.double().exp(), expected()[torch.arange(TOKENS), ids], rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("k", [1, 4, 20])
def test_topk_is_a_lower_bound_off_by_no_more_than_what_is_not_listed(k: int) -> None:
    signals, unlisted = [], []
    for p, width in zip(probabilities(), WIDTHS, strict=True):
        mass, ids = p.topk(min(k, width), -1)
        signals.append(TopK(ids, mass.log().float()))
        unlisted.append(1 - mass.sum(-1))
    found, mean = mean_of(signals)
    assert isinstance(found, TopK)
    slack = sum(w * u for w, u in zip(WEIGHTS, unlisted, strict=True))
    exact = expected()
    for row in range(TOKENS):
        kept = found.ids[row] >= 0
        ids = found.ids[row][kept]
        assert len(set(ids.tolist())) == len(ids)
        assert set(ids.tolist()) == {int(i) for s in signals for i in s.ids[row]}
        given = found.logprobs[row][kept].double().exp()
        assert (given <= exact[row, ids] + 1e-6).all()
        assert (given >= exact[row, ids] - slack[row] - 1e-6).all()
        listed = torch.zeros(max(WIDTHS)).double()  # exactly: what the lists say, added up
        for w, s in zip(WEIGHTS, signals, strict=True):
            listed[s.ids[row]] += w * s.logprobs[row].double().exp()
        torch.testing.assert_close(given, listed[ids], rtol=1e-5, atol=1e-9)
        if k == 20:
            torch.testing.assert_close(given, exact[row, ids], rtol=1e-4, atol=1e-7)
    assert mean.unlisted is not None
    torch.testing.assert_close(mean.unlisted, slack.sum(), rtol=1e-4, atol=1e-6)


def test_merging_adds_equal_ids_and_keeps_padding_out() -> None:
    ids = torch.tensor([[4, 2, 4, -1], [-1, -1, -1, -1], [7, 3, 0, 7]])
    mass = torch.tensor([[0.1, 0.2, 0.3, 0.9], [0.5, 0.5, 0.5, 0.5], [1e-30, 0.1, 0.2, 1e-30]])
    found = merged(ids, mass.log())
    read = [
        {i: round(m, 35) for i, m in zip(row.tolist(), values.double().exp().tolist(), strict=True) if i >= 0}
        for row, values in zip(found.ids, found.logprobs, strict=True)
    ]
    assert [set(row) for row in read] == [{2, 4}, set(), {0, 3, 7}]
    assert read[0] == pytest.approx({2: 0.2, 4: 0.4}, rel=1e-5)
    assert read[2] == pytest.approx({0: 0.2, 3: 0.1, 7: 2e-30}, rel=1e-5)
    assert (found.logprobs[found.ids < 0] == -torch.inf).all()
    assert merged(torch.empty(0, 3).long(), torch.empty(0, 3)).ids.shape == (0, 3)


class Fixed:
    """A scorer that always says the same, until it is lost."""

    ahead, may_be_lost = False, False

    def __init__(self, signal: Signal, answers: int = 10) -> None:
        self.signal, self.answers, self.asked = signal, answers, 0

    def submit(self, batches: Sequence[TokenBatch]) -> None:
        self.asked += len(batches)

    def take(self, batch: TokenBatch) -> Signal:
        self.answers -= 1
        if self.answers < 0:
            raise TeacherLost("rank 3 is gone")
        return self.signal

    def figures(self) -> dict[str, float]:
        return {"bytes": 8.0}

    def recover(self) -> bool:
        return True

    def cancel(self) -> None:
        self.asked = 0

    def close(self) -> None:
        self.asked = -1


def test_a_lost_teacher_leaves_the_mean_of_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    whole = [FullLogits(head.logits(hidden)) for hidden, head in heads()]
    scorers = {"a": Fixed(whole[0]), "b": Fixed(whole[1], 1), "c": Fixed(whole[2]), "none": Fixed(whole[2])}
    mixed = Mixed(scorers, {"a": 5.0, "b": 2.0, "c": 3.0, "none": 0.0}, continues=True)
    for step in range(2):
        mixed.submit([BATCH])
        p = probabilities()
        exact = expected() if not step else (0.5 * p[0] + 0.3 * p[2]) / 0.8
        found = mixed.take(BATCH).logits().double().exp()
        torch.testing.assert_close(found, exact[:, : found.shape[1]], rtol=1e-5, atol=1e-7)
    said = capsys.readouterr().err
    assert "teacher 'b' is lost (rank 3 is gone); the mean is now that of a (0.625), c (0.375)" in " ".join(
        said.split()
    )
    mixed.submit([BATCH])
    assert (scorers["a"].asked, scorers["b"].asked, scorers["none"].asked) == (3, 2, 0)
    figures = mixed.figures()
    assert (figures["lost"], figures["bytes"], figures["a/bytes"]) == (1.0, 24.0, 8.0)
    strict = Mixed({"a": Fixed(whole[0]), "b": Fixed(whole[1], 0)}, {"a": 1.0, "b": 1.0})
    strict.submit([BATCH])
    with pytest.raises(TeacherLost, match="rank 3"):
        strict.take(BATCH)
    last = Mixed({"a": Fixed(whole[0], 0)}, {"a": 1.0}, continues=True)
    last.submit([BATCH])
    with pytest.raises(TeacherLost, match="rank 3"):
        last.take(BATCH)


def test_topk_figures_say_what_was_not_listed() -> None:
    lists = TopK(torch.tensor([[0, 1]] * 3), torch.tensor([[0.5, 0.2]] * 3).log())
    other = TopK(torch.tensor([[2, 1]] * 3), torch.tensor([[0.6, 0.4]] * 3).log())
    mixed = Mixed({"a": Fixed(lists), "b": Fixed(other)}, {"a": 1.0, "b": 1.0})
    mixed.submit([BATCH])
    mixed.take(BATCH)
    figures = mixed.figures()
    assert figures["unlisted"] / figures["unlisted#"] == pytest.approx(0.15, abs=1e-6)
    assert "unlisted" not in mixed.figures()

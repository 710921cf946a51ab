"""Micro-batches: what scales each token, the teacher's view against a forward pass per sequence, draws of no layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.data import TokenSequence
from distill.methods.base import Weight
from distill.micro_batches import Layout, micro_batches

pytestmark = pytest.mark.unit


def sequences() -> list[TokenSequence]:
    """Masks with holes, one masked out altogether, two with a prompt for the teacher alone."""
    return [
        TokenSequence([3, 4, 5, 6, 7, 1], 2, "a", supervised=[True, False, True, True], logprobs=[-1.0, -2.0, -3.0, -4.0]),
        TokenSequence([8, 9, 2, 3], 1, "b", teacher_prompt=[5, 5, 6, 7]),
        TokenSequence([6, 2, 4, 1], 2, "c", supervised=[False, False]),
        TokenSequence([4, 8, 7, 3, 9], 3, "d", supervised=[False, True], teacher_prompt=[9]),
        TokenSequence([2, 3, 1], 2, "e"),
    ]  # fmt: skip


def layout(size: int, count: int, pack: bool) -> Layout:
    return Layout(size, count, pack, 0, torch.device("cpu"))


def built(size: int, count: int, pack: bool, seeds: bool = True) -> list[Any]:
    part = sequences()
    scales = [0.1 * (i + 1) for i in range(len(part))]
    weights = [Weight(2.0 - i, float(i)) for i in range(len(part))]
    return micro_batches(layout(size, count, pack), part, scales, weights, [11, 12, 13, 14, 15] if seeds else None)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(("size", "count"), [(5, 1), (2, 4), (1, 5)])
def test_every_supervised_token_once_with_its_sequence_s_scale(size: int, count: int, pack: bool) -> None:
    parts = built(size, count, pack)
    assert len(parts) == count
    expected = [
        (sequence.ids[k], pytest.approx(0.1 * (i + 1) * (2.0 - i)), float(i))
        for i, sequence in enumerate(sequences())
        for k in range(sequence.prompt_length, len(sequence.ids))
        if sequence.supervised is None or sequence.supervised[k - sequence.prompt_length]
    ]
    found = [
        row
        for part in parts
        for row in zip(part.student.target_ids.tolist(), part.scales.tolist(), part.advantages.tolist(), strict=True)
    ]
    assert found == expected
    logprobs = torch.cat([part.student.behaviour_logprobs for part in parts])
    assert logprobs[:3].tolist() == [-1.0, -3.0, -4.0]
    assert logprobs[3:].isnan().all()


@pytest.mark.parametrize("pack", [False, True])
def test_the_teacher_s_logits_line_up_with_the_student_s_positions(
    pack: bool, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from distill.teachers.frozen import FrozenModel

    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", 3)).eval()
    frozen = FrozenModel(model)
    for size, count in ((5, 1), (2, 3)):
        found = torch.cat([frozen.signal(part.teacher, "logits", 0).logits() for part in built(size, count, pack)])
        expected = []
        for sequence in sequences():
            prompt = sequence.teacher_prompt or sequence.ids[: sequence.prompt_length]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *sequence.response_ids]])).logits[0]
            flags = sequence.supervised or [True] * len(sequence.response_ids)
            expected += [logits[len(prompt) - 1 + offset] for offset, wanted in enumerate(flags) if wanted]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_without_a_view_the_teacher_shares_the_student_s_batch() -> None:
    part = [replace(sequence, teacher_prompt=None) for sequence in sequences()]
    made = micro_batches(layout(5, 1, True), part, [1.0] * 5, [Weight()] * 5, None)[0]
    assert made.teacher is made.student
    assert made.draws is None


def test_draws_follow_from_seed_and_place_alone() -> None:
    reference = torch.cat([part.draws for part in built(5, 1, False)])
    assert ((reference >= 0) & (reference < 1)).all()
    assert len(set(reference.tolist())) == len(reference)
    for size, count, pack in ((2, 3, True), (1, 5, False)):
        assert torch.equal(torch.cat([part.draws for part in built(size, count, pack)]), reference)
    many = [TokenSequence([1] * 200, 1, "x") for _ in range(100)]
    draws = micro_batches(layout(100, 1, True), many, [1.0] * 100, [Weight()] * 100, list(range(100)))[0].draws
    assert draws is not None
    assert draws.mean().item() == pytest.approx(0.5, abs=0.01)
    assert draws.std().item() == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("pack", [False, True])
def test_a_rank_without_sequences_still_makes_its_passes(pack: bool) -> None:
    parts = micro_batches(layout(2, 3, pack), [], [], [], [])
    assert [part.tokens for part in parts] == [0, 0, 0]
    assert all(part.student.input_ids.numel() == 1 for part in parts)

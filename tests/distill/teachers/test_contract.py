"""What the trainer relies on, asked of every placement of a teacher: the same signals as in process, in the order of the
batches, also after some were given up, with no targets at all, and for any kind of signal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import load
from torch import Tensor

from distill.data import TokenSequence, collate
from distill.data.batch import TokenBatch
from distill.teachers.signals import FullLogits, SampledToken, Signal, TopK

placements = load(Path(__file__).with_name("placements.py"), "placements")

SEQUENCES = [
    TokenSequence([3, 4, 5, 6, 7, 8], 2, "a", tag="even"),
    TokenSequence([9, 3, 4], 1, "b", supervised=[False, True], tag="odd"),
    TokenSequence([5, 6, 7, 8, 9, 10, 11], 3, "c", tag="odd"),
    TokenSequence([8, 4, 3, 3], 1, "d", tag="even"),
]
CASES = [(name, kind) for name, placement in placements.PLACEMENTS.items() for kind in placement.signals]


def batches() -> list[TokenBatch]:
    """Padded, packed, one sequence, none."""
    return [
        collate(SEQUENCES[:2], 0, None),
        collate(SEQUENCES, 0, 16),
        collate([], 0, None),
        collate(SEQUENCES[3:], 0, None),
    ]


def content(signal: Signal, batch: TokenBatch) -> tuple[Tensor, ...]:
    if isinstance(signal, TopK):
        order = signal.ids.argsort(-1)  # ties may come in any order
        return signal.ids.gather(-1, order), signal.logprobs.gather(-1, order)
    if isinstance(signal, SampledToken):
        return (signal.logprobs,)
    return (signal.logits(),)


@pytest.mark.parametrize(("name", "kind"), CASES, ids=[f"{name}-{kind}" for name, kind in CASES])
def test_a_placement_says_what_the_teacher_in_process_says(
    name: str, kind: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = batches()
    case = placements.Case(make_model(tmp_path / "teacher", 3), kind, 5, wanted, tmp_path)
    placement, teacher = placements.PLACEMENTS[name], placements.teacher_of(case)

    def check(signal: Signal, batch: TokenBatch) -> None:
        expected = teacher.signal(batch, kind, case.top_k)
        if placement.normalised and kind == "logits":
            expected = FullLogits(expected.logits().log_softmax(-1))
        assert signal.kind == kind
        assert len(signal) == len(batch.target_ids)
        for ours, theirs in zip(content(signal, batch), content(expected, batch), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=placement.tolerance, atol=placement.tolerance)

    with placement.open(case) as scorer:
        for _ in range(2):  # two steps
            scorer.submit(wanted)
            for batch in wanted:
                check(scorer.take(batch), batch)
        scorer.submit(wanted[:2])
        check(scorer.take(wanted[0]), wanted[0])
        scorer.cancel()
        scorer.submit([wanted[3], wanted[1]])
        check(scorer.take(wanted[3]), wanted[3])
        scorer.submit(wanted[:1])  # while one is still to be taken
        check(scorer.take(wanted[1]), wanted[1])
        check(scorer.take(wanted[0]), wanted[0])
        assert all(isinstance(value, float) for value in scorer.figures().values())

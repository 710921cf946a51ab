"""Sums of a step: every token once, the samples of a bad loss by name, no figure lost to one token."""

from __future__ import annotations

import pytest
import torch

from distill.data import TokenSequence, collate
from distill.methods import TokenLosses
from distill.totals import StepTotals

pytestmark = pytest.mark.unit


def test_sums_over_micro_batches_and_names_of_bad_samples() -> None:
    totals = StepTotals()
    for name, values in (("a", [1.0, 2.0]), ("b", [float("nan"), 4.0])):
        batch = collate([TokenSequence([3, 4, 5], 1, name)], 0, None)
        entropy = torch.tensor([0.5, float("-inf")])
        totals.add(TokenLosses(torch.tensor(values), {"entropy": entropy}), torch.tensor([1.0, 0.5]), batch)
    loss, bad, entropy_sum = totals.values()
    assert loss != loss
    assert (bad, entropy_sum, totals.tokens, totals.names) == (1.0, 1.0, 4, ["entropy"])
    assert totals.bad_samples() == ["b"]

"""PACED: weights from pass rates, the stages, and the divergence of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.errors import ConfigError, DataError
from distill.methods import Source, Targets, build_method
from distill.methods.base import BatchFacts, SequenceFacts
from distill.methods.paced import PacedConfig, competence_weights

pytestmark = pytest.mark.unit


def test_weights_are_the_beta_kernel_at_mean_one() -> None:
    rates = [0.0, 0.125, 0.5, 0.875, 1.0]
    raw = [p * (1 - p) for p in rates]
    weights = competence_weights(rates, PacedConfig())
    assert weights == pytest.approx([w / (sum(raw) / 5) for w in raw])
    assert sum(weights) == pytest.approx(5)
    assert weights[0] == weights[-1] == 0.0
    assert competence_weights(rates, PacedConfig(normalise=False)) == pytest.approx(raw)
    skewed = competence_weights(rates, PacedConfig(alpha=2.0, beta=0.5, normalise=False))
    assert skewed == pytest.approx([p**2 * (1 - p) ** 0.5 for p in rates])


def test_no_exponent_means_uniform_weights() -> None:
    assert competence_weights([0.0, 0.3, 1.0], PacedConfig(alpha=0.0, beta=0.0)) == [1.0, 1.0, 1.0]


def test_the_floor_keeps_prompts_that_always_or_never_succeed() -> None:
    assert competence_weights([0.0, 0.5, 1.0], PacedConfig(floor=0.05, normalise=False)) == [0.05, 0.25, 0.05]


def test_a_batch_without_signal_has_no_weight() -> None:
    assert competence_weights([0.0, 1.0, 1.0], PacedConfig()) == [0.0, 0.0, 0.0]
    assert competence_weights([], PacedConfig()) == []


def facts(rows: list[tuple[int, float | None, float | None]]) -> BatchFacts:
    """Rows of (group, verdict, probed pass rate)."""
    return BatchFacts([SequenceFacts(i, g, Source.STUDENT, 4, 4, c, p) for i, (g, c, p) in enumerate(rows)])


def test_pass_rates_come_from_probes_or_from_the_group() -> None:
    probed = build_method({"name": "paced", "normalise": False, "rollouts": 4})
    assert (probed.probe_rollouts, probed.samples_per_prompt) == (4, 1)
    weights = probed.weigh(facts([(0, None, 0.25), (1, 1.0, 0.5), (2, None, 1.0)]))
    assert [weight.weight for weight in weights] == [0.1875, 0.25, 0.0]
    group = build_method(
        {"name": "paced", "stages": "reverse", "pass_rate": "group", "rollouts": 2, "normalise": False}
    )
    assert (group.probe_rollouts, group.samples_per_prompt) == (0, 2)
    weights = group.weigh(facts([(0, 1.0, None), (0, 0.0, None), (1, 1.0, None), (1, 1.0, None)]))
    assert [weight.weight for weight in weights] == [0.25, 0.25, 0.0, 0.0]
    assert [weight.advantage for weight in weights] == [1.0] * 4


def test_data_without_answers_are_refused_on_every_rank() -> None:
    with pytest.raises(DataError, match="sample 0 has no answer") as caught:
        build_method({"name": "paced"}).weigh(facts([(0, None, None)]))
    assert caught.value.on_every_rank


def test_stages_change_text_and_divergence_together(make_targets: Callable[..., Targets]) -> None:
    forward, reverse = (build_method({"name": name}) for name in ("off_policy", "on_policy"))
    method = build_method({"name": "paced", "text": "teacher", "switch": 0.3})
    assert method.uses() == {Source.TEACHER, Source.STUDENT}
    for progress, source, plain in [
        (0.0, Source.TEACHER, forward),
        (0.299, Source.TEACHER, forward),
        (0.3, Source.STUDENT, reverse),
        (0.999, Source.STUDENT, reverse),
    ]:
        assert method.source(5, 1, progress) is source
        found = method.token_losses(make_targets(progress=progress)).loss
        assert torch.equal(found, plain.token_losses(make_targets()).loss)


def test_one_stage_only() -> None:
    assert build_method({"name": "paced", "stages": "forward"}).uses() == {Source.REFERENCE}
    assert build_method({"name": "paced", "stages": "reverse"}).uses() == {Source.STUDENT}
    with pytest.raises(ConfigError, match=r"method\.stages=reverse"):
        build_method({"name": "paced", "pass_rate": "group"})


def test_any_divergence(make_targets: Callable[..., Targets], check_empty: Callable[[Any], None]) -> None:
    spec = {"kind": "jsd", "beta": 0.3}
    method = build_method({"name": "paced", "stages": "forward", "forward": spec})
    expected = build_method({"name": "gkd", "divergence": spec}).token_losses(make_targets()).loss
    assert torch.equal(method.token_losses(make_targets()).loss, expected)
    check_empty(method)

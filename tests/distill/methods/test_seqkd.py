"""Sequence-level distillation: cross-entropy, on the teacher's text and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.errors import ConfigError
from distill.methods import Source, Targets, build_method

pytestmark = pytest.mark.unit


def test_cross_entropy(make_targets: Callable[..., Targets], check_against: Callable[..., None]) -> None:
    example = make_targets(teacher_logits=None)

    def oracle(student: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(student, example.token_ids, reduction="none")

    check_against(build_method({"name": "seqkd"}), example, oracle)


def test_on_the_teachers_text_without_its_logits(check_empty: Callable[[Any], None]) -> None:
    method = build_method({"name": "seqkd"})
    assert method.uses() == {Source.TEACHER}
    assert method.needs == frozenset()
    check_empty(method)
    with pytest.raises(ConfigError, match=r"method\.text=reference"):
        build_method({"name": "seqkd", "text": "reference"})

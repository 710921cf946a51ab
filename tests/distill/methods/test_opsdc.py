"""OPSDC: what the teacher reads, when it changes, and the divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.data import Example
from distill.errors import ConfigError
from distill.methods import Source, Targets, build_method

pytestmark = pytest.mark.unit


def example(prompt: Any) -> Example:
    return Example("x/1", prompt, "reference", "4", {"terms": 2})


def test_the_teacher_reads_the_instruction_before_the_prompt() -> None:
    view = build_method({"name": "opsdc"}).teacher_view(example("What is {2}+2?"))
    assert view is not None
    assert isinstance(view.prompt, str)
    assert view.prompt.startswith("Solve the following math problem concisely and correctly.")
    assert view.prompt.endswith("to reach the answer.\n\nWhat is {2}+2?")
    assert (view.id, view.answer, view.reference) == ("x/1", "4", "reference")


def test_a_chat_gets_it_in_its_last_turn() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "2+2?"}]
    view = build_method({"name": "opsdc", "template": "Short: {prompt} Go."}).teacher_view(example(chat))
    assert view is not None
    assert view.prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "Short: 2+2? Go."}]
    assert chat[1]["content"] == "2+2?", "the student's prompt must stay as it is"


def test_the_share_of_tokens_to_save_is_filled_in() -> None:
    view = build_method({"name": "opsdc", "template": "fewer_tokens", "percent": 20}).teacher_view(example("2+2?"))
    assert view is not None
    assert "using 20% fewer tokens than you normally would." in str(view.prompt)


def test_a_template_needs_the_prompt() -> None:
    with pytest.raises(ConfigError, match=r"method\.template='consise'.*concise, fewer_tokens"):
        build_method({"name": "opsdc", "template": "consise"})


def test_the_teacher_is_the_student_of_some_steps_ago() -> None:
    assert build_method({"name": "opsdc"}).self_teacher == 50
    frozen = build_method({"name": "opsdc", "refresh": 0})
    assert frozen.self_teacher == 0
    assert frozen.needs == {"teacher"}
    assert frozen.uses() == {Source.STUDENT}


def test_reverse_kl_and_its_ablations(
    make_targets: Callable[..., Targets], check_against: Callable[..., None], check_empty: Callable[[Any], None]
) -> None:
    targets = make_targets()
    assert targets.teacher_logits is not None
    logp = targets.teacher_logits[:, :11].double().log_softmax(-1)

    def oracle(student: Tensor) -> Tensor:
        logq = student.log_softmax(-1)
        return (logq.exp() * (logq - logp)).sum(-1)

    check_against(build_method({"name": "opsdc"}), targets, oracle)
    forward = build_method({"name": "opsdc", "divergence": {"kind": "forward_kl"}}).token_losses(make_targets()).loss
    assert torch.equal(forward, build_method({"name": "off_policy"}).token_losses(make_targets()).loss)
    check_empty(build_method({"name": "opsdc", "divergence": {"kind": "jsd"}}))

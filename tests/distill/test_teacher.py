"""Frozen models: copies only where asked for, renewed exactly when due, continued from a checkpoint, never trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from distill.config import LoraSpec
from distill.data import TokenSequence, collate
from distill.errors import CheckpointError
from distill.models import add_lora, freeze
from distill.teacher import FrozenModels

pytestmark = pytest.mark.unit

BATCH = collate([TokenSequence([3, 4, 5, 6], 1, "a")], 0, None)


class Engine:
    """What is asked of a training engine, for a student whose weights the test moves."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student

    @contextmanager
    def whole_student(self) -> Iterator[nn.Module]:
        yield self.student


@pytest.fixture
def student(make_model: Callable[..., Path], tmp_path: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "student", 1)).eval()


def frozen(
    student: nn.Module, needs: tuple[str, ...] = ("teacher",), self_teacher: int | None = None, **parts: Any
) -> FrozenModels:
    method = SimpleNamespace(needs=frozenset(needs), self_teacher=self_teacher)
    values: dict[str, Any] = {"student": student, "teacher": None, "reference": None, "method": method, **parts}
    return FrozenModels(SimpleNamespace(**values))  # type: ignore[arg-type]


def move(student: nn.Module, amount: float = 0.1) -> None:
    """What training does: trainable weights change."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(amount * torch.ones_like(parameter))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(BATCH.input_ids).logits[0, :-1]


def test_nothing_is_copied_that_nobody_asked_for(student: nn.Module) -> None:
    teacher = freeze(AutoModelForCausalLM.from_config(student.config))
    models = frozen(student, needs=(), teacher=teacher)
    assert models.teacher is not None
    assert models.teacher.model is teacher
    assert models.writer is teacher
    assert models.reference is None
    assert models.teacher_logits(BATCH) is None, "not read by the loss, not computed"
    assert models.state() == {"renewed": None, "initial": []}


def test_the_self_teacher_is_the_student_of_the_last_due_step(student: nn.Module) -> None:
    models = frozen(student, self_teacher=3)
    engine, history = Engine(student), []
    for done in range(8):
        models.renew(engine, done)  # type: ignore[arg-type]
        history.append(logits(student))
        torch.testing.assert_close(models.teacher_logits(BATCH), history[done // 3 * 3], rtol=1e-5, atol=1e-5)
        move(student)
    assert (history[0] - history[3]).abs().max() > 0.01
    assert models.teacher is not None
    assert not any(p.requires_grad for p in models.teacher.model.parameters())
    assert not models.teacher.model.training


def test_a_checkpoint_brings_the_self_teacher_back(student: nn.Module, tmp_path: Path) -> None:
    models = frozen(student, self_teacher=2)
    for done in range(4):
        models.renew(Engine(student), done)  # type: ignore[arg-type]
        move(student)
    torch.save(models.state(), tmp_path / "state")
    other = frozen(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), self_teacher=2)
    assert not torch.equal(other.teacher_logits(BATCH), models.teacher_logits(BATCH))  # type: ignore[arg-type]
    other.restore(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(other.teacher_logits(BATCH), models.teacher_logits(BATCH))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"needs": ("reference",)}, {"self_teacher": 0}], ids=["reference", "never renewed"]
)
def test_an_initial_copy_stays_and_must_be_the_same_after_a_restart(
    student: nn.Module, tmp_path: Path, options: dict[str, Any]
) -> None:
    models, before = frozen(student, **options), logits(student)
    for done in range(5):
        models.renew(Engine(student), done)  # type: ignore[arg-type]
        move(student)
    assert (logits(student) - before).abs().max() > 0.01, "the student itself must go on learning"
    scored = models.reference_logits(BATCH) if "needs" in options else models.teacher_logits(BATCH)
    torch.testing.assert_close(scored, before, rtol=1e-5, atol=1e-5)
    assert models.state()["renewed"] is None
    frozen(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), **options).restore(models.state())
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    move(changed, 1e-3)
    with pytest.raises(CheckpointError, match=r"has changed.*model\.student\.path"):
        frozen(changed, **options).restore(models.state())


def test_a_reference_by_its_path_is_used_and_not_copied(student: nn.Module) -> None:
    reference = freeze(AutoModelForCausalLM.from_config(student.config))
    models = frozen(student, needs=("reference",), reference=reference)
    assert models.reference is not None
    assert models.reference.model is reference
    torch.testing.assert_close(models.reference_logits(BATCH), logits(reference), rtol=1e-5, atol=1e-5)
    assert models.teacher is None
    assert models.writer is None


def test_adapters_are_all_that_is_renewed_and_stored(student: nn.Module) -> None:
    adapted = add_lora(student, LoraSpec(enabled=True, rank=2))  # type: ignore[arg-type]
    models = frozen(adapted, self_teacher=1)
    move(adapted)
    models.renew(Engine(adapted), 1)  # type: ignore[arg-type]
    torch.testing.assert_close(models.teacher_logits(BATCH), logits(adapted), rtol=1e-5, atol=1e-5)
    assert models.state()["renewed"]
    assert all("lora_" in name for name in models.state()["renewed"])

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

from distill.config import LoraSpec, TeacherSection
from distill.data import TokenSequence, collate
from distill.errors import CheckpointError, ModelError
from distill.methods.base import Weight
from distill.micro_batches import Layout, micro_batches
from distill.models import add_lora, freeze
from distill.teachers.base import Teachers
from distill.teachers.frozen import FrozenModel
from distill.teachers.open import open_teachers

pytestmark = pytest.mark.unit

SEQUENCES = [TokenSequence([3, 4, 5, 6], 1, "a")]
BATCH = collate(SEQUENCES, 0, None)


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
) -> Teachers:
    method = SimpleNamespace(needs=frozenset(needs), self_teacher=self_teacher)
    values: dict[str, Any] = {
        "student": student,
        "teacher": None,
        "reference": None,
        "method": method,
        "teachers": {},
        **parts,
    }
    config = SimpleNamespace(teacher=TeacherSection())
    return open_teachers(config, SimpleNamespace(**values))  # type: ignore[arg-type]


def said(models: Teachers) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Logits of teacher and reference."""
    layout = Layout(1, 1, False, 0, torch.device("cpu"))
    batches = micro_batches(layout, SEQUENCES, [1.0], [Weight()], None)
    models.submit(batches)
    teacher, reference = models.take(batches[0])
    return teacher and teacher.logits(), reference and reference.logits()


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
    assert models.writer is teacher
    assert models.copies.teacher is models.copies.reference is None
    assert said(models) == (None, None), "not read by the loss, not computed"
    assert models.copies.state() == {"renewed": None, "initial": []}


def test_the_self_teacher_is_the_student_of_the_last_due_step(student: nn.Module) -> None:
    models = frozen(student, self_teacher=3)
    engine, history = Engine(student), []
    for done in range(8):
        models.copies.renew(engine, done)  # type: ignore[arg-type]
        history.append(logits(student))
        torch.testing.assert_close(said(models)[0], history[done // 3 * 3], rtol=1e-5, atol=1e-5)
        move(student)
    assert (history[0] - history[3]).abs().max() > 0.01
    assert models.copies.teacher is not None
    assert not any(p.requires_grad for p in models.copies.teacher.model.parameters())
    assert not models.copies.teacher.model.training


def test_a_checkpoint_brings_the_self_teacher_back(student: nn.Module, tmp_path: Path) -> None:
    models = frozen(student, self_teacher=2)
    for done in range(4):
        models.copies.renew(Engine(student), done)  # type: ignore[arg-type]
        move(student)
    torch.save(models.copies.state(), tmp_path / "state")
    other = frozen(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), self_teacher=2)
    assert not torch.equal(said(other)[0], said(models)[0])  # type: ignore[arg-type]
    other.copies.restore(torch.load(tmp_path / "state", weights_only=True))
    assert torch.equal(said(other)[0], said(models)[0])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options", [{"needs": ("reference",)}, {"self_teacher": 0}], ids=["reference", "never renewed"]
)
def test_an_initial_copy_stays_and_must_be_the_same_after_a_restart(
    student: nn.Module, tmp_path: Path, options: dict[str, Any]
) -> None:
    models, before = frozen(student, **options), logits(student)
    for done in range(5):
        models.copies.renew(Engine(student), done)  # type: ignore[arg-type]
        move(student)
    assert (logits(student) - before).abs().max() > 0.01, "the student itself must go on learning"
    scored = said(models)[1] if "needs" in options else said(models)[0]
    torch.testing.assert_close(scored, before, rtol=1e-5, atol=1e-5)
    assert models.copies.state()["renewed"] is None
    frozen(AutoModelForCausalLM.from_pretrained(tmp_path / "student"), **options).copies.restore(models.copies.state())
    changed = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    move(changed, 1e-3)
    with pytest.raises(CheckpointError, match=r"has changed.*model\.student\.path"):
        frozen(changed, **options).copies.restore(models.copies.state())


def test_a_reference_by_its_path_is_used_and_not_copied(student: nn.Module) -> None:
    reference = freeze(AutoModelForCausalLM.from_config(student.config))
    models = frozen(student, needs=("reference",), reference=reference)
    assert models.copies.reference is None
    torch.testing.assert_close(said(models)[1], logits(reference), rtol=1e-5, atol=1e-5)
    assert said(models)[0] is models.writer is None


def test_adapters_are_all_that_is_renewed_and_stored(student: nn.Module) -> None:
    adapted = add_lora(student, LoraSpec(enabled=True, rank=2))  # type: ignore[arg-type]
    models = frozen(adapted, self_teacher=1)
    move(adapted)
    models.copies.renew(Engine(adapted), 1)  # type: ignore[arg-type]
    torch.testing.assert_close(said(models)[0], logits(adapted), rtol=1e-5, atol=1e-5)
    assert models.copies.state()["renewed"]
    assert all("lora_" in name for name in models.copies.state()["renewed"])


@pytest.mark.parametrize(
    "thaw", [lambda m: m.train(), lambda m: m.requires_grad_(True)], ids=["train mode", "gradients"]
)
def test_a_teacher_that_somebody_thawed_is_refused(student: nn.Module, thaw: Callable[[nn.Module], Any]) -> None:
    teacher = FrozenModel(student)
    thaw(teacher.model)
    with pytest.raises(ModelError, match=r"the teacher was (in training mode|given gradients).*frozen"):
        teacher.hidden(BATCH)

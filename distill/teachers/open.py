"""Which teacher a configuration means, whether a method can learn from what it says, and the ``Teachers`` of a run."""

from __future__ import annotations

from distill.assembly import Parts
from distill.config import RunConfig
from distill.teachers.base import Scorer, SelfCopies, Teachers
from distill.teachers.colocated import Colocated
from distill.teachers.frozen import FrozenModel


def open_teachers(config: RunConfig, parts: Parts) -> Teachers:
    """Teacher and reference as ``config.teacher`` places them. Make them before the training engine."""
    method, section = parts.method, config.teacher
    copies = SelfCopies(method, parts)
    own = copies.teacher if parts.teacher is None or copies.every is not None else FrozenModel(parts.teacher)
    teacher: Scorer | None = None
    if "teacher" in method.needs:
        assert own is not None
        teacher = Colocated(own, section.signal, section.top_k)
    reference: Scorer | None = None
    if "reference" in method.needs:
        frozen = copies.reference if parts.reference is None else FrozenModel(parts.reference, "reference")
        assert frozen is not None
        reference = Colocated(frozen, section.signal, section.top_k)
    return Teachers(copies, teacher, reference, own)

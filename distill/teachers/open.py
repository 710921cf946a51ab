"""Which teacher a configuration means, whether a method can learn from what it says, and the ``Teachers`` of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from distill.assembly import Parts
from distill.config import RunConfig
from distill.data.example import Example
from distill.models import context_length, title_of
from distill.monitors import same_weights
from distill.progress import say
from distill.teachers.aligned import Aligned, Aligner, check_texts
from distill.teachers.base import Held, Scorer, SelfCopies, Teachers
from distill.teachers.colocated import Colocated
from distill.teachers.frozen import FrozenModel
from distill.teachers.mixture import Mixed
from distill.teachers.routing import Route, Routed

PROBED = 64  # texts that are looked at before a run whose teacher has another tokenizer


def open_teachers(config: RunConfig, parts: Parts) -> Teachers:
    """Teacher and reference as ``config.teacher`` places them. Make them before the training engine."""
    method, section = parts.method, config.teacher
    copies = SelfCopies(method, parts)
    own = copies.teacher if parts.teacher is None or copies.every is not None else FrozenModel(parts.teacher)
    if section.placement == "colocated" and copies.every is None:
        for name, part in parts.teachers.items():
            if same_weights(parts.student, part.model):
                say(
                    f"[bold]{title_of(name)} has the very weights of the student[/bold] ({part.spec.path}): it teaches nothing"
                )
    placed: Mapping[str, Scorer] = {}
    held: dict[str, Held] = {}
    if section.placement == "colocated" and copies.every is None:
        held |= {name: FrozenModel(part.model, name) for name, part in parts.teachers.items()}
    if section.placement == "separate":
        from distill.teachers.separate.meeting import open_separate

        placed = scorers = open_separate(config, parts)
        held |= scorers
    teacher: Scorer | None = None
    if "teacher" in method.needs and section.many:
        teacher = _several(config, parts, placed)
    elif "teacher" in method.needs:
        teacher = _aligned(config, parts, "teacher", _single(config, parts, "teacher", placed, own))
    reference: Scorer | None = placed.get("reference")
    if "reference" in method.needs and reference is None:
        frozen = copies.reference if parts.reference is None else FrozenModel(parts.reference, "reference")
        assert frozen is not None
        reference = Colocated(frozen, section.signal, section.top_k)
        held |= {} if parts.reference is None else {"reference": frozen}
    return Teachers(copies, teacher, reference, own, teacher.silent if isinstance(teacher, Routed) else None, held)


def _several(config: RunConfig, parts: Parts, placed: Mapping[str, Scorer]) -> Scorer:
    """A scorer per teacher of ``teacher.many``, and what routes between them or mixes them."""
    section = config.teacher
    scorers = {name: _aligned(config, parts, name, _single(config, parts, name, placed, None)) for name in section.many}
    continues = section.on_loss == "continue"
    if section.mixture == "mean":
        return Mixed(scorers, {name: source.weight for name, source in section.many.items()}, continues)
    return Routed(scorers, continues)


def _single(
    config: RunConfig, parts: Parts, name: str, placed: Mapping[str, Scorer], own: FrozenModel | None
) -> Scorer:
    """One teacher where it is placed; ``own``: a copy of the student, or the teacher that already is in process."""
    section, part = config.teacher, parts.teachers.get(name)
    if name in placed:
        return placed[name]
    if section.placement == "cache":
        from distill.teachers.cache.scorer import open_cached

        return open_cached(config, parts.tokenizer, name if section.many else None)
    if section.placement == "server":
        from distill.teachers.server import open_server

        if part is None:
            return open_server(config, parts)
        served, source = section.server, section.many.get(name)
        if source is not None:
            served = replace(served, model=part.spec.path, url=source.url or served.url)
        model = replace(config.model, teacher=part.spec)
        alone = replace(config, model=model, teacher=replace(section, many={}, server=served))
        return open_server(alone, replace(parts, teacher=part.model, tokenizer=part.tokenizer or parts.tokenizer))
    if own is None:
        assert part is not None
        own = FrozenModel(part.model, name)
    return Colocated(own, section.signal, section.top_k)


def _aligned(config: RunConfig, parts: Parts, name: str, scorer: Scorer) -> Scorer:
    """The scorer, with what brings its tokens to the student's where they are others. Raises DataError where texts do not fit."""
    part = parts.teachers.get(name)
    if part is None or part.tokenizer is None:
        return scorer
    who = f"teacher '{name}'" if config.teacher.many else "the teacher"
    aligner = Aligner(parts.tokenizer, part.tokenizer, who, context_length(part.model))
    least = config.teacher.align.min_share
    check_texts(aligner, parts.tokenizer, [text for e in _probe(config, parts, name) if (text := e.reference)], least)
    return Aligned(scorer, aligner, least)


def _probe(config: RunConfig, parts: Parts, name: str) -> list[Example]:
    """Some of a teacher's samples."""
    section = config.teacher
    examples = [parts.task[index] for index in range(min(len(parts.task), PROBED * max(len(section.many), 1)))]
    if not section.many:
        return examples
    route = Route(section)
    return [example for example in examples if route.teacher_of(example) == name]

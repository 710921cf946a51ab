"""The teachers of a run, one or several: from the configuration to models and tokenizers.

A teacher whose tokenizer is of another family than the student's is accepted where its signal can be aligned (``aligned``); its
tokenizer then stands beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import ModelSpec, RunConfig
from distill.errors import ConfigError, ModelError
from distill.methods import Method, Source
from distill.models import check_tokenizers, load_tokenizer
from distill.teachers.routing import check_many

ALIGNABLE = ("sampled", "topk")


@dataclass(frozen=True, slots=True)
class TeacherPart:
    """One teacher: "teacher" where there is one, else by its name in ``teacher.many``."""

    spec: ModelSpec
    model: PreTrainedModel  # an outline where it is placed elsewhere
    tokenizer: PreTrainedTokenizerBase | None = None  # where it is of another family than the student's


def teacher_specs(config: RunConfig) -> dict[str, ModelSpec]:
    """Where each teacher comes from; empty without one."""
    one = config.model.teacher
    if not config.teacher.many:
        return {"teacher": one} if one.path else {}
    return {name: replace(one, path=source.path, tokenizer=None) for name, source in config.teacher.many.items()}


def load_tokenizers(specs: Mapping[str, ModelSpec]) -> dict[str, PreTrainedTokenizerBase]:
    """Each teacher's. Raises ModelError naming the path."""
    return {name: load_tokenizer(spec, name) for name, spec in specs.items()}


def foreign_tokenizers(
    config: RunConfig,
    method: Method,
    student: PreTrainedTokenizerBase,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> dict[str, PreTrainedTokenizerBase]:
    """Those of another family than the student's. Raises ModelError where they cannot be aligned."""
    section = config.teacher
    writes = not method.uses().isdisjoint((Source.TEACHER, Source.MONITORED))
    mixed = section.many and section.mixture == "mean"
    alignable = section.signal in ALIGNABLE and section.placement != "cache" and not writes and not mixed
    foreign = {}
    for name, tokenizer in tokenizers.items():
        try:
            check_tokenizers(student, tokenizer, name)
        except ModelError:
            if not alignable:
                raise
            foreign[name] = tokenizer
    return foreign


def check_several(config: RunConfig, method: Method) -> None:
    """Raises ConfigError for several teachers that a run cannot have."""
    section, name = config.teacher, config.method["name"]
    check_many(section)
    if not section.many:
        return
    for key, source in section.many.items():
        if source.path is None:
            raise ConfigError(f"teacher.many.{key} has no path; set teacher.many.{key}.path=FOLDER_OR_HUB_NAME")
    if config.model.teacher.path is not None:
        raise ConfigError(
            f"model.teacher.path={config.model.teacher.path} is one teacher, and teacher.many has {len(section.many)} "
            f"({', '.join(section.many)}); name it there as well, and set model.teacher.path=null"
        )
    if method.self_teacher is not None:
        raise ConfigError(f"method={name} is taught by a copy of the student; remove teacher.many")
    if not method.uses().isdisjoint((Source.TEACHER, Source.MONITORED)):
        raise ConfigError(
            f"method={name} trains on text that one teacher writes, and teacher.many has several that score; use a method on the "
            "student's text or on references (on_policy, gkd with method.text=reference, off_policy), or one teacher"
        )

"""Whether a run can be taught from a cache, asked before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from distill.config import ModelSpec, RunConfig, TeacherSection
from distill.errors import ConfigError
from distill.methods import Method, Source
from distill.models import load_tokenizer
from distill.teachers.cache.index import INDEX, TOKENIZER, read_index


def check_cached(config: RunConfig, method: Method) -> None:
    """Raises ConfigError for a method whose text is not there before it trains, CacheError for a cache that does not fit."""
    name, section = config.method["name"], config.teacher
    if section.cache is None:
        raise ConfigError("teacher.placement=cache needs teacher.cache=FOLDER, which `distill rollout … --save` fills")
    if method.uses() != {Source.REFERENCE}:
        raise ConfigError(
            f"method={name} trains on text that is written while it runs, and teacher.placement=cache holds what the teacher said "
            "about text that was there before; set teacher.placement=colocated, or make the text first (distill rollout "
            f"method={name} --save) and train on it: method=off_policy data=jsonl data.path=RUN_DIR/records.jsonl data.ids_key=ids"
        )
    for teacher in section.many or (None,):
        folder = folder_of(section, teacher)
        read_index(folder).contents.check_run(section, folder / INDEX)


def folder_of(section: TeacherSection, teacher: str | None) -> Path:
    """The cache of the one teacher, or of one of several."""
    assert section.cache is not None
    return Path(section.cache) if teacher is None else Path(section.cache) / teacher


def cached_tokenizer(section: TeacherSection) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the teacher that filled a cache, for a run without that teacher; None for other placements."""
    if section.placement != "cache" or section.cache is None or section.many:
        return None
    return load_tokenizer(ModelSpec(path=str(folder_of(section, None) / TOKENIZER)), "teacher")

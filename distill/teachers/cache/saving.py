"""What ``distill rollout … --save`` scores: the references of a data set, or the records that the run has just made."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.assembly import Parts, frozen_model, student_tokenizer
from distill.config import RunConfig
from distill.data import Task, build_task, data_config
from distill.data.partition import Split
from distill.distributed import all_or_nothing
from distill.errors import ConfigError, DataError, DistillError
from distill.methods import build_method
from distill.models import check_tokenizers, load_tokenizer
from distill.records import RecordFolder
from distill.teachers.cache.filling import fill


def check_save(config: RunConfig) -> None:
    """Raises ConfigError where a teacher placed like that cannot fill a cache."""
    teacher = config.teacher
    if teacher.placement != "colocated":
        raise ConfigError(
            f"--save scores with the teacher in process, and teacher.placement={teacher.placement} is another; leave it out"
        )
    if teacher.many:
        raise ConfigError(
            "--save keeps one teacher's scores at a time, not those of teacher.many; run it once for each NAME, with "
            "model.teacher.path=… teacher.cache=FOLDER/NAME"
        )
    if config.model.teacher.path is None:
        raise ConfigError("--save needs a teacher; set model.teacher.path=FOLDER_OR_HUB_NAME")
    if config.rollout.name != "builtin":
        raise ConfigError(
            f"--save scores with a teacher in process, and rollout={config.rollout.name} loads none; make the records first, then "
            "score them: method=off_policy data=jsonl data.path=RUN_DIR/records.jsonl data.ids_key=ids --save"
        )


def save_references(config: RunConfig, split: str, examples: int | None, command: str) -> dict[str, Any]:
    """Score the first ``examples`` references of the data (None: all); no student is loaded. All ranks call it together."""
    with all_or_nothing(DistillError):
        spec = config.model.teacher
        task = _task(config, "train" if split == "train" else "test")
        theirs = load_tokenizer(spec, "teacher")
        tokenizer = student_tokenizer(config.model, task, theirs)
        check_tokenizers(tokenizer, theirs, "teacher")
        teacher = frozen_model(config, spec, "teacher")
    return _fill(config, task, examples, tokenizer, teacher, command)


def save_records(config: RunConfig, parts: Parts, command: str) -> dict[str, Any]:
    """Score all records of the run, token by token as they were made (``data.ids_key=ids``). All ranks call it together."""
    path = RecordFolder(config.run.dir).merged
    with all_or_nothing(DistillError):
        values = {"name": "jsonl", "path": str(path), "ids_key": "ids", "test_fraction": 0.0}
        task = build_task(data_config(values), "train")
    assert parts.teacher is not None
    return _fill(config, task, None, parts.tokenizer, parts.teacher, command)


def _fill(
    config: RunConfig,
    task: Task,
    examples: int | None,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    command: str,
) -> dict[str, Any]:
    count = min(examples or len(task), len(task))
    theirs = load_tokenizer(config.model.teacher, "teacher")
    return fill(config, task, count, build_method(config.method), tokenizer, (teacher, theirs), command)


def _task(config: RunConfig, split: Split) -> Task:
    try:
        return build_task(config.data, split)
    except (ValueError, OSError, ImportError) as error:
        raise DataError(f"data={config.data.name}: {error}") from None

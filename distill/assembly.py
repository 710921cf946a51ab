"""From a checked configuration to the parts of a run: task, tokenizer, student, teacher, method.

One place knows how they must fit: a student built from scratch takes its teacher's tokenizer, tokenizers of
different families are refused, a method that needs a teacher gets one or says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.config import ModelConfig, ModelSpec, RunConfig
from distill.data import Task, bpe_tokenizer, build_task, char_tokenizer
from distill.distributed import device
from distill.engine import TORCH_DTYPES
from distill.errors import ConfigError, DataError, ModelError
from distill.methods import Method, Source, build_method
from distill.models import (
    add_lora,
    build_model,
    check_tokenizers,
    context_length,
    freeze,
    load_model,
    load_outline,
    load_tokenizer,
)
from distill.seeds import mix
from distill.sorted_samples import check_schedule
from distill.teachers.cache.checks import cached_tokenizer, check_cached
from distill.teachers.sources import TeacherPart, check_several, foreign_tokenizers, load_tokenizers, teacher_specs

TOKENIZER_EXAMPLES = 20_000
INITIAL = 1  # purpose of the random numbers that initialise a model


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run works with. ``student`` may be a peft model; ``teacher`` and ``reference`` are frozen, in evaluation mode.

    ``reference`` is None unless the method asks for one and ``model.reference.path`` names it. ``teachers`` holds every teacher
    by its name; ``teacher`` is the only one, where its tokenizer is the student's, and else None.
    """

    task: Task
    held_out: Task
    tokenizer: PreTrainedTokenizerBase
    student: nn.Module
    teacher: PreTrainedModel | None
    reference: PreTrainedModel | None
    method: Method
    teachers: Mapping[str, TeacherPart] = field(default_factory=dict)


def assemble(config: RunConfig, weights: bool = True) -> Parts:
    """Load or build everything. Raises ConfigError or ModelError before anything is written.

    ``weights=False``: student and teacher are outlines (`load_outline`), for runs whose models are served elsewhere.
    """
    method = build_method(config.method)
    _check_groups(config, method)
    check_schedule(config, method)
    check_teacher(config, method)
    check_several(config, method)
    try:
        task, held_out = build_task(config.data, "train"), build_task(config.data, "test")
    except (ValueError, OSError, ImportError) as error:
        raise DataError(f"data={config.data.name}: {error}") from None
    specs = teacher_specs(config)
    tokenizers = load_tokenizers(specs)
    largest = max(tokenizers.values(), key=len, default=cached_tokenizer(config.teacher))
    tokenizer = student_tokenizer(config.model, task, largest)
    foreign = foreign_tokenizers(config, method, tokenizer, tokenizers)
    here = weights and config.teacher.placement == "colocated"
    teachers = {}
    for name, spec in specs.items():
        model = frozen_model(config, spec, name) if here else load_outline(spec, name)
        teachers[name] = TeacherPart(spec, model, foreign.get(name))
    teacher = teachers["teacher"].model if "teacher" in specs and not foreign else None
    reference = None
    if "reference" in method.needs and config.model.reference.path:
        check_tokenizers(tokenizer, load_tokenizer(config.model.reference, "reference"), "reference")
        reference = frozen_model(config, config.model.reference, "reference")
    student = make_student(config, tokenizer).to(device()) if weights else _outlined_student(config)
    alike = {name: part.model for name, part in teachers.items() if part.tokenizer is None}
    _check_context(config, {"student": student, **alike, "reference": reference})
    return Parts(task, held_out, tokenizer, student, teacher, reference, method, teachers)


def check_teacher(config: RunConfig, method: Method) -> None:
    """Raises ConfigError where a method cannot learn from a teacher that is placed so, or from what it says."""
    section, name = config.teacher, config.method["name"]
    writes = not method.uses().isdisjoint((Source.TEACHER, Source.MONITORED))
    reads = "teacher" in method.needs
    elsewhere = section.placement != "colocated"
    wanted = writes or (reads and section.placement in ("colocated", "separate"))
    if wanted and method.self_teacher is None and config.model.teacher.path is None and not section.many:
        raise ConfigError(f"method={name} needs a teacher; set model.teacher.path=FOLDER_OR_HUB_NAME")
    if elsewhere and method.self_teacher is not None:
        raise ConfigError(
            f"method={name} is taught by a copy of the student, which lives beside it, and teacher.placement={section.placement} "
            "is for another teacher; set teacher.placement=colocated"
        )
    if elsewhere and writes and config.rollout.name != "vllm":
        raise ConfigError(
            f"method={name} trains on text that the teacher writes, and with teacher.placement={section.placement} it only scores; "
            "set teacher.placement=colocated, or rollout=vllm, where a server writes"
        )
    if elsewhere and config.eval.every and config.eval.kl_examples and config.model.teacher.path:
        raise ConfigError(
            f"eval.kl_examples={config.eval.kl_examples} compares with a teacher in process, and with "
            f"teacher.placement={section.placement} it is elsewhere; set eval.kl_examples=0 (`distill eval` measures it afterwards)"
        )
    if method.needs and section.signal not in method.signals:
        raise ConfigError(
            f"method={name} cannot learn from teacher.signal={section.signal} as it is set; it can from "
            f"{', '.join(sorted(method.signals))}"
        )
    if reads and section.placement == "cache":
        check_cached(config, method)
    if section.signal == "sampled" and reads and method.uses() != {Source.STUDENT}:
        raise ConfigError(
            f"teacher.signal=sampled is for text that the student wrote, and method={name} trains on other text; set "
            "teacher.signal=topk, hidden or logits"
        )


def frozen_model(config: RunConfig, spec: ModelSpec, who: str) -> PreTrainedModel:
    """A teacher or reference by its path, in ``model.teacher_dtype``, on this rank's device."""
    model = freeze(load_model(spec, who, TORCH_DTYPES[config.model.teacher_dtype]))
    nn.Module.to(model, device())
    return model


def _outlined_student(config: RunConfig) -> PreTrainedModel:
    if config.model.student.path is None:
        raise ConfigError("a served student needs a folder or hub name; set model.student.path=FOLDER_OR_HUB_NAME")
    return load_outline(config.model.student, "student")


def _check_groups(config: RunConfig, method: Method) -> None:
    """A step takes whole groups of samples of one prompt."""
    size = method.samples_per_prompt
    if config.train.batch_size % size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} is not a multiple of the {size} samples per prompt of "
            f"method={config.method['name']}; set train.batch_size={-(-config.train.batch_size // size) * size}"
        )


def make_student(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """The student in its storage precision: fp32 under fp32 training, bf16 under bf16 (DeepSpeed keeps fp32 masters)."""
    spec = config.model.student
    dtype = TORCH_DTYPES[config.engine.dtype]
    torch.manual_seed(mix(config.seed, INITIAL) % (1 << 63))  # the same initial weights and adapters on every rank
    if spec.path is not None:
        model = load_model(spec, "student", dtype)
    elif spec.init is not None:
        model = build_model(spec.init, tokenizer, spec.attention)
        nn.Module.to(model, dtype)
    else:
        raise ConfigError("no student; set model.student.path=FOLDER_OR_HUB_NAME (or model=tiny to build one)")
    model.config.use_cache = True
    return add_lora(model, config.model.lora) if config.model.lora.enabled else model


def student_tokenizer(
    model: ModelConfig, task: Task, teacher_tokenizer: PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase:
    """The tokenizer beside the student; for one built here, the teacher's, or else one made from the data."""
    spec = model.student
    if spec.tokenizer != "task" and (spec.path or spec.tokenizer):
        return load_tokenizer(spec, "student")
    if spec.path is not None:
        raise ConfigError("model.student.tokenizer=task is for students built from model.student.init, not for a path")
    if teacher_tokenizer is not None:
        return teacher_tokenizer
    return task_tokenizer(task, spec.vocab_size)


def _check_context(config: RunConfig, models: dict[str, nn.Module | None]) -> None:
    """A run may not ask for more positions than any of its models was made for."""
    for who, model in models.items():
        limit = context_length(model) if model is not None else None
        if limit is not None and config.train.max_length > limit:
            raise ModelError(
                f"train.max_length={config.train.max_length} exceeds the {who}'s context of {limit} tokens; "
                f"set train.max_length={limit} or less"
            )


def task_tokenizer(task: Task, vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer for models built here: one token per character of a task that has an alphabet, else byte-level BPE.

    BPE is trained on at most TOKENIZER_EXAMPLES examples; the same data give the same tokenizer on every rank.
    """
    alphabet = getattr(task, "alphabet", None)
    if alphabet:
        return char_tokenizer(alphabet)
    return bpe_tokenizer(sample_texts(task, TOKENIZER_EXAMPLES), vocab_size)


def sample_texts(task: Task, count: int) -> list[str]:
    """Prompt and reference texts of the first ``count`` examples."""
    texts = []
    for example in (task[i] for i in range(min(count, len(task)))):
        prompt = example.prompt if isinstance(example.prompt, str) else "\n".join(m["content"] for m in example.prompt)
        texts.append(prompt + (example.reference or ""))
    return texts

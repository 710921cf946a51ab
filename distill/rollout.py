"""``distill rollout [key=value …]``, the same as ``python -m distill.rollout``: text that models write, and a teacher's scores.

    distill rollout method=motab model.student.path=FOLDER model.teacher.path=FOLDER data=gsm8k data.path=FOLDER \\
        rollout.samples=5 rollout.temperature=0.6 run.dir=outputs/motab
    distill train method=sft data=jsonl data.path=outputs/motab/records.jsonl model=hf model.student.path=FOLDER

    distill rollout method=off_policy model.teacher.path=FOLDER data=gsm8k data.path=FOLDER teacher.signal=topk \\
        teacher.cache=outputs/scores --save

With ``--save`` the teacher's scores of all text are kept in ``teacher.cache`` (null: ``run.dir``/cache), for training without the
teacher (``teacher.placement=cache``): of the references of the data (method.text=reference), or of the records that the method's
writer makes first (the teacher: seqkd, text=teacher; the student: on_policy; both: motab, skd). See docs/teachers.md.

``records.jsonl`` holds one object per trajectory. ``prompt``, ``response`` (the stitched text) and ``answer`` are what
``data=jsonl`` reads; ``finish`` is "length" where the text was cut off: leave those lines out where a model should not learn to
stop there. Further keys: ``item`` and ``sample`` (together the key), ``id``, ``correct`` (of the text without flawed spans),
``ids`` and ``prompt_length`` (the exact tokens), ``supervised`` (with method.mask_flawed: 1 for each response token that counts;
``data.ids_key=ids`` trains on these tokens and respects the mask),
``breach``, ``takeovers`` (``step``, ``rewound_to`` = t*, teacher ``tokens``), ``teacher_share``, and ``steps`` with ``text``,
``value``, ``boundary``, ``entropy`` and ``breach`` of every step.

Run the same command again after a kill, a full disk or a damaged file: it goes on with what is missing, on any number of ranks.
More rollout.samples or rollout.examples later add to what is there.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from distill.assembly import Parts, assemble
from distill.cli import run_command
from distill.config import RunConfig, build, check_config, compose_config, defaults_of
from distill.distributed import all_or_nothing, process_group, rank
from distill.errors import CheckpointError, ConfigError, DistillError
from distill.methods import Source, build_method
from distill.models import causal_lm
from distill.record_run import RecordRun, RecordsSection, RecordWriter
from distill.rollouts.engines import Engine, Who, open_engine
from distill.rollouts.monitored_writer import MonitoredWriter
from distill.rollouts.plain import Plain
from distill.runs import RunFolder
from distill.samples import sampling_params
from distill.teachers.cache.saving import check_save, save_records, save_references

SAVE = "rollout.save=true"


def load_rollout_config(overrides: Sequence[str]) -> tuple[RunConfig, RecordsSection]:
    """``conf/rollout.yaml`` with overrides, checked. Raises ConfigError."""
    composed = compose_config("rollout", overrides)
    OmegaConf.set_struct(composed, False)
    own = {field.name: composed.rollout.pop(field.name) for field in fields(RecordsSection)}
    config, section = check_config(composed), build(RecordsSection, own, "rollout")
    config.origin = ("rollout", tuple(overrides))
    config.resolved["rollout"] |= {key: value for key, value in own.items() if key != "save"}
    return config, section


def rollout(config: RunConfig, section: RecordsSection, command: str = "distill rollout … --save") -> dict[str, Any]:
    """Make all records that are missing, and with ``save`` all scores; all ranks call it together.

    Returns the summary of the records, which also stands in ``summary.json``, and under ``cache`` that of the scores. ``command``
    is what the cache tells those to run who find something missing.
    """
    with process_group(config.comm):
        with all_or_nothing(DistillError):
            source = written_by(config, section.save)
        if source is Source.REFERENCE:
            return {"cache": save_references(config, section.split, section.examples, command)}
        with all_or_nothing(DistillError):
            parts = assemble(config, weights=config.rollout.name == "builtin")
        figures = _record(config, section, parts, source)
        if section.save:
            figures["cache"] = save_records(config, parts, command)
        return figures


def written_by(config: RunConfig, save: bool) -> Source:
    """Whose text it is. Raises ConfigError where there is no one writer, or nothing to be done."""
    name, sources = config.method["name"], build_method(config.method).uses()
    if len(sources) > 1:
        raise ConfigError(
            f"method={name} trains on text of several writers; choose one of them: method=off_policy or sft with "
            "method.text=reference or teacher, on_policy, motab or skd"
        )
    (source,) = sources
    if save:
        check_save(config)
    elif source is Source.REFERENCE:
        raise ConfigError(
            f"method={name} makes no text of its own; add --save to keep the teacher's scores of the references, or make text: "
            "method=motab, skd or seqkd"
        )
    return source


def _record(config: RunConfig, section: RecordsSection, parts: Parts, source: Source) -> dict[str, Any]:
    """Write the records that are missing; the summary of all."""
    with all_or_nothing(DistillError):
        engine = open_engine(config, parts.tokenizer, parts.method, parts.student, parts.teacher, Path(config.run.dir))
        writer = _writer(config, parts, engine, source)
    folder = RunFolder(config.run.dir)
    with all_or_nothing(CheckpointError if folder.config.exists() else ConfigError):
        if rank() == 0:
            folder.enter(_what_decides(config.resolved), config.run.resume, partial(defaults_of, config))
    try:
        with closing(engine):
            engine.serve()
            return RecordRun(config, section, parts, writer, folder).run()
    finally:
        folder.leave()


def _what_decides(resolved: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what changes no record: how the teacher scores them afterwards."""
    train = {key: value for key, value in resolved["train"].items() if key not in ("micro_batch_size", "pack")}
    return {key: value for key, value in resolved.items() if key != "teacher"} | {"train": train}


def _writer(config: RunConfig, parts: Parts, engine: Engine, source: Source) -> RecordWriter:
    """Who writes the records."""
    if source is Source.MONITORED:
        writer = engine.writer(causal_lm(parts.student))
        assert isinstance(writer, MonitoredWriter)
        return writer
    who: Who = "teacher" if source is Source.TEACHER else "student"
    model = parts.teacher if source is Source.TEACHER else causal_lm(parts.student)
    assert model is not None
    return Plain(engine.generator(who, model), who, sampling_params(config.rollout), config.rollout.slots)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def body(overrides: list[str]) -> dict[str, Any]:
        shown = [override for override in overrides if override != SAVE]
        return rollout(*load_rollout_config(overrides), shlex.join(["distill", "rollout", *shown, "--save"]))

    switches = {"--save": (SAVE, "keep the teacher's scores of the text in teacher.cache")}
    return run_command("rollout", __doc__ or "", body, arguments, switches)


if __name__ == "__main__":
    sys.exit(main())

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
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from distill.assembly import Parts, assemble
from distill.cli import run_command
from distill.config import RunConfig, build, check_config, compose_config, in_range, one_of
from distill.data import CannotEncode, Example, Task, TooLong
from distill.data.tokenize import encode_prompt
from distill.distributed import all_or_nothing, from_rank_0, process_group, raise_together, rank, total, world_size
from distill.errors import CheckpointError, ConfigError, DistillError
from distill.methods import Source, build_method
from distill.models import causal_lm
from distill.progress import StepProgress, say
from distill.records import Key, RecordFolder, RecordPart
from distill.rollouts.engines import Engine, Who, open_engine
from distill.rollouts.monitored import MonitoredTrajectory, Usage
from distill.rollouts.monitored_writer import MonitoredWriter
from distill.rollouts.plain import Plain
from distill.runs import RunFolder, write_json
from distill.samples import prompt_fits, sampling_params
from distill.seeds import mix
from distill.teachers.cache.saving import check_save, save_records, save_references

RECORD = 41  # purpose of the seeds of trajectories made here
_ROUND = 16  # trajectories per slot between two meetings of the ranks

SAVE = "rollout.save=true"

RecordWriter = MonitoredWriter | Plain


@dataclass(kw_only=True)
class RecordsSection:
    """What is rolled out: the keys of ``rollout`` in conf/rollout.yaml that an engine does not know."""

    split: str = "train"
    examples: int | None = None
    samples: int = 5
    save: bool = False

    def __post_init__(self) -> None:
        one_of("rollout.split", self.split, ("train", "test"))
        in_range("rollout.samples", self.samples, low=1)
        if self.examples is not None:
            in_range("rollout.examples", self.examples, low=1)


def load_rollout_config(overrides: Sequence[str]) -> tuple[RunConfig, RecordsSection]:
    """``conf/rollout.yaml`` with overrides, checked. Raises ConfigError."""
    composed = compose_config("rollout", overrides)
    OmegaConf.set_struct(composed, False)
    own = {field.name: composed.rollout.pop(field.name) for field in fields(RecordsSection)}
    config, section = check_config(composed), build(RecordsSection, own, "rollout")
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
            folder.enter(_what_decides(config.resolved), config.run.resume)
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


class RecordRun:
    """One run on this rank."""

    def __init__(
        self,
        config: RunConfig,
        section: RecordsSection,
        parts: Parts,
        engine: RecordWriter,
        folder: RunFolder,
    ) -> None:
        self.config, self.section, self.folder, self.tokenizer = config, section, folder, parts.tokenizer
        self.task: Task = parts.task if section.split == "train" else parts.held_out
        self.records = RecordFolder(folder.path)
        self.engine, self.skipped, self.usage = engine, 0, Usage()

    def run(self) -> dict[str, Any]:
        with all_or_nothing(CheckpointError):
            done = self.records.recover() if rank() == 0 else None
        there = from_rank_0(done)
        examples = min(self.section.examples or len(self.task), len(self.task))
        keys = [(item, sample) for item in range(examples) for sample in range(self.section.samples)]
        missing = [key for key in keys if key not in there]
        if len(missing) < len(keys):
            say(f"{self.folder.path} holds {len(keys) - len(missing)} of {len(keys)} records")
        size = _ROUND * self.config.rollout.slots * world_size()
        log_every = max(len(keys) // 20, 1)
        with StepProgress("rollout", len(keys), len(keys) - len(missing), log_every) as progress:
            for start in range(0, len(missing), size):
                before = len(keys) - len(missing) + start
                self._round(missing[start : start + size], before, progress)
        with all_or_nothing(CheckpointError):
            if rank() == 0:
                self.records.merge()
        return self._summary()

    def _round(self, keys: list[Key], before: int, progress: StepProgress) -> None:
        """Make these records, each rank its share of them; ranks fail together."""
        mine = keys[len(keys) * rank() // world_size() : len(keys) * (rank() + 1) // world_size()]
        problem = None
        try:
            with self.records.open_part(rank()) as part:
                for count, figures in self._write(mine, part):
                    progress.update(min(before + count * world_size(), before + len(keys) - 1), figures)
        except (DistillError, TooLong, CannotEncode, FloatingPointError) as error:
            problem = str(error)
        raise_together(DistillError, problem)
        progress.update(before + len(keys), {})

    def _write(self, keys: list[Key], part: RecordPart) -> Iterator[tuple[int, dict[str, float]]]:
        """Append a record per key as trajectories end; yields how many so far, with figures for the progress line."""
        examples = {item: self.task[item] for item in dict.fromkeys(item for item, _ in keys)}
        prompts = {item: encode_prompt(self.tokenizer, example) for item, example in examples.items()}
        fitting = {item for item, prompt in prompts.items() if prompt_fits(examples[item], prompt, self.config)}
        wanted = [key for key in keys if key[0] in fitting]
        self.skipped += len(keys) - len(wanted)
        seeds = [mix(self.config.seed, RECORD, *key) for key in wanted]
        breached = 0
        for count, (number, trajectory) in enumerate(
            self.engine.stream([prompts[item] for item, _ in wanted], seeds), 1
        ):
            key = wanted[number]
            part.write(record(key, examples[key[0]], trajectory, self.tokenizer, self.task))
            breached += bool(trajectory.takeovers)
            yield count, {"breach": breached / count}
        _add(self.usage, self.engine.usage)

    def _summary(self) -> dict[str, Any]:
        """Figures over all records of the folder; speeds and idle shares are those of this call, over all ranks."""
        skipped, *work = total([float(self.skipped), *map(float, asdict(self.usage).values())])
        usage = Usage(int(work[0]), int(work[1]), int(work[2]), *work[3:])
        figures: dict[str, Any] | None = None
        with all_or_nothing(CheckpointError):
            if rank() == 0:
                figures = summarise(self.records.read()) | {"skipped": int(skipped)}
        if rank() == 0:
            assert figures is not None
            figures |= {name: round(value, 4) for name, value in usage.figures().items()} if usage.wall_s else {}
            write_json(self.folder.summary, figures)
            say(f"{figures['records']} records: {self.records.merged}   breach rate {figures.get('breach', 0.0):.3f}")
        return from_rank_0(figures)


def record(
    key: Key, example: Example, trajectory: MonitoredTrajectory, tokenizer: PreTrainedTokenizerBase, task: Task
) -> dict[str, Any]:
    """One line of ``records.jsonl`` (see the module)."""

    def text(ids: Sequence[int], special: bool) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    judged = text(trajectory.ids if trajectory.accepted_ids is None else trajectory.accepted_ids, special=False)
    flags = trajectory.supervised
    return {
        "item": key[0],
        "sample": key[1],
        "id": example.id,
        "prompt": example.prompt,
        "response": text(trajectory.ids, special=False),
        "answer": example.answer,
        "correct": None if example.answer is None else task.verify(example, judged).correct,
        "finish": trajectory.finish,
        "breach": bool(trajectory.takeovers),
        "takeovers": [asdict(takeover) for takeover in trajectory.takeovers],
        "teacher_share": round(trajectory.teacher_share, 6),
        "steps": [
            {
                "text": text(step.ids, special=True),
                "value": round(step.value, 6),
                "boundary": round(step.boundary, 6),
                "entropy": round(step.entropy, 6),
                "breach": step.breach,
            }
            for step in trajectory.steps
        ],
        "prompt_length": len(trajectory.prompt_ids),
        "ids": trajectory.prompt_ids + trajectory.ids,
        "supervised": None if flags is None else list(map(int, flags)),
        "student_tokens": int(trajectory.notes["student_tokens"]),
        "teacher_tokens": int(trajectory.notes["teacher_tokens"]),
    }


def summarise(records: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Counts, rates and means over records; ``value``, ``boundary`` and ``entropy`` are means over steps.

    Raises CheckpointError for a record that lacks one of them.
    """
    names = ("breach", "teacher_share", "student_tokens", "teacher_tokens")
    sums = dict.fromkeys((*names, "value", "boundary", "entropy", "correct", "rewind"), 0.0)
    count = steps = judged = breaches = finished = 0
    for one in records:
        count += 1
        try:
            finished += one["finish"] != "length"
            for name in names:
                sums[name] += one[name]
            for step in one["steps"]:
                steps += 1
                for name in ("value", "boundary", "entropy"):
                    sums[name] += step[name]
            for takeover in one["takeovers"]:
                breaches += 1
                sums["rewind"] += takeover["step"] - takeover["rewound_to"]
            judged += one["correct"] is not None
            sums["correct"] += one["correct"] or 0
        except (KeyError, TypeError, OverflowError) as error:
            raise CheckpointError(
                f"record {count} of records.jsonl is not one of distill rollout ({type(error).__name__}: {error}); remove its "
                "line to have it made again"
            ) from None
    if not count:
        return {"records": 0}
    over = {"value": steps, "boundary": steps, "entropy": steps, "correct": judged, "rewind": breaches}
    means = {name: round(value / over.get(name, count), 6) for name, value in sums.items() if over.get(name, count)}
    return {"records": count, "steps": steps, "finished": round(finished / count, 6), **means}


def _add(usage: Usage, more: Usage) -> None:
    for name, value in asdict(more).items():
        setattr(usage, name, getattr(usage, name) + value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""

    def body(overrides: list[str]) -> dict[str, Any]:
        shown = [override for override in overrides if override != SAVE]
        return rollout(*load_rollout_config(overrides), shlex.join(["distill", "rollout", *shown, "--save"]))

    switches = {"--save": (SAVE, "keep the teacher's scores of the text in teacher.cache")}
    return run_command("rollout", __doc__ or "", body, arguments, switches)


if __name__ == "__main__":
    sys.exit(main())

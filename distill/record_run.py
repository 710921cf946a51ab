"""The records of ``distill rollout``: those that are missing are made, by all ranks, and summed up.

    RecordRun(config, section, parts, writer, folder).run()       # on every rank; returns the summary

A record is written as soon as its trajectory ends, so that a kill loses only those under way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from distill.assembly import Parts
from distill.config import RunConfig, in_range, one_of
from distill.data import CannotEncode, Example, Task, TooLong
from distill.data.tokenize import encode_prompt
from distill.distributed import all_or_nothing, from_rank_0, raise_together, rank, total, world_size
from distill.errors import CheckpointError, DistillError
from distill.progress import StepProgress, say
from distill.records import Key, RecordFolder, RecordPart
from distill.rollouts.monitored import MonitoredTrajectory, Usage
from distill.rollouts.monitored_writer import MonitoredWriter
from distill.rollouts.plain import Plain
from distill.runs import RunFolder, write_json
from distill.samples import prompt_fits
from distill.seeds import mix

RECORD = 41  # purpose of the seeds of trajectories made here
_ROUND = 16  # trajectories per slot between two meetings of the ranks

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

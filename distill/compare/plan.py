"""From a comparison to its jobs: one training run with its final evaluation each (or one set of records), stages first.

    DIR/stages/NAME[/seed_S]/        prerequisites that all entries share
    DIR/entries/NAME/seed_S/         a run of an entry: a run folder with job.json, job.log and outcome.json beside the usual files

An override may hold ``{NAME}``, which becomes the folder of that stage's model or the file of its records (of the same seed), and
makes the job wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distill.compare.config import Comparison, Stage
from distill.config import RunConfig, load_config
from distill.engine import accumulation_steps
from distill.errors import ConfigError
from distill.methods import build_method
from distill.record_run import RecordsSection
from distill.records import RecordFolder
from distill.rollout import load_rollout_config
from distill.runs import RunFolder


@dataclass(frozen=True, slots=True)
class Job:
    """One run. ``seed`` is None for a stage that all seeds share; ``records``: what a stage that trains nothing writes."""

    name: str
    seed: int | None
    stage: bool
    config: RunConfig
    ranks: int
    evaluation: dict[str, Any]  # of the final measurement; empty for records
    after: list[Job] = field(default_factory=list)  # stages that it uses
    records: RecordsSection | None = None

    @property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run.dir)

    @property
    def product(self) -> Path:
        """What ``{NAME}`` stands for."""
        return self.folder.final if self.records is None else RecordFolder(self.folder.path).merged

    @property
    def title(self) -> str:
        """What a person calls it."""
        return self.name if self.seed is None else f"{self.name} seed {self.seed}"

    @property
    def log(self) -> Path:
        """What its processes say."""
        return self.folder.path / "job.log"

    @property
    def steps(self) -> int:
        return self.config.train.steps if self.records is None else 1


def jobs_of(comparison: Comparison) -> list[Job]:
    """All jobs, each behind those it waits for; seeds in the outer loop, so that an early stop has all entries.

    Raises ConfigError for overrides that cannot work, naming the stage or entry.
    """
    return list(_Planner(comparison).jobs())


class _Planner:
    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self._task = _checked(comparison.task, "task", 1).resolved["data"] if comparison.task else None
        self._stages: dict[tuple[str, int | None], Job] = {}
        self._open: list[str] = []  # stages that are being planned

    def jobs(self) -> Iterator[Job]:
        settings, budget = self.comparison.compare, self.comparison.compare.budget
        tokens = "null" if budget.tokens is None else budget.tokens
        fixed = [f"train.steps={budget.steps}", f"train.token_budget={tokens}"]
        entries = [
            self._job(name, seed, None, [*self.comparison.common, *overrides, *self.comparison.extra, *fixed])
            for seed in settings.seeds
            for name, overrides in self.comparison.entries.items()
        ]
        yield from self._stages.values()  # only those in use, each behind those it needs
        yield from entries

    def _job(self, name: str, seed: int | None, stage: Stage | None, overrides: list[str]) -> Job:
        settings = self.comparison.compare
        where = f"{'stages' if stage else 'entries'}.{name}"
        used = [s for s in self.comparison.stages if any(f"{{{s}}}" in override for override in overrides)]
        after = {s: self._stage(s, seed, where) for s in used}
        written = [_filled(override, after) for override in overrides]
        folder = Path(settings.dir, "stages" if stage else "entries", name)
        if seed is not None:
            folder /= f"seed_{seed}"
            written.append(f"seed={seed}")
        written.append(f"run.dir={folder}")
        needed = list(after.values())
        if stage is not None and stage.command == "rollout":
            config, records = _checked_records(written, where)
            return Job(name, seed, True, config, settings.ranks, {}, needed, records)
        config = _checked([*written, "run.resume=auto"], where, settings.ranks)
        return Job(name, seed, stage is not None, config, settings.ranks, self._evaluation(config), needed)

    def _evaluation(self, config: RunConfig) -> dict[str, Any]:
        """The `eval` section, with ``data`` where the run is to be measured on other data than its own."""
        other = {} if self._task in (None, config.resolved["data"]) else {"data": self._task}
        return asdict(self.comparison.eval) | other

    def _stage(self, name: str, seed: int | None, user: str) -> Job:
        stage = self.comparison.stages[name]
        if name in self._open:
            raise ConfigError(
                f"{user} uses {{{name}}}, which itself waits for {user}: stages cannot use each other in a circle"
            )
        if stage.per_seed and seed is None:
            raise ConfigError(f"{user} uses {{{name}}}, which has a model per seed; set {user}.per_seed=true")
        key = (name, seed if stage.per_seed else None)
        if key not in self._stages:
            self._open.append(name)
            self._stages[key] = self._job(name, key[1], stage, [*stage.overrides, *self.comparison.extra])
            self._open.pop()
        return self._stages[key]


def _filled(override: str, after: Mapping[str, Job]) -> str:
    for name, job in after.items():
        override = override.replace(f"{{{name}}}", str(job.product))
    return override


def _checked(overrides: list[str], where: str, ranks: int) -> RunConfig:
    """The run's configuration; everything that can be refused before a model is loaded is refused here."""
    try:
        config = load_config("config", overrides)
        build_method(config.method)
        accumulation_steps(config.train, ranks)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config


def _checked_records(overrides: list[str], where: str) -> tuple[RunConfig, RecordsSection]:
    """The same for records."""
    try:
        config, records = load_rollout_config(overrides)
        build_method(config.method)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return config, records


def entry_names(jobs: Iterable[Job]) -> list[str]:
    """Names of the entries among the jobs, in order."""
    return list(dict.fromkeys(job.name for job in jobs if not job.stage))

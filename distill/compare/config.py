"""What is to be compared: ``conf/compare.yaml`` with an experiment on top, checked before anything runs.

comparison = load_comparison(["experiment=methods", "compare.entries=[motab]"])
comparison.entries                # {"motab": ["method=motab", …]}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distill.config import EvalSection, build, compose_config, in_range, nearest, one_of
from distill.errors import ConfigError

SECTIONS = ("compare", "stages", "common", "entries", "extra", "task", "eval")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(kw_only=True)
class BudgetSpec:
    """The same for every run."""

    steps: int = 200
    tokens: int | None = None  # see distill.token_counts

    def __post_init__(self) -> None:
        in_range("compare.budget.steps", self.steps, low=1)
        if self.tokens is not None:
            in_range("compare.budget.tokens", self.tokens, low=1)


@dataclass(kw_only=True)
class CompareSection:
    """The keys of ``compare`` in conf/compare.yaml."""

    dir: str = "outputs/compare"
    entries: list[str] | None = None
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    budget: BudgetSpec = field(default_factory=BudgetSpec)
    ranks: int = 1
    parallel: int = 1
    changed: str = "refuse"
    accuracy: str = "pass_at_1"
    baseline: str | None = None
    run_timeout_s: float = 86400.0

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"compare.seeds={self.seeds} must name at least one seed and each once, like [0,1,2,3,4]")
        in_range("compare.ranks", self.ranks, low=1)
        in_range("compare.parallel", self.parallel, low=1)
        in_range("compare.run_timeout_s", self.run_timeout_s, low=1.0)
        one_of("compare.changed", self.changed, ("refuse", "rerun"))
        one_of("compare.accuracy", self.accuracy, ("pass_at_1", "exact_chain"))


@dataclass(kw_only=True)
class Stage:
    """What entries start from or learn from, made once, or once per seed.

    With ``command: train`` it is a model, with ``command: rollout`` the records that `distill rollout` writes.
    """

    overrides: list[str] = field(default_factory=list)
    per_seed: bool = False
    command: str = "train"

    def __post_init__(self) -> None:
        one_of("command", self.command, ("train", "rollout"))


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that was asked for. ``entries`` are those selected, in the order of their definition."""

    compare: CompareSection
    stages: dict[str, Stage]
    common: list[str]
    entries: dict[str, list[str]]
    extra: list[str]
    task: list[str]
    eval: EvalSection


def load_comparison(overrides: Sequence[str]) -> Comparison:
    """Compose ``conf/compare.yaml`` with overrides and check it; the entries' own overrides are checked by ``plan``.

    Raises ConfigError for an unknown key, entry or experiment, or a value out of range.
    """
    composed = compose_config("compare", overrides)
    try:
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"'{error.full_key}': {str(error).splitlines()[0]}") from None
    for key in plain:
        if key not in SECTIONS:
            raise ConfigError(
                f"unknown section '{key}' in a comparison ({nearest(key, SECTIONS)}); settings of the runs belong into "
                f"`common` or an entry, as overrides: '{key}.KEY=VALUE'"
            )
    compare = build(CompareSection, plain["compare"], "compare")
    stages = {
        name: build(Stage, _mapping(value, f"stages.{name}"), f"stages.{name}")
        for name, value in _mapping(plain["stages"], "stages").items()
    }
    defined = {
        name: _overrides(value, f"entries.{name}") for name, value in _mapping(plain["entries"], "entries").items()
    }
    if compare.baseline is not None and compare.baseline not in defined:
        raise ConfigError(f"compare.baseline: no entry '{compare.baseline}'; {nearest(compare.baseline, defined)}")
    for name in (*stages, *defined):
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"'{name}' cannot name a folder; use letters, digits, '_', '-' and '.' for stages and entries"
            )
    return Comparison(
        compare,
        stages,
        _overrides(plain["common"], "common"),
        _select(defined, compare.entries),
        _overrides(plain["extra"], "extra"),
        _overrides(plain["task"], "task"),
        build(EvalSection, plain["eval"], "eval"),
    )


def _select(defined: dict[str, list[str]], names: list[str] | None) -> dict[str, list[str]]:
    if not defined:
        raise ConfigError("nothing to compare: choose an experiment that defines entries, like experiment=methods")
    if names is not None and not names:
        raise ConfigError(f"compare.entries=[] selects nothing; choose from: {', '.join(defined)}")
    for name in names or ():
        if name not in defined:
            raise ConfigError(f"compare.entries: no entry '{name}'; {nearest(name, defined)}")
    return {name: value for name, value in defined.items() if names is None or name in names}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must map names to settings, not {value!r}")
    return {str(key): item for key, item in value.items()}


def _overrides(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ConfigError(f"{where} must be a list of overrides like [method=gkd, engine.lr=0.001], not {value!r}")
    return list(value)

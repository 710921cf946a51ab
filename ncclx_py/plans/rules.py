"""A user's rules: which algorithm for which problems. The first that matches wins; what none matches, the model decides.

In TOML, one table per rule; every condition may be left out:

    [[rule]]
    collective = "all_reduce"
    bytes_per_rank = "[0, 8KiB)"     # payload / ranks; "[8KiB, *)" has no end; brackets include, parentheses exclude
    level = "both"                   # "intra": one host; "inter": several hosts of one rank; "both": several of several
    hosts = "[2, 8]"                 # or one number
    ranks_per_host = 4               # of the largest host
    algorithm = "leader"
    parameters = { chunks = 8 }      # optional

In CSV, the same names in the first line; ``*`` or nothing for a condition that does not matter, parameters as chunks=8;window=4:

    collective,bytes_per_rank,algorithm,parameters
    all_reduce,"[1MiB, *)",pipelined,chunks=8

`NCCLX_RULES` names the file. `NCCLX_ALGO` forces algorithms without one: ``all_reduce=ring,broadcast=chain(chunks=4)``; a
forced algorithm that does not apply is an error, while a rule that does not is passed over and named in the reason.
"""

from __future__ import annotations

import csv
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ncclx_py.plans.algorithms.registry import ALGORITHMS
from ncclx_py.plans.problems import uniform
from ncclx_py.plans.topology import Topology
from ncclx_py.units import parse_size

_CONDITIONS = ("collective", "bytes_per_rank", "level", "hosts", "ranks_per_host")
_KEYS = (*_CONDITIONS, "algorithm", "parameters")
LEVELS = ("intra", "inter", "both")


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to below `high`."""

    low: float = 0
    high: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high


EVERYTHING = Interval()


@dataclass(frozen=True)
class Rule:
    """One rule; `name` says where it stands. `forced`: an error where it does not apply."""

    name: str
    collective: str
    algorithm: str
    parameters: Mapping[str, int] = field(default_factory=dict)
    bytes_per_rank: Interval = EVERYTHING
    level: str = ""
    hosts: Interval = EVERYTHING
    ranks_per_host: Interval = EVERYTHING
    forced: bool = False

    def fits(self, topology: Topology) -> bool:
        """Whether the conditions on the topology hold."""
        hosts, ranks = len(topology.hosts), topology.widest
        here = "intra" if hosts == 1 else "inter" if ranks == 1 else "both"
        return self.level in ("", here) and hosts in self.hosts and ranks in self.ranks_per_host

    def check(self, topology: Topology) -> None:
        """Raises ValueError where the rule fits the topology, but its algorithm can never run on it."""
        if not self.fits(topology):
            return
        problem = uniform(self.collective, topology.size, topology.size * 1024, 1)  # type: ignore[arg-type]
        refusal = ALGORITHMS[self.collective][self.algorithm].refuses(problem, topology)
        if refusal:
            raise ValueError(f"{self.name}: {self.algorithm} can never run {self.collective} here: {refusal}.")


def read_rules(path: str | Path) -> tuple[Rule, ...]:
    """The rules in a TOML or CSV file. Raises ValueError naming the file, the rule and what is wrong with it."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The rule file {path} cannot be read: {error}.") from error
    if str(path).endswith(".csv"):
        rows = _csv_rows(path, text)
    else:
        rows = _toml_rows(path, text)
    return tuple(_rule(f"The rule file {path}: {place}", row) for place, row in rows)


def forced_rules(text: str, name: str = "") -> tuple[Rule, ...]:
    """The rules that `NCCLX_ALGO` stands for; `name` is what errors call it.

    Raises ValueError when it is malformed or names what does not exist.
    """
    name = name or f"NCCLX_ALGO={text}"
    rules: list[Rule] = []
    for part in re.split(r",(?![^(]*\))", text):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(\w+)\s*(?:\(([^()]*)\))?\s*", part)
        if match is None:
            raise ValueError(
                f"{name}: {part!r} is malformed: write for example all_reduce=ring or broadcast=chain(chunks=4)."
            )
        row = {"collective": match[1], "algorithm": match[2], "parameters": (match[3] or "").replace(",", ";")}
        made = _rule(name, row)
        if any(rule.collective == made.collective for rule in rules):
            raise ValueError(f"{name}: {made.collective} stands there twice.")
        rules.append(Rule(name, made.collective, made.algorithm, made.parameters, forced=True))
    return tuple(rules)


def _toml_rows(path: str | Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # brackets nested too deeply
        raise ValueError(f"The rule file {path} is not TOML: {error}.") from error
    rows = table.get("rule", [])
    if set(table) - {"rule"} or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"The rule file {path} must hold tables [[rule]] and nothing else; it has {', '.join(table)}.")
    return [(f"rule {index + 1}", row) for index, row in enumerate(rows)]


def _csv_rows(path: str | Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(text.splitlines(), strict=True, skipinitialspace=True)
    rows: list[tuple[str, dict[str, Any]]] = []
    try:
        for row in reader:
            place = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"The rule file {path}: {place}: it has not as many fields as the first line.")
            rows.append(
                (place, {key.strip(): value.strip() for key, value in row.items() if value.strip() not in ("", "*")})
            )
    except csv.Error as error:
        raise ValueError(f"The rule file {path}: line {reader.line_num}: not CSV: {error}.") from error
    return rows


def _rule(name: str, row: Mapping[str, Any]) -> Rule:
    def fail(what: str) -> ValueError:
        return ValueError(f"{name}: {what}.")

    for key in row:
        if key not in _KEYS:
            raise fail(f"there is no key {key!r}; there are {', '.join(_KEYS)}")
    collective, algorithm = row.get("collective"), row.get("algorithm")
    if collective not in ALGORITHMS:
        raise fail(f"collective = {collective!r}; it must be one of {', '.join(ALGORITHMS)}")
    if algorithm not in ALGORITHMS[collective]:
        raise fail(f"algorithm = {algorithm!r}; {collective} has {', '.join(ALGORITHMS[collective])}")
    level = row.get("level", "")
    if level not in ("", *LEVELS):
        raise fail(f"level = {level!r}; it must be one of {', '.join(LEVELS)}")
    try:
        parameters = _parameters(row.get("parameters", {}), ALGORITHMS[collective][algorithm].parameters)
        intervals = [_interval(key, row.get(key, "*")) for key in ("bytes_per_rank", "hosts", "ranks_per_host")]
    except ValueError as error:
        raise fail(str(error).rstrip(".")) from error
    return Rule(name, collective, algorithm, parameters, intervals[0], level, intervals[1], intervals[2])


def _parameters(given: Any, known: Mapping[str, int]) -> dict[str, int]:
    if isinstance(given, str):
        pairs = [part.partition("=") for part in given.split(";") if part.strip()]
        given = {key.strip(): int(value) if value.strip().isdigit() else value for key, _, value in pairs}
    if not isinstance(given, dict):
        raise ValueError(f"parameters = {given!r}; write {{ chunks = 8 }}")
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"there is no parameter {key!r}; the algorithm has {', '.join(known) or 'none'}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key} = {value!r} must be a whole number, at least 1")
    return dict(given)


def _interval(key: str, given: Any) -> Interval:
    """An interval from "*", one number, or "[a, b)" with any brackets and * for no end."""
    remedy = f"{key} = {given!r} is not an interval: write for example [0, 8KiB) or [8KiB, *)"
    if given == "*":
        return EVERYTHING
    if isinstance(given, int) and not isinstance(given, bool) and given >= 0:
        return Interval(given, given + 1)
    match = (
        re.fullmatch(r"\s*([\[(])\s*([^,\s]+)\s*,\s*([^,\s]+)\s*([\])])\s*", given) if isinstance(given, str) else None
    )
    if match is None and isinstance(given, str) and re.fullmatch(r"\s*\d+\w*\s*", given):
        return Interval(parse_size(given), parse_size(given) + 1)
    if match is None:
        raise ValueError(remedy)
    low = 0 if match[2] == "*" else parse_size(match[2]) + (match[1] == "(")
    high = math.inf if match[3] == "*" else parse_size(match[3]) + (match[4] == "]")
    if low >= high:
        raise ValueError(f"{key} = {given!r} holds no number")
    return Interval(low, high)

"""The facts of all ranks as one job of hosts, and what a check finds in them.

job = Job(size, facts_by_rank, silent={5: "no answer"})
job.hosts[0].name, job.hosts[0].ranks, job.hosts[0].section("network")
job.where({0, 1, 3})                     # "n1 and rank 3", for people
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

OK, WARN, FAIL = "ok", "warn", "fail"
LISTED = 10  # hosts or ranks that a line names


@dataclass(frozen=True)
class Finding:
    """Something that a check found: `level` is `WARN` or `FAIL`, `ranks` those concerned."""

    level: str
    text: str
    ranks: tuple[int, ...]
    remedy: str


@dataclass(frozen=True)
class Clock:
    """How far a host's clock is ahead of rank 0's, and how wrong that may be, in seconds."""

    offset: float
    uncertainty: float


@dataclass(frozen=True, eq=False)
class Host:
    """A node: its name (made unique), its ranks, and the facts of its first rank."""

    name: str
    ranks: tuple[int, ...]
    facts: Mapping[str, Any]

    def section(self, name: str) -> Mapping[str, Any]:
        """A part of the facts, empty where it could not be collected (which `checks.answers` reports)."""
        part = self.facts.get(name)
        return part if isinstance(part, Mapping) else {}


@dataclass(frozen=True)
class Job:
    """`size` ranks, the facts of those that answered, why the others are `silent`, and what the store told.

    `clocks` has the hosts' first ranks where they could be measured. `store` is where the ranks met ("" for a rank
    alone), `store_error` why they did not, `round_trip` how long an answer of the store takes in seconds.
    """

    size: int
    facts: Mapping[int, Mapping[str, Any]]
    silent: Mapping[int, str] = field(default_factory=dict)
    clocks: Mapping[int, Clock] = field(default_factory=dict)
    store: str = ""
    store_error: str | None = None
    round_trip: float | None = None

    @cached_property
    def hosts(self) -> tuple[Host, ...]:
        """In the order of their first rank. Two hosts of one name are told apart by that rank."""
        ranks: dict[str, list[int]] = {}
        for rank in sorted(self.facts):
            ranks.setdefault(str(self.facts[rank]["machine"]), []).append(rank)
        groups = list(ranks.values())
        names = [str(self.facts[group[0]]["host"]) for group in groups]
        twice = {name for name, count in Counter(names).items() if count > 1}
        return tuple(
            Host(f"{name} (rank {group[0]})" if name in twice else name, tuple(group), self.facts[self._first(group)])
            for name, group in zip(names, groups, strict=True)
        )

    def _first(self, group: list[int]) -> int:
        """The rank of a host that has collected the node's facts."""
        return next((rank for rank in group if self.facts[rank].get("local_rank") == 0), group[0])

    @property
    def several(self) -> bool:
        return len(self.hosts) > 1

    @property
    def everyone(self) -> tuple[int, ...]:
        return tuple(sorted(self.facts))

    def sections(self, name: str) -> dict[int, Mapping[str, Any]]:
        """A part of the facts of every rank that has it."""
        return {
            rank: part for rank, facts in sorted(self.facts.items()) if isinstance(part := facts.get(name), Mapping)
        }

    def where(self, ranks: Collection[int]) -> str:
        """`ranks` in words: whole hosts by name, others by number, at most `LISTED` of them."""
        chosen = set(ranks)
        if chosen == set(range(self.size)) and self.size > 1:
            return "all ranks" if self.several else self.hosts[0].name
        whole = [host for host in self.hosts if chosen.issuperset(host.ranks)]
        rest = sorted(chosen.difference(*(host.ranks for host in whole)))
        names = [host.name for host in whole] + [f"rank {rank}" for rank in rest]
        more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
        return ", ".join(names[:LISTED]) + more


def differing(
    job: Job, values: Mapping[int, Any], level: str, what: str, remedy: str, shown: Callable[[Any], str] = str
) -> list[Finding]:
    """One finding where `values` (by rank; values that can be compared) are not all equal; it concerns those that differ
    from most, and names every value with those that have it."""
    groups: dict[Any, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    if len(groups) < 2:
        return []
    by_size = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1][0]))
    parts = [f"{shown(value)} on {job.where(ranks)}" for value, ranks in by_size[:LISTED]]
    more = f"; {len(by_size) - LISTED} more" if len(by_size) > LISTED else ""
    odd = sorted(rank for _, ranks in by_size[1:] for rank in ranks)
    return [Finding(level, f"{what} differs: {'; '.join(parts)}{more}", tuple(odd), remedy)]


def by_rank(hosts: Iterable[tuple[Host, Any]]) -> dict[int, Any]:
    """A value per host as one per rank, for `differing`."""
    return {rank: value for host, value in hosts for rank in host.ranks}

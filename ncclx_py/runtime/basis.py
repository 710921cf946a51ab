"""What a group's plans rest on: the topology, the tuner and the settings, agreed between its ranks when it is made.

    said = [...]                                              # by rank: what `says` returned there; it travels with the cards
    basis = agree(member, store, timeout, os.environ, host_of, rails, said)

Ranks that see different topologies, tables, rules or settings would make plans that do not fit together. So each rank
publishes what it has, before anything runs, and a difference is an error on all of them. That costs no message of its own
unless a variable names a file, whose contents are then compared in an exchange of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

from ncclx_py.device_facts import host_facts
from ncclx_py.errors import CollectiveError
from ncclx_py.plans.errors import PlanFileError
from ncclx_py.plans.files import check_plan, load_plan
from ncclx_py.plans.plan import Plan
from ncclx_py.plans.spec import Facts, resolve, topology_for
from ncclx_py.plans.spec_file import read_spec
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Tuner
from ncclx_py.runtime.recent import Recent
from ncclx_py.runtime.settings import Settings, differences, files_named, read_settings, told_first, told_of_files
from ncclx_py.runtime.verified import VERIFIED
from ncclx_py.transport.exchange import exchange
from ncclx_py.transport.identity import machine_id


@dataclass(frozen=True)
class Membership:
    """This rank's place in a group: `ranks` are the group's global ranks; `world` says that it has all there are."""

    group: str
    rank: int
    ranks: tuple[int, ...]
    world: bool

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Basis:
    """See the module. `outside` is the plan of ``NCCLX_PLAN``, verified; None where there is none for this group.
    `verified` are plans that the process of rank 0 has verified before (``verified.py``)."""

    topology: Topology
    tuner: Tuner
    settings: Settings
    outside: Plan | None
    verified: frozenset[str] = frozenset()


class _Ground(NamedTuple):
    """All that decides the tuner of a group where no variable names a file."""

    host_of: tuple[int, ...]
    rails: int
    facts: tuple[tuple[int, Facts], ...]
    deterministic: bool


_facts: Recent[tuple[str, str, bool], Facts] = Recent(16)
_tuners: Recent[_Ground, Tuner] = Recent(64)  # what they have chosen is known to the next group on the same ground


def says(rank: int, env: Mapping[str, str], gpus: bool = False) -> list[Any]:
    """What this rank has, for `agree` on all ranks: settings, the facts of its host, and plans it has verified, or an error.

    `gpus`: the plans are for GPU memory, so inside a host the links between GPUs count.
    """
    try:
        settings = read_settings(env)
        facts = _own_facts(env, gpus)
    except (ValueError, OSError) as error:
        return [str(error), {}, [], []]
    return ["", told_first(settings, env), [facts.intra_bandwidth, facts.nics], VERIFIED.recent() if rank == 0 else []]


def _own_facts(env: Mapping[str, str], gpus: bool) -> Facts:
    """What this host's devices can do, asked once: links do not change under a program."""
    key = (env.get("NCCLX_RAILS", ""), machine_id(), gpus)
    return _facts.get(key, lambda: host_facts(env, gpus))


def agree(
    member: Membership,
    store: Any,
    timeout: timedelta,
    env: Mapping[str, str],
    host_of: Sequence[int],
    rails: int,
    said: Sequence[Sequence[Any]],
) -> Basis:
    """The basis of a group whose rank r is on host ``host_of[r]`` and gave ``said[r]``; every rank must call it, with a store
    for this.

    Raises CollectiveError on every rank when a variable or a file is wrong on one of them, or differs between two.
    """
    _compare(member, [row[0] for row in said], [row[1] for row in said])
    facts = host_reports(host_of, [row[2] for row in said])
    verified = frozenset(said[0][3])
    settings = read_settings(env)
    if not any(files_named(env).values()):
        ground = _Ground(tuple(host_of), rails, tuple(facts.items()), settings.deterministic)
        tuner = _tuners.get(ground, lambda: _tuner(topology_for(host_of, rails, {}, facts), settings, {}))
        return Basis(tuner.topology, tuner, settings, None, verified)
    basis, error, part = None, "", {}
    try:
        topology = group_topology(member, env, host_of, rails, facts)
        tuner = _tuner(topology, settings, env)
        basis = Basis(topology, tuner, settings, _outside(member, topology, settings.plan), verified)
        part = told_of_files(settings, tuner.digest())
    except (ValueError, OSError) as failure:
        error = str(failure)
    rows = exchange(store, "files", member.rank, member.size, [error, part], timeout)
    _compare(member, [row[0] for row in rows], [row[1] for row in rows])
    assert basis is not None
    return basis


def _compare(member: Membership, errors: Sequence[str], parts: Sequence[Mapping[str, str]]) -> None:
    """Raises CollectiveError where a rank has an error, or two have different settings."""
    for rank, error in enumerate(errors):
        if error:
            raise CollectiveError(f"Group {member.group!r} cannot be made: rank {rank} reports: {error}")
    differing = differences(parts)
    if differing:
        raise CollectiveError(f"Group {member.group!r} cannot be made. {differing}")


def host_reports(host_of: Sequence[int], told: Sequence[Sequence[Any]]) -> dict[int, Facts]:
    """What each host's devices can do, as its first rank reports; nothing where there is one host."""
    facts: dict[int, Facts] = {}
    if len(set(host_of)) > 1:
        for host, (bandwidth, nics) in zip(host_of, told):
            if host not in facts:
                facts[host] = Facts(bandwidth, tuple(nics), "devices")
    return facts


def group_topology(
    member: Membership, env: Mapping[str, str], host_of: Sequence[int], rails: int, facts: Mapping[int, Facts]
) -> Topology:
    """The topology of a group. The file of ``NCCLX_TOPOLOGY`` speaks of all ranks of the program, so that of a smaller
    group is a part of it. Raises ValueError when the file contradicts where the ranks are."""
    spec = read_spec(env["NCCLX_TOPOLOGY"]) if env.get("NCCLX_TOPOLOGY") else None
    everyone = member.ranks == tuple(range(member.size))
    if spec is None or not spec.host_of or member.world or (everyone and len(spec.host_of) == member.size):
        return topology_for(host_of, rails, env, facts)
    world = resolve((), 0, spec).topology
    if max(member.ranks) >= world.size:
        raise ValueError(
            f"The topology file {spec.path} has {world.size} ranks, but rank {max(member.ranks)} is in a group: make the "
            "file for all ranks of the program."
        )
    part = world.subset(member.ranks)
    for rank, (said, found) in enumerate(
        zip(part.host_of, Topology(tuple(host_of)).subset(range(member.size)).host_of)
    ):
        if said != found:
            raise ValueError(
                f"The topology file {spec.path} puts rank {member.ranks[rank]} on another host than it runs on, seen from "
                f"rank {member.ranks[0]}: correct placement in the file, or NCCLX_HOST_ID of the rank."
            )
    return part


def _tuner(topology: Topology, settings: Settings, env: Mapping[str, str]) -> Tuner:
    return Tuner.from_environment(topology, {**env, "NCCLX_DETERMINISTIC": str(int(settings.deterministic))})


def _outside(member: Membership, topology: Topology, path: str) -> Plan | None:
    """The plan in a file, if it is for a group of this size. Raises ValueError when it is wrong, or cannot be for any."""
    if not path:
        return None
    try:
        plan = load_plan(path)
        if plan.problem.size != member.size and not member.world:
            return None
        check_plan(plan, path, member.size, topology)
    except PlanFileError as error:
        raise ValueError(f"NCCLX_PLAN: {error}.") from error
    return plan

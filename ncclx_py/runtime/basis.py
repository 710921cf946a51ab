"""What a group's plans rest on: the topology, the tuner and the settings, agreed between its ranks when it is made.

Ranks that see different topologies, tables, rules or settings would make plans that do not fit together. So each rank
publishes what it has, before anything runs, and a difference is an error on all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ncclx_py.device_facts import host_facts
from ncclx_py.errors import CollectiveError
from ncclx_py.plans.errors import PlanFileError
from ncclx_py.plans.files import check_plan, load_plan
from ncclx_py.plans.plan import Plan
from ncclx_py.plans.spec import Facts, resolve, topology_for
from ncclx_py.plans.spec_file import read_spec
from ncclx_py.plans.topology import Topology
from ncclx_py.plans.tuner import Tuner
from ncclx_py.runtime.settings import Settings, differences, read_settings, shared_part
from ncclx_py.transport.exchange import exchange


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
    """See the module. `outside` is the plan of ``NCCLX_PLAN``, verified; None where there is none for this group."""

    topology: Topology
    tuner: Tuner
    settings: Settings
    outside: Plan | None


def agree(
    member: Membership,
    store: Any,
    timeout: timedelta,
    env: Mapping[str, str],
    host_of: Sequence[int],
    rails: int,
    gpus: bool = False,
) -> Basis:
    """The basis of a group whose rank r is on host ``host_of[r]``; every rank must call it, with a store for this.

    `gpus`: the plans are for GPU memory, so inside a host the links between GPUs count.

    Raises CollectiveError on every rank when a variable or a file is wrong on one of them, or differs between two.
    """
    facts = host_reports(member, store, timeout, env, host_of, gpus)
    basis, part = None, {}
    try:
        basis = _basis(member, env, host_of, rails, facts)
        part = shared_part(basis.settings, basis.tuner.digest())
    except (ValueError, OSError) as error:
        part = {"error": str(error)}
    texts = exchange(store, "basis", member.rank, member.size, json.dumps(part), timeout)
    parts = [json.loads(text) for text in texts]
    for rank, other in enumerate(parts):
        if "error" in other:
            raise CollectiveError(f"Group {member.group!r} cannot be made: rank {rank} reports: {other['error']}")
    differing = differences(parts)
    if differing:
        raise CollectiveError(f"Group {member.group!r} cannot be made. {differing}")
    assert basis is not None
    return basis


def host_reports(
    member: Membership, store: Any, timeout: timedelta, env: Mapping[str, str], host_of: Sequence[int], gpus: bool
) -> dict[int, Facts]:
    """What each host's devices can do, as its first rank reports; nothing is asked where there is one host."""
    if len(set(host_of)) == 1:
        return {}
    mine = host_facts(env, gpus)
    texts = exchange(store, "facts", member.rank, member.size, json.dumps([mine.intra_bandwidth, mine.nics]), timeout)
    facts: dict[int, Facts] = {}
    for host, text in zip(host_of, texts):
        if host not in facts:
            bandwidth, nics = json.loads(text)
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


def _basis(
    member: Membership, env: Mapping[str, str], host_of: Sequence[int], rails: int, facts: Mapping[int, Facts]
) -> Basis:
    settings = read_settings(env)
    topology = group_topology(member, env, host_of, rails, facts)
    tuner = Tuner.from_environment(topology, {**env, "NCCLX_DETERMINISTIC": str(int(settings.deterministic))})
    return Basis(topology, tuner, settings, _outside(member, topology, settings.plan))


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

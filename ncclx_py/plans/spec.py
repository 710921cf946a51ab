"""The topology of a process group: from a file, from the world itself and from the facts of the hosts; the file wins.

    topology_for(host_of, rails, os.environ)

`NCCLX_TOPOLOGY` names the file (see spec_file.py); it must say the same on every host. What the file leaves out comes from
the world, then from the facts of the hosts (`Facts`), then from the defaults, and `Resolved.sources` tells which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ncclx_py.plans.spec_file import Spec, read_spec
from ncclx_py.plans.topology import DEFAULT_INTER, DEFAULT_INTRA, Link, Topology

VARIABLE = "NCCLX_TOPOLOGY"


@dataclass(frozen=True)
class Facts:
    """What one host knows of its devices, in bytes per second; None where it does not know. `nics`: one per rail."""

    intra_bandwidth: float | None = None
    nics: tuple[float | None, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Resolved:
    """A topology, and where each of its parts comes from: "hosts", "rails", "intra.alpha", "inter.bandwidth", …"""

    topology: Topology
    sources: Mapping[str, str]


def topology_for(
    host_of: Sequence[int], rails: int, env: Mapping[str, str], facts: Mapping[int, Facts] | None = None
) -> Topology:
    """The topology of a process group whose rank r is on host ``host_of[r]``, with `rails` NICs per host.

    Uses the file that `NCCLX_TOPOLOGY` names, if any. `facts` by host must be the same on all ranks (exchange them), for
    ranks that see different topologies would make plans that do not fit. Raises ValueError as `read_spec` and `resolve`.
    """
    return resolve(host_of, rails, read_spec(env[VARIABLE]) if env.get(VARIABLE) else None, facts).topology


def resolve(
    host_of: Sequence[int],
    rails: int,
    spec: Spec | None,
    facts: Mapping[int, Facts] | None = None,
    world: str = "the world",
) -> Resolved:
    """Merges a file, the world's placement (`host_of`, which may name hosts by any numbers) and the hosts' facts.

    Raises ValueError when the file contradicts the world, naming the rank and the host. An empty `host_of` takes the
    placement from the file; `rails` = 0 takes their number from the file, else one. `world` says where `host_of` is from.
    """
    known = spec or Spec("")
    placement = _canonical(host_of) if host_of else known.host_of
    if not placement:
        raise ValueError(f"{known.path or 'No file'} does not say where the ranks are: give hosts and ranks_per_host.")
    _check_world(known, placement, rails)
    count = known.rails or rails or 1
    by_file = f"file {known.path}"
    sources = {
        "hosts": world if host_of else by_file,
        "rails": by_file if known.rails else world if rails else "default",
    }
    heard = {host: facts[name] for host, name in enumerate(dict.fromkeys(host_of)) if name in facts} if facts else {}

    def pick(name: str, *offers: tuple[float | None, str]) -> float:
        value, sources[name] = next((value, source) for value, source in offers if value is not None)
        assert value is not None
        return value

    intra_fact = [fact.intra_bandwidth for fact in heard.values()]
    slowest = (
        min((value for value in intra_fact if value is not None), default=None) if None not in intra_fact else None
    )
    intra = Link(
        pick("intra.alpha", (known.intra_alpha, by_file), (DEFAULT_INTRA.alpha, "default")),
        pick(
            "intra.bandwidth",
            (known.intra_bandwidth, by_file),
            (slowest, _source(heard)),
            (DEFAULT_INTRA.bandwidth, "default"),
        ),
    )
    nics, nic_source = _nics(known, heard, len(set(placement)), count)
    common = max(max(row) for row in nics) if nics else None
    inter = Link(
        pick("inter.alpha", (known.inter_alpha, by_file), (DEFAULT_INTER.alpha, "default")),
        pick(
            "inter.bandwidth",
            (known.inter_bandwidth, by_file),
            (common, nic_source),
            (DEFAULT_INTER.bandwidth, "default"),
        ),
    )
    uneven = nics if any(value != inter.bandwidth for row in nics for value in row) else ()
    if uneven:
        sources["nics"] = nic_source
    return Resolved(Topology(placement, count, intra, inter, uneven, known.memory, known.gamma), sources)


def _canonical(host_of: Sequence[int]) -> tuple[int, ...]:
    """The same placement with hosts numbered in the order of their first rank."""
    order = {host: number for number, host in enumerate(dict.fromkeys(host_of))}
    return tuple(order[host] for host in host_of)


def _check_world(spec: Spec, placement: Sequence[int], rails: int) -> None:
    """Raises ValueError where the file says otherwise than the world."""
    stated = spec.host_of or placement
    for rank in range(max(len(stated), len(placement))):
        if rank >= len(placement):
            lack = f"it puts rank {rank} on host {stated[rank]}, but the world has {len(placement)} ranks"
        elif rank >= len(stated):
            lack = f"it has {len(stated)} ranks, but the world has {len(placement)}: rank {rank} is on host {placement[rank]}"
        elif stated[rank] != placement[rank]:
            lack = f"it puts rank {rank} on host {stated[rank]}, but that rank runs on host {placement[rank]}"
        else:
            continue
        remedy = "Correct hosts, ranks_per_host and placement, or leave them out."
        raise ValueError(f"The topology file {spec.path} contradicts the world: {lack}. {remedy}")
    if spec.rails and rails and spec.rails != rails:
        lack = f"it has rails = {spec.rails}, but the ranks use {rails} NICs per host"
        raise ValueError(f"The topology file {spec.path} contradicts the world: {lack}. Correct it or NCCLX_RAILS.")
    hosts = max(placement) + 1
    for host, rail in spec.nics:
        if host >= hosts or rail >= (spec.rails or rails or 1):
            lack = f"it has a [[nic]] for host {host}, rail {rail}"
            count = f"there are {hosts} hosts and {spec.rails or rails or 1} rails, numbered from 0"
            raise ValueError(f"The topology file {spec.path} contradicts the world: {lack}, but {count}.")


def _nics(spec: Spec, heard: Mapping[int, Facts], hosts: int, rails: int) -> tuple[tuple[tuple[float, ...], ...], str]:
    """Bandwidths by host and rail where someone states them, else (), and who does."""
    if spec.nics:
        common = spec.inter_bandwidth or DEFAULT_INTER.bandwidth
        table = [[spec.nics.get((host, rail), common) for rail in range(rails)] for host in range(hosts)]
        return tuple(map(tuple, table)), f"file {spec.path}"
    if spec.inter_bandwidth is not None or any(len(fact.nics) < rails for fact in heard.values()) or len(heard) < hosts:
        return (), ""
    rows = [[heard[host].nics[rail] for rail in range(rails)] for host in range(hosts)]
    known = tuple(tuple(value for value in row if value) for row in rows)
    return (known, _source(heard)) if all(len(row) == rails for row in known) else ((), "")


def _source(heard: Mapping[int, Facts]) -> str:
    return ", ".join(dict.fromkeys(fact.source for fact in heard.values()))

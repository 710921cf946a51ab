"""The topology file: who is on which host, and what the links can do, in TOML.

    hosts = 4                        # may be left out: then only the links come from the file
    ranks_per_host = 8               # or one number per host: [8, 8, 4, 4]
    placement = "block"              # or "cyclic", or the host of each rank: [0, 1, 0, 1]
    rails = 2                        # NICs per host

    [intra]                          # inside a host
    alpha = "5us"                    # per message
    bandwidth = "8GB/s"              # per rank and direction; bits are written 200Mbit/s
    memory = "20GB/s"                # optional: what all ranks of a host can move together
    reduction = "10GB/s"             # optional: bytes that a rank can reduce in a second, beyond moving them

    [inter]                          # between hosts
    alpha = "50us"
    bandwidth = "200Mbit/s"          # per NIC and direction

    [[nic]]                          # optional: a NIC that differs
    host = 1
    rail = 0
    bandwidth = "100Mbit/s"

    [[tier]]                         # optional, for `ncclx simulate`: switches above the hosts, the smallest units first
    name = "rack"
    hosts = 16                       # that follow one another and share an uplink
    alpha = "100us"                  # per message that leaves a unit
    oversubscription = 2.8           # what its NICs can send over what its uplink carries (default 1)

Hosts are numbered as in `placement`; with "block" and "cyclic" in the order of `ranks_per_host`.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ncclx_py.plans.topology import Tier, Topology
from ncclx_py.units import parse_bandwidth, parse_time

_KEYS = {
    "": ("hosts", "ranks_per_host", "placement", "rails", "intra", "inter", "nic", "tier"),
    "intra": ("alpha", "bandwidth", "memory", "reduction"),
    "inter": ("alpha", "bandwidth"),
    "nic": ("host", "rail", "bandwidth"),
    "tier": ("name", "hosts", "alpha", "oversubscription"),
}

_MOST_RAILS = 1024
_MOST = 10_000_000  # ranks: more is a mistake, and would not fit into memory


@dataclass(frozen=True)
class Spec:
    """What one file says; None, zero or empty where it says nothing. Bandwidths are bytes per second, times seconds.

    Hosts are renumbered in the order of their first rank, as in `Topology`; `nics` is keyed by host and rail.
    """

    path: str
    host_of: tuple[int, ...] = ()
    rails: int = 0
    intra_alpha: float | None = None
    intra_bandwidth: float | None = None
    inter_alpha: float | None = None
    inter_bandwidth: float | None = None
    memory: float = 0.0
    gamma: float = 0.0
    nics: Mapping[tuple[int, int], float] = field(default_factory=dict)
    tiers: tuple[Tier, ...] = ()


def read_spec(path: str | Path) -> Spec:
    """The spec in a TOML file. Raises ValueError naming file, key, value and remedy when it is missing or wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The topology file {path} cannot be read: {error}.") from error
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # brackets nested too deeply
        raise ValueError(f"The topology file {path} is not TOML: {error}.") from error
    return _Reader(str(path), table).spec()


def place(ranks_per_host: Sequence[int], placement: str) -> tuple[int, ...]:
    """The host of each rank. "block": each host holds consecutive ranks; "cyclic": ranks are dealt out in turn."""
    if placement == "block":
        return tuple(host for host, count in enumerate(ranks_per_host) for _ in range(count))
    turns = range(max(ranks_per_host, default=0))
    return tuple(host for turn in turns for host, count in enumerate(ranks_per_host) if turn < count)


def write_spec(topology: Topology, comments: Sequence[str] = ()) -> str:
    """The text of a file that `read_spec` reads back as `topology`; `comments` stand at its head, one line each."""
    lines = [f"# {comment}" for comment in comments]
    lines += [
        f"hosts = {len(topology.hosts)}",
        f"ranks_per_host = {[len(members) for members in topology.hosts]}",
        f"placement = {list(topology.host_of)}",
        f"rails = {topology.rails}",
        "",
        "[intra]",
        f'alpha = "{topology.intra.alpha!r}s"',
        f'bandwidth = "{topology.intra.bandwidth!r}B/s"',
    ]
    if topology.memory:
        lines.append(f'memory = "{topology.memory!r}B/s"')
    if topology.gamma:
        lines.append(f'reduction = "{1 / topology.gamma!r}B/s"')
    lines += ["", "[inter]", f'alpha = "{topology.inter.alpha!r}s"', f'bandwidth = "{topology.inter.bandwidth!r}B/s"']
    for host, row in enumerate(topology.nics):
        for rail, value in enumerate(row):
            lines += ["", "[[nic]]", f"host = {host}", f"rail = {rail}", f'bandwidth = "{value!r}B/s"']
    return "\n".join(lines) + "\n"


class _Reader:
    """Reads one file's table and complains with its name."""

    def __init__(self, path: str, table: dict[str, Any]) -> None:
        self.path, self.table = path, table

    def spec(self) -> Spec:
        self._known("", self.table)
        intra, inter = self._section("intra"), self._section("inter")
        stated = self._host_of()
        order = {host: number for number, host in enumerate(dict.fromkeys(stated))}
        rails = self._whole("rails", self.table["rails"], 1) if "rails" in self.table else 0
        if rails > _MOST_RAILS:
            self._fail("rails", rails, f"a host has at most {_MOST_RAILS} NICs")
        nics = self._nics(len(order), rails)
        reduction = self._bandwidth("intra", intra, "reduction")
        return Spec(
            self.path,
            tuple(order[host] for host in stated),
            rails,
            self._time("intra", intra, "alpha"),
            self._bandwidth("intra", intra, "bandwidth"),
            self._time("inter", inter, "alpha"),
            self._bandwidth("inter", inter, "bandwidth"),
            self._bandwidth("intra", intra, "memory") or 0.0,
            1 / reduction if reduction else 0.0,
            {(order.get(host, host), rail): value for (host, rail), value in nics.items()},
            self._tiers(),
        )

    def _host_of(self) -> tuple[int, ...]:
        placement = self.table.get("placement", "block")
        counts = self._counts()
        if isinstance(placement, list):
            hosts = [self._whole("placement", host, 0) for host in placement]
            found = Counter(hosts)
            if not hosts or max(hosts) != len(found) - 1:
                self._fail("placement", placement, "name each host 0 to N - 1 for at least one rank")
            held = [found[host] for host in range(len(found))]
            if counts and held != counts:
                self._fail("placement", placement, f"it gives {held} ranks per host, but ranks_per_host says {counts}")
            if "hosts" in self.table and len(held) != self._whole("hosts", self.table["hosts"], 1):
                self._fail("placement", placement, f"it names {len(held)} hosts, but hosts = {self.table['hosts']}")
            return tuple(hosts)
        if placement not in ("block", "cyclic"):
            self._fail("placement", placement, 'use "block", "cyclic" or a list with the host of each rank')
        return place(counts, placement)

    def _counts(self) -> list[int]:
        given = self.table.get("ranks_per_host")
        hosts = self._whole("hosts", self.table["hosts"], 1) if "hosts" in self.table else None
        if given is None:
            if hosts is not None and not isinstance(self.table.get("placement"), list):
                self._fail("hosts", hosts, "give ranks_per_host as well")
            return []
        if isinstance(given, list):
            counts = [self._whole("ranks_per_host", count, 1) for count in given]
            if hosts is not None and len(counts) != hosts:
                self._fail("ranks_per_host", given, f"it has {len(counts)} numbers, but hosts = {hosts}")
            if not counts:
                self._fail("ranks_per_host", given, "name at least one host")
            self._possible("ranks_per_host", given, sum(counts))
            return counts
        if hosts is None:
            self._fail("ranks_per_host", given, "give hosts as well, or one number per host")
        each = self._whole("ranks_per_host", given, 1)
        self._possible("hosts", hosts, each * hosts)
        return [each] * hosts

    def _nics(self, hosts: int, rails: int) -> dict[tuple[int, int], float]:
        entries = self._entries("nic", "write each NIC as a table [[nic]] with host, rail and bandwidth")
        nics: dict[tuple[int, int], float] = {}
        for index, entry in enumerate(entries):
            where = f"nic[{index}]"
            self._known("nic", entry, where)
            for key in _KEYS["nic"]:
                if key not in entry:
                    self._fail(f"{where}.{key}", None, "it is missing")
            at = (self._whole(f"{where}.host", entry["host"], 0), self._whole(f"{where}.rail", entry["rail"], 0))
            if hosts and at[0] >= hosts:
                self._fail(f"{where}.host", at[0], f"hosts are numbered 0 to {hosts - 1}")
            if at[1] >= max(rails, 1):
                self._fail(f"{where}.rail", at[1], f"rails are numbered 0 to {max(rails, 1) - 1}; set rails")
            if at in nics:
                self._fail(where, at, "this host and rail were given before")
            nics[at] = self._bandwidth(where, entry, "bandwidth") or 0.0
        return nics

    def _tiers(self) -> tuple[Tier, ...]:
        tiers: list[Tier] = []
        for index, entry in enumerate(
            self._entries("tier", "write each tier as a table [[tier]] with name, hosts and alpha")
        ):
            where = f"tier[{index}]"
            self._known("tier", entry, where)
            for key in ("name", "hosts", "alpha"):
                if key not in entry:
                    self._fail(f"{where}.{key}", None, "it is missing")
            hosts = self._whole(f"{where}.hosts", entry["hosts"], 1)
            if tiers and hosts <= tiers[-1].hosts:
                self._fail(f"{where}.hosts", hosts, f"it must be more than the {tiers[-1].hosts} of the tier before")
            ratio = entry.get("oversubscription", 1.0)
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1e6:
                self._fail(f"{where}.oversubscription", ratio, "give a number above 0")
            alpha = self._time(where, entry, "alpha")
            tiers.append(Tier(str(entry["name"]), hosts, alpha or 0.0, float(ratio)))
        return tuple(tiers)

    def _entries(self, name: str, remedy: str) -> list[dict[str, Any]]:
        entries = self.table.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            self._fail(name, entries, remedy)
        return entries

    def _section(self, name: str) -> dict[str, Any]:
        section = self.table.get(name, {})
        if not isinstance(section, dict):
            self._fail(name, section, f"write it as a table [{name}]")
        self._known(name, section, name)
        return section

    def _known(self, kind: str, table: dict[str, Any], where: str = "") -> None:
        for key in table:
            if key not in _KEYS[kind]:
                self._fail(
                    f"{where}.{key}" if where else key, table[key], f"no such key; known: {', '.join(_KEYS[kind])}"
                )

    def _whole(self, key: str, value: Any, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._fail(key, value, f"give a whole number, at least {least}")
        return int(value)

    def _possible(self, key: str, value: Any, ranks: int) -> None:
        if ranks > _MOST:
            self._fail(key, value, f"that makes {ranks} ranks; at most {_MOST} fit")

    def _time(self, where: str, table: dict[str, Any], key: str) -> float | None:
        return self._quantity(where, table, key, parse_time)

    def _bandwidth(self, where: str, table: dict[str, Any], key: str) -> float | None:
        return self._quantity(where, table, key, parse_bandwidth)

    def _quantity(self, where: str, table: dict[str, Any], key: str, parse: Callable[[str], float]) -> float | None:
        if key not in table:
            return None
        try:
            return float(parse(table[key] if isinstance(table[key], str) else str(table[key])))
        except ValueError as error:
            self._fail(f"{where}.{key}", table[key], str(error).rstrip("."))

    def _fail(self, key: str, value: Any, remedy: str) -> NoReturn:
        raise ValueError(f"The topology file {self.path}: {key} = {value!r}: {remedy}.")

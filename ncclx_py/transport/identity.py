"""Who a rank is to the others: its host, its addresses, and how it is reached. Published once, as a card in the store.

Ranks are on one host when ``NCCLX_HOST_ID`` is equal; where it is unset, when they run on one kernel boot in one network
namespace. ``NCCLX_RAILS=eth0,eth1`` names the interfaces that carry traffic between hosts, one per rail.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"  # reserved for documentation: nothing is sent, only the route is asked for


@dataclass(frozen=True, slots=True)
class Card:
    """What a rank tells the others about itself.

    `host` decides who shares memory, `machine` which addresses work: a loopback address only within one machine.
    `addresses` has one entry per rail where rails are named, else the possible ones of the only rail. `token` must be
    shown on connecting. `pid` is that of its process in the PID namespace `pids`. `mail` is the port for messages (``mail.py``).
    """

    rank: int
    host: str
    machine: str
    addresses: tuple[str, ...]
    rails_named: bool
    port: int
    token: str
    pid: int = 0
    pids: int = 0
    mail: int = 0

    @property
    def rails(self) -> int:
        return len(self.addresses) if self.rails_named else 1

    def row(self) -> list[Any]:
        """The card as JSON values, without what goes without saying."""
        host = "" if self.host == self.machine else self.host
        where = [host, self.machine, self.addresses, self.rails_named, self.port]
        return [*where, self.token, self.pid, self.pids, self.mail]

    @classmethod
    def from_row(cls, rank: int, row: Sequence[Any]) -> Card:
        host, machine, addresses, named, port, token, pid, pids, mail = row
        return cls(rank, host or machine, machine, tuple(addresses), named, port, token, pid, pids, mail)


def machine_id() -> str:
    """Equal on ranks that share a kernel boot and a network namespace."""
    return f"{_boot_id()} {os.readlink('/proc/self/ns/net')}"


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def pid_namespace() -> int:
    """A number that is equal on ranks of one host whose process ids mean the same."""
    return os.stat("/proc/self/ns/pid").st_ino


def host_id(env: Mapping[str, str], machine: str = "") -> str:
    """`machine` is the `machine_id` where it is known already."""
    chosen = env.get("NCCLX_HOST_ID", "")
    return f"named {chosen}" if chosen else machine or machine_id()


def rail_names(env: Mapping[str, str]) -> tuple[str, ...]:
    names = [name.strip() for name in env.get("NCCLX_RAILS", "").split(",")]
    if names == [""]:
        return ()
    if "" in names:
        raise ValueError(f"NCCLX_RAILS={env['NCCLX_RAILS']!r} has an empty name: write interfaces, as in eth0,eth1.")
    return tuple(names)


def addresses(env: Mapping[str, str]) -> tuple[str, ...]:
    """One address per named rail; else the one that reaches the master, and the one of the default route."""
    named = rail_names(env)
    if named:
        return tuple(interface_address(name) for name in named)
    found = [_route_to(env["MASTER_ADDR"])] if env.get("MASTER_ADDR") else []
    found.append(_route_to(_ELSEWHERE))
    return tuple(dict.fromkeys(address for address in found if address)) or ("127.0.0.1",)


def make_card(rank: int, port: int, env: Mapping[str, str], mail: int = 0) -> Card:
    machine, where = machine_id(), addresses(env)
    return Card(
        rank,
        host_id(env, machine),
        machine,
        where,
        bool(rail_names(env)),
        port,
        secrets.token_hex(16),
        os.getpid(),
        pid_namespace(),
        mail,
    )


def unix_name(token: str) -> str:
    """The abstract name of the rank with this token. Names can be seen by everybody on the host, tokens not."""
    return f"\0ncclx-{hashlib.blake2b(token.encode(), digest_size=12).hexdigest()}"


def host_numbers(cards: list[Card]) -> tuple[int, ...]:
    """The host of each rank, numbered in the order of their first rank."""
    seen: dict[str, int] = {}
    return tuple(seen.setdefault(card.host, len(seen)) for card in cards)


def reach(me: Card, peer: Card, rail: int) -> str:
    """The address at which this rank reaches `peer`. Raises ValueError where it published none that can work."""
    if me.rails_named:
        return peer.addresses[rail]
    if me.machine == peer.machine:
        return peer.addresses[0]
    for address in peer.addresses:
        if not address.startswith("127.") and address != "::1":
            return address
    raise ValueError(
        f"Rank {peer.rank} is on another machine, but knows only the address {peer.addresses[0]} of itself. "
        "Set NCCLX_RAILS to the interface that connects the hosts, e.g. NCCLX_RAILS=eth0."
    )


def interface_address(name: str) -> str:
    """The IPv4 address of an interface. Raises ValueError, naming `NCCLX_RAILS`, where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            known = ", ".join(name for _, name in socket.if_nameindex())
            raise ValueError(
                f"NCCLX_RAILS names {name!r}, which is no interface with an IPv4 address here ({error.strerror}). "
                f"This host has: {known}."
            ) from error
    return socket.inet_ntoa(answer[20:24])


def _route_to(target: str) -> str:
    """The address of the interface from which `target` is reached, "" where there is no route."""
    try:
        family, where = _endpoint(target)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _endpoint(target: str) -> tuple[int, Any]:
    """The family and the address of `target`; an IPv4 address needs no looking up."""
    try:
        socket.inet_pton(socket.AF_INET, target)
    except OSError:
        found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        return found[0], found[4]
    return socket.AF_INET, (target, 9)

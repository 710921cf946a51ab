"""Who a rank is to the others: its host, its addresses, and how it is reached. Published once, as a card in the store.

Ranks are on one host when ``NCCLX_HOST_ID`` is equal; where it is unset, when they run on one kernel boot in one network
namespace. ``NCCLX_RAILS=eth0,eth1`` names the interfaces that carry traffic between hosts, one per rail.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

_SIOCGIFADDR = 0x8915
_ELSEWHERE = "192.0.2.1"  # reserved for documentation: nothing is sent, only the route is asked for


@dataclass(frozen=True, slots=True)
class Card:
    """What a rank tells the others about itself.

    `host` decides who shares memory, `machine` which addresses work: a loopback address only within one machine.
    `addresses` has one entry per rail where rails are named, else the possible ones of the only rail. `token` must be
    shown on connecting.
    """

    rank: int
    host: str
    machine: str
    addresses: tuple[str, ...]
    rails_named: bool
    port: int
    token: str

    @property
    def rails(self) -> int:
        return len(self.addresses) if self.rails_named else 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Card:
        fields = json.loads(text)
        return cls(**{**fields, "addresses": tuple(fields["addresses"])})


def machine_id() -> str:
    """Equal on ranks that share a kernel boot and a network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/net')}"


def host_id(env: Mapping[str, str]) -> str:
    chosen = env.get("NCCLX_HOST_ID", "")
    return f"named {chosen}" if chosen else machine_id()


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


def make_card(rank: int, port: int, env: Mapping[str, str]) -> Card:
    named = bool(rail_names(env))
    return Card(rank, host_id(env), machine_id(), addresses(env), named, port, secrets.token_hex(16))


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
        family, kind, _, _, where = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return str(probe.getsockname()[0])
    except OSError:
        return ""

"""What an emulated cluster looks like: hosts, ranks on each, rails and their rates. Pure data, read from the command line's words.

shape = Shape(ranks=parse_ranks("4x2"), rates=parse_rates("200mbit", rails=1))
shape.size, shape.host_of, shape.local_rank
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ncclx_py.plans.spec_file import place
from ncclx_py.units import parse_bandwidth

PLACEMENTS = ("block", "cyclic")
DEFAULT_BURST = 128 * 1024  # the burst is free bytes: with 256 KiB 1 MiB beats its bound, 32 KiB slows everything down
# Built into every Linux, so that emulated hosts are alike everywhere. A machine's own may be bbr, which stalls where many ranks
# share few cores: 13 to 30 % slower collectives were measured.
CONGESTION = "reno"
MAX_HOSTS, MAX_RAILS, MAX_RANKS = 250, 16, 4096


@dataclass(frozen=True)
class Shape:
    """`ranks[h]` ranks on host h; `rates[i]` bytes per second and direction of rail i of every host (None: not shaped).

    `spine` bytes per second and direction join the two halves of the hosts (None: all hosts share one switch per rail).
    `burst` bytes may pass a shaped link at once. "block" placement numbers the ranks host after host, "cyclic" deals
    them out to the hosts in turn. `congestion` names TCP's congestion control on the hosts (None: the machine's own).
    Raises ValueError naming what is impossible.
    """

    ranks: tuple[int, ...]
    rates: tuple[float | None, ...] = (None,)
    spine: float | None = None
    burst: int = DEFAULT_BURST
    placement: str = "block"
    congestion: str | None = None

    def __post_init__(self) -> None:
        if not self.ranks or min(self.ranks) < 1 or len(self.ranks) > MAX_HOSTS:
            raise ValueError(f"ranks per host {list(self.ranks)}: 1 to {MAX_HOSTS} hosts with at least one rank each.")
        if sum(self.ranks) > MAX_RANKS:
            raise ValueError(f"{sum(self.ranks)} ranks: one machine can emulate at most {MAX_RANKS}.")
        if not 1 <= len(self.rates) <= MAX_RAILS:
            raise ValueError(f"{len(self.rates)} rails: from 1 to {MAX_RAILS} are possible.")
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement {self.placement!r} is not one of {', '.join(PLACEMENTS)}.")
        if self.spine is not None and len(self.ranks) < 2:
            raise ValueError("A spine joins two halves of the hosts, but there is one host.")

    @property
    def hosts(self) -> int:
        return len(self.ranks)

    @property
    def rails(self) -> int:
        return len(self.rates)

    @property
    def size(self) -> int:
        return sum(self.ranks)

    @cached_property
    def host_of(self) -> tuple[int, ...]:
        """The host of each rank."""
        return place(self.ranks, self.placement)

    @cached_property
    def local_rank(self) -> tuple[int, ...]:
        """The position of each rank among those of its host."""
        return tuple(self.host_of[:rank].count(host) for rank, host in enumerate(self.host_of))


def parse_ranks(text: str) -> tuple[int, ...]:
    """``4x2`` (4 hosts with 2 ranks each), ``4+2`` or ``4,2`` (one number of ranks per host)."""
    if match := re.fullmatch(r"(\d{1,6})x(\d{1,6})", text):
        if int(match[1]) > MAX_HOSTS:
            raise ValueError(f"{text!r}: at most {MAX_HOSTS} hosts are possible.")
        return (int(match[2]),) * int(match[1])
    if re.fullmatch(r"\d{1,6}([+,]\d{1,6})*", text):
        return tuple(int(part) for part in re.split(r"[+,]", text))
    raise ValueError(f"{text!r} is not a cluster: write HOSTSxRANKS as in 4x2, or the ranks of each host as in 4+2.")


def str_ranks(ranks: tuple[int, ...]) -> str:
    """The shortest text that `parse_ranks` reads as `ranks`."""
    return f"{len(ranks)}x{ranks[0]}" if len(set(ranks)) == 1 else "+".join(map(str, ranks))


def parse_rates(text: str | None, rails: int | None) -> tuple[float | None, ...]:
    """Bytes per second of each rail: one rate for all `rails` (one if None), or one per rail as in ``200mbit,100mbit``.

    None is for links that are not shaped. Raises ValueError when the numbers of rails differ.
    """
    if rails is not None and rails < 1:
        raise ValueError(f"{rails} rails: a host has at least one NIC.")
    if text is None:
        return (None,) * (rails or 1)
    rates = tuple(parse_bandwidth(part) for part in text.split(","))
    if rails is None or rails == len(rates):
        return rates
    if len(rates) == 1:
        return rates * rails
    raise ValueError(f"The rates {text} are those of {len(rates)} rails, but there are {rails} rails.")

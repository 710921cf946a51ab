"""How long it takes until a job of P ranks can communicate: with everything made at once, or only what the start needs.

    start = predict_start(ranks=131072, groups=8, eager=False)
    start.seconds, start.requests_per_rank, start.connections_per_rank
    published_starts()                     # NCCL and NCCLX as published, beside a model with three fitted figures

`predict_start` is of this backend. Lazy, which is what it does: one exchange of cards, with device facts and settings, of three
requests a rank to the store (transport/exchange.py), no connection, and sub-groups when they are first used. Eager, which it does
not do: in every group, each rank reads the card of every other (size² values in all) and connects to every other, as gloo does.
Requests are served one after the other by one store. Imports, CUDA contexts and the rendezvous itself are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ncclx_py.simulate.figures import ASSUMED, FITTED, MEASURED, PUBLISHED, Figure

_REQUESTS = 3  # of a rank in the exchange: set, wait, get
_BATCH = 1024  # texts that rank 0 asks for in one request
_HERE = "on the machine this was written on, 2 cores:"


@dataclass(frozen=True)
class StartFigures:
    """What `predict_start` rests on."""

    request: Figure = field(
        default=Figure(17e-6, "s", MEASURED, f"{_HERE} half of a TCPStore get of 250 bytes and back, 33 µs")
    )
    store_bandwidth: Figure = field(
        default=Figure(337e6, "byte/s", MEASURED, f"{_HERE} TCPStore get of 8 MiB; one thread serves all ranks")
    )
    card: Figure = field(
        default=Figure(297, "byte", MEASURED, "a card with facts and settings, as it is written to the store")
    )
    packed_card: Figure = field(
        default=Figure(
            29, "byte", MEASURED, "what a card adds to the book of all, compressed: 20,000 cards, hosts of 8"
        )
    )
    read_card: Figure = field(default=Figure(13e-6, "s", MEASURED, f"{_HERE} unpacking and reading one card of 1,024"))
    gloo_address: Figure = field(
        default=Figure(154, "byte", MEASURED, "what a rank writes for gloo: its addresses, in groups of 4 and 16")
    )
    connect: Figure = field(default=Figure(100e-6, "s", ASSUMED, "one TCP connection, made one after the other"))


@dataclass(frozen=True)
class Start:
    """`server_s` is when the store has answered everything, `rank_s` what a rank does itself; `seconds` is their sum. Rank 0,
    which collects for all, has requests of its own number."""

    ranks: int
    groups: int
    eager: bool
    requests_per_rank: float
    requests_of_rank_0: float
    bytes_per_rank: float
    connections_per_rank: int
    server_s: float
    rank_s: float

    @property
    def seconds(self) -> float:
        return self.server_s + self.rank_s


def predict_start(ranks: int, groups: int, eager: bool, figures: StartFigures = StartFigures()) -> Start:
    """For a default group of `ranks`, and `groups` sub-groups that each rank is a member of; each split holds all ranks, and
    its sub-groups are as large as the default group at most, which is what is counted. Raises ValueError for less than one rank
    or a negative number of groups."""
    if ranks < 1 or groups < 0:
        raise ValueError(f"{ranks} ranks in {groups} sub-groups: at least one rank, and no negative number of groups.")
    card, packed = figures.card.value, figures.packed_card.value
    if eager:
        made = 1 + groups
        requests = of_rank_0 = made * (3.0 * ranks + 3)  # a key of each rank for our cards; a wait and a get for gloo
        keys = requests * ranks
        moved = made * ranks * (card + figures.gloo_address.value)
        connections = made * (ranks - 1)
    else:
        requests = float(_REQUESTS)
        of_rank_0 = 2.0 + 2 * -(-(ranks - 1) // _BATCH)  # set; of each batch wait and get; set
        keys = requests * (ranks - 1) + of_rank_0 + 2 * ranks  # every key of a batch is looked up
        moved = card + packed * ranks
        connections, made = 0, 1
    server = keys * figures.request.value + moved * ranks / figures.store_bandwidth.value
    own = made * ranks * figures.read_card.value + connections * figures.connect.value
    return Start(ranks, groups, eager, requests, of_rank_0, moved, connections, server, own)


class Published(NamedTuple):
    """Seconds to start a job, as the NCCLX paper (arXiv 2510.20171) gives them: NCCL (eager) and NCCLX (lazy)."""

    ranks: int
    eager_s: float
    lazy_s: float


PUBLISHED_STARTS = (Published(8192, 14.5, 3.97), Published(32768, 55.7, 11.9), Published(98304, 265.0, 24.0))
TOPOLOGY = Figure(
    10.0 / 49152**2,
    "s per pair of ranks",
    PUBLISHED,
    "NCCL's topology takes 10 s at 48k ranks and grows as their square",
)


class Row(NamedTuple):
    """One published time beside the model's; `fitted` says that the model was given it."""

    ranks: int
    mode: str
    published_s: float
    model_s: float
    fitted: bool

    @property
    def error(self) -> float:
        return self.model_s / self.published_s - 1


def fitted_figures(points: Sequence[Published] = PUBLISHED_STARTS) -> dict[str, Figure]:
    """Three figures from three of the six published times: lazy at the smallest and the largest scale, eager at the smallest."""
    small, large = points[0], points[-1]
    lazy = (large.lazy_s - small.lazy_s) / (large.ranks - small.ranks)
    base = small.lazy_s - lazy * small.ranks
    eager = (small.eager_s - base - TOPOLOGY.value * small.ranks**2) / small.ranks
    return {
        "base": Figure(base, "s", FITTED, "what does not grow with the job, in both; lazy at 8k and 96k"),
        "lazy_per_rank": Figure(lazy, "s per rank", FITTED, "neighbours only, O(N) topology; lazy at 8k and 96k"),
        "eager_per_rank": Figure(eager, "s per rank", FITTED, "check-in at one root and connections; eager at 8k"),
        "topology_per_pair": TOPOLOGY,
    }


def published_starts(points: Sequence[Published] = PUBLISHED_STARTS) -> list[Row]:
    """NCCL's and NCCLX's published times beside base + per_rank · P (+ topology · P² where eager)."""
    figures = {name: figure.value for name, figure in fitted_figures(points).items()}
    rows = []
    for point in points:
        lazy = figures["base"] + figures["lazy_per_rank"] * point.ranks
        pairs = figures["topology_per_pair"] * point.ranks**2
        eager = figures["base"] + figures["eager_per_rank"] * point.ranks + pairs
        rows.append(Row(point.ranks, "eager", point.eager_s, eager, point is points[0]))
        rows.append(Row(point.ranks, "lazy", point.lazy_s, lazy, point in (points[0], points[-1])))
    return rows

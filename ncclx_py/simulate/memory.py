"""Memory of a rank that communication takes: with every channel, algorithm and connection made at once, or those in use.

    gpu_memory(ranks=65536, eager=True)       # a library of NCCL's kind, on the GPU
    host_memory(ranks=65536, per_host=8, groups=8, eager=False)      # this backend, in the process, on the CPU

GPU memory is that of published NCCL (about 10 GB at 64k GPUs) and NCCLX (about 4.2 GB). One figure, the number of
communicators, is fitted, to the eager one; the lazy one is a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ncclx_py.simulate.figures import ASSUMED, FITTED, MEASURED, PUBLISHED, Figure
from ncclx_py.transport.window import BLOCK_WORDS, LANES

PUBLISHED_MEMORY = (65536, 10e9, 4.2e9)  # GPUs, bytes of NCCL, bytes of NCCLX (arXiv 2510.20171)
_MIB = 1 << 20


@dataclass(frozen=True)
class MemoryFigures:
    """What the memory of a rank is made of."""

    buffers: Figure = field(
        default=Figure(
            9.19 * _MIB, "byte", ASSUMED, "of a connection and channel: NCCL's Simple 4, LL 0.5, LL128 4.69 MiB"
        )
    )
    channels: Figure = field(
        default=Figure(16, "channels", ASSUMED, "of a communicator across hosts with 400 Gbit/s NICs")
    )
    ring: Figure = field(default=Figure(2, "connections", ASSUMED, "of a channel: one to send on, one to receive on"))
    tree: Figure = field(default=Figure(6, "connections", ASSUMED, "of a channel: parent and two children, both ways"))
    ring_share: Figure = field(
        default=Figure(0.5, "of communicators", ASSUMED, "use rings alone, the others trees alone; lazy makes no more")
    )
    metadata: Figure = field(
        default=Figure(
            1e9 / 100_000, "byte per rank", PUBLISHED, "over 1 GB of GPU memory at 100k; lazy keeps it elsewhere"
        )
    )
    known_rank: Figure = field(default=Figure(390, "byte", MEASURED, "tracemalloc over 20,000 cards of ranks"))
    gloo_pair: Figure = field(
        default=Figure(
            3500, "byte", MEASURED, "resident memory of 48 gloo groups of 48 in one process, less 2 of 2, per pair"
        )
    )
    socket: Figure = field(default=Figure(16 << 10, "byte", ASSUMED, "kernel memory of an idle TCP connection"))


class Memory(NamedTuple):
    """Bytes of one rank, by what they are for."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def communicators(figures: MemoryFigures = MemoryFigures()) -> Figure:
    """How many make the published eager memory, at its scale."""
    ranks, eager, _ = PUBLISHED_MEMORY
    count = (eager - figures.metadata.value * ranks) / _communicator(figures, figures.ring.value + figures.tree.value)
    return Figure(count, "communicators", FITTED, "to the published memory of eager NCCL, 10 GB at 64k")


def gpu_memory(
    ranks: int, eager: bool, groups: float | None = None, figures: MemoryFigures = MemoryFigures()
) -> Memory:
    """Of a library of NCCL's kind with `groups` communicators a rank (None: as many as fit what is published)."""
    count = communicators(figures).value if groups is None else groups
    if eager:
        each = _communicator(figures, figures.ring.value + figures.tree.value)
        return Memory({"buffers": count * each, "metadata": figures.metadata.value * ranks})
    share = figures.ring_share.value
    return Memory(
        {"buffers": count * _communicator(figures, share * figures.ring.value + (1 - share) * figures.tree.value)}
    )


def host_memory(
    ranks: int, per_host: int, groups: int, eager: bool, figures: MemoryFigures = MemoryFigures()
) -> Memory:
    """Of this backend: what it keeps of each rank, the words of its window for each neighbour, and connections that stand."""
    if per_host < 1:
        raise ValueError(f"{per_host} ranks per host: at least one.")
    made = 1 + groups if eager else 1
    pairs = made * (ranks - 1) if eager else 0
    return Memory(
        {
            "cards": made * ranks * figures.known_rank.value,
            "window words": float(made * min(ranks, per_host) * LANES * BLOCK_WORDS * 8),
            "gloo pairs": pairs * figures.gloo_pair.value,
            "sockets": pairs * figures.socket.value,
        }
    )


def _communicator(figures: MemoryFigures, connections: float) -> float:
    return figures.channels.value * connections * figures.buffers.value

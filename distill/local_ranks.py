"""Ranks on this host without torchrun: a port to meet at, and the environment that torchrun would have given each."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port of this host that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun would have given each rank; nothing for a single one, whose world is its own."""
    if ranks == 1:
        return [{}]
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]

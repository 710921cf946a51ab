"""The job of the fault matrix: what a training program looks like to the collectives, in small.

Ranks run a copy of this file outside of the package, so that traces name its lines as those of a user's program.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import ncclx_py

STARTING = timedelta(seconds=60)  # for making groups, which is not what is tried


def train(deadline: float, steps: int, work: float, elements: int) -> None:
    """Each of `steps` has `work` seconds, and collectives over all ranks, over those of a host and over one rank in two, with
    a `deadline` in seconds."""
    dist.init_process_group("ncclx", timeout=STARTING)
    rank, size, hosts = dist.get_rank(), dist.get_world_size(), int(os.environ["GROUP_WORLD_SIZE"])
    by_host = [list(range(size * host // hosts, size * (host + 1) // hosts)) for host in range(hosts)]
    halves = [list(range(first, size, 2)) for first in (0, 1)]
    groups: list[Any] = [dist.group.WORLD, mine(rank, by_host, "host"), mine(rank, halves, "half")]
    everyone, host, half = groups
    for group in groups:
        dist.barrier(group=group)
        group.set_timeout(timedelta(seconds=deadline))
    large, small = torch.ones(elements), torch.ones(50)
    for step in range(steps):
        ncclx_py.mark_step(step + 1)
        time.sleep(work)
        dist.all_reduce(large, op=dist.ReduceOp.MAX, group=everyone)
        parts = [torch.empty(50) for _ in range(host.size())]
        dist.all_gather(parts, small, group=host)
        dist.all_reduce(torch.ones(200), group=half)
        dist.all_reduce(torch.ones(30), group=everyone)
    dist.destroy_process_group()


def mine(rank: int, members: list[list[int]], description: str) -> dist.ProcessGroup:
    """This rank's one of several groups, which all ranks make."""
    groups = [dist.new_group(ranks, timeout=STARTING, group_desc=description) for ranks in members]
    return next(group for group, ranks in zip(groups, members) if rank in ranks)

"""Bytes and JSON between the ranks of a group, for what they have to know of each other.

    gather_json({"host": "a", "rails": 2}, group)      # every rank's value, in order of rank

torch's ``all_gather_object`` and ``broadcast_object_list`` unpickle what comes from the network, which runs whatever a peer sends.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_bytes(
    mine: bytes, group: dist.ProcessGroup | None = None, device: str | torch.device | None = None
) -> list[bytes]:
    """Every rank's bytes, in order of rank. All ranks of the group call it. `device`: where the group's tensors are."""
    device = _device(group) if device is None else device
    data = _tensor(mine, device)
    lengths = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(mine)], device=device), group=group)
    sizes = [int(length) for length in lengths]
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    rows = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(rows, padded, group=group)
    return [_bytes(row[:size]) for row, size in zip(rows, sizes, strict=True)]


def broadcast_bytes(
    mine: bytes, source: int, group: dist.ProcessGroup | None = None, device: str | torch.device | None = None
) -> bytes:
    """The bytes of global rank `source`, on all ranks of the group; what the others give does not matter."""
    device = _device(group) if device is None else device
    data = _tensor(mine, device)
    length = torch.tensor([len(mine)], device=device)
    dist.broadcast(length, source, group=group)
    if dist.get_rank() != source:
        data = torch.empty(int(length), dtype=torch.uint8, device=device)
    dist.broadcast(data, source, group=group)
    return _bytes(data)


def gather_json(mine: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value as JSON has it (tuples come as lists), in order of rank."""
    return [json.loads(data) for data in gather_bytes(json.dumps(mine).encode(), group)]


def broadcast_json(mine: Any, source: int, group: dist.ProcessGroup | None = None) -> Any:
    """The value of global rank `source` as JSON has it."""
    return json.loads(broadcast_bytes(json.dumps(mine).encode(), source, group))


def _device(group: dist.ProcessGroup | None) -> str:
    return "cuda" if dist.get_backend(group) == "nccl" else "cpu"


def _tensor(data: bytes, device: str | torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)


def _bytes(data: Tensor) -> bytes:
    return data.cpu().numpy().tobytes()
